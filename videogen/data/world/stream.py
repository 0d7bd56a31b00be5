"""The endless training set: sample i is a function of (seed, i) alone, so a run resumes without saved random state."""

from __future__ import annotations

import numpy as np

from videogen.data.world.caption import caption
from videogen.data.world.render import render
from videogen.data.world.scene import Scene, draw_scene

# How often the whole world shows what (`draw_scene`): a moving camera in half of the checkered scenes.
WHOLE_WORLD = {"checkered": 0.2, "two": 0.2, "camera": 0.5, "style": 0.1}


def clip(
    index: int,
    seed: int = 0,
    *,
    num_frames: int = 17,
    height: int = 64,
    width: int = 64,
    held_out: bool | None = False,
    dropout: float = 0.25,
    synonyms: float = 0.3,
    **shares: float,
) -> tuple[Scene, np.ndarray, str]:
    """Sample `index` of the stream: the scene, its frames [F, H, W, 3] in [0, 1], and a caption.

    `shares` go to `draw_scene`: without any, one object; with `**WHOLE_WORLD`, everything that there is.
    """
    rng = np.random.default_rng((seed, index))
    scene = draw_scene(rng, held_out=held_out, **shares)
    words = caption(scene, rng, dropout=dropout, synonyms=synonyms)
    return scene, render(scene, num_frames, height, width), words
