"""Which samples a step sees, and which process computes which of them: clips and images of any size under a budget.

Samples of one bucket, that is of one shape, can be computed as one tensor. A step may hold samples of many buckets:
images and clips learn side by side. Everything here is a function of its arguments: any process can work out the plan
of every other, and the plan of an epoch does not know how many processes there are.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np

from videogen.config import DiTConfig
from videogen.errors import InvalidRequest

T = TypeVar("T")
Shape = Hashable  # (latent frames, height, width), and frames per second where clips of several rates shall stay apart


def token_count(config: DiTConfig, shape: tuple[int, int, int]) -> int:
    """Tokens of one sample of latent shape (f, h, w): its patches and its text. Missing frames of a patch are padded.

    >>> token_count(DiTConfig(), (13, 60, 90))
    17776
    """
    f, h, w = shape
    video = -(-f // (config.patch_size_t or 1)) * (h // config.patch_size) * (w // config.patch_size)
    return config.max_text_seq_length + video


def buckets(shapes: Sequence[Shape], among: Sequence[int] | None = None) -> dict[Shape, list[int]]:
    """The samples (`among` these, None: all) by shape, in order of first appearance."""
    found: dict[Shape, list[int]] = {}
    for index in range(len(shapes)) if among is None else among:
        found.setdefault(shapes[index], []).append(index)
    return found


def epoch_batches(
    shapes: Sequence[Shape],
    *,
    tokens: Sequence[int],
    seed: int,
    epoch: int,
    batch_size: int = 0,
    token_budget: int = 0,
    together: int = 1,
) -> list[list[int]]:
    """The batches of an epoch, over all processes: every sample in exactly one of them, nothing is dropped.

    tokens        of each sample
    batch_size    samples of a batch at most. What does not divide is spread: sizes differ by one, and no step is made
                  of a few left-overs
    token_budget  or tokens of a batch at most. Batches are filled evenly, large samples first: each holds about the
                  same mix of sizes and, where samples are small against the budget, the same number of tokens
    together      so many samples of a bucket stay in one batch, for larger tensors and less of a mixture

    Raises InvalidRequest where a sample alone is more than the budget.
    """
    if (batch_size > 0) == (token_budget > 0):
        raise InvalidRequest(
            f"batch_size is {batch_size} and token_budget {token_budget}.",
            why="a batch is measured in samples or in tokens.",
            hint="give one of them.",
            param="batch_size",
        )
    rng = np.random.default_rng((seed, 2, epoch))
    order = rng.permutation(len(shapes)).tolist()
    groups = [
        group[i : i + together] for group in buckets(shapes, order).values() for i in range(0, len(group), together)
    ]
    groups = [groups[i] for i in rng.permutation(len(groups))]
    if batch_size:
        flat = [index for group in groups for index in group]
        count = -(-len(flat) // batch_size)
        return [flat[len(flat) * i // count : len(flat) * (i + 1) // count] for i in range(count)]
    groups = _within(groups, tokens, token_budget)
    place = {index: i for i, index in enumerate(order)}
    batches = _spread_under(groups, lambda group: _total(group, tokens), token_budget)
    flattened = [sorted((index for group in batch for index in group), key=place.__getitem__) for batch in batches]
    return [flattened[i] for i in rng.permutation(len(flattened))]


def share(batch: Sequence[int], tokens: Sequence[int], rank: int, world: int) -> list[int]:
    """The samples of a batch that one of `world` processes computes, in the batch's order: about equal in tokens.

    tokens  of each sample of the data set, or another measure of its work

    Every sample is on exactly one process; with as many samples as processes or more, none is without.
    """
    places = _spread(range(len(batch)), lambda place: tokens[batch[place]], world)[rank]
    return [batch[place] for place in sorted(places)]


def micro_batches(
    part: Sequence[int],
    shapes: Sequence[Shape],
    size: int = 0,
    *,
    tokens: Sequence[int] | None = None,
    most_tokens: int = 0,
    count: int = 0,
) -> list[list[int]]:
    """A process's samples as tensors to compute one after the other: each of one shape, all samples exactly once.

    size         samples of one at most; 0: no limit
    most_tokens  `tokens` of one at most, one sample at least; 0: no limit
    count        so many, if there are fewer: larger ones are divided, and where each has one sample left, empty ones
                 follow. Where every forward pass is a collective operation (FSDP), processes must make equally many
    """
    parts = []
    for group in buckets(shapes, part).values():
        each = size or len(group)
        if most_tokens and tokens is not None:
            each = min(each, max(1, most_tokens // tokens[group[0]]))
        parts += [group[i : i + each] for i in range(0, len(group), each)]
    while len(parts) < count and any(len(p) > 1 for p in parts):
        at = max(range(len(parts)), key=lambda i: len(parts[i]))
        half = len(parts[at]) // 2
        parts[at : at + 1] = [parts[at][:half], parts[at][half:]]
    return parts + [[] for _ in range(count - len(parts))]


def packs(part: Sequence[int], tokens: Sequence[int], most_tokens: int, *, count: int = 0) -> list[list[int]]:
    """A process's samples as packed streams of `most_tokens` at most, of any shapes (`training.packing`).

    Streams are filled evenly. `count`: so many, if fewer would do; empty ones where there are not as many samples.
    """
    if not part:
        return [[] for _ in range(count)]
    _within([[index] for index in part], tokens, most_tokens)
    filled = _spread_under(range(len(part)), lambda place: tokens[part[place]], most_tokens, count)
    return [[part[place] for place in sorted(stream)] for stream in filled]


def token_spread(batches: Sequence[Sequence[int]], tokens: Sequence[int]) -> float:
    """How unequal batches are: the largest minus the smallest number of tokens, over the mean."""
    totals = [_total(batch, tokens) for batch in batches]
    return (max(totals) - min(totals)) * len(totals) / sum(totals)


def padding_waste(batches: Sequence[Sequence[int]], tokens: Sequence[int], length: int = 0) -> float:
    """The share of computed tokens that is padding: of streams padded to `length`; 0: of samples, each padded to the
    longest of its batch, as a trainer without buckets or packing does.
    """
    computed = sum(length or len(batch) * max(tokens[index] for index in batch) for batch in batches if batch)
    return 1 - sum(_total(batch, tokens) for batch in batches) / computed


def _total(group: Sequence[int], tokens: Sequence[int]) -> int:
    return sum(tokens[index] for index in group)


def _within(groups: list[list[int]], tokens: Sequence[int], budget: int) -> list[list[int]]:
    """The groups, those that are more than the budget divided."""
    found = []
    for group in groups:
        most = max(tokens[index] for index in group)
        if most > budget:
            index = next(index for index in group if tokens[index] == most)
            raise InvalidRequest(
                f"sample {index} has {most} tokens.",
                why=f"the budget is {budget}, and nothing is dropped.",
                hint=f"a budget of {most} or more, or shorter and smaller clips.",
                param="token_budget",
            )
        each = budget // most
        found += [group[i : i + each] for i in range(0, len(group), each)]
    return found


def _spread(items: Sequence[T], weight: Callable[[T], int], count: int) -> list[list[T]]:
    """The items in `count` parts of about equal weight: the heaviest first, each to the part lightest so far."""
    parts: list[list[T]] = [[] for _ in range(count)]
    lightest = [(0, i) for i in range(count)]
    for item in sorted(items, key=weight, reverse=True):  # stable: equal weights stay in order
        total, i = lightest[0]
        parts[i].append(item)
        heapq.heapreplace(lightest, (total + weight(item), i))
    return parts


def _spread_under(items: Sequence[T], weight: Callable[[T], int], budget: int, least: int = 0) -> list[list[T]]:
    """The items in as few such parts as keep to the budget, `least` or more."""
    count = max(least, -(-sum(weight(item) for item in items) // budget))
    while True:
        parts = _spread(items, weight, count)
        if all(sum(weight(item) for item in part) <= budget for part in parts):
            return parts
        count += max(1, count // 200)
