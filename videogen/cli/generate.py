"""`videogen text-to-video` and `videogen image-to-video`: one request per clip, checked, made, saved.

`batch`, `rerun` and others make their clips with the same flags and functions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from videogen.checks import MOST_PROMPTS, bad, is_int, is_real
from videogen.config import read_yaml
from videogen.data.files import FORMATS, check_output, read_lines
from videogen.distributed import launched, one_voice
from videogen.errors import InvalidRequest, Note
from videogen.progress import Progress, duration
from videogen.recipe import fingerprint, without_images
from videogen.request import HELP, Request
from videogen.runtime.names import check_names
from videogen.weights.card import Card
from videogen.weights.hub import find_model
from videogen.weights.lora import check_fit, open_loras, split_scale
from videogen.weights.single import open_card, parts_beside

# What a shell can say of a Request; the other keywords (embeddings, latents, callbacks) are for Python.
TYPES: dict[str, Any] = {
    "negative_prompt": str,
    "last_frame_until": float,
    "video": str,
    "strength": float,
    "control_video": str,
    "mask": str,
    "fit": str,
    "image_latent_scale": str,
    "height": int,
    "width": int,
    "num_frames": int,
    "fps": float,
    "snap": bool,
    "num_inference_steps": int,
    "guidance_scale": float,
    "use_dynamic_cfg": str,
    "guidance_until": float,
    "uncond": str,
    "sampler": str,
    "step_cache": float,
    "seed": int,
    "keep_latents": bool,
}
IMAGES = ("first_frame", "last_frame", "keyframes")
ALIASES = {
    "negative_prompt": ["--negative"],
    "num_frames": ["--frames"],
    "num_inference_steps": ["--steps"],
    "guidance_scale": ["--guidance"],
}
METAVARS = {"video": "CLIP", "control_video": "CLIP", "mask": "IMG|CLIP", "fit": "HOW", "sampler": "NAME"}
METAVARS |= dict.fromkeys(("use_dynamic_cfg", "uncond", "image_latent_scale"), "HOW")
LOAD = ("device", "dtype", "memory", "kernel", "quantize", "compile", "lora", "offline", "verify")
LOAD += ("base", "variant", "merge_lora")  # keywords of `load`


def add_commands(subparsers: Any) -> None:
    text = subparsers.add_parser("text-to-video", aliases=["t2v"], help="a clip from a prompt")
    image = subparsers.add_parser("image-to-video", aliases=["i2v"], help="a clip from images and a prompt")
    for command in (text, image):
        command.add_argument(
            "prompt",
            nargs="*",
            help="what the clip shows, in quotes; each prompt is a clip; - reads lines from stdin, @FILE from a file",
        )
        of_images = ("last_frame_until", "image_latent_scale")
        add_request_flags(command, [n for n in TYPES if command is image or n not in of_images])
        if command is image:
            add_image_flags(command)
        add_habit_flags(command)
        add_run_flags(command)
        command.add_argument("--dry-run", action="store_true", help="only say what it needs, as videogen plan does")
        command.set_defaults(run=run)


def add_request_flags(command: argparse.ArgumentParser, names: Iterable[str] = tuple(TYPES), **options: Any) -> None:
    """Flags for fields of Request. With default=argparse.SUPPRESS only those given are in the arguments."""
    add_flags(command, names, **options)
    command.add_argument("--size", type=size, metavar="WxH", help="width and height at once")
    command.add_argument("--seconds", type=float, metavar="X", help="length of the clip, in place of --frames")


def add_flags(command: argparse.ArgumentParser, names: Iterable[str], **options: Any) -> None:
    """Flags for these fields of Request, in the order of the fields."""
    for name in [f.name for f in fields(Request) if f.name in names]:
        _add_flag(command, name, **options)


def add_image_flags(command: argparse.ArgumentParser, **options: Any) -> None:
    add = command.add_argument
    add("--first-frame", metavar="IMG", help=HELP["first_frame"], **options)
    add("--last-frame", metavar="IMG", help=HELP["last_frame"], **options)
    many: dict[str, Any] = {"dest": "keyframes", "type": keyframe, "action": "append", "metavar": "K=IMG"}
    add("--keyframe", help=HELP["keyframes"], **many | options)


def _add_flag(command: argparse.ArgumentParser, name: str, **given: Any) -> None:
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
    if name == "use_dynamic_cfg":
        options |= {"nargs": "?", "const": True}
    command.add_argument(*flags, **(options | given))


def add_habit_flags(command: argparse.ArgumentParser) -> None:
    """Settings by name, better prompts, and several seeds: what becomes a request before it is checked."""
    add = command.add_argument
    add("-n", "--num", type=int, default=1, metavar="N", help="clips per prompt, with the seeds s, s+1, … (default 1)")
    add("--style", metavar="NAME", help="words for a look, put behind the prompt (docs/prompts.md lists them)")
    add("--styles", metavar="FILE", help="YAML file with more styles")
    add("--preset", metavar="NAME", help="draft, balanced or quality: settings at once; flags win")
    add(
        "--enhance",
        nargs="?",
        const="template",
        metavar="HOW",
        help="a richer prompt: =template (the default), =local:FOLDER (a chat model), =URL (OpenAI-compatible)",
    )


def card_of_model(args: argparse.Namespace, *, weights: bool = False) -> Card:
    """The card of `--model`, from small files and headers alone; or with the weights, which are then all here."""
    path = find_model(args.model, offline=args.offline, weights=weights)
    return open_card(path, base=args.base, variant=args.variant, offline=args.offline, weights=weights)


def weights_of(card: Card) -> str | None:
    """The fingerprint of a model whose weights are all here."""
    return fingerprint(card.folder, card.file, parts_beside(card))


def add_run_flags(command: argparse.ArgumentParser, *, denoises: bool = True) -> None:
    """Which model, how it runs, and where clips go; without what is only for the transformer if it is not run."""
    add = command.add_argument
    add("--model", default="tiny", help="tiny (bundled), a folder, a .safetensors file, or org/name[@revision]")
    add("--base", metavar="MODEL", help="of a .safetensors file: where the parts it lacks come from (docs/formats.md)")
    add("--variant", metavar="NAME", help="of such a file: the published model it is like, if shapes cannot tell")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64")
    add(
        "--memory",
        default="auto",
        help="auto, fast, balanced, low or minimal: each needs less than the one before",
    )
    if denoises:
        add("--kernel", default="auto", help="attention: auto, or a name (docs/dit_speed.md); int8 is lossy")
        add("--quantize", metavar="FORMAT", help="linear maps in 8 bits: fp8 or int8 (lossy)")
        add("--compile", action="store_true", help="torch.compile for the transformer's blocks")
        lora: dict[str, Any] = {"type": split_scale, "action": "append", "metavar": "PATH[:SCALE]"}
        add("--lora", help="a LoRA file and how much it counts; several add up (docs/lora.md)", **lora)
    else:
        command.set_defaults(kernel="auto", quantize=None, compile=False, lora=None)
    command.set_defaults(merge_lora=None)  # no flag: rerun does as its recipe says
    add("--offline", action="store_true", help="never use the network")
    add("--verify", action="store_true", default=None, help="compare the model's files with their hashes first")
    add("--out", metavar="PATH|DIR", help=f"a file ({', '.join(FORMATS)}) or a folder (default outputs/)")
    add("--overwrite", action="store_true", help="replace an existing file")
    add("--crf", type=int, default=17, metavar="N", help="H.264 quality, 0 best to 51 (default 17)")
    add("--no-metadata", action="store_true", help="do not embed the recipe")
    add("--json", action="store_true", help="print one JSON object per clip instead of its path")
    add("--quiet", action="store_true", help="no progress")
    add("--config", nargs="+", metavar="FILE", help="YAML file with these settings, then key=value...; flags win")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One clip to be made: a checked request, its file, and what the recipe says beside the request.

    `item`: the request is a batch, of which only this clip is kept.
    """

    request: Request
    path: Path
    notes: dict[str, Any] = field(default_factory=dict)
    item: int | None = None


