"""A VAE's training on clips too long for one process: each has some of the frames, and gradients cross the seams.

All processes of a group run the same layers at the same moment. A causal convolution takes the frames it needs from the
process before, and gives the gradient of what it took back to it. How the clip is parted follows the VAE's chunk plan,
so the function is that of one process: of a clip in one chunk the norms' sums are added up over the processes; of many
chunks the processes take one each, round after round, and norms see a chunk as always.

The losses of the processes are parts: their sum is one process's loss, and the sum of their gradients its gradient.
They are taken by `backward()`, by all processes at once: a gradient of some weights alone would leave out messages.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from videogen.config import VAEConfig
from videogen.distributed.mesh import part_sizes
from videogen.distributed.training import sum_gradients
from videogen.errors import InvalidRequest
from videogen.models import vae as plain
from videogen.models.causal import CausalConv3d, Memory
from videogen.models.vae import (
    VAE,
    Decoder,
    Encoder,
    GroupNorm,
    LatentNorm,
    VAEOps,
    chunk_plan,
    decode_plan,
    enlarge_to,
    group_affine,
    group_sums,
    latent_frames,
    set_ops,
)

Video5D = Float[Tensor, "b _c _f _h _w"]
T = TypeVar("T")
Span = tuple[int, int]  # (start, stop), in frames


def share_time(vae: VAE, num_frames: int, group: dist.ProcessGroup) -> TimePieces:
    """How the processes of `group` share clips of `num_frames` frames. `vae` gets rows of functions that can work on
    pieces; on whole clips they are the plain ones.

    Raises InvalidRequest for lengths and chunk plans that leave a process without a whole piece of time.
    """
    assert group.size() > 1, "one process shares nothing"
    set_ops(vae, VAEOps(conv=conv, norm_silu_conv=norm_silu_conv))
    return TimePieces(group, plan_pieces(vae.config, num_frames, group.size()))


@dataclass(frozen=True)
class Plan:
    """Who has which frames: a list of rounds, in each of them a span for each process that has one."""

    pixels: list[list[Span]]
    latents: list[list[Span]]
    is_one_chunk: bool  # then norms see all pieces

    def of(self, rank: int) -> tuple[list[Span], list[Span]]:
        """The spans of one process, in pixel frames and in latent frames."""
        pixels, latents = (
            [spans[rank] for spans in rounds if rank < len(spans)] for rounds in (self.pixels, self.latents)
        )
        return pixels, latents


def plan_pieces(config: VAEConfig, num_frames: int, processes: int) -> Plan:
    """Whole pieces of time: two latents and their eight frames, or a multiple; the first has the extra frame.

    >>> one = VAEConfig(frame_batch_size=64, latent_batch_size=64)
    >>> plan_pieces(one, 49, 2).pixels, plan_pieces(one, 49, 2).latents
    ([[(0, 25), (25, 49)]], [[(0, 7), (7, 13)]])
    >>> plan_pieces(VAEConfig(), 25, 2).pixels, plan_pieces(VAEConfig(), 25, 2).latents
    ([[(0, 9), (9, 17)], [(17, 25)]], [[(0, 3), (3, 5)], [(5, 7)]])
    """
    ratio = int(config.temporal_compression_ratio)
    latents = latent_frames(config, num_frames)
    encoded, decoded = chunk_plan(num_frames, config.frame_batch_size), decode_plan(config, latents)
    if num_frames != ratio * (latents - 1) + 1 or latents % 2 == 0:
        raise _refused(
            f"clips of {num_frames} frames cannot be shared.", f"a piece is {2 * ratio} frames, the first one more."
        )
    units, is_one_chunk = (latents - 1) // 2, len(encoded) == len(decoded) == 1
    if (units + 1 if is_one_chunk else len(encoded)) < processes:
        raise _refused(f"{num_frames} frames are too few for {processes} processes.", "each needs a piece of its own.")
    if is_one_chunk:
        stops = [1 + 2 * n for n in _running(part_sizes(units, processes)[::-1])]
        spans = list(zip([0, *stops[:-1]], stops, strict=True))
        return Plan([[_pixels(span, ratio) for span in spans]], [spans], is_one_chunk=True)
    if encoded != [_pixels(span, ratio) for span in decoded]:
        raise _refused("this VAE's chunks cannot be shared.", "it encodes other pieces of time than it decodes.")
    rounds = [slice(i, i + processes) for i in range(0, len(encoded), processes)]
    return Plan([encoded[part] for part in rounds], [decoded[part] for part in rounds], is_one_chunk=False)


def _pixels(span: Span, ratio: int) -> Span:
    """The pixel frames of a span of latent frames."""
    start, stop = (max(0, ratio * (n - 1) + 1) for n in span)
    return start, stop


def _running(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[: i + 1]) for i in range(len(sizes))]


def _refused(what: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        what, why=why, hint="other lengths of clips, or fewer processes for each.", param="time_parallel"
    )


@dataclass(frozen=True)
class TimePieces:
    """This process's part of every clip: `own_pixels`, `moments`, `decode` in turn, and `gather` for the whole."""

    group: dist.ProcessGroup
    plan: Plan

    @property
    def degree(self) -> int:
        return self.group.size()

    @cached_property
    def spans(self) -> tuple[list[Span], list[Span]]:
        return self.plan.of(self.group.rank())

    def own_pixels(self, pixels: Float[Tensor, "b c F H W"]) -> Float[Tensor, "b c _F H W"]:
        return _take(pixels, self.spans[0])

    def own_latents(self, latents: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b c _f h w"]:
        return _take(latents, self.spans[1])

    def moments(self, vae: VAE, own: Float[Tensor, "b 3 _F H W"]) -> tuple[Video5D, Video5D]:
        """Mean and log variance of the own latents."""
        mean, logvar = self._run(vae.encoder, own, self.plan.pixels).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, vae: VAE, own: Video5D) -> Float[Tensor, "b 3 _F H W"]:
        """The own pixels from the own latents, scaled as `VAE.decode` takes them."""
        return self._run(vae.decoder, own / vae.config.scaling_factor, self.plan.latents)

    def gather(self, own: Video5D) -> Float[Tensor, "b 3 F H W"]:
        """The whole clip, of which every process must then compute the same, and count 1/degree of it in its loss."""
        return _Gather.apply(own, self)

    def total(self, part: Tensor) -> Tensor:
        """The sum over the processes, of which each has the gradient of its own part."""
        return _Total.apply(part, self.group)

    def _run(self, network: Encoder | Decoder, own: Tensor, rounds: list[list[Span]]) -> Tensor:
        """`network` on each own piece, in step with the others; between rounds the last process tells the first."""
        rank, last = self.group.rank(), self.degree - 1
        mine = [spans[rank] for spans in rounds if rank < len(spans)]
        pieces = iter(own.split([stop - start for start, stop in mine], dim=2))
        memory = Piece(group=self.group, is_one_chunk=self.plan.is_one_chunk)
        done = []
        for number, spans in enumerate(rounds):
            if rank >= len(spans):
                break
            memory = replace(
                memory,
                chunk=number * self.degree + rank,
                last=number == len(rounds) - 1,
                left=rank - 1 if rank else None,
                right=rank + 1 if rank + 1 < len(spans) else None,
                final=network.conv_out,
            )
            done.append(network(next(pieces), memory))
            following = cast(Piece, memory.next_chunk())
            if not memory.last and rank == 0:
                following.past = take_over(memory, last)
            memory = replace(following, kept={})
        return torch.cat(done, dim=2)


