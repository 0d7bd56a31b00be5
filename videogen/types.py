"""The letters of every shape in the project, and the two values that travel between rooms.

Lower case is the latent grid, capitals the pixel grid:

    b batch · s tokens of the packed stream · c channels · f h w latent frames, height, width · F H W the same in pixels
    n video tokens · l text tokens · m extra tokens · d width · k heads · e text-embedding width
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

Pixels = Float[Tensor, "b 3 F H W"]  # in [-1, 1]
Latent = Float[Tensor, "b f c h w"]  # diffusers' layout, used everywhere outside the VAE


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told beside the noisy latent and the time. Four mechanisms, no kinds.

    text      [b, l, e]        embeddings that join the token sequence
    channels  [b, f, c', h, w] values aligned with the latent, concatenated behind it on the channel axis
    tokens    [b, m, d]        extra tokens appended to the sequence (reserved for references)
    vectors   name -> [b]      scalars added to the time embedding (`ofs` of CogVideoX1.5-5B-I2V)
    """

    text: Float[Tensor, "b l e"] | None = None
    channels: Float[Tensor, "b f c h w"] | None = None
    tokens: Float[Tensor, "b m d"] | None = None
    vectors: dict[str, Tensor] = field(default_factory=dict)

    def __or__(self, other: Conditioning) -> Conditioning:
        """Both conditionings together: text and tokens follow each other, channels stack, vectors merge."""

        def join(a: Tensor | None, b: Tensor | None, dim: int) -> Tensor | None:
            return b if a is None else a if b is None else torch.cat([a, b], dim)

        return Conditioning(
            text=join(self.text, other.text, 1),
            channels=join(self.channels, other.channels, 2),
            tokens=join(self.tokens, other.tokens, 1),
            vectors={**self.vectors, **other.vectors},
        )

    def replace(self, **changes) -> Conditioning:
        return replace(self, **changes)


@dataclass(frozen=True)
class Segments:
    """Several clips in one stream, one behind the other: each its text, then its video. They do not see each other.

    lengths  tokens of each clip in the whole stream
    runs     what the tokens here are, stretch by stretch: (tokens, clip, modality: 0 video, 1 text)
    """

    lengths: tuple[int, ...]
    runs: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Tokens:
    """The packed stream the transformer blocks see: each token carries what it is.

    Rows are contiguous: text first, then video, so the lookup of a modality is a slice. Where `segments` say that a
    stream holds several clips, it is a batch of one, `time` has a row per clip, and `text_length` is 0.
    """

    x: Float[Tensor, "b s d"]
    position: Int[Tensor, "s 3"] | Float[Tensor, "s 3"] | None  # (t, y, x); None without rotary positions
    time: (
        Float[Tensor, "_b e"] | Int[Tensor, " _b"]
    )  # embedded diffusion time, or with cached modulation its row's index
    text_length: int  # tokens [:text_length] are text, the rest video
    segments: Segments | None = None
