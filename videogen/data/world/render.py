"""A scene as pixels: every pixel holds the share of its area that an object covers, computed, not sampled."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from videogen.data.world.scene import BACKGROUNDS, COLOURS, FRAME, LUMA, SHAPES, Scene, second_colour

PERIOD = 16.0  # px, of the checkered pattern
SEPIA = ((40, 25, 10), (255, 240, 200))  # what black and white become
PAPER, PENCIL = (246, 243, 236), (52, 54, 62)


def render(scene: Scene, num_frames: int = 17, height: int = 64, width: int = 64) -> Float[np.ndarray, "F H W 3"]:
    """RGB in [0, 1]. Positions stretch with the frame, shapes keep their proportions (scaled by the shorter side)."""
    scale_x, scale_y, scale = width / FRAME, height / FRAME, min(height, width) / FRAME
    t = np.linspace(0, 1, num_frames)
    # +0.5: pixel i covers [i, i + 1]
    px, py = np.arange(width) + 0.5, np.arange(height) + 0.5

    frames = np.empty((num_frames, height, width, 3), np.float32)
    frames[:] = ground(scene, height, width, t)
    for thing in scene.objects:
        x, y, radius = thing.at(t)
        half_x, half_y = SHAPES[thing.shape]
        columns = _reached(x * scale_x, half_x * radius * scale, width)
        rows = _reached(y * scale_y, half_y * radius * scale, height)
        dx = np.abs(px[columns] - x[:, None] * scale_x).astype(np.float32)[:, None, :]
        dy = np.abs(py[rows] - y[:, None] * scale_y).astype(np.float32)[:, :, None]
        cover = coverage(thing.shape, dx, dy, (radius * scale).astype(np.float32)[:, None, None])
        for c, value in enumerate(COLOURS[thing.colour]):
            channel = frames[:, rows, columns, c]
            channel += cover * (np.float32(value / 255) - channel)
    return stylize(frames, scene.style)


def _reached(centre: np.ndarray, half: np.ndarray, size: int) -> slice:
    """The pixels along one axis that an object covers at some time."""
    return slice(max(0, int((centre - half).min()) - 1), min(size, int((centre + half).max()) + 2))


def ground(scene: Scene, height: int, width: int, t: np.ndarray | None = None) -> np.ndarray:
    """The ground at the times t: [3] when plain, [H, W, 3] when checkered and seen by a static camera, else
    [F, H, W, 3]."""
    first = np.array(BACKGROUNDS[scene.background], np.float32) / 255
    if not scene.checkered:
        return first
    odd = checkers(scene.camera, scene.travel, height, width, t if scene.camera != "static" else None)
    return first + odd[..., None] * (second_colour(first) - first)


def checkers(camera: str, travel: float, height: int, width: int, t: np.ndarray | None = None) -> np.ndarray:
    """Share of the second colour in each pixel: [H, W], or at the times t [F, H, W]."""
    x, y = waves(camera, travel, height, width, np.zeros(1) if t is None else t)
    x, y = x[:, None, :], y[:, :, None]
    odd = x + y - 2 * x * y  # where one wave is up and the other down
    return odd[0] if t is None else odd


def waves(camera: str, travel: float, height: int, width: int, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The square waves behind a checkered ground at the times t, along x [F, W] and along y [F, H]: exact means over
    the pixels."""
    x, y = np.arange(width + 1) * (FRAME / width), np.arange(height + 1) * (FRAME / height)
    x, y = (_seen(camera, travel, edges, axis, t[:, None]) for axis, edges in enumerate((x, y)))
    return _square_wave(x), _square_wave(y)


def _seen(camera: str, travel: float, edges: np.ndarray, axis: int, t: np.ndarray) -> np.ndarray:
    """Where on the ground the pixel edges of axis 0 (x) or 1 (y) are at the times t."""
    if camera.startswith("zooms"):
        zoom = travel ** ((t - 0.5) * (1 if camera == "zooms in" else -1))
        return FRAME / 2 + (edges - FRAME / 2) / zoom
    direction = {"pans right": 1, "pans left": -1}.get(camera, 0)
    return edges + t * travel * direction * (axis == 0)


def _square_wave(edges: np.ndarray) -> np.ndarray:
    """Mean between neighbouring edges of the wave that is 0 for half a period, then 1."""
    whole, part = np.divmod(edges, PERIOD)
    integral = whole * (PERIOD / 2) + np.maximum(part - PERIOD / 2, 0)
    return (np.diff(integral) / np.diff(edges)).astype(np.float32)


def stylize(frames: Float[np.ndarray, "F H W 3"], style: str) -> Float[np.ndarray, "F H W 3"]:
    """The picture as its luma, as luma between two browns, or as the edges of its luma drawn on paper."""
    if style == "none":
        return frames
    luma = frames @ np.array(LUMA, np.float32)
    if style == "black and white":
        return np.repeat(luma[..., None], 3, -1)
    if style == "sepia":
        dark, light = np.array(SEPIA, np.float32) / 255
        return dark + luma[..., None] * (light - dark)
    # Differences across two pixels of a 64 px frame, at any resolution: a line is as wide in every size.
    reach = max(1, round(min(frames.shape[1:3]) / FRAME))
    padded = np.pad(luma, ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    inside = slice(reach, -reach)
    along_x = padded[:, inside, 2 * reach :] - padded[:, inside, : -2 * reach]
    along_y = padded[:, 2 * reach :, inside] - padded[:, : -2 * reach, inside]
    ink = np.clip(6 * np.hypot(along_x, along_y), 0, 1)
    paper, pencil = np.array(PAPER, np.float32) / 255, np.array(PENCIL, np.float32) / 255
    return paper + ink[..., None] * (pencil - paper)


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
