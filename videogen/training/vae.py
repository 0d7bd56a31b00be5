"""Train a VAE on the procedural world: `videogen train configs/train/tiny_vae.yaml`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from videogen.config import VAETraining
from videogen.data.world import clip
from videogen.models.vae import VAE
from videogen.training.trainer import Facts, fit, join_process_group
from videogen.training.vae_step import init_vae, unit_variance, vae_loss, world_pixels


def train_vae(config: VAETraining, folder: Path, device: torch.device) -> VAE:
    """The trained VAE (moving average, unit-variance latents), in float32 on the CPU."""
    rank, world = join_process_group()
    torch.manual_seed(config.fit.seed)
    vae = VAE(config.model)
    init_vae(vae)
    vae.to(device)

    def loss_at(step: int) -> tuple[Tensor, Facts]:
        pixels = world_pixels(config, step, rank, world).to(device)
        generator = torch.Generator().manual_seed((config.fit.seed * 1_000_003 + step) * 64 + rank)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.fit.bfloat16):
            loss, facts = vae_loss(
                vae, pixels, generator=generator, kl_weight=config.kl_weight, detail_weight=config.detail_weight
            )
        return loss, {**facts, "samples": len(pixels)}

    held_out = held_out_pixels(config, 8)
    trained = fit({"vae": vae}, loss_at, config.fit, folder, validate=lambda m: validate(m["vae"], held_out, device))
    average = trained["vae"].cpu()
    assert isinstance(average, VAE)
    unit_variance(average, held_out_pixels(config, 64))
    return average


def held_out_pixels(config: VAETraining, count: int) -> Tensor:
    """Whole clips of held-out scenes, [count, 3, F, H, W] in [-1, 1]."""
    kind = {"num_frames": config.num_frames, "height": config.height, "width": config.width}
    videos = [clip(i, seed=10**6, held_out=True, **vars(config.world), **kind)[1] for i in range(count)]
    return torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3) * 2 - 1


@torch.no_grad()
def validate(vae: nn.Module, pixels: Tensor, device: torch.device) -> dict[str, float]:
    """Mean PSNR in dB over held-out clips, and over their first frames alone, through the posterior's mode."""
    assert isinstance(vae, VAE)
    figures = {}
    for name, part in (("held_out_psnr", pixels), ("held_out_image_psnr", pixels[:, :, :1])):
        error = [vae.decode(vae.encode(one.to(device))).clamp(-1, 1).cpu() - one for one in part.split(1)]
        mse = torch.stack([e.square().mean() for e in error])
        figures[name] = round(float((10 * torch.log10(4 / mse)).mean()), 2)
    return figures
