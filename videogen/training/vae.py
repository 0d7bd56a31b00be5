"""Train a VAE, on the procedural world or a folder of clips: `videogen train configs/train/tiny_vae.yaml`."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from videogen.config import ClipStage, VAEConfig, VAETraining
from videogen.data.files import written
from videogen.data.video import read_video
from videogen.data.world import clip
from videogen.distributed.vae_training import TimeParallel, share_time, time_parallel
from videogen.errors import InvalidRequest
from videogen.models.vae import VAE
from videogen.training.discriminator import Discriminator
from videogen.training.draws import draw_noise, draws
from videogen.training.ema import ema_copy
from videogen.training.perceptual import perceptual
from videogen.training.processes import Parallel, Replicated, join_process_group
from videogen.training.trainer import MicroBatch, fit
from videogen.training.vae_step import (
    Time,
    WholeClips,
    init_vae,
    latent_statistics,
    scaling_factor,
    unit_variance,
    vae_losses,
)
from videogen.weights.diffusers import load_vae
from videogen.weights.hub import find_model

CLIP_FILES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".webp"}
JUDGED = 8  # clips that are never trained on, on which every saved state is judged
MEASURED = 64  # of these, that the latents are measured on at the end


def train_vae(config: VAETraining, folder: Path, device: torch.device) -> VAE:
    """The trained VAE (moving average), its latents brought to a unit as `config.latents` says, float32 on the CPU.

    What was measured of the latents stands in `folder/latents.json`.
    """
    rank, world = join_process_group(config.fit.safety.timeout)
    torch.manual_seed(config.fit.seed)
    vae = first_vae(config).to(device)
    average = ema_copy(vae)  # before the VAE is made ready for training: it is judged as it will be used
    check(config, vae.config)
    modules: dict[str, nn.Module] = {"vae": vae}
    if config.gan:
        modules["discriminator"] = Discriminator(config.gan.channels, config.gan.layers).to(device)
    vae.encoder.requires_grad_(config.train_encoder)
    vae.gradient_checkpointing = config.gradient_checkpointing
    if config.whole_clips:
        longest = max(stage.num_frames for stage in config.stages)
        vae.config = dataclasses.replace(vae.config, frame_batch_size=longest, latent_batch_size=longest)

    parallel: Parallel = Replicated(rank, world)
    times: dict[int, Time] = {}  # of clips whose frames are shared, by their length
    if config.time_parallel > 1:
        shared = parallel = time_parallel(config.time_parallel)
        lengths = {stage.num_frames for stage in config.stages} - {1}
        times = {length: share_time(vae, length, shared.group) for length in lengths}

    clips = training_clips(config)
    trained = fit(
        modules,
        functools.partial(losses_at, config, modules, clips, parallel=parallel, times=times, device=device),
        config.fit,
        folder,
        parallel=parallel,
        validate=lambda averages, step: validate(averages["vae"], clips.held_out(JUDGED), device),
        shares={"discriminator": config.gan.rate} if config.gan else None,
        averages={"vae": average},
        settings=dataclasses.asdict(config),
    )
    average = trained["vae"]
    assert isinstance(average, VAE)
    facts = settle_latents(average, clips.held_out(MEASURED), config.latents)
    if rank == 0:
        with written(folder / "latents.json") as part:
            part.write_text(json.dumps(facts, indent=1))
    return average.cpu()


def first_vae(config: VAETraining) -> VAE:
    """The VAE that training begins with, in float32."""
    if config.start:
        return load_vae(find_model(config.start, weights=("vae",)), dtype=torch.float32).train()
    vae = VAE(config.model)
    init_vae(vae)
    return vae


def check(config: VAETraining, vae: VAEConfig) -> None:
    """Refuse, before anything is computed, what could not work. Raises InvalidRequest."""

    def refuse(what: str, why: str, param: str) -> InvalidRequest:
        return InvalidRequest(what, why=why, hint="correct the training file.", param=param)

    if config.start and config.model not in (VAEConfig(), vae):
        raise refuse("model says another VAE than start.", "a VAE that goes on learning keeps its shape.", "model")
    if not config.train_encoder and not config.start:
        raise refuse("train_encoder=false without a start.", "an encoder that learned nothing says nothing.", "start")
    if config.latents not in ("unit_variance", "scaling_factor", "keep"):
        raise refuse(f"latents is {config.latents!r}.", "unit_variance, scaling_factor or keep.", "latents")
    if not config.train_encoder and config.latents != "keep":
        raise refuse(f"latents={config.latents} with train_encoder=false.", "the latents stay as they are.", "latents")
    frames, space = 2 * int(vae.temporal_compression_ratio), vae.spatial_compression
    for stage in config.stages:
        if stage.num_frames % frames != 1 or stage.size % space:
            raise refuse(
                f"a stage has clips of {stage.num_frames} frames of {stage.size} pixels.",
                f"this VAE gives back 1, {frames + 1}, {2 * frames + 1}, ... frames, and multiples of {space} pixels.",
                "stages",
            )


# Batches ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """What all processes together see in a step: samples `first`, `first` + 1, ... of the stream, as crops."""

    first: int
    count: int
    num_frames: int
    size: int
    micro_batch_size: int  # 0: all that a process has


def batch_at(config: VAETraining, step: int) -> Batch:
    """Clips, or in a share of a stage's steps single frames: as many as half of the clips' frames.

    Steps past the end belong to the last stage.
    """
    first = begin = 0
    for stage in config.stages:
        is_last = stage is config.stages[-1]
        done = step - begin if is_last else min(step - begin, stage.steps)
        images = int((begin + done) * stage.image_share) - int(begin * stage.image_share)
        first += stage.batch_size * (done - images + images * _images_per_clip(stage))
        if is_last or step < begin + stage.steps:
            is_image = int((step + 1) * stage.image_share) > int(step * stage.image_share)
            many, frames = (_images_per_clip(stage), 1) if is_image else (1, stage.num_frames)
            return Batch(first, stage.batch_size * many, frames, stage.size, stage.micro_batch_size * many)
        begin += stage.steps
    raise InvalidRequest("the training has no stages.", hint="stages: one or more.", param="stages")


def _images_per_clip(stage: ClipStage) -> int:
    return max(1, stage.num_frames // 2)


def losses_at(
    config: VAETraining,
    modules: dict[str, nn.Module],
    clips: Clips,
    step: int,
    *,
    parallel: Parallel,
    times: dict[int, Time],
    device: torch.device,
) -> Iterator[MicroBatch]:
    """This process's micro-batches of a step (`trainer.fit`)."""
    vae, gan, batch, seed = modules["vae"], config.gan, batch_at(config, step), config.fit.seed
    assert isinstance(vae, VAE)
    plays = gan is not None and step >= gan.start

    def losses(numbers: Sequence[int]) -> tuple[Float[Tensor, " n"], dict[str, float]]:
        if not numbers:  # more processes than single frames
            return 0 * vae.decoder.conv_out.weight.sum().expand(0), {}
        names = [clips.name(number) for number in numbers]
        crops = [clips.crop(n, batch, draws(seed, step, name, "crop")) for n, name in zip(numbers, names, strict=True)]
        shape = vae.latent_shape(batch.num_frames, batch.size, batch.size)
        noise = [draw_noise(draws(seed, step, name, "noise"), shape) for name in names]
        with torch.autocast(device.type, torch.bfloat16, enabled=config.fit.bfloat16):
            return vae_losses(
                vae,
                as_pixels(crops).to(device),
                torch.stack(noise).to(device),
                config,
                distance=_distance(config.perceptual, device),
                discriminator=modules["discriminator"] if plays else None,
                is_judged=gan is not None and step >= gan.start + gan.head_start,
                time=times.get(batch.num_frames) or WholeClips(),
            )

    own = range(batch.first, batch.first + batch.count)[parallel.data_rank :: parallel.data_world]
    size = batch.micro_batch_size or max(1, len(own))
    for numbers in (own[i : i + size] for i in range(0, len(own), size)):
        if batch.num_frames == 1 and isinstance(parallel, TimeParallel):
            loss, facts = losses(parallel.own_samples(numbers))
            loss = parallel.all_losses(loss, len(numbers))
        else:
            loss, facts = losses(numbers)
        yield loss / batch.count, facts, [clips.name(number) for number in numbers]


