"""What a clip shows, as plain data: the attributes that a caption can name, and the geometry that a seed fixes.

Lengths are pixels of a 64×64 frame, time runs from 0 (first frame) to 1 (last frame).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

FRAME = 64.0  # side of the frame that all lengths refer to
MARGIN = 1.0  # px between an object and the edge of the frame

# The order of colours, shapes and motions fixes the held-out split: append, never reorder.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 180, 50),
    "blue": (40, 70, 230),
    "yellow": (240, 220, 40),
    "purple": (150, 50, 200),
    "cyan": (40, 210, 220),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
}
# Half width and half height of each shape in radii. Areas are equal (3.13 to 3.20 r²): shape and size are independent.
SHAPES: dict[str, tuple[float, float]] = {
    "circle": (1.0, 1.0),
    "bar": (1.40, 0.56),
    "ring": (1.15, 1.15),
    "cross": (1.20, 1.20),
}
# How far a shape reaches from its centre, in radii.
REACH: dict[str, float] = {"circle": 1.0, "bar": math.hypot(1.40, 0.56), "ring": 1.15, "cross": math.hypot(1.20, 0.40)}
SIZES: dict[str, float] = {"small": 10.0, "large": 16.0}  # radius r
MOTIONS = ("right", "left", "up", "down", "still", "grow", "shrink", "orbit")
DIRECTIONS: dict[str, tuple[float, float]] = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
    "navy": (15, 20, 80),
    "brown": (95, 60, 30),
    "pink": (250, 180, 200),
    "teal": (10, 95, 95),
}
CAMERAS = ("static", "pans left", "pans right", "zooms in", "zooms out")
STYLES = ("none", "black and white", "sepia", "pencil sketch")
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: what the styles keep of a colour
CHECKER = 0.35 * 0.45  # how far the second colour of a checkered ground is from the first, towards white or black
APART = 2.0  # px, the least distance of two objects
HELD_OUT_PAIRS = frozenset({("red", "ring"), ("blue", "cross"), ("yellow", "bar"), ("white", "circle")})


@dataclass(frozen=True)
class Thing:
    """One object. Its centre is `start + t (end - start)`, plus a turn on a circle for orbits; its radius goes
    geometrically from `radius[0]` to `radius[1]`."""

    colour: str
    shape: str
    size: str
    motion: str
    radius: tuple[float, float]
    start: tuple[float, float]
    end: tuple[float, float]
    orbit: float = 0.0  # radius of the circle around `start`
    phase: float = 0.0  # radians, where on that circle the first frame is
    turns: float = 0.0  # full turns over the clip; positive is clockwise

    def at(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Centre x, centre y and radius at the times t."""
        angle = self.phase + 2 * math.pi * self.turns * t
        x = self.start[0] + t * (self.end[0] - self.start[0]) + self.orbit * np.cos(angle)
        y = self.start[1] + t * (self.end[1] - self.start[1]) + self.orbit * np.sin(angle)
        return x, y, self.radius[0] ** (1 - t) * self.radius[1] ** t


@dataclass(frozen=True)
class Scene:
    """Objects in drawing order on a ground, seen by a camera.

    Motions are those in the picture: the camera moves the ground behind the objects. `travel` is how far: pixels of a
    pan, factor of a zoom.
    """

    background: str
    checkered: bool
    objects: tuple[Thing, ...]
    camera: str = "static"
    travel: float = 0.0
    style: str = "none"


def second_colour(first: np.ndarray) -> np.ndarray:
    """The other colour of a checkered ground: lighter than a dark one, darker than a light one."""
    target = 1.0 if first.mean() < 0.45 else 0.0
    return first + np.float32(CHECKER) * (np.float32(target) - first)


def is_held_out_pair(scene: Scene) -> bool:
    """Does any object have a colour and shape that never occur together in training?"""
    return any((o.colour, o.shape) in HELD_OUT_PAIRS for o in scene.objects)