def _take(x: Tensor, spans: list[Span]) -> Tensor:
    return torch.cat([x[:, :, start:stop] for start, stop in spans], dim=2)


@dataclass(frozen=True)
class TimeParallel:
    """How the loop sees such processes: all hold the whole VAE, those of a group share the samples of a data rank."""

    group: dist.ProcessGroup

    @property
    def data_rank(self) -> int:
        return dist.get_rank() // self.group.size()

    @property
    def data_world(self) -> int:
        return dist.get_world_size() // self.group.size()

    def own_samples(self, samples: Sequence[T]) -> Sequence[T]:
        """Of samples without time, single frames, each process of the group takes some."""
        return samples[self.group.rank() :: self.group.size()]

    def all_losses(self, own: Float[Tensor, " _n"], count: int) -> Float[Tensor, " n"]:
        """The losses of all `count` samples of the group, from those of the own ones."""
        losses = own.new_zeros(count)
        losses[self.group.rank() :: self.group.size()] = own
        return _Total.apply(losses, self.group)

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sums over all processes: of the samples, and of their pieces."""
        sum_gradients(parameters)

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        return float(nn.utils.clip_grad_norm_(parameters, max_norm))

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total / self.group.size()


def time_parallel(degree: int) -> TimeParallel:
    """All processes in groups of `degree` neighbours, each of which shares its clips; every process must call it."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if degree < 1 or world % degree:
        raise InvalidRequest(
            f"{world} processes cannot share clips {degree} by {degree}.",
            why="every clip has as many processes as the others.",
            hint="a time_parallel that divides the number of processes.",
            param="time_parallel",
        )
    own, _ = dist.new_subgroups(degree)
    assert isinstance(own, dist.ProcessGroup)
    return TimeParallel(own)


