"""A scene as pixels: every pixel holds the share of its area that an object covers, computed, not sampled."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from videogen.data.world.scene import BACKGROUNDS, COLOURS, FRAME, SHAPES, Scene

CHECKER = 0.35 * 0.45  # how far the second colour of a checkered ground is from the first, towards white or black
PERIOD = 16.0  # px, of the checkered pattern


def render(scene: Scene, num_frames: int = 17, height: int = 64, width: int = 64) -> Float[np.ndarray, "F H W 3"]:
    """RGB in [0, 1]. Positions stretch with the frame, shapes keep their proportions (scaled by the shorter side)."""
    scale_x, scale_y, scale = width / FRAME, height / FRAME, min(height, width) / FRAME
    t = np.linspace(0, 1, num_frames)
    # +0.5: pixel i covers [i, i + 1]
    px, py = np.arange(width) + 0.5, np.arange(height) + 0.5

    frames = np.empty((num_frames, height, width, 3), np.float32)
    frames[:] = ground(scene, height, width)
    for thing in scene.objects:
        x, y, radius = (v[:, None] for v in thing.at(t))
        dx = np.abs(px - x * scale_x).astype(np.float32)[:, None, :]
        dy = np.abs(py - y * scale_y).astype(np.float32)[:, :, None]
        cover = coverage(thing.shape, dx, dy, (radius * scale).astype(np.float32)[:, :, None])
        for c, value in enumerate(COLOURS[thing.colour]):
            channel = frames[..., c]
            channel += cover * (np.float32(value / 255) - channel)
    return frames


def ground(scene: Scene, height: int, width: int) -> np.ndarray:
    """The ground: [3] when plain, [H, W, 3] when checkered."""
    first = np.array(BACKGROUNDS[scene.background], np.float32) / 255
    if not scene.checkered:
        return first
    cell_x = np.floor((np.arange(width) + 0.5) * FRAME / width / (PERIOD / 2))
    cell_y = np.floor((np.arange(height) + 0.5) * FRAME / height / (PERIOD / 2))
    odd = (cell_x[None, :] + cell_y[:, None]) % 2 == 1
    return np.where(odd[..., None], second_colour(first), first)


def second_colour(first: np.ndarray) -> np.ndarray:
    """The other colour of a checkered ground: lighter than a dark one, darker than a light one."""
    target = 1.0 if first.mean() < 0.45 else 0.0
    return first + np.float32(CHECKER) * (np.float32(target) - first)


def coverage(shape: str, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Share of each pixel inside the shape, from the distances |x - centre|, |y - centre| and the radius (all in px).

    Boxes are products of one-dimensional overlaps (exact); circles use the signed distance at the pixel's centre.
    """

    def box(half_x: float, half_y: float) -> np.ndarray:
        return np.clip(half_x * radius - dx + 0.5, 0, 1) * np.clip(half_y * radius - dy + 0.5, 0, 1)

    def disc(outer: float) -> np.ndarray:
        return np.clip(outer * radius - distance + 0.5, 0, 1)

    half_x, half_y = SHAPES[shape]
    if shape == "bar":
        return box(half_x, half_y)
    if shape == "cross":
        return box(half_x, 0.40) + box(0.40, half_y) - box(0.40, 0.40)
    distance = np.sqrt(dx * dx + dy * dy)
    return disc(half_x) - disc(0.57) if shape == "ring" else disc(half_x)
