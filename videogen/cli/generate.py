"""`videogen text-to-video` and `videogen image-to-video`: one request per prompt, checked, made, saved."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from videogen.config import read_yaml
from videogen.data.files import FORMATS, check_output
from videogen.distributed import launched, one_voice
from videogen.errors import InvalidRequest
from videogen.progress import Progress, duration
from videogen.request import HELP, Request
from videogen.weights.card import find_model, read_card

# What a shell can say of a Request; the other keywords (embeddings, latents, callbacks) are for Python.
TYPES: dict[str, Any] = {
    "negative_prompt": str,
    "last_frame_until": float,
    "video": str,
    "strength": float,
    "fit": str,
    "height": int,
    "width": int,
    "num_frames": int,
    "fps": float,
    "num_inference_steps": int,
    "guidance_scale": float,
    "use_dynamic_cfg": bool,
    "guidance_until": float,
    "sampler": str,
    "step_cache": float,
    "seed": int,
}
IMAGES = ("first_frame", "last_frame", "keyframes")
ALIASES = {
    "negative_prompt": ["--negative"],
    "num_frames": ["--frames"],
    "num_inference_steps": ["--steps"],
    "guidance_scale": ["--guidance"],
}
METAVARS = {"video": "CLIP", "fit": "HOW", "sampler": "NAME"}


def add_commands(subparsers: Any) -> None:
    text = subparsers.add_parser("text-to-video", aliases=["t2v"], help="a clip from a prompt")
    image = subparsers.add_parser("image-to-video", aliases=["i2v"], help="a clip from images and a prompt")
    for command in (text, image):
        command.add_argument(
            "prompt",
            nargs="*",
            help="what the clip shows, in quotes; each prompt is a clip; - reads lines from stdin, @FILE from a file",
        )
        names = [n for n in TYPES if command is image or n not in ("fit", "last_frame_until")]
        for name in [f.name for f in fields(Request) if f.name in names]:
            _add_flag(command, name)
        command.add_argument("--size", type=_size, metavar="WxH", help="width and height at once")
        if command is image:
            command.add_argument("--first-frame", metavar="IMG", help=HELP["first_frame"])
            command.add_argument("--last-frame", metavar="IMG", help=HELP["last_frame"])
            command.add_argument(
                "--keyframe", dest="keyframes", type=_keyframe, action="append", metavar="K=IMG", help=HELP["keyframes"]
            )
        _add_run_flags(command)
        command.set_defaults(run=run)


def _add_flag(command: argparse.ArgumentParser, name: str) -> None:
    flags = ["--" + name.replace("_", "-"), *ALIASES.get(name, [])]
    default = getattr(Request(), name)
    note = "" if default in (None, "", False) else f" (default {default})"
    options: dict[str, Any] = {"dest": name, "default": default, "help": HELP[name] + note}
    if TYPES[name] is bool:
        options["action"] = "store_true"
    else:
        options |= {
            "type": TYPES[name],
            "metavar": METAVARS.get(name) or {int: "N", float: "X", str: "TEXT"}[TYPES[name]],
        }
    command.add_argument(*flags, **options)


def _add_run_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", default="tiny", help="tiny (bundled), a folder, or org/name[@revision]")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64")
    add(
        "--memory",
        default="auto",
        help="auto, fast, balanced, low or minimal: each needs less than the one before",
    )
    add("--kernel", default="auto", help="attention: auto, or a name (docs/dit_speed.md); int8 is lossy")
    add("--quantize", metavar="FORMAT", help="linear maps in 8 bits: fp8 or int8 (lossy)")
    add("--compile", action="store_true", help="torch.compile for the transformer's blocks")
    add("--offline", action="store_true", help="never use the network")
    add("--out", metavar="PATH|DIR", help=f"a file ({', '.join(FORMATS)}) or a folder (default outputs/)")
    add("--overwrite", action="store_true", help="replace an existing file")
    add("--crf", type=int, default=17, metavar="N", help="H.264 quality, 0 best to 51 (default 17)")
    add("--no-metadata", action="store_true", help="do not embed the recipe")
    add("--json", action="store_true", help="print one JSON object per clip instead of its path")
    add("--quiet", action="store_true", help="no progress")
    add("--config", nargs="+", metavar="FILE", help="YAML file with these settings, then key=value...; flags win")


@one_voice()
def run(args: argparse.Namespace) -> None:
    """Check all requests and outputs, then load the model once and make the clips in turn."""
    rank, processes = launched()
    images = getattr(args, "first_frame", None), getattr(args, "last_frame", None), getattr(args, "keyframes", None)
    if args.command in ("image-to-video", "i2v") and not any(images):
        raise InvalidRequest(
            "no image is given.",
            why="image-to-video starts from one.",
            hint="--first-frame IMAGE, or videogen text-to-video",
            param="first_frame",
        )
    prompts = list(_prompts(args.prompt))
    if not prompts and not any(images):
        raise InvalidRequest(
            "there is no prompt.",
            why="nothing else says what to show.",
            hint=f"videogen {args.command} 'a red circle moves right'",
            param="prompt",
        )
    prompts = prompts or [""]
    if not 0 <= args.crf <= 51:
        raise InvalidRequest(f"crf is {args.crf}.", why="it goes from 0 (best) to 51.", hint="--crf 17", param="crf")
    card = read_card(find_model(args.model, offline=args.offline, weights=False))
    requests = [Request(prompt, **_keywords(args)).checked(card) for prompt in prompts]
    paths = _outputs(args, prompts)

    quiet = args.quiet or rank > 0
    say = (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr))
    say(f"loading {card.name}")
    import videogen

    mesh = None
    if processes > 1:
        from videogen.distributed.mesh import make_mesh, start

        start(args.device)
        is_guided = any((request.guidance_scale or 0) > 1 for request in requests)
        mesh = make_mesh(card.dit.num_attention_heads, is_guided=is_guided)
    names = ("device", "dtype", "memory", "kernel", "quantize", "compile", "offline")
    pipe = videogen.load(args.model, **{name: getattr(args, name) for name in names})
    if mesh is not None:
        from videogen.distributed.parallel import parallel

        pipe = parallel(pipe, mesh)
    for request, path in zip(requests, paths, strict=True):
        started = time.monotonic()
        frames, height, width = request.size
        steps, seed = request.num_inference_steps, request.seed
        say(f"{request.prompt!r}: {width}x{height}, {frames} frames, {steps} steps, seed {seed}")
        progress = None if quiet else Progress()
        try:
            keywords = {f.name: getattr(request, f.name) for f in fields(Request)}
            keywords |= {"on_step": progress, "out": None if rank else _writer(path, args)}
            video = pipe.generate(keywords.pop("prompt"), **keywords)
        finally:
            if progress:
                progress.close()
        if rank:
            continue
        seconds = time.monotonic() - started
        say(f"done in {duration(seconds)}")
        row = {"path": str(video.path), "seed": video.seed, "settings": video.settings, "seconds": round(seconds, 3)}
        print(json.dumps(row) if args.json else video.path, flush=True)


def _writer(path: Path, args: argparse.Namespace) -> Callable[..., Path]:
    """`write_video` as the flags want it: what `generate` puts its frames into as they are decoded."""

    def write(chunks: Iterable[Any], fps: float | int, *, recipe: dict[str, Any]) -> Path:
        from videogen.data.video import write_video

        kept = None if args.no_metadata else recipe
        return write_video(path, chunks, fps, recipe=kept, crf=args.crf, overwrite=args.overwrite)

    return write


def _keywords(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as keywords of Request."""
    keywords = {name: getattr(args, name) for name in (*TYPES, *IMAGES) if hasattr(args, name)}
    if args.size:
        if keywords["width"] or keywords["height"]:
            raise InvalidRequest(
                "--size is given beside --width or --height.", why="it sets both.", hint="--size alone"
            )
        keywords["width"], keywords["height"] = args.size
    if images := keywords.pop("keyframes", None):
        indices = [index for index, _ in images]
        if len(set(indices)) < len(indices):
            raise InvalidRequest("a key frame is given twice.", why="one frame takes one image.", hint="leave one out.")
        keywords["keyframes"] = dict(images)
    return keywords