@one_voice()
def run(args: argparse.Namespace) -> None:
    """Check all requests and outputs, then load the model once and make the clips in turn."""
    images = getattr(args, "first_frame", None), getattr(args, "last_frame", None), getattr(args, "keyframes", None)
    if args.command in ("image-to-video", "i2v") and not any(images):
        raise InvalidRequest(
            "no image is given.",
            why="image-to-video starts from one.",
            hint="--first-frame IMAGE, or videogen text-to-video",
            param="first_frame",
        )
    if args.dry_run:
        from videogen.cli import plan

        plan.run(args)
        return
    prompts = list(prompts_of(args.prompt))
    if not prompts and not any(images):
        raise InvalidRequest(
            "there is no prompt.",
            why="nothing else says what to show.",
            hint=f"videogen {args.command} 'a red circle moves right'",
            param="prompt",
        )
    check_run_flags(args)
    card = card_of_model(args)
    given = keywords(args) | frames_of(args, card)
    made = [Request(prompt, **given) for prompt in prompts or [""]]
    for request in made if args.enhance else ():
        request.checked(card)  # before an enhancer is asked
    worded = list(reworded(made, args.enhance, args.style, args.styles))
    requests, notes = several([(request.checked(card), note) for request, note in worded], args.num)
    paths = outputs(args, requests)
    pipe = open_model(args, card, requests)
    for request, path, note in zip(requests, paths, notes, strict=True):
        made_clip = make_clip(pipe, Job(request=request, path=path, notes=note), args)
        if launched()[0] == 0:
            print(json.dumps(made_clip) if args.json else made_clip["path"], flush=True)


