"""Train a DiT and its text encoder on cached latents of the world: `videogen train configs/train/tiny_dit.yaml`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from videogen.config import DiTTraining
from videogen.data.world import VOCABULARY
from videogen.diffusion.schedule import Schedule
from videogen.evaluation import caption_gaps
from videogen.models.dit import DiT, init_weights
from videogen.models.text import TextEncoder, tiny_t5, word_tokenizer
from videogen.models.vae import VAE
from videogen.training.latents import LatentClips, cached_latents, encode_clips, read_latents
from videogen.training.masking import draw_kept, masked, shown
from videogen.training.step import TIMESTEPS, Batch, dit_loss, draw_known, world_batch, world_caption, world_scene
from videogen.training.trainer import Facts, fit, join_process_group


def train_dit(config: DiTTraining, vae: VAE, folder: Path, device: torch.device) -> tuple[DiT, TextEncoder]:
    """The trained DiT and text encoder (moving averages), in float32 on the CPU."""
    rank, world = join_process_group()
    shards = cached_latents(config, vae, folder / "latents", device, rank=rank, world=world)
    if world > 1:
        dist.barrier()
    clips = read_latents(shards, config.clips)
    held_out = LatentClips(**encode_clips(config, vae, range(10**9, 10**9 + 128), device, held_out=True))

    torch.manual_seed(config.fit.seed)
    dit = init_weights(DiT(config.model)).to(device)
    text = build_text_encoder(config).to(device)
    schedule = Schedule.from_config(config.scheduler)
    draw_times = TIMESTEPS[config.timesteps]

    def loss_at(step: int) -> tuple[Tensor, Facts]:
        frames = frames_at(config, step / config.fit.steps)
        batch = world_batch(config, clips, step, rank, world, frames=frames).to(device)
        generator = torch.Generator().manual_seed((config.fit.seed * 1_000_003 + step) * 64 + rank)
        t = draw_times(config.batch_size, schedule, generator).to(device)
        noise = torch.randn(batch.latents.shape, generator=generator).to(device)
        model, where = dit, None
        if config.masking and step < (1 - config.masking.finish) * config.fit.steps:
            f, _, h, w = batch.latents.shape[1:]
            kept = draw_kept(config.model, config.masking, f, h, w, generator).to(device)
            model = masked(dit, kept, config.masking.mixer_layers)
            where = shown(kept, config.model, f, h, w)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.fit.bfloat16):
            loss = dit_loss(model, trainable(text), batch, t, noise, schedule=schedule, where=where).mean()
        return loss, {"samples": config.batch_size}

    modules: dict[str, nn.Module] = {"dit": dit, "text_encoder": text}
    trained = fit(
        modules, loss_at, config.fit, folder, validate=lambda m: validate(config, m, held_out, schedule, device)
    )
    dit_average, text_average = trained["dit"].cpu(), trained["text_encoder"].cpu()
    assert isinstance(dit_average, DiT)
    assert isinstance(text_average, TextEncoder)
    return dit_average, text_average


def frames_at(config: DiTTraining, done: float) -> int | None:
    """How many latent frames a step sees when this share of the run is done; None: whole clips."""
    for stage in config.curriculum:
        if done < stage.share:
            return stage.latent_frames
        done -= stage.share
    return None


def build_text_encoder(config: DiTTraining) -> TextEncoder:
    """A T5 with fresh weights over the world's words."""
    sizes, length = config.text_encoder, config.model.max_text_seq_length
    tokenizer = word_tokenizer(VOCABULARY, length)
    encoder = tiny_t5(
        len(tokenizer), d_model=sizes.d_model, num_layers=sizes.num_layers, num_heads=sizes.num_heads, d_ff=sizes.d_ff
    )
    return TextEncoder(encoder, tokenizer, length)


def trainable(text: TextEncoder):
    """The text encoder with gradients (a TextEncoder called directly has none)."""

    def embed(captions: list[str]) -> Tensor:
        return text.encoder(text.token_ids(captions)).last_hidden_state

    return embed


@torch.no_grad()
def validate(
    config: DiTTraining, modules: dict[str, nn.Module], clips: LatentClips, schedule: Schedule, device: torch.device
) -> dict[str, float]:
    """Held-out loss at fixed times, with the right captions and with wrong ones, from random numbers of its own.

    The gap moves long before a sampled clip obeys: it is the first sign that the words are read, each kind of word by
    itself (`evaluation.caption_gaps`).
    """
    dit, text = modules["dit"], modules["text_encoder"]
    assert isinstance(dit, DiT)
    assert isinstance(text, TextEncoder)
    generator, rng = torch.Generator().manual_seed(1), np.random.default_rng(1)
    count = len(clips)
    indices = range(10**9, 10**9 + count)
    captions = [world_caption(config, i, rng, held_out=True) for i in indices]
    scenes = [world_scene(config, i, held_out=True) for i in indices]
    latents, frame_latents = (draw(torch.arange(count), generator) for draw in (clips.video, clips.frames))
    noise = torch.randn(latents.shape, generator=generator).to(device)
    t = schedule.time((torch.arange(count) % 8 + 0.5) / 8).to(device)
    known = draw_known({"none": 1.0}, count, latents.shape[1], rng)

    def loss(words: list[str]) -> float:
        batch = Batch(latents, frame_latents, known, words).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.fit.bfloat16):
            return float(dit_loss(dit, text, batch, t, noise, schedule=schedule).mean())

    figures = {"held_out_loss": loss(captions), "wrong_caption_loss": loss(captions[1:] + captions[:1])}
    figures |= caption_gaps(loss, scenes)
    return {name: round(value, 5) for name, value in figures.items()}