def _outputs(args: argparse.Namespace, prompts: list[str]) -> list[Path]:
    """Where each clip goes, refused now rather than after the work if it cannot."""
    out = Path(args.out or "outputs")
    if args.out and out.suffix and not out.is_dir() and not args.out.endswith(os.sep):
        if len(prompts) > 1:
            raise InvalidRequest(
                f"--out names one file for {len(prompts)} clips.",
                why="each clip is a file.",
                hint="--out FOLDER",
                param="out",
            )
        check_output(out, overwrite=args.overwrite)
        return [out]
    stamp = time.strftime("%Y%m%d-%H%M%S")
    paths: list[Path] = []
    for prompt in prompts:
        stem = f"{stamp}_{slug(prompt)}_s{args.seed}"
        taken = {path.name for path in (*paths, *out.glob(f"{stem}*"))}
        names = (f"{stem}{suffix}.mp4" for suffix in ("", *(f"-{n}" for n in range(2, len(taken) + 3))))
        paths.append(out / next(name for name in names if name not in taken))
    return paths


def slug(text: str, length: int = 40) -> str:
    """`A red circle!` -> `a-red-circle`, cut at a word.

    >>> slug("a small red circle moves right on a navy background")
    'a-small-red-circle-moves-right-on-a-navy'
    """
    words = re.sub(r"[\W_]+", "-", text.lower()).strip("-")
    if len(words) > length:
        words = words[: length + 1].rpartition("-")[0] or words[:length]
    return words or "clip"


def _prompts(given: list[str]):
    for prompt in given:
        if prompt == "-":
            if launched()[1] > 1:
                raise InvalidRequest(
                    "several processes cannot read the same standard input.",
                    why="each needs all prompts.",
                    hint="@FILE with a prompt per line.",
                    param="prompt",
                )
            yield from filter(None, map(str.strip, sys.stdin))
        elif prompt.startswith("@"):
            try:
                yield from filter(None, map(str.strip, Path(prompt[1:]).read_text(encoding="utf-8").splitlines()))
            except (OSError, UnicodeDecodeError) as error:
                raise InvalidRequest(
                    f"{prompt[1:]} cannot be read.", why=str(error), hint="@FILE with a prompt per line."
                ) from error
        else:
            yield prompt


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)[xX×](\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 720x480")
    return int(found[1]), int(found[2])


def _keyframe(text: str) -> tuple[int, str]:
    index, equals, path = text.partition("=")
    if not equals or not index.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not K=IMAGE, such as 8=middle.png")
    return int(index), path


def config_flags(path: str, *pairs: str) -> list[str]:
    """`--config FILE key=value...` as the flags that say the same; placed before the user's own, which then win."""
    values = read_yaml(path)
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise InvalidRequest(
                f"{pair!r} is not key=value.",
                why="settings follow --config FILE.",
                hint="put the prompt before --config.",
                param="config",
            )
        values[name] = value
    flags: list[str] = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if name == "prompt":
            flags += value if isinstance(value, list) else [value]
        elif name == "keyframes" and isinstance(value, dict):
            flags += [f"--keyframe={index}={image}" for index, image in value.items()]
        elif value is True or value == "true":
            flags.append(flag)
        elif value is not None and value is not False and value != "false":
            flags.append(f"{flag}={value}")
    return flags