def frames_of(args: argparse.Namespace, card: Card, fps: Any = None) -> dict[str, Any]:
    """`--seconds` as the number of frames nearest to it that the model makes; `fps`: where no flag says another."""
    if args.seconds is None:
        return {}
    if getattr(args, "num_frames", None) is not None:
        raise InvalidRequest("--seconds is given beside --frames.", why="both are the length.", hint="one of them")
    given = getattr(args, "fps", None)
    return {"num_frames": frames_in(args.seconds, fps if given is None else given, card)}


def frames_in(seconds: Any, fps: Any, card: Card) -> int:
    """The first frame is at 0 s."""
    rate = card.fps if fps is None else fps
    if not is_real(seconds) or not 0 <= seconds <= 3600:
        raise bad("seconds", seconds, "the length of the clip, at most 3600", "--seconds 6")
    if not is_real(rate) or not 0.1 <= rate <= 240:
        raise bad("fps", rate, "a number from 0.1 to 240", "--fps 8")
    return card.frames.nearest(round(seconds * rate) + 1)


def check_run_flags(args: argparse.Namespace) -> None:
    """What is wrong whatever the model is; without torch."""
    check_names(**{name: getattr(args, name) for name in ("device", "dtype", "memory", "kernel", "quantize")})
    if not 0 <= args.crf <= 51:
        raise InvalidRequest(f"crf is {args.crf}.", why="it goes from 0 (best) to 51.", hint="--crf 17", param="crf")
    check_num(getattr(args, "num", 1))


def check_num(num: Any) -> None:
    """Of `--num`, or of a row."""
    if not is_int(num) or not 1 <= num <= MOST_PROMPTS:
        raise bad("num", num, f"a count of clips, at most {MOST_PROMPTS}", "-n 4")


def reworded(
    requests: Iterable[Request], enhance: str | None, style: str | None, styles: str | None = None
) -> Iterator[tuple[Request, dict[str, Any]]]:
    """Each request with its prompt enhanced and in a style, and a note for the recipe of what was changed."""
    if not style and not enhance:
        yield from ((request, {}) for request in requests)
        return
    from videogen.enhance import enhancer
    from videogen.styles import find_style

    look = find_style(style, styles) if style else None
    better = enhancer(enhance) if enhance else None
    for request in requests:
        prompt, negative = request.prompt, request.negative_prompt
        note: dict[str, Any] = {}
        if better:
            prompt = better(prompt, seed=request.seed)
            note |= {"original_prompt": request.prompt, "enhanced_by": better.name, "enhanced_prompt": prompt}
        if look:
            prompt, negative = look.applied(prompt, negative)
            note |= {"original_prompt": request.prompt, "style": style}
        yield replace(request, prompt=prompt, negative_prompt=negative), note


