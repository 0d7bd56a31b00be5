"""A clip of any length, size and rate cut into windows that a model can be trained on. Imports no torch.

Time first: frames are taken at the wanted rate, the nearest in time to each (a slower clip keeps its own rate; none is
made up). Then length: as many windows of the longest length as there are frames for, then shorter ones. Then size: of
those allowed the nearest in shape.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from videogen.data.sources import Sample
from videogen.data.video import fit_image
from videogen.errors import FileError, InvalidRequest

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What windows are to be like.

    lengths  frames that a window may have, such as (49, 17, 1); 1 is for pictures only
    sizes    (height, width) that it may have
    rate     frames per second
    fit      how a frame gets its size: "crop", "pad" or "stretch" (`videogen.data.video.fit_image`)
    """

    lengths: tuple[int, ...]
    sizes: tuple[Size, ...]
    rate: float | int
    fit: str = "crop"

    def __post_init__(self) -> None:
        if (
            not self.lengths
            or not self.sizes
            or min(*self.lengths, *map(min, self.sizes)) < 1
            or not 0 < self.rate < math.inf
        ):
            raise InvalidRequest(
                f"windows of {self.lengths} frames and sizes {self.sizes} at {self.rate} per second.",
                why="each is at least 1.",
            )
        if self.fit not in ("crop", "pad", "stretch"):
            raise InvalidRequest(f"there is no fit {self.fit!r}.", why="it is crop, pad or stretch.", param="fit")
        object.__setattr__(self, "rate", float(self.rate))  # 8 and 8.0 make the same entries of a cache


@dataclass(frozen=True)
class Window:
    """Frames in [-1, 1] from frame `start` of the clip on, counted at the rate `fps`."""

    start: int
    fps: float | int
    pixels: Float[np.ndarray, "F 3 H W"]


def windows(sample: Sample, cut: Cut, *, cuts: Collection[int] = ()) -> Iterator[Window]:
    """The windows of a clip, decoded once, one of them in memory at a time.

    cuts  frames of the file that begin a new scene: no window reaches over one
    Raises FileError if the clip is damaged, and InvalidRequest if it is too short for any window.
    """
    count = made = 0
    with sample.stream() as (fps, promised, pictures):
        rate, step = kept_rate(fps, cut.rate)
        longer = sorted((n for n in cut.lengths if n > 1), reverse=True)
        lengths = [1] if promised == 1 and 1 in cut.lengths else longer or [1]
        size: Size | None = None
        frames: list[np.ndarray] = []
        start = taken = 0
        for index, picture in enumerate(pictures):
            count += 1
            if index in cuts:
                for window in _cut_up(frames, start, rate, lengths):
                    made += 1
                    yield window
                frames, start = [], taken
            if index != round(taken * step) or (lengths == [1] and made):  # of a clip, one frame where all is pictures
                continue
            size = size or nearest_size(picture.shape[0], picture.shape[1], cut.sizes)
            frames.append(fit_image(picture, *size, cut.fit))
            taken += 1
            if len(frames) == lengths[0]:
                made += 1
                yield Window(start, rate, np.stack(frames))
                frames, start = [], taken
        if promised and count != promised:
            raise FileError(f"{sample.name} is damaged.", why=f"{count} of {promised} frames are there.")
        for window in _cut_up(frames, start, rate, [1] if count == 1 and 1 in cut.lengths else lengths):
            made += 1
            yield window
    if not made:
        raise InvalidRequest(
            f"{sample.name} is too short.", why=f"{taken} frames at {rate:g} per second, and {lengths[-1]} needed."
        )


def planned(count: int, fps: float | int | None, cut: Cut, cuts: Collection[int] = ()) -> tuple[list[int], int]:
    """The lengths of the windows that `windows` will make of a clip of `count` frames, and how many frames at their
    rate are left over.

    >>> planned(100, 8.0, Cut(lengths=(49, 17, 9, 1), sizes=((480, 720),), rate=8))
    ([49, 49], 2)
    """
    _, step = kept_rate(fps, cut.rate)
    longer = sorted((n for n in cut.lengths if n > 1), reverse=True)
    lengths = [1] if count == 1 and 1 in cut.lengths else longer or [1]
    ends = [0, *sorted(at for at in cuts if 0 < at < count), count]
    found, left = [], 0
    for start, end in pairwise(ends):
        taken = sum(1 for k in range(round(start / step), round(end / step) + 2) if start <= round(k * step) < end)
        while length := next((n for n in lengths if n <= taken), 0):
            found.append(length)
            taken -= length
            if lengths == [1]:
                return [1], count - 1
        left += taken
    return found, left


def _cut_up(frames: list[np.ndarray], start: int, rate: float, lengths: Sequence[int]) -> Iterator[Window]:
    """What is left at the end of a scene: the longest length that there are frames for, again and again."""
    at = 0
    while length := next((n for n in lengths if n <= len(frames) - at), 0):
        yield Window(start + at, rate, np.stack(frames[at : at + length]))
        at += length


def kept_rate(fps: float | int | None, rate: float | int) -> tuple[float, float]:
    """The rate of the windows of a clip of rate `fps`, and every how many of its frames one is taken.

    >>> kept_rate(30.0, 8.0), kept_rate(6.0, 8.0), kept_rate(None, 8.0)
    ((8.0, 3.75), (6.0, 1.0), (8.0, 1.0))
    """
    if not fps or not math.isfinite(fps):
        return float(rate), 1.0
    return float(min(fps, rate)), max(fps / rate, 1.0)


def nearest_size(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The one of the nearest shape; of several the largest that enlarges nothing, or the smallest.

    >>> nearest_size(720, 1280, [(480, 720), (480, 832), (720, 480), (240, 416)])
    (480, 832)
    """

    def badness(size: Size) -> tuple[float, bool, int]:
        shape = abs(math.log(size[0] * width / (size[1] * height)))
        enlarges = size[0] > height or size[1] > width
        area = size[0] * size[1]
        return round(shape, 2), enlarges, area if enlarges else -area

    return min(sizes, key=badness)
