"""The transformer's fast rows: fewer passes over memory, the same numbers up to rounding. `fast_dit`, and back.

A block of the plain model reads and writes its stream some fifty times; here every step between two matrix products is
one pass, in place where nobody else looks, and on a GPU q, k, v come from one product. Each such pass is a custom
operation `videogen::…` with one implementation for the CPU (PyTorch on pieces that stay in the cache) and one for CUDA
(`triton_dit`), so that a compiler, a counter and the meta device see one operation. A result is rounded once, where
the plain rows round after every step: in half precision it is a little nearer the truth.

With gradients on, and while training, the plain rows compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from videogen.models import attention as plain
from videogen.models.attention import Attention, Ops
from videogen.models.dit import MLP, MLP_ACTIVATIONS, Block, DiT
from videogen.runtime import has_triton
from videogen.types import Segments

PIECE = 64  # tokens: 64 x 3072 float32 values are 0.8 MB, which a core's second cache holds


def fast_dit(dit: DiT, *, mlp_tokens: int | None = None, join: bool | None = None) -> DiT:
    """Puts the fast rows into `dit`.

    mlp_tokens  how many tokens (of all samples) the MLP widens at a time; None: as few as cost no time, which is 512
                on a CPU and 4096 elsewhere
    join        whether the weights of q, k and v move into one storage, of which each stays its own parameter:
                `state_dict`, saving, and changes of a weight in place work as before. None: those that are on a GPU;
                others stay where they are (mapped from a file, say). Three products are computed where weights do not
                lie together, were moved apart (`.to`), or one is no plain linear map any more
    """
    for block in _blocks(dit):
        block.ops = Ops(norm_modulate, gate_add, norm_rotate)
        block.mlp_tokens, block.forward = mlp_tokens, MethodType(_forward, block)  # type: ignore[assignment]
        for parts in _parts(block.attention):
            if join or (join is None and parts[0].device.type == "cuda"):
                _join(parts)
    dit.positions = lru_cache(maxsize=2)(partial(DiT.positions, dit))
    dit.rotary = lru_cache(maxsize=2)(partial(DiT.rotary, dit))  # by the very tensor that `positions` keeps
    return dit


def plain_dit(dit: DiT) -> DiT:
    """Undoes `fast_dit`."""
    for block in _blocks(dit):
        block.ops = Ops()
        for name in ("forward", "mlp_tokens"):
            block.__dict__.pop(name, None)
        for parts in _parts(block.attention):
            if _joined(parts) is not None:
                for parameter in parts:
                    parameter.data = parameter.data.clone()
    for name in ("positions", "rotary"):
        dit.__dict__.pop(name, None)
    return dit


def _forward(
    block: Block, x: Tensor, time: Tensor, rotary: Tensor | None, text_length: int, segments: Segments | None = None
) -> Tensor:
    """`Block.forward` told with its lifetimes: beside the stream, at most four tensors of its size are alive."""
    if torch.is_grad_enabled() or block.training or segments is not None:
        return Block.forward(block, x, time, rotary, text_length, segments)
    ops, attention = block.ops, block.attention
    y, gate = block.modulate(block.norm1, x, time, text_length)
    q, k, v = _qkv(attention, y)
    del y
    q = ops.norm_rotate(q, attention.norm_q.weight, attention.norm_q.bias, attention.norm_q.eps, rotary, text_length)
    k = ops.norm_rotate(k, attention.norm_k.weight, attention.norm_k.bias, attention.norm_k.eps, rotary, text_length)
    v = v.contiguous() if x.device.type == "cpu" else v
    y = attention.kernel(q, k, v)
    del q, k, v
    y = attention.to_out(rearrange(y, "b k s c -> b s (k c)"))
    x = ops.gate_add(x, y, gate, text_length)
    del y
    y, gate = block.modulate(block.norm2, x, time, text_length)
    return ops.gate_add(x, _mlp(block.mlp, y, block.__dict__["mlp_tokens"]), gate, text_length)


# ---- the rows -------------------------------------------------------------------------------------------------------


def norm_modulate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    shift: Tensor,
    scale: Tensor,
    text_length: int,
) -> Tensor:
    """The row of `models.attention`, in one pass."""
    if not _is_fast_on(x):
        return plain.norm_modulate(x, weight, bias, eps, shift, scale, text_length)
    return torch.ops.videogen.norm_modulate(x, weight, bias, eps, shift, scale, text_length)


def gate_add(x: Tensor, y: Tensor, gate: Tensor, text_length: int) -> Tensor:
    """The row of `models.attention`, in one pass, into `y`."""
    if not _is_fast_on(x):
        return plain.gate_add(x, y, gate, text_length)
    y = y.contiguous()
    torch.ops.videogen.gate_add_(x, y, gate, text_length)
    return y


def norm_rotate(x: Tensor, weight: Tensor, bias: Tensor, eps: float, rotary: Tensor | None, text_length: int) -> Tensor:
    """The row of `models.attention`, in one pass, into `x`: where it lies in the output of the q, k, v product."""
    if not _is_fast_on(x) or x.stride(-1) != 1:
        return plain.norm_rotate(x, weight, bias, eps, rotary, text_length)
    torch.ops.videogen.norm_rotate_(x, weight, bias, eps, rotary, text_length)
    return x


def _is_fast_on(x: Tensor) -> bool:
    if torch.is_grad_enabled():
        return False
    return x.device.type in ("cpu", "meta") or (x.device.type == "cuda" and has_triton())


def _qkv(attention: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [b, k, s, c]: on a GPU views of one tensor [b, s, 3, k, c].

    On a CPU one product is no faster than three, and attention a sixth faster where the tokens of a head lie together.
    """
    maps = attention.to_q, attention.to_k, attention.to_v
    if x.device.type != "cpu" and all(_is_plain(to) for to in maps):
        joined = torch.ops.videogen.qkv(x, *(to.weight for to in maps), *(to.bias for to in maps))
        q, k, v = rearrange(joined, "b s (three k c) -> three b k s c", three=3, k=attention.heads)
        return q, k, v
    q, k = (_heads(to(x), attention.heads).contiguous() for to in maps[:2])
    return q, k, _heads(attention.to_v(x), attention.heads)


