"""The small commands: info, doctor, demo, train, eval. Each parses, calls one function, prints."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from videogen import __version__
from videogen.errors import InvalidRequest, ModelNotFound
from videogen.weights.card import find_model, read_card

# What `eval` can ask for, said again here: a command line that is refused imports no numpy.
MODES = ("text", "first_frame", "last_frame", "first_and_last_frame")
KINDS = ("one", "checkered", "two", "camera", "style")
SPLITS = ("triples", "pairs", "none")
LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pillow", "av", "imageio", "xformers")


def add_commands(subparsers: Any) -> None:
    command = subparsers.add_parser("info", help="what a model can do, or how a clip was made")
    command.add_argument("target", help="a model (tiny, a folder, org/name) or a clip (mp4, gif, webp, folder of PNGs)")
    command.add_argument("--offline", action="store_true", help="never use the network")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=info)

    command = subparsers.add_parser("doctor", help="check this machine and installation")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=doctor)

    command = subparsers.add_parser("demo", help="three clips from the bundled model, in outputs/demo/")
    command.set_defaults(run=demo)

    command = subparsers.add_parser("train", help="train a model as a YAML file says")
    command.add_argument("file", metavar="CONFIG", help="a file such as configs/train/tiny_vae.yaml")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the file's")
    command.set_defaults(run=train)

    command = subparsers.add_parser("eval", help="score a model on the procedural world")
    add = command.add_argument
    add("model", help="tiny, or a folder of a model that knows the world")
    add("--mode", choices=MODES, default="text", help="what it is told beside the prompt (default: nothing)")
    add(
        "--scenes",
        choices=KINDS,
        default="one",
        help="scenes with one object, two, a moving camera, ... (default: one)",
    )
    add("--held-out", choices=SPLITS, default="triples", help="what training never joined (default: triples)")
    add("--n", type=int, default=256, help="how many clips (default: 256)")
    add("--steps", type=int, help="denoising steps (default: the model's)")
    add("--guidance", type=float, help="guidance scale (default: the model's)")
    add("--batch", type=int, default=16, help="clips at once, in each process (default: 16)")
    add("--processes", type=int, default=0, help="on a CPU, of one thread each (default: one per core)")
    add("--out", metavar="DIR", type=Path, help="default: runs/eval/ with model, mode, scenes and split")
    command.set_defaults(run=evaluate)


def info(args: argparse.Namespace) -> None:
    """Print the facts of a model or a clip."""
    path = Path(args.target).expanduser()
    clip = path.is_file() or (path.is_dir() and not (path / "model_index.json").exists() and any(path.glob("*.png")))
    facts = clip_facts(path) if clip else model_facts(args.target, args.offline)
    _show(facts, args.json)


def model_facts(model: str, offline: bool = False) -> dict[str, Any]:
    """The card as JSON-ready values, without the networks' full configs."""
    card = read_card(find_model(model, offline=offline, weights=False))
    facts = asdict(card)
    facts |= {
        "folder": str(card.folder),
        "conditions": list(card.conditions),
        "scheduler": card.scheduler.get("_class_name"),
    }
    del facts["dit"], facts["vae"], facts["sha256"]
    facts["transformer"] = {
        name: getattr(card.dit, name)
        for name in ("num_layers", "width", "num_attention_heads", "in_channels", "patch_size", "patch_size_t")
    }
    return facts


def clip_facts(path: Path) -> dict[str, Any]:
    """Size, length and rate of a clip as it is, and its recipe."""
    from videogen.data.video import read_recipe, read_video

    frames, fps = read_video(path)
    count, height, width = frames.shape[:3]
    return {
        "path": str(path),
        "width": width,
        "height": height,
        "num_frames": count,
        "fps": fps,
        "seconds": None if not fps else round(count / fps, 3),
        "recipe": read_recipe(path),
    }


def doctor(args: argparse.Namespace) -> None:
    """What a bug report or a puzzled user needs: versions, devices, memory, disk, the bundled model."""
    import torch

    facts: dict[str, Any] = {
        "videogen": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    facts["libraries"] = {name: _version(name) for name in LIBRARIES}
    facts["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    facts["gpus"] = [
        {
            "name": torch.cuda.get_device_name(i),
            "memory_gib": round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1),
            "bfloat16": torch.cuda.is_bf16_supported(),
        }
        for i in range(torch.cuda.device_count())
    ]
    facts["threads"] = torch.get_num_threads()
    facts["free_disk_gib"] = round(shutil.disk_usage(".").free / 2**30, 1)
    try:
        facts["tiny"] = str(find_model("tiny"))
    except ModelNotFound as error:
        facts["tiny"] = None
        print(error, file=sys.stderr)
    _show(facts, args.json)


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def demo(args: argparse.Namespace) -> None:
    from videogen.demo import run

    run()


def train(args: argparse.Namespace) -> None:
    from videogen.training.run import main

    print(main(args.file, args.overrides))


def evaluate(args: argparse.Namespace) -> None:
    """Print the table. A run that was stopped goes on where it was; a finished one is only printed."""
    find_model(args.model)  # before torch is imported
    if args.n < 1 or args.batch < 1:
        raise InvalidRequest(
            f"--n {args.n} --batch {args.batch}.", why="both are counts.", hint="1 or more.", param="n"
        )
    from videogen.cli.evaluate import Evaluation, report, run

    what = Evaluation(
        model=args.model,
        mode=args.mode,
        scenes=args.scenes,
        split=args.held_out,
        n=args.n,
        steps=args.steps,
        guidance=args.guidance,
    )
    out = args.out or Path("runs/eval") / "-".join([Path(args.model).name, args.mode, args.scenes, args.held_out])
    report(run(what, out, batch=args.batch, processes=args.processes), out)


def _show(facts: dict[str, Any], as_json: bool) -> None:
    """JSON, or one fact a line with nested ones indented; what is unknown is left out."""
    print(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else "\n".join(_lines(facts)))


def _lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    lines: list[str] = []
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        elif value not in (None, {}, []):
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"{indent}{name:<20} {text}")
    return lines
