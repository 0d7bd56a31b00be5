"""What a clip of the procedural world shows, measured from its pixels alone, and whether it is what was asked for.

No learned judge: the ground is a vote of the border, the object is what differs from the ground, and centroid, area and
overlap with the four shapes say the rest. Lengths are pixels of a 64 px frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from videogen.data.world.render import coverage, ground, second_colour
from videogen.data.world.scene import BACKGROUNDS, COLOURS, DIRECTIONS, FRAME, SHAPES, SIZES, Scene
from videogen.evaluation.metrics import unit

ATTRIBUTES = ("found", "background", "pattern", "colour", "size", "motion", "shape")

MIN_AREA = 40.0  # px²; the smallest object (small, at the end of shrinking) has about 150
MAX_AREA = 0.7 * FRAME**2  # a frame that differs from its ground nearly everywhere holds no object
GROWTH = math.log(1.8) / 2  # half of the least growth of the world, in log radius over the clip
SPREAD = 10 / math.sqrt(12) / 2  # px, half of the least spread of a moving centre: 10 px at constant speed
MIN_OVERLAP = 0.5  # with the best shape; noise has 0.4 at most, blurred blobs 0.7
EXPLAINED = 0.5  # share of the centre's variance that a motion must explain


@dataclass(frozen=True)
class Measurement:
    """Attributes are None where the pixels fit no value. Without an object only ground and brightness are known."""

    found: bool  # an object in nine frames of ten, in one piece
    background: str
    pattern: str  # "plain" or "checkered"
    colour: str | None = None
    size: str | None = None
    motion: str | None = None
    shape: str | None = None
    overlap: float = 0.0  # mean overlap (intersection over union) with the best shape
    residual: float | None = None  # px, root mean square distance of the centre from its fitted path
    jump: float | None = None  # px/frame², largest change of velocity
    drift: float = (
        0.0  # change of brightness from the first to the last third, of ground or object; 1 is black to white
    )
    flicker: float | None = None  # standard deviation over time of the pixels that are ground in all frames
    seam: float = 1.0  # change between frames at the borders of the VAE's latent frames over the change elsewhere


def attributes(scene: Scene) -> dict[str, str]:
    """The attributes of a scene with one object, under the names of `Measurement`."""
    (thing,) = scene.objects
    return {
        "background": scene.background,
        "pattern": "checkered" if scene.checkered else "plain",
        "colour": thing.colour,
        "size": thing.size,
        "motion": thing.motion,
        "shape": thing.shape,
    }


def score_clip(frames: np.ndarray, wanted: Scene | Mapping[str, str]) -> dict[str, bool | float | None]:
    """Right or wrong per wanted attribute, `found`, and `all` of them; then the temporal figures of `Measurement`.

    frames  [F, H, W, 3], uint8 or float in [0, 1]
    wanted  a scene, or some of its attributes: what a short prompt leaves open is not scored
    """
    return score_measurement(measure(frames), wanted)


def score_measurement(seen: Measurement, wanted: Scene | Mapping[str, str]) -> dict[str, bool | float | None]:
    wanted = attributes(wanted) if isinstance(wanted, Scene) else wanted
    right: dict[str, bool | float | None] = {"found": seen.found}
    right |= {name: getattr(seen, name) == value for name, value in wanted.items()}
    right["all"] = all(right.values())
    return right | {name: getattr(seen, name) for name in ("residual", "jump", "drift", "flicker", "seam")}


def measure(frames: np.ndarray) -> Measurement:
    """Everything that the score needs to know about one clip [F, H, W, 3]."""
    pixels = unit(frames)
    num_frames, height, width, _ = pixels.shape
    scale = FRAME / min(height, width)

    background = _background(pixels)
    pattern = _pattern(pixels, background)
    base = ground(Scene(background, pattern == "checkered", ()), height, width)
    base = np.broadcast_to(base, (height, width, 3))
    colour = _colour(pixels, base)
    if colour is None:
        matte = np.zeros(pixels.shape[:3], np.float32)
    else:
        matte = _matte(pixels, base, np.array(COLOURS[colour], np.float32) / 255)
    empty = Measurement(
        False, background, pattern, drift=_drift(pixels, matte), flicker=_flicker(pixels, matte), seam=_seam(pixels)
    )
    area = matte.sum((1, 2)) * scale**2
    visible = (area > MIN_AREA) & (area < MAX_AREA)
    if visible.sum() < max(1, round(0.9 * num_frames)):
        return empty

    t = np.linspace(0, 1, num_frames)[visible]
    matte, area = matte[visible], area[visible]
    total = matte.sum((1, 2))
    x = (matte.sum(1) * (np.arange(width) + 0.5)).sum(1) / total
    y = (matte.sum(2) * (np.arange(height) + 0.5)).sum(1) / total
    radius = np.sqrt(area / math.pi)
    shape, overlap = _shape(matte, x, y)
    if overlap < MIN_OVERLAP:
        return replace(empty, overlap=overlap)
    motion, residual = _motion(t, x * scale, y * scale, radius)
    middle = math.exp(float(np.log(radius).mean()))
    path = np.stack([x, y], 1) * scale
    return replace(
        empty,
        found=True,
        colour=colour,
        size=min(SIZES, key=lambda name: abs(math.log(middle / SIZES[name]))),
        motion=motion,
        shape=shape,
        overlap=overlap,
        residual=residual,
        jump=float(np.linalg.norm(np.diff(path, 2, axis=0), axis=1).max()) if len(path) > 2 else 0.0,
    )


def _background(pixels: np.ndarray) -> str:
    """The ground whose two colours are nearest to most pixels of the border, 2 px wide, in all frames."""
    names = list(BACKGROUNDS)
    first = np.array([BACKGROUNDS[name] for name in names], np.float32) / 255
    palette = np.concatenate([first, np.stack([second_colour(colour) for colour in first])])
    edge = np.ones(pixels.shape[1:3], bool)
    edge[2:-2, 2:-2] = False
    votes = _nearest(pixels[:, edge], palette) % len(names)
    return names[int(np.bincount(votes.ravel(), minlength=len(names)).argmax())]


def _pattern(pixels: np.ndarray, background: str) -> str:
    """Is the difference between the odd and the even cells at least half of what a checkered ground has?"""
    plain = ground(Scene(background, False, ()), *pixels.shape[1:3])
    squares = ground(Scene(background, True, ()), *pixels.shape[1:3])
    odd = squares[..., 0] != plain[0]
    step = second_colour(plain) - plain
    # The object would disturb the means: only pixels on the line between the two colours count.
    from_first = pixels - plain
    height = from_first @ step / (step @ step)
    beside = from_first - np.clip(height, 0, 1)[..., None] * step
    is_ground = _dot(beside, beside) < 0.15**2
    if not (is_ground & odd).any() or not (is_ground & ~odd).any():
        return "plain"
    return "checkered" if height[is_ground & odd].mean() - height[is_ground & ~odd].mean() > 0.5 else "plain"


def _colour(pixels: np.ndarray, base: np.ndarray) -> str | None:
    """The colour of most pixels that are nearer to an object colour than to their ground; None without such pixels."""
    names = list(COLOURS)
    palette = np.array([COLOURS[name] for name in names], np.float32) / 255
    nearest = _nearest(pixels, palette)
    from_colour, from_ground = pixels - palette[nearest], pixels - base
    is_object = _dot(from_colour, from_colour) < _dot(from_ground, from_ground)
    if not is_object.any():
        return None
    return names[int(np.bincount(nearest[is_object]).argmax())]


def _matte(pixels: np.ndarray, base: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Share of the object in every pixel [F, H, W]: where the pixel lies between its ground and the colour.

    The middle half of that way is stretched to 0..1: noise on the ground adds no area, and a blurred straight edge
    keeps its place.
    """
    way = colour - base
    share = _dot(pixels - base, way) / _dot(way, way)
    return np.clip((share - 0.25) / 0.5, 0, 1)


