"""Known frames: first, last and key frames share one canvas of latents, concatenated behind the noisy ones.

The order of channels is part of the weights: 32 input channels are noise 16 and frame latents 16, zeros where no frame
is known (CogVideoX-5B-I2V, its interpolation derivative, the bundled model). One derivative of 2B has the same 32, and
was trained with the still image on every frame (`still`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from videogen.models.vae import VAE
from videogen.types import Conditioning, Latent

OFS = 2.0  # the constant CogVideoX1.5-5B-I2V was trained with and is always told


def known_frames(latents: Latent, known: Bool[Tensor, "b f"]) -> Conditioning:
    """The frames of `latents` that are known, zeros elsewhere. Nothing known is the absence of the condition."""
    return Conditioning(channels=latents * rearrange(known, "b f -> b f 1 1 1"))


def absent(latents: Latent) -> Conditioning:
    return known_frames(
        torch.zeros_like(latents), torch.zeros(latents.shape[:2], dtype=torch.bool, device=latents.device)
    )


def encode_frames(
    vae: VAE,
    images: Float[Tensor, "b 3 H W"],
    generators: Sequence[torch.Generator | None],
    *,
    scale: str | None = None,
) -> Float[Tensor, "b c h w"]:
    """Scaled latents of still images, each encoded as a clip of one frame: a sample of the posterior (one generator per
    image, drawn from in turn), or its mode where the generator is None.

    scale  "mul": times the VAE's scaling factor, as every clip is; "div": divided by it; "none": neither. None is the
           checkpoint's, as diffusers reads it: CogVideoX1.5-5B-I2V (`invert_scale_latents`) divides, others multiply
    """
    latents = torch.cat(
        [vae.encode(image[None, :, None], generator) for image, generator in zip(images, generators, strict=True)]
    )
    scale = scale or ("div" if vae.config.invert_scale_latents else "mul")
    if scale != "mul":
        latents = latents / vae.config.scaling_factor ** (2 if scale == "div" else 1)
    return rearrange(latents, "b c 1 h w -> b c h w")


def still(
    vae: VAE, images: Float[Tensor, "b 3 H W"], num_frames: int, generators: Sequence[torch.Generator | None]
) -> Conditioning:
    """The images as clips that stand still, encoded whole: what NimVideo/cogvideox-2b-img2vid is told (its pipeline).

    Drawn and scaled as in `encode_frames`. The latent of the first frame differs from the others, as in any clip.
    """
    clips = images[:, :, None].expand(-1, -1, num_frames, -1, -1)
    latents = [vae.encode(clip[None], generator) for clip, generator in zip(clips, generators, strict=True)]
    return Conditioning(channels=rearrange(torch.cat(latents), "b c f h w -> b f c h w"))


def slot(index: int, ratio: int = 4) -> int:
    """The latent frame that holds pixel frame `index`: 0, or the one whose last frame it is.

    >>> slot(0), slot(4), slot(16)
    (0, 1, 4)
    """
    if index % ratio:
        raise ValueError(f"frame {index} is not the last of a latent frame")
    return index // ratio