def _heads(x: Tensor, heads: int) -> Tensor:
    return rearrange(x, "b s (k c) -> b k s c", k=heads)


def _mlp(mlp: MLP, x: Tensor, tokens: int | None) -> Tensor:
    """The MLP of `x` [b, s, d], written over it where it is done in pieces."""
    flat, tokens = x.flatten(0, 1), tokens or (512 if x.device.type == "cpu" else 4096)
    if len(flat) <= tokens:
        return mlp.down(_widen(mlp, flat)).view_as(x)
    for piece in flat.split(tokens):
        if _is_plain(mlp.down) and not torch.compiler.is_compiling():
            torch.addmm(mlp.down.bias, _widen(mlp, piece), mlp.down.weight.t(), out=piece)
        else:
            piece.copy_(mlp.down(_widen(mlp, piece)))
    return x


def _widen(mlp: MLP, x: Tensor) -> Tensor:
    if mlp.act is MLP_ACTIVATIONS["gelu-approximate"] and _is_plain(mlp.up):
        return torch.ops.videogen.linear_gelu(x, mlp.up.weight, mlp.up.bias)
    return mlp.act(mlp.up(x))


def _is_plain(module: nn.Module) -> bool:
    """A linear map and nothing else: no subclass (8-bit weights), wrapper (LoRA) or hook, which would be passed by."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return type(module) is nn.Linear and not hooked


# ---- q, k and v in one storage --------------------------------------------------------------------------------------


def _parts(attention: Attention) -> Iterator[list[Any]]:
    """The weights of q, k and v, and their biases if they have some; nothing where they are no linear maps."""
    for name in ("weight", "bias"):
        parts = [getattr(to, name, None) for to in (attention.to_q, attention.to_k, attention.to_v)]
        if all(isinstance(part, nn.Parameter) for part in parts):
            yield parts


def _join(parts: list[Any]) -> None:
    if len({(p.dtype, p.device, p.shape) for p in parts}) == 1 and _joined(parts) is None:
        for parameter, part in zip(parts, torch.cat([p.data for p in parts]).chunk(3), strict=True):
            parameter.data = part


def _joined(parts: list[Tensor]) -> Tensor | None:
    """The one tensor whose thirds the three are, if they are. Looked at every time: weights may have moved."""
    first, size = parts[0], parts[0].numel()
    for place, part in enumerate(parts):
        if (
            part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or part.storage_offset() != first.storage_offset() + place * size
            or part.shape != first.shape
            or not part.is_contiguous()
        ):
            return None
    return first.detach().as_strided((3 * len(first), *first.shape[1:]), first.stride())


@custom_op("videogen::qkv", mutates_args=(), schema="(Tensor x, Tensor q, Tensor k, Tensor v, Tensor? q_bias, "
           "Tensor? k_bias, Tensor? v_bias) -> Tensor")  # fmt: skip
def _qkv_op(x, q, k, v, q_bias, k_bias, v_bias):
    """[b, s, d] to [b, s, 3 d]: one product where the weights lie together, else three into one tensor."""
    bias = None if q_bias is None else _joined([q_bias, k_bias, v_bias])
    weight = _joined([q, k, v])
    if weight is not None and (bias is not None or q_bias is None):
        return F.linear(x, weight, bias)
    out = x.new_empty(*x.shape[:-1], 3 * len(q))
    for part, w, b in zip(out.chunk(3, dim=-1), (q, k, v), (q_bias, k_bias, v_bias), strict=True):
        part.copy_(F.linear(x, w, b))
    return out


@_qkv_op.register_fake
def _(x, q, k, v, q_bias, k_bias, v_bias):
    return x.new_empty(*x.shape[:-1], 3 * len(q))


@custom_op("videogen::linear_gelu", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
def _linear_gelu_op(x, weight, bias):
    """GELU (its tanh form) of a linear map of [n, d], applied to the product before it is rounded where that can be."""
    if x.device.type == "cuda" and bias is not None:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
    return torch.ops.aten.gelu_(F.linear(x, weight, bias), approximate="tanh")


@_linear_gelu_op.register_fake
def _(x, weight, bias):
    return x.new_empty(len(x), len(weight))


@register_flop_formula(torch.ops.videogen.qkv)
def _qkv_flops(x, q, *_, **__) -> int:
    return 2 * 3 * x[:-1].numel() * q[0] * q[1]


@register_flop_formula(torch.ops.videogen.linear_gelu)
def _linear_gelu_flops(x, weight, *_, **__) -> int:
    return 2 * x[0] * weight[0] * weight[1]


# ---- the passes between the products --------------------------------------------------------------------------------


@custom_op("videogen::norm_modulate", mutates_args=(), schema="(Tensor x, Tensor? weight, Tensor? bias, float eps, "
           "Tensor shift, Tensor scale, int text_length) -> Tensor")  # fmt: skip
def _norm_modulate_op(x, weight, bias, eps, shift, scale, text_length):
    if x.device.type == "cuda":
        from videogen.runtime import triton_dit

        with torch.cuda.device_of(x):  # a kernel is launched where the thread is, not where the tensor is
            return triton_dit.norm_modulate(x, weight, bias, eps, shift, scale, text_length)
    # (n w + b) (1 + scale) + shift is a LayerNorm with other constants, which are few and so kept in float32
    wide = torch.promote_types(x.dtype, torch.float32)
    factor, offset = 1 + scale.to(wide), shift.to(wide)
    if bias is not None:
        offset = torch.addcmul(offset, factor, bias.to(wide))
    if weight is not None:
        factor = factor * weight
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for sample in range(len(x)):
        for row, tokens in _pieces(x.shape[1], text_length):
            f, o = (rows[row, min(sample, rows.shape[1] - 1)] for rows in (factor, offset))
            out[sample, tokens] = F.layer_norm(x[sample, tokens], x.shape[-1:], f, o, eps)
    return out


@_norm_modulate_op.register_fake
def _(x, weight, bias, eps, shift, scale, text_length):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@custom_op("videogen::gate_add_", mutates_args=("y",), schema="(Tensor x, Tensor(a!) y, Tensor gate, int text_length)"
           " -> ()")  # fmt: skip
def _gate_add_op(x, y, gate, text_length):
    if x.device.type == "cuda":
        from videogen.runtime import triton_dit

        with torch.cuda.device_of(x):
            return triton_dit.gate_add_(x, y, gate, text_length)
    for row, tokens in ((1, slice(text_length)), (0, slice(text_length, None))):
        torch.addcmul(x[:, tokens], gate[row, :, None], y[:, tokens], out=y[:, tokens])


@custom_op("videogen::norm_rotate_", mutates_args=("x",), schema="(Tensor(a!) x, Tensor weight, Tensor bias, "
           "float eps, Tensor? rotary, int text_length) -> ()")  # fmt: skip
def _norm_rotate_op(x, weight, bias, eps, rotary, text_length):
    if x.device.type == "cuda":
        from videogen.runtime import triton_dit

        with torch.cuda.device_of(x):
            return triton_dit.norm_rotate_(x, weight, bias, eps, rotary, text_length)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = weight.to(wide), bias.to(wide)
    turn = None if rotary is None else torch.complex(*rotary.unbind())  # a pair of channels is one complex number
    for row, tokens in _pieces(x.shape[2], text_length):
        piece = x[:, :, tokens].transpose(1, 2)
        y = F.layer_norm(piece.to(wide), (x.shape[-1],), weight, bias, eps)
        if turn is not None and row == 0:
            pairs = torch.view_as_complex(y.float().unflatten(-1, (-1, 2)))
            y = pairs * turn[tokens.start - text_length : tokens.stop - text_length, None]
            y = torch.view_as_real(y).flatten(-2)
        piece.copy_(y)


def _pieces(length: int, text_length: int) -> Iterator[tuple[int, slice]]:
    """(row of the modulation, tokens) in pieces: text first, which is row 1, then video, row 0."""
    for row, start, end in ((1, 0, text_length), (0, text_length, length)):
        for first in range(start, end, PIECE):
            yield row, slice(first, min(first + PIECE, end))


def _blocks(dit: DiT) -> Iterator[Block]:
    for block in dit.blocks:
        assert isinstance(block, Block)
        yield block
