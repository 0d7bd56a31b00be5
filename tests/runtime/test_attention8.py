"""8-bit attention: the algorithm's own error and no other, smooth keys, whole ends, undone bit for bit."""

import dataclasses

import pytest
import torch

from videogen.errors import InvalidRequest
from videogen.models.attention import Attention, Kernel, sdpa
from videogen.models.dit import DiT
from videogen.runtime import attention8 as room
from videogen.runtime.attention8 import attention8, restore_attention, set_attention8
from videogen.testing import TINY_DIT, tiny_batch, tiny_pipeline


def qkv(tokens: int = 150, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, 64, generator=generator).to(dtype) for _ in range(3)]


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def kernels_of(dit: DiT) -> list[Kernel]:
    return [module.kernel for module in dit.modules() if isinstance(module, Attention)]


@pytest.mark.parametrize("tokens", [1, 64, 150])
def test_it_is_attention_to_8_bits(tokens):
    q, k, v = qkv(tokens)
    assert error(attention8(q, k, v), sdpa(q, k, v)) < 0.04
    out = attention8(*qkv(tokens, torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert out.shape == q.shape


def test_a_common_part_of_the_keys_costs_nothing():
    """Keys of trained models have one, many times as large as the rest; without smoothing it eats up the 8 bits."""
    q, k, v = qkv()
    shifted = k + 30 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    expected = sdpa(q.double(), shifted.double(), v.double())
    assert error(attention8(q, shifted, v), expected) < 0.04


def test_without_rounding_the_loop_over_keys_is_exact_attention(monkeypatch):
    monkeypatch.setattr(room, "_in_int8", lambda x, block: x)
    monkeypatch.setattr(room, "FP8", torch.float32)
    q, k, v = qkv()
    torch.testing.assert_close(attention8(10 * q, k, v), sdpa(10 * q, k, v), rtol=1e-4, atol=1e-4)


def test_scales_are_per_block_of_tokens():
    """A block of small queries keeps its precision beside one of large queries."""
    x = torch.ones(1, 1, 256, 4)
    x[:, :, :128] *= 1e-4 * torch.arange(1, 5) / 4
    x[:, :, 128:] *= 1e4
    torch.testing.assert_close(room._in_int8(x, 128), x, rtol=0.02, atol=0)


def test_the_ends_are_whole_gradients_are_plain_and_undo_is_exact():
    dit = tiny_pipeline(dit=dataclasses.replace(TINY_DIT, num_layers=4)).dit
    batch = tiny_batch(TINY_DIT)
    kernels = kernels_of(dit)
    with torch.no_grad():
        plain = dit(*batch)
        set_attention8(set_attention8(dit))
        assert 1e-5 < error(dit(*batch), plain) < 0.05
    whole = [now is before for now, before in zip(kernels_of(dit), kernels, strict=True)]
    assert whole == [True, False, False, True]
    assert torch.equal(dit(*batch), plain), "with gradients on, the plain kernel computes"
    restore_attention(restore_attention(dit))
    with torch.no_grad():
        assert torch.equal(dit(*batch), plain)
    assert kernels_of(dit) == kernels


def test_on_cuda_it_is_sageattention_or_a_reason(monkeypatch):
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match="needs sageattention"):
        room._kernel(torch.device("cuda"))


@pytest.mark.gpu
def test_sageattention_is_as_near_as_the_plain_algorithm():
    pytest.importorskip("sageattention")
    q, k, v = (x.cuda() for x in qkv(dtype=torch.bfloat16))
    expected = sdpa(q.double(), k.double(), v.double())
    assert error(room._kernel(q.device)(q, k, v), expected) < 1.5 * error(attention8(q, k, v), expected) + 0.005
