"""Ulysses sequence parallelism (arXiv:2309.14509): each process has a part of the tokens, in attention a part of heads.

Everything but attention works token by token. Around the attention kernel one all-to-all turns "my tokens, all heads"
into "all tokens, my heads", and a second one turns the result back.

In training the same messages travel back: the backward of an exchange is the exchange the other way round. What lies
outside the block loop every process of a group computes for itself, so each lets the result count 1 / degree: then the
gradient of every weight is the sum over all processes, of whatever loss they share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from videogen.distributed.mesh import part_sizes
from videogen.errors import InvalidRequest
from videogen.models.attention import Attention, Kernel, PackedKernel
from videogen.models.dit import DiT
from videogen.models.replaced import give_back
from videogen.types import Latent, Tokens


@dataclass
class Ulysses:
    """A block loop over this process's part of the stream. `sizes`: tokens of each process while a block runs."""

    dit: DiT
    run_blocks: Any  # the loop that was there
    group: dist.ProcessGroup
    attentions: list[Attention]
    trains: bool
    sizes: list[int] | None = None

    def __call__(self, tokens: Tokens) -> Tokens:
        if torch.is_grad_enabled() and not self.trains:  # every process computes the whole, and its own gradient
            return self.run_blocks(tokens)
        if not all(isinstance(attention.kernel, Exchange) for attention in self.attentions):
            raise RuntimeError(
                "an attention kernel was put in after the sequence was sharded: it would see a part only"
            )
        sizes = part_sizes(tokens.x.shape[1], self.group.size())
        with self.blocks_know(sizes):
            own = self.run_blocks(take_part(tokens, sizes, self.group.rank()))
        return dataclasses.replace(tokens, x=gather(own.x, sizes, self.group))

    @contextmanager
    def blocks_know(self, sizes: list[int]) -> Iterator[None]:
        """Each block of the loop knows the parts of the stream it was called for, when it is recomputed too."""
        each_block, replaced = self.dit.each_block, self.dit.__dict__.get("each_block")
        self.dit.each_block = lambda: (partial(self.call, block, sizes) for block in each_block())  # type: ignore
        try:
            yield
        finally:
            del self.dit.each_block
            if replaced is not None:
                self.dit.each_block = replaced

    def call(self, block: Any, sizes: list[int], *args: Any) -> Tensor:
        before, self.sizes = self.sizes, sizes
        try:
            return block(*args)
        finally:
            self.sizes = before


@dataclass
class Exchange:
    """The kernel that was there, on the heads of this process and the tokens of all."""

    kernel: Kernel
    ulysses: Ulysses

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes, group = self.ulysses.sizes, self.ulysses.group
        if sizes is None:
            return self.kernel(q, k, v)
        return tokens_apart(self.kernel(*heads_apart((q, k, v), sizes, group)), sizes, group)


