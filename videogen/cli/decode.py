"""`videogen decode LATENTS`: finish clips whose latents were kept, where decoding had failed or was interrupted."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from videogen.cli import generate
from videogen.cli.rerun import model_of
from videogen.data.files import FORMATS, LATENTS, check_output, local
from videogen.distributed import launched, one_voice
from videogen.errors import InvalidRequest
from videogen.progress import Progress, duration
from videogen.recipe import checked, without_images


def add_command(subparsers: Any) -> None:
    command = subparsers.add_parser("decode", help="make clips of latents that were kept")
    command.add_argument("latents", nargs="+", help=f"files that end with {LATENTS}")
    generate.add_run_flags(command, denoises=False)
    command.set_defaults(run=run, model=None, memory="balanced")  # of all networks only the VAE is needed


@one_voice()
def run(args: argparse.Namespace) -> None:
    """Read the latents and check the outputs, then load the model once and decode one file after the other."""
    generate.check_run_flags(args)
    paths = [local(path, param="latents") for path in args.latents]
    outs = [output(path, args.out, several=len(paths) > 1) for path in paths]
    for out in outs:
        check_output(out, overwrite=args.overwrite)
    if len(set(outs)) < len(outs):
        raise InvalidRequest("two clips have one name.", why="each clip is a file.", hint="--out FOLDER", param="out")
    from videogen.data.latents import read_latents

    kept = [(latents, checked(recipe)) for latents, recipe in map(read_latents, paths)]
    for name in ("model", "dtype"):
        if getattr(args, name) in (None, "auto") and len({recipe.get(name) for _, recipe in kept}) > 1:
            raise InvalidRequest(
                f"these latents are of several {name}s.",
                why=f"all are decoded by one {name}.",
                hint=f"those of one {name} at a time, or --{name}",
                param="latents",
            )
    args.model = args.model or model_of(kept[0][1])
    card = generate.card_of_model(args)
    for path, (latents, recipe) in zip(paths, kept, strict=True):
        if recipe.get("fps") is None:
            raise InvalidRequest(
                f"the recipe in {path} has no fps.",
                why="without a rate there is no clip.",
                hint=f"a file that videogen kept, whose name ends with {LATENTS}",
                param="latents",
            )
        if latents.shape[1] != card.vae.latent_channels:
            raise InvalidRequest(
                f"{path} has latents of {latents.shape[1]} channels, {card.name} decodes {card.vae.latent_channels}.",
                why="they are of another model.",
                hint="--model MODEL",
                param="model",
            )
    if args.dtype == "auto":  # as they would have been decoded
        args.dtype = kept[0][1].get("dtype") or "auto"
    pipe = generate.open_model(args, card, [])
    for path, out, (latents, recipe) in zip(paths, outs, kept, strict=True):
        started = time.monotonic()
        generate.say(args, f"{path}: {len(latents)} latent frames")
        progress = None if generate.is_quiet(args) else Progress()
        rank = launched()[0]
        write = None if rank else generate.Writer(out, {}, args.crf, args.overwrite, not args.no_metadata)
        pipe.sparing = pipe.spare(None)  # each clip may step down to a smaller memory plan
        try:
            video = pipe.finish(latents, recipe, out=write, on_step=progress)
        finally:
            if progress:
                progress.close()
        seconds = time.monotonic() - started
        generate.say(args, f"done in {duration(seconds)}; {path} is no longer needed")
        facts = {"path": str(video.path), "seed": video.seed, "settings": without_images(video.settings)}
        facts["seconds"] = round(seconds, 3)
        if rank == 0:
            print(json.dumps(facts) if args.json else video.path, flush=True)


def output(latents: Path, out: str | None, *, several: bool) -> Path:
    """`clip.mp4` of `clip.mp4.latents.safetensors`, in its folder or the one asked for; or the file asked for."""
    clip = latents.name.removesuffix(LATENTS)
    clip = clip if Path(clip).suffix.lower() in FORMATS else f"{clip}.mp4"
    if out is None:
        return latents.with_name(clip)
    asked = Path(out)
    if asked.suffix and not asked.is_dir() and not out.endswith("/"):
        if several:
            raise InvalidRequest("--out names one file for several clips.", hint="--out FOLDER", param="out")
        return asked
    return asked / clip
