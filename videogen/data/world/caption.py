"""A scene as a sentence, which is also the vocabulary of the model's tokenizer:

`a {size} {colour} {shape} {motion} [and a ...] on a {background} [checkered] background[, the camera ...][, {style}]`

Every attribute has a first, canonical wording and synonyms. No word serves two attributes or two values of an object,
so a caption of one object means the same in any word order; of two objects, the order says which has what.
"""

from __future__ import annotations

import numpy as np

from videogen.data.world.scene import BACKGROUNDS, COLOURS, Scene

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
SHAPE_WORDS = {
    "circle": ("circle", "disc", "ball"),
    "bar": ("bar", "rectangle", "block"),
    "ring": ("ring", "hoop", "donut"),
    "cross": ("cross", "plus sign", "plus"),
}
MOTION_WORDS = {
    "right": ("moves right", "drifts rightwards", "slides to the right", "moving right", "goes right"),
    "left": ("moves left", "drifts leftwards", "slides to the left", "moving left", "goes left"),
    "up": ("moves up", "rises", "drifts upwards", "moving up", "goes up"),
    "down": ("moves down", "falls", "drifts downwards", "moving down", "goes down"),
    "still": ("stays still", "does not move", "rests", "standing still", "stands still"),
    "grow": ("grows", "becomes bigger", "gets larger", "growing", "expands"),
    "shrink": ("shrinks", "becomes smaller", "gets smaller", "shrinking", "contracts"),
    "orbit": ("orbits", "circles around a point", "goes around", "orbiting", "travels around a point"),
}
GROUND_WORDS = ("on a {} background", "against a {} backdrop", "over a {} ground", "in front of a {} background")
CHECKERED_WORDS = ("checkered", "chequered", "checked")
ANY_SHAPE = ("object", "shape", "thing")  # when the caption leaves the shape open
CAMERA_WORDS = {
    "static": ("",),
    "pans left": ("the camera pans left", "the camera pans leftwards"),
    "pans right": ("the camera pans right", "the camera pans rightwards"),
    "zooms in": ("the camera zooms in",),
    "zooms out": ("the camera zooms out",),
}
STYLE_WORDS = {
    "none": ("",),
    "black and white": ("in black and white", "in black and white style"),
    "sepia": ("in sepia tones", "in sepia style", "in sepia"),
    "pencil sketch": ("as a pencil sketch", "in pencil sketch style", "as a sketch"),
}


def caption(
    scene: Scene,
    rng: np.random.Generator | None = None,
    *,
    dropout: float = 0.25,
    synonyms: float = 0.3,
    still: bool = False,
) -> str:
    """The canonical caption, or with `rng` one from the grammar.

    dropout   probability that the caption leaves attributes out ("the circle moves up", "a red cross", "moves up");
              camera and style are always said: without a word of them, the camera rests and there is no style
    synonyms  probability that it is worded freely instead of canonically
    still     of a single frame of the clip: nothing is said of what moves, neither objects nor camera
    """
    free = rng is not None and rng.random() < synonyms
    keep = {"size", "colour", "shape", "motion", "background"}
    if rng is not None and rng.random() < dropout:
        keep = {name for name in sorted(keep) if rng.random() < 0.5} or {"motion"}
    if still:
        keep = keep - {"motion"} or {"shape"}

    def say(words: tuple[str, ...]) -> str:
        return words[int(rng.integers(len(words)))] if free and rng is not None else words[0]

    parts = []
    for thing in scene.objects:
        adjectives = [say(SIZE_WORDS[thing.size])] if "size" in keep else []
        adjectives += [thing.colour] if "colour" in keep else []
        words = []
        if adjectives or "shape" in keep:
            noun = say(SHAPE_WORDS[thing.shape] if "shape" in keep else ANY_SHAPE)
            the = rng is not None and not adjectives and rng.random() < 0.5
            name = " ".join([*adjectives, noun])
            words.append(f"the {name}" if the else with_article(name))
        if "motion" in keep:
            words.append(say(MOTION_WORDS[thing.motion]))
        parts += [" ".join(words)] if words else []
    sentence = " and ".join(parts)
    if "background" in keep:
        ground = f"{scene.background} {say(CHECKERED_WORDS)}" if scene.checkered else scene.background
        sentence = f"{sentence} {say(GROUND_WORDS).format(ground)}" if parts else f"a {ground} background"
    rest = "" if still else say(CAMERA_WORDS[scene.camera]), say(STYLE_WORDS[scene.style])
    return ", ".join(part for part in (sentence, *rest) if part)


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _vocabulary() -> tuple[str, ...]:
    phrases = [*COLOURS, *BACKGROUNDS, *ANY_SHAPE, *CHECKERED_WORDS]
    phrases += ["a an the and two ,"]  # "two" is in no caption yet, but in the bundled model's tokenizer
    phrases += [phrase.replace("{}", "") for phrase in GROUND_WORDS]
    for table in (SIZE_WORDS, SHAPE_WORDS, MOTION_WORDS, CAMERA_WORDS, STYLE_WORDS):
        phrases += [phrase for wordings in table.values() for phrase in wordings]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


VOCABULARY: tuple[str, ...] = _vocabulary()