@dataclass
class PackedExchange:
    """The same around the kernel for several clips in one stream, which it sees whole."""

    packed: PackedKernel
    ulysses: Ulysses

    def __call__(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        sizes, group = self.ulysses.sizes, self.ulysses.group
        if sizes is None:
            return self.packed(kernel, q, k, v, lengths)
        assert isinstance(kernel, Exchange)
        q, k, v = heads_apart((q, k, v), sizes, group)
        return tokens_apart(self.packed(kernel.kernel, q, k, v, lengths), sizes, group)


def shard_sequence(dit: DiT, group: dist.ProcessGroup, *, trains: bool = False) -> DiT:
    """Let the processes of `group` share the blocks' work on each stream, in place; every one returns the whole.

    trains  also where there are gradients: each process then has its part of every gradient, of a loss that all of
            them compute from the same output, and their sum is the whole. Without it gradients are computed alone
    """
    heads, degree = dit.config.num_attention_heads, group.size()
    if heads % degree:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise InvalidRequest(
            f"{degree} processes cannot share {heads} attention heads.",
            why="each takes as many heads as the others.",
            hint=f"a degree among {', '.join(map(str, fitting))}",
            param="sequence",
        )
    attentions = [module for module in dit.modules() if isinstance(module, Attention)]
    ulysses = Ulysses(dit, dit.run_blocks, group, attentions, trains)
    dit.run_blocks = ulysses
    if trains:
        dit.unembed = Counted(dit.unembed, 1 / degree)
    for attention in attentions:
        attention.kernel = Exchange(attention.kernel, ulysses)
        attention.packed = PackedExchange(attention.packed, ulysses)
    return dit


def unshard_sequence(dit: DiT) -> DiT:
    """Undo `shard_sequence`: the block loop and the kernels that were there, the same objects."""
    ulysses = dit.run_blocks
    assert isinstance(ulysses, Ulysses), "what was put in last is taken out first"
    for attention in ulysses.attentions:
        assert isinstance(attention.kernel, Exchange)
        assert isinstance(attention.packed, PackedExchange)
        attention.kernel, attention.packed = attention.kernel.kernel, attention.packed.packed
    give_back(dit, "run_blocks", ulysses.run_blocks)
    if isinstance(dit.unembed, Counted):
        give_back(dit, "unembed", dit.unembed.unembed)
    return dit


@dataclass
class Counted:
    """`DiT.unembed` as it was; backwards, its result counts `share`."""

    unembed: Any
    share: float

    def __call__(self, tokens: Tokens, latents: Latent) -> Latent:
        out = self.unembed(tokens, latents)
        if out.requires_grad:
            out = out * 1  # the hook below is for this result alone
            out.register_hook(lambda gradient: gradient * self.share)
        return out


def take_part(tokens: Tokens, sizes: Sequence[int], rank: int) -> Tokens:
    """The tokens of process `rank`, with their own positions and as much text as lies among them."""
    start = sum(sizes[:rank])
    part = slice(start, start + sizes[rank])
    segments = tokens.segments
    if segments is not None:
        segments = dataclasses.replace(segments, runs=part_of_runs(segments.runs, start, sizes[rank]))
    return dataclasses.replace(
        tokens,
        x=tokens.x[:, part].clone(memory_format=torch.contiguous_format),  # of one layout, as between blocks
        position=None if tokens.position is None else tokens.position[part],
        text_length=min(max(tokens.text_length - start, 0), sizes[rank]),
        segments=segments,
    )


def part_of_runs(runs: Sequence[tuple[int, int, int]], start: int, size: int) -> tuple[tuple[int, int, int], ...]:
    """What `size` tokens of a stream are from `start` on.

    >>> part_of_runs([(2, 0, 1), (6, 0, 0), (2, 1, 1)], 1, 4)
    ((1, 0, 1), (3, 0, 0))
    """
    part, at = [], 0
    for tokens, clip, modality in runs:
        inside = min(at + tokens, start + size) - max(at, start)
        at += tokens
        if inside > 0:
            part.append((inside, clip, modality))
    return tuple(part)


def heads_apart(
    qkv: Sequence[Float[Tensor, "b k own c"]], sizes: Sequence[int], group: dist.ProcessGroup
) -> tuple[Float[Tensor, "b _k s c"], ...]:
    """Own tokens of all heads to all tokens of own heads, queries, keys and values in one message."""
    own, count = qkv[0].shape[2], len(sizes)
    send = torch.stack([rearrange(x, "b (n k) s c -> n s b k c", n=count) for x in qkv], dim=2)
    received = all_to_all(send.flatten(0, 1), list(sizes), [own] * count, group)  # by process: in the stream's order
    return rearrange(received, "s qkv b k c -> qkv b k s c").unbind()


def tokens_apart(
    x: Float[Tensor, "b _k s c"], sizes: Sequence[int], group: dist.ProcessGroup
) -> Float[Tensor, "b k _s c"]:
    """All tokens of own heads to own tokens of all heads."""
    own, count = sizes[group.rank()], len(sizes)
    send = rearrange(x, "b k s c -> s b k c").contiguous()
    received = all_to_all(send, [own] * count, list(sizes), group)
    return rearrange(received, "(n s) b k c -> b (n k) s c", n=count)


def gather(x: Float[Tensor, "b own d"], sizes: Sequence[int], group: dist.ProcessGroup) -> Float[Tensor, "b s d"]:
    """The parts of all processes in order."""
    if torch.is_grad_enabled():
        own, count = sizes[group.rank()], len(sizes)
        send = repeat(x, "b s d -> (n s) b d", n=count)  # backwards, what all say of one's own part is added up
        return rearrange(all_to_all(send, list(sizes), [own] * count, group), "s b d -> b s d").contiguous()
    longest = max(sizes)
    send = x.new_zeros(longest, len(x), x.shape[2])  # shorter ones travel with a row of padding
    send[: x.shape[1]] = rearrange(x, "b s d -> s b d")
    received = [torch.empty_like(send) for _ in sizes]
    dist.all_gather(received, send, group=group)
    whole = torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])
    return rearrange(whole, "s b d -> b s d").contiguous()


def all_to_all(
    send: Float[Tensor, "_sent *rest"], received: list[int], sent: list[int], group: dist.ProcessGroup
) -> Float[Tensor, "_received *rest"]:
    """Rows to every process and rows from each, `sent` and `received` of them; gradients go the same way back."""
    if torch.is_grad_enabled():
        return _AllToAll.apply(send, received, sent, group)
    rows = send.new_empty(sum(received), *send.shape[1:])
    dist.all_to_all_single(rows, send, received, sent, group=group)
    return rows


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, send: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.back = sent, received, group
        rows = send.new_empty(sum(received), *send.shape[1:])
        dist.all_to_all_single(rows, send.contiguous(), received, sent, group=group)
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(gradients[0], *ctx.back), None, None, None
