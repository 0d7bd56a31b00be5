"""Train a DiT and its text encoder on cached latents of the world: `videogen train configs/train/tiny_dit.yaml`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from videogen.config import ConditionsConfig, DiTTraining
from videogen.data.world import VOCABULARY
from videogen.diffusion.schedule import Schedule
from videogen.distributed.training import Parallel, parallelize
from videogen.evaluation import caption_gaps
from videogen.models.dit import DiT, init_weights
from videogen.models.text import TextEncoder, tiny_t5, word_tokenizer
from videogen.models.vae import VAE
from videogen.training.draws import draw_noise, draws
from videogen.training.ema import ema_copy
from videogen.training.latents import HELD_OUT, WorldClips, cached_latents, read_latents, world_scene
from videogen.training.lesson import Embed, Lesson, told_nothing
from videogen.training.processes import join_process_group
from videogen.training.step import Batches, losses_of
from videogen.training.trainer import fit
from videogen.training.validation import SEED, Loss, Validation, card_of, pipeline_clips, undisturbed
from videogen.weights.card import Card

CONDITIONS = ("text", "first_frame", "last_frame", "keyframes", "video")  # what the model can be told afterwards


def train_dit(config: DiTTraining, vae: VAE, folder: Path, device: torch.device) -> tuple[DiT, TextEncoder]:
    """The trained DiT and text encoder (moving averages), in float32 on the CPU."""
    rank, world = join_process_group(config.fit.safety.timeout)
    kind, judged = {"rank": rank, "world": world}, config.validation.clips
    shards = cached_latents(config, vae, folder / "latents", device, **kind)
    apart = cached_latents(config, vae, folder / "latents", device, **kind, held_out=judged) if judged else None
    if world > 1:
        dist.barrier()
    clips = WorldClips(config, read_latents(shards, config.clips), float(config.fps))
    held_out = None
    if apart:
        held_out = WorldClips(config, read_latents(apart, judged), float(config.fps), first=HELD_OUT, held_out=True)

    torch.manual_seed(config.fit.seed)
    dit, text = init_weights(DiT(config.model)), build_text_encoder(config)
    modules: dict[str, nn.Module] = {"dit": dit, "text_encoder": text}
    averages = {name: ema_copy(module) for name, module in modules.items()}
    everything = {**modules, **{f"{name}_ema": average for name, average in averages.items()}}
    parallel = parallelize(everything, config.fit.parallel, device, bfloat16=config.fit.bfloat16)

    card = card_of(config, vae.config, CONDITIONS)
    losses_at = losses_of(
        config,
        Batches(clips, config, config.model),
        lambda done: dataclasses.replace(clips, frames=frames_at(config, done)),
        Lesson(card, trainable(text), device, config.fit.bfloat16),
        dit,
        parallel,
        conditions=config.conditions or ConditionsConfig(),
        timesteps=config.timesteps,
        masking=config.masking,
    )
    trained = fit(
        modules,
        losses_at,
        config.fit,
        folder,
        parallel=parallel,
        validate=validation(config, card, vae, held_out, modules, parallel, device),
        averages=averages,
        settings=dataclasses.asdict(config),
    )
    dit_average = parallel.whole("dit_ema", trained["dit"]).cpu()
    text_average = parallel.whole("text_encoder_ema", trained["text_encoder"]).cpu()
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


def trainable(text: TextEncoder) -> Embed:
    """The text encoder with gradients (a TextEncoder called directly has none)."""

    def embed(captions: list[str | Tensor]) -> Tensor:
        return text.encoder(text.token_ids([str(words) for words in captions])).last_hidden_state

    return embed


# ---- validation -----------------------------------------------------------------------------------------------------


def validation(
    config: DiTTraining,
    card: Card,
    vae: VAE,
    held_out: WorldClips | None,
    modules: Mapping[str, nn.Module],
    parallel: Parallel,
    device: torch.device,
) -> Callable[[Mapping[str, nn.Module], int], dict[str, float]]:
    """Losses on held-out clips, clips to look at, and how much the right words help: figures of the averages."""

    def loss(of: Mapping[str, nn.Module]) -> Loss:
        dit, text = of["dit"], of["text_encoder"]
        assert isinstance(dit, DiT)
        assert isinstance(text, TextEncoder)
        lesson = Lesson(card, trainable(text), device, config.fit.bfloat16)
        return lambda examples, t, noise: lesson(dit, [told_nothing(one) for one in examples], t, noise)

    general = Validation(
        config=config.validation,
        folder=Path(config.folder),
        schedule=Schedule.from_config(config.scheduler),
        loss=loss,
        examples=held_out,
        generate=pipeline_clips(card, vae.to(device), steps=config.validation.num_inference_steps),
        raw=modules,
        rank=parallel.data_rank,
        world=parallel.data_world,
        total=parallel.sum,
    )

    def validate(averages: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        with undisturbed([*averages.values()]):
            figures = general(averages, step)
            if held_out is not None:
                figures |= caption_losses(config, held_out, loss(averages), general.schedule)
            return figures

    return validate


def caption_losses(config: DiTTraining, clips: WorldClips, loss: Loss, schedule: Schedule) -> dict[str, float]:
    """The loss with the right captions and with wrong ones, and the gap that each kind of word makes by itself.

    The gap moves long before a sampled clip obeys: it is the first sign that the words are read.
    """
    rngs = [draws(SEED, 0, clips.name(i), "captions") for i in range(len(clips))]
    examples = [clips.read(i, rng) for i, rng in enumerate(rngs)]
    noise = torch.stack([draw_noise(rng, one.latents.shape) for rng, one in zip(rngs, examples, strict=True)])
    t = schedule.time((torch.arange(len(clips)) % 8 + 0.5) / 8)

    def mean(captions: list[str]) -> float:
        told = [dataclasses.replace(one, text=words) for one, words in zip(examples, captions, strict=True)]
        return float(loss(told, t, noise).mean())

    captions = [str(one.text) for one in examples]
    figures = {"right_caption_loss": mean(captions), "wrong_caption_loss": mean(captions[1:] + captions[:1])}
    figures |= caption_gaps(mean, [world_scene(config, clips.first + i, held_out=True) for i in range(len(clips))])
    return {name: round(value, 5) for name, value in figures.items()}