class Kept(NamedTuple):
    """What the last frames before a convolution are like."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    has_gradient: bool


@dataclass(kw_only=True)
class Piece(Memory):
    """What a convolution needs of the piece before: from the process that has it, or from `past` after a hand-over."""

    group: dist.ProcessGroup
    is_one_chunk: bool
    left: int | None = None  # the process that has the piece before
    right: int | None = None  # the process that has the next one; None: it belongs to the next round, or there is none
    final: nn.Module | None = None  # the last convolution of a pass
    kept: dict[nn.Module, Kept] = field(default_factory=dict)  # what each convolution keeps, in order


# The rows -------------------------------------------------------------------------------------------------------------


def conv(x: Video5D, conv: CausalConv3d, memory: Memory) -> Video5D:
    before = conv.kernel_size[0] - 1
    if not isinstance(memory, Piece) or before == 0:
        return plain.conv(x, conv, memory)
    if memory.left is None:
        past = memory.take(conv)
        x = torch.cat([x[:, :, :1].expand(-1, -1, before, -1, -1) if past is None else past, x], dim=2)
    x = _Neighbours.apply(x, before, memory.left, memory.right, memory.group)
    memory.kept[conv] = Kept(x[:, :, :before].shape, x.dtype, x.device, x.requires_grad)
    if memory.right is None and not memory.last:
        memory.keep(conv, x[:, :, -before:].clone())
        if conv is memory.final:
            x = _Give.apply(x, memory.group, 0, *(memory.future.pop(one) for one in memory.kept))
    return nn.Conv3d.forward(conv, x)


def take_over(memory: Piece, process: int) -> dict[nn.Module, Tensor]:
    """What the convolutions of `process` kept in the round that ends, for the next round of this one."""
    anchor = torch.zeros((), device=next(iter(memory.kept.values())).device, requires_grad=True)
    return dict(zip(memory.kept, _Take.apply(anchor, memory.group, process, [*memory.kept.values()]), strict=True))


def norm_silu_conv(
    x: Video5D,
    norm: GroupNorm | LatentNorm,
    conv_: CausalConv3d,
    latents: Video5D | None,
    memory: Memory,
    residual: Video5D | None = None,
) -> Video5D:
    if not isinstance(memory, Piece):
        return plain.norm_silu_conv(x, norm, conv_, latents, memory, residual)
    y = conv(
        F.silu(shared_norm(x, norm, latents, memory.group) if memory.is_one_chunk else norm(x, latents)), conv_, memory
    )
    return y if residual is None else residual + y


def shared_norm(x: Video5D, norm: GroupNorm | LatentNorm, latents: Video5D | None, group: dist.ProcessGroup) -> Video5D:
    """`norm` over the pieces of all processes: their sums, sums of squares and counts are added up."""
    inner = norm.norm if isinstance(norm, LatentNorm) else norm
    sums = group_sums(x, inner.num_groups)
    count = sums.new_full((1,), x[0].numel() // inner.num_groups)
    total = _Sum.apply(torch.cat([sums.flatten(), count]), group)
    scale, shift = group_affine(inner, total[:-1].view_as(sums), int(total[-1]))
    y = x * scale[:, :, None, None, None] + shift[:, :, None, None, None]
    if isinstance(norm, LatentNorm):
        y = y * enlarge_to(norm.scale(latents), x.shape[2:]) + enlarge_to(norm.shift(latents), x.shape[2:])
    return y


# What crosses the seams, with gradients -------------------------------------------------------------------------------


class _Neighbours(torch.autograd.Function):
    """Gives the last frames to the process on the right, and puts those of the one on the left in front."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frames: int, left: int | None, right: int | None, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.frames, ctx.left, ctx.right, ctx.group = frames, left, right, group
        send = x[:, :, -frames:].contiguous()
        assert send.shape[2] == frames, "a piece is shorter than what the next one needs of it"
        taken = torch.empty_like(send)
        _exchange(group, [(send, right)], [(taken, left)])
        return x.view_as(x) if left is None else torch.cat([taken, x], dim=2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        if ctx.left is None:
            given, grad = None, grad.clone()
        else:
            given, grad = grad[:, :, : ctx.frames].contiguous(), grad[:, :, ctx.frames :].clone()
        back = torch.empty_like(grad[:, :, -ctx.frames :], memory_format=torch.contiguous_format)
        _exchange(ctx.group, [(given, ctx.left)], [(back, ctx.right)])
        if ctx.right is not None:
            grad[:, :, -ctx.frames :] += back
        return grad, None, None, None, None


class _Give(torch.autograd.Function):
    """Between two rounds: what the convolutions kept goes to another process. `x`, on the way to the last, stays."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, process: int, *frames: Tensor) -> Tensor:
        ctx.group, ctx.process = group, process
        ctx.like = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in frames]
        _exchange(group, [(part.contiguous(), process) for part in frames], [])
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        back = [part if needed else None for part, needed in zip(ctx.like, ctx.needs_input_grad[3:], strict=True)]
        _exchange(ctx.group, [], [(part, ctx.process) for part in back if part is not None])
        return grads[0], None, None, *back


class _Take(torch.autograd.Function):
    """The other end of `_Give`. `anchor` is a number with a gradient, so that there is a way back."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, group: dist.ProcessGroup, process: int, kept: list[Kept]
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.process, ctx.has_gradient = group, process, [one.has_gradient for one in kept]
        frames = [anchor.new_empty(one.shape, dtype=one.dtype) for one in kept]
        _exchange(group, [], [(part, process) for part in frames])
        ctx.mark_non_differentiable(*itertools.compress(frames, [not one for one in ctx.has_gradient]))
        return tuple(frames)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        sent = itertools.compress(grads, ctx.has_gradient)
        _exchange(ctx.group, [(grad.contiguous(), ctx.process) for grad in sent], [])
        return torch.zeros((), device=grads[0].device), None, None, None


class _Sum(torch.autograd.Function):
    """Added up over the processes; what each makes of the sum comes back to all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Total(torch.autograd.Function):
    """Added up over the processes, to be told; gradients are those of the own part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _Gather(torch.autograd.Function):
    """The frames of all processes in order; shorter parts travel with padding."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, pieces: TimePieces) -> Tensor:
        ctx.pieces = pieces
        spans = [pieces.plan.of(rank)[0] for rank in range(pieces.degree)]
        lengths = [sum(stop - start for start, stop in some) for some in spans]
        send = F.pad(own, (0, 0, 0, 0, 0, max(lengths) - own.shape[2])).contiguous()
        parts = [torch.empty_like(send) for _ in lengths]
        dist.all_gather(parts, send, group=pieces.group)
        whole = own.new_empty(*own.shape[:2], sum(lengths), *own.shape[3:])
        for part, some in zip(parts, spans, strict=True):
            at = 0
            for start, stop in some:
                whole[:, :, start:stop] = part[:, :, at : at + stop - start]
                at += stop - start
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.pieces.degree * ctx.pieces.own_pixels(grads[0]), None


def _exchange(
    group: dist.ProcessGroup,
    sent: Sequence[tuple[Tensor | None, int | None]],
    taken: Sequence[tuple[Tensor, int | None]],
) -> None:
    """Send and receive at once; None stands for nobody."""
    messages = [
        dist.P2POp(dist.isend, x, group=group, group_peer=peer)
        for x, peer in sent
        if x is not None and peer is not None
    ]
    messages += [dist.P2POp(dist.irecv, x, group=group, group_peer=peer) for x, peer in taken if peer is not None]
    for work in dist.batch_isend_irecv(messages) if messages else []:
        work.wait()
