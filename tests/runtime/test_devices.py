"""What a model computes in: by its training and by what the device can do. The device's facts are injected."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

import videogen
from videogen.errors import InvalidRequest, Note
from videogen.runtime import kernels, names, quantize
from videogen.runtime.devices import choose_device, choose_dtype, computes_bfloat16
from videogen.runtime.plan import ITEM
from videogen.testing import tiny_pipeline

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
UNKNOWN = tiny_pipeline().card
CARDS = {"float16": replace(UNKNOWN, dtypes=("float16",)), "bfloat16": replace(UNKNOWN, dtypes=("bfloat16",))}


@pytest.mark.parametrize(
    ("trained", "dtype", "device", "has_bfloat16", "expected"),
    [
        ("float16", "auto", GPU, True, FP16),
        ("float16", "auto", GPU, False, FP16),
        ("bfloat16", "auto", GPU, True, BF16),
        ("bfloat16", "auto", GPU, False, FP32),  # with a note: not float16, which overflows
        ("float16", "auto", CPU, True, FP32),
        ("bfloat16", "auto", CPU, True, FP32),
        ("bfloat16", "bfloat16", CPU, True, BF16),
        ("bfloat16", "bfloat16", GPU, False, "refused: --dtype float32"),
        ("float16", "bfloat16", GPU, False, "refused: --dtype float16"),
        ("float16", "bfloat16", GPU, True, BF16),
        ("bfloat16", "float16", GPU, True, "warned: --dtype bfloat16"),
        ("bfloat16", torch.float16, GPU, False, "warned: --dtype float32"),
        ("float16", "float16", GPU, False, FP16),
        ("bfloat16", "float32", GPU, False, FP32),
        ("bfloat16", "float64", GPU, True, FP64),
    ],
)
def test_the_dtype_follows_the_weights_and_the_device(trained, dtype, device, has_bfloat16, expected):
    def choose() -> torch.dtype:
        return choose_dtype(dtype, device, CARDS[trained], bfloat16=has_bfloat16)

    kind, _, hint = str(expected).partition(": ")
    if kind == "refused":
        with pytest.raises(InvalidRequest) as caught:
            choose()
        assert caught.value.hint == hint
    elif kind == "warned":
        with pytest.warns(Note, match=f"{hint} does not"):
            assert choose() == FP16
    elif dtype == "auto" and trained == "bfloat16" and not has_bfloat16:
        with pytest.warns(Note, match="computed in float32"):
            assert choose() == expected
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose() == expected


def test_of_an_unknown_model_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_dtype("auto", GPU, UNKNOWN, bfloat16=True) == BF16
        assert choose_dtype("float16", GPU, UNKNOWN, bfloat16=True) == FP16


@pytest.mark.parametrize("wrong", ["int8", "float99", "", torch.int32, "__name__"])
def test_what_is_no_dtype(wrong):
    with pytest.raises(InvalidRequest, match="not a dtype"):
        choose_dtype(wrong, CPU, UNKNOWN)


@pytest.mark.parametrize(("capability", "able"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_begins_with_ampere(monkeypatch, capability, able):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert computes_bfloat16(GPU) == (able or bool(torch.version.hip))
    assert computes_bfloat16(CPU)


def test_devices_that_are_not_there(monkeypatch):
    for wrong in ("warp", "", "cuda:x"):
        with pytest.raises(InvalidRequest, match="no device"):
            choose_device(wrong)
    for other in ("meta", "mps", "xpu", "vulkan:0", torch.device("meta")):
        with pytest.raises(InvalidRequest, match="no device") as caught:
            choose_device(other)
        assert caught.value.why
    assert choose_device("cpu") == choose_device(CPU) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(InvalidRequest, match="CUDA"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == GPU
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InvalidRequest, match="cuda:2"):
        choose_device("cuda:2")


def test_names_known_without_torch_are_those_there_are():
    assert set(names.KERNELS) == {"auto", "int8", *kernels.KERNELS}
    assert set(names.FORMATS) == set(quantize.FORMATS)
    assert set(names.DTYPES) == set(ITEM)
    good = {"device": "cpu", "dtype": "auto", "memory": "auto", "kernel": "auto", "quantize": None}
    names.check_names(**good)
    for param, wrong in (
        ("device", "warp"),
        ("dtype", "float8"),
        ("memory", "tight"),
        ("kernel", "x"),
        ("quantize", "x"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            names.check_names(**good | {param: wrong})
        assert caught.value.param == param
        assert caught.value.why
        assert caught.value.hint
        with pytest.raises(InvalidRequest):  # before anything is fetched, or looked for
            videogen.load("nobody/nothing", offline=True, **{param: wrong})
