"""The VAE without gradients, fast and in little memory: rows for `VAEOps` that leave its function as it is.

Everything lies channels-last. Norm, modulation (at the latents' size) and SiLU are one pass into a buffer
behind the frames of the chunk before; the convolution of the buffer adds its bias and the residual and gives the sums
that the next norm needs. That is done strip by strip of the picture, so that the buffer is small: each strip has a row
of its neighbours above and below, and statistics are those of the whole chunk, so strips change nothing. Frames that
are pairwise equal after doubling the time are computed once. With gradients the plain rows compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from videogen.models import vae as plain
from videogen.models.causal import CausalConv3d, Memory
from videogen.models.vae import VAE, GroupNorm, LatentNorm, VAEOps, group_affine, set_ops
from videogen.runtime import has_triton, winograd

Video5D = plain.Video5D
LAST = torch.channels_last_3d
BUFFER = {"cpu": 2**24, "cuda": 2**26}  # bytes of a strip, if no number of strips is asked for
WIDE = 128  # channels from which fewer multiplications pay, and are as exact
FEW = 768  # values of a channel from which making its matrices pays
BLOCK = 2**18  # values between passes: few enough for a CPU's caches, enough for its threads


def fast_vae(vae: VAE, *, strips: int | None = None, caches_on_host: bool = False) -> VAE:
    """Put the rows of this module into `vae`, which is changed and returned.

    strips          how many strips a picture is computed in; None: as many as keep the buffer below 64 MiB (CPU: 16)
    caches_on_host  the frames that convolutions keep for the next chunk wait in (pinned) host memory
    """
    vae.new_memory = HostMemory if caches_on_host else Memory
    return set_ops(
        vae,
        VAEOps(
            conv=conv,
            norm_silu_conv=partial(norm_silu_conv, strips=strips),
            shortcut=shortcut,
            upsample=upsample,
            downsample=downsample,
        ),
    )


def plain_vae(vae: VAE) -> VAE:
    """Undo `fast_vae`."""
    vae.new_memory = Memory
    return set_ops(vae, VAEOps())


# Rows


def conv(x: Video5D, conv: CausalConv3d, memory: Memory) -> Video5D:
    if torch.is_grad_enabled():
        return plain.conv(x, conv, memory)
    # Frames kept from a chunk before are laid out otherwise: the result is turned once, not by each row that reads it.
    return plain.conv(laid_out(x), conv, memory).contiguous(memory_format=LAST)


def norm_silu_conv(
    x: Video5D,
    norm: GroupNorm | LatentNorm,
    conv: CausalConv3d,
    latents: Video5D | None,
    memory: Memory,
    residual: Video5D | None = None,
    *,
    strips: int | None = None,
) -> Video5D:
    if torch.is_grad_enabled():
        return plain.norm_silu_conv(x, norm, conv, latents, memory, residual)
    x = x.contiguous(memory_format=LAST)
    batch, channels, frames, height, width = x.shape
    pairs = known(x).pairs
    affine = normalization(x, norm.norm if isinstance(norm, LatentNorm) else norm)
    scale = shift = None
    if isinstance(norm, LatentNorm) and latents is not None:
        scale, shift = (part(latents.contiguous(memory_format=LAST)) for part in (norm.scale, norm.shift))
    kept = 1 if pairs else 2
    past = memory.take(conv)
    # Fewer multiplications want pictures of whole tiles, and a column of zeros on either side.
    fewer = pays(x, conv)
    even = 2 if fewer else 1
    convolve = (winograd_conv if fewer else direct_conv)(conv, frames, pairs, begins=past is None)
    keep = empty_like_last(x, (batch, channels, kept, height, width)) if past is None else past
    if residual is None or known(residual).pairs:
        out = empty_like_last(x, (batch, conv.out_channels, all_frames(frames) if pairs else frames, height, width))
    else:
        out = residual
    if residual is not None and out is not residual:
        out.copy_(repeat_pairs(residual))

    sums = torch.zeros(batch, conv.out_channels, 2, dtype=torch.float64, device=x.device)
    row_bytes = batch * channels * (kept + frames) * width * x.element_size()
    count = strips or -(-height * row_bytes // BUFFER.get(x.device.type, 2**26))
    rows = round_up(-(-height // count), even)
    side = int(fewer)
    columns = round_up(width, even) + 2 * side
    work = x.new_empty(batch * channels * (kept + frames) * (rows + 2) * columns)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        first, last = max(top - 1, 0), min(bottom + 1, height)  # what the strip's convolution sees of the picture
        size = (batch, channels, kept + frames, round_up(bottom - top, even) + 2, columns)
        buffer = view_last(work, size)
        above, below = buffer[:, :, :, : first - top + 1], buffer[:, :, :, last - top + 1 :]
        for edge in (above, below, buffer[..., :side], buffer[..., side + width :]):
            if edge.numel():
                edge.zero_()
        seen = buffer[:, :, :, first - top + 1 : last - top + 1, side : side + width]
        # What is kept replaces what was kept, one row late: the next strip still has to see the row above it.
        done = height if bottom == height else bottom - 1
        before = None if past is None else past[:, :, :, first:last]
        table = latent_rows(scale, shift, first, last, height)
        norm_silu(x[:, :, :, first:last], affine, *table, before, seen, keep[:, :, :, first:done])
        for some in convolve(buffer, out[:, :, :, top:bottom], residual is not None):
            sums += some
    memory.keep(conv, keep)
    return know(out, sums=sums)


Convolve = Callable[[Video5D, Video5D, bool], Iterator[Tensor]]
"""(padded input, output, whether to add to what stands in the output): the channel sums of its parts."""


def direct_conv(conv: CausalConv3d, frames: int, pairs: bool, *, begins: bool) -> Convolve:
    taps = paired_taps(conv.weight, frames) if pairs else [(conv.weight, slice(None), slice(None))]

    def convolve(x: Video5D, out: Video5D, add: bool) -> Iterator[Tensor]:
        for weight, read, written in taps:
            part = out[:, :, written]
            yield conv_add(x[:, :, read], weight, conv.bias, part if add else None, part)

    return convolve


def winograd_conv(conv: CausalConv3d, frames: int, pairs: bool, *, begins: bool) -> Convolve:
    """In fewer multiplications. Its matrices are made for each chunk: they take no memory between convolutions."""
    plan, room = winograd.causal_plan(frames, begins=begins, pairs=pairs), winograd.Room()
    matrices = winograd.transformed(conv.weight, (plan[0][0], winograd.TWO, winograd.TWO))

    def convolve(x: Video5D, out: Video5D, add: bool) -> Iterator[Tensor]:
        winograd.causal_conv(x, matrices, plan, out, conv.bias, room, add=add)
        yield channel_sums(out)

    return convolve


def pays(x: Tensor, conv: nn.Conv2d | nn.Conv3d) -> bool:
    """Whether a convolution is faster in fewer multiplications (`docs/vae_speed.md`)."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and set(conv.kernel_size) == {3}
        and min(conv.in_channels, conv.out_channels) >= WIDE
        and (isinstance(conv, nn.Conv2d) or x[0, 0].numel() >= FEW)
    )


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def shortcut(x: Video5D, conv: nn.Conv3d | nn.Identity) -> Video5D:
    """Where the width shrinks, the result is written over `x`: one picture less in memory where it is largest."""
    if torch.is_grad_enabled() or isinstance(conv, nn.Identity):
        return conv(x)
    values = x.permute(0, 2, 3, 4, 1).flatten(0, 3)
    shape = (len(x), conv.out_channels, *x.shape[2:])
    if conv.out_channels < conv.in_channels:
        out = view_last(x.as_strided((math.prod(shape),), (1,)), shape)
    else:
        out = empty_like_last(x, shape)
    places = out.permute(0, 2, 3, 4, 1).flatten(0, 3)
    step = 2**23 // conv.in_channels
    weight = conv.weight.flatten(1)
    for start in range(0, len(values), step):  # no later value has been written over yet
        places[start : start + step] = F.linear(values[start : start + step], weight, conv.bias)
    return know(out, pairs=known(x).pairs)


