"""The DiT's training on the world: clips encoded once, what a step sees of them, a miniature run to a model."""

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from videogen.config import (
    DiTConfig,
    DiTTraining,
    FitConfig,
    FrameStage,
    MaskingConfig,
    TextEncoderConfig,
    VAEConfig,
    ValidationConfig,
)
from videogen.data.world import VOCABULARY
from videogen.data.world.caption import MOTION_WORDS
from videogen.diffusion.objective import banded
from videogen.diffusion.schedule import FlowSchedule, Schedule
from videogen.models.vae import VAE
from videogen.pipeline import load
from videogen.training import latents as latent_cache
from videogen.training.dit import build_text_encoder, frames_at
from videogen.training.draws import draw_level, draws
from videogen.training.latents import LatentClips, WorldClips, cached_latents, encode_clips, read_latents, world_caption
from videogen.training.logs import read_log
from videogen.training.run import train_dit_model
from videogen.training.step import DENSITIES, informative
from videogen.training.vae_step import init_vae
from videogen.weights.card import read_card
from videogen.weights.diffusers import save_vae, verify_folder

CPU = torch.device("cpu")
SCHEDULER = {
    "_class_name": "CogVideoXDDIMScheduler",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
}
SCHEDULE = Schedule.from_config(SCHEDULER)
VAE_SIZES = VAEConfig(
    block_out_channels=(4, 4, 8, 8),
    layers_per_block=1,
    norm_num_groups=2,
    scaling_factor=1.0,
    sample_height=32,
    sample_width=32,
)
DIT_SIZES = DiTConfig(
    num_layers=1,
    num_attention_heads=1,
    in_channels=32,
    time_embed_dim=32,
    text_embed_dim=16,
    sample_width=4,
    sample_height=4,
    sample_frames=17,
    max_text_seq_length=48,
    use_rotary_positional_embeddings=True,
    use_learned_positional_embeddings=True,
)


def dit_training(folder="unused", **changes) -> DiTTraining:
    return DiTTraining(
        folder=str(folder),
        model=DIT_SIZES,
        text_encoder=TextEncoderConfig(d_model=16, d_ff=16, num_layers=1, num_heads=1),
        fit=FitConfig(steps=4, save_every=2, bfloat16=False),
        scheduler=SCHEDULER,
        validation=ValidationConfig(clips=4, times=2, samples=1, num_inference_steps=2),
        clips=12,
        batch_size=4,
        height=32,
        width=32,
        **changes,
    )


def small_vae() -> VAE:
    torch.manual_seed(0)
    vae = VAE(VAE_SIZES)
    init_vae(vae)
    return vae.eval()


