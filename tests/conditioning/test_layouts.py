"""The channels behind the noise are filled by the layout of the card, in a pipeline and in training alike."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import videogen
from videogen.conditioning import frames
from videogen.conditioning.layouts import LAYOUTS, Shown
from videogen.config import DiTConfig, VAEConfig
from videogen.errors import InvalidRequest
from videogen.models.vae import VAE
from videogen.pipeline import Pipeline
from videogen.testing import TINY_DIT, TINY_VAE, randomize, tiny_pipeline
from videogen.weights.card import Card, card_of
from videogen.weights.models import FOLLOW, PARTS, PUBLISHED

PLAIN = replace(TINY_DIT, use_learned_positional_embeddings=False)
IMAGE = Image.fromarray(np.full((32, 48, 3), 90, np.uint8))
CLIP = [IMAGE] * 9
OTHER = [Image.fromarray(np.full((32, 48, 3), 200, np.uint8))] * 9
STEPS = {"num_inference_steps": 1}
EXTRA = {"text": 0, "frames": 4, "image": 4, "inp": 5, "control": 4, "pose": 4}


def test_there_is_a_conditioner_for_each_layout_of_the_table():
    assert set(LAYOUTS) == {row.layout for row in PUBLISHED} == set(EXTRA)


@pytest.mark.parametrize("layout", EXTRA)
@torch.no_grad()
def test_presence_and_absence_fill_the_same_channels(layout: str):
    vae = randomize(VAE(TINY_VAE).eval())
    shown = Shown(like=torch.zeros(2, 3, 4, 4, 6), num_frames=9, generators=[None, None])
    image, clip = torch.rand(2, 3, 32, 48), torch.rand(2, 3, 9, 32, 48)
    some = replace(shown, video=clip) if layout in ("control", "pose") else replace(shown, images={0: image})
    for given in (shown, some):
        channels = LAYOUTS[layout](vae, given)(given.images).channels  # type: ignore[arg-type]
        if layout == "text":
            assert channels is None
        else:
            assert channels is not None
            assert channels.shape == (2, 3, EXTRA[layout], 4, 6)
            assert channels.any() == (given is some)


@torch.no_grad()
def test_frames_may_end_on_the_way_without_another_draw():
    vae = randomize(VAE(TINY_VAE).eval())
    images = {0: torch.rand(1, 3, 32, 48), 8: torch.rand(1, 3, 32, 48)}
    drawn = [torch.Generator().manual_seed(1)]
    told = LAYOUTS["frames"](
        vae,  # type: ignore[arg-type]
        Shown(like=torch.zeros(1, 3, 4, 4, 6), num_frames=9, images=images, generators=drawn),
    )
    both, first = told([0, 8]).channels, told([0]).channels
    assert both is not None
    assert first is not None
    assert torch.equal(both[:, :2], first[:, :2])
    assert both[:, 2].any()
    assert not first[:, 2].any()


@pytest.mark.parametrize("how", ["mul", "div", "none"])
@torch.no_grad()
def test_the_scale_of_image_latents_is_an_option(how: str):
    factor = {"mul": 0.7, "div": 1 / 0.7, "none": 1.0}[how]
    vae = randomize(VAE(TINY_VAE).eval())
    image = torch.rand(1, 3, 16, 24)
    raw = vae.moments(image[:, :, None])[0][:, :, 0]  # type: ignore[operator]
    torch.testing.assert_close(frames.encode_frames(vae, image, [None], scale=how), factor * raw)  # type: ignore
    for inverted, usual in ((False, "mul"), (True, "div")):
        vae.config = replace(TINY_VAE, invert_scale_latents=inverted)  # type: ignore[assignment]
        left_alone = frames.encode_frames(vae, image, [None])  # type: ignore[arg-type]
        torch.testing.assert_close(left_alone, frames.encode_frames(vae, image, [None], scale=usual))  # type: ignore


def made(pipeline: Pipeline, **keywords) -> torch.Tensor:
    return pipeline.generate("a red circle", output="latent", **{**STEPS, **keywords})


def test_the_options_reach_the_clip():
    pipeline = tiny_pipeline()
    usual = made(pipeline, first_frame=IMAGE)
    assert torch.equal(usual, made(pipeline, first_frame=IMAGE, image_latent_scale="mul"))
    assert not torch.equal(usual, made(pipeline, first_frame=IMAGE, image_latent_scale="none"))
    assert not torch.equal(usual, made(pipeline, first_frame=IMAGE, uncond="zeros"))
    words = pipeline.text_encoder(["a red circle"])
    zeros = {"prompt": None, "prompt_embeds": words, "negative_prompt_embeds": torch.zeros_like(words), **STEPS}
    assert torch.equal(pipeline.generate(**zeros, output="latent"), made(pipeline, uncond="zeros"))
    plain, wave, rise = (made(pipeline, use_dynamic_cfg=mode, num_inference_steps=3) for mode in (False, True, "sat"))
    assert torch.equal(wave, made(pipeline, use_dynamic_cfg="diffusers", num_inference_steps=3))
    assert not torch.equal(plain, wave)
    assert not torch.equal(rise, wave)


def test_models_that_need_a_condition_say_so():
    for layout, conditions, needed, given in (
        ("control", FOLLOW, "control_video", {"control_video": CLIP}),
        ("pose", FOLLOW, "control_video", {"control_video": CLIP}),
        ("image", ("first_frame",), "first_frame", {"first_frame": IMAGE}),
    ):
        pipeline = tiny_pipeline(dit=PLAIN, conditions=conditions, layout=layout)
        with pytest.raises(InvalidRequest, match="needs") as caught:
            made(pipeline)
        assert caught.value.param == needed
        assert made(pipeline, **given).shape == (1, 3, 4, 4, 6)
        with pytest.raises(InvalidRequest) as caught:
            made(pipeline, **given, image_latent_scale="none")
        assert caught.value.param == "image_latent_scale"


@pytest.mark.parametrize(
    ("condition", "who"),
    [
        ("last_frame", "CogvideoX-Interpolation"),
        ("keyframes", "CogVideoX-Fun-V1.1-2b-InP"),
        ("control_video", "CogVideoX-Fun-V1.1-5b-Control"),
        ("mask", "CogVideoX-Fun-V1.1-2b-InP"),
    ],
)
def test_what_weights_were_not_trained_for_is_refused_with_the_names_of_those_that_were(condition: str, who: str):
    pipeline = tiny_pipeline(conditions=("text", "first_frame", "video"), name="5B-I2V")
    given = {"last_frame": IMAGE, "keyframes": {4: IMAGE}, "control_video": CLIP, "mask": IMAGE}[condition]
    keywords = {condition: given} | ({"video": CLIP} if condition == "mask" else {})
    with pytest.raises(InvalidRequest, match="cannot take") as caught:
        made(pipeline, **keywords)
    assert caught.value.param == condition
    assert who in caught.value.hint


@pytest.mark.parametrize("strength", [0.01, 1])
def test_every_layout_starts_from_a_video(strength: float):
    for layout, extra in EXTRA.items():
        dit = replace(PLAIN, in_channels=4 + extra)
        pipeline = tiny_pipeline(dit=dit, conditions=(*PARTS, *FOLLOW), layout=layout)
        needed = {"control_video": CLIP} if layout in ("control", "pose") else {}
        needed |= {"first_frame": IMAGE} if layout == "image" else {}
        events: list[Any] = []
        keywords = {"video": CLIP, "strength": strength, "num_inference_steps": 3, **needed}
        assert made(pipeline, on_step=events.append, **keywords).isfinite().all()
        assert [event.stage for event in events].count("denoise") == (1 if strength < 1 else 3)
        other = made(pipeline, **{**keywords, "video": OTHER})
        same = bool(torch.allclose(made(pipeline, **keywords), other, atol=1e-5))
        assert same == (strength == 1)  # all steps made anew: of the video nothing is left


@pytest.mark.parametrize("mask", [IMAGE, np.ones((32, 48), bool), np.ones((9, 32, 48), np.float32), CLIP])
def test_a_mask_may_be_a_picture_or_a_clip(mask):
    pipeline = tiny_pipeline(dit=replace(PLAIN, in_channels=9), conditions=PARTS)
    assert made(pipeline, video=CLIP, mask=mask).isfinite().all()


def test_a_mask_that_is_too_short_is_refused():
    pipeline = tiny_pipeline(dit=replace(PLAIN, in_channels=9), conditions=PARTS)
    for mask in (np.ones((4, 32, 48)), CLIP[:4]):
        with pytest.raises(InvalidRequest) as caught:
            made(pipeline, video=CLIP, mask=mask)
        assert caught.value.param == "mask"


def test_a_saved_model_is_used_as_before(tmp_path: Path):
    """Its layout, chunk plan and table are in its `videogen.json`; diffusers' classes can still read its parts."""
    dit = replace(PLAIN, in_channels=9, use_rotary_positional_embeddings=False, add_noise_in_inpaint_model=True)
    facts = {"conditions": PARTS, "layout": "inp", "fun": True}
    pipeline = tiny_pipeline(
        dit=replace(dit, resize_positions=True), vae=replace(TINY_VAE, first_latent_alone=True), **facts
    )
    pipeline.save(tmp_path / "model")
    again = videogen.load(tmp_path / "model", device="cpu", memory="fast")
    assert (again.card.layout, again.card.fun, again.card.conditions) == ("inp", True, PARTS)
    assert (again.dit.config, again.vae.config) == (pipeline.dit.config, pipeline.vae.config)
    request = {"first_frame": IMAGE, "height": 48, "width": 64, "output": "tensor", **STEPS}
    one, two = (p.generate("a red circle", **request) for p in (again, pipeline))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)
    again.vae.config = replace(again.vae.config, first_latent_alone=False)
    assert (again.generate("a red circle", **request) - two).abs().max() > 1e-3
    vae = json.loads((tmp_path / "model" / "vae" / "config.json").read_text())
    assert vae["_class_name"] == "AutoencoderKLCogVideoX"
    assert "first_latent_alone" not in vae


