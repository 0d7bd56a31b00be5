"""Which conditioner fills the channels behind the noise: one function for each `layout` of a model's card.

A layout encodes what a request shows, once, and answers with a function of the frames that are still told: the last one
may end on the way (`last_frame_until`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from videogen.conditioning import control, frames, inp
from videogen.models.vae import VAE
from videogen.types import Conditioning, Pixels


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a request shows a model, in pixels in [-1, 1], and how it is to be encoded.

    like        the noise: its shape [b, f, c, h, w] with padding, its dtype and device
    num_frames  of the clip in pixels
    padding     latent frames in front of the clip's first
    images      known frames [b, 3, H, W] by pixel index, ascending
    video       a control clip, or the one that `mask` (1: to be made) is about; both of the clip's own length
    generators  one per item, for what is sampled
    draw        N(0, 1) of [b, *shape]; asked only if `noisy` (the network was trained with noise on known pixels)
    scale       of the latents of images: "mul", "div", "none", or None for the checkpoint's
    """

    like: Tensor
    num_frames: int
    padding: int = 0
    images: Mapping[int, Float[Tensor, "b 3 H W"]] = field(default_factory=dict)
    video: Pixels | None = None
    mask: Float[Tensor, "b 1 F H W"] | None = None
    generators: Sequence[torch.Generator | None] = ()
    draw: Callable[[Sequence[int]], Tensor] | None = None
    noisy: bool = False
    scale: str | None = None

    @property
    def empty(self) -> bool:
        return not self.images and self.video is None


Told = Callable[[Collection[int]], Conditioning]  # by the pixel indices of the frames that are told


def text(vae: VAE, shown: Shown) -> Told:
    """Models without such channels."""
    return lambda indices: Conditioning()


def canvas(vae: VAE, shown: Shown) -> Told:
    """Single frames, zeros elsewhere. The padding of the 1.5 models stands in front; they are told their first frame
    there, on the latent that is cut off in the end."""
    latents = {k: frames.encode_frames(vae, x, shown.generators, scale=shown.scale) for k, x in shown.images.items()}

    def told(indices: Collection[int]) -> Conditioning:
        filled = torch.zeros_like(shown.like)
        known = torch.zeros(filled.shape[:2], device=filled.device, dtype=torch.bool)
        for index in indices:
            place = frames.slot(index) + (shown.padding if index else 0)
            filled[:, place], known[:, place] = latents[index], True
        return frames.known_frames(filled, known)

    return told


def still(vae: VAE, shown: Shown) -> Told:
    """One image as a clip that stands still."""
    if not shown.images:
        return lambda indices: frames.absent(shown.like)
    told = frames.still(vae, shown.images[0], shown.num_frames, shown.generators)
    return lambda indices: told


def inpaint(vae: VAE, shown: Shown) -> Told:
    """Known frames, known pixels of a clip, or both."""
    if shown.empty:
        return lambda indices: inp.absent(shown.like)
    height, width = (vae.config.spatial_compression * n for n in shown.like.shape[3:])
    shape = len(shown.like), shown.num_frames, height, width
    noise = shown.draw((3, *shape[1:])) if shown.noisy and shown.draw is not None else None

    def told(indices: Collection[int]) -> Conditioning:
        pixels, mask = inp.known_pixels({k: shown.images[k] for k in indices}, shape, shown.like)
        if shown.video is not None and shown.mask is not None:
            pixels, mask = torch.where(mask > 0, shown.video, pixels), mask * shown.mask
        return inp.inpainted(vae, pixels, mask, noise)

    return told


def follow(vae: VAE, shown: Shown) -> Told:
    """A control clip."""
    told = control.absent(shown.like) if shown.video is None else control.controlled(vae, shown.video)
    return lambda indices: told


LAYOUTS: dict[str, Callable[[VAE, Shown], Told]] = {
    "text": text,
    "frames": canvas,
    "image": still,
    "inp": inpaint,
    "control": follow,
    "pose": follow,
}
