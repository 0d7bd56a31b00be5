"""Distil a model into a student of few steps without guidance: `videogen train configs/train/distill-tiny.yaml`.

Two runs of the one loop. First the student learns to jump along its teacher's guided path, then, in turn with a critic
that follows its samples, to match its teacher's guided distribution (`distill_step.py`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from videogen.conditioning import frames
from videogen.conditioning.text import ABSENT
from videogen.config import ConditionsConfig, DistillTraining, DiTConfig
from videogen.data.files import read_lines
from videogen.diffusion.prediction import prediction_type
from videogen.diffusion.schedule import DiscreteSchedule, Schedule
from videogen.errors import InvalidRequest
from videogen.models.dit import DiT
from videogen.models.text import TextEncoder
from videogen.models.vae import VAE
from videogen.training import lesson
from videogen.training.distill_step import Process, Teacher, Told, consistency_loss, critic_loss, matching_loss, sample
from videogen.training.draws import draw_level, draw_noise, draws
from videogen.training.examples import Example, Examples
from videogen.training.latents import WorldClips, cached_latents, read_latents
from videogen.training.processes import Replicated, join_process_group
from videogen.training.step import Batches, MicroBatches
from videogen.training.trainer import MicroBatch, fit
from videogen.types import Conditioning, Latent
from videogen.weights.card import Card


def train_student(
    config: DistillTraining, teacher: DiT, vae: VAE, text: TextEncoder, card: Card, folder: Path, device: torch.device
) -> DiT:
    """The student (its moving average), in float32 on the CPU."""
    parallel = Replicated(*join_process_group(config.fit.safety.timeout))
    process = Process(Schedule.from_config(card.scheduler), prediction_type(card.scheduler))
    guided = Teacher(teacher.float().eval().requires_grad_(False).to(device), config.guidance_scale, process)
    source = (prompt_source if config.prompts else world_source)(config, vae, text, card, folder, device)
    batches = Batches(source.examples, config, teacher.config)

    student = copy.deepcopy(teacher).train().requires_grad_(True)
    student.gradient_checkpointing = config.gradient_checkpointing
    path = process.schedule.times(config.path_steps)
    times = process.schedule.times(config.num_inference_steps)

    def autocast() -> torch.autocast:
        # Cast anew at each call: a weight that was cast under no_grad would be found in the cache without its gradient.
        return torch.autocast(device.type, torch.bfloat16, enabled=config.fit.bfloat16, cache_enabled=False)

    def drawn(step: int, batch: list[int], part: list[int], epoch: int) -> Numbers:
        return draw_numbers(config, source, step=step, epoch=epoch, batch=batch, part=part, device=device)

    def consistency_at(step: int) -> MicroBatches:
        epoch, batch = batches.at(step)

        def micro_batch(part: list[int]) -> MicroBatch:
            told, latents, names = source.tell(part, epoch)
            assert latents is not None
            numbers = drawn(step, batch, part, epoch)
            place = (numbers.level * config.path_steps).long()
            with autocast():
                loss = consistency_loss(
                    student, guided, told, latents, numbers.noise, place, times=path, jumps=config.path_jumps
                )
            return loss / len(batch), {}, names

        return MicroBatches(batches.parts(batch, parallel), micro_batch)

    settings = dataclasses.asdict(config)
    if config.consistency.steps:
        student = fit(
            {"student": student}, consistency_at, config.consistency, folder / "consistency", settings=settings
        )["student"]
        student = student.train().requires_grad_(True)
    critic = copy.deepcopy(teacher).train().requires_grad_(True)
    critic.gradient_checkpointing = config.gradient_checkpointing
    last: dict[str, float] = {}

    def matching_at(step: int) -> MicroBatches:
        turn = "student" if step % (config.critic_steps + 1) == config.critic_steps else "critic"
        step += config.consistency.steps
        epoch, batch = batches.at(step)
        start = int(draws(config.fit.seed, step, "", "start").integers(config.num_inference_steps))

        def micro_batch(part: list[int]) -> MicroBatch:
            told, _, names = source.tell(part, epoch)
            numbers = drawn(step, batch, part, epoch)
            t = process.schedule.time(0.02 + 0.96 * numbers.level)
            given = (told, numbers.noise, t, start, numbers.more)
            with autocast():
                if turn == "student":
                    loss = matching_loss(student, critic, guided, *given, times=times)
                else:
                    loss = critic_loss(critic, student, *given, times=times, process=process)
            last[f"{turn}_loss"] = float(loss.detach().mean())
            return loss / len(batch), dict(last), names

        return MicroBatches(batches.parts(batch, parallel), micro_batch)

    @torch.no_grad()
    def validate(averages: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        """How much the student's samples differ from one another, against the data: it falls first in a collapse."""
        epoch, batch = batches.at(0)
        part = batch[:16]
        told, latents, _ = source.tell(part, epoch)
        if latents is None:
            return {}
        numbers = drawn(-1, batch, part, epoch)
        average, last = averages["student"], config.num_inference_steps - 1
        made = sample(average, told, numbers.noise, last, numbers.more, times=times, process=process)
        return {"spread": round(float(made.std(dim=0).mean() / latents.std(dim=0).mean()), 4)}

    roles: dict[str, nn.Module] = {"student": student, "critic": critic}
    trained = fit(
        roles,
        matching_at,
        config.fit,
        folder / "matching",
        validate=validate,
        shares={"critic": config.critic_rate},
        averaged=("student",),
        settings=settings,
    )["student"].cpu()
    assert isinstance(trained, DiT)
    return trained


