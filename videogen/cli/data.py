"""`videogen data check | cache | caption`: what is in a set of clips, the clips as latents, words for them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from videogen.cli.show import show
from videogen.errors import InvalidRequest, visible

if TYPE_CHECKING:
    from videogen.data.windows import Cut
    from videogen.weights.card import Card

SOURCE = "a folder (metadata.jsonl, metadata.csv, or clip.txt beside clip.mp4), a list, tar shards, or hf:NAME[:SPLIT]"
FILTERS = ("cuts", "static", "black", "blurry")  # data.filters.DEFECTS, said again: a refused command imports no numpy


def add_command(subparsers: Any) -> None:
    command = subparsers.add_parser("data", help="check a set of clips, encode it for training, caption it")
    actions = command.add_subparsers(dest="action", metavar="action", required=True, parser_class=type(command))

    action = actions.add_parser("check", help="counts, lengths, bad files, defects, what would be left out and why")
    add = action.add_argument
    add("source", metavar="CLIPS", help=SOURCE)
    add("--out", metavar="DIR", default="runs/data-check", help="report and lists (default: runs/data-check)")
    add(
        "--drop",
        default="static,black,blurry",
        help=f"defects that put a clip into quarantine: some of {','.join(FILTERS)}, or none (default: all but cuts)",
    )
    add("--json", action="store_true", help="print JSON")
    add_cut(action, model=None)

    action = actions.add_parser("cache", help="latents and text embeddings on disk, which a training reads")
    add = action.add_argument
    add("source", metavar="CLIPS", help=SOURCE)
    add("--out", metavar="DIR", required=True, help="the cache; a stopped run goes on there")
    add_cut(action, model="tiny")
    add("--check", metavar="DIR", help="what `data check` wrote: leave out its quarantine, cut clips at its cuts")
    add("--quarantine", metavar="FILE", help="another list of names to leave out")
    add("--words", action="store_true", help="keep captions as words: for a training with a text encoder of its own")
    add("--frame-latents", action="store_true", help="encode frames alone too, for training image-to-video")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add("--dtype", default="auto", help="of the encoders and the cache (default: float32 on a CPU)")
    add("--share", metavar="I/N", help="encode the I-th of N parts (default: RANK/WORLD_SIZE of torchrun, or all)")
    add("--offline", action="store_true", help="never use the network")
    add("--json", action="store_true", help="print JSON")

    action = actions.add_parser("caption", help="captions by a model that sees, beside those that are there")
    add = action.add_argument
    add("source", metavar="CLIPS", help=SOURCE)
    add("--with", dest="by", metavar="HOW", required=True, help="http://HOST/v1#MODEL, local:FOLDER, or world")
    add("--out", metavar="FILE", help="default: captions.jsonl in the folder of the clips, where it is found again")
    add("--share", type=float, default=0.95, help="how often they are drawn beside one other caption (default: 0.95)")
    add("--json", action="store_true", help="print JSON")

    for name, action in actions.choices.items():
        action.set_defaults(run=RUN[name])


def add_cut(action: Any, *, model: str | None) -> None:
    """What the windows are like that a model is trained on."""
    add = action.add_argument
    add("--model", default=model, help=f"whose sizes, lengths and rate (default: {model or 'none, no windows'})")
    add("--frames", metavar="N,N", help="allowed lengths (default: the model's, and shorter where it allows them)")
    add("--size", metavar="WxH,WxH", help="allowed sizes (default: the model's)")
    add("--fps", type=float, help="frames per second (default: the model's)")
    add("--fit", choices=("crop", "pad", "stretch"), default="crop", help="how a frame gets its size (default: crop)")


def check(args: argparse.Namespace) -> None:
    """Print the report. Exit code 0 whatever it finds: it is a report."""
    drop = [] if args.drop == "none" else [name.strip() for name in args.drop.split(",") if name.strip()]
    if unknown := [name for name in drop if name not in FILTERS]:
        raise InvalidRequest(
            f"there is no filter {unknown[0]!r}.", why=f"there are {', '.join(FILTERS)}.", hint="--drop none"
        )
    given = [args.frames, args.size, args.fps]
    if not args.model and any(given) and not all(given):
        raise InvalidRequest(
            "--frames, --size and --fps say together what windows are like.",
            why="without --model nothing tells the others.",
            hint="--model tiny, or all three.",
        )
    cut = cut_of(args, card_of(args)) if args.model or all(given) else None
    from videogen.data.check import check

    report = check(args.source, args.out, cut=cut, drop=drop, say=_say)
    show(report | {"written": f"{args.out}/check.jsonl, report.json, quarantine.jsonl"}, args.json)


def cache(args: argparse.Namespace) -> None:
    """Encode what is missing and print what was done."""
    share = share_of(args.share)
    card = card_of(args)
    assert card is not None
    cut = cut_of(args, card)
    from videogen.data.check import cuts_of
    from videogen.data.manifest import read_quarantine

    lists = [args.quarantine] if args.quarantine else []
    lists += [Path(args.check) / "quarantine.jsonl"] if args.check else []
    left_out = {name: reason for path in lists for name, reason in read_quarantine(path).items()}
    cuts = cuts_of(args.check) if args.check else {}
    from videogen.runtime.devices import choose_device, choose_dtype
    from videogen.training.encode import make_cache

    device = choose_device(args.device)
    report = make_cache(
        args.source,
        card,
        args.out,
        cut,
        dtype=choose_dtype(args.dtype, device, card),
        device=device,
        words=args.words,
        frame_latents=args.frame_latents or None,
        quarantine=left_out,
        cuts=cuts,
        share=share,
        say=_say,
    )
    names = ("clips", "windows", "encoded", "captions", "embedded", "without_caption", "long_captions")
    facts: dict[str, Any] = {name.replace("_", " "): getattr(report, name) for name in names}
    facts["left out"] = {}
    for reason, count in report.reasons.items():
        examples = [f"{one.name}: {one.detail}" for one in report.dropped if one.reason == reason][:3]
        facts["left out"][reason] = {"count": count, "examples": examples}
    show(facts | {"cache": args.out}, args.json)


def caption(args: argparse.Namespace) -> None:
    """Caption what is not captioned yet and print the counts."""
    if not 0 < args.share < 1:
        raise InvalidRequest(f"--share {args.share}.", why="it is between 0 and 1.", hint="--share 0.95", param="share")
    from videogen.data.captions import caption_source, captioner

    if args.by == "world":
        from videogen.evaluation.describe import WorldCaptioner

        by: Any = WorldCaptioner()
    else:
        by = captioner(args.by)
    out = Path(args.out) if args.out else _beside(args.source)
    counts = caption_source(args.source, by, out, weight=round(args.share / (1 - args.share), 6), say=_say)
    show(counts | {"captions": str(out)}, args.json)


def _beside(source: str) -> Path:
    if source.startswith("hf:"):
        raise InvalidRequest(
            "there is no folder for the captions.", why=f"{source} is no folder.", hint="--out captions.jsonl"
        )
    path = Path(source)
    return (path if path.is_dir() else path.parent) / "captions.jsonl"


def card_of(args: argparse.Namespace) -> Card | None:
    if not args.model:
        return None
    from videogen.weights.hub import find_model
    from videogen.weights.single import open_card

    offline, weights = getattr(args, "offline", False), args.action == "cache"
    return open_card(find_model(args.model, offline=offline, weights=weights), offline=offline, weights=weights)


def cut_of(args: argparse.Namespace, card: Card | None) -> Cut:
    """The model's native size and rate, and every length up to its own that it allows; flags go before.

    Of a model with a learned table of positions only its own length: the others it was not shown.
    """
    from videogen.data.windows import Cut

    if card:
        longest = card.num_frames
        lengths = tuple(n for n in range(longest, 0, -1) if card.frames.allow(n) and not card.fixed_size) or (longest,)
        sizes: tuple[tuple[int, int], ...] = ((card.height, card.width),)
        rate = float(card.fps)
    else:
        lengths, sizes, rate = (), (), 0.0
    lengths = tuple(numbers(args.frames, "frames")) or lengths
    sizes = tuple(size_of(text, card) for text in args.size.split(",")) if args.size else sizes
    return Cut(lengths=lengths, sizes=sizes, rate=rate if args.fps is None else args.fps, fit=args.fit)


def numbers(text: str | None, param: str) -> list[int]:
    try:
        return [int(one) for one in text.split(",")] if text else []
    except ValueError as error:
        raise InvalidRequest(f"--{param} {text}.", why="whole numbers, with commas.", param=param) from error


def size_of(text: str, card: Card | None) -> tuple[int, int]:
    """ "720x480" as (height, width)."""
    width, _, height = text.strip().lower().partition("x")
    multiple = card.size_multiple if card else 1
    if not (width.isdecimal() and height.isdecimal()) or int(width) % multiple or int(height) % multiple:
        raise InvalidRequest(
            f"--size {text}.",
            why=f"a size is WIDTHxHEIGHT, in multiples of {multiple}.",
            hint="--size 720x480",
            param="size",
        )
    return int(height), int(width)


def share_of(text: str | None) -> tuple[int, int]:
    """(this process, of how many)."""
    if text is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    first, _, last = text.partition("/")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise InvalidRequest(f"--share {text}.", why="it is I/N, from 0/N on.", hint="--share 0/4", param="share")
    return int(first), int(last)


def _say(line: str) -> None:
    print(visible(line), file=sys.stderr, flush=True)


RUN = {"check": check, "cache": cache, "caption": caption}
