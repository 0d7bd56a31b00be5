"""What is in a set of clips, before a GPU waits for it: counts, lengths, bad files, defects, what would be left out.

`check` decodes every clip once and writes three files into a folder: `check.jsonl` with a line per sample (a run that
was stopped goes on there), `report.json`, and `quarantine.jsonl`, the names that are to be left out and why.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from videogen.data.filters import DEFECTS, LIMITS, Thresholds, measure
from videogen.data.manifest import add_line, in_utf8, json_lines, key_of, write_json, write_lines
from videogen.data.sources import Dropped, Pictures, Sample, samples
from videogen.data.windows import Cut, planned
from videogen.errors import FileError, InvalidRequest

EXAMPLES = 3  # names shown per reason
DROP = ("static", "black", "blurry")  # by default; clips with cuts are cut there (`cuts_of`)


def check(
    source: str | Path,
    folder: str | Path,
    *,
    cut: Cut | None = None,
    drop: Collection[str] = DROP,
    limits: Thresholds = LIMITS,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """The report, also written to `folder`.

    cut    what windows a model is trained on: then also how many there would be, and which clips are too short
    drop   those of `filters.DEFECTS` that put a clip into quarantine; the others are only reported
    """
    if unknown := [name for name in drop if name not in DEFECTS]:
        raise InvalidRequest(
            f"there is no filter {unknown[0]!r}.", why=f"there are {', '.join(DEFECTS)}.", hint="or none", param="drop"
        )
    folder = Path(folder)
    lines = list(_checked(source, folder / "check.jsonl", limits, say))
    for line in lines:
        line["reason"], line["detail"] = _reason(line, cut, drop)
    report = report_of(source, lines, cut)
    out = ({name: line[name] for name in ("name", "reason", "detail")} for line in lines if line["reason"])
    write_lines(folder / "quarantine.jsonl", out)
    write_json(folder / "report.json", report)
    return report


def cuts_of(folder: str | Path) -> dict[str, list[int]]:
    """Name -> frames that begin a new scene, of the clips that `check` found some in."""
    lines = (values for _, values in json_lines(Path(folder) / "check.jsonl", torn=True))
    return {line["name"]: [int(at) for at in line["cuts"]] for line in lines if line.get("cuts")}


def _checked(
    source: str | Path, path: Path, limits: Thresholds, say: Callable[[str], object]
) -> Iterator[dict[str, Any]]:
    """A line per sample, of this run or an earlier one that saw the same file with the same limits."""
    known = {}
    if path.is_file():
        known = {(line["name"], line.get("key")): line for _, line in json_lines(path, torn=True)}
    fresh: list[dict[str, Any]] = []
    for number, sample in enumerate(samples(source), start=1):
        try:
            sha = "" if isinstance(sample, Dropped) else sample.sha256()
        except FileError as error:
            sample, sha = Dropped(sample.name, "unreadable", error.why), ""
        if isinstance(sample, Dropped):
            line: dict[str, Any] = {"name": sample.name, "bad": sample.reason, "why": in_utf8(sample.detail)}
        else:
            key = key_of(sha, asdict(limits), sample.fps)
            line = known.get((sample.name, key)) or facts_of(sample, limits) | {"key": key, "sha256": sha}
            line["captions"] = [asdict(caption) for caption in sample.captions]
            if (sample.name, key) not in known:
                add_line(path, line)
        fresh.append(line)
        if number % 100 == 0:
            say(f"{number} samples")
        yield line
    told = ({name: value for name, value in line.items() if name not in ("reason", "detail")} for line in fresh)
    write_lines(path, told)  # in the source's order, without what is no longer there


def facts_of(sample: Sample, limits: Thresholds = LIMITS) -> dict[str, Any]:
    """Size, length, rate and defects of one clip, decoded once; or under "bad" why it cannot be read."""
    size = (0, 0)

    def seen(pictures: Pictures) -> Pictures:
        nonlocal size
        for picture in pictures:
            size = size if size[0] else (picture.shape[0], picture.shape[1])
            yield picture

    line: dict[str, Any] = {"name": sample.name, "kind": sample.kind or "folder"}
    try:
        with sample.stream() as (fps, promised, pictures):
            found = measure(seen(pictures))
        if promised and found.num_frames != promised:
            raise FileError("it is damaged.", why=f"{found.num_frames} of {promised} frames are there.")
    except (FileError, InvalidRequest, ValueError) as error:
        why = f"{error.what} {error.why}" if isinstance(error, FileError | InvalidRequest) else str(error)
        return line | {"bad": "unreadable", "why": why.strip()}
    return line | {
        "height": size[0],
        "width": size[1],
        "num_frames": found.num_frames,
        "fps": fps,
        "motion": found.motion,
        "black": found.black,
        "blur": found.blur,
        "cuts": found.cuts(limits),
        "defects": found.defects(limits),
    }


def _reason(line: dict[str, Any], cut: Cut | None, drop: Collection[str]) -> tuple[str, str]:
    """Why a sample would be left out, and the details; ("", "") if it would not."""
    if line.get("bad"):
        return line["bad"], line["why"]
    for name in DEFECTS:
        if name in drop and name in line["defects"]:
            return name, line["defects"][name]
    if cut and not planned(line["num_frames"], line["fps"], cut, line["cuts"])[0]:
        return "too short", f"{line['num_frames']} frames at {line['fps'] or cut.rate:g} per second"
    return "", ""


def report_of(source: str | Path, lines: list[dict[str, Any]], cut: Cut | None) -> dict[str, Any]:
    """What `videogen data check` prints."""
    read = [line for line in lines if not line.get("bad")]
    kept = [line for line in lines if not line["reason"]]
    clips = [line for line in read if line["num_frames"] > 1]
    captions = [caption for line in read for caption in line["captions"]]
    first = {line["sha256"]: line["name"] for line in reversed(read)}
    copies = [f"{line['name']} = {first[line['sha256']]}" for line in read if first[line["sha256"]] != line["name"]]
    report: dict[str, Any] = {
        "source": str(source),
        "samples": len(lines),
        "clips": len(clips),
        "pictures": len(read) - len(clips),
        "kept": len(kept),
        "frames": _spread([line["num_frames"] for line in clips]),
        "seconds": round(sum(line["num_frames"] / line["fps"] for line in clips if line["fps"]), 1),
        "rates": _counted(f"{line['fps']:g}" if line["fps"] else "unknown" for line in clips),
        "sizes": _counted(f"{line['width']}x{line['height']}" for line in read),
        "captions": {
            "without": sum(not line["captions"] for line in read),
            "words": _spread([len(caption["text"].split()) for caption in captions]),
            "sources": _counted(caption["source"] for caption in captions),
        },
        "copies": {"count": len(copies), "examples": copies[:EXAMPLES]} if copies else {},
        "defects": _counted(name for line in read for name in line["defects"]),
        "left out": _reasons(lines),
    }
    if cut:
        plans = [planned(line["num_frames"], line["fps"], cut, line["cuts"]) for line in kept]
        report["windows"] = _counted(f"{length} frames" for lengths, _ in plans for length in lengths)
        report["frames left over"] = sum(left for _, left in plans)
    return report


def _reasons(lines: list[dict[str, Any]]) -> dict[str, Any]:
    by_reason: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if line["reason"]:
            by_reason[line["reason"]].append(line)
    return {
        reason: {"count": len(found), "examples": [f"{one['name']}: {one['detail']}" for one in found[:EXAMPLES]]}
        for reason, found in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    }


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _spread(values: list[int]) -> dict[str, int]:
    if not values:
        return {}
    return {"least": min(values), "median": int(np.median(values)), "most": max(values)}