@functools.cache
def _distance(name: str, device: torch.device) -> Any:
    return perceptual(name, device) if name else None


# Where clips come from ----------------------------------------------------------------------------------------------


@runtime_checkable
class Clips(Protocol):
    """A stream of clips by number, without end."""

    def name(self, number: int) -> str: ...

    def crop(self, number: int, batch: Batch, rng: np.random.Generator) -> Float[np.ndarray, "f s s 3"]:
        """A part of clip `number`, in [0, 1]: `batch.num_frames` frames of `batch.size` pixels square."""
        ...

    def held_out(self, count: int) -> Float[Tensor, "n 3 F H W"]:
        """At most so many clips that are never trained on, in [-1, 1]; where there are none, of those that are."""
        ...


def training_clips(config: VAETraining) -> Clips:
    return FolderClips(config, clip_files(config.clips)) if config.clips else WorldClips(config)


@dataclass(frozen=True)
class WorldClips:
    """New clips of the procedural world for ever."""

    config: VAETraining

    def name(self, number: int) -> str:
        return f"world/{number}"

    def crop(self, number: int, batch: Batch, rng: np.random.Generator) -> Float[np.ndarray, "f s s 3"]:
        return cut(self._clip(number, self.config.fit.seed, held_out=False), batch, rng)

    def held_out(self, count: int) -> Float[Tensor, "n 3 F H W"]:
        return as_pixels([self._clip(i, 10**6, held_out=True) for i in range(count)])

    def _clip(self, number: int, seed: int, *, held_out: bool) -> np.ndarray:
        c = self.config
        kind = {"num_frames": c.num_frames, "height": c.height, "width": c.width, **vars(c.world)}
        return clip(number, seed=seed, held_out=held_out, **kind)[1]