def is_held_out(scene: Scene) -> bool:
    """Is the scene kept from training? By the (colour, shape, motion) triple or the (colour, shape) pair of any object.

    The triples leave every colour, shape, motion and nearly every pair of them in training: what is tested is
    recombination, not new words.
    """
    return is_held_out_pair(scene) or any(_held_out_triple(o.colour, o.shape, o.motion) for o in scene.objects)


def draw_scene(
    rng: np.random.Generator,
    *,
    held_out: bool | None = False,
    checkered: float = 0.1,
    two: float = 0.0,
    camera: float = 0.0,
    style: float = 0.0,
) -> Scene:
    """A random scene: one object, a ground, a camera at rest and no style, unless a probability says otherwise.

    held_out   False: training split; True: held-out triples (without the held-out pairs); None: anything
    checkered  probability of a checkered ground
    two        probability of two objects, of different colours and never nearer than `APART`
    camera     probability that the camera moves, on a checkered ground (on a plain one nobody would see it)
    style      probability of a style; its ground is one on which the objects can be seen without colour
    """
    things = _draw_two(rng, held_out) if two and rng.random() < two else (_draw_one(rng, held_out),)
    scene = Scene(_choice(rng, BACKGROUNDS), bool(rng.random() < checkered), things)
    if camera and scene.checkered and rng.random() < camera:
        scene = _move_camera(rng, scene)
    return _draw_style(rng, scene) if style and rng.random() < style else scene


def _draw_names(rng: np.random.Generator, held_out: bool | None) -> tuple[str, str, str, str]:
    """Colour, shape, size and motion of an object."""
    while True:
        colour, shape, motion = (_choice(rng, names) for names in (COLOURS, SHAPES, MOTIONS))
        pair, triple = (colour, shape) in HELD_OUT_PAIRS, _held_out_triple(colour, shape, motion)
        if held_out is None or (triple and not pair if held_out else not (triple or pair)):
            return colour, shape, _choice(rng, SIZES), motion


def _draw_one(rng: np.random.Generator, held_out: bool | None) -> Thing:
    return _draw_thing(rng, *_draw_names(rng, held_out))


def _draw_two(rng: np.random.Generator, held_out: bool | None, tries: int = 10) -> tuple[Thing, Thing]:
    """Two objects that never meet: some geometries of each are tried with each other, then with the first one small,
    with both small, then other attributes. Two large rings do not fit beside each other: large is rarer here."""
    while True:
        first, second = _draw_names(rng, held_out), _draw_names(rng, held_out)
        if first[0] == second[0]:
            continue
        for sizes in dict.fromkeys([(first[2], second[2]), ("small", second[2]), ("small", "small")]):
            ones, others = (
                [_draw_thing(rng, colour, shape, size, motion) for _ in range(tries)]
                for (colour, shape, _, motion), size in zip((first, second), sizes, strict=True)
            )
            i, j = np.nonzero(clearance(ones, others) >= APART)
            if len(i):
                return ones[i[0]], others[j[0]]


def clearance(ones: list[Thing], others: list[Thing]) -> np.ndarray:
    """The least distance (px) over the clip between each of `ones` and each of `others`, never overstated at the times
    it looks at: two objects are at least as far apart as their bounding boxes, and as their bounding circles."""
    t = np.linspace(0, 1, 65)

    def extent(things: list[Thing]) -> tuple[np.ndarray, ...]:
        x, y, radius = (np.stack(v) for v in zip(*(thing.at(t) for thing in things), strict=True))
        half = np.array([SHAPES[thing.shape] for thing in things])
        reach = np.array([REACH[thing.shape] for thing in things])
        return x, y, half[:, :1] * radius, half[:, 1:] * radius, reach[:, None] * radius

    x, y, width, height, reach = (
        a[:, None] + sign * b for a, b, sign in zip(extent(ones), extent(others), (-1, -1, 1, 1, 1), strict=True)
    )
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x - width, y - height), np.hypot(x, y) - reach).min(-1)


