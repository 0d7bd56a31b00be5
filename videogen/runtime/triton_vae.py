"""The fused operations of vae.py on CUDA. Imported when the first of them is called there; needs Triton.

A convolution with its bias, residual and sums is either one kernel of ours, or the library's convolution and a kernel
that does the rest; which is measured once per kind of convolution.

All tensors are [b, c, f, h, w] with channels last: a pixel's channels lie side by side, everything else has strides.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

VALUES = 4096  # per program of the kernels that compute value by value


def norm_silu(
    x: Tensor,
    affine: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    ratio: int,
    offset: int,
    past: Tensor | None,
    out: Tensor,
    out_keep: Tensor,
) -> None:
    batch, channels, frames, rows, width = x.shape
    kept, wide = out_keep.shape[2], triton.next_power_of_2(channels)
    pixels = max(1, VALUES // wide)
    over = x if scale is None or shift is None else scale
    direct = frames >= kept  # else some of what is kept was kept before
    _norm_silu[(triton.cdiv(rows * width, pixels), batch)](
        x, affine, scale, shift, past, out, out_keep,
        batch, channels, frames, rows, width, out_keep.shape[3] if direct else 0,
        over.shape[2], ratio, offset, width // over.shape[4],
        *_steps(x), *over.stride(), *_steps(x if past is None else past), *_steps(out), *_steps(out_keep),
        KEPT=kept, PAST=past is not None, MODULATED=scale is not None, PIXELS=pixels, CHANNELS=wide,
    )  # fmt: skip
    if not direct:
        out_keep.copy_(out[:, :, -kept:, : out_keep.shape[3]])


@triton.jit
def _norm_silu(
    x, affine, scale, shift, past, out, keep,
    batch, channels, frames, rows, width, keep_rows, latent_frames, ratio, offset, ratio_width,
    x_b, x_f, x_h, s_b, s_c, s_f, s_h, s_w, p_b, p_f, p_h, o_b, o_f, o_h, k_b, k_f, k_h,
    KEPT: tl.constexpr, PAST: tl.constexpr, MODULATED: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program takes some pixels through all frames, so that what it keeps may lie over the past that it read."""
    clip = tl.program_id(1).to(tl.int64)
    pixel, channel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS), tl.arange(0, CHANNELS)
    row, column = (pixel // width).to(tl.int64), pixel % width
    real = (row < rows)[:, None] & (channel < channels)[None]
    inside = (column * channels)[:, None] + channel[None]
    norm_scale = tl.load(affine + clip * channels + channel, channel < channels, 0)[None]
    norm_shift = tl.load(affine + (batch + clip) * channels + channel, channel < channels, 0)[None]
    to = out + clip * o_b + (row * o_h)[:, None] + inside
    if PAST:
        for frame in tl.static_range(KEPT):
            before = tl.load(past + clip * p_b + frame * p_f + (row * p_h)[:, None] + inside, real)
            tl.store(to + frame * o_f, before, real)
        tl.debug_barrier()
    for frame in range(frames):
        at = clip * 0 + frame  # 64 bits
        factor, term = norm_scale, norm_shift
        if MODULATED:
            odd = frames % 2 * (latent_frames > 1)  # an odd first frame has a latent of its own
            over = (at * latent_frames) // frames
            if odd == 1:
                over = tl.where(at == 0, 0, 1 + (at - 1) * (latent_frames - 1) // tl.maximum(frames - 1, 1))
            spot = ((row + offset) // ratio * s_h + column // ratio_width * s_w)[:, None] + (channel * s_c)[None]
            spot += clip * s_b + over * s_f
            m = tl.load(scale + spot, real, 0).to(factor.dtype)
            term = m * norm_shift + tl.load(shift + spot, real, 0).to(factor.dtype)
            factor = m * norm_scale
        value = tl.load(x + clip * x_b + at * x_f + (row * x_h)[:, None] + inside, real, 0).to(factor.dtype)
        value = value * factor + term
        value = (value / (1 + tl.exp(-value))).to(out.dtype.element_ty)
        tl.store(to + (KEPT + at) * o_f, value, real)
        if (not PAST) and frame == 0:
            for first in tl.static_range(KEPT):
                tl.store(to + first * o_f, value, real)
        last = at - (frames - KEPT)
        if last >= 0:
            place = keep + clip * k_b + last * k_f + (row * k_h)[:, None] + inside
            tl.store(place, value, real & (row < keep_rows)[:, None])


def channel_sums(x: Tensor) -> Tensor:
    return _finish(x, x)


def interleave(x: Tensor, out: Tensor) -> Tensor:
    return _finish(x[:, :, None], out[:, :, None], phases=True)


def conv_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> Tensor:
    x, weight = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, weight))
    kind = (x.device, x.dtype, tuple(weight.shape), width_class(out))
    if kind not in FASTEST:
        FASTEST[kind] = measured(x, weight, bias, out) if x.dtype != torch.float64 else library_conv
    return FASTEST[kind](x, weight, bias, residual, out)


def library_conv(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> Tensor:
    return _finish(F.conv3d(x, weight, None, padding=(0, 0, 1)), out, bias=bias, residual=residual)


def fused_conv(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> Tensor:
    batch, channels, frames, rows, width = out.shape
    size = {"M": 128, "N": min(128, max(16, triton.next_power_of_2(channels))), "K": 64}
    size["K"] = min(size["K"], max(16, triton.next_power_of_2(x.shape[1])))
    places = triton.cdiv(frames * rows * width, size["M"])
    partial = torch.empty(places, batch, channels, 2, dtype=torch.float32, device=x.device)
    grid = (places, triton.cdiv(channels, size["N"]), batch)
    _conv[grid](
        x, weight, bias, residual, out, partial,
        batch, x.shape[1], channels, frames, rows, width,
        *_steps(x), *_steps(out if residual is None else residual), *_steps(out),
        **size, TIMES=weight.shape[2], BIAS=bias is not None, RESIDUAL=residual is not None,
        EXACT="ieee" if x.dtype == torch.float32 else "tf32", num_warps=8, num_stages=3,
    )  # fmt: skip
    return partial.sum(0, dtype=torch.float64)


@triton.jit
def _conv(
    x, weight, bias, residual, out, partial,
    batch, channels_in, channels, frames, rows, width,
    x_b, x_f, x_h, r_b, r_f, r_h, o_b, o_f, o_h,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TIMES: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """M pixels by N channels of the result: a matrix product over the taps and K channels at a time."""
    clip = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * M + tl.arange(0, M)
    channel = tl.program_id(1) * N + tl.arange(0, N)
    frame, row, column = (pixel // (rows * width)).to(tl.int64), pixel // width % rows, pixel % width
    real = (frame < frames)[:, None] & (channel < channels)[None]
    here = x + clip * x_b + frame * x_f + row * x_h + column * channels_in
    deep = tl.cdiv(channels_in, K)
    total = tl.zeros((M, N), tl.float32)
    for step in range(TIMES * 9 * deep):
        tap, inner = step // deep, step % deep * K + tl.arange(0, K)
        aside = tap % 3 - 1
        seen = (frame < frames) & (column + aside >= 0) & (column + aside < width)
        offset = tap // 9 * x_f + tap // 3 % 3 * x_h + aside * channels_in
        a = tl.load((here + offset)[:, None] + inner[None], seen[:, None] & (inner < channels_in)[None], 0)
        at = (channel * (TIMES * 9) + tap)[None] * channels_in + inner[:, None]
        b = tl.load(weight + at, (channel < channels)[None] & (inner < channels_in)[:, None], 0)
        total = tl.dot(a, b, total, input_precision=EXACT)
    if BIAS:
        total += tl.load(bias + channel, channel < channels, 0).to(tl.float32)[None]
    if RESIDUAL:
        beside = (clip * r_b + frame * r_f + row * r_h + column * channels)[:, None] + channel[None]
        total += tl.load(residual + beside, real, 0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    tl.store(out + (clip * o_b + frame * o_f + row * o_h + column * channels)[:, None] + channel[None], result, real)
    result = tl.where(real, result.to(tl.float32), 0)  # the sums of what is stored, as a norm would read it
    sums = partial + ((tl.program_id(0) * batch + clip) * channels + channel) * 2
    tl.store(sums, tl.sum(result, 0), channel < channels)
    tl.store(sums + 1, tl.sum(result * result, 0), channel < channels)


FASTEST: dict[tuple, Callable[..., Tensor]] = {}


def width_class(out: Tensor) -> int:
    """Sizes that are measured as one: those of about as many pixels."""
    return (out.shape[2] * out.shape[3] * out.shape[4]).bit_length()


def measured(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Callable[..., Tensor]:
    """The faster of the two ways for this convolution, here and now. Overwrites `out`, but puts it back."""
    seconds, before = {}, out.clone()
    for way in (library_conv, fused_conv):
        try:
            for repeat in range(3):  # the first compiles
                if repeat == 1:
                    torch.cuda.synchronize(x.device)
                    start = time.perf_counter()
                way(x, weight, bias, None, out)
            torch.cuda.synchronize(x.device)
            seconds[way] = time.perf_counter() - start
        except (RuntimeError, triton.TritonError):  # not for this device, or too large for it
            seconds[way] = math.inf
    out.copy_(before)
    return min(seconds, key=lambda way: seconds[way])


def _finish(
    x: Tensor, out: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None, phases: bool = False
) -> Tensor:
    """out = x + bias + residual, and the sums of each of its channels. `phases`: x as `interleave` takes it."""
    batch, channels, frames, rows, width = out.shape
    x = x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last_3d)
    wide = triton.next_power_of_2(channels)
    pixels = max(1, VALUES // wide)
    places = triton.cdiv(frames * rows * width, pixels)
    partial = torch.empty(places, batch, channels, 2, dtype=_wide(x), device=x.device)
    _finish_kernel[(places, batch)](
        x, bias, residual, out, partial,
        batch, channels, frames, rows, width,
        *_steps(x), x.stride(4), *_steps(out if residual is None else residual), *_steps(out),
        BIAS=bias is not None, RESIDUAL=residual is not None, PHASES=phases, WRITE=x is not out,
        PIXELS=pixels, CHANNELS=wide,
    )  # fmt: skip
    return partial.sum(0, dtype=torch.float64)


@triton.jit
def _finish_kernel(
    x, bias, residual, out, partial,
    batch, channels, frames, rows, width,
    x_b, x_f, x_h, x_w, r_b, r_f, r_h, o_b, o_f, o_h,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PHASES: tl.constexpr, WRITE: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    clip = tl.program_id(1).to(tl.int64)
    pixel, channel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS), tl.arange(0, CHANNELS)
    frame, row, column = (pixel // (rows * width)).to(tl.int64), pixel // width % rows, pixel % width
    real = (frame < frames)[:, None] & (channel < channels)[None]
    start = clip * x_b + frame * x_f
    if PHASES:
        start += (row // 2 + row % 2) * x_h + (column // 2 + column % 2) * x_w + (row % 2 * 2 + column % 2) * channels
    else:
        start += row * x_h + column * x_w
    WIDE: tl.constexpr = partial.dtype.element_ty
    value = tl.load(x + start[:, None] + channel[None], real, 0).to(WIDE)
    if BIAS:
        value += tl.load(bias + channel, channel < channels, 0).to(WIDE)[None]
    if RESIDUAL:
        beside = (clip * r_b + frame * r_f + row * r_h + column * channels)[:, None] + channel[None]
        value += tl.load(residual + beside, real, 0).to(WIDE)
    result = value.to(out.dtype.element_ty)
    if WRITE:
        place = out + (clip * o_b + frame * o_f + row * o_h + column * channels)[:, None] + channel[None]
        tl.store(place, result, real)
    result = tl.where(real, result.to(WIDE), 0)
    sums = partial + ((tl.program_id(0) * batch + clip) * channels + channel) * 2
    tl.store(sums, tl.sum(result, 0), channel < channels)
    tl.store(sums + 1, tl.sum(result * result, 0), channel < channels)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _steps(x: Tensor) -> tuple[int, int, int]:
    """From one clip, frame and row to the next."""
    return x.stride(0), x.stride(2), x.stride(3)
