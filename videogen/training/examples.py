"""What training reads: samples by number, each a function of the random numbers it is read with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One sample; its caption and the draw from its posterior were made with the numbers it was read with.

    latents        as generate() denoises them: scaled
    frame_latents  each latent frame's picture encoded alone, as frame conditions show it; None: no such conditions
    text           the caption, or its embedding from a cache
    fps            frames per second of the clip
    """

    latents: Float[Tensor, "f c h w"]
    frame_latents: Float[Tensor, "_f c h w"] | None
    text: str | Float[Tensor, "l e"]
    fps: float


@runtime_checkable
class Examples(Protocol):
    """A set of samples: clips of the world, a cached folder, shards."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Stable and unique: logs and the quarantine list speak of it, random numbers are drawn for it."""
        ...

    def shape(self, index: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns, known without reading the sample."""
        ...

    def read(self, index: int, rng: np.random.Generator) -> Example:
        """The sample, everything random about it drawn from `rng`."""
        ...