def upsample(x: Video5D, conv: nn.Conv2d, double_time: bool) -> Video5D:
    """Each frame once, without enlarging it: a pixel's four successors are convolutions of 2 x 2 pixels."""
    if torch.is_grad_enabled():
        return plain.upsample(x, conv, double_time)
    batch, _channels, frames, height, width = x.shape
    enlarge = (winograd_enlarge if pays(x, conv) else phase_enlarge)(conv)
    out = empty_like_last(x, (batch, conv.out_channels, frames, 2 * height, 2 * width))
    pairs = double_time and frames > 1
    sums = torch.zeros(batch, conv.out_channels, 2, dtype=torch.float64, device=x.device)
    for frame in range(frames):
        twice = pairs and (frame > 0 or frames % 2 == 0)
        sums += enlarge(x[:, :, frame], out[:, :, frame]) * (2 if twice else 1)
    return know(out, sums=sums, pairs=pairs)


def phase_enlarge(conv: nn.Conv2d) -> Callable[[Tensor, Tensor], Tensor]:
    weight = laid_out(phase_weights(conv.weight))
    bias = None if conv.bias is None else conv.bias.repeat(4)
    return lambda x, out: interleave(F.conv2d(laid_out(x), weight, bias, padding=1), out)


def winograd_enlarge(conv: nn.Conv2d) -> Callable[[Tensor, Tensor], Tensor]:
    schemes, room = (winograd.EACH, winograd.ENLARGE, winograd.ENLARGE), winograd.Room()
    matrices = winograd.transformed(conv.weight[:, :, None], schemes)

    def enlarge(x: Tensor, out: Tensor) -> Tensor:
        for clip, result in zip(x.movedim(1, -1), out.movedim(1, -1), strict=True):
            padded = F.pad(clip, (0, 0, 1, 1, 1, 1))
            winograd.convolve(padded[None], matrices, schemes, result[None], conv.bias, room=room)
        return channel_sums(out[:, :, None])

    return enlarge


