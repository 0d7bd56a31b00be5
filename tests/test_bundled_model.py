"""checkpoints/tiny: whole, small, open to diffusers, and it does what it is told."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from videogen.data.world import render
from videogen.evaluation import held_out_prompts, psnr, score_clip
from videogen.pipeline import Pipeline, load
from videogen.weights.card import read_card
from videogen.weights.diffusers import verify_folder
from videogen.weights.hub import find_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load("tiny")


def test_it_is_whole_small_and_says_where_it_comes_from():
    folder = find_model("tiny")
    verify_folder(folder)
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 30e6
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    card = read_card(folder)
    assert card.licence == "Apache-2.0"
    assert card.provenance["samples"] > 0
    assert card.provenance["score"]["text"]["n"] >= 256
    assert set(card.conditions) == {"text", "first_frame", "last_frame", "keyframes", "video"}


@pytest.mark.parametrize(
    ("file", "dtype"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", torch.float16),
        ("vae/diffusion_pytorch_model.safetensors", torch.float16),
        ("text_encoder/model.safetensors", torch.float32),
    ],
)
def test_text_encoder_is_single_and_the_rest_half_precision(file, dtype):
    with safe_open(find_model("tiny") / file, "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {dtype}  # noqa: SIM118


def test_diffusers_makes_the_same_clip_from_a_first_frame(pipeline):
    """The stock image-to-video pipeline of diffusers opens the folder: same seed, same clip."""
    from diffusers import CogVideoXImageToVideoPipeline

    scene, prompt = held_out_prompts(1)[0]
    image = Image.fromarray((render(scene)[0] * 255).round().astype(np.uint8))
    theirs = CogVideoXImageToVideoPipeline.from_pretrained(find_model("tiny"), torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        image=image,
        prompt=prompt,
        num_frames=17,
        max_sequence_length=48,
        num_inference_steps=8,
        guidance_scale=pipeline.card.guidance_scale,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).frames
    ours = pipeline.generate(
        prompt, first_frame=image, seed=5, num_inference_steps=8, sampler="diffusers", output="tensor"
    )
    assert ours.shape == expected.shape == (1, 17, 3, 64, 64)
    assert (ours - expected).abs().max() < 1e-4


def test_it_obeys_held_out_prompts(pipeline):
    """Twelve prompts that training never saw, 20 steps. By chance 1 colour in 8 is right, and half of the sizes.

    The full table is `scripts/score.py`'s; this guards against a model that no longer hears."""
    prompts = held_out_prompts(12, seed=7)
    videos = pipeline.generate([text for _, text in prompts], seed=list(range(12)), num_inference_steps=20)
    scores = [score_clip(video.frames, scene) for video, (scene, _) in zip(videos, prompts, strict=True)]
    right = {name: sum(bool(score[name]) for score in scores) for name in ("found", "background", "colour", "size")}
    assert right["background"] >= 11, right
    assert right["found"] >= 8, right
    assert right["colour"] >= 8, right
    assert right["size"] >= 7, right


def test_it_keeps_the_frames_it_is_given(pipeline):
    scene, prompt = held_out_prompts(1, seed=3)[0]
    truth = render(scene)
    video = pipeline.generate(prompt, first_frame=truth[0], last_frame=truth[-1], num_inference_steps=20)
    free = pipeline.generate(prompt, num_inference_steps=20)
    for index in (0, -1):
        assert psnr(video.frames[index], truth[index]) > psnr(free.frames[index], truth[index]) + 3


def test_the_scores_in_the_readme_are_those_in_the_card():
    """Both come from `scripts/score.py`; and the model beats clips of other scenes by far."""
    score = json.loads((find_model("tiny") / "videogen.json").read_text())["provenance"]["score"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for mode, rates in score.items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| {mode} |"))
        names = ("found", "background", "colour", "size", "motion", "shape", "all")
        assert row == f"| {mode} | {rates['n']} | {' | '.join(f'{rates[name]:.2f}' for name in names)} |"
    floor = score["floor: clips of other scenes"]
    for name in ("background", "colour", "motion", "all"):
        assert score["text"][name] > floor[name] + 0.3
