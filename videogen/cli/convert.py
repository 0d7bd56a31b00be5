"""`videogen convert`: a checkpoint of any known layout into another; the only place where pickles are read."""

from __future__ import annotations

import argparse
import sys
from typing import Any

TARGETS = {
    "diffusers": "a model folder, which --model opens here and from_pretrained in diffusers",
    "single": "one file with the transformer (or the VAE, if there is no transformer)",
    "sat": "the folder and the names of CogVideo's own code, as safetensors",
}


def add_command(subparsers: Any) -> None:
    command = subparsers.add_parser(
        "convert", help="checkpoints of other layouts (SAT, single files, pickles) and back"
    )
    add = command.add_argument
    add("source", help="a file of weights (.safetensors, .pt, .bin, .ckpt), a SAT folder or a model")
    add("--out", required=True, metavar="PATH", help="a folder that does not exist yet; a .safetensors file for single")
    notes = "; ".join(f"{name}: {note}" for name, note in TARGETS.items())
    add("--to", choices=TARGETS, default="diffusers", help=f"{notes} (default: diffusers)")
    add("--base", metavar="MODEL", help="where VAE and text encoder come from, if the source lacks them")
    add("--variant", metavar="NAME", help="the published model it is like, where shapes cannot tell (docs/formats.md)")
    add("--dtype", help="cast all weights: float32, bfloat16 or float16 (default: every byte stays)")
    add("--offline", action="store_true", help="never use the network")
    add("--quiet", action="store_true", help="no progress")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Convert, and print the path."""
    from videogen.weights.convert import convert

    path = convert(
        args.source,
        args.out,
        to=args.to,
        base=args.base,
        variant=args.variant,
        dtype=args.dtype,
        offline=args.offline,
        say=(lambda text: None) if args.quiet else (lambda text: print(text, file=sys.stderr, flush=True)),
    )
    print(path)
