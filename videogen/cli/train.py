"""`videogen train CONFIG [key=value ...]`: train as a file says, or with --dry-run say what that would take.

`torchrun --nproc-per-node N scripts/train.py CONFIG [key=value ...]` is the same program in N processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from videogen.config import load_training
from videogen.errors import InvalidRequest, VideogenError


def add_command(subparsers: Any) -> None:
    command = subparsers.add_parser("train", help="train a model as a YAML file says")
    add = command.add_argument
    add("file", metavar="CONFIG", help="a file such as configs/train/tiny_vae.yaml")
    add("overrides", nargs="*", metavar="key=value", help="settings in place of the file's, such as fit.steps=100")
    add("--dry-run", action="store_true", help="say what it would take: data, tokens, memory, time; trains nothing")
    add("--processes", type=int, metavar="N", help="with --dry-run: of so many GPUs (default: as it was started)")
    add("--utilisation", type=float, default=0.3, help="with --dry-run: used of a GPU's peak (default: 0.3)")
    add("--json", action="store_true", help="with --dry-run: its numbers as JSON on stdout")
    add("--plot", action="store_true", help="draw the figures of the run so far; trains nothing")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Train and print the folder of the result, or print the report."""
    given = [word for word in args.overrides if "=" not in word]
    if given:
        raise InvalidRequest(
            f"{given[0]!r} is no setting.", why="settings are key=value.", hint="videogen train CONFIG fit.steps=100"
        )
    config = load_training(args.file, args.overrides)  # before torch is imported
    if args.dry_run:
        return dry_run(args, config)
    if args.json or args.processes is not None:
        raise InvalidRequest(
            "--json and --processes belong to --dry-run.",
            why="a training run says where its result lies, and has the processes that torchrun starts.",
            hint="torchrun --nproc-per-node N scripts/train.py CONFIG",
        )
    if args.plot:
        return plot(Path(config.folder))
    from videogen.training.run import main

    first = int(os.environ.get("RANK", "0")) == 0
    try:
        folder = main(args.file, args.overrides)
        if first:
            print(folder)
    finally:
        if first:
            with contextlib.suppress(OSError, VideogenError):  # what ended the run is what is told
                plot(Path(config.folder), quiet=True)


def plot(folder: Path, *, quiet: bool = False) -> None:
    """Write the pictures of a run's figures and print where they are. `quiet`: of what there is, if there is any."""
    if not (folder / "log.jsonl").is_file():
        if quiet:
            return
        raise InvalidRequest(
            f"{folder} has no figures.", why="no run has written its log there.", hint="train first, or folder=…"
        )
    from videogen.training.plots import plot_run

    for path in plot_run(folder):
        if not quiet:
            print(path)


def dry_run(args: argparse.Namespace, config: Any) -> None:
    processes = args.processes if args.processes is not None else int(os.environ.get("WORLD_SIZE", "1"))
    if processes < 1 or not 0 < args.utilisation <= 1:
        raise InvalidRequest(
            f"--processes {processes} --utilisation {args.utilisation:g}.",
            why="processes are 1 or more, and a utilisation is a share of 1.",
            hint="--processes 8 --utilisation 0.3",
        )
    from videogen.training.dry_run import estimate, table

    facts = estimate(config, processes=processes, utilisation=args.utilisation)
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        print(table(facts), file=sys.stderr)
