"""Clips encoded once, before the DiT trains: posterior moments on disk, resumable, addressed by what made them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from videogen.config import ClipTraining
from videogen.data.files import written
from videogen.data.world import clip
from videogen.models.vae import VAE
from videogen.types import Latent

SHARD = 256  # clips per file


@dataclass(frozen=True)
class LatentClips:
    """Posterior moments of clips, and of every frame a condition may hold, encoded alone as an image is.

    Clip i is `clip(first_index + i, seed)` of the world: its scene, and so its captions, are drawn again when needed.
    """

    video_mean: Float[Tensor, "N f c h w"]
    video_logvar: Float[Tensor, "N f c h w"]
    frame_mean: Float[Tensor, "N f c h w"]
    frame_logvar: Float[Tensor, "N f c h w"]

    def __len__(self) -> int:
        return len(self.video_mean)

    def video(self, index: Tensor, generator: torch.Generator) -> Latent:
        return _sample(self.video_mean[index], self.video_logvar[index], generator)

    def frames(self, index: Tensor, generator: torch.Generator) -> Latent:
        return _sample(self.frame_mean[index], self.frame_logvar[index], generator)


def cached_latents(
    config: ClipTraining, vae: VAE, folder: Path, device: torch.device, *, rank: int = 0, world: int = 1
) -> Path:
    """Encode this rank's share of the shards that `folder` lacks; the subfolder that holds them all."""
    facts = {
        "vae": hashlib.sha256(b"".join(v.numpy().tobytes() for v in vae.cpu().state_dict().values())).hexdigest(),
        "clip": [config.fit.seed, config.num_frames, config.height, config.width, vars(config.world)],
    }
    folder = folder / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    vae = vae.to(device).eval()
    for number in range(rank, -(-config.clips // SHARD), world):
        path = folder / f"{number:05d}.safetensors"
        if path.exists():
            continue
        indices = range(number * SHARD, min((number + 1) * SHARD, config.clips))
        parts = [encode_clips(config, vae, indices[i : i + 8], device) for i in range(0, len(indices), 8)]
        with written(path) as part:
            save_file({k: torch.cat([p[k] for p in parts]) for k in parts[0]}, part)
    return folder


def read_latents(folder: Path, clips: int) -> LatentClips:
    shards = [load_file(folder / f"{number:05d}.safetensors") for number in range(-(-clips // SHARD))]
    return LatentClips(**{k: torch.cat([shard[k] for shard in shards])[:clips] for k in shards[0]})


@torch.no_grad()
def encode_clips(
    config: ClipTraining, vae: VAE, indices: range, device: torch.device, *, held_out: bool = False
) -> dict[str, Tensor]:
    """Moments in half precision, scaled, in diffusers' layout [n, f, c, h, w]."""
    kind = {"num_frames": config.num_frames, "height": config.height, "width": config.width}
    videos = [clip(i, seed=config.fit.seed, held_out=held_out, **vars(config.world), **kind)[1] for i in indices]
    pixels = (torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3) * 2 - 1).to(device)
    stills = rearrange(pixels[:, :, ::4], "b c f h w -> (b f) c 1 h w")
    with torch.autocast(device.type, torch.bfloat16, enabled=config.fit.bfloat16):
        moments = {"video": vae.moments(pixels), "frame": vae.moments(stills)}
    scale = vae.config.scaling_factor
    encoded = {}
    for name, (mean, logvar) in moments.items():
        pattern = "b c f h w -> b f c h w" if name == "video" else "(b f) c 1 h w -> b f c h w"
        for kind_, value in (("mean", mean.float() * scale), ("logvar", logvar.float() + 2 * np.log(scale))):
            encoded[f"{name}_{kind_}"] = rearrange(value, pattern, b=len(pixels)).half().cpu().contiguous()
    return encoded


def _sample(mean: Tensor, logvar: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(mean.shape, generator=generator)
    return mean.float() + torch.exp(0.5 * logvar.float()) * noise
