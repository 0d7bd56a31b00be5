"""Distil a model into a student of few steps without guidance: `videogen train configs/train/distill-tiny.yaml`.

Two runs of the one loop. First the student learns to jump along its teacher's guided path, then, in turn with a critic
that follows its samples, to match its teacher's guided distribution (`distill_step.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from videogen.conditioning import frames
from videogen.conditioning.text import ABSENT
from videogen.config import DistillTraining, DiTConfig
from videogen.diffusion.prediction import prediction_type
from videogen.diffusion.schedule import DiscreteSchedule, Schedule
from videogen.errors import InvalidRequest
from videogen.models.dit import DiT
from videogen.models.text import TextEncoder
from videogen.models.vae import VAE
from videogen.training.distill_step import Process, Teacher, Told, consistency_loss, critic_loss, matching_loss, sample
from videogen.training.latents import cached_latents, read_latents
from videogen.training.step import Batch, world_batch
from videogen.training.trainer import Facts, fit, join_process_group
from videogen.types import Conditioning, Latent
from videogen.weights.card import Card

Source = Callable[[int], tuple[Told, Latent | None]]  # a step's samples: what they are told, clean latents if any


def train_student(
    config: DistillTraining, teacher: DiT, vae: VAE, text: TextEncoder, card: Card, folder: Path, device: torch.device
) -> DiT:
    """The student (its moving average), in float32 on the CPU."""
    process = Process(Schedule.from_config(card.scheduler), prediction_type(card.scheduler))
    guided = Teacher(teacher.float().eval().requires_grad_(False).to(device), config.guidance_scale, process)
    samples = (prompt_source if config.prompts else world_source)(config, vae, text, teacher.config, folder, device)
    shape = (config.batch_size, *card.latent_shape(config.height, config.width, config.num_frames))
    rank = join_process_group()[0]

    student = copy.deepcopy(teacher).train().requires_grad_(True)
    student.gradient_checkpointing = config.gradient_checkpointing
    path = process.schedule.times(config.path_steps)
    times = process.schedule.times(config.num_inference_steps)

    def generator(step: int) -> torch.Generator:
        return torch.Generator().manual_seed((config.fit.seed * 1_000_003 + step) * 64 + rank)

    def autocast() -> torch.autocast:
        # Cast anew at each call: a weight that was cast under no_grad would be found in the cache without its gradient.
        return torch.autocast(device.type, torch.bfloat16, enabled=config.fit.bfloat16, cache_enabled=False)

    def consistency_at(step: int) -> tuple[Tensor, Facts]:
        numbers, (told, latents) = generator(step), samples(step)
        assert latents is not None
        noise = torch.randn(shape, generator=numbers).to(device)
        place = torch.randint(config.path_steps, shape[:1], generator=numbers).to(device)
        with autocast():
            loss = consistency_loss(student, guided, told, latents, noise, place, times=path, jumps=config.path_jumps)
        return loss.mean(), {"samples": len(loss)}

    if config.consistency.steps:
        student = fit({"student": student}, consistency_at, config.consistency, folder / "consistency")["student"]
        student = student.train().requires_grad_(True)
    critic = copy.deepcopy(teacher).train().requires_grad_(True)
    critic.gradient_checkpointing = config.gradient_checkpointing
    last: Facts = {}

    def matching_at(step: int) -> tuple[Tensor, Facts]:
        numbers, (told, _) = generator(config.consistency.steps + step), samples(config.consistency.steps + step)

        def draw(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=numbers).to(like)

        noise = draw(torch.empty(shape, device=device))
        t = process.schedule.time(0.02 + 0.96 * torch.rand(shape[0], generator=numbers)).to(device)
        start = int(torch.randint(config.num_inference_steps, (), generator=numbers))
        turn = "student" if step % (config.critic_steps + 1) == config.critic_steps else "critic"
        with autocast():
            if turn == "student":
                loss = matching_loss(student, critic, guided, told, noise, t, start, draw, times=times).mean()
            else:
                loss = critic_loss(critic, student, told, noise, t, start, draw, times=times, process=process).mean()
        last[f"{turn}_loss"] = float(loss.detach())
        return loss, {"samples": shape[0], **last}

    @torch.no_grad()
    def validate(averages: dict[str, nn.Module]) -> dict[str, float]:
        """How much the student's samples differ from one another, against the data: it falls first in a collapse."""
        numbers, (told, latents) = generator(10**9), samples(0)
        if latents is None:
            return {}
        made = sample(
            averages["student"],
            told,
            torch.randn(shape, generator=numbers).to(device),
            config.num_inference_steps - 1,
            lambda x: torch.randn(x.shape, generator=numbers).to(x),
            times=times,
            process=process,
        )
        return {"spread": round(float(made.std(dim=0).mean() / latents.std(dim=0).mean()), 4)}

    roles: dict[str, nn.Module] = {"student": student, "critic": critic}
    shares = {"critic": config.critic_rate}
    trained = fit(
        roles, matching_at, config.fit, folder / "matching", validate=validate, shares=shares, averaged=("student",)
    )["student"].cpu()
    assert isinstance(trained, DiT)
    return trained


def world_source(
    config: DistillTraining, vae: VAE, text: TextEncoder, model: DiTConfig, folder: Path, device: torch.device
) -> Source:
    """Clips of the world with every condition the teacher was trained on: see `world_batch`."""
    rank, world = join_process_group()
    shards = cached_latents(config, vae, folder / "latents", device, rank=rank, world=world)
    if world > 1:
        dist.barrier()
    clips, text = read_latents(shards, config.clips), text.to(device)

    def samples(step: int) -> tuple[Told, Latent | None]:
        batch = world_batch(config, clips, step, rank, world).to(device)
        return tell(model, text(batch.captions), text([ABSENT]), batch), batch.latents

    return samples


def prompt_source(
    config: DistillTraining, vae: VAE, text: TextEncoder, model: DiTConfig, folder: Path, device: torch.device
) -> Source:
    """Prompts alone, a line each, encoded once: matching needs no clips. Known frames are never told."""
    rank, world = join_process_group()
    lines = [line.strip() for line in Path(config.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines or config.consistency.steps:
        raise InvalidRequest(
            f"{config.prompts} holds no prompts." if not lines else "the consistency phase needs clips.",
            why="" if not lines else "its paths start from noised latents, and prompts have none.",
            hint="one prompt per line." if not lines else "consistency.steps=0",
            param="prompts" if not lines else "consistency.steps",
        )
    text = text.to(device)
    embeddings = torch.cat([text([line]).cpu() for line in lines])
    absent = text([ABSENT])
    text.cpu()  # as large as the transformer of 2B, and done

    def samples(step: int) -> tuple[Told, Latent | None]:
        first = (step * world + rank) * config.batch_size
        generator = torch.Generator().manual_seed(config.fit.seed * 1_000_003 + first)
        rows = torch.randint(len(lines), (config.batch_size,), generator=generator)
        return tell(model, embeddings[rows].to(device), absent, None), None

    return samples


def tell(model: DiTConfig, text: Tensor, absent: Tensor, batch: Batch | None) -> Told:
    """Words, known frames and constants, with the words and without, as the pipeline tells them."""
    rest = Conditioning()
    if model.ofs_embed_dim:
        rest |= Conditioning(vectors={"ofs": torch.full((1,), frames.OFS, device=text.device)})
    if model.in_channels > model.out_channels:
        if batch is None:
            raise InvalidRequest(
                "prompts alone do not train a model that is told frames.", hint="clips of the world.", param="prompts"
            )
        rest |= frames.known_frames(batch.frame_latents, batch.known)
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
