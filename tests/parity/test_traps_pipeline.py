"""Mistakes between the parts that would run without an error. Each is made here, and shown to miss diffusers."""

from dataclasses import replace

import pytest
import torch
from pipeline_pairs import difference, ours, picture, run_ours, run_theirs

import videogen.pipeline as room
from videogen.conditioning import frames as frame_condition
from videogen.pipeline import Draws, Pipeline
from videogen.types import Conditioning

VISIBLE = 1e-3
TEXT = {"prompt": "a red circle moves right", "num_inference_steps": 3, "seed": 3}
IMAGE = {**TEXT, "first_frame": picture(0), "fit": "stretch"}


def error(pipeline: Pipeline, request: dict, expected: torch.Tensor) -> float:
    return difference(run_ours(pipeline, request)[0], expected)


def test_trap_09_the_padding_of_15_stands_in_front_and_is_dropped(monkeypatch: pytest.MonkeyPatch):
    pipeline = ours("1.5", torch.float64)
    frames, latents = run_theirs(pipeline, TEXT)
    assert latents.shape[1] == 4
    assert frames.shape[1] == 9
    assert error(pipeline, TEXT, frames) < 1e-8

    decode = pipeline.decode
    kept = pipeline.generate(**TEXT, output="latent")[0]
    with torch.no_grad():
        dropped_last = torch.cat(list(decode(kept[:-1])))[None]
        undropped = torch.cat(list(decode(kept)))[None]
    assert difference(dropped_last, frames) > VISIBLE
    assert undropped.shape[1] == 16  # 4 latents have no first frame


def test_trap_09_the_image_of_15_stands_at_padded_index_0(monkeypatch: pytest.MonkeyPatch):
    pipeline = ours("1.5-I2V", torch.float64)
    frames, _ = run_theirs(pipeline, IMAGE)
    assert error(pipeline, IMAGE, frames) < 1e-8

    # at index 1, the frame that is kept: sensible, and not how the model was trained
    monkeypatch.setattr(frame_condition, "slot", lambda index: 1)
    assert error(pipeline, IMAGE, frames) > VISIBLE


def test_trap_10_the_image_latent_of_15_is_divided_by_the_scale():
    for name, inverted in (("1.5-I2V", True), ("5B-I2V", False)):
        pipeline = ours(name, torch.float64)
        assert pipeline.vae.config.invert_scale_latents == inverted
        frames, _ = run_theirs(pipeline, IMAGE)
        assert error(pipeline, IMAGE, frames) < 1e-8
        pipeline.vae.config = replace(pipeline.vae.config, invert_scale_latents=not inverted)
        assert error(pipeline, IMAGE, frames) > VISIBLE


def test_trap_10_the_latent_of_a_video_is_always_multiplied():
    """`invert_scale_latents` is about the first frame only: a video to start from is scaled like any clip."""
    pipeline = ours("5B", torch.float64)
    pipeline.vae.config = replace(pipeline.vae.config, invert_scale_latents=True)
    request = {**TEXT, "video": [picture(k, 48, 32) for k in range(9)], "fit": "stretch"}
    assert error(pipeline, request, run_theirs(pipeline, request)[0]) < 1e-8


def test_trap_15_without_a_prompt_means_the_empty_prompt_not_zeros():
    pipeline = ours("5B", torch.float64)
    frames, _ = run_theirs(pipeline, TEXT)
    assert error(pipeline, TEXT, frames) < 1e-8
    words = pipeline.text_encoder([TEXT["prompt"]])
    by_zeros = {**TEXT, "prompt": None, "prompt_embeds": words, "negative_prompt_embeds": torch.zeros_like(words)}
    assert error(pipeline, by_zeros, frames) > VISIBLE


def test_trap_16_the_image_draws_before_the_latents(monkeypatch: pytest.MonkeyPatch):
    """One generator: the image's posterior, the initial noise, then the sampler's."""
    from pipeline_pairs import DPM

    pipeline = ours("5B-I2V", torch.float64, scheduler=DPM)
    frames, _ = run_theirs(pipeline, IMAGE)
    assert error(pipeline, IMAGE, frames) < 1e-8

    encode = frame_condition.encode_frames
    monkeypatch.setattr(room.frame_condition, "encode_frames", lambda vae, x, g, **k: encode(vae, x, [None] * len(x)))
    assert error(pipeline, IMAGE, frames) > VISIBLE  # the mode: right picture, no draw, other noise afterwards
    monkeypatch.undo()

    def noise_first(self: Draws, *args: object, init=Draws.__init__) -> None:
        init(self, *args)  # type: ignore[arg-type]
        early = torch.randn(1, 3, 4, 4, 6, generator=self.generators[0], dtype=torch.float64)
        like = self.like
        self.first = lambda: early
        self.like = like

    class Early(Draws):
        """Draws the initial noise when it is made, before anything else asks."""

        __init__ = noise_first

        def __call__(self, shape):
            if getattr(self, "first", None):
                early, self.first = self.first(), None
                return early
            return super().__call__(shape)

    monkeypatch.setattr(room, "Draws", Early)
    assert error(pipeline, IMAGE, frames) > VISIBLE


def test_trap_16_a_batch_draws_as_one_and_seeds_draw_apart():
    request = {**TEXT, "prompt": ["a red circle", "a blue square"]}
    pipeline = ours("5B", torch.float64)
    together, _ = run_theirs(pipeline, request)
    apart, _ = run_theirs(pipeline, {**request, "seed": [3, 3]})
    assert error(pipeline, request, together) < 1e-8
    assert error(pipeline, {**request, "seed": [3, 3]}, apart) < 1e-8
    assert difference(together[1], apart[1]) > VISIBLE


def test_trap_17_the_pipeline_guides_in_float32(monkeypatch: pytest.MonkeyPatch):
    """diffusers takes the difference of the two halves in float32 even where everything else is float64."""
    pipeline = ours("2B", torch.float64)
    _, latents = run_theirs(pipeline, TEXT)
    assert difference(run_ours(pipeline, TEXT)[1], latents) < 1e-12

    def in_float64(model, cond: Conditioning, uncond: Conditioning, scale: float, *, dtype: torch.dtype, **_):
        def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
            time = torch.full((len(x),), t)
            without, with_ = model(x, time, uncond), model(x, time, cond)
            return without + scale * (with_ - without)

        return denoise

    monkeypatch.setattr(room, "guided", in_float64)
    assert 1e-12 < difference(run_ours(pipeline, TEXT)[1], latents) < 1e-5
