"""Defects of a clip, from its pixels alone: cuts between scenes, a picture that stands still, black or blurred frames.

No learned judge and no tuning to a data set: each is one number with a threshold that can be set. The thresholds were
measured on clips of the procedural world with planted defects (docs/data.md); on other footage, look at what is named
before it is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

SIDE = 64  # px of the short side that frames are compared at: noise and grain are averaged out
BLUR_SIDE = 512  # and that sharpness is judged at, at most
BLUR_EVERY = 4  # frames
CHANGED = 12 / 255  # of a colour: less than that between two frames is noise of a camera or a codec
DEFECTS = ("cuts", "static", "black", "blurry")
LUMA = np.array((0.299, 0.587, 0.114), np.float32)  # ITU-R BT.601


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """When a clip counts as defective; see `Measures` for what is compared."""

    cut: float | int = 2.0
    cut_floor: float | int = 0.015
    static: float | int = 0.01
    black: float | int = 0.1
    blurry: float | int = 0.57


LIMITS = Thresholds()


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What `measure` found.

    jumps   for each frame but the first, its mean absolute difference from the one before: 0 to 1
    motion  share of pixels that differ from the first frame, in the tenth of the frames that differs most
    black   share of frames in which nearly nothing (2 % of the pixels) is brighter than 7 %
    blur    of the sharpest fifth of the frames looked at; 0 is sharp, 1 flat
    """

    num_frames: int
    jumps: tuple[float, ...]
    motion: float | int
    black: float | int
    blur: float | int

    def cuts(self, limits: Thresholds = LIMITS) -> list[int]:
        """Frames that begin a new scene: a difference many times those around it, and not a small one.

        A pan or a fast object changes much in every frame, a cut in one alone. Fades and dissolves are not found.
        """
        found = []
        for at, jump in enumerate(self.jumps):
            around = [*self.jumps[max(0, at - 2) : at], *self.jumps[at + 1 : at + 3]]
            if jump >= limits.cut_floor and jump >= limits.cut * max(around, default=0.0):
                found.append(at + 1)
        return found

    def defects(self, limits: Thresholds = LIMITS) -> dict[str, str]:
        """Those of `DEFECTS` that the clip has, each with its figure in words. A single picture need not move."""
        found = {}
        if cuts := self.cuts(limits):
            found["cuts"] = f"at frame {', '.join(map(str, cuts[:20]))}"
        if self.black > limits.black:  # nothing can move or be sharp in what is black
            return found | {"black": f"{self.black:.0%} of the frames"}
        if self.num_frames > 1 and self.motion < limits.static:
            found["static"] = f"{self.motion:.2%} of the picture moves"
        if self.blur > limits.blurry:
            found["blurry"] = f"blur {self.blur:.2f}"
        return found


def measure(frames: Iterable[UInt8[np.ndarray, "_H _W 3"]]) -> Measures:
    """Figures of a clip, frame by frame as it is decoded. Raises ValueError if there is none."""
    jumps: list[float] = []
    changed: list[float] = []
    blurs: list[float] = []
    black = count = 0
    first = last = None
    for count, frame in enumerate(frames, start=1):
        small = reduced(frame, SIDE)
        black += float(np.percentile(small @ LUMA, 98)) < 0.07
        if first is None or last is None:
            first = small
        else:
            jumps.append(float(np.abs(small - last).mean()))
            changed.append(float((np.abs(small - first).max(-1) > CHANGED).mean()))
        last = small
        if (count - 1) % BLUR_EVERY == 0:
            blurs.append(blur(reduced(frame, BLUR_SIDE) @ LUMA))
    if not count:
        raise ValueError("a clip without frames")
    return Measures(
        num_frames=count,
        jumps=tuple(round(jump, 5) for jump in jumps),
        motion=round(float(np.percentile(changed, 90)) if changed else 0.0, 5),
        black=round(black / count, 4),
        blur=round(float(np.percentile(blurs, 20)), 4),
    )


def reduced(frame: UInt8[np.ndarray, "_H _W 3"], side: int) -> Float[np.ndarray, "_h _w 3"]:
    """The frame in [0, 1], its short side brought down to `side` by averaging; a smaller one as it is."""
    from PIL import Image

    height, width = frame.shape[:2]
    scale = side / min(height, width)
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        frame = np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize(size, Image.Resampling.BOX))
    return frame.astype(np.float32) / 255


def blur(luma: Float[np.ndarray, "H W"], width: int = 5) -> float:
    """How little a picture loses when it is blurred again, 0 (sharp) to 1 (Crete et al., "The blur effect", 2007).

    The variation between neighbours before and after a mean over `width` pixels, along each axis; the worse counts.
    Contrast cancels out, and so does how much of the picture is empty. A flat picture has none: 0.
    """
    worst = 0.0
    for axis in (0, 1):
        before = np.abs(np.diff(luma, axis=axis))
        after = np.abs(np.diff(_mean_along(luma, width, axis), axis=axis))
        total = float(before.sum())
        if total > 2e-4 * before.size:
            worst = max(worst, 1 - float(np.maximum(before - after, 0).sum()) / total)
    return worst


def _mean_along(x: np.ndarray, width: int, axis: int) -> np.ndarray:
    half = width // 2
    padded = np.pad(x, [(half, half) if a == axis else (0, 0) for a in range(2)], mode="edge").astype(np.float64)
    sums = np.cumsum(padded, axis=axis)
    sums = np.concatenate([np.zeros_like(sums.take([0], axis)), sums], axis)
    count = x.shape[axis]
    return (sums.take(range(width, width + count), axis) - sums.take(range(count), axis)) / width