def card(width: int, channels: int, name: str = "renamed", **changes: Any) -> Card:
    dit = DiTConfig(num_attention_heads=width // 64, in_channels=channels, **changes)
    return card_of(Path("model"), dit, VAEConfig(), {}, name=name)


def test_published_derivatives_are_known_by_shape_and_used_as_published():
    rotary = {"use_rotary_positional_embeddings": True}
    first = card(1920, 33)
    assert (first.layout, first.conditions, first.dit.resize_positions) == ("inp", PARTS, True)
    v15 = card(3072, 33, patch_size_t=2, add_noise_in_inpaint_model=True, **rotary)
    assert (v15.layout, v15.num_frames, v15.native_frames, v15.dit.resize_positions) == ("inp", 85, 85, False)
    assert [n for n in range(1, 30) if v15.frames.allow(n)] == [1, 5, 13, 21, 29]  # an even number of latents, or one
    assert v15.latent_shape(480, 720, 85)[0] == 22  # not padded
    assert card(3072, 32, **rotary).layout == "control"
    assert card(1920, 32).layout == "image"
    assert all(c.vae.first_latent_alone for c in (first, v15, card(3072, 32, **rotary)))
    assert not card(1920, 32).vae.first_latent_alone


def test_checkpoints_of_one_shape_are_told_apart_by_name():
    table = {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}
    assert "last_frame" not in card(3072, 32, **table).conditions
    assert "last_frame" in card(3072, 32, "feizhengcong/CogvideoX-Interpolation", **table).conditions
    assert "last_frame" in card(3072, 32, "cogvideox-interpolation", **table).conditions  # a folder with that name
    assert card(1920, 32, "CogVideoX-Fun-V1.1-2b-Pose").layout == "pose"
