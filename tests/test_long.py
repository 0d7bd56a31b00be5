"""A clip that goes on: what is there stays, the seam is faded, and each model is told the end as it was trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from videogen.data.video import Video
from videogen.errors import InvalidRequest
from videogen.long import extend, joined, piece, plan_extension
from videogen.pipeline import Pipeline
from videogen.testing import TINY_DIT, tiny_pipeline
from videogen.weights.models import PARTS

PLAIN = replace(TINY_DIT, use_learned_positional_embeddings=False)


def clip(frames: int = 11) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, 32, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return tiny_pipeline(num_inference_steps=1)


def test_old_frames_stay_and_the_seam_is_a_fade():
    before, after = np.full((6, 2, 2, 3), 40, np.uint8), np.full((5, 2, 2, 3), 80, np.uint8)
    both = joined(before, after, 4)
    assert both[:, 0, 0, 0].tolist() == [40, 40, 40, 50, 60, 70, 80]
    assert joined(before, after, 1)[:, 0, 0, 0].tolist() == [40] * 6 + [80] * 4  # one shared frame: the old one


@pytest.mark.parametrize(("added", "pieces"), [(None, 1), (1, 1), (4, 1), (5, 2), (10, 3)])
def test_a_clip_grows_by_what_is_asked_for(pipeline: Pipeline, added: int | None, pieces: int):
    frames = clip()
    made = extend(pipeline, Video(frames, 12), "a red circle", num_frames=added, seed=7, parent="abc")
    assert made.frames.shape[0] == 11 + (added or 4)
    assert np.array_equal(made.frames[:7], frames[:7])  # to the first frame of the overlap, whose share is 0
    assert made.fps == 12
    extends = made.settings["extends"]
    assert (extends["sha256"], extends["frames"], extends["overlap"]) == ("abc", 11, 5)
    assert [one["seed"] for one in extends["pieces"]] == [7, 8, 9][:pieces]


def test_the_same_seed_makes_the_same_clip(pipeline: Pipeline):
    a, b, c = (extend(pipeline, Video(clip(), 8), "a red circle", seed=seed).frames for seed in (1, 1, 2))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def told(pipeline: Pipeline, **options: Any) -> Any:
    frames = clip()
    return piece(pipeline.card, frames, plan_extension(pipeline.card, frames, **options), prompt="a")


def test_a_model_is_told_what_it_was_trained_for():
    frames = clip()
    keys = told(tiny_pipeline(dit=PLAIN))
    assert np.array_equal(keys.first_frame, frames[-5])
    assert keys.keyframes is not None
    assert list(keys.keyframes) == [4]
    assert np.array_equal(keys.keyframes[4], frames[-1])
    one = told(tiny_pipeline(dit=PLAIN), overlap=1)
    assert one.keyframes is None
    assert np.array_equal(one.first_frame, frames[-1])
    first_only = told(tiny_pipeline(conditions=("text", "first_frame")))
    assert np.array_equal(first_only.first_frame, frames[-1])

    parts = tiny_pipeline(dit=replace(PLAIN, in_channels=9), conditions=PARTS, num_inference_steps=1)
    masked = told(parts)
    assert np.array_equal(masked.video[:5], frames[-5:])
    assert not masked.mask[:5].any()
    assert masked.mask[5:].all()
    assert extend(parts, Video(frames, 8), "a").frames.shape[0] == 15


def test_what_cannot_be_is_refused(pipeline: Pipeline):
    for options, param in (
        ({"overlap": 9}, "overlap"),
        ({"overlap": 0}, "overlap"),
        ({"num_frames": 0}, "num_frames"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            plan_extension(pipeline.card, clip(), **options)
        assert caught.value.param == param
    with pytest.raises(InvalidRequest, match="overlap"):
        plan_extension(pipeline.card, clip(3), overlap=4)
    text = tiny_pipeline(dit=replace(PLAIN, in_channels=4), conditions=("text", "video"), name="text-only")
    with pytest.raises(InvalidRequest, match="first frame") as caught:
        plan_extension(text.card, clip())
    assert "tiny" in caught.value.hint
    small = np.zeros((9, 16, 24, 3), np.uint8)
    with pytest.raises(InvalidRequest, match="24x16"):
        extend(pipeline, Video(small, 8), "a")