@dataclass(frozen=True)
class Numbers:
    """The random numbers of a micro-batch: each sample has its own."""

    noise: Latent
    level: Float[Tensor, " b"]
    more: Callable[[Tensor], Tensor]  # N(0, 1) like what it is shown, new at each call


def draw_numbers(
    config: DistillTraining,
    source: Source,
    *,
    step: int,
    epoch: int,
    batch: list[int],
    part: list[int],
    device: torch.device,
) -> Numbers:
    seed, names = config.fit.seed, [source.examples.name(i) for i in part]
    rngs = [draws(seed, epoch, f"{step} {name}", "distillation") for name in names]

    def more(like: Tensor) -> Tensor:
        return torch.stack([draw_noise(rng, like.shape[1:]) for rng in rngs]).to(like)

    levels = [draw_level(seed, step, batch.index(i), len(batch), rng) for i, rng in zip(part, rngs, strict=True)]
    noise = more(torch.empty(len(part), *source.shape, device=device))
    return Numbers(noise, torch.tensor(levels, dtype=torch.float64, device=device), more)


@dataclass(frozen=True)
class Source:
    """What the student learns from: `tell(numbers of samples, epoch)` gives what they are told, with the words and
    without, their clean latents if there are any, and their names."""

    examples: Examples
    shape: tuple[int, int, int, int]  # latent frames, channels, rows and columns
    tell: Callable[[list[int], int], tuple[Told, Latent | None, list[str]]]


def world_source(
    config: DistillTraining, vae: VAE, text: TextEncoder, card: Card, folder: Path, device: torch.device
) -> Source:
    """Clips of the world with every condition the teacher was trained on."""
    rank, world = join_process_group()
    shards = cached_latents(config, vae, folder / "latents", device, rank=rank, world=world)
    if world > 1:
        dist.barrier()
    clips, text = WorldClips(config, read_latents(shards, config.clips), float(card.fps)), text.to(device)
    conditions = config.conditions or ConditionsConfig()

    def tell_clips(part: list[int], epoch: int) -> tuple[Told, Latent, list[str]]:
        names, samples = [clips.name(i) for i in part], []
        for i, name in zip(part, names, strict=True):
            rngs = {purpose: draws(config.fit.seed, epoch, name, purpose) for purpose in PURPOSES}
            example = clips.read(i, rngs["sample"])
            if rngs["dropout"].random() < config.caption_dropout:
                example = dataclasses.replace(example, text=ABSENT)
            samples.append(lesson.told_frames(example, conditions, rngs["condition"], 1.0))
        words = text([str(sample.example.text) for sample in samples])
        latents = torch.stack([sample.example.latents for sample in samples]).to(device)
        return tell(card.dit, words, text([ABSENT]), samples), latents, names

    return Source(clips, card.latent_shape(config.height, config.width, config.num_frames), tell_clips)


PURPOSES = ("sample", "dropout", "condition")


