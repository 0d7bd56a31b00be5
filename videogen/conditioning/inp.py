"""A clip known in part, in space or time: the inpainting models of CogVideoX-Fun ("InP", 33 input channels).

Behind the noise (16) stand a mask (1) and the latents (16) of the clip with its unknown pixels black. The rules are
those of the models' own pipeline (aigc-apps/VideoX-Fun, pipeline_cogvideox_fun_inpaint.py) and of its training script:
both say 1 for what is to be made and give the network the opposite, scaled like a latent.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from videogen.models.vae import VAE
from videogen.types import Conditioning, Latent, Pixels

Mask = Float[Tensor, "b 1 F H W"]  # 1: to be made, 0: known
BLACK = -1.0
NOISE = 0.0563  # standard deviation in [-1, 1] of the noise on known pixels, for models trained with some


def known_pixels(
    images: Mapping[int, Float[Tensor, "b 3 H W"]], shape: tuple[int, ...], like: Tensor
) -> tuple[Pixels, Mask]:
    """A clip of `shape` (b, F, H, W) in which only these frames are known, by index, and its mask."""
    b, frames, height, width = shape
    pixels, mask = like.new_full((b, 3, frames, height, width), BLACK), like.new_ones((b, 1, frames, height, width))
    for index, image in images.items():
        pixels[:, :, index], mask[:, :, index] = image, 0
    return pixels, mask


def inpainted(vae: VAE, pixels: Pixels, mask: Mask, noise: Pixels | None = None) -> Conditioning:
    """The scaled mask [b, f, 1, h, w] and the mode of the masked clip's latents, in this order.

    A clip of which nothing is known is the absence of the condition: zeros, also for the latents. `noise`: N(0, 1) for
    the models with `add_noise_in_inpaint_model`, added to all pixels but black ones.
    """
    mask = (mask >= 0.5).to(pixels.dtype)
    pixels = torch.where(mask > 0, BLACK, pixels)
    if noise is not None:
        pixels = torch.where(pixels == BLACK, pixels, pixels + NOISE * noise)
    latents = rearrange(torch.cat([vae.encode(clip[None]) for clip in pixels]), "b c f h w -> b f c h w")
    if bool(mask.all()):
        return absent(latents)
    _, f, _, h, w = latents.shape
    return Conditioning(channels=torch.cat([vae.config.scaling_factor * known_share(mask, f, h, w), latents], dim=2))


def known_share(mask: Mask, f: int, h: int, w: int) -> Float[Tensor, "b f 1 h w"]:
    """How much of each latent pixel is known, by linear interpolation: the first frame by itself, then the others.

    Of four frames only the middle two are looked at. So a known last frame leaves no trace here, only in the latents.
    """
    known = 1 - mask
    parts = [F.interpolate(known[:, :, :1], size=(1, h, w), mode="trilinear", align_corners=False)]
    if f > 1:
        parts.append(F.interpolate(known[:, :, 1:], size=(f - 1, h, w), mode="trilinear", align_corners=False))
    return rearrange(torch.cat(parts, dim=2), "b 1 f h w -> b f 1 h w")


def absent(latents: Latent) -> Conditioning:
    """Nothing is known: zeros. In training 9 of 10 clips without a known pixel are told this, the others black ones."""
    return Conditioning(channels=torch.cat([torch.zeros_like(latents[:, :, :1]), torch.zeros_like(latents)], dim=2))
