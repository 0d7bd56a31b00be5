"""Lists in JSON lines: captions with their sources, names in quarantine. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videogen.config import from_dict
from videogen.data.files import local, written
from videogen.errors import FileError, InvalidRequest

LINE_LIMIT = 2**22  # characters of one line


@dataclass(frozen=True)
class Caption:
    """Words for a clip, who wrote them, and how often they are drawn beside its other captions."""

    text: str
    source: str = "given"
    weight: float | int = 1.0


def captions_of(values: Any, *, where: str, source: str = "given") -> tuple[Caption, ...]:
    """A string, a mapping as of `Caption`, or a list of these. Empty texts are left out."""
    found = []
    for one in values if isinstance(values, list) else [values]:
        caption = from_dict(Caption, one, where=where) if isinstance(one, dict) else Caption(str(one or ""), source)
        if not 0 <= caption.weight < math.inf:
            raise InvalidRequest(f"{where} has a caption of weight {caption.weight}.", why="weights are 0 or more.")
        if caption.text.strip():
            found.append(Caption(in_utf8(caption.text.strip()), in_utf8(caption.source), caption.weight))
    return tuple(found)


def in_utf8(text: str) -> str:
    """With escapes for what UTF-8 cannot say: half characters of JSON, bytes of file names that are no text."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def key_of(*facts: Any) -> str:
    """32 hexadecimal digits that JSON-ready facts have alone."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def json_lines(path: str | Path, *, torn: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of each line of a file. Raises InvalidRequest that names the first bad one.

    torn  a last line that has no end and reads as nothing is passed over: a killed writer left it
    """
    path, number = local(path), 0
    try:
        with path.open(encoding="utf-8-sig", errors="replace" if torn else "strict") as file:
            while line := file.readline(LINE_LIMIT):
                number += 1
                if len(line) >= LINE_LIMIT:
                    raise ValueError("the line is too long")
                if not line.strip() or (torn and _is_torn(line)):
                    continue
                values = json.loads(line)
                if not isinstance(values, dict):
                    raise ValueError("the line holds no object")
                yield number, values
    except InvalidRequest:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"{path} cannot be read.", why=f"line {number}: {error}", hint="a JSON object on each line, in UTF-8."
        ) from error


def write_json(path: Path, values: Any) -> None:
    with written(path) as part:
        part.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> int:
    """JSON lines, which take the place of the old ones when the last is written; returns how many there are."""
    count = 0
    with written(path) as part, part.open("w", encoding="utf-8") as file:
        for values in lines:
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
            count += 1
    return count


def add_line(path: str | Path, values: dict[str, Any]) -> None:
    """Put a line at the end of a file that grows, on the disk before this returns; a torn line there is removed."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            size, last = file.seek(0, os.SEEK_END), b""
            file.seek(max(0, size - 1))
            if file.read(1) not in (b"", b"\n"):
                file.seek(max(0, size - LINE_LIMIT))
                last = file.read().rpartition(b"\n")[2]
            if last and _is_torn(last.decode(errors="replace")):
                file.truncate(size - len(last))
                last = b""
            file.write((b"\n" if last else b"") + json.dumps(values, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise FileError(f"{path} could not be written.", why=str(error), hint="free some disk space.") from error


def _is_torn(line: str) -> bool:
    try:
        return not line.endswith("\n") and not isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return True


# ---- quarantine: samples that are left out, with the reason ---------------------------------------------------------


def quarantine(path: str | Path, name: str, reason: str, detail: str = "") -> None:
    """Add a sample to a quarantine list."""
    add_line(path, {"name": name, "reason": reason, "detail": detail})


def read_quarantine(path: str | Path) -> dict[str, str]:
    """Name -> reason, of a list that `videogen data check` or a training wrote, or an edited one."""
    found: dict[str, str] = {}
    for number, values in json_lines(path, torn=True):
        if not isinstance(values.get("name"), str):
            raise InvalidRequest(
                f"{path} names nothing.", why=f"in line {number}.", hint='{"name": …, "reason": …} on each line.'
            )
        found[values["name"]] = str(values.get("reason", "quarantined"))
    return found
