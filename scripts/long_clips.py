"""How well clips beyond the native length hold together, on the world: python scripts/long_clips.py [N] [STEPS]

One line for each way to twice the length: windows with different overlaps, and pieces joined by `extend`. All that the
world's score asks for is counted over the whole clip; `jump` is the largest change of velocity, px/frame².
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import videogen
from videogen import pipeline as room
from videogen.data.world import caption, draw_scene
from videogen.diffusion.windows import spans
from videogen.evaluation.score import score_clip
from videogen.long import extend

COLUMNS = ("all", "found", "background", "colour", "size", "motion", "shape")


def main(count: int = 8, steps: int = 20) -> None:
    pipe = videogen.load("tiny")
    words: dict[str, Any] = {"num_inference_steps": steps}
    scenes = [draw_scene(np.random.default_rng((7, i)), held_out=False) for i in range(count)]

    def in_windows(prompt: str, seed: int, overlap: int) -> np.ndarray:
        room.spans = lambda total, length, multiple=1: spans(total, length, overlap, multiple=multiple)
        try:
            return pipe.generate(prompt, seed=seed, num_frames=33, **words).frames
        finally:
            room.spans = spans

    def in_pieces(prompt: str, seed: int) -> np.ndarray:
        start = pipe.generate(prompt, seed=seed, **words)
        return extend(pipe, start, prompt, num_frames=16, seed=seed + 100, **words).frames

    ways: dict[str, Callable[[str, int], np.ndarray]] = {
        "17 frames": lambda prompt, seed: pipe.generate(prompt, seed=seed, **words).frames,
        **{f"33, windows sharing {k} of 5": partial(in_windows, overlap=k) for k in (1, 2, 3, 4)},
        "33, pieces sharing 5 frames": in_pieces,
    }
    print(f"{'':32}", *(f"{name:>10}" for name in (*COLUMNS, "jump")))
    for name, make in ways.items():
        scores = [score_clip(make(caption(scene), seed), scene) for seed, scene in enumerate(scenes)]
        figures = [np.mean([bool(score[column]) for score in scores]) for column in COLUMNS]
        jump = np.mean([score["jump"] for score in scores if score["jump"] is not None])
        print(f"{name:32}", *(f"{figure:10.3f}" for figure in (*figures, jump)), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
