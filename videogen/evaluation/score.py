"""What a clip of the procedural world shows, measured from its pixels alone, and whether it is what was asked for.

No learned judge: the ground is a vote of the border, an object is what differs from the ground in one colour, and
centroid, area and overlap with the four shapes say the rest. Lengths are pixels of a 64 px frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from videogen.data.world.render import PAPER, SEPIA, coverage, ground, waves
from videogen.data.world.scene import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    FRAME,
    SHAPES,
    SIZES,
    Scene,
    second_colour,
)
from videogen.evaluation.metrics import unit

OBJECT = ("colour", "size", "motion", "shape")  # said of each object
ATTRIBUTES = ("found", "background", "pattern", *OBJECT, "camera", "style")
FIGURES = ("residual", "velocity", "jump", "drift", "flicker", "seam")

MIN_AREA = 40.0  # px²; the smallest object (small, at the end of shrinking) has about 150
MAX_AREA = 0.7 * FRAME**2  # a frame that differs from its ground nearly everywhere holds no object
GROWTH = math.log(1.8) / 2  # half of the least growth of the world, in log radius over the clip
SPREAD = 10 / math.sqrt(12) / 2  # px, half of the least spread of a moving centre: 10 px at constant speed
MIN_OVERLAP = 0.5  # with the best shape; noise has 0.4 at most, blurred blobs 0.7
EXPLAINED = 0.5  # share of the centre's variance that a motion must explain
OFF = 0.12  # distance of colours beyond which a pixel is not of a tone, or not of a mixture
# What a camera may have done: px of a pan, factor of a zoom, in steps. Less than half of the world's least is static.
PANS = [(name, float(px)) for name in ("pans left", "pans right") for px in range(6, 37, 2)]
ZOOMS = [(name, factor) for name in ("zooms in", "zooms out") for factor in (1.25, 1.4, 1.55, 1.7, 1.85, 2.0, 2.2)]
CAMERA_MOVES = [("static", 0.0), *PANS, *ZOOMS]


@dataclass(frozen=True)
class Seen:
    """One object of a clip. Attributes are None where the pixels fit no value."""

    colour: str
    size: str
    motion: str | None
    shape: str
    overlap: float  # mean overlap (intersection over union) with the best shape
    residual: float  # px, root mean square distance of the centre from its fitted path
    velocity: float  # px/frame, root mean square error of its steps against those of the fitted path
    jump: float  # px/frame², largest change of velocity


@dataclass(frozen=True)
class Measurement:
    """A whole clip. `things` are as many objects as were looked for, or those of them that were found."""

    background: str
    pattern: str  # "plain" or "checkered"
    camera: str  # from the motion of a checkered ground; "static" on a plain one
    style: str
    things: tuple[Seen, ...] = ()
    drift: float = 0.0  # change of brightness from the first to the last third, of ground or object; 1: black to white
    flicker: float | None = None  # standard deviation over time of the pixels that are ground in all frames
    seam: float = 1.0  # change between frames at the borders of the VAE's latent frames over the change elsewhere

    @property
    def found(self) -> bool:
        """An object in nine frames of ten, in one piece."""
        return bool(self.things)


def attributes(scene: Scene) -> dict[str, str | tuple[str, ...]]:
    """The attributes of a scene that can be seen, by name; those of two objects as tuples.

    A style takes the colours that everything else is told by: it is scored alone. The camera needs a checkered ground.
    """
    if scene.style != "none":
        return {"style": scene.style}
    seen: dict[str, str | tuple[str, ...]] = {
        "background": scene.background,
        "pattern": "checkered" if scene.checkered else "plain",
    }
    if scene.checkered:
        seen["camera"] = scene.camera
    for name in OBJECT:
        values = tuple(getattr(thing, name) for thing in scene.objects)
        seen[name] = values[0] if len(values) == 1 else values
    return seen


Wanted = Scene | Mapping[str, str | tuple[str, ...]]
Score = dict[str, bool | list[bool] | float | None]


def score_clip(frames: np.ndarray, wanted: Wanted) -> Score:
    """Right or wrong per wanted attribute, `found`, and `all` of them; then the temporal figures of `Measurement`.

    frames  [F, H, W, 3], uint8 or float in [0, 1]
    wanted  a scene, or some of its attributes: what a short prompt leaves open is not scored. With two objects, the
            answers about objects are lists of two, in the order of the prompt
    """
    return score_measurement(measure(frames, count(wanted)), wanted)


def count(wanted: Wanted) -> int:
    """How many objects to look for."""
    if isinstance(wanted, Scene):
        return len(wanted.objects)
    return max((len(v) for v in wanted.values() if isinstance(v, tuple)), default=1)


def score_measurement(seen: Measurement, wanted: Wanted) -> Score:
    """See `score_clip`. Objects are paired with those of the prompt in the way that gets most right."""
    objects = count(wanted)
    wanted = attributes(wanted) if isinstance(wanted, Scene) else wanted
    asked = {name: value if isinstance(value, tuple) else (value,) for name, value in wanted.items() if name in OBJECT}

    def answers(things: tuple[Seen | None, ...]) -> dict[str, list[bool]]:
        told = {name: [getattr(o, name, None) == v for o, v in zip(things, asked[name], strict=True)] for name in asked}
        return {"found": [o is not None for o in things]} | told

    things = [*seen.things, *[None] * objects][:objects]
    best = max((answers(order) for order in permutations(things)), key=lambda told: sum(map(sum, told.values())))
    right: Score = {}
    if asked or "style" not in wanted:
        right["found"] = best["found"] if objects > 1 else best["found"][0]
    for name, value in wanted.items():
        if name in asked:
            right[name] = best[name] if objects > 1 else best[name][0]
        else:
            right[name] = getattr(seen, name) == value
    right["all"] = all(bool(np.all(value)) for value in right.values())
    worst = {n: max((getattr(o, n) for o in seen.things), default=None) for n in ("residual", "velocity", "jump")}
    return right | worst | {"drift": seen.drift, "flicker": seen.flicker, "seam": seen.seam}


def measure(frames: np.ndarray, objects: int = 1) -> Measurement:
    """Everything that the score needs to know about a clip [F, H, W, 3], in which `objects` objects are looked for."""
    pixels = unit(frames)
    num_frames, height, width, _ = pixels.shape
    background = _background(pixels)
    pattern, camera, travel = _pattern(pixels, background)
    t = None if camera == "static" else np.linspace(0, 1, num_frames)
    base = ground(Scene(background, pattern == "checkered", (), camera, travel), height, width, t)
    base = np.broadcast_to(base, pixels.shape)

    mattes, colours = [], _colours(pixels, base, objects)
    if colours:
        mattes = _mattes(pixels, base, [np.array(COLOURS[name], np.float32) / 255 for name in colours])
    matte = np.sum(mattes, axis=0) if mattes else np.zeros(pixels.shape[:3], np.float32)
    things = [_thing(colour, matte) for colour, matte in zip(colours, mattes, strict=True)]
    return Measurement(
        background,
        pattern,
        camera,
        _style(pixels),
        tuple(o for o in things if o is not None),
        drift=_drift(pixels, matte),
        flicker=_flicker(pixels, matte) if camera == "static" else None,
        seam=_seam(pixels),
    )


def _thing(colour: str, matte: np.ndarray) -> Seen | None:
    """What a matte [F, H, W] shows; None without an object in nine frames of ten, in one piece."""
    num_frames, height, width = matte.shape
    scale = FRAME / min(height, width)
    area = matte.sum((1, 2)) * scale**2
    visible = (area > MIN_AREA) & (area < MAX_AREA)
    if visible.sum() < max(1, round(0.9 * num_frames)):
        return None
    t = np.linspace(0, 1, num_frames)[visible]
    matte, area = matte[visible], area[visible]
    total = matte.sum((1, 2))
    x = (matte.sum(1) * (np.arange(width) + 0.5)).sum(1) / total
    y = (matte.sum(2) * (np.arange(height) + 0.5)).sum(1) / total
    radius = np.sqrt(area / math.pi)
    shape, overlap = _shape(matte, x, y)
    if overlap < MIN_OVERLAP:
        return None
    motion, error = _motion(t, (x + 1j * y) * scale, radius)
    middle = math.exp(float(np.log(radius).mean()))
    steps = np.diff((x + 1j * y) * scale)
    return Seen(
        colour,
        size=min(SIZES, key=lambda name: abs(math.log(middle / SIZES[name]))),
        motion=motion,
        shape=shape,
        overlap=overlap,
        residual=_rms(error),
        velocity=_rms(np.diff(error)) if len(error) > 1 else 0.0,
        jump=float(np.abs(np.diff(steps)).max()) if len(steps) > 1 else 0.0,
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


def _pattern(pixels: np.ndarray, background: str) -> tuple[str, str, float]:
    """Pattern, camera and its travel: of all that a camera may have done, what makes the cells of the ground differ
    most. On a checkered ground, that is at least a third of the difference of its two colours: blur takes the rest."""
    plain = np.array(BACKGROUNDS[background], np.float32) / 255
    step = second_colour(plain) - plain
    # The object would disturb the means: only pixels on the line between the two colours count.
    from_first = pixels - plain
    height = from_first @ step / (step @ step)
    beside = from_first - np.clip(height, 0, 1)[..., None] * step
    is_ground = (_dot(beside, beside) < 0.15**2).astype(np.float32)
    on_ground = is_ground * height
    if is_ground.sum() < 1 or (is_ground * height**2).mean() - on_ground.mean() ** 2 < 0.01:
        return "plain", "static", 0.0

    def sums(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Of weights · (x + y - 2 x y) over a clip, for every camera: x [C, F, W], y [C, F, H] -> [C]."""
        along_x, along_y = weights.sum(1), weights.sum(2)
        both = np.einsum("cfh,fhc->c", y, weights @ x.transpose(1, 2, 0))
        return np.einsum("cfw,fw->c", x, along_x) + np.einsum("cfh,fh->c", y, along_y) - 2 * both

    t, (rows, columns) = np.linspace(0, 1, len(pixels)), pixels.shape[1:3]
    moves = CAMERA_MOVES if len(pixels) > 1 else CAMERA_MOVES[:1]
    x, y = (np.stack(v) for v in zip(*(waves(name, by, rows, columns, t) for name, by in moves), strict=True))
    odd, odd_height = sums(is_ground, x, y), sums(on_ground, x, y)
    even, even_height = is_ground.sum() - odd, on_ground.sum() - odd_height
    difference = odd_height / np.maximum(odd, 1) - even_height / np.maximum(even, 1)
    difference[(odd < 1) | (even < 1)] = 0
    best = int(difference.argmax())
    return ("checkered", *moves[best]) if difference[best] > 1 / 3 else ("plain", "static", 0.0)