def test_latents_are_encoded_once_and_addressed_by_their_vae(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD", 8)
    config, vae = dit_training(), small_vae()
    folder = cached_latents(config, vae, tmp_path, CPU)
    clips = read_latents(folder, config.clips)
    assert clips.video_mean.shape == clips.frame_logvar.shape == (12, 5, 16, 4, 4)
    monkeypatch.setattr(latent_cache, "encode_clips", lambda *a, **k: pytest.fail("encoded again"))
    assert cached_latents(config, vae, tmp_path, CPU) == folder
    monkeypatch.undo()
    other = small_vae()
    with torch.no_grad():
        other.encoder.conv_out.bias += 1
    assert cached_latents(dataclasses.replace(config, clips=1), other, tmp_path, CPU) != folder

    # A frame's own latent is that of a clip of one frame, which is how the pipeline encodes a condition.
    clip = latent_cache.clip(3, seed=0, height=32, width=32, **vars(config.world))[1]
    still = torch.from_numpy(clip[8]).permute(2, 0, 1)[None, :, None] * 2 - 1
    with torch.no_grad():
        expected = vae.encode(still)[0, :, 0]
    assert torch.allclose(clips.frame_mean[3, 2].float(), expected, atol=2e-3)


def world_clips(count=8, **changes) -> WorldClips:
    moments = LatentClips(**encode_clips(dit_training(), small_vae(), range(count), CPU))
    still = torch.full_like(moments.frame_logvar, -30)  # a frame's latents are one number
    return WorldClips(dit_training(), dataclasses.replace(moments, frame_logvar=still), 8.0, **changes)


def test_captions_use_known_words_only():
    tokenizer = build_text_encoder(dit_training()).tokenizer
    rng = np.random.default_rng(0)
    for i in range(200):
        ids = tokenizer(world_caption(dit_training(), i, rng))["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= 48
    assert len(tokenizer) == len(VOCABULARY) + 3


def test_the_curriculum_shows_single_frames_then_short_clips_then_whole_ones(tmp_path):
    config = dataclasses.replace(
        dit_training(tmp_path),
        curriculum=[FrameStage(share=0.2, latent_frames=1), FrameStage(share=0.3, latent_frames=3)],
    )
    assert [frames_at(config, step / 10) for step in range(10)] == [1] * 2 + [3] * 3 + [None] * 5


def test_a_short_clip_is_the_start_of_the_long_one_and_a_frame_is_any_of_them():
    clips = world_clips()
    seen = {
        frames: [dataclasses.replace(clips, frames=frames).read(i, draws(0, 0, str(i), "sample")) for i in range(8)]
        for frames in (None, 3, 1)
    }
    moving = {word for wordings in MOTION_WORDS.values() for phrase in wordings for word in phrase.split()}
    places = []
    for whole, short, still in zip(*seen.values(), strict=True):
        assert torch.equal(short.latents, whole.latents[:3])
        assert torch.equal(short.frame_latents, whole.frame_latents[:3])
        assert still.latents.shape[0] == 1
        assert not (moving - {"a", "to", "the"}) & {*still.text.split()}
        distances = (still.latents - whole.frame_latents).flatten(1).abs().amax(1)
        assert distances.min() < 1e-5
        places.append(int(distances.argmin()))
    assert any(moving & {*whole.text.split()} for whole in seen[None])
    assert len({*places}) > 1
    assert dataclasses.replace(clips, frames=3).shape(0) == (3, 4, 4)


def test_a_clip_read_with_the_same_numbers_is_the_same_and_with_others_another():
    clips = world_clips(2)
    first, again, other = (clips.read(1, draws(0, epoch, clips.name(1), "sample")) for epoch in (0, 0, 1))
    assert torch.equal(first.latents, again.latents)
    assert first.text == again.text
    assert not torch.equal(first.latents, other.latents)
    assert clips.name(0) != dataclasses.replace(clips, held_out=True).name(0)


@torch.no_grad()
def test_the_first_chunk_of_a_clip_is_encoded_as_if_the_clip_ended_there():
    vae = small_vae().double()
    pixels = torch.rand(1, 3, 17, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(vae.encode(pixels)[:, :, :3], vae.encode(pixels[:, :, :9]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_the_times_of_a_step_have_a_band_each_and_are_uniform_for_a_sample(batch):
    numbers = partial(draws, 0, 0, purpose="time")
    levels = np.array(
        [[draw_level(0, step, j, batch, numbers(f"{step} {j}")) for j in range(batch)] for step in range(300)]
    )
    assert (np.sort(np.floor(levels * batch), axis=1) == np.arange(batch)).all()
    for place in range(batch):
        assert abs(levels[:, place].mean() - 0.5) < 4 / np.sqrt(12 * 300)
        assert len({int(x * batch) for x in levels[:, place]}) == batch
    # What it is for: the mean over a batch of a loss that depends on the time varies less than with free draws.
    free = np.random.default_rng(0).random((300, batch))
    assert batch == 1 or (levels**2).mean(1).std() < 0.5 * (free**2).mean(1).std()


@pytest.mark.parametrize("schedule", [SCHEDULE, FlowSchedule()], ids=["v", "flow"])
def test_a_density_says_how_often_a_time_is_drawn(schedule):
    """Even levels through `informative` are the mixture that drawing its two parts by chance makes."""
    u = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    t = schedule.time(informative(schedule)(u)).double()
    assert (t.diff() >= 0).all()
    by_chance = banded(40_000, schedule, torch.Generator().manual_seed(0)).double().sort().values
    assert (t - by_chance).abs().max() < 0.02 * schedule.num_train_timesteps
    assert torch.equal(DENSITIES["uniform"](schedule)(u), u)
    ends = informative(schedule)(torch.tensor([0.0, 1 - 2**-24], dtype=torch.float64))
    assert 0 <= ends[0] < ends[1] < 1


def test_a_miniature_run_ends_in_a_model_that_generates(tmp_path):
    """With every stage of the recipe: a curriculum, masking, validation; called again, nothing is left to do."""
    save_vae(tmp_path / "vae", small_vae())
    config = dit_training(
        tmp_path / "dit",
        vae=str(tmp_path / "vae"),
        curriculum=[FrameStage(share=0.25, latent_frames=1)],
        masking=MaskingConfig(share=0.5, mixer_layers=0, finish=0.5),
    )
    model = train_dit_model(config, CPU)
    verify_folder(model)
    pipeline = load(model)
    assert pipeline.generate("a red circle", num_inference_steps=2).frames.shape == (17, 32, 32, 3)
    line = read_log(tmp_path / "dit")[-1]
    assert line["samples"] == 4 * 4
    assert {"held_out_loss", "held_out_loss_t25", "wrong_caption_loss", "gap_colour", "sample_motion"} <= line.keys()
    assert (tmp_path / "dit/samples/step_00000004.png").exists()
    assert train_dit_model(config, CPU) == model


@pytest.mark.slow
def test_the_smoke_scale_of_the_whole_recipe(tmp_path):
    """Every stage of scripts/speedrun.py in miniature; called again, it has nothing left to do."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, root / "scripts/speedrun.py", "--scale", "smoke"]
    subprocess.run(command, cwd=tmp_path, check=True)
    runs = tmp_path / "runs/smoke"
    seconds = json.loads((runs / "seconds.json").read_text())
    assert list(seconds) == ["vae", "dit", "student", "score", "student score"]
    assert read_card(runs / "student/model").num_inference_steps == 4
    again = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "+" not in again.stderr
    assert (runs / "student_score/score.md").read_text() in again.stdout
