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


def installed(
    monkeypatch, attention, *, module: str = "xformers.ops", name: str = "memory_efficient_attention"
) -> None:
    """A stand-in for a package."""
    package, stand_in = module.split(".")[0], ModuleType(module)
    setattr(stand_in, name, attention)
    monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.setattr(kernels, "find_spec", lambda name: ModuleSpec(name, None))


def by_tokens(q, k, v):
    """[b, s, heads, c], as xformers and FlashAttention have it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return sdpa(q, k, v).transpose(1, 2)


@torch.no_grad()
def test_xformers_gets_its_own_layout_and_gives_the_same_numbers(monkeypatch):
    dit, batch = network(), tiny_batch(TINY_DIT)
    expected = dit(*batch)
    installed(monkeypatch, by_tokens)
    assert torch.allclose(set_kernel(dit, "xformers")(*batch), expected, atol=1e-6)
    assert all(block.attention.kernel is not sdpa for block in dit.blocks)


def test_a_kernel_that_fails_here_says_why_and_changes_nothing(monkeypatch):
    def attention(q, k, v):
        raise NotImplementedError("No operator found\nfor this device")

    dit = network()
    installed(monkeypatch, attention)
    with pytest.raises(InvalidRequest, match=r"does not work for torch\.float32 on cpu") as error:
        set_kernel(dit, "xformers")
    assert "why: No operator found" in str(error.value)
    assert all(block.attention.kernel is sdpa for block in dit.blocks)


def test_what_is_missing_or_unknown_is_said(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match="not installed"):
        set_kernel(network(), "xformers")
    with pytest.raises(InvalidRequest, match="no attention kernel 'flush'"):
        set_kernel(network(), "flush")


@pytest.mark.parametrize("result", [lambda out: out, lambda out: (out, None)], ids=["out", "out and sums"])
@torch.no_grad()
def test_flash_attention_3_gets_its_own_layout(monkeypatch, result):
    dit, batch = network(), tiny_batch(TINY_DIT)
    expected = dit(*batch)
    installed(monkeypatch, lambda *qkv: result(by_tokens(*qkv)), module="flash_attn_interface", name="flash_attn_func")
    assert torch.allclose(set_kernel(dit, "fa3")(*batch), expected, atol=1e-6)


def test_sage_computes_where_no_gradient_is_wanted(monkeypatch):
    calls = []

    def attention(q, k, v, *, tensor_layout, is_causal):
        assert (tensor_layout, is_causal) == ("HND", False)
        calls.append(q.shape)
        return sdpa(q, k, v).detach()

    dit, batch = network(), tiny_batch(TINY_DIT)
    installed(monkeypatch, attention, module="sageattention", name="sageattn")
    with torch.no_grad():
        set_kernel(dit, "sage")(*batch)
    seen = len(calls)
    assert seen >= 2
    dit(*batch).sum().backward()
    assert len(calls) == seen
    assert dit.blocks[0].attention.to_q.weight.grad.any()


@pytest.mark.parametrize("name", ["sdpa", "flash", "math", "auto"])
@torch.no_grad()
def test_torchs_own_work_on_a_cpu(name: str):
    dit, batch = network(), tiny_batch(TINY_DIT)
    expected = dit(*batch)
    assert torch.allclose(set_kernel(dit, name)(*batch), expected, atol=1e-5)
    assert torch.equal(set_kernel(dit, "sdpa")(*batch), expected)


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU says")
def test_a_kernel_of_another_device_says_so(name: str):
    with pytest.raises(InvalidRequest, match="CUDA only"):
        set_kernel(network(), name)


def test_auto_takes_the_clearly_fastest_and_measures_once(monkeypatch):
    """On a stand-in for a GPU: what was measured decides, a tie is the first named, a shape is measured once."""
    device, calls = torch.device("cuda"), []
    times: dict[str, float] = {}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(kernels, "measure", lambda *args: calls.append(args) or times)
    monkeypatch.setattr(kernels, "FASTEST", {})

    def choice(tokens: int) -> str:
        return kernels.fastest((2, 48, tokens, 64), device, torch.bfloat16)

    times.update({"sdpa": 10.0, "cudnn": 9.9, "flash": 9.8})
    assert choice(100) == "sdpa"
    times.update({"cudnn": 7.0, "fa3": 6.0, "efficient": 12.0})
    assert choice(100) == "sdpa"  # remembered
    assert choice(200) == "fa3"
    assert len(calls) == 2
    assert {"sage", "xformers", "math"}.isdisjoint(kernels.MEASURED)
    assert kernels.fastest((1, 1, 8, 16), torch.device("cpu"), torch.float32) == "sdpa"


def test_what_does_not_work_here_is_not_measured(monkeypatch):
    monkeypatch.setattr(kernels, "_milliseconds", lambda kernel, *qkv: 1.0)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    found = kernels.measure((1, 2, 8, 16), torch.device("cpu"), torch.float32)
    assert found == {"sdpa": 1.0, "flash": 1.0}


@pytest.mark.gpu
@torch.no_grad()
def test_auto_on_a_gpu_equals_sdpa():
    shape, device = (1, 4, 1000, 64), torch.device("cuda", 0)
    times = kernels.measure(shape, device, torch.bfloat16)
    assert {"sdpa", "flash", "efficient"} <= times.keys()
    q, k, v = torch.randn(3, *shape, device=device, dtype=torch.bfloat16)
    exact = sdpa(q.double(), k.double(), v.double())
    for name in times:
        assert (kernels.KERNELS[name]()(q, k, v).double() - exact).abs().max() < 1e-2, name
    assert (kernels._auto(q, k, v).double() - exact).abs().max() < 1e-2


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
