"""Convolutions of three taps in fewer multiplications (Lavin & Gray, arXiv:1509.09308), where a CPU has no matrix unit.

Along one axis a `Scheme` forms sums of neighbours, multiplies each by a sum of taps, and adds products up: four
for two values instead of six. Schemes of all axes together make a convolution out of adds and one batch of matrix
products, 64 for eight values instead of 216. Everything lies channels-last; a block of the picture goes through at a
time, so that its products stay in the cache.

The tables are exact: in float64 the result is the convolution's to rounding. In float32 it is as exact as a direct one
if the products add few channels at a time (`SPLIT`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 2**21  # values of a block's products: with what goes in, 16 MB in float32
NEAR = 2**18  # values that are added to again and again: the second cache of a core
SPLIT = 64  # channels whose products are added up in one go


@dataclass(frozen=True)
class Scheme:
    """How the values of one axis are made; all additions.

    taps    sums of taps, one row per product
    rows    the rows that it uses
    seen    per product, the values whose sum it takes, as place and sign; places count from where the tile begins
    given   per value of a tile, the products that add up to it, the first with a plus
    common  the product that goes into every value of a tile with a plus, where a bias may enter
    step    how far the next tile begins
    """

    taps: tuple[tuple[float, ...], ...]
    rows: slice
    seen: tuple[tuple[tuple[int, int], ...], ...]
    given: tuple[tuple[tuple[int, int], ...], ...]
    common: int
    step: int

    @property
    def products(self) -> int:
        return len(self.seen)

    @property
    def outputs(self) -> int:
        return len(self.given)

    def span(self, tiles: int) -> int:
        """How many values `tiles` tiles see."""
        return self.step * (tiles - 1) + 1 + max(place for values in self.seen for place, _ in values)


_SECOND = ((0, 1), (2, -1)), ((1, 1), (2, 1)), ((2, 1), (1, -1)), ((1, 1), (3, -1))
_SUMS = ((0, 1), (1, 1), (2, 1)), ((1, 1), (2, -1), (3, -1))
_TAPS = (1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0)
TWO = Scheme(_TAPS, slice(0, 4), _SECOND, _SUMS, 1, 2)
"""F(2, 3): two values from four neighbours."""
ONE = Scheme(_TAPS, slice(0, 3), _SECOND[:3], _SUMS[:1], 1, 1)
"""One value from three neighbours, where the next is not wanted."""
SAME = Scheme(_TAPS, slice(1, 2), (((0, 1), (0, 1)),), (((0, 1),),), 0, 1)
"""One value from three neighbours that are equal."""

_PAIR_TAPS = (0.5, 0.5, 0.5), (0.5, 0.5, -0.5), (0.5, -0.5, -0.5)
_PAIR = ((0, 1), (1, 1)), ((0, 1), (1, -1)), ((0, 1), (1, -1))
PAIR = Scheme(_PAIR_TAPS, slice(0, 3), _PAIR, (((0, 1), (1, 1)), ((0, 1), (2, 1))), 0, 1)
"""The two values of a a b and a b b, from a and b."""
PAIR_SAME = Scheme(_PAIR_TAPS, slice(0, 1), SAME.seen, SAME.given, 0, 1)
"""`SAME` with the taps of `PAIR`."""

ENLARGE = Scheme(
    ((1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)),
    slice(0, 3),
    (((1, 1),), ((0, 1), (1, -1)), ((2, 1), (1, -1))),
    (((0, 1), (1, 1)), ((0, 1), (2, 1))),
    0,
    1,
)
"""The two values in place of the middle one of three, after each was doubled."""
EACH = Scheme(((1.0,),), slice(0, 1), (((0, 1),),), (((0, 1),),), 0, 1)
"""No convolution along this axis."""

Schemes = tuple[Scheme, Scheme, Scheme]  # time, height, width


def transformed(weight: Float[Tensor, "o i *taps"], schemes: Sequence[Scheme]) -> Float[Tensor, "p q r i o"]:
    """The matrices that the products multiply with, of every row of the schemes' taps (of time, height and width)."""
    o, i = weight.shape[:2]
    sums = reduce(torch.kron, (weight.new_tensor(scheme.taps) for scheme in schemes))
    out = torch.mm(sums, weight.transpose(0, 1).reshape(i * o, -1).T)
    return out.view(*(len(scheme.taps) for scheme in schemes), i, o)


