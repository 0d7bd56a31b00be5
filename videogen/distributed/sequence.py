"""Ulysses sequence parallelism (arXiv:2309.14509): each process has a part of the tokens, in attention a part of heads.

Everything but attention works token by token. Around the attention kernel one all-to-all turns "my tokens, all heads"
into "all tokens, my heads", and a second one turns the result back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from videogen.distributed.mesh import part_sizes
from videogen.errors import InvalidRequest
from videogen.models.attention import Attention, Kernel
from videogen.models.dit import DiT
from videogen.models.replaced import give_back
from videogen.types import Tokens


@dataclass
class Ulysses:
    """A block loop over this process's part of the stream. `sizes`: tokens of each process while the loop runs."""

    run_blocks: Any  # the loop that was there
    group: dist.ProcessGroup
    attentions: list[Attention]
    sizes: list[int] | None = None

    def __call__(self, tokens: Tokens) -> Tokens:
        if torch.is_grad_enabled():  # collectives here have no backward: every process computes the whole
            return self.run_blocks(tokens)
        if not all(isinstance(attention.kernel, Exchange) for attention in self.attentions):
            raise RuntimeError(
                "an attention kernel was put in after the sequence was sharded: it would see a part only"
            )
        self.sizes = part_sizes(tokens.x.shape[1], self.group.size())
        try:
            own = self.run_blocks(take_part(tokens, self.sizes, self.group.rank()))
            return dataclasses.replace(tokens, x=gather(own.x, self.sizes, self.group))
        finally:
            self.sizes = None


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


def shard_sequence(dit: DiT, group: dist.ProcessGroup) -> DiT:
    """Let the processes of `group` share the blocks' work on each stream, in place; every one returns the whole."""
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
    ulysses = Ulysses(dit.run_blocks, group, attentions)
    dit.run_blocks = ulysses
    for attention in attentions:
        attention.kernel = Exchange(attention.kernel, ulysses)
    return dit


def unshard_sequence(dit: DiT) -> DiT:
    """Undo `shard_sequence`: the block loop and the kernels that were there, the same objects."""
    ulysses = dit.run_blocks
    assert isinstance(ulysses, Ulysses), "what was put in last is taken out first"
    for attention in ulysses.attentions:
        assert isinstance(attention.kernel, Exchange)
        attention.kernel = attention.kernel.kernel
    give_back(dit, "run_blocks", ulysses.run_blocks)
    return dit


def take_part(tokens: Tokens, sizes: Sequence[int], rank: int) -> Tokens:
    """The tokens of process `rank`, with their own positions and as much text as lies among them."""
    start = sum(sizes[:rank])
    part = slice(start, start + sizes[rank])
    return dataclasses.replace(
        tokens,
        x=tokens.x[:, part].clone(memory_format=torch.contiguous_format),  # of one layout, as between blocks
        position=None if tokens.position is None else tokens.position[part],
        text_length=min(max(tokens.text_length - start, 0), sizes[rank]),
    )


def heads_apart(
    qkv: Sequence[Float[Tensor, "b k own c"]], sizes: Sequence[int], group: dist.ProcessGroup
) -> tuple[Float[Tensor, "b _k s c"], ...]:
    """Own tokens of all heads to all tokens of own heads, queries, keys and values in one message."""
    own, count = qkv[0].shape[2], len(sizes)
    send = torch.stack([rearrange(x, "b (n k) s c -> n s b k c", n=count) for x in qkv], dim=2)
    received = send.new_empty(sum(sizes), *send.shape[2:])  # by process, which is by position in the stream
    dist.all_to_all_single(received, send.flatten(0, 1), list(sizes), [own] * count, group=group)
    return rearrange(received, "s qkv b k c -> qkv b k s c").unbind()


def tokens_apart(
    x: Float[Tensor, "b _k s c"], sizes: Sequence[int], group: dist.ProcessGroup
) -> Float[Tensor, "b k _s c"]:
    """All tokens of own heads to own tokens of all heads."""
    own, count = sizes[group.rank()], len(sizes)
    send = rearrange(x, "b k s c -> s b k c").contiguous()
    received = send.new_empty(count * own, *send.shape[1:])
    dist.all_to_all_single(received, send, [own] * count, list(sizes), group=group)
    return rearrange(received, "(n s) b k c -> b (n k) s c", n=count)


def gather(x: Float[Tensor, "b own d"], sizes: Sequence[int], group: dist.ProcessGroup) -> Float[Tensor, "b s d"]:
    """The parts of all processes in order; shorter ones travel with a row of padding."""
    longest = max(sizes)
    send = x.new_zeros(longest, len(x), x.shape[2])
    send[: x.shape[1]] = rearrange(x, "b s d -> s b d")
    received = [torch.empty_like(send) for _ in sizes]
    dist.all_gather(received, send, group=group)
    whole = torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])
    return rearrange(whole, "s b d -> b s d").contiguous()
