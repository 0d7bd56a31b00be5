"""`videogen batch FILE`: a clip for each row with one load of the model; run again, it makes what is still missing."""

from __future__ import annotations

import argparse
import csv
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from videogen.checks import bad, is_int
from videogen.cli import generate
from videogen.data.files import check_output, local
from videogen.distributed import launched, one_voice
from videogen.errors import FileError, InvalidRequest, VideogenError, as_known
from videogen.request import FILES, Request
from videogen.weights.lora import open_loras

ALIASES = {flag.removeprefix("--"): name for name, flags in generate.ALIASES.items() for flag in flags}
OWN = ("size", "seconds", "out", "num", "style")  # keys of a row that are no fields of Request
KINDS = (".jsonl", ".csv", ".txt")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a row asks for, checked: its number in the file, one job, and whether that was done before."""

    number: int
    job: generate.Job
    is_done: bool = False


def add_command(subparsers: Any) -> None:
    command = subparsers.add_parser("batch", help="a clip for each row of a file, with one load; resumable")
    add = command.add_argument
    add("file", type=Path, help=".jsonl (an object per line), .csv (a column per setting) or .txt (a prompt per line)")
    generate.add_request_flags(command, default=argparse.SUPPRESS)
    generate.add_image_flags(command, default=argparse.SUPPRESS)
    generate.add_habit_flags(command)
    generate.add_run_flags(command)
    add("--shard", type=_shard, default=(1, 1), metavar="I/N", help="only every N-th row, from the I-th on (1/4 … 4/4)")
    add("--keep-going", action="store_true", help="go on after a row that failed")
    command.set_defaults(run=run)


@one_voice()
def run(args: argparse.Namespace) -> int:
    """Check all rows, then load the model once. A line of JSON for each row, and one for all; 0 if none failed."""
    generate.check_run_flags(args)
    card = generate.card_of_model(args)
    rows = [row for number, settings in read_rows(args.file) for row in checked_rows(number, settings, args, card)]
    _require_different_files(rows)
    first, count = args.shard
    rows = [row for row in rows if row.number % count == first % count]
    facts = common_facts(args) if rows else {}
    rows = [placed(row, facts, args) for row in rows]
    todo = [row for row in rows if not row.is_done]
    generate.say(args, f"{len(rows)} clips, {len(rows) - len(todo)} of them made before")
    for row in rows:
        if row.is_done:
            tell({"row": row.number, "status": "skipped", "path": str(row.job.path)})
    pipe = generate.open_model(args, card, [row.job.request for row in todo]) if todo else None
    failures: list[VideogenError] = []
    done = 0
    for done, row in enumerate(todo, 1):
        generate.say(args, f"clip {done} of {len(todo)}, row {row.number}")
        try:
            _remove_parts(row.job.path)
            made = generate.make_clip(pipe, row.job, args)
        except Exception as error:
            known = as_known(error)
            failures.append(known)
            said = {"what": known.what, "why": known.why, "try": known.hint, "exit_code": known.exit_code}
            tell({"row": row.number, "status": "failed", "path": str(row.job.path), "error": said})
            generate.say(args, str(known))
            if not args.keep_going:
                break
        else:
            tell({"row": row.number, "status": "made"} | {k: made[k] for k in ("path", "seed", "seconds")})
    skipped, failed = len(rows) - len(todo), len(failures)
    tell({"made": done - failed, "skipped": skipped, "failed": failed, "left": len(todo) - done})
    return failures[0].exit_code if failures else 0


def tell(row: dict[str, Any]) -> None:
    if launched()[0] == 0:
        print(json.dumps(row), flush=True)


# ---- reading --------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(row number from 1, settings by name) of every row that is not empty."""
    if path.suffix.lower() not in KINDS:
        raise InvalidRequest(
            f"{path.name} is no known kind of list.", why=f"the ending says which: {', '.join(KINDS)}.", hint="x.jsonl"
        )
    local(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                table: list[Any] = [dict(row) for row in csv.DictReader(file)]
            else:
                table = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidRequest(f"{path} cannot be read.", why=str(error), hint="a UTF-8 text file.") from error
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(table, 1):
        if isinstance(line, dict):
            row = line if any(value not in (None, "") for value in line.values()) else {}
        elif line:
            row = _json(number, line) if path.suffix.lower() == ".jsonl" else {"prompt": line}
        else:
            row = {}
        if row:
            rows.append((number, row))
    if not rows:
        raise InvalidRequest(f"{path} has no rows.", why="each row is a clip.", hint='{"prompt": "a red circle"}')
    return rows


def _json(number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"row {number} is not JSON.", why=str(error), hint='{"prompt": "a red circle"}') from error
    if isinstance(row, str):
        return {"prompt": row}
    if not isinstance(row, dict):
        raise InvalidRequest(f"row {number} is no object.", why="a row is {…} or a text.", hint='{"prompt": "a cat"}')
    return row


def checked_rows(number: int, row: dict[str, Any], args: argparse.Namespace, card: Any) -> list[Row]:
    """A row, over the flags, as checked jobs with their files: one, or `num` of them."""
    with _of_row(number):
        given = settings(row, args.file.parent)
        own = {name: given.pop(name) for name in OWN if name in given}
        if "size" in own:
            given["width"], given["height"] = own["size"]
        seconds = own.get("seconds", None if "num_frames" in given else args.seconds)
        given = generate.keywords(args) | generate.frames_of(args, card, given.get("fps")) | given
        if seconds is not None:
            given["num_frames"] = generate.frames_in(seconds, given.get("fps"), card)
        request = Request(**given)
        if args.enhance:
            request.checked(card)  # before an enhancer is asked
        style, num = own.get("style", args.style), own.get("num", args.num)
        ((request, note),) = generate.reworded([request], args.enhance, style, args.styles)
        jobs = generate.several([(request.checked(card), note)], num)
        return [
            Row(number=number, job=generate.Job(request=request, path=path, notes=note))
            for request, note in zip(*jobs, strict=True)
            for path in [_path(number, request, own.get("out"), num, args)]
        ]


@contextmanager
def _of_row(number: int) -> Iterator[None]:
    """An error also says which row it is about."""
    try:
        yield
    except VideogenError as error:
        kind = type(error)
        raise kind(f"row {number}: {error.what}", why=error.why, hint=error.hint, param=error.param) from error


def settings(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The row by the names of keywords. Texts of a csv become numbers; paths count from the file's own folder."""
    known = ["prompt", *generate.TYPES, *generate.IMAGES, *OWN]
    given: dict[str, Any] = {}
    for key, value in row.items():
        name = str(key).strip().replace("-", "_")
        name = ALIASES.get(name, name)
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *ALIASES], n=1)
            raise InvalidRequest(
                f"there is no setting {key!r}.",
                why=f"a row has keywords of generate, {', '.join(OWN)}; the model is one for all (--model).",
                hint=f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}",
                param=str(key),
            )
        if value is not None and value != "":
            given[name] = _value(name, value)
    _check_kinds(given)
    for name in FILES:
        if name == "keyframes" and name in given:
            given[name] = {int(k): _beside(folder, v) for k, v in given[name].items()}
        elif name in given:
            given[name] = _beside(folder, given[name])
    return given


