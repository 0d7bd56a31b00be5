"""Frame packing (arXiv:2408.06072, section 2.4): clips of any size and length in one stream, without padding.

Each clip keeps its own positions, its own time and its own text; in attention it sees itself alone. So the numbers are
those of a run per clip, and what changes is how full the device is: images and long clips in one tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Num
from torch import Tensor

from videogen.data.buckets import buckets
from videogen.diffusion import objective
from videogen.diffusion.prediction import Prediction
from videogen.diffusion.schedule import Schedule
from videogen.errors import InvalidRequest
from videogen.models.attention import Attention, Kernel, PackedKernel, each_segment
from videogen.models.dit import DiT
from videogen.training.lesson import Lesson, Told
from videogen.types import Conditioning, Latent, Segments, Tokens


@dataclass(frozen=True)
class Clips:
    """Clips of one size, with what the model is told of them: a part of a packed stream."""

    latents: Latent
    t: Num[Tensor, " b"]
    cond: Conditioning


def predict_packed(dit: DiT, parts: Sequence[Clips]) -> list[Tensor]:
    """What `dit(latents, t, cond)` answers for each of the parts, from one pass over a single stream."""
    embedded = [dit.embed(part.latents, part.t, part.cond) for part in parts]
    out = dit.run_blocks(joined(embedded)).x
    pieces = out.split([tokens.x.shape[0] * tokens.x.shape[1] for tokens in embedded], dim=1)
    return [
        dit.unembed(dataclasses.replace(own, x=rearrange(piece, "1 (b s) d -> b s d", b=len(own.x))), part.latents)
        for part, own, piece in zip(parts, embedded, pieces, strict=True)
    ]


def packed_loss(
    dit: DiT, clean: Sequence[Clips], noise: Sequence[Tensor], *, schedule: Schedule, prediction: Prediction
) -> list[Tensor]:
    """`objective.loss` [b] of each part, of clean latents and the noise [b, f, c, h, w] that is added to them."""
    noisy = [
        dataclasses.replace(part, latents=objective.noised(part.latents, n, part.t, schedule))
        for part, n in zip(clean, noise, strict=True)
    ]
    kind = {"schedule": schedule, "prediction": prediction}
    return [
        objective.loss(lambda x, t, seen=seen: seen, part.latents, n, part.t, **kind)
        for part, n, seen in zip(clean, noise, predict_packed(dit, noisy), strict=True)
    ]


def lesson_packed(
    lesson: Lesson, dit: DiT, samples: Sequence[Told], t: Num[Tensor, " n"], noise: Sequence[Tensor]
) -> Float[Tensor, " n"]:
    """`lesson(dit, samples, t, noise)` for samples of any shapes, from one stream. `noise`: [f, c, h, w] of each."""
    groups = [*buckets([sample.example.latents.shape for sample in samples]).values()]
    t, parts, drawn = t.to(lesson.device), [], []
    with torch.autocast(lesson.device.type, torch.bfloat16, enabled=lesson.bfloat16):
        for same in groups:
            latents = torch.stack([samples[i].example.latents for i in same]).to(lesson.device)
            parts.append(Clips(latents, t[same], lesson.condition([samples[i] for i in same], latents)))
            drawn.append(torch.stack([noise[i] for i in same]).to(lesson.device))
        losses = packed_loss(dit, parts, drawn, schedule=lesson.schedule, prediction=lesson.prediction)
    place = torch.tensor([i for same in groups for i in same]).argsort()
    return torch.cat(losses)[place.to(lesson.device)]


def joined(parts: Sequence[Tokens]) -> Tokens:
    """The streams of several embedded batches as one, clip behind clip."""
    sizes = [(tokens.text_length, tokens.x.shape[1] - tokens.text_length) for tokens in parts for _ in tokens.x]
    positions = [tokens.position for tokens in parts for _ in tokens.x if tokens.position is not None]
    return Tokens(
        x=torch.cat([rearrange(tokens.x, "b s d -> 1 (b s) d") for tokens in parts], dim=1),
        position=torch.cat(positions) if positions else None,
        time=torch.cat([tokens.time.expand(len(tokens.x), *tokens.time.shape[1:]) for tokens in parts]),
        text_length=0,
        segments=Segments(
            lengths=tuple(text + video for text, video in sizes),
            runs=tuple(run for i, (text, video) in enumerate(sizes) for run in ((text, i, 1), (video, i, 0))),
        ),
    )


def set_packed_kernel(dit: DiT, name: str = "sdpa") -> DiT:
    """Give every block of `dit` a row of `PACKED` for streams of several clips; "sdpa" undoes it.

    Raises InvalidRequest where there is no such row, or what it needs is not installed.
    """
    if name not in PACKED:
        raise InvalidRequest(
            f"no kernel {name!r} for packed clips.", hint=f"one of {', '.join(PACKED)}.", param="packed_kernel"
        )
    kernel = PACKED[name]()
    for module in dit.modules():
        if isinstance(module, Attention):
            module.packed = kernel
    return dit


# ---- kernels --------------------------------------------------------------------------------------------------------
# Each gets the kernel for a single clip and q, k, v [1, heads, tokens, c] of all of them.


def _varlen() -> PackedKernel:
    """torch's FlashAttention over sequences of any length: CUDA, half precision."""
    from torch.nn.attention.varlen import varlen_attn

    @lru_cache(maxsize=4)  # every block of the model asks for the same
    def ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.tensor((0, *lengths), device=device).cumsum(0, dtype=torch.int32)

    def kernel(one: Kernel, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        q, k, v = (rearrange(x, "1 k s c -> s k c").contiguous() for x in (q, k, v))
        at = ends(lengths, q.device)
        out = varlen_attn(q, k, v, at, at, max(lengths), max(lengths))
        assert isinstance(out, Tensor)
        return rearrange(out, "s k c -> 1 k s c")

    return kernel


def _flex() -> PackedKernel:
    """torch's flex attention, which skips blocks between clips; compiled on CUDA. On a CPU it has no gradients."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    fast = torch.compile(flex_attention, dynamic=True)

    @lru_cache(maxsize=4)
    def mask(lengths: tuple[int, ...], device: torch.device) -> Any:
        clip = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
        size = len(clip)
        return create_block_mask(lambda b, h, i, j: clip[i] == clip[j], None, None, size, size, device=str(device))

    def kernel(one: Kernel, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        attend = fast if q.device.type == "cuda" else flex_attention
        out = attend(q, k, v, block_mask=mask(lengths, q.device))
        assert isinstance(out, Tensor)
        return out

    return kernel


def _xformers() -> PackedKernel:
    """xformers' block-diagonal attention: CUDA, half precision."""
    try:
        from xformers.ops import memory_efficient_attention  # type: ignore[reportMissingImports]
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask  # type: ignore[reportMissingImports]
    except ImportError as error:
        raise InvalidRequest(
            "xformers is not installed.", why=f"{error}", hint='pip install -e ".[xformers]", or varlen'
        ) from error

    def kernel(one: Kernel, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        q, k, v = (rearrange(x, "1 k s c -> 1 s k c") for x in (q, k, v))
        mask = BlockDiagonalMask.from_seqlens(list(lengths), device=q.device)
        out = memory_efficient_attention(q, k, v, attn_bias=mask)
        return rearrange(out, "1 s k c -> 1 k s c")

    return kernel


PACKED: dict[str, Callable[[], PackedKernel]] = {
    "sdpa": lambda: each_segment,
    "varlen": _varlen,
    "flex": _flex,
    "xformers": _xformers,
}