def _shape(matte: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[str, float]:
    """The shape of the same area and centre that overlaps the matte best, and by how much (mean over frames)."""
    _, height, width = matte.shape
    dx = np.abs(np.arange(width) + 0.5 - x[:, None]).astype(np.float32)[:, None, :]
    dy = np.abs(np.arange(height) + 0.5 - y[:, None]).astype(np.float32)[:, :, None]
    radius = np.sqrt(matte.sum((1, 2)) / math.pi)[:, None, None]
    overlaps = {}
    for shape in SHAPES:
        template = coverage(shape, dx, dy, radius)
        overlaps[shape] = (np.minimum(matte, template).sum((1, 2)) / np.maximum(matte, template).sum((1, 2))).mean()
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best, float(overlaps[best])


def _motion(t: np.ndarray, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> tuple[str | None, float]:
    """The motion that explains most of the path, and the path's residual (px). None for a path that none explains.

    The path is a complex function of time; line and circle have the same number of unknowns, so the fits compare.
    """
    path = x + 1j * y
    spread = float(path.std())
    fits = {"line": _fit(path, t), "orbit": min((_fit(path, np.exp(s * 2j * np.pi * t)) for s in (1, -1)), key=_rms)}
    growth = float(np.polyfit(t, np.log(radius), 1)[0]) if len(t) > 1 else 0.0
    if abs(growth) > GROWTH:
        moves = spread > 2 * SPREAD  # growing objects stay where they are
        return None if moves else "grow" if growth > 0 else "shrink", spread
    if spread < SPREAD:
        return "still", spread
    kind = min(fits, key=lambda name: _rms(fits[name]))
    residual = _rms(fits[kind])
    if residual**2 > (1 - EXPLAINED) * spread**2:
        return None, residual
    if kind == "orbit":
        return "orbit", residual
    step = np.polyfit(t, path, 1)[0]
    return max(DIRECTIONS, key=lambda name: DIRECTIONS[name] @ np.array([step.real, step.imag])), residual


def _fit(path: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Residual of the least-squares fit `path = a + b basis` over complex numbers."""
    design = np.stack([np.ones_like(basis), basis], 1).astype(complex)
    return path - design @ np.linalg.lstsq(design, path, rcond=None)[0]


def _rms(residual: np.ndarray) -> float:
    return float(np.sqrt((np.abs(residual) ** 2).mean()))


def _drift(pixels: np.ndarray, matte: np.ndarray) -> float:
    third = max(1, len(pixels) // 3)
    brightness = pixels @ np.full(3, 1 / 3, np.float32)
    changes = []
    for region in (matte < 0.01, matte > 0.99):
        count = region.sum((1, 2))
        mean = (brightness * region).sum((1, 2)) / np.maximum(count, 1)
        if count.min() > 0:
            changes.append(abs(float(mean[-third:].mean() - mean[:third].mean())))
    return max(changes, default=1.0)


def _flicker(pixels: np.ndarray, matte: np.ndarray) -> float | None:
    always_ground = (matte < 0.01).all(0)
    return float(pixels[:, always_ground].std(0).mean()) if always_ground.any() else None


def _seam(pixels: np.ndarray, period: int = 4) -> float:
    """A causal VAE decodes frame 0 alone, then frames in fours: the steps 4k to 4k + 1 cross its latent frames."""
    change = np.abs(np.diff(pixels, axis=0)).mean((1, 2, 3))
    crosses = np.arange(len(change)) % period == 0
    if crosses.all():
        return 1.0
    least = 1 / 255  # so that a still clip has ratio 1
    return float((change[crosses].mean() + least) / (change[~crosses].mean() + least))


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Scalar product of colours (several times faster than a sum over so short an axis)."""
    return np.einsum("...c,...c->...", a, b)


def _nearest(colours: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Index of the nearest palette colour: [..., 3], [p, 3] -> [...]. |a - b|² without |a|², which does not matter."""
    return ((palette**2).sum(-1) - 2 * colours @ palette.T).argmin(-1)