def several(made: Iterable[tuple[Request, dict[str, Any]]], count: int) -> tuple[list[Request], list[dict[str, Any]]]:
    """Each request `count` times, with the seeds s, s + 1, … of a request of seed s; the notes go with them."""

    def seeds(seed: Any, k: int) -> Any:
        return [one + k for one in seed] if isinstance(seed, list | tuple) else seed + k

    pairs = [(replace(r, seed=seeds(r.seed, k)), note) for r, note in made for k in range(count)]
    return [request for request, _ in pairs], [note for _, note in pairs]


def open_model(args: argparse.Namespace, card: Card, requests: Collection[Request]) -> Any:
    """The pipeline the flags ask for, on all processes of torchrun; `requests` are what it is to make: they say whether
    there will be guidance, and with --memory auto how much memory there must be."""
    for lora in open_loras(args.lora):
        check_fit(lora.file, card.dit, card.name)
    say(args, f"loading {card.name}")
    import videogen

    mesh = None
    if launched()[1] > 1:
        from videogen.distributed.mesh import make_mesh, start

        start(args.device)
        is_guided = any((request.guidance_scale or 0) > 1 for request in requests)
        mesh = make_mesh(card.dit.num_attention_heads, is_guided=is_guided)
    options = {name: getattr(args, name) for name in LOAD}
    if args.memory == "auto":
        from videogen.pipeline import plan_for
        from videogen.runtime.devices import choose_device, choose_dtype

        device = choose_device(args.device)
        options["memory"], note = plan_for(card, device, choose_dtype(args.dtype, device, card), requests)
        say(args, note)
    pipe = videogen.load(args.model, **options)
    if mesh is not None:
        from videogen.distributed.parallel import parallel

        pipe = parallel(pipe, mesh)
    return pipe