@dataclass(frozen=True)
class Prompts:
    """Lines of text in the place of samples, all of one shape; read are only their names."""

    lines: Sequence[str]
    latents: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.lines)

    def name(self, index: int) -> str:
        return f"prompt {index}"

    def shape(self, index: int) -> tuple[int, int, int]:
        return self.latents

    def read(self, index: int, rng: np.random.Generator) -> Example:
        raise TypeError("prompts have no latents")


def prompt_source(
    config: DistillTraining, vae: VAE, text: TextEncoder, card: Card, folder: Path, device: torch.device
) -> Source:
    """Prompts alone, a line each, encoded once: matching needs no clips. Known frames are never told."""
    lines = read_lines(config.prompts)
    if not lines or config.consistency.steps:
        raise InvalidRequest(
            f"{config.prompts} holds no prompts." if not lines else "the consistency phase needs clips.",
            why="" if not lines else "its paths start from noised latents, and prompts have none.",
            hint="one prompt per line." if not lines else "consistency.steps=0",
            param="prompts" if not lines else "consistency.steps",
        )
    shape = card.latent_shape(config.height, config.width, config.num_frames)
    text = text.to(device)
    embeddings = torch.cat([text([line]).cpu() for line in lines])
    absent = text([ABSENT])
    text.cpu()  # as large as the transformer of 2B, and done
    prompts = Prompts(lines * -(-config.batch_size // len(lines)), (shape[0], shape[2], shape[3]))

    def tell_prompts(part: list[int], epoch: int) -> tuple[Told, None, list[str]]:
        rows = embeddings[[i % len(lines) for i in part]].to(device)
        return tell(card.dit, rows, absent, None), None, [prompts.name(i) for i in part]

    return Source(prompts, shape, tell_prompts)


def tell(model: DiTConfig, text: Tensor, absent: Tensor, samples: Sequence[lesson.Told] | None) -> Told:
    """Words, known frames and constants, with the words and without, as the pipeline tells them."""
    rest = Conditioning()
    if model.ofs_embed_dim:
        rest |= Conditioning(vectors={"ofs": torch.full((1,), frames.OFS, device=text.device)})
    if model.in_channels > model.out_channels:
        if samples is None:
            raise InvalidRequest(
                "prompts alone do not train a model that is told frames.", hint="clips of the world.", param="prompts"
            )
        shown = torch.stack([sample.frame_latents for sample in samples if sample.frame_latents is not None])
        known = torch.stack([sample.known for sample in samples])
        rest |= frames.known_frames(shown.to(text.device), known.to(text.device))
    return Told(Conditioning(text=text) | rest, Conditioning(text=absent.expand_as(text)) | rest)


def few_step_scheduler(config: dict) -> dict:
    """The `scheduler_config.json` with which diffusers samples a student as our `lcm` does: an LCMScheduler.

    It has no `snr_shift_scale`, so a shifted schedule is written out as betas.
    """
    schedule = Schedule.from_config({**config, "rescale_betas_zero_snr": False})
    if not isinstance(schedule, DiscreteSchedule):
        raise InvalidRequest("diffusers has no sampler for few-step students of flow models.", param="teacher")
    ours = config.get("_class_name", "").startswith("CogVideoX")  # they have defaults of their own
    if config.get("snr_shift_scale", 3.0 if ours else 1.0) != 1 or "trained_betas" in config:
        table = schedule.alphas_cumprod
        betas: dict = {"trained_betas": (1 - table / torch.cat([table.new_ones(1), table[:-1]])).tolist()}
    else:
        usual = (0.00085, 0.012, "scaled_linear") if ours else (0.0001, 0.02, "linear")
        names = ("beta_start", "beta_end", "beta_schedule")
        betas = {name: config.get(name, value) for name, value in zip(names, usual, strict=True)}
    return betas | {
        "_class_name": "LCMScheduler",
        "num_train_timesteps": schedule.num_train_timesteps,
        "original_inference_steps": schedule.num_train_timesteps,  # so that n steps are at our times
        "prediction_type": config["prediction_type"],
        "rescale_betas_zero_snr": config.get("rescale_betas_zero_snr", False),
        "set_alpha_to_one": True,
        "timestep_spacing": "trailing",
        "clip_sample": False,
    }
