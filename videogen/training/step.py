"""What the DiT learns: the mirror image of generate(). The same conditioners, the same DiT call, the same schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from videogen.conditioning import frames
from videogen.conditioning.text import ABSENT
from videogen.config import ClipTraining
from videogen.data.world import caption, draw_scene
from videogen.data.world.scene import Scene
from videogen.diffusion import objective
from videogen.diffusion.denoiser import Model
from videogen.diffusion.prediction import Prediction
from videogen.diffusion.schedule import Schedule
from videogen.training.latents import LatentClips
from videogen.types import Conditioning, Latent

TIMESTEPS = {"uniform": objective.uniform, "stratified": objective.stratified, "informative": objective.banded}


@dataclass(frozen=True)
class Batch:
    """One step's samples: clean latents, the latents of their single frames, which of those are told, and the words."""

    latents: Latent
    frame_latents: Latent
    known: Bool[Tensor, "b f"]
    captions: list[str]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.latents.to(device), self.frame_latents.to(device), self.known.to(device), self.captions)


def dit_loss(
    dit: Model,
    embed: Callable[[list[str]], Float[Tensor, "b l e"]],
    batch: Batch,
    t: Num[Tensor, "b"],
    noise: Latent,
    *,
    schedule: Schedule,
    prediction: Prediction = "v_prediction",
    where: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "b"]:
    """The loss of each sample, over the latents that count (`where`). `embed` turns captions into text embeddings."""
    cond = Conditioning(text=embed(batch.captions)) | frames.known_frames(batch.frame_latents, batch.known)
    kind = {"schedule": schedule, "prediction": prediction}
    return objective.loss(lambda x, t: dit(x, t, cond), batch.latents, noise, t, where=where, **kind)


def world_batch(
    config: ClipTraining, clips: LatentClips, step: int, rank: int, world: int, *, frames: int | None = None
) -> Batch:
    """The samples of one step, a function of (seed, step, rank): each clip once per epoch, captions drawn anew.

    frames  of the latent frames only the first, which a causal VAE encodes as if the clip ended there; of 1, one from
            anywhere in the clip, encoded alone, whose caption says nothing of motion. None: all
    """
    first = (step * world + rank) * config.batch_size
    positions = range(first, first + config.batch_size)
    indices = torch.tensor([_shuffled(config.fit.seed, p // len(clips), len(clips))[p % len(clips)] for p in positions])
    generator = torch.Generator().manual_seed(config.fit.seed * 1_000_003 + first)
    rng = np.random.default_rng((config.fit.seed, 1, first))
    still = frames == 1
    if still:
        frame_latents = clips.frames(indices, generator)
        at = torch.from_numpy(rng.integers(frame_latents.shape[1], size=len(indices)))
        latents = frame_latents = frame_latents[torch.arange(len(indices)), at][:, None]
    else:
        latents, frame_latents = (
            clips.video(indices, generator)[:, :frames],
            clips.frames(indices, generator)[:, :frames],
        )
    return Batch(
        latents=latents,
        frame_latents=frame_latents,
        known=draw_known({"none": 1.0} if still else config.frame_conditions, len(indices), latents.shape[1], rng),
        captions=[
            ABSENT if rng.random() < config.caption_dropout else world_caption(config, int(i), rng, still=still)
            for i in indices
        ],
    )


def world_caption(
    config: ClipTraining, index: int, rng: np.random.Generator, *, held_out: bool = False, still: bool = False
) -> str:
    """A fresh wording of what clip `index` of the world shows."""
    return caption(world_scene(config, index, held_out=held_out), rng, dropout=0.25, synonyms=0.3, still=still)


def world_scene(config: ClipTraining, index: int, *, held_out: bool = False) -> Scene:
    """What clip `index` of the world shows."""
    return draw_scene(np.random.default_rng((config.fit.seed, index)), held_out=held_out, **vars(config.world))


def draw_known(
    shares: dict[str, float], batch: int, num_latent_frames: int, rng: np.random.Generator
) -> Bool[Tensor, "b f"]:
    """Which latent frames each sample is told: a mixture of none, first, last, first+last, and random key frames."""
    kinds = rng.choice(list(shares), size=batch, p=np.array(list(shares.values())) / sum(shares.values()))
    known = torch.zeros(batch, num_latent_frames, dtype=torch.bool)
    for row, kind in zip(known, kinds, strict=True):
        if kind == "keyframes":
            row[:] = torch.from_numpy(rng.random(num_latent_frames) < 0.4)
        elif kind != "none":
            for end in kind.split("+"):
                row[{"first": 0, "last": -1}[end]] = True
    return known


_orders: dict[tuple[int, int, int], np.ndarray] = {}


def _shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    key = (seed, epoch, count)
    if key not in _orders:
        _orders.clear()
        _orders[key] = np.random.default_rng((seed, 2, epoch)).permutation(count)
    return _orders[key]
