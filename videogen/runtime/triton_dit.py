"""The passes between a block's matrix products as Triton kernels, for CUDA; `runtime.dit` says what each computes.

They move every value once: time is bytes over bandwidth. One program takes one token, [d] or [heads, c], so that sums
stay inside a program. Statistics are float32 (float64 for float64), the turn float32 as in `models.positions.rotate`.
"""
# pyright: reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm_modulate(
    x_at, weight_at, bias_at, shift_at, scale_at, out_at, eps, length, text_length, d, modality_step, sample_step,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = tl.where(token % length < text_length, modality_step, 0) + (token // length) * sample_step
    place = tl.arange(0, BLOCK)
    inside = place < d
    x = tl.load(x_at + token * d + place, mask=inside, other=0).to(WIDE)
    x = tl.where(inside, x - tl.sum(x, 0) / d, 0)
    y = x * (1 / tl.sqrt(tl.sum(x * x, 0) / d + eps))
    if HAS_WEIGHT:
        y *= tl.load(weight_at + place, mask=inside, other=0).to(WIDE)
    if HAS_BIAS:
        y += tl.load(bias_at + place, mask=inside, other=0).to(WIDE)
    y *= 1 + tl.load(scale_at + row + place, mask=inside, other=0).to(WIDE)
    y += tl.load(shift_at + row + place, mask=inside, other=0).to(WIDE)
    tl.store(out_at + token * d + place, y.to(out_at.dtype.element_ty), mask=inside)


@triton.jit
def _gate_add(
    x_at, y_at, gate_at, length, text_length, d, modality_step, sample_step, BLOCK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = tl.where(token % length < text_length, modality_step, 0) + (token // length) * sample_step
    place = tl.arange(0, BLOCK)
    inside = place < d
    x = tl.load(x_at + token * d + place, mask=inside, other=0).to(WIDE)
    y = tl.load(y_at + token * d + place, mask=inside, other=0).to(WIDE)
    gate = tl.load(gate_at + row + place, mask=inside, other=0).to(WIDE)
    tl.store(y_at + token * d + place, (x + gate * y).to(y_at.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rotate(
    x_at, weight_at, bias_at, cos_at, sin_at, eps, length, text_length, heads, c, sample_step, head_step, token_step,
    TURNS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    token = program % length
    head, place = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (place < c)
    at = x_at + (program // length) * sample_step + token * token_step + head * head_step + place
    x = tl.load(at, mask=inside, other=0).to(WIDE)
    x = tl.where(inside, x - (tl.sum(x, 1) / c)[:, None], 0)
    y = x * (1 / tl.sqrt(tl.sum(x * x, 1) / c + eps))[:, None]
    y *= tl.load(weight_at + place, mask=place < c, other=0).to(WIDE)
    y += tl.load(bias_at + place, mask=place < c, other=0).to(WIDE)
    if TURNS:  # noqa: SIM102 (known when compiling, the next is not)
        if token >= text_length:
            pair = tl.arange(0, BLOCK // 2)[None, :]
            row = (token - text_length) * (c // 2) + pair
            cos = tl.load(cos_at + row, mask=pair < c // 2, other=0)
            sin = tl.load(sin_at + row, mask=pair < c // 2, other=0)
            even, odd = tl.split(tl.reshape(y.to(tl.float32), (HEADS, BLOCK // 2, 2)))
            turned = tl.join(even * cos - odd * sin, odd * cos + even * sin)
            y = tl.reshape(turned, (HEADS, BLOCK)).to(WIDE)
    tl.store(at, y.to(x_at.dtype.element_ty), mask=inside)


def norm_modulate(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, shift: Tensor, scale: Tensor, text_length: int
) -> Tensor:
    x, (shift, scale) = x.contiguous(), _rows(len(x), shift, scale)
    (b, s, d), out = x.shape, torch.empty_like(x)
    _norm_modulate[(b * s,)](
        x, x if weight is None else weight, x if bias is None else bias, shift, scale, out, eps, s, text_length, d,
        shift.stride(0), shift.stride(1), HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **_shape(x, d)
    )  # fmt: skip
    return out


def gate_add_(x: Tensor, y: Tensor, gate: Tensor, text_length: int) -> None:
    x, (gate,) = x.contiguous(), _rows(len(x), gate)
    b, s, d = x.shape
    _gate_add[(b * s,)](x, y, gate, s, text_length, d, gate.stride(0), gate.stride(1), **_shape(x, d))


def norm_rotate_(x: Tensor, weight: Tensor, bias: Tensor, eps: float, rotary: Tensor | None, text_length: int) -> None:
    b, k, s, c = x.shape
    cos, sin = (x, x) if rotary is None else rotary.contiguous().unbind()
    _norm_rotate[(b * s,)](
        x, weight, bias, cos, sin, eps, s, text_length, k, c, x.stride(0), x.stride(1), x.stride(2),
        TURNS=rotary is not None, HEADS=triton.next_power_of_2(k), **_shape(x, c)
    )  # fmt: skip


def _rows(batch: int, *rows: Tensor) -> list[Tensor]:
    """[2, b, d] or [2, 1, d], which serves every sample, with equal steps (a step of 0 for the one)."""
    if len({row.stride() for row in rows}) > 1 or rows[0].stride(-1) != 1:
        rows = tuple(row.contiguous() for row in rows)
    return [row.expand(-1, batch, -1) for row in rows]


def _shape(x: Tensor, size: int) -> dict:
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "WIDE": wide, "num_warps": 8 if x.shape[-1] * x.shape[1] >= 2048 else 4}
