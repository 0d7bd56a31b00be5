"""What a VAE learns: to give back the clip it saw, through a latent that stays near a unit Gaussian."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from videogen.config import VAETraining
from videogen.data.world import clip
from videogen.models.vae import VAE


def vae_loss(
    vae: VAE,
    pixels: Float[Tensor, "b 3 F H W"],
    *,
    generator: torch.Generator,
    kl_weight: float,
    detail_weight: float,
) -> tuple[Tensor, dict[str, float]]:
    """L1 and squared error of the reconstruction, heavier on edges and motion, plus the KL divergence per latent value
    (arXiv:1312.6114). L1 alone starts slowly (it likes the median colour), squares alone end blurred."""
    mean, logvar = vae.moments(pixels)
    mean, logvar = mean.float(), logvar.float()
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    latents = (mean + torch.exp(0.5 * logvar) * noise) * vae.config.scaling_factor
    error = (vae.decode(latents).float() - pixels).abs()
    weight = 1 + detail_weight * detail(pixels)
    reconstruction = (weight * (error + 4 * error.square())).mean() / weight.mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    mse = error.detach().square().mean(dim=(1, 2, 3, 4))
    psnr = (10 * torch.log10(4 / mse)).mean()
    facts = {"l1": float(error.detach().mean()), "psnr": float(psnr), "kl": float(kl.detach())}
    return reconstruction + kl_weight * kl, facts


@torch.no_grad()
def detail(pixels: Float[Tensor, "b 3 F H W"], threshold: float = 0.08) -> Float[Tensor, "b 1 F H W"]:
    """1 within a pixel of an edge or of something that moves, else 0: flat still ground is easy, and most of it all."""
    change = torch.zeros_like(pixels[:, :1])
    for dim in (2, 3, 4):
        difference = pixels.diff(dim=dim).abs().amax(dim=1, keepdim=True)
        size = difference.shape[dim]
        change.narrow(dim, 0, size).copy_(torch.maximum(change.narrow(dim, 0, size), difference))
        change.narrow(dim, 1, size).copy_(torch.maximum(change.narrow(dim, 1, size), difference))
    return F.max_pool3d((change > threshold).float(), (1, 3, 3), stride=1, padding=(0, 1, 1))


def world_pixels(config: VAETraining, step: int, rank: int, world: int) -> Float[Tensor, "b 3 F H W"]:
    """The batch of a step, a function of (seed, step, rank): crops in time and space of new clips, or single frames."""
    stage = stage_at(config, step)
    frames, count = stage.num_frames, stage.batch_size
    if int((step + 1) * stage.image_share) > int(step * stage.image_share):
        frames, count = 1, stage.batch_size * max(1, stage.num_frames // 2)
    rng = np.random.default_rng((config.fit.seed, step, rank))
    batch = np.empty((count, frames, stage.size, stage.size, 3), dtype=np.float32)
    for i in range(count):
        index = (step * world + rank) * 4096 + i  # no two steps or ranks share a clip
        _, video, _ = clip(
            index,
            seed=config.fit.seed,
            num_frames=config.num_frames,
            height=config.height,
            width=config.width,
            **vars(config.world),
        )
        t, y, x = (
            int(rng.integers(0, whole - part + 1))
            for whole, part in zip(video.shape[:3], (frames, stage.size, stage.size), strict=True)
        )
        batch[i] = video[t : t + frames, y : y + stage.size, x : x + stage.size]
    return torch.from_numpy(batch).permute(0, 4, 1, 2, 3).contiguous() * 2 - 1


def stage_at(config: VAETraining, step: int):
    """The stage that `step` falls into; steps past the end belong to the last one."""
    for stage in config.stages:
        if step < stage.steps:
            return stage
        step -= stage.steps
    return config.stages[-1]


@torch.no_grad()
def init_vae(vae: VAE) -> None:
    """From scratch: the latents' modulation starts as "no change", the posterior narrow (log variance -5)."""
    for name, module in vae.decoder.named_modules():
        if isinstance(module, nn.Conv3d) and name.endswith((".scale", ".shift")):
            module.weight.mul_(0.1)
            nn.init.constant_(_bias(module), 1.0 if name.endswith(".scale") else 0.0)
    logvar = vae.config.latent_channels
    vae.encoder.conv_out.weight[logvar:].mul_(0.1)
    _bias(vae.encoder.conv_out)[logvar:] = -5.0


@torch.no_grad()
def unit_variance(vae: VAE, pixels: Float[Tensor, "b 3 F H W"]) -> None:
    """Divide each latent channel by its standard deviation over `pixels`, exactly: folded into the convolutions that
    write the latents and those that read them, so the function encode -> decode does not change."""
    mean, logvar = vae.moments(pixels)
    std = (mean.var(dim=(0, 2, 3, 4)) + logvar.exp().mean(dim=(0, 2, 3, 4))).sqrt()
    channels = vae.config.latent_channels
    out = vae.encoder.conv_out
    out.weight[:channels] /= std[:, None, None, None, None]
    _bias(out)[:channels] /= std
    _bias(out)[channels:] -= 2 * std.log()
    for name, module in vae.decoder.named_modules():
        if isinstance(module, nn.Conv3d) and (name == "conv_in" or name.endswith((".scale", ".shift"))):
            module.weight *= std[None, :, None, None, None]


def _bias(conv: nn.Conv3d) -> Tensor:
    assert conv.bias is not None
    return conv.bias
