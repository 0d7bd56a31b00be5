"""The procedural world: seeded scenes, their captions and their pixels. See docs/world.md."""

from videogen.data.world.caption import VOCABULARY, caption
from videogen.data.world.render import render
from videogen.data.world.scene import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    Thing,
    draw_scene,
    is_held_out,
    is_held_out_pair,
)
from videogen.data.world.stream import WHOLE_WORLD, clip

__all__ = [
    "BACKGROUNDS",
    "CAMERAS",
    "COLOURS",
    "MOTIONS",
    "SHAPES",
    "SIZES",
    "STYLES",
    "VOCABULARY",
    "WHOLE_WORLD",
    "Scene",
    "Thing",
    "caption",
    "clip",
    "draw_scene",
    "is_held_out",
    "is_held_out_pair",
    "render",
]
