"""The small commands: demo, eval. Each parses, calls one function, prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from videogen.errors import InvalidRequest
from videogen.weights.hub import find_model

# What `eval` can ask for, said again here: a command line that is refused imports no numpy.
MODES = ("text", "first_frame", "last_frame", "first_and_last_frame")
KINDS = ("one", "checkered", "two", "camera", "style")
SPLITS = ("triples", "pairs", "none")


def add_commands(subparsers: Any) -> None:
    command = subparsers.add_parser("demo", help="three clips from the bundled model, in outputs/demo/")
    command.set_defaults(run=demo)

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


def demo(args: argparse.Namespace) -> None:
    from videogen.demo import run

    run()


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