def _beside(folder: Path, path: str) -> str:
    return path if "://" in path else os.path.join(folder, os.path.expanduser(path))


def _check_kinds(given: dict[str, Any]) -> None:
    """What is used before a request is checked. A row is one clip, so texts are no lists."""
    for name in ("prompt", "negative_prompt", "out", "style", *FILES):
        if name in given and name != "keyframes" and not isinstance(given[name], str):
            raise bad(name, given[name], "a text, and a row is one clip", '{"prompt": "a red circle"}')
    if "num" in given:
        generate.check_num(given["num"])
    size = given.get("size", (1, 1))
    if not (isinstance(size, tuple) and len(size) == 2 and all(map(is_int, size))):
        raise bad("size", size, "width and height", '{"size": "720x480"}')
    frames = given.get("keyframes", {})
    known = isinstance(frames, dict) and all(
        re.fullmatch("[0-9]{1,9}", str(k)) and isinstance(v, str) for k, v in frames.items()
    )
    if not known:
        raise bad("keyframes", frames, "images by frame index", '{"keyframes": {"8": "middle.png"}}')


def _value(name: str, value: Any) -> Any:
    """A text of a csv as its setting's type; what does not read as one is left for the request's own check."""
    if not isinstance(value, str) or name in ("prompt", "out", "style"):
        return tuple(value) if name == "size" and isinstance(value, list) else value
    try:
        if name == "size":
            return generate.size(value)
        if name == "keyframes":
            return dict(generate.keyframe(one.strip()) for one in value.split(";"))
        kind = {"num": int, "seconds": float}.get(name) or generate.TYPES.get(name, str)
        return value.strip().lower() in ("true", "1", "yes") if kind is bool else kind(value)
    except argparse.ArgumentTypeError as error:
        raise InvalidRequest(f"{error}.", why=f"it is the row's {name}.", hint="720x480, or 8=middle.png") from error
    except ValueError:
        return value