@dataclass(frozen=True)
class FolderClips:
    """The files of a folder, in an order of its own in each epoch; the last tenth is held out, 64 at most."""

    config: VAETraining
    files: Sequence[Path]

    @property
    def count(self) -> int:
        """How many are trained on: all, of fewer than ten."""
        return len(self.files) - min(MEASURED, len(self.files) // 10)

    def _place(self, number: int) -> tuple[int, int]:
        epoch, place = divmod(number, self.count)
        return epoch, int(draws(self.config.fit.seed, epoch, "", "order").permutation(self.count)[place])

    def name(self, number: int) -> str:
        epoch, place = self._place(number)
        return f"{self.files[place].relative_to(self.config.clips).as_posix()}/{epoch}"

    def crop(self, number: int, batch: Batch, rng: np.random.Generator) -> Float[np.ndarray, "f s s 3"]:
        return cut(self._read(self.files[self._place(number)[1]], batch.num_frames, batch.size), batch, rng)

    def held_out(self, count: int) -> Float[Tensor, "n 3 F H W"]:
        stage = self.config.stages[-1]
        files = self.files[self.count :] or self.files
        batch = Batch(0, len(files), stage.num_frames, stage.size, 0)
        return as_pixels(
            [
                cut(self._read(path, stage.num_frames, stage.size), batch, draws(0, 0, path.name, "held out"))
                for path in files[:count]
            ]
        )

    def _read(self, path: Path, least_frames: int, size: int) -> np.ndarray:
        """All frames, the shorter side `size`: what a model at that size will see."""
        frames, _ = read_video(path)
        if len(frames) < least_frames:
            raise InvalidRequest(
                f"{path} has {len(frames)} frames.",
                why=f"a stage of the training takes clips of {least_frames}.",
                hint="a folder without it, or stages of shorter clips.",
                param="clips",
            )
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
        share = size / min(pixels.shape[2:])
        if share != 1:
            sides = [max(size, round(side * share)) for side in pixels.shape[2:]]
            pixels = F.interpolate(pixels, sides, mode="bicubic", antialias=share < 1).clamp(0, 1)
        return pixels.permute(0, 2, 3, 1).numpy()


def clip_files(folder: str) -> list[Path]:
    """The clips in a folder and below, by name. Raises InvalidRequest if there are none."""
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in CLIP_FILES)
    if not files:
        raise InvalidRequest(
            f"{folder} holds no clips.",
            why=f"looked for {', '.join(sorted(CLIP_FILES))}.",
            param="clips",
            hint="check it.",
        )
    return files


def cut(video: Float[np.ndarray, "F H W 3"], batch: Batch, rng: np.random.Generator) -> Float[np.ndarray, "f s s 3"]:
    """A random part of a clip in time and space."""
    parts = (batch.num_frames, batch.size, batch.size)
    t, y, x = (int(rng.integers(0, whole - part + 1)) for whole, part in zip(video.shape[:3], parts, strict=True))
    return np.asarray(video[t : t + parts[0], y : y + parts[1], x : x + parts[2]], dtype=np.float32)


def as_pixels(videos: Sequence[np.ndarray]) -> Float[Tensor, "n 3 F H W"]:
    return torch.from_numpy(np.stack(videos).astype(np.float32)).permute(0, 4, 1, 2, 3) * 2 - 1


# At the end ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(vae: nn.Module, pixels: Float[Tensor, "n 3 F H W"], device: torch.device) -> dict[str, float]:
    """Mean PSNR in dB over held-out clips, and over their first frames alone, through the posterior's mode."""
    assert isinstance(vae, VAE)
    figures = {}
    for name, part in (("held_out_psnr", pixels), ("held_out_image_psnr", pixels[:, :, :1])):
        error = [vae.decode(vae.encode(one.to(device))).clamp(-1, 1).cpu() - one for one in part.split(1)]
        mse = torch.stack([e.square().mean() for e in error])
        figures[name] = round(float((10 * torch.log10(4 / mse)).mean()), 2)
    return figures


def settle_latents(vae: VAE, clips: Float[Tensor, "n 3 F H W"], how: str) -> dict[str, Any]:
    """Bring the latents to a unit, in place, and say what was measured before.

    how  "unit_variance": each channel by itself, folded into the weights, and the scaling factor is 1.
         "scaling_factor": all channels together, as the published VAEs have it. "keep": as they are.
    """
    mean, std = latent_statistics(vae, clips)
    measured = scaling_factor(mean, std)
    if how == "unit_variance":
        unit_variance(vae, std)
    if how != "keep":
        factor = 1.0 if how == "unit_variance" else measured
        vae.config = dataclasses.replace(vae.config, scaling_factor=factor)
    return {
        "clips": len(clips),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "measured_scaling_factor": measured,
        "latents": how,
        "scaling_factor": vae.config.scaling_factor,
    }
