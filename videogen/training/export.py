"""What a training leaves for others: a model folder that says what it came from, or a LoRA file that does.

Weights are written as the run has them, the moving average, rounded once to the type of the files: `load` of the folder
computes what the average computes, bit for bit.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from videogen.config import FinetuneTraining
from videogen.data.files import sha256_of
from videogen.models.dit import DiT
from videogen.models.lora import Update
from videogen.weights.card import Card
from videogen.weights.diffusers import hashes, pipeline_class, save_folder
from videogen.weights.limits import ANY_LENGTH, ANY_SIZE
from videogen.weights.lora import NAME, save_lora
from videogen.weights.models import CONDITIONS
from videogen.weights.single import load_parts, parts_beside


def save_model(folder: Path, base: Card, card: Card, config: FinetuneTraining, dit: DiT, *, dtype: torch.dtype) -> Path:
    """A model folder with this transformer in `dtype` and what `card` says of it; all other parts are the base's.

    Text encoder and tokenizer stay byte for byte what they were.
    """
    copied = "text_encoder" in parts_beside(base)
    parts = load_parts(base, components=("vae",) if copied else ("vae", "text_encoder"))
    assert parts.vae is not None
    if next(dit.parameters()).dtype != dtype:
        dit = copy.deepcopy(dit).to(dtype)
    return save_folder(
        folder,
        dit=dit,
        vae=parts.vae,
        text_encoder=parts.text_encoder or base.folder,
        scheduler_config=card.scheduler,
        model_index_class=pipeline_class(card),
        extra=dataclasses.replace(card, provenance=provenance(base, config)).facts,
        overwrite=True,
    )


def save_adapters(folder: Path, updates: Mapping[str, Update], base: Card, config: FinetuneTraining) -> Path:
    """`pytorch_lora_weights.safetensors` in `folder`, as diffusers reads it, with its provenance in the metadata."""
    facts = {"licence": base.licence, "provenance": provenance(base, config)}
    return save_lora(folder / NAME, updates, facts=facts, overwrite=True)


def finetuned_card(
    base: Card, card: Card, told: Collection[str], config: FinetuneTraining, size: tuple[int, int, int]
) -> Card:
    """What is to be said of the model that was made: the base's facts, as far as they still hold.

    card  the base's, with the settings of the transformer that learned
    told  conditions that it was told in training, beside the base's own
    size  (frames, height, width) in pixels that it makes unasked; limits of the base that this is beyond are dropped
    """
    frames, height, width = size
    return dataclasses.replace(
        card,
        name=config.name or Path(config.folder).name,
        conditions=tuple(name for name in CONDITIONS if name in {*base.conditions, *told}),
        num_frames=frames,
        height=height,
        width=width,
        sizes=base.sizes if base.sizes.allow(width, height) else ANY_SIZE,
        frames=base.frames if base.frames.allow(frames) else ANY_LENGTH,
        sha256={},
    )


def provenance(base: Card, config: FinetuneTraining) -> dict[str, Any]:
    """Which model learned what: the base with the hashes of its transformer and its own provenance, and the settings.

    Paths are left out but for their last part: they say more of a machine and its user than of a model.
    """
    settings = dataclasses.asdict(config) | {"model": base.name}
    for name in ("folder", "data"):
        settings[name] = Path(settings[name]).name
    weights = recorded(base)
    if not weights and base.file:
        weights = {base.file.name: sha256_of(base.file)}
    elif not weights:
        weights = {f"transformer/{name}": sha for name, sha in hashes(base.folder / "transformer").items()}
    return {"base": {"name": base.name, "sha256": weights, "provenance": base.provenance}, "finetune": settings}


def recorded(base: Card) -> dict[str, str]:
    """The hashes of a model's transformer, where its `videogen.json` has them."""
    return {} if base.file else {name: sha for name, sha in base.sha256.items() if name.startswith("transformer/")}


def identity(base: Card) -> dict[str, Any]:
    """Enough to notice that a run goes on from another base: hashes where they are recorded, else sizes of files."""
    if found := recorded(base):
        return found
    files = [base.file] if base.file else sorted((base.folder / "transformer").iterdir())
    return {path.name: path.stat().st_size for path in files}