def make_clip(pipe: Any, job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """Make one clip and write its file; returns what `--json` prints: path, seed, settings, seconds."""
    rank, request = launched()[0], job.request
    started = time.monotonic()
    frames, height, width = request.size
    prompt = request.prompt if job.item is None else request.prompt[job.item]
    say(
        args, f"{prompt!r}: {width}x{height}, {frames} frames, {request.num_inference_steps} steps, seed {request.seed}"
    )
    if len(pipe.windows(request)) > 1 and not rank:
        native, name = pipe.card.native_frames, pipe.card.name
        note = f"more than {name} makes at once: overlapping windows of {native} frames; it may drift"
        warnings.warn(Note(note), stacklevel=2)
    progress = None if is_quiet(args) else Progress()
    out: Any = None if rank else Writer(job.path, job.notes, args.crf, args.overwrite, not args.no_metadata)
    if job.item is not None and not rank:
        out = [out if item == job.item else partial(_discard, item) for item in range(request.batch_size)]
    try:
        asked = {f.name: getattr(request, f.name) for f in fields(Request)} | {"on_step": progress, "out": out}
        video = pipe.generate(asked.pop("prompt"), **asked)
    finally:
        if progress:
            progress.close()
    video = video if job.item is None else video[job.item]
    seconds = time.monotonic() - started
    say(args, f"done in {duration(seconds)}")
    settings = without_images(video.settings | job.notes)
    return {"path": str(video.path), "seed": video.seed, "settings": settings, "seconds": round(seconds, 3)}


def is_quiet(args: argparse.Namespace) -> bool:
    return args.quiet or launched()[0] > 0


def say(args: argparse.Namespace, text: str) -> None:
    """To people, who read stderr."""
    if not is_quiet(args):
        print(text, file=sys.stderr)


@dataclass(frozen=True)
class Writer:
    """`write_video` as the flags want it: what `generate` puts its frames into as they are decoded."""

    path: Path
    notes: dict[str, Any]  # what the recipe has beside the request
    crf: int
    overwrite: bool
    metadata: bool

    def __call__(self, chunks: Iterable[Any], fps: float | int, *, recipe: dict[str, Any]) -> Path:
        from videogen.data.video import write_video

        kept = recipe | self.notes if self.metadata else None
        return write_video(self.path, chunks, fps, recipe=kept, crf=self.crf, overwrite=self.overwrite)


def _discard(item: int, chunks: Iterable[Any], fps: float | int, *, recipe: dict[str, Any]) -> Path:
    """In the place of a writer, for a clip of a batch that nobody wants: it is not even decoded."""
    return Path(os.devnull)


def keywords(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as keywords of Request."""
    keywords = {name: getattr(args, name) for name in (*TYPES, *IMAGES) if hasattr(args, name)}
    if args.size:
        if keywords.get("width") or keywords.get("height"):
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


def outputs(args: argparse.Namespace, requests: list[Request]) -> list[Path]:
    """Where each clip goes, refused now rather than after the work if it cannot."""
    out = Path(args.out or "outputs")
    if args.out and out.suffix and not out.is_dir() and not args.out.endswith(os.sep):
        if len(requests) > 1:
            raise InvalidRequest(
                f"--out names one file for {len(requests)} clips.",
                why="each clip is a file.",
                hint="--out FOLDER",
                param="out",
            )
        check_output(out, overwrite=args.overwrite)
        return [out]
    stamp = time.strftime("%Y%m%d-%H%M%S")
    paths: list[Path] = []
    for request in requests:
        stem = f"{stamp}_{slug(request.prompt)}_s{request.seed}"
        taken = {path.name for path in (*paths, *out.glob(f"{stem}*"))}
        names = (f"{stem}{suffix}.mp4" for suffix in ("", *(f"-{n}" for n in range(2, len(taken) + 3))))
        paths.append(out / next(name for name in names if name not in taken))
    return [check_output(path) for path in paths]


def slug(text: str, length: int = 40) -> str:
    """`A red circle!` -> `a-red-circle`, cut at a word.

    >>> slug("a small red circle moves right on a navy background")
    'a-small-red-circle-moves-right-on-a-navy'
    """
    words = re.sub(r"[\W_]+", "-", text.lower()).strip("-")
    if len(words) > length:
        words = words[: length + 1].rpartition("-")[0] or words[:length]
    return words or "clip"


def prompts_of(given: list[str]):
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
            yield from read_lines(prompt[1:])
        else:
            yield prompt


def size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)[xX×](\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 720x480")
    return int(found[1]), int(found[2])


def keyframe(text: str) -> tuple[int, str]:
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
    return _as_flags(values)


def preset_flags(name: str, model: str) -> list[str]:
    """`--preset NAME` as the flags it stands for; placed before all others, which then win."""
    from videogen.styles import find_preset

    return _as_flags(find_preset(name, model))


def _as_flags(values: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in values.items():
        if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
            raise InvalidRequest(
                f"there is no setting {name!r}.",
                why="a setting has the name of a flag.",
                hint="seed: 7",
                param="config",
            )
        flag = "--" + name.replace("_", "-")
        if name == "prompt" and value is not None:
            flags += [_as_prompt(text) for text in (value if isinstance(value, list) else [value])]
        elif name == "keyframes" and isinstance(value, dict):
            flags += [f"--keyframe={index}={image}" for index, image in value.items()]
        elif name == "lora" and isinstance(value, list):
            flags += [f"--lora={one}" for one in value]
        elif value is True or value == "true":  # what may take a word would take the prompt that follows
            flags.append(f"{flag}=diffusers" if name == "use_dynamic_cfg" else flag)
        elif value is not None and value is not False and value != "false":
            flags.append(f"{flag}={value}")
    return flags


def _as_prompt(text: Any) -> str:
    """A text that is no flag when it stands where prompts do; `-` alone reads lines from stdin."""
    if not isinstance(text, str):
        raise bad("prompt", text, "a text, or a list of texts", 'prompt: "5"')
    if text.startswith("-") and text != "-":
        raise InvalidRequest(
            f"the prompt {text!r:.60} begins with a dash.",
            why="it would be read as a flag.",
            hint="leave the dash out.",
        )
    return text
