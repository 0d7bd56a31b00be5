"""`videogen extend CLIP [PROMPT]`: the clip with more frames, going on from where it ends."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import warnings
from pathlib import Path
from typing import Any

from videogen.cli import generate
from videogen.cli.rerun import model_of
from videogen.data.files import local
from videogen.distributed import launched, one_voice
from videogen.errors import Note
from videogen.progress import Progress, duration

FLAGS = (
    *("negative_prompt", "fit", "image_latent_scale", "num_inference_steps", "guidance_scale", "use_dynamic_cfg"),
    *("guidance_until", "uncond", "sampler", "step_cache", "seed"),
)


def add_command(subparsers: Any) -> None:
    command = subparsers.add_parser("extend", help="a clip with more frames, going on from where it ends")
    add = command.add_argument
    add("clip", help="an mp4, gif, webp or folder of PNGs")
    add("prompt", nargs="?", help="what happens next (default: the prompt in the clip's recipe)")
    add("--frames", type=int, metavar="N", help="how many to add (default: as many as one pass makes)")
    add("--overlap", type=int, metavar="K", help="last frames that each pass begins with and is faded into")
    generate.add_flags(command, FLAGS)
    generate.add_run_flags(command)
    command.set_defaults(run=run, model=None)


@one_voice()
def run(args: argparse.Namespace) -> None:
    """Read the clip, check the first piece, then load the model and make all of them."""
    generate.check_run_flags(args)
    path = local(args.clip, param="clip")
    from videogen.data.video import Video, read_recipe, read_video, write_video
    from videogen.long import extend, piece, plan_extension
    from videogen.recipe import checked, sha256_of

    frames, fps = read_video(path)
    recipe = checked(read_recipe(path) or {}, ("model", "revision"))  # another program's has a prompt of its own kind
    args.model = args.model or model_of(recipe)
    card = generate.card_of_model(args)
    said = recipe.get("prompt")
    prompt = args.prompt if args.prompt is not None else said if isinstance(said, str) else ""
    given = {name: getattr(args, name) for name in FLAGS}
    plan = plan_extension(card, frames, num_frames=args.frames, overlap=args.overlap)
    request = piece(card, frames, plan, prompt=prompt, **given).checked(card)
    (out,) = generate.outputs(args, [request])

    rate = fps or card.fps
    if rate != card.fps:
        generate.say(args, f"note: the clip has {rate:g} frames per second, {card.name} moves things at {card.fps:g}")
    pipe = generate.open_model(args, card, [request])
    started = time.monotonic()
    times = f"{plan.pieces} pieces of" if plan.pieces > 1 else "a piece of"
    generate.say(args, f"{prompt!r}: {len(frames)} frames and {plan.added} more, {times} {plan.length} frames")
    progress = None if generate.is_quiet(args) else Progress()
    try:
        asked = {"num_frames": args.frames, "overlap": args.overlap, "parent": sha256_of(Path(path))}
        video = extend(pipe, Video(frames, rate), prompt, on_step=progress, **asked, **given)
    except BaseException as error:
        if isinstance(made := getattr(error, "video", None), Video) and launched()[0] == 0:
            keep(made, out, args)
        raise
    finally:
        if progress:
            progress.close()
    if launched()[0] > 0:
        return
    kept = None if args.no_metadata else video.settings
    made = write_video(out, video.frames, rate, recipe=kept, crf=args.crf, overwrite=args.overwrite)
    seconds = time.monotonic() - started
    generate.say(args, f"done in {duration(seconds)}")
    row = {"path": str(made), "seed": args.seed, "settings": video.settings, "seconds": round(seconds, 3)}
    print(json.dumps(row) if args.json else made, flush=True)


def keep(video: Any, out: Path, args: argparse.Namespace) -> None:
    """What was made before an error, beside the clip that was to be: `clip-part.mp4`. As well as it goes."""
    from videogen.data.latents import clip_of

    clip = clip_of(out)
    with contextlib.suppress(Exception):
        names = (clip.with_stem(f"{clip.stem}-part{n}") for n in ("", *range(2, 100)))
        free = next(name for name in names if not (name.with_suffix("") if name.suffix == ".png" else name).exists())
        made = video.save(free, crf=args.crf, metadata=not args.no_metadata)
        warnings.warn(Note(f"{len(video.frames)} frames are kept in {made}; extend goes on from there"), stacklevel=2)
