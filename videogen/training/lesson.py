"""What a model of the family learns from samples: the mirror image of generate(), for any of its cards.

The same conditioners, the same constants and padding, the same schedule and the same call of the DiT as in sampling.
A caption may be words or an embedding; who embeds words, with gradients or without, is the caller's affair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from videogen.conditioning import frames, inp
from videogen.config import ConditionsConfig
from videogen.diffusion import objective
from videogen.diffusion.denoiser import Model
from videogen.diffusion.prediction import Prediction, prediction_type
from videogen.diffusion.schedule import Schedule
from videogen.errors import InvalidRequest
from videogen.training.conditions import tell_frames
from videogen.training.examples import Example, Examples
from videogen.types import Conditioning, Latent
from videogen.weights.card import Card

Embed = Callable[[list[str | Tensor]], Float[Tensor, "b l e"]]


@dataclass(frozen=True)
class Told:
    """A sample and which of its frames the model is told; `frame_latents` None: it is told none."""

    example: Example
    frame_latents: Float[Tensor, "f c h w"] | None
    known: Bool[Tensor, " f"]


def told_nothing(example: Example) -> Told:
    return Told(example, None, torch.zeros(len(example.latents), dtype=torch.bool))


def told_frames(example: Example, config: ConditionsConfig, rng: np.random.Generator, done: float) -> Told:
    """Frames by their shares (`conditions.tell_frames`). `done`: how much of the run is.

    Of a clip that was lengthened for patches in time (`Lengthened`), the frames told are those of the clip itself: the
    first stands on the first of the copies, which is where sampling shows it (`conditioning.layouts.canvas`).
    """
    if example.frame_latents is None:
        raise InvalidRequest(
            "these clips have no frames that a model could be told.",
            why="each must have been encoded by itself, as a picture is.",
            hint="videogen data cache CLIPS --frame-latents --out FOLDER",
            param="conditions",
        )
    shown, known = tell_frames(config, example.frame_latents, rng, done)
    copies = len(example.latents) - len(shown)
    shown = torch.cat([shown[:1], shown[:1].expand(copies, *shown.shape[1:]), shown[1:]])
    return Told(example, shown, torch.cat([known[:1], known.new_zeros(copies), known[1:]]))


@dataclass(frozen=True)
class Lengthened:
    """Clips whose latent frames a patch in time divides: copies of the first stand in front of it.

    Sampling makes as many frames and leaves the first out (`Pipeline.padding`), as CogVideoX1.5 was trained.
    """

    examples: Examples
    multiple: int

    def __len__(self) -> int:
        return len(self.examples)

    def name(self, index: int) -> str:
        return self.examples.name(index)

    def shape(self, index: int) -> tuple[int, int, int]:
        f, h, w = self.examples.shape(index)
        return f + -f % self.multiple, h, w

    def read(self, index: int, rng: np.random.Generator) -> Example:
        example = self.examples.read(index, rng)
        first = example.latents[:1]
        copies = first.expand(-len(example.latents) % self.multiple, *first.shape[1:])
        return dataclasses.replace(example, latents=torch.cat([copies, example.latents]))


def lengthened(examples: Examples, card: Card) -> Examples:
    """The examples as this model sees them. CogVideoX-Fun's clips have an even number of latent frames as they are."""
    multiple = card.dit.patch_size_t or 1
    return Lengthened(examples, multiple) if multiple > 1 and card.layout in ("text", "frames") else examples


@dataclass(frozen=True)
class Lesson:
    """The loss of a model like this card's: `lesson(dit, samples, t, noise)`, one number per sample.

    embed     captions, or their embeddings, to text embeddings
    bfloat16  what the network computes in, from float32 weights
    """

    card: Card
    embed: Embed
    device: torch.device
    bfloat16: bool = False

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule.from_config(self.card.scheduler)

    @cached_property
    def prediction(self) -> Prediction:
        return prediction_type(self.card.scheduler)

    def __call__(
        self,
        model: Model,
        samples: Sequence[Told],
        t: Num[Tensor, " b"],
        noise: Latent,
        *,
        where: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, " b"]:
        """`where`: 1 at the latents that count, broadcast against them; None: all count."""
        latents = torch.stack([sample.example.latents for sample in samples]).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            cond = self.condition(samples, latents)
            kind = {"schedule": self.schedule, "prediction": self.prediction}
            return objective.loss(
                lambda x, t: model(x, t, cond), latents, noise.to(self.device), t.to(self.device), where=where, **kind
            )

    def condition(self, samples: Sequence[Told], latents: Latent) -> Conditioning:
        """All that a batch is told, as `Pipeline.condition` tells it."""
        cond = Conditioning(text=self.embed([sample.example.text for sample in samples]).to(self.device))
        if self.card.dit.ofs_embed_dim:
            cond |= Conditioning(vectors={"ofs": torch.full((1,), frames.OFS, device=self.device)})
        if self.card.layout == "inp":
            return cond | inp.absent(latents)
        if self.card.layout != "frames":
            return cond
        shown = [torch.zeros_like(s.example.latents) if s.frame_latents is None else s.frame_latents for s in samples]
        known = torch.stack([sample.known for sample in samples])
        return cond | frames.known_frames(torch.stack(shown).to(self.device), known.to(self.device))
