"""A caption for a clip of the procedural world from its pixels alone: the world's own captioner, by rules."""

from __future__ import annotations

import numpy as np

from videogen.data.world.caption import STYLE_WORDS, caption
from videogen.data.world.scene import Scene, Thing
from videogen.evaluation.score import Measurement, measure


class WorldCaptioner:
    """Names what `measure` sees in the world's canonical words (`videogen.data.captions.Captioner`)."""

    name, shown = "world", 33

    def __call__(self, frames: list[np.ndarray], fps: float | int | None) -> str:
        return describe(np.stack(frames))


def describe(frames: np.ndarray) -> str:
    """The canonical caption of a clip of the world, uint8 [F, H, W, 3]; of a styled one, whose colours are gone, no
    more than the style."""
    seen = measure(frames, 2)
    if len(seen.things) < 2 or any(thing.motion is None for thing in seen.things):
        seen = measure(frames, 1)
    if seen.style != "none":
        return f"an object, {STYLE_WORDS[seen.style][0]}"
    if not seen.found:
        return f"a {seen.background}{' checkered' * (seen.pattern == 'checkered')} background"
    return caption(scene_of(seen))


def scene_of(seen: Measurement) -> Scene:
    """What was seen as a scene that can be worded: without its geometry."""
    nowhere = (0.0, 0.0)
    things = tuple(
        Thing(thing.colour, thing.shape, thing.size, thing.motion or "still", (1.0, 1.0), nowhere, nowhere)
        for thing in seen.things
    )
    return Scene(seen.background, seen.pattern == "checkered", things, camera=seen.camera)
