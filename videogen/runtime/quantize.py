"""The large linear maps of a DiT in 8 bits, weights and activations: about half the memory, faster on CUDA. Lossy.

Each row of a weight and each token has its own scale, so that its largest value is the format's largest: `fp8` is e4m3,
multiplied by `torch._scaled_mm` where there is one (CUDA from sm89 on), `int8` is multiplied by `torch._int_mm`. On a
CPU fp8 products are computed in float32 from the same 8-bit numbers, so that their price can be measured there.

The maps keep their weights, which go to the host: `state_dict`, saving and gradients are those of the plain model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from videogen.errors import InvalidRequest
from videogen.models.dit import Block, DiT
from videogen.models.lora import has_adapters
from videogen.runtime.names import no_format

MAPS = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out", "mlp.up", "mlp.down")


@dataclass(frozen=True)
class Format:
    """An 8-bit number format: its type, its largest value, and the product x · wᵀ of two matrices of it."""

    dtype: torch.dtype
    largest: float
    multiply: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]


class Rows(nn.Module):
    """A weight [d_out, d_in] in 8 bits with a scale per row: buffers, so that they travel, which no file holds."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, form: Format) -> None:
        super().__init__()
        rows, scale = in_8_bits(weight.detach(), form)
        self.register_buffer("weight", rows, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().clone(), persistent=False)


def quantize(dit: DiT, form: str, *, whole_ends: int | None = None) -> DiT:
    """Computes the linear maps of the blocks in the format `form`, "fp8" or "int8", in place; undone by `restore`.

    whole_ends  how many blocks at either end stay as they are (default: one in twenty, at least one), as do the
                embeddings, the modulation and the output: they are small, and errors there reach everything
    """
    if form not in FORMATS:
        raise no_format(form)
    device = next(dit.parameters()).device
    if form == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise InvalidRequest(
            f"{torch.cuda.get_device_name(device)} cannot multiply fp8.",
            why="that needs compute capability 8.9 or more (Ada, Hopper, Blackwell).",
            hint='quantize="int8"',
            param="quantize",
        )
    if has_adapters(dit):
        raise InvalidRequest(
            "a LoRA beside the weights cannot be quantised.",
            why="8-bit maps are made of the weights alone, and it would not count.",
            hint="merge it first: videogen.models.lora.merge(dit)",
            param="quantize",
        )
    restore(dit)
    for block in inner_blocks(dit, whole_ends):
        for linear in _maps(block):
            linear.rows = Rows(linear.weight, linear.bias, FORMATS[form])
            linear.forward = partial(_forward, linear, FORMATS[form])  # type: ignore[assignment]
            linear.parked = True  # type: ignore[assignment]
            _move(linear, "cpu")
    return dit


def restore(dit: DiT) -> DiT:
    """Undoes `quantize`: the same weights where they were. Does nothing to a plain model."""
    for block in dit.blocks:
        for linear in _maps(block):
            rows = getattr(linear, "rows", None)
            if isinstance(rows, Rows):
                _move(linear, rows.weight.device)
                del linear.forward, linear.rows, linear.parked
    return dit


def inner_blocks(dit: DiT, whole_ends: int | None) -> list[Block]:
    """All blocks but `whole_ends` at either end; None: one in twenty, at least one."""
    ends = max(1, len(dit.blocks) // 20) if whole_ends is None else whole_ends
    blocks = list(dit.blocks)[ends : len(dit.blocks) - ends]
    assert all(isinstance(block, Block) for block in blocks)
    return cast("list[Block]", blocks)


def in_8_bits(x: Float[Tensor, "*n d"], form: Format) -> tuple[Tensor, Float[Tensor, "*n 1"]]:
    """x = numbers · scale with one scale per row, its largest number being the format's largest."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / form.largest
    x = x.float() / scale
    return (x if form.dtype.is_floating_point else x.round()).to(form.dtype), scale


def _forward(linear: nn.Linear, form: Format, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        bias = None if linear.bias is None else linear.bias.to(x.device, x.dtype)
        return F.linear(x, linear.weight.to(x.device, x.dtype), bias)
    rows: Rows = linear.rows  # type: ignore[assignment]
    numbers, scale = in_8_bits(x.flatten(0, -2), form)
    bias = None if rows.bias is None else rows.bias.to(x.dtype)
    return form.multiply(numbers, scale, rows.weight, rows.scale, bias, x.dtype).unflatten(0, x.shape[:-1])


def _fp8(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if x.device.type == "cuda":
        # Sums in float32: the faster ones of 14 bits are another loss, which is not measured. bfloat16 is all it gives.
        bias = None if bias is None else bias.bfloat16()
        out = torch._scaled_mm(
            x, w.t(), x_scale, w_scale.t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=False
        )
        return out.to(dtype)
    out = (x.float() @ w.float().t()) * x_scale * w_scale.t()
    return (out if bias is None else out + bias).to(dtype)


def _int8(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = torch._int_mm(x, w.t()) * x_scale * w_scale.t()
    return (out if bias is None else out + bias).to(dtype)


FORMATS = {"fp8": Format(torch.float8_e4m3fn, 448.0, _fp8), "int8": Format(torch.int8, 127.0, _int8)}


def _maps(block: nn.Module) -> Iterator[nn.Linear]:
    assert isinstance(block, Block)
    for name in MAPS:
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear), f"{name} is {type(linear).__name__}"
        yield linear


def _move(linear: nn.Linear, device: torch.device | str) -> None:
    for parameter in (linear.weight, linear.bias):
        if parameter is not None:
            parameter.data = parameter.data.to(device)
