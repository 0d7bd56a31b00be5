"""A named kernel is used, or the reason why not is said and nothing changes."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from videogen.errors import InvalidRequest
from videogen.models.attention import sdpa
from videogen.models.dit import DiT
from videogen.runtime import kernels
from videogen.runtime.kernels import set_kernel
from videogen.testing import TINY_DIT, randomize, tiny_batch


def network() -> DiT:
    dit = DiT(TINY_DIT)
    randomize(dit, seed=0)
    return dit.eval()


def installed(monkeypatch, attention) -> None:
    """A stand-in for xformers."""
    ops = ModuleType("xformers.ops")
    ops.memory_efficient_attention = attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(kernels, "find_spec", lambda name: ModuleSpec(name, None))


@torch.no_grad()
def test_xformers_gets_its_own_layout_and_gives_the_same_numbers(monkeypatch):
    def attention(q, k, v):  # [b, s, heads, c], as xformers has it
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return sdpa(q, k, v).transpose(1, 2)

    dit, batch = network(), tiny_batch(TINY_DIT)
    expected = dit(*batch)
    installed(monkeypatch, attention)
    assert torch.allclose(set_kernel(dit, "xformers")(*batch), expected, atol=1e-6)
    assert all(block.attention.kernel is not sdpa for block in dit.blocks)


def test_a_kernel_that_fails_here_says_why_and_changes_nothing(monkeypatch):
    def attention(q, k, v):
        raise NotImplementedError("No operator found\nfor this device")

    dit = network()
    installed(monkeypatch, attention)
    with pytest.raises(InvalidRequest, match=r"does not work for torch\.float32 on cpu") as error:
        set_kernel(dit, "xformers")
    assert "NotImplementedError: No operator found" in str(error.value)
    assert all(block.attention.kernel is sdpa for block in dit.blocks)


def test_what_is_missing_or_unknown_is_said(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match="not installed"):
        set_kernel(network(), "xformers")
    with pytest.raises(InvalidRequest, match="no attention kernel 'flush'"):
        set_kernel(network(), "flush")


@pytest.mark.gpu
def test_xformers_on_a_gpu_equals_sdpa():
    pytest.importorskip("xformers")
    dit = network().to("cuda", torch.float16)
    latents, t, cond = tiny_batch(TINY_DIT)
    batch = (
        latents.cuda().half(),
        t.cuda(),
        cond.replace(
            **{name: value.cuda().half() for name in ("text", "channels") if (value := getattr(cond, name)) is not None}
        ),
    )
    expected = dit(*batch)
    assert torch.allclose(set_kernel(dit, "xformers")(*batch), expected, atol=1e-2)
