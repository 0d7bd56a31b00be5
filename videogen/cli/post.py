"""`videogen post CLIP`: another frame rate, music, gif and webp for a finished clip. No model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from videogen.data.files import FORMATS, check_output, local
from videogen.errors import InvalidRequest


def add_command(subparsers: Any) -> None:
    command = subparsers.add_parser("post", help="frame rate, music, gif or webp for a finished clip")
    add = command.add_argument
    add("clip", help="mp4, gif, webp or folder of PNGs")
    add("--fps", type=float, metavar="X", help="frames per second; those between are made from motion, without a model")
    add("--music", metavar="FILE", help="sound file, repeated or cut to the clip's length")
    add("--fade", type=float, default=0.5, metavar="S", help="seconds in which the music comes and goes (default 0.5)")
    add("--loudness", type=float, default=-16.0, metavar="X", help="of the music, in LUFS (default -16)")
    add(
        "--format",
        metavar="NAME",
        help=f"{', '.join(name[1:] for name in FORMATS)} (default: that of --out, or mp4)",
    )
    add("--loop", type=int, default=0, metavar="N", help="how often gif and webp play (default 0: for ever)")
    add("--out", metavar="PATH", help="default: beside the clip, with -post in its name")
    add("--overwrite", action="store_true", help="replace an existing file")
    add("--crf", type=int, default=17, metavar="N", help="H.264 quality, 0 best to 51 (default 17)")
    add("--no-metadata", action="store_true", help="do not embed the recipe")
    add("--json", action="store_true", help="print a JSON object instead of the path")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check the names, then make the file; its path on stdout."""
    clip = local(args.clip, param="clip")
    ending = f".{args.format.lower().lstrip('.')}" if args.format else None
    if ending and ending not in FORMATS:
        names = ", ".join(name[1:] for name in FORMATS)
        raise InvalidRequest(f"there is no format {args.format!r}.", why=f"there are {names}.", hint="--format gif")
    out = Path(args.out) if args.out else clip.with_name(f"{clip.stem}-post{ending or '.mp4'}")
    if ending and out.suffix.lower() != ending:
        raise InvalidRequest(
            f"--out {out.name} is no {ending[1:]}.", why="the ending chooses the format.", hint="leave --format out."
        )
    if not args.out:
        names = (out.with_stem(f"{out.stem}{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 10_000))))
        out = next(name for name in names if not name.exists()) if not args.overwrite else out
    check_output(out, overwrite=args.overwrite)
    from videogen.data.post import post

    options = {name: getattr(args, name) for name in ("fps", "music", "fade", "loudness", "loop", "crf", "overwrite")}
    path = post(clip, out, metadata=not args.no_metadata, **options)
    print(json.dumps({"path": str(path)}) if args.json else path)
