"""What is learned: batches are functions of the step, losses equal their formulas, a miniature run ends in a model."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from videogen.config import (
    ClipStage,
    DiTConfig,
    DiTTraining,
    FitConfig,
    FrameStage,
    TextEncoderConfig,
    VAEConfig,
    VAETraining,
)
from videogen.data.world import VOCABULARY
from videogen.data.world.caption import MOTION_WORDS
from videogen.models.vae import VAE
from videogen.pipeline import load
from videogen.training import latents as latent_cache
from videogen.training.dit import build_text_encoder, frames_at
from videogen.training.latents import LatentClips, cached_latents, encode_clips, read_latents
from videogen.training.run import train_dit_model, train_vae_model
from videogen.training.step import draw_known, world_batch, world_caption
from videogen.training.vae_step import detail, init_vae, unit_variance, vae_loss, world_pixels
from videogen.weights.card import read_card
from videogen.weights.diffusers import verify_folder

CPU = torch.device("cpu")
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


def vae_training(folder="unused", **fit) -> VAETraining:
    return VAETraining(
        folder=str(folder),
        model=VAE_SIZES,
        stages=[
            ClipStage(steps=2, num_frames=9, size=16, batch_size=2, image_share=0.5),
            ClipStage(steps=2, num_frames=17, size=32, batch_size=1, image_share=0.0),
        ],
        fit=FitConfig(**{"steps": 4, "save_every": 2, "bfloat16": False, **fit}),
        height=32,
        width=32,
    )


def dit_training(folder="unused", **changes) -> DiTTraining:
    return DiTTraining(
        folder=str(folder),
        model=DIT_SIZES,
        text_encoder=TextEncoderConfig(d_model=16, d_ff=16, num_layers=1, num_heads=1),
        fit=FitConfig(steps=4, save_every=2, bfloat16=False),
        scheduler={
            "_class_name": "CogVideoXDDIMScheduler",
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "snr_shift_scale": 1.0,
            "timestep_spacing": "trailing",
        },
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


def test_vae_batches_follow_the_stages_and_repeat():
    config = vae_training()
    shapes = [tuple(world_pixels(config, step, 0, 1).shape) for step in range(5)]
    assert shapes[0] == (2, 3, 9, 16, 16)
    assert shapes[1] == (8, 3, 1, 16, 16)
    assert shapes[2:] == [(1, 3, 17, 32, 32)] * 3
    assert torch.equal(world_pixels(config, 3, 0, 1), world_pixels(config, 3, 0, 1))
    assert not torch.equal(world_pixels(config, 2, 0, 2), world_pixels(config, 2, 1, 2))


def test_a_perfect_narrow_vae_has_the_divergence_as_its_only_loss():
    class Perfect(VAE):
        def moments(self, pixels):
            zeros = torch.zeros(len(pixels), 1, 1, 1, 1)
            return zeros + 2.0, zeros

        def decode(self, latents):
            return torch.zeros(1, 3, 5, 8, 8)

    loss, facts = vae_loss(
        Perfect(VAE_SIZES),
        torch.zeros(1, 3, 5, 8, 8),
        generator=torch.Generator().manual_seed(0),
        kl_weight=0.5,
        detail_weight=4.0,
    )
    assert facts["kl"] == pytest.approx(2.0)  # (2² + 1 - 1 - 0) / 2
    assert float(loss) == pytest.approx(1.0)


def test_detail_marks_edges_and_motion_only():
    pixels = torch.full((1, 3, 3, 16, 16), -1.0)
    pixels[:, :, 2, 8, 8] = 1.0
    mask = detail(pixels)
    assert mask[0, 0, 2, 8, 8] == 1
    assert mask[0, 0, 1, 8, 8] == 1  # about to move
    assert mask[0, 0, 0].sum() == 0
    assert mask[0, 0, 2, :4].sum() == 0


@torch.no_grad()
def test_unit_variance_leaves_the_function_alone():
    vae = VAE(VAE_SIZES).double().eval()
    pixels = torch.rand(4, 3, 9, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, logvar = vae.moments(pixels)
    before = vae.decode(mean)
    unit_variance(vae, pixels)
    scaled, scaled_logvar = vae.moments(pixels)
    assert torch.allclose(vae.decode(scaled), before, atol=1e-12)
    total = scaled.var(dim=(0, 2, 3, 4)) + scaled_logvar.exp().mean(dim=(0, 2, 3, 4))
    assert torch.allclose(total, torch.ones(16, dtype=torch.float64), atol=1e-6)
    assert not torch.allclose(mean, scaled)
    assert not torch.allclose(logvar, scaled_logvar)


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


def test_each_clip_is_seen_once_per_epoch_at_any_world_size():
    config, vae = dit_training(), small_vae()
    clips = read_like(config, vae)
    for world in (1, 3):
        seen = [
            b for step in range(3 // world) for rank in range(world) for b in indices(config, clips, step, rank, world)
        ]
        assert sorted(seen) == list(range(12))


def read_like(config, vae):
    tensors = encode_clips(config, vae, range(config.clips), CPU)
    tensors["video_mean"] = torch.arange(12.0).reshape(12, 1, 1, 1, 1).expand(12, 5, 16, 4, 4).clone()
    tensors["video_logvar"] = torch.full_like(tensors["video_logvar"], -30.0)
    return latent_cache.LatentClips(**tensors)


def indices(config, clips, step, rank, world):
    return [round(float(x.mean())) for x in world_batch(config, clips, step, rank, world).latents]


def test_frame_conditions_are_mixed_in_their_shares():
    shares = {"none": 0.5, "first": 0.2, "last": 0.1, "first+last": 0.2}
    known = draw_known(shares, 4000, 5, np.random.default_rng(0))
    counts = {tuple(row): int(n) for row, n in zip(*np.unique(known.numpy(), axis=0, return_counts=True), strict=True)}
    first, last = [True, *[False] * 4], [*[False] * 4, True]
    wanted = {tuple([False] * 5): 0.5, tuple(first): 0.2, tuple(last): 0.1, (True, False, False, False, True): 0.2}
    assert set(counts) == set(wanted)
    for pattern, share in wanted.items():
        assert counts[pattern] / 4000 == pytest.approx(share, abs=0.03)


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


def test_a_short_clip_is_the_start_of_the_long_one_and_a_frame_is_any_of_them(tmp_path):
    config = dataclasses.replace(dit_training(tmp_path), batch_size=8)
    clips = LatentClips(**encode_clips(config, small_vae(), range(8), CPU))
    clips = dataclasses.replace(clips, frame_logvar=torch.full_like(clips.frame_logvar, -30))  # a frame is one number
    whole, short, still = (world_batch(config, clips, 0, 0, 1, frames=frames) for frames in (None, 3, 1))
    assert torch.equal(short.latents, whole.latents[:, :3])
    assert still.latents.shape[1] == 1
    assert not still.known.any()
    moving = {word for wordings in MOTION_WORDS.values() for phrase in wordings for word in phrase.split()}
    assert any(moving & set(caption.split()) for caption in whole.captions)
    assert not any((moving - {"a", "to", "the"}) & set(caption.split()) for caption in still.captions)
    near = [
        (one - frames).flatten(1).abs().amax(1) for one, frames in zip(still.latents, whole.frame_latents, strict=True)
    ]
    assert all(distances.min() < 1e-5 for distances in near)
    assert len({int(distances.argmin()) for distances in near}) > 1


@torch.no_grad()
def test_the_first_chunk_of_a_clip_is_encoded_as_if_the_clip_ended_there():
    vae = small_vae().double()
    pixels = torch.rand(1, 3, 17, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(vae.encode(pixels)[:, :, :3], vae.encode(pixels[:, :, :9]), rtol=0, atol=1e-12)


def test_a_miniature_run_ends_in_a_model_that_generates(tmp_path):
    vae = train_vae_model(vae_training(tmp_path / "vae"), CPU)
    config = dit_training(tmp_path / "dit", vae=str(vae))
    model = train_dit_model(config, CPU)
    verify_folder(model)
    pipeline = load(model)
    assert pipeline.generate("a red circle", num_inference_steps=2).frames.shape == (17, 32, 32, 3)
    assert train_dit_model(config, CPU) == model  # again: nothing left to do


@pytest.mark.slow
def test_the_smoke_scale_of_the_whole_recipe(tmp_path):
    """Every stage of scripts/speedrun.py in miniature; called again, it has nothing left to do."""
    root = __import__("pathlib").Path(__file__).resolve().parents[2]
    command = [sys.executable, root / "scripts/speedrun.py", "--scale", "smoke"]
    subprocess.run(command, cwd=tmp_path, check=True)
    runs = tmp_path / "runs/smoke"
    seconds = json.loads((runs / "seconds.json").read_text())
    assert list(seconds) == ["vae", "dit", "student", "score", "student score"]
    assert read_card(runs / "student/model").num_inference_steps == 4
    again = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "+" not in again.stderr
    assert (runs / "student_score/score.md").read_text() in again.stdout
