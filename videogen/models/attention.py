"""Joint attention over text and video tokens, and the small functions a block is made of.

Two seams for speed, both plain PyTorch by default: `Attention.kernel`, the scaled dot product, and `Ops`, three pure
functions that a fused kernel may replace. Whatever is put there must give the numbers of the plain row. It may write
its result into `y` of `gate_add` and `x` of `norm_rotate`, which nobody else holds; the residual stream stays as it is.

A stream of several clips (`Segments`) has functions of its own, `ops_of`, and a seam of its own, `Attention.packed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from videogen.models.positions import rotate
from videogen.types import Segments

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
PackedKernel = Callable[[Kernel, Tensor, Tensor, Tensor, tuple[int, ...]], Tensor]  # the plain one, q, k, v, lengths


def sdpa(q: Float[Tensor, "b k s c"], k: Float[Tensor, "b k s c"], v: Float[Tensor, "b k s c"]) -> Tensor:
    """Scaled dot-product attention without a mask: the text's padding takes part, as when the models were trained."""
    return F.scaled_dot_product_attention(q, k, v)


def each_segment(
    kernel: Kernel,
    q: Float[Tensor, "b k s c"],
    k: Float[Tensor, "b k s c"],
    v: Float[Tensor, "b k s c"],
    lengths: tuple[int, ...],
) -> Float[Tensor, "b k s c"]:
    """Attention inside each of the segments that lie one behind the other, by the kernel for a single one."""
    parts = zip(*(x.split(list(lengths), dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([kernel(*part) for part in parts], dim=2)


def norm_modulate(
    x: Float[Tensor, "b s d"],
    weight: Float[Tensor, " d"] | None,
    bias: Float[Tensor, " d"] | None,
    eps: float,
    shift: Float[Tensor, "2 #b d"],
    scale: Float[Tensor, "2 #b d"],
    text_length: int,
) -> Float[Tensor, "b s d"]:
    """One LayerNorm for all tokens, then the scale and shift of the token's modality (row 0 video, row 1 text)."""
    x = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    text = x[:, :text_length] * (1 + scale[1, :, None]) + shift[1, :, None]
    video = x[:, text_length:] * (1 + scale[0, :, None]) + shift[0, :, None]
    return torch.cat([text, video], dim=1)


def gate_add(
    x: Float[Tensor, "b s d"], y: Float[Tensor, "b s d"], gate: Float[Tensor, "2 #b d"], text_length: int
) -> Float[Tensor, "b s d"]:
    """x + gate · y with the gate of the token's modality (row 0 video, row 1 text)."""
    text = x[:, :text_length] + gate[1, :, None] * y[:, :text_length]
    video = x[:, text_length:] + gate[0, :, None] * y[:, text_length:]
    return torch.cat([text, video], dim=1)


def norm_rotate(
    x: Float[Tensor, "b k s d"],
    weight: Float[Tensor, " d"],
    bias: Float[Tensor, " d"],
    eps: float,
    rotary: Float[Tensor, "2 n c"] | None,
    text_length: int,
) -> Float[Tensor, "b k s d"]:
    """LayerNorm over each head of queries or keys, then the rotary turn of video tokens; text has no position."""
    x = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if rotary is None:
        return x
    return torch.cat([x[:, :, :text_length], rotate(x[:, :, text_length:], rotary)], dim=2)


@dataclass(frozen=True)
class Ops:
    """The row of functions a block computes with; `dataclasses.replace(block.ops, gate_add=…)` swaps one."""

    norm_modulate: Callable[..., Tensor] = norm_modulate
    gate_add: Callable[..., Tensor] = gate_add
    norm_rotate: Callable[..., Tensor] = norm_rotate


def ops_of(segments: Segments) -> Ops:
    """The plain functions for a stream of several clips: shift, scale and gate [2, clips, d] have a row for each."""
    sizes = [tokens for tokens, _, _ in segments.runs]
    rows = [(modality, clip) for _, clip, modality in segments.runs]

    def norm_modulate(x: Tensor, weight, bias, eps: float, shift: Tensor, scale: Tensor, text_length: int) -> Tensor:
        runs = F.layer_norm(x, x.shape[-1:], weight, bias, eps).split(sizes, dim=1)
        return torch.cat([run * (1 + scale[row]) + shift[row] for run, row in zip(runs, rows, strict=True)], dim=1)

    def gate_add(x: Tensor, y: Tensor, gate: Tensor, text_length: int) -> Tensor:
        return x + torch.cat([gate[row] * run for run, row in zip(y.split(sizes, dim=1), rows, strict=True)], dim=1)

    def norm_rotate(x: Tensor, weight, bias, eps: float, rotary: Tensor | None, text_length: int) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        if rotary is None:
            return x
        runs = zip(x.split(sizes, dim=2), rotary.split(sizes, dim=1), rows, strict=True)
        return torch.cat([run if modality else rotate(run, turn) for run, turn, (modality, _) in runs], dim=2)

    return Ops(norm_modulate, gate_add, norm_rotate)


class Attention(nn.Module):
    """Self-attention over the joint stream, LayerNorm on queries and keys (eps 1e-6, shared by the heads)."""

    def __init__(self, heads: int, head_dim: int, *, bias: bool) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(width, width, bias=bias)
        self.to_v = nn.Linear(width, width, bias=bias)
        self.norm_q = nn.LayerNorm(head_dim, eps=1e-6)  # not the block's 1e-5
        self.norm_k = nn.LayerNorm(head_dim, eps=1e-6)
        self.to_out = nn.Linear(width, width)
        self.kernel: Kernel = sdpa
        self.packed: PackedKernel = each_segment

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        rotary: Float[Tensor, "2 n c"] | None,
        text_length: int,
        ops: Ops,
        segments: Segments | None = None,
    ) -> Float[Tensor, "b s d"]:
        q, k, v = (rearrange(to(x), "b s (k c) -> b k s c", k=self.heads) for to in (self.to_q, self.to_k, self.to_v))
        q = ops.norm_rotate(q, self.norm_q.weight, self.norm_q.bias, self.norm_q.eps, rotary, text_length)
        k = ops.norm_rotate(k, self.norm_k.weight, self.norm_k.bias, self.norm_k.eps, rotary, text_length)
        y = self.kernel(q, k, v) if segments is None else self.packed(self.kernel, q, k, v, segments.lengths)
        return self.to_out(rearrange(y, "b k s c -> b s (k c)"))
