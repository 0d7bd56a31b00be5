"""`videogen lora inspect | merge | convert`: what a LoRA file holds, a model with it in the weights, another format."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from videogen.cli.show import show
from videogen.errors import FileError, VideogenError
from videogen.weights.hub import PICKLES, find_model
from videogen.weights.lora import (
    FORMATS,
    check_fit,
    fits,
    left_out,
    open_lora,
    open_loras,
    read_updates,
    save_lora,
    split_scale,
)


def add_command(subparsers: Any) -> None:
    command = subparsers.add_parser("lora", help="look into LoRA files, merge them into a model, convert them")
    actions = command.add_subparsers(dest="action", metavar="action", required=True, parser_class=type(command))

    add = actions.add_parser("inspect", help="format, maps, ranks and alphas of a file; what it fits").add_argument
    add("file", help="a LoRA file, or a folder with one")
    add("--model", help="does it fit this model?")
    add("--offline", action="store_true", help="never use the network")
    add("--json", action="store_true", help="print JSON")

    add = actions.add_parser("merge", help="a model folder with LoRAs in its weights").add_argument
    add("model", help="tiny (bundled), a folder, or org/name[@revision]")
    add("files", nargs="+", metavar="FILE[:SCALE]", help="LoRA files; a scale is a number, 1/256 or 1/r")
    add("--out", required=True, metavar="FOLDER", help="the folder to write, in diffusers' layout")
    add("--overwrite", action="store_true", help="replace an existing model")
    add("--offline", action="store_true", help="never use the network")

    add = actions.add_parser("convert", help="a LoRA file in another format").add_argument
    add("file", metavar="FILE[:SCALE]", help="a LoRA file; its scale becomes part of the new one")
    add("--to", choices=FORMATS, required=True, help="names and place of alpha: docs/lora.md")
    add("--out", required=True, metavar="PATH", help="a .safetensors file, or a folder for one")
    add("--overwrite", action="store_true", help="replace an existing file")

    for name, action in actions.choices.items():
        action.set_defaults(run=RUN[name])


def inspect(args: argparse.Namespace) -> None:
    """Print what the header says; no tensor is read."""
    file = open_lora(args.file)
    facts = {
        "path": str(file.path),
        "format": file.format,
        "about": FORMATS[file.format].about,
        "maps": dict(Counter(name.split(".", 2)[-1] if name.startswith("blocks.") else name for name in file.keys)),
        "blocks": len({name.split(".")[1] for name in file.keys if name.startswith("blocks.")}),
        "rank": _one_or_counted(file.ranks),
        "alpha": _one_or_counted(file.alphas),
        "scale": _one_or_counted({name: alpha / file.ranks[name] for name, alpha in file.alphas.items()}),
        "dtypes": list(file.dtypes),
        "bytes": file.path.stat().st_size,
        "sha256": file.sha256,
        "fits": fits(file),
        "left_out": left_out(file),
        **{key: file.facts.get(key) for key in ("licence", "provenance") if key in file.facts},
    }
    if args.model:
        from videogen.weights.single import open_card

        path = find_model(args.model, offline=args.offline, weights=False)
        card = open_card(path, offline=args.offline, weights=False)
        try:
            check_fit(file, card.dit, card.name)
            facts["model"] = {"name": card.name, "fits": True}
        except VideogenError as error:
            facts["model"] = {"name": card.name, "fits": False, "why": error.why}
    show(facts, args.json)


def _one_or_counted(values: dict[str, Any]) -> Any:
    """The number that all maps have, or how many maps have which."""
    counts = Counter(values.values())
    return next(iter(counts)) if len(counts) == 1 else {f"{value:g}": n for value, n in counts.items()}


def merge(args: argparse.Namespace) -> None:
    """Open the model as its files are, put the LoRAs in, write a folder; prints its path."""
    loras = open_loras([split_scale(text) for text in args.files])
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise FileError(f"{out} exists.", why="nothing is overwritten unasked.", hint="--overwrite, or another name.")
    from videogen.weights.single import load_parts, open_card

    card = open_card(find_model(args.model, offline=args.offline), offline=args.offline)
    for lora in loras:
        check_fit(lora.file, card.dit, card.name)

    from videogen.pipeline import Pipeline
    from videogen.weights.lora import add_loras

    parts = load_parts(card)
    assert parts.dit is not None
    assert parts.vae is not None
    assert parts.text_encoder is not None
    parts.dit.config, parts.vae.config = card.dit, card.vae  # as `load` does: what the card tells of their use
    add_loras(parts.dit, loras)
    pipe = Pipeline(card, parts.dit, parts.vae, parts.text_encoder)
    pipe.loras = loras
    print(pipe.save(out, overwrite=args.overwrite))


def convert(args: argparse.Namespace) -> None:
    """Read one format, write another; prints the new file's path. Pickles are read as `videogen convert` does it."""
    given = split_scale(args.file)
    path, scale = given if isinstance(given, tuple) else (given, 1.0)
    with TemporaryDirectory(prefix=".videogen-", dir=existing(Path(args.out).absolute())) as folder:
        if Path(path).suffix in PICKLES:
            from videogen.weights.convert import take_tensors

            pickle, path = Path(path).expanduser(), Path(folder, f"{Path(path).stem}.safetensors")
            take_tensors(pickle, path)
        (lora,) = open_loras((path, scale))
        updates = read_updates(lora.file, alpha=lora.alpha)
        updates = {name: replace(update, alpha=update.alpha * lora.scale) for name, update in updates.items()}
        print(save_lora(args.out, updates, form=args.to, overwrite=args.overwrite))


def existing(path: Path) -> Path:
    """The folder that there is, of those a path will lie in: on the same disk."""
    return next(folder for folder in path.parents if folder.is_dir())


RUN = {"inspect": inspect, "merge": merge, "convert": convert}