def _style(pixels: np.ndarray) -> str:
    """Which tones are all that there is: those of gray, of sepia, or of paper? Means of four pixels tell, for noise."""
    height, width = (size // 2 * 2 for size in pixels.shape[1:3])
    even, odd = pixels[:, 0:height:2], pixels[:, 1:height:2]
    tones = (even[:, :, 0:width:2] + even[:, :, 1:width:2] + odd[:, :, 0:width:2] + odd[:, :, 1:width:2]) / 4
    black, white = np.zeros(3, np.float32), np.ones(3, np.float32)
    dark, light, paper = np.array((*SEPIA, PAPER), np.float32) / 255
    far = {"gray": _beside(tones, black, white)[1], "sepia": _beside(tones, dark, light)[1]}
    nearest = min(far, key=lambda name: far[name].mean())
    if (far[nearest] > OFF**2).mean() > 0.02:
        return "none"
    if nearest == "sepia":
        return "sepia"
    if (_dot(tones - paper, tones - paper) < OFF**2).mean() > 0.4:
        return "pencil sketch"
    # White things look the same in black and white: there, no style is taken to be meant.
    return "none" if (tones.min(-1) > 0.9).mean() > 0.01 else "black and white"


def _colours(pixels: np.ndarray, base: np.ndarray, objects: int) -> list[str]:
    """The colours of most pixels that are nearer to an object colour than to their ground. The edges of an object, that
    mix it with the ground, have no vote on the next one's."""
    names = list(COLOURS)
    palette = np.array([COLOURS[name] for name in names], np.float32) / 255
    nearest = _nearest(pixels, palette)
    from_colour, from_ground = pixels - palette[nearest], pixels - base
    is_object = _dot(from_colour, from_colour) < _dot(from_ground, from_ground)
    colours = []
    while len(colours) < objects and is_object.any():
        best = int(np.bincount(nearest[is_object]).argmax())
        colours.append(names[best])
        if len(colours) < objects:
            is_object &= (nearest != best) & (_beside(pixels, base, palette[best])[1] > OFF**2)
    return colours


def _beside(pixels: np.ndarray, base: np.ndarray, colour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel lies on the way from its ground (0) to a colour (1), and the square of its distance to it."""
    way, offset = colour - base, pixels - base
    share = _dot(offset, way) / _dot(way, way)
    rest = offset - np.clip(share, 0, 1)[..., None] * way
    return share, _dot(rest, rest)


def _mattes(pixels: np.ndarray, base: np.ndarray, colours: list[np.ndarray]) -> list[np.ndarray]:
    """Share of each object in every pixel [F, H, W]: where the pixel lies between its ground and the colour.

    The middle half of that way is stretched to 0..1: noise on the ground adds no area, and a blurred straight edge
    keeps its place. Of several objects, a pixel belongs to the one whose way it lies nearest to.
    """
    ways = [_beside(pixels, base, colour) for colour in colours]
    mattes = [np.clip((share - 0.25) / 0.5, 0, 1) for share, _ in ways]
    if len(ways) == 1:
        return mattes
    owner = np.argmin([distance for _, distance in ways], axis=0)
    return [matte * (owner == index) for index, matte in enumerate(mattes)]


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


def _motion(t: np.ndarray, path: np.ndarray, radius: np.ndarray) -> tuple[str | None, np.ndarray]:
    """The motion that explains most of the path (x + iy), and what it leaves unexplained. None if none explains it.

    The path is a complex function of time; line and circle have the same number of unknowns, so the fits compare.
    """
    spread, rest = float(path.std()), path - path.mean()
    fits = {"line": _fit(path, t), "orbit": min((_fit(path, np.exp(s * 2j * np.pi * t)) for s in (1, -1)), key=_rms)}
    growth = float(np.polyfit(t, np.log(radius), 1)[0]) if len(t) > 1 else 0.0
    if abs(growth) > GROWTH:
        moves = spread > 2 * SPREAD  # growing objects stay where they are
        return None if moves else "grow" if growth > 0 else "shrink", rest
    if spread < SPREAD:
        return "still", rest
    kind = min(fits, key=lambda name: _rms(fits[name]))
    rest = fits[kind]
    if _rms(rest) ** 2 > (1 - EXPLAINED) * spread**2:
        return None, rest
    if kind == "orbit":
        return "orbit", rest
    step = np.polyfit(t, path, 1)[0]
    return max(DIRECTIONS, key=lambda name: DIRECTIONS[name] @ np.array([step.real, step.imag])), rest


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
    return np.asarray(np.einsum("...c,...c->...", a, b))


def _nearest(colours: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Index of the nearest palette colour: [..., 3], [p, 3] -> [...]. |a - b|² without |a|², which does not matter."""
    return ((palette**2).sum(-1) - 2 * colours @ palette.T).argmin(-1)
