"""`videogen info`: what a model can do and under which licence, or how a clip was made. Opens no weights."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

from videogen.cli.show import show
from videogen.config import VAEConfig
from videogen.data.files import LATENTS
from videogen.errors import ModelNotFound, Note
from videogen.weights.card import Card, card_of, read_card
from videogen.weights.hub import find_model, in_cache, parse_name
from videogen.weights.models import PUBLISHED


def add_command(subparsers: Any) -> None:
    about = "a model's licence, sizes, lengths and conditions, or how a clip was made; opens no weights"
    command = subparsers.add_parser("info", help=about, description=f"Print {about}.")
    command.add_argument(
        "target",
        help=f"a model (tiny, a path, org/name), a clip (mp4, gif, webp, folder of PNGs), or a clip's {LATENTS}",
    )
    command.add_argument("--offline", action="store_true", help="never use the network")
    command.add_argument("--json", action="store_true", help="print JSON, with how the model was made")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the facts of a model, a clip, or latents that were kept."""
    if args.target.endswith(LATENTS) and Path(args.target).is_file():
        facts = latents_facts(Path(args.target))
    elif clip := clip_of(args.target):
        facts = clip_facts(clip)
    else:
        facts = model_facts(args.target, args.offline)
        facts |= {} if args.json else {"provenance": None}  # a training's whole config
    show(facts, args.json)


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
    """The card as JSON-ready values, what matters most first, without the networks' full configs."""
    try:
        card = card_here(find_model(model, offline=offline, weights=False))
    except ModelNotFound:
        if (card := card_of_row(model)) is None:
            raise
        warnings.warn(Note(f"{card.name} is not here: this is what videogen's own table says of it"), stacklevel=2)
        return _use(card) | {"folder": None, "file": None}
    return _use(card) | {
        "folder": str(card.folder) if card.file is None else None,
        "file": str(card.file) if card.file else None,
        "scheduler": card.scheduler.get("_class_name"),
        "transformer": {
            name: getattr(card.dit, name)
            for name in ("num_layers", "width", "num_attention_heads", "in_channels", "patch_size", "patch_size_t")
        },
        "provenance": card.provenance,
    }


def _use(card: Card) -> dict[str, Any]:
    """What a card says of the use of a model."""
    facts = {"name": card.name, "licence": card.licence} | card.limits | {"conditions": list(card.conditions)}
    names = ("height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale", "sampler")
    names += ("layout", "size_multiple", "fixed_size", "max_sequence_length", "fun")
    return facts | {name: getattr(card, name) for name in names}


def card_here(path: Path) -> Card:
    """Of a folder or a file; of a file with its base if that is in the cache."""
    from videogen.weights.single import open_card

    try:
        return open_card(path, offline=True, weights=False)
    except ModelNotFound:
        return read_card(path)


def card_of_row(model: str) -> Card | None:
    """What the table of published models says, of one that is not in the cache."""
    from videogen.weights.lora import row_config

    try:
        name = parse_name(model)[0]
    except ModelNotFound:  # a folder or a file
        return None
    row = next((row for row in PUBLISHED if row.name == name), None)
    return None if row is None or in_cache(name) else card_of(Path(name), row_config(row), VAEConfig(), {}, name=name)


def clip_facts(path: Path) -> dict[str, Any]:
    """Size, length and rate of a clip as it is, and its recipe."""
    from videogen.data.video import clip_facts, read_recipe

    facts = clip_facts(path)
    seconds = round(facts["num_frames"] / facts["fps"], 3) if facts["fps"] else None
    return {"path": str(path), **facts, "seconds": seconds, "recipe": _shown(read_recipe(path) or {})}


def latents_facts(path: Path) -> dict[str, Any]:
    """Shape [f, c, h, w] and recipe of the latents that a clip is decoded from, by the file's header."""
    from videogen.weights.header import read_header

    header = read_header(path)
    try:
        recipe = json.loads(header.metadata["videogen"])
        shape = list(header.shapes["latents"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ModelNotFound(
            f"{path} holds no latents of a clip.", why="it has no recipe or no latents.", hint="videogen info CLIP"
        ) from error
    facts = {"path": str(path), "latents": shape, "clip": f"videogen decode {path}"}
    return facts | {"recipe": _shown(recipe if isinstance(recipe, dict) else {})}


def _shown(recipe: dict[str, Any]) -> dict[str, Any] | None:
    from videogen.recipe import without_images

    return without_images(recipe) or None
