"""Attention in 8 bits, after SageAttention (arXiv:2410.02367, 2411.10958): int8 for q·k, fp8 for weights·v. Lossy.

What makes int8 enough for the scores is that the keys' mean over the tokens is taken off first: it adds the same to
all scores of a query, so softmax does not see it, but it is most of a key. On CUDA the package sageattention computes;
elsewhere the same steps run in plain PyTorch, which is slow and shows the price in numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from videogen.errors import InvalidRequest
from videogen.models.attention import Kernel
from videogen.models.dit import Block, DiT
from videogen.runtime.quantize import inner_blocks

QUERIES, KEYS = 128, 64  # tokens that share a scale
FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3


@dataclass(frozen=True)
class Attention8:
    """A kernel in 8 bits and the one it stands for, which computes where gradients are wanted."""

    kernel: Kernel
    plain: Kernel

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (self.plain if torch.is_grad_enabled() else self.kernel)(q, k, v)


def set_attention8(dit: DiT, *, whole_ends: int | None = None) -> DiT:
    """8-bit attention in the blocks of `dit`, in place; undone by `restore_attention`.

    whole_ends  how many blocks at either end keep their kernel (default: one in twenty, at least one)
    """
    kernel = _kernel(next(dit.parameters()).device)
    restore_attention(dit)
    for block in inner_blocks(dit, whole_ends):
        block.attention.kernel = Attention8(kernel, block.attention.kernel)
    return dit


def restore_attention(dit: DiT) -> DiT:
    """Undoes `set_attention8`: each block has the kernel it had. Does nothing to a plain model."""
    for block in dit.blocks:
        assert isinstance(block, Block)
        if isinstance(block.attention.kernel, Attention8):
            block.attention.kernel = block.attention.kernel.plain
    return dit


def attention8(
    q: Float[Tensor, "b k s c"], k: Float[Tensor, "b k s c"], v: Float[Tensor, "b k s c"]
) -> Float[Tensor, "b k s c"]:
    """The algorithm in plain PyTorch, a block of keys at a time (SageAttention2, algorithm 1, scales per block)."""
    dtype, tokens = q.dtype, q.shape[2]
    q, k, v = q.float() * q.shape[-1] ** -0.5, k.float(), v.float()
    q = _in_int8(q, QUERIES)
    k = _in_int8(k - k.mean(2, keepdim=True), KEYS)
    v_scale = v.abs().amax(2, keepdim=True).clamp(min=1e-12) / LARGEST  # a scale per channel
    v = (v / v_scale).to(FP8).float()

    highest = q.new_full((*q.shape[:3], 1), -torch.inf)
    total, out = torch.zeros_like(highest), torch.zeros_like(q)
    for start in range(0, tokens, KEYS):
        some = slice(start, start + KEYS)
        score = q @ k[:, :, some].transpose(2, 3)
        higher = torch.maximum(highest, score.amax(-1, keepdim=True))
        weight, fade = (score - higher).exp(), (highest - higher).exp()
        total = fade * total + weight.sum(-1, keepdim=True)
        out = fade * out + (weight * LARGEST).to(FP8).float() @ v[:, :, some]
        highest = higher
    return (out / total * (v_scale / LARGEST)).to(dtype)


def _in_int8(x: Float[Tensor, "b k s c"], block: int) -> Float[Tensor, "b k s c"]:
    """x rounded to int8 with a scale per block of tokens, and multiplied by it again: sums of products are exact."""
    short = -x.shape[2] % block
    blocks = rearrange(F.pad(x, (0, 0, 0, short)), "b k (n block) c -> b k n block c", block=block)
    scale = blocks.abs().amax((3, 4), keepdim=True).clamp(min=1e-12) / 127
    return rearrange((blocks / scale).round() * scale, "b k n block c -> b k (n block) c")[:, :, : x.shape[2]]


def _kernel(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if device.type != "cuda":
        return attention8
    if find_spec("sageattention") is None:
        raise InvalidRequest(
            "8-bit attention on CUDA needs sageattention, which is not installed.",
            why="in plain PyTorch it would be slower than attention in 16 bits.",
            hint="pip install sageattention",
            param="kernel",
        )
    from sageattention import sageattn  # type: ignore[import-not-found]

    return lambda q, k, v: sageattn(q, k, v, tensor_layout="HND", is_causal=False)