class Room:
    """Two pieces of memory, of which each step fills the one that the step before did not."""

    def __init__(self) -> None:
        self.pieces: list[Tensor | None] = [None, None]

    def __call__(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        self.pieces.reverse()
        size, there = math.prod(shape), self.pieces[0]
        if there is None or len(there) < size:
            self.pieces[0] = None
            self.pieces[0] = there = like.new_empty(size)
        return there[:size].view(*shape)


def convolve(
    x: Float[Tensor, "f h w i"],
    matrices: Float[Tensor, "p q r i o"],
    schemes: Schemes,
    out: Float[Tensor, "F H W o"],
    bias: Float[Tensor, " o"] | None = None,
    *,
    add: bool = False,
    room: Room | None = None,
) -> None:
    """out = the convolution of x + bias, or out + that if `add`.

    x is padded already; it may be larger than `out` needs, and `out` smaller than whole tiles. `matrices` are those of
    `transformed`. Values of x beyond its end are never read: whole tiles must lie in it.
    """
    room = Room() if room is None else room
    over_time, over_height, over_width = schemes
    tiles = [-(-size // scheme.outputs) for size, scheme in zip(out.shape, schemes, strict=False)]
    matrices = matrices[over_time.rows].flatten(0, 2)
    channels = max(matrices.shape[1:])
    for frames, rows in blocks(tiles, len(matrices) * channels):
        first = frames.start * over_time.step, rows.start * over_height.step
        count = len(frames), len(rows), tiles[2]
        span = over_time.span(count[0]), over_height.span(count[1]), over_width.span(count[2])
        part = x[first[0] :, first[1] :][tuple(slice(n) for n in span)]
        target = out[frames.start * over_time.outputs :, rows.start * over_height.outputs :]
        target = target[: count[0] * over_time.outputs, : count[1] * over_height.outputs]
        _block(part, matrices, schemes, count, target, bias, add, room)


def causal_plan(frames: int, *, begins: bool, pairs: bool) -> list[tuple[Scheme, int, int, int]]:
    """(scheme, first frame seen, first frame given, frames given) for a convolution of kept frames and `frames` more.

    begins  the kept frames are copies of the first: the chunk is the clip's first
    pairs   each frame stands for two, an odd first one of a clip for itself; one frame is kept, otherwise two
    """
    if pairs:
        odd = frames % 2
        return [*[(PAIR_SAME, 1, 0, 1)] * odd, (PAIR, odd, odd, 2 * (frames - odd))]
    plan = [(SAME, 2, 0, 1)] if begins else []
    start, twos = int(begins), (frames - begins) // 2
    if twos:
        plan.append((TWO, start, start, 2 * twos))
    if start + 2 * twos < frames:
        plan.append((ONE, frames - 1, frames - 1, 1))
    return plan


def causal_conv(
    x: Float[Tensor, "b i f h w"],
    matrices: Float[Tensor, "p q r i o"],
    plan: list[tuple[Scheme, int, int, int]],
    out: Float[Tensor, "b o F H W"],
    bias: Float[Tensor, " o"] | None,
    room: Room,
    *,
    add: bool,
) -> None:
    """`convolve` for clips that lie channels-last, time after `causal_plan`; x is padded, and has an even size."""
    for clip, result in zip(x.movedim(1, -1), out.movedim(1, -1), strict=True):
        for scheme, seen, given, count in plan:
            part = result[given : given + count]
            convolve(clip[seen:], matrices, (scheme, TWO, TWO), part, bias, add=add, room=room)


def blocks(tiles: Sequence[int], size: int) -> Iterator[tuple[range, range]]:
    """Tiles of time and height that one block has, `size` values for each tile."""
    count = max(1, BLOCK // (size * tiles[2]))
    height = min(count, tiles[1])
    frames = max(1, min(count // height, tiles[0]))
    for t, h in product(range(0, tiles[0], frames), range(0, tiles[1], height)):
        yield range(t, min(t + frames, tiles[0])), range(h, min(h + height, tiles[1]))


def _block(
    x: Tensor,
    matrices: Tensor,
    schemes: Schemes,
    tiles: Sequence[int],
    out: Tensor,
    bias: Tensor | None,
    add: bool,
    room: Room,
) -> None:
    y = x
    # The axis with the shortest pieces of memory comes first, while values are few, and last on the way back. An axis
    # that is done with has the products on a new first axis, so that the next one is always the third.
    for scheme, count in zip(reversed(schemes), reversed(tiles), strict=True):
        y = _spread(y, scheme, count, room)
    y = _multiply(y.flatten(0, 2).flatten(1, 3), matrices, room)
    y = y.view(*(scheme.products for scheme in schemes), *tiles, -1)
    if bias is not None:
        y[tuple(scheme.common for scheme in schemes)] += bias
    for scheme in schemes:
        y = _collect(y, scheme, room)
    y = y[tuple(map(slice, out.shape))]
    if add:
        out += y
    else:
        out.copy_(y)


def _spread(x: Tensor, scheme: Scheme, tiles: int, room: Room) -> Tensor:
    """Sums of neighbours on the third axis, for each product on a new first one."""
    if scheme is EACH:
        return x[None]
    out = room(x, (scheme.products, *x.shape[:2], tiles, *x.shape[3:]))
    for values, target in zip(scheme.seen, out, strict=True):
        first, *more = (x[:, :, place :: scheme.step][:, :, :tiles] for place, _ in values)
        if not more:
            target.copy_(first)
        elif values[1][1] > 0:
            torch.add(first, more[0], out=target)
        else:
            torch.sub(first, more[0], out=target)
    return out


def _multiply(x: Tensor, matrices: Tensor, room: Room) -> Tensor:
    out = room(x, (*x.shape[:2], matrices.shape[2]))
    step = max(1, NEAR // out[0].numel())
    for a, b, sums in zip(x.split(step), matrices.split(step), out.split(step), strict=True):
        torch.bmm(a[..., :SPLIT], b[:, :SPLIT], out=sums)
        for start in range(SPLIT, x.shape[2], SPLIT):
            sums.baddbmm_(a[..., start : start + SPLIT], b[:, start : start + SPLIT])
    return out


def _collect(x: Tensor, scheme: Scheme, room: Room) -> Tensor:
    """The values that the products on the first axis add up to, next to each other on what was the fourth."""
    if scheme.products == 1:
        return x[0]
    out = room(x, (*x.shape[1:4], scheme.outputs, *x.shape[4:]))
    for value, parts in enumerate(scheme.given):
        target = out[:, :, :, value]
        for number, (place, sign) in enumerate(parts[1:]):
            torch.add(target if number else x[parts[0][0]], x[place], alpha=sign, out=target)
    return out.flatten(2, 3)
