"""The VAE on several processes: chunks of time side by side, or strips of every picture.

In time, a process has whole chunks. All run the same layers at the same moment, and each causal convolution takes from
the process of the chunk before what that one kept: norms see a chunk, as always, and the result is the same to the bit.
In space, a process has some rows of every frame: convolutions take a row from each neighbour, norms add up their sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from videogen.distributed.mesh import part_sizes
from videogen.models import vae as plain
from videogen.models.causal import CausalConv3d, Memory
from videogen.models.replaced import give_back
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
    set_ops,
)

Video5D = Float[Tensor, "b _c _f _h _w"]


def split_vae(vae: VAE, group: dist.ProcessGroup, how: str | None = None) -> VAE:
    """Let the processes of `group` share the work on each clip, in place; every one returns the whole.

    how: "time", "space", or None for what `choose` says. Of tiles and slices, each is shared, one after another.
    """
    split = Split(vae, group, how, vae._encode, vae._decode)
    vae._encode, vae._decode = split.encode, split.decode
    return vae


def unsplit_vae(vae: VAE) -> VAE:
    """Undo `split_vae`: the loops over chunks that were there."""
    split = getattr(vae._decode, "__self__", None)
    assert isinstance(split, Split), "what was put in last is taken out first"
    for name, loop in (("_encode", split.whole_encode), ("_decode", split.whole_decode)):
        give_back(vae, name, loop)
    return vae


def choose(chunks: Sequence[int], rows: int, processes: int, *, fast: bool = False) -> str | None:
    """How to share chunks of these lengths, or latents of so many rows: "time", "space", or None for not at all.

    In time, which is exact, unless space would take less than three quarters of it. Strips are computed by the plain
    rows: against fast ones they are taken to need three times as long.

    >>> choose([3, 2, 2, 2, 2, 2], 60, 2), choose([3, 2, 2, 2, 2, 2], 60, 8), choose([1], 1, 2)
    ('time', 'space', None)
    """
    in_time = sum(max(chunks[i : i + processes]) for i in range(0, len(chunks), processes))
    in_space = sum(chunks) * -(-rows // processes) / max(rows, 1) * (3 if fast else 1)
    if processes > 1 and rows >= processes and in_space < 0.75 * in_time:
        return "space"
    return "time" if processes > 1 and len(chunks) > 1 else None


@dataclass
class Split:
    """The loops over the chunks of a clip, run by all processes of a group together."""

    vae: VAE
    group: dist.ProcessGroup
    how: str | None
    whole_encode: Callable[[Tensor], Tensor]  # the loops that were there
    whole_decode: Callable[[Tensor], Iterator[Tensor]]

    def encode(self, pixels: Video5D) -> Video5D:
        config = self.vae.config
        b, _, frames, height, width = pixels.shape
        h, w = height // config.spatial_compression, width // config.spatial_compression
        plan = chunk_plan(frames, config.frame_batch_size)
        way = self._way(plan, h if height % config.spatial_compression == 0 else 0)
        if way == "time":
            ratio = int(config.temporal_compression_ratio)
            shapes = [(b, 2 * config.latent_channels, -(-(stop - start) // ratio), h, w) for start, stop in plan]
            chunks = [pixels[:, :, start:stop] for start, stop in plan]
            return torch.cat(list(in_time(self.vae.encoder, chunks, shapes, self.group)), dim=2)
        if way == "space":
            strips = Strips(self.group, h)
            with strips.at_work(self.vae):
                own = self.whole_encode(strips.own(pixels))
            return strips.gather(own)
        return self.whole_encode(pixels)

    def decode(self, latents: Video5D) -> Iterator[Video5D]:
        config = self.vae.config
        b, _, frames, h, w = latents.shape
        plan = decode_plan(config, frames)
        way = self._way(plan, h)
        if way == "time":
            ratio, space = int(config.temporal_compression_ratio), config.spatial_compression
            odd = [(stop - start) % 2 if start == 0 or stop - start > 1 else 0 for start, stop in plan]
            lengths = [ratio * (stop - start - one) + one for (start, stop), one in zip(plan, odd, strict=True)]
            shapes = [(b, config.out_channels, length, space * h, space * w) for length in lengths]
            chunks = [latents[:, :, start:stop] for start, stop in plan]
            yield from in_time(self.vae.decoder, chunks, shapes, self.group)
        elif way == "space":
            strips = Strips(self.group, h)
            chunks = self.whole_decode(strips.own(latents))
            for _ in plan:
                with strips.at_work(self.vae):  # not while the caller has the chunk
                    own = next(chunks)
                yield strips.gather(own)
        else:
            yield from self.whole_decode(latents)

    def _way(self, plan: list[tuple[int, int]], rows: int) -> str | None:
        if torch.is_grad_enabled():  # what is exchanged has no backward: every process computes the whole
            return None
        fast = self.vae.decoder.ops != VAEOps()
        return self.how or choose([stop - start for start, stop in plan], rows, self.group.size(), fast=fast)


# In time ------------------------------------------------------------------------------------------------------------


def in_time(
    network: Encoder | Decoder, chunks: list[Tensor], shapes: list[tuple[int, ...]], group: dist.ProcessGroup
) -> Iterator[Tensor]:
    """What `network` makes of each chunk (of these shapes), in order: a round has a chunk for every process."""
    rank, count = group.rank(), group.size()
    memory = Relay(group=group, like=chunks[0])
    for first in range(0, len(chunks), count):
        running = min(count, len(chunks) - first)
        own = None
        if rank < running:
            memory.left = rank - 1 if rank else None
            memory.right = rank + 1 if rank + 1 < running else None
            memory.chunk = first + rank
            own = network(chunks[first + rank], memory)
            memory.finish()
        if first + running < len(chunks):
            memory.hand_over()
        for owner in range(running):
            done = chunks[0].new_empty(shapes[first + owner]) if own is None or owner != rank else own.contiguous()
            dist.broadcast(done, group=group, group_src=owner)
            yield done


@dataclass(kw_only=True)
class Relay(Memory):
    """What a convolution keeps goes to the process of the next chunk, which is about to run the same layer.

    Only what the last process of a round keeps must wait, in `future`, for the first one to begin the next round.
    """

    group: dist.ProcessGroup
    like: Tensor
    left: int | None = None  # the process that has the chunk before; None: `past` has what it kept
    right: int | None = None  # the process that has the next chunk; None: it belongs to the next round
    order: dict[nn.Module, None] = field(default_factory=dict)  # the convolutions as they run
    sending: list[tuple[dist.Work, Tensor]] = field(default_factory=list)

    def take(self, module: nn.Module) -> Tensor | None:
        return super().take(module) if self.left is None else self.receive(self.left)

    def keep(self, module: nn.Module, frames: Tensor) -> None:
        self.order[module] = None
        if self.right is None:
            super().keep(module, frames)
        else:
            self.send(frames, self.right)

    def hand_over(self) -> None:
        """From the last process of this round to the first of the next."""
        rank, last = self.group.rank(), self.group.size() - 1
        for module in self.order:
            if rank == last:
                self.send(self.future.pop(module), 0)
            elif rank == 0:
                self.past[module] = self.receive(last)
        self.finish()

    def send(self, frames: Tensor, process: int) -> None:
        """Their shape goes first: how many frames are kept is the affair of the rows that compute."""
        self.sending = [(work, message) for work, message in self.sending if not work.is_completed()]
        for message in (torch.tensor(frames.shape, device=frames.device), frames.contiguous()):
            work = dist.isend(message, group=self.group, group_dst=process)
            assert work is not None
            self.sending.append((work, message))

    def receive(self, process: int) -> Tensor:
        shape = torch.empty(5, dtype=torch.int64, device=self.like.device)
        dist.recv(shape, group=self.group, group_src=process)
        frames = self.like.new_empty(shape.tolist())
        dist.recv(frames, group=self.group, group_src=process)
        return frames

    def finish(self) -> None:
        """Wait until all that was sent has arrived, and let go of it."""
        for work, _ in self.sending:
            work.wait()
        self.sending.clear()


# In space -----------------------------------------------------------------------------------------------------------


@dataclass
class Strips:
    """A picture whose latents have `rows` rows, in one strip for each process: how to part, compute and join it."""

    group: dist.ProcessGroup
    rows: int

    @property
    def sizes(self) -> list[int]:
        return part_sizes(self.rows, self.group.size())

    def own(self, x: Video5D) -> Video5D:
        """This process's rows of a picture at any scale."""
        scale = x.shape[3] // self.rows
        return x.split([size * scale for size in self.sizes], dim=3)[self.group.rank()]

    def gather(self, strip: Video5D) -> Video5D:
        """The whole picture; shorter strips travel with padding."""
        scale = strip.shape[3] // self.sizes[self.group.rank()]
        send = F.pad(strip, (0, 0, 0, max(self.sizes) * scale - strip.shape[3])).contiguous()
        received = [torch.empty_like(send) for _ in self.sizes]
        dist.all_gather(received, send, group=self.group)
        return torch.cat([part[:, :, :, : n * scale] for part, n in zip(received, self.sizes, strict=True)], dim=3)

    @contextmanager
    def at_work(self, vae: VAE) -> Iterator[None]:
        """While it lasts, `vae` computes with strips, and with plain rows but for its neighbours."""
        ops = vae.decoder.ops
        set_ops(vae, VAEOps(self.conv, self.norm_silu_conv, plain.shortcut, self.upsample, self.downsample))
        try:
            yield
        finally:
            set_ops(vae, ops)

    def with_neighbours(self, x: Video5D, above: int, below: int) -> Video5D:
        """`x` with one row more above or below: the neighbour's, or zeros at the edge of the picture."""
        rank, last = self.group.rank(), self.group.size() - 1
        first_row, last_row = x[:, :, :, :1].contiguous(), x[:, :, :, -1:].contiguous()
        messages, received = [], []
        if below:  # each sends up what its neighbour has below
            if rank > 0:
                messages.append(dist.P2POp(dist.isend, first_row, group=self.group, group_peer=rank - 1))
            if rank < last:
                received.append((-1, torch.empty_like(last_row)))
                messages.append(dist.P2POp(dist.irecv, received[-1][1], group=self.group, group_peer=rank + 1))
        if above:
            if rank < last:
                messages.append(dist.P2POp(dist.isend, last_row, group=self.group, group_peer=rank + 1))
            if rank > 0:
                received.append((0, torch.empty_like(first_row)))
                messages.append(dist.P2POp(dist.irecv, received[-1][1], group=self.group, group_peer=rank - 1))
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        padded = F.pad(x, (0, 0, above, below))
        for place, row in received:
            padded[:, :, :, place] = row[:, :, :, 0]
        return padded

    def conv(self, x: Video5D, conv: CausalConv3d, memory: Memory) -> Video5D:
        return plain.conv(self.with_neighbours(x, 1, 1), conv, memory)[:, :, :, 1:-1]

    def norm_silu_conv(
        self,
        x: Video5D,
        norm: GroupNorm | LatentNorm,
        conv: CausalConv3d,
        latents: Video5D | None,
        memory: Memory,
        residual: Video5D | None = None,
    ) -> Video5D:
        inner = norm.norm if isinstance(norm, LatentNorm) else norm
        sums = group_sums(x, inner.num_groups)
        dist.all_reduce(sums, group=self.group)
        own_values = x[0].numel() // inner.num_groups
        scale, shift = group_affine(inner, sums, own_values // self.sizes[self.group.rank()] * self.rows)
        y = (x * scale[:, :, None, None, None] + shift[:, :, None, None, None]).to(x.dtype)
        if isinstance(norm, LatentNorm):
            y = y * enlarge_to(norm.scale(latents), x.shape[2:]) + enlarge_to(norm.shift(latents), x.shape[2:])
        y = self.conv(F.silu(y), conv, memory)
        return y if residual is None else residual + y

    def upsample(self, x: Video5D, conv: nn.Conv2d, double_time: bool) -> Video5D:
        return plain.upsample(self.with_neighbours(x, 1, 1), conv, double_time)[:, :, :, 2:-2]

    def downsample(self, x: Video5D, conv: nn.Conv2d, halve_time: bool) -> Video5D:
        return plain.downsample(self.with_neighbours(x, 0, 1), conv, halve_time)
