"""A clip whose structure is followed, such as edges, depth or poses: CogVideoX-Fun Control and Pose (32 channels).

Behind the noise (16) stand the latents (16) of the whole control clip: the mode of the posterior, scaled as any clip.
"""

from __future__ import annotations

import torch
from einops import rearrange

from videogen.models.vae import VAE
from videogen.types import Conditioning, Latent, Pixels


def controlled(vae: VAE, video: Pixels) -> Conditioning:
    """The latents [b, f, c, h, w] of control clips [b, 3, F, H, W], which have the size and length of the result."""
    latents = torch.cat([vae.encode(clip[None]) for clip in video])
    return Conditioning(channels=rearrange(latents, "b c f h w -> b f c h w"))


def absent(latents: Latent) -> Conditioning:
    """No control, for training with dropout. The published models were always told a clip."""
    return Conditioning(channels=torch.zeros_like(latents))
