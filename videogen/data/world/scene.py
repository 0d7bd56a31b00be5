"""What a clip shows, as plain data: the attributes that a caption can name, and the geometry that a seed fixes.

Lengths are pixels of a 64×64 frame, time runs from 0 (first frame) to 1 (last frame).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    """Objects in drawing order on a ground."""

    background: str
    checkered: bool
    objects: tuple[Thing, ...]


def is_held_out_pair(scene: Scene) -> bool:
    """Does any object have a colour and shape that never occur together in training?"""
    return any((o.colour, o.shape) in HELD_OUT_PAIRS for o in scene.objects)


def is_held_out(scene: Scene) -> bool:
    """Is the scene kept from training? By the (colour, shape, motion) triple or the (colour, shape) pair of any object.

    The triples leave every colour, shape, motion and nearly every pair of them in training: what is tested is
    recombination, not new words.
    """
    return is_held_out_pair(scene) or any(_held_out_triple(o.colour, o.shape, o.motion) for o in scene.objects)


def draw_scene(rng: np.random.Generator, *, held_out: bool | None = False, checkered: float = 0.1) -> Scene:
    """A random scene with one object.

    held_out   False: training split; True: held-out triples (without the held-out pairs); None: anything
    checkered  probability of a checkered ground
    """
    while True:
        colour, shape, motion = (_choice(rng, names) for names in (COLOURS, SHAPES, MOTIONS))
        pair, triple = (colour, shape) in HELD_OUT_PAIRS, _held_out_triple(colour, shape, motion)
        if held_out is None or (triple and not pair if held_out else not (triple or pair)):
            break
    thing = _draw_thing(rng, colour, shape, _choice(rng, SIZES), motion)
    return Scene(_choice(rng, BACKGROUNDS), bool(rng.random() < checkered), (thing,))


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