def _path(number: int, request: Request, out: str | None, num: int, args: argparse.Namespace) -> Path:
    """Where the clip goes, always the same for the same row."""
    folder = Path(args.out or Path("outputs") / args.file.stem)
    if folder.suffix and not folder.is_dir():
        raise InvalidRequest(
            f"--out names one file, {folder}.", why="each row is a file.", hint="--out FOLDER", param="out"
        )
    path = folder / (out or f"{number:04d}_{generate.slug(str(request.prompt))}_s{request.seed}.mp4")
    if not Path(os.path.abspath(path)).is_relative_to(folder.absolute()):
        raise InvalidRequest(
            f"{out} leads out of {folder}.", why="a list's clips lie in its folder.", hint="--out FOLDER", param="out"
        )
    if out and num > 1:
        path = path.with_stem(f"{path.stem}_s{request.seed}")
    check_output(path, overwrite=True)
    return path


def common_facts(args: argparse.Namespace) -> dict[str, Any]:
    """What makes all clips what they are. The model's weights are fetched for that, if they are not here yet."""
    facts = {name: getattr(args, name) for name in ("dtype", "kernel", "quantize", "crf")}
    facts["lora"] = [lora.recipe for lora in open_loras(args.lora)]
    card = generate.card_of_model(args, weights=True)
    return facts | {"model": card.name, "weights": generate.weights_of(card)}


def placed(row: Row, facts: dict[str, Any], args: argparse.Namespace) -> Row:
    """The row with the sha256 of all that makes its clip, and whether that clip is there."""
    with _of_row(row.number):
        return _placed(row, facts, args)


def _placed(row: Row, facts: dict[str, Any], args: argparse.Namespace) -> Row:
    job, path = row.job, row.job.path
    facts = job.request.recipe(0) | facts | {"format": path.suffix.lower()}
    sha256 = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    target = check_output(path, overwrite=True)
    is_done = target.exists() and _sha256_in(target) == sha256
    if not is_done and target.exists() and not args.overwrite:
        raise FileError(
            f"{target} exists already, and is another clip.",
            why="without a recipe it cannot be recognised." if args.no_metadata else "its recipe is not this row's.",
            hint="--overwrite, or another folder with --out",
            param="out",
        )
    notes = job.notes | {"row": row.number, "request_sha256": sha256}
    return replace(row, job=replace(job, notes=notes), is_done=is_done)


def _sha256_in(clip: Path) -> str | None:
    from videogen.data.video import read_recipe

    try:
        return (read_recipe(clip) or {}).get("request_sha256")
    except FileError:
        return None


def _require_different_files(rows: list[Row]) -> None:
    seen: dict[Path, int] = {}
    for row in rows:
        if row.job.path in seen:
            raise InvalidRequest(
                f"rows {seen[row.job.path]} and {row.number} have one name, {row.job.path}.",
                why="each row is a file.",
                hint="give each its own out.",
                param="out",
            )
        seen[row.job.path] = row.number


def _remove_parts(path: Path) -> None:
    """What a run that was killed left of this clip, unless it is still at work."""
    for part in path.parent.glob(f".{path.name}.*.part"):
        process = part.name.split(".")[-2]
        if process.isdigit() and part.is_file() and not _runs(int(process)):
            part.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _shard(text: str) -> tuple[int, int]:
    first, slash, count = text.partition("/")
    if not (slash and first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard such as 1/4: the first of four")
    return int(first), int(count)
