"""`videogen train CONFIG [key=value ...]`: read the settings, train, leave the result in diffusers' layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from videogen.config import DiTTraining, VAETraining, load_training
from videogen.errors import ModelNotFound
from videogen.training.dit import train_dit
from videogen.training.trainer import join_process_group
from videogen.training.vae import train_vae


def main(config_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Train what the file says and return the folder of the result. A run that was stopped goes on where it was."""
    config = load_training(config_path, overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return train_vae_model(config, device) if isinstance(config, VAETraining) else train_dit_model(config, device)


def train_vae_model(config: VAETraining, device: torch.device) -> Path:
    from videogen.weights.diffusers import save_vae

    folder = Path(config.folder)
    vae = train_vae(config, folder, device)
    if join_process_group()[0] == 0:
        save_vae(folder / "vae", vae)
    return folder / "vae"


def train_dit_model(config: DiTTraining, device: torch.device) -> Path:
    """A whole model folder: the DiT and VAE in half precision, the text encoder in float32."""
    from videogen.weights.diffusers import load_vae, save_folder

    folder = Path(config.folder)
    if not (Path(config.vae) / "config.json").is_file():
        raise ModelNotFound(
            f"{config.vae} holds no trained VAE.",
            why="the DiT learns on latents.",
            hint="videogen train configs/train/tiny_vae.yaml, or vae=FOLDER",
        )
    vae = load_vae(config.vae, dtype=torch.float32)
    dit, text_encoder = train_dit(config, vae, folder, device)
    if join_process_group()[0] == 0:
        save_folder(
            folder / "model",
            dit=dit.half(),
            vae=vae.cpu().half(),
            text_encoder=text_encoder,
            scheduler_config=config.scheduler,
            model_index_class="CogVideoXImageToVideoPipeline",
            extra=model_facts(config),
            overwrite=True,
        )
    return folder / "model"


def model_facts(config: DiTTraining) -> dict:
    """What `videogen.json` says of a model trained here."""
    return {
        "name": config.name,
        "conditions": ["text", "first_frame", "last_frame", "keyframes", "video"],
        "height": config.height,
        "width": config.width,
        "num_frames": config.num_frames,
        "fps": config.fps,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "sampler": "ddim",
        "licence": "Apache-2.0",
        "provenance": {
            "data": "procedural world (videogen.data.world), rendered by the project itself",
            "samples": config.fit.steps * config.batch_size * join_process_group()[1],
            "training": dataclasses.asdict(config),
        },
    }