def downsample(x: Video5D, conv: nn.Conv2d, halve_time: bool) -> Video5D:
    if torch.is_grad_enabled():
        return plain.downsample(x, conv, halve_time)
    batch, _, frames, height, width = x.shape
    odd = frames % 2
    halved = (frames + odd) // 2 if halve_time else frames
    out = empty_like_last(x, (batch, conv.out_channels, halved, (height - 2) // 2 + 1, (width - 2) // 2 + 1))
    weight = laid_out(conv.weight)
    for frame in range(halved):
        if not halve_time or (odd and frame == 0):
            one = x[:, :, frame]
        else:
            second = 2 * frame + 1 - odd
            one = (x[:, :, second - 1] + x[:, :, second]) / 2
        out[:, :, frame] = F.conv2d(laid_out(F.pad(one, (0, 1, 0, 1))), weight, conv.bias, stride=2)
    return out


# What a row tells the next one of its result


@dataclass
class Known:
    sums: Tensor | None = None  # [b, c, 2]: sum and sum of squares of each channel, in float64
    pairs: bool = False  # each frame stands for two, but an odd first one


def known(x: Tensor) -> Known:
    return getattr(x, "_known", None) or Known()


def know(x: Tensor, **what: Any) -> Tensor:
    setattr(x, "_known", Known(**what))  # noqa: B010  (a tensor has no such field for the type checker)
    return x


def all_frames(frames: int) -> int:
    """How many frames `frames` of which each stands for two are, but an odd first one."""
    return 2 * frames - frames % 2


def repeat_pairs(x: Video5D) -> Video5D:
    if not known(x).pairs:
        return x
    odd = x.shape[2] % 2
    return torch.cat([x[:, :, :odd], x[:, :, odd:].repeat_interleave(2, dim=2)], dim=2)


# Weights and tables


def normalization(x: Video5D, norm: nn.GroupNorm) -> Float[Tensor, "2 b c"]:
    """Scale and shift that the norm comes to for this chunk."""
    channels, frames, height, width = x.shape[1:]
    note = known(x)
    sums = channel_sums(x) if note.sums is None else note.sums
    size = channels // norm.num_groups
    values = size * (all_frames(frames) if note.pairs else frames) * height * width
    return torch.stack(group_affine(norm, sums.unflatten(1, (norm.num_groups, size)).sum(2), values))


def latent_rows(
    scale: Tensor | None, shift: Tensor | None, first: int, last: int, height: int
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """The rows of scale and shift that stand over the picture's rows from `first` to `last`; how many rows of the
    picture each stands over, and how far into that `first` is."""
    if scale is None or shift is None:
        return None, None, 1, 0
    ratio = height // scale.shape[3]
    rows = slice(first // ratio, (last - 1) // ratio + 1)
    return scale[:, :, :, rows], shift[:, :, :, rows], ratio, first % ratio


def paired_taps(weight: Tensor, frames: int) -> list[tuple[Tensor, slice, slice]]:
    """(weight, frames read, frames written) of convolutions with two taps in time over frames that stand for two.

    The first of two equal frames sees a a b, the second a b b, so that the taps of equal frames add up. An odd first
    frame stands for itself.
    """
    first, second, third = weight.float().unbind(2) if weight.dtype != torch.float64 else weight.unbind(2)
    earlier, later = (
        torch.stack(taps, dim=2).to(weight) for taps in ([first + second, third], [first, second + third])
    )
    odd = frames % 2
    plan = [(earlier, slice(odd, None), slice(odd, None, 2)), (later, slice(odd, None), slice(odd + 1, None, 2))]
    return [(earlier, slice(0, 2), slice(0, 1)), *plan] if odd else plan


def phase_weights(weight: Float[Tensor, "o i 3 3"]) -> Float[Tensor, "4*o i 2 2"]:
    """3 x 3 over a picture enlarged twice, as four convolutions of 2 x 2 over the picture itself: even and odd rows and
    columns see two pixels each, one of them twice."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    fold = wide.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # phase, pixel, tap
    return torch.einsum("aky,blx,oiyx->aboikl", fold, fold, wide).flatten(0, 2).to(weight)


def empty_like_last(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAST)


def view_last(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The first values of `flat` as a tensor of this shape, channels last."""
    batch, channels, *size = shape
    return flat[: math.prod(shape)].view(batch, *size, channels).permute(0, 4, 1, 2, 3)


# Fused operations: here for any device, in blocks that stay in a CPU core's cache; in triton_vae.py for CUDA


def blocks(shape: torch.Size) -> Iterator[tuple[int, int, slice]]:
    """(clip, frame, rows) of the parts that [b, c, f, h, w] is computed in."""
    batch, channels, frames, height, width = shape
    step = max(1, BLOCK // (channels * width))
    starts = range(0, height, step)
    for clip, frame, start in product(range(batch), range(frames), starts):
        yield clip, frame, slice(start, min(start + step, height))


@custom_op("videogen::norm_silu", mutates_args=("out", "out_keep"), schema="(Tensor x, Tensor affine, "
           "Tensor? scale, Tensor? shift, int ratio, int offset, Tensor? past, Tensor(a!) out, "
           "Tensor(b!) out_keep) -> ()")  # fmt: skip
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
    """out = past frames, then SiLU(norm(x) · scale + shift), the norm as `normalization` gives it, in float32 at least.

    scale and shift [b c f h w] of fewer frames, rows and columns are enlarged: row r of x is under row
    (r + offset) // ratio of theirs. Without a past the first frame stands for it. `out_keep` receives the first rows
    of as many last frames; it may lie over `past`.
    """
    frames, width, kept = x.shape[2], x.shape[4], out_keep.shape[2]
    for clip, frame, rows in blocks(x.shape):
        part = x[clip, :, frame, rows].movedim(0, -1).to(affine.dtype)
        factor, term = affine[:, clip]
        if scale is not None and shift is not None:
            over = latent_frame(frame, frames, scale.shape[2])
            here = slice((rows.start + offset) // ratio, (rows.stop - 1 + offset) // ratio + 1)
            factor, last = (t[clip, :, over, here].movedim(0, -1).to(affine.dtype) for t in (scale, shift))
            factor, term = factor * affine[0, clip], torch.addcmul(last, factor, affine[1, clip])
            above = (torch.arange(rows.start, rows.stop, device=x.device) + offset) // ratio - here.start
            factor, term = (t.index_select(0, above)[:, :, None] for t in (factor, term))
            part = part.unflatten(1, (scale.shape[4], width // scale.shape[4]))
        y = F.silu(torch.addcmul(term, part, factor), inplace=True)
        out[clip, :, kept + frame, rows] = y.view(-1, width, x.shape[1]).movedim(-1, 0)
    out[:, :, :kept] = out[:, :, kept : kept + 1] if past is None else past
    out_keep.copy_(out[:, :, -kept:, : out_keep.shape[3]])


def latent_frame(frame: int, frames: int, latents: int) -> int:
    """The latent frame that stands over a frame: an odd first one over itself alone."""
    if latents == 1 or frames % 2 == 0:
        return frame * latents // frames
    return 0 if frame == 0 else 1 + (frame - 1) * (latents - 1) // (frames - 1)


@custom_op("videogen::channel_sums", mutates_args=(), schema="(Tensor x) -> Tensor")
def channel_sums(x: Tensor) -> Tensor:
    """Sum and sum of squares of each channel [b, c, 2]: each row's in float32 at least, added up in float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(len(x), x.shape[1], 2, dtype=torch.float64, device=x.device)
    for clip, frame, rows in blocks(x.shape):
        part = x[clip, :, frame, rows].movedim(0, -1).to(wide)
        total[clip, :, 0] += part.sum(1).sum(0, dtype=torch.float64)
        total[clip, :, 1] += part.square().sum(1).sum(0, dtype=torch.float64)
    return total


@custom_op("videogen::conv_add", mutates_args=("out",), schema="(Tensor x, Tensor weight, Tensor? bias, "
           "Tensor? residual, Tensor(a!) out) -> Tensor")  # fmt: skip
def conv_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> Tensor:
    """out = convolution + bias + residual, no padding but one zero column on either side; returns `channel_sums(out)`.

    `residual` may be `out` itself.
    """
    x, weight = laid_out(x), laid_out(weight)
    if onednn(x):
        if residual is None:
            out.zero_()
        elif residual.data_ptr() != out.data_ptr():
            out.copy_(residual)
        ones = [1, 1, 1]
        torch.ops.mkldnn._convolution_pointwise_.binary(
            out, x, weight, bias, [0, 0, 1], ones, ones, 1, "add", 1.0, None, [], None
        )
    else:
        y = F.conv3d(x, weight, bias, padding=(0, 0, 1))
        out.copy_(y if residual is None else residual + y)
    return channel_sums(out)


def onednn(x: Tensor) -> bool:
    """Whether oneDNN's convolution, which adds to its output, is there for this type."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def laid_out(x: Tensor) -> Tensor:
    """As convolutions take it: channels-last, but in float32 on a CPU, where oneDNN then sums half as exactly."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return x.contiguous()
    return x.contiguous(memory_format=LAST if x.ndim == 5 else torch.channels_last)


@custom_op("videogen::interleave", mutates_args=("out",), schema="(Tensor x, Tensor(a!) out) -> Tensor")
def interleave(x: Tensor, out: Tensor) -> Tensor:
    """Put [b, (2 2 c), h + 1, w + 1] into `out` [b, c, 2 h, 2 w], row and column by turns; returns its channel sums."""
    height, width = x.shape[2] - 1, x.shape[3] - 1
    phases = x.unflatten(1, (2, 2, -1))
    for row, column in product(range(2), range(2)):
        part = phases[:, row, column, :, row : row + height, column : column + width]
        out[:, :, row::2, column::2] = part
    return channel_sums(out[:, :, None])


@norm_silu.register_fake
def _(x, affine, scale, shift, ratio, offset, past, out, out_keep):
    return None


@channel_sums.register_fake
def _(x):
    return x.new_empty((*x.shape[:2], 2), dtype=torch.float64)


@conv_add.register_fake
def _(x, weight, bias, residual, out):
    return x.new_empty((*out.shape[:2], 2), dtype=torch.float64)


@interleave.register_fake
def _(x, out):
    return x.new_empty((*out.shape[:2], 2), dtype=torch.float64)


@register_flop_formula(torch.ops.videogen.conv_add)
def _(x_shape, weight_shape, bias_shape, residual_shape, shape, *rest, **named):
    return 2 * math.prod(shape) * math.prod(weight_shape[1:])


def _on_cuda(name: str) -> Callable[..., Any]:
    """The operation's Triton kernel where Triton is, the same as everywhere else where it is not."""

    def call(*args: Any) -> Any:
        if not has_triton():
            return OPERATIONS[name]._init_fn(*args)
        from videogen.runtime import triton_vae

        with torch.cuda.device(args[0].device):
            return getattr(triton_vae, name)(*args)

    return call


OPERATIONS = {"norm_silu": norm_silu, "channel_sums": channel_sums, "conv_add": conv_add, "interleave": interleave}
for _name, _operation in OPERATIONS.items():
    _operation.register_kernel("cuda")(_on_cuda(_name))


# Memory on the host


@dataclass
class HostMemory(Memory):
    """A `Memory` whose frames wait in pinned host memory, copied on a stream of their own while the device computes.

    Whoever takes one convolution's frames has the next one's fetched. What is on the CPU already stays where it is.
    """

    device: torch.device | None = None
    fetched: dict[nn.Module, Tensor] = field(default_factory=dict)

    def keep(self, module: nn.Module, frames: Tensor) -> None:
        if frames.device.type == "cuda" and not self.last:
            self.device, stream = frames.device, copy_stream(frames.device)
            stream.wait_stream(torch.cuda.current_stream(frames.device))
            with torch.cuda.stream(stream):
                home = torch.empty_like(frames, device="cpu", pin_memory=True)
                home.copy_(frames, non_blocking=True)
            frames.record_stream(stream)  # not given to others before the copy is made
            frames = home
        super().keep(module, frames)

    def take(self, module: nn.Module) -> Tensor | None:
        if self.device is None:
            return super().take(module)
        current, stream = torch.cuda.current_stream(self.device), copy_stream(self.device)
        self.fetch(module)
        current.wait_stream(stream)
        frames = self.fetched.pop(module, None)
        if frames is not None:
            frames.record_stream(current)
        self.fetch(next(iter(self.past), None))
        return frames

    def fetch(self, module: nn.Module | None) -> None:
        home = None if module in self.fetched else self.past.pop(module, None)  # type: ignore[arg-type]
        if module is not None and home is not None:
            with torch.cuda.stream(copy_stream(self.device)):
                self.fetched[module] = home.to(self.device, non_blocking=True)


@cache
def copy_stream(device: torch.device | None) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
