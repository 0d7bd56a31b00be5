"""`python -m videogen.data.world FOLDER`: the pictures of docs/world.md, from fixed scenes.

python -m videogen.data.world docs/images
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from videogen.data.world.caption import caption
from videogen.data.world.render import render
from videogen.data.world.scene import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, STYLES, Scene, Thing, draw_scene

WHITE = 1.0


def main(folder: Path) -> None:
    """Write the pictures, and print the captions of their rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {
        "shapes": [shapes()],
        "grounds": [grounds(False), grounds(True)],
        "motions": [strip(scene) for scene in motions()],
        "two": [strip(scene) for scene in drawn(3, two=1.0, seed=6)],
        "camera": [strip(scene) for scene in cameras()],
        "styles": [strip(scene) for scene in styles()],
    }.items():
        picture = (np.concatenate(rows) * 255).round().astype(np.uint8)
        save(picture, folder / f"world-{name}.png")


def shapes() -> np.ndarray:
    """Each shape in each size, in all colours."""
    names = [(shape, size) for size in SIZES for shape in SHAPES]
    things = [still(colour, *name) for colour, name in zip(COLOURS, names, strict=True)]
    return beside([render(Scene("black", False, (thing,)), 1)[0] for thing in things])


def grounds(checkered: bool) -> np.ndarray:
    thing = still("cyan", "circle", "small")
    return beside([render(Scene(name, checkered, (thing,)), 1)[0] for name in BACKGROUNDS])


def motions() -> list[Scene]:
    """The first drawn scene of each motion."""
    found: dict[str, Scene] = {}
    for i in range(1000):
        scene = draw_scene(np.random.default_rng((5, i)), checkered=0.0)
        found.setdefault(scene.objects[0].motion, scene)
    return [found[motion] for motion in MOTIONS]


def drawn(count: int, seed: int, **shares: float) -> list[Scene]:
    return [
        draw_scene(np.random.default_rng((seed, i)), held_out=False, **{"checkered": 0.0} | shares)
        for i in range(count)
    ]


def cameras() -> list[Scene]:
    scene = Scene("teal", True, (still("yellow", "ring", "small"),))
    moves = (("pans left", 24.0), ("pans right", 24.0), ("zooms in", 1.8), ("zooms out", 1.8))
    return [replace(scene, camera=camera, travel=travel) for camera, travel in moves]


def styles() -> list[Scene]:
    (scene,) = drawn(1, seed=8, two=1.0, checkered=1.0, style=1.0)
    return [replace(scene, style=style) for style in STYLES]


def still(colour: str, shape: str, size: str) -> Thing:
    radius, middle = SIZES[size], (32.0, 32.0)
    return Thing(colour, shape, size, "still", (radius, radius), middle, middle)


def strip(scene: Scene) -> np.ndarray:
    """Nine of seventeen frames in a row."""
    print(caption(scene))
    return beside(list(render(scene, 17)[::2]))


def beside(frames: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.pad(f, ((2, 2), (2, 2), (0, 0)), constant_values=WHITE) for f in frames], 1)


def save(picture: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(picture).save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images"))
