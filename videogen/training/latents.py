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
from videogen.data.world import caption, clip, draw_scene
from videogen.data.world.scene import Scene
from videogen.models.vae import VAE
from videogen.training.draws import draw_noise
from videogen.training.examples import Example

SHARD = 256  # clips per file
HELD_OUT = 10**9  # the first clip that is never trained on


@dataclass(frozen=True)
class LatentClips:
    """Posterior moments of clips, and of every frame a condition may hold, encoded alone as an image is."""

    video_mean: Float[Tensor, "N f c h w"]
    video_logvar: Float[Tensor, "N f c h w"]
    frame_mean: Float[Tensor, "N f c h w"]
    frame_logvar: Float[Tensor, "N f c h w"]

    def __len__(self) -> int:
        return len(self.video_mean)


@dataclass(frozen=True)
class WorldClips:
    """Clips of the world as `Examples`: clip `first` + i has moments i; its scene, and so its captions, are drawn anew.

    frames  of the latent frames only the first, which a causal VAE encodes as if the clip ended there; of 1, one from
            anywhere in the clip, encoded alone, whose caption says nothing of motion. None: all
    """

    config: ClipTraining
    moments: LatentClips
    fps: float
    first: int = 0
    held_out: bool = False
    frames: int | None = None

    def __len__(self) -> int:
        return len(self.moments)

    def name(self, index: int) -> str:
        return f"world/{'held-out/' if self.held_out else ''}{self.first + index}"

    def shape(self, index: int) -> tuple[int, int, int]:
        f, _, h, w = self.moments.video_mean.shape[1:]
        return min(f, self.frames or f), h, w

    def read(self, index: int, rng: np.random.Generator) -> Example:
        frames = _sample(self.moments.frame_mean[index], self.moments.frame_logvar[index], rng)
        still = self.frames == 1
        if still:
            at = int(rng.integers(len(frames)))
            latents = frames = frames[at : at + 1]
        else:
            latents = _sample(self.moments.video_mean[index], self.moments.video_logvar[index], rng)
        words = world_caption(self.config, self.first + index, rng, held_out=self.held_out, still=still)
        return Example(latents[: self.frames], frames[: self.frames], words, self.fps)


def world_caption(
    config: ClipTraining, index: int, rng: np.random.Generator, *, held_out: bool = False, still: bool = False
) -> str:
    """A fresh wording of what clip `index` of the world shows."""
    return caption(world_scene(config, index, held_out=held_out), rng, dropout=0.25, synonyms=0.3, still=still)


def world_scene(config: ClipTraining, index: int, *, held_out: bool = False) -> Scene:
    """What clip `index` of the world shows."""
    return draw_scene(np.random.default_rng((config.fit.seed, index)), held_out=held_out, **vars(config.world))


def cached_latents(
    config: ClipTraining,
    vae: VAE,
    folder: Path,
    device: torch.device,
    *,
    rank: int = 0,
    world: int = 1,
    held_out: int = 0,
) -> Path:
    """Encode this rank's share of the shards that `folder` lacks; the subfolder that holds them all.

    held_out  so many clips of scenes that training never shows, from `HELD_OUT` on, in place of those of the training
    """
    facts = {
        "vae": hashlib.sha256(b"".join(v.numpy().tobytes() for v in vae.cpu().state_dict().values())).hexdigest(),
        "clip": [config.fit.seed, config.num_frames, config.height, config.width, vars(config.world)],
    }
    folder = folder / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    folder = folder / "held_out" if held_out else folder
    folder.mkdir(parents=True, exist_ok=True)
    vae = vae.to(device).eval()
    count, first = (held_out, HELD_OUT) if held_out else (config.clips, 0)
    for number in range(rank, -(-count // SHARD), world):
        path = folder / _shard_name(number, count)
        if path.exists():
            continue
        indices = range(first + number * SHARD, first + min((number + 1) * SHARD, count))
        parts = [
            encode_clips(config, vae, indices[i : i + 8], device, held_out=held_out > 0)
            for i in range(0, len(indices), 8)
        ]
        with written(path) as part:
            save_file({k: torch.cat([p[k] for p in parts]) for k in parts[0]}, part)
    return folder


def _shard_name(number: int, count: int) -> str:
    """The last shard of a set may be shorter than that of a larger set: its name says so."""
    size = min(SHARD, count - number * SHARD)
    return f"{number:05d}{f'-{size}' if size < SHARD else ''}.safetensors"


def read_latents(folder: Path, clips: int) -> LatentClips:
    shards = [load_file(folder / _shard_name(number, clips)) for number in range(-(-clips // SHARD))]
    return LatentClips(**{k: torch.cat([shard[k] for shard in shards]) for k in shards[0]})


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


def _sample(
    mean: Float[Tensor, "f c h w"], logvar: Float[Tensor, "f c h w"], rng: np.random.Generator
) -> Float[Tensor, "f c h w"]:
    return mean.float() + torch.exp(0.5 * logvar.float()) * draw_noise(rng, mean.shape)
