"""Whole pipelines equal diffusers' on the same random weights, seeds and requests."""

import numpy as np
import pytest
import torch
from pipeline_pairs import DDIM, DPM, difference, ours, picture, run_ours, run_theirs

from videogen.data.video import fit_image

TEXT = {"prompt": "a red circle moves right", "num_inference_steps": 4, "seed": 3}
PAIR = {**TEXT, "prompt": ["a small blue square", "a red circle"]}
IMAGE = {**TEXT, "first_frame": picture(0), "fit": "stretch"}
VIDEO = {**TEXT, "video": [picture(k, 48, 32) for k in range(9)], "fit": "stretch"}

CASES = {  # model, changes to it, request
    "2B": ("2B", {}, TEXT),
    "5B": ("5B", {}, TEXT),
    "1.5": ("1.5", {}, TEXT),  # 3 latent frames padded to 4, the first dropped
    "2B dpm": ("2B", {"scheduler": DPM}, TEXT),
    "5B ddim": ("5B", {"scheduler": DDIM}, TEXT),
    "1.5 ddim": ("1.5", {"scheduler": DDIM}, TEXT),
    "2B other size": ("2B", {}, {**TEXT, "height": 48, "width": 32, "num_frames": 17}),
    "5B other size": ("5B", {}, {**TEXT, "height": 48, "width": 64, "num_frames": 17}),
    "1.5 other size": ("1.5", {}, {**TEXT, "height": 64, "width": 32, "num_frames": 17}),
    "one frame": ("5B", {}, {**TEXT, "num_frames": 1}),
    "negative prompt": ("5B", {}, {**TEXT, "negative_prompt": "a green square"}),
    "dynamic guidance": ("5B", {}, {**TEXT, "use_dynamic_cfg": True, "num_inference_steps": 5}),
    "dynamic guidance, a step too many": ("5B", {}, {**TEXT, "use_dynamic_cfg": True, "num_inference_steps": 61}),
    "no guidance": ("5B", {}, {**TEXT, "guidance_scale": 1.0}),
    "3 steps, no divisor of 1000": ("2B", {}, {**TEXT, "num_inference_steps": 3}),
    "two prompts": ("5B", {}, PAIR),
    "two prompts, two seeds": ("5B", {}, {**PAIR, "seed": [3, 8], "negative_prompt": ["a green square", "black"]}),
    "5B-I2V": ("5B-I2V", {}, IMAGE),
    "5B-I2V dpm": ("5B-I2V", {"scheduler": DPM}, IMAGE),
    "5B-I2V two prompts": ("5B-I2V", {}, {**IMAGE, **PAIR}),
    "5B-I2V two seeds": ("5B-I2V", {"scheduler": DPM}, {**IMAGE, **PAIR, "seed": [3, 8]}),
    "5B-I2V dynamic": ("5B-I2V", {}, {**IMAGE, "use_dynamic_cfg": True, "num_inference_steps": 5}),
    "1.5-I2V": ("1.5-I2V", {}, IMAGE),  # ofs, image latent divided by the scale, told at padded index 0
    "1.5-I2V other size": ("1.5-I2V", {}, {**IMAGE, "height": 48, "width": 32, "num_frames": 17}),
    "video to video": ("5B", {}, {**VIDEO, "strength": 0.8}),
    "video to video 2B": ("2B", {}, {**VIDEO, "strength": 0.5}),
    "video to video dynamic": ("5B", {}, {**VIDEO, "use_dynamic_cfg": True, "num_inference_steps": 5}),
    "video to video two prompts": ("2B", {}, {**VIDEO, **PAIR, "seed": [3, 8]}),
    "video to video all steps": ("2B", {}, {**VIDEO, "strength": 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_frames_and_latents_equal_diffusers(case: str):
    name, changes, request = CASES[case]
    pipeline = ours(name, torch.float64, **changes)
    frames, latents = run_ours(pipeline, request)
    their_frames, their_latents = run_theirs(pipeline, request)
    errors = difference(latents, their_latents), difference(frames, their_frames)
    print(f"{case}: latents {errors[0]:.1e}, frames {errors[1]:.1e}")
    assert max(errors) <= 1e-8
    assert ((frames > 0) & (frames < 1)).double().mean() > 0.5  # what is clamped would prove nothing


@pytest.mark.parametrize("case", ["2B", "5B", "1.5", "5B-I2V dpm", "1.5-I2V", "video to video", "two prompts"])
def test_frames_equal_diffusers_in_float32(case: str):
    name, changes, request = CASES[case]
    pipeline = ours(name, torch.float32, **changes)
    error = difference(run_ours(pipeline, request)[0], run_theirs(pipeline, request)[0])
    print(f"{case}: {error:.1e}")
    assert error <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", ["2B", "5B", "5B-I2V"])
def test_frames_equal_diffusers_after_fifty_steps(case: str):
    name, changes, request = CASES[case]
    request = {**request, "num_inference_steps": 50}
    pipeline = ours(name, torch.float32, **changes)
    error = difference(run_ours(pipeline, request)[0], run_theirs(pipeline, request)[0])
    print(f"{case}: {error:.1e}")
    assert error <= 1e-4


@pytest.mark.parametrize(("name", "frames"), [("5B", 3), ("1.5", 4)])
def test_latents_in_and_out_have_diffusers_layout(name: str, frames: int):
    """[b, f, c, h, w]; for 1.5 padded to even and undropped."""
    pipeline = ours(name, torch.float64)
    noise = torch.randn(1, frames, 4, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    request = {**TEXT, "latents": noise}
    latents = pipeline.generate(**request, output="latent")
    assert latents.shape == (1, frames, 4, 4, 6)
    their_frames, their_latents = run_theirs(pipeline, request)
    assert difference(latents, their_latents) <= 1e-8
    decoded = pipeline.generate(**request, output="tensor")
    assert decoded.shape == (1, 9, 3, 32, 48)
    assert difference(decoded, their_frames) <= 1e-8


def test_embeddings_in_place_of_words():
    pipeline = ours("5B", torch.float64)
    words = pipeline.text_encoder(["a red circle", "a green square"])
    request = {"prompt": None, "prompt_embeds": words[:1], "negative_prompt_embeds": words[1:], "seed": 3}
    by_words = pipeline.generate("a red circle", negative_prompt="a green square", seed=3, output="tensor")
    assert torch.equal(pipeline.generate(**request, output="tensor"), by_words)
    assert difference(by_words, run_theirs(pipeline, request)[0]) <= 1e-8


@pytest.mark.parametrize("size", [(40, 70), (32, 48), (33, 20), (200, 300)])
def test_stretch_is_diffusers_resize(size: tuple[int, int]):
    from diffusers.video_processor import VideoProcessor

    image = picture(5, size[1], size[0])
    expected = VideoProcessor(vae_scale_factor=8).preprocess(image, height=32, width=48)[0].numpy()
    np.testing.assert_allclose(fit_image(image, 32, 48, "stretch"), expected, atol=1e-6)
    if size[0] * 48 != size[1] * 32:
        assert np.abs(fit_image(image, 32, 48, "crop") - expected).max() > 0.05
