"""Which sizes and lengths a model was trained for, and which of them is nearest to another."""

from __future__ import annotations

import math
from dataclasses import dataclass

from videogen.errors import InvalidRequest

Range = tuple[int, int]  # least and most, both allowed
CHUNK = 8  # frames per chunk of the VAE: a clip is 1 or 8k + 1 frames
MOST_PIXELS = 8192  # of a side, and
MOST_FRAMES = 16385  # of a clip: beyond what any model or machine holds, so that no number is absurd


@dataclass(frozen=True)
class Sizes:
    """Limits in pixels on the shorter side, the longer side, and the side of a square of the same area.

    `portrait`: the longer side may be the height. Without arguments every size is allowed.

    >>> only = Sizes(short=(480, 480), long=(720, 720), portrait=False)
    >>> only.allow(720, 480), only.allow(480, 720), str(only)
    (True, False, '720x480')
    >>> Sizes(short=(768, 768), long=(768, 1360)).nearest(1080, 1920, 16)
    (768, 1360)
    """

    short: Range = (1, MOST_PIXELS)
    long: Range = (1, MOST_PIXELS)
    side: Range = (1, MOST_PIXELS)
    portrait: bool = True

    def __post_init__(self) -> None:
        for limits in (self.short, self.long, self.side):
            if len(limits) != 2 or not 1 <= limits[0] <= limits[1] <= MOST_PIXELS:
                raise _no_limits("sizes", limits, f"[least, most] pixels, from 1 to {MOST_PIXELS}")

    def allow(self, width: int, height: int) -> bool:
        short, long = sorted((width, height))
        inside = _within(short, self.short) and _within(long, self.long)
        area = self.side[0] ** 2 <= width * height <= self.side[1] ** 2
        return inside and area and (self.portrait or width >= height)

    def nearest(self, width: int, height: int, multiple: int) -> tuple[int, int]:
        """The allowed (width, height) in multiples that is nearest in shape and area; upright stays so where it may."""
        long, short = sorted((min(max(n, 1), MOST_PIXELS) for n in (width, height)), reverse=True)
        scale = 1.0
        for value, (least, most) in ((math.sqrt(long * short), self.side), (short, self.short), (long, self.long)):
            scale = min(max(scale, least / value), most / value)
        longs, shorts = (
            {_multiple(value * scale, limits, multiple, step) for step in range(-2, 3)}
            for value, limits in ((long, self.long), (short, self.short))
        )
        pairs = [(a, b) for a in longs for b in shorts if a >= b and self.allow(a, b)]
        if not pairs:  # no multiple is within the limits: the nearest to them
            pairs = [(max(*longs, *shorts, multiple), max(min(shorts), multiple))]

        def change(pair: tuple[int, int]) -> float:
            a, b = math.log(pair[0] / long), math.log(pair[1] / short)
            return abs(a - b) + abs(a + b) / 2

        found = min(pairs, key=lambda pair: (change(pair), pair))
        return (found[1], found[0]) if height > width and self.portrait else found

    def __str__(self) -> str:
        if self == ANY_SIZE:
            return "any"
        if self.short[0] == self.short[1] and self.long[0] == self.long[1]:
            return f"{self.long[0]}x{self.short[0]}" + (", or upright" if self.portrait else "")
        parts = [
            f"{name} {_span(limits)}"
            for name, limits in (
                ("short side", self.short),
                ("long side", self.long),
                ("area of a square of", self.side),
            )
            if limits != (1, MOST_PIXELS)
        ]
        return ", ".join(parts) + ("" if self.portrait else ", landscape")


@dataclass(frozen=True)
class Frames:
    """How many frames a clip may have: 1, or k · step + first; up to `most` in one pass, more in several windows.

    >>> Frames(8, 49).allow(41), Frames(16, 161).allow(41), Frames(8, 49).around(20), str(Frames(16, 161))
    (True, False, (17, 25), '16k + 1, to 161')
    """

    step: int = CHUNK
    most: int = MOST_FRAMES
    first: int = 1

    def __post_init__(self) -> None:
        if self.step < CHUNK or self.step % CHUNK or not 1 <= self.most <= MOST_FRAMES:
            raise _no_limits("frames", (self.step, self.most), f"a multiple of {CHUNK}, and at most {MOST_FRAMES}")
        if self.first < 1 or (self.first - 1) % (CHUNK // 2):
            raise _no_limits("frames", self.first, "beginning at 1, 5, 9, …: after the first, 4 are a latent frame")

    def allow(self, count: int) -> bool:
        in_step = count >= self.first and (count - self.first) % self.step == 0
        return 1 <= count <= MOST_FRAMES and (count == 1 or in_step)

    def around(self, count: int) -> tuple[int, int]:
        """The allowed lengths below and above."""
        if count < self.first:
            return 1, self.first
        below = (min(count, MOST_FRAMES - self.step) - self.first) // self.step * self.step + self.first
        return below, below + self.step

    def nearest(self, count: int) -> int:
        """The allowed length nearest to this one, the shorter of two."""
        return min(self.around(count), key=lambda n: (abs(n - count), n))

    def __str__(self) -> str:
        return f"{self.step}k + {self.first}" + ("" if self.most >= MOST_FRAMES else f", to {self.most}")


ANY_SIZE, ANY_LENGTH = Sizes(), Frames()
EVEN_LENGTH = Frames(first=5)  # an even number of latent frames, for patches of two where nothing is padded


def _no_limits(what: str, found: object, expected: str) -> InvalidRequest:
    return InvalidRequest(
        f"a model's {what} are {found}.", why=f"they are {expected}.", hint="correct its videogen.json.", param=what
    )


def _within(value: int, limits: Range) -> bool:
    return limits[0] <= value <= limits[1]


def _span(limits: Range) -> str:
    return str(limits[0]) if limits[0] == limits[1] else f"{limits[0]} to {limits[1]}"


def _multiple(value: float, limits: Range, multiple: int, step: int) -> int:
    """A multiple within the limits, `step` multiples away from the one nearest to `value`."""
    least, most = -(-limits[0] // multiple) * multiple, limits[1] // multiple * multiple
    return min(max((round(value / multiple) + step) * multiple, least), most)