def _move_camera(rng: np.random.Generator, scene: Scene) -> Scene:
    """A camera that moves. It never pans against an object that moves left or right, it goes along: so "left" and
    "right" of a caption with one object cannot be dealt out in two ways."""
    against = {"left": "pans right", "right": "pans left"}
    moves = [c for c in CAMERAS[1:] if c not in {against.get(o.motion) for o in scene.objects}]
    camera = _choice(rng, moves)
    travel = rng.uniform(12, 28) if camera.startswith("pans") else rng.uniform(1.5, 2.0)
    return replace(scene, camera=camera, travel=float(travel))


def _draw_style(rng: np.random.Generator, scene: Scene) -> Scene:
    """A style, and a ground from which all objects stand out in luma. White ones look the same in black and white."""
    styles = STYLES[2:] if any(o.colour == "white" for o in scene.objects) else STYLES[1:]
    scene = replace(scene, style=_choice(rng, styles))
    while not stands_out(scene):
        scene = replace(scene, background=_choice(rng, BACKGROUNDS))
    return scene


def stands_out(scene: Scene, least: float = 0.1) -> bool:
    """Can every object be told from the ground, when only luma is left? Blue on black can, the darkest pair here."""
    first = np.array(BACKGROUNDS[scene.background]) / 255
    grounds = [first, second_colour(first)] if scene.checkered else [first]
    objects = [np.array(COLOURS[o.colour]) / 255 for o in scene.objects]
    return all(abs((o - g) @ LUMA) >= least for o in objects for g in grounds)


def _draw_thing(rng: np.random.Generator, colour: str, shape: str, size: str, motion: str) -> Thing:
    """Geometry for the named attributes, such that the whole path lies inside the frame."""
    half = np.array(SHAPES[shape])
    room = FRAME / 2 - MARGIN
    radius = SIZES[size] * rng.uniform(0.93, 1.07)
    radii = (radius, radius)
    if motion in ("grow", "shrink"):
        # the smallest factor must fit: large bars start a little below their name
        radius = min(radius, room / half.max() / math.sqrt(1.8))
        factor = rng.uniform(1.8, min(2.2, (room / half.max() / radius) ** 2))
        small, large = radius / math.sqrt(factor), radius * math.sqrt(factor)
        radii = (small, large) if motion == "grow" else (large, small)

    low = MARGIN + half * max(radii)  # where the centre may be
    free = FRAME - 2 * low
    if motion == "orbit":
        orbit = rng.uniform(5.0, min(free.min() / 2, 14.0))
        start = rng.uniform(low + orbit, low + free - orbit)
        phase, turns = rng.uniform(0, 2 * math.pi), rng.choice([-1.0, 1.0])
        return Thing(
            colour, shape, size, motion, radii, _xy(start), _xy(start), float(orbit), float(phase), float(turns)
        )

    start = rng.uniform(low, low + free)
    end = start.copy()
    if motion in DIRECTIONS:
        direction = np.array(DIRECTIONS[motion])
        axis = int(np.abs(direction).argmax())
        length = rng.uniform(max(10.0, 0.45 * free[axis]), free[axis])
        a = low[axis] + rng.uniform(0, free[axis] - length)
        start[axis], end[axis] = (a, a + length) if direction[axis] > 0 else (a + length, a)
    return Thing(colour, shape, size, motion, radii, _xy(start), _xy(end))


def _held_out_triple(colour: str, shape: str, motion: str) -> bool:
    index = 3 * list(COLOURS).index(colour) + 5 * list(SHAPES).index(shape) + 7 * MOTIONS.index(motion)
    return index % 8 == 0


def _choice(rng: np.random.Generator, names) -> str:
    names = tuple(names)
    return names[int(rng.integers(len(names)))]


def _xy(point: np.ndarray) -> tuple[float, float]:
    return float(point[0]), float(point[1])
