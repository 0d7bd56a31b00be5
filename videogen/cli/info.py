"""`videogen info`: what a model can do and under which licence, or how a clip was made. Opens no weights."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from videogen.cli.show import show
from videogen.weights.card import read_card
from videogen.weights.hub import find_model


def add_command(subparsers: Any) -> None:
    command = subparsers.add_parser("info", help="what a model can do, or how a clip was made")
    command.add_argument("target", help="a model (tiny, a path, org/name) or a clip (mp4, gif, webp, folder of PNGs)")
    command.add_argument("--offline", action="store_true", help="never use the network")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the facts of a model or a clip."""
    clip = clip_of(args.target)
    show(clip_facts(clip) if clip else model_facts(args.target, args.offline), args.json)


def clip_of(target: str) -> Path | None:
    """The clip that `target` is the path of; None if it is a model, or nothing here."""
    try:
        path = Path(target).expanduser()
        if path.is_dir():
            return path if not (path / "model_index.json").exists() and any(path.glob("*.png")) else None
        return path if path.is_file() and path.suffix != ".safetensors" else None
    except (OSError, ValueError, RuntimeError):  # too long a name, a zero byte in it, `~` and nobody's name
        return None


def model_facts(model: str, offline: bool = False) -> dict[str, Any]:
    """The card as JSON-ready values, without the networks' full configs."""
    card = read_card(find_model(model, offline=offline, weights=False))
    facts = asdict(card)
    facts |= {
        "file": None,
        "conditions": list(card.conditions),
        "scheduler": card.scheduler.get("_class_name"),
        **card.limits,
    }
    facts |= {"folder": str(card.folder)} if card.file is None else {"file": str(card.file), "folder": None}
    del facts["dit"], facts["vae"], facts["sha256"]
    facts["transformer"] = {
        name: getattr(card.dit, name)
        for name in ("num_layers", "width", "num_attention_heads", "in_channels", "patch_size", "patch_size_t")
    }
    return facts


def clip_facts(path: Path) -> dict[str, Any]:
    """Size, length and rate of a clip as it is, and its recipe."""
    from videogen.data.video import clip_facts, read_recipe
    from videogen.recipe import without_images

    facts = clip_facts(path)
    seconds = round(facts["num_frames"] / facts["fps"], 3) if facts["fps"] else None
    return {"path": str(path), **facts, "seconds": seconds, "recipe": without_images(read_recipe(path) or {}) or None}
