"""`videogen train CONFIG [key=value ...]`: read the settings, train, leave the result in diffusers' layout."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from videogen.config import (
    DistillTraining,
    DiTTraining,
    FinetuneTraining,
    Training,
    VAETraining,
    load_training,
)
from videogen.errors import ModelNotFound
from videogen.training.distill import few_step_scheduler, train_student
from videogen.training.dit import train_dit
from videogen.training.finetune import finetune
from videogen.training.guard import alone, check_devices, check_group, check_launch
from videogen.training.trainer import join_process_group
from videogen.training.vae import train_vae
from videogen.weights.card import Card, read_card
from videogen.weights.guard import read_json
from videogen.weights.hub import find_model


def main(config_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Train what the file says and return the folder of the result. A run that was stopped goes on where it was.

    Under torchrun every process of the group calls it. Raises InvalidRequest where processes were started that do not
    know of each other, FileError where another run writes to the folder.
    """
    return train(load_training(config_path, overrides))


def train(config: Training) -> Path:
    check_launch(os.environ)
    device, joined = place(os.environ), dist.is_initialized()
    rank, _ = join_process_group(config.fit.safety.timeout)
    try:
        check_group(os.environ)
        with alone(Path(config.folder)) if rank == 0 else contextlib.nullcontext():
            return TRAIN[type(config)](config, device)
    finally:
        if dist.is_initialized() and not joined:
            dist.destroy_process_group()


def place(environment: os._Environ[str]) -> torch.device:
    """What this process computes on: the GPU of its own on this machine, or the CPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        return torch.device("cpu")
    check_devices(environment, gpus)
    torch.cuda.set_device(int(environment.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


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


def distill_model(config: DistillTraining, device: torch.device) -> Path:
    """A model folder like the teacher's, with the student's transformer and the settings it was made for."""
    from videogen.weights.diffusers import hashes, load_folder, save_folder

    card = read_card(find_model(config.teacher))
    parts = load_folder(card.folder)
    assert parts.dit is not None
    assert parts.vae is not None
    assert parts.text_encoder is not None
    dtype = next(parts.dit.parameters()).dtype
    vae, folder = parts.vae.float(), Path(config.folder)
    student = train_student(config, parts.dit, vae, parts.text_encoder.eval(), card, folder, device)
    if join_process_group()[0] == 0:
        again = load_folder(card.folder, components=("vae", "text_encoder"))  # byte for byte the teacher's
        assert again.vae is not None
        assert again.text_encoder is not None
        save_folder(
            folder / "model",
            dit=student.to(dtype),
            vae=again.vae,
            text_encoder=again.text_encoder,
            scheduler_config=few_step_scheduler(card.scheduler),
            model_index_class=read_json(card.folder / "model_index.json")["_class_name"],
            extra=student_facts(config, card, hashes(card.folder / "transformer")),
            overwrite=True,
        )
    return folder / "model"


def student_facts(config: DistillTraining, card: Card, teacher: dict[str, str]) -> dict:
    """What `videogen.json` says of a student: its teacher's facts, but for how it samples and where it comes from."""
    return {
        "name": config.name,
        "conditions": list(card.conditions),
        "height": config.height,
        "width": config.width,
        "num_frames": config.num_frames,
        "fps": card.fps,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": 1.0,
        "sampler": "lcm",
        "licence": card.licence,
        "provenance": {
            "teacher": {"name": card.name, "sha256": {f"transformer/{name}": sha for name, sha in teacher.items()}},
            "distillation": dataclasses.asdict(config),
        },
    }


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
            "samples": config.fit.steps * config.batch_size,
            "training": dataclasses.asdict(config),
        },
    }


TRAIN: dict[type, Callable[[Any, torch.device], Path]] = {
    VAETraining: train_vae_model,
    DiTTraining: train_dit_model,
    FinetuneTraining: finetune,
    DistillTraining: distill_model,
}
