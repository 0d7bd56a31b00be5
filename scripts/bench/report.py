"""What a run leaves behind: a JSON file with everything, and the same as tables for people."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "triton", "diffusers", "transformers", "xformers", "flash-attn-3")
COLUMNS = {  # heading: key and format
    "seconds": ("seconds", "{:.3g}"),
    "process seconds": ("cpu_seconds", "{:.3g}"),
    "faster": ("faster", "{:.2f}×"),
    "TFLOP/s": ("tflops", "{:.3g}"),
    "of the floor": ("of_floor", "{:.0%}"),
    "peak, GiB": ("peak_gib", "{:.3f}"),
    "of theirs": ("peak_ratio", "{:.2f}×"),
    "with weights, GiB": ("total_gib", "{:.3f}"),
    "of theirs ": ("total_ratio", "{:.2f}×"),
    "error": ("error", "{:.3g}"),
    "of theirs  ": ("error_ratio", "{:.3f}×"),
}


def machine(device: torch.device) -> dict[str, Any]:
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts: dict[str, Any] = {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": f"{_processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        facts["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return facts


def commit() -> str:
    """Of the tree that is measured; `VIDEOGEN_COMMIT` where it is a copy without its history."""
    if given := os.environ.get("VIDEOGEN_COMMIT"):
        return given

    def git(*args: str) -> str:
        run = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "videogen", "scripts", "pyproject.toml")
        return git("rev-parse", "--short=10", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


class Report:
    """`<device>-<date>.json` and `.md` in a folder, written anew after each case, so that a run cut short keeps them.

    A file of the same commit is added to; one of another commit stays, and ours has the commit in its name.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        facts = machine(device)
        name = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-") + "-" + facts["date"]
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.json"
        self.content: dict[str, Any] = {**facts, "floors": {}, "cases": {}}
        if self.path.exists() and json.loads(self.path.read_text())["commit"] != facts["commit"]:
            self.path = folder / f"{name}-{re.sub('[^a-z0-9]+', '-', facts['commit'])}.json"
        if self.path.exists():
            self.content |= {k: v for k, v in json.loads(self.path.read_text()).items() if k in ("floors", "cases")}

    def floor_rows(self) -> list[dict[str, Any]]:
        return [row for rows in self.content["floors"].values() for row in rows]

    def add(self, section: str, name: str, content: Any) -> None:
        self.content[section][name] = content
        self.write()

    def write(self) -> None:
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(markdown(self.content))


def markdown(content: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    lines = [
        f"# {content['device']}, {content['date']}",
        "",
        f"Commit {content['commit']}; {content['threads']} threads; {versions}. How to read this: [README](README.md).",
    ]
    for name, case in content["cases"].items():
        lines += ["", f"## {name}", "", case["what"] + ".", "", *table(case)]
    if content["floors"]:
        lines += ["", "## What the machine can do", ""]
        lines += ["| what | rate | error to float32 |", "|---|---|---|"]
        lines += [floor_line(row) for rows in content["floors"].values() for row in rows]
    return "\n".join(lines) + "\n"


def table(case: dict[str, Any]) -> list[str]:
    lines = [f"| {' | '.join(['', *COLUMNS])} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in case["rows"].items():
        cells = [f"not run: {row['note']}", *[""] * (len(COLUMNS) - 1)] if "note" in row else cells_of(row)
        lines.append(f"| {' | '.join([name, *cells])} |")
    lines += ["", f"Rounds: {case['rounds']}."]
    if "noise" in case:
        lines[-1] += f" Diffusers against itself in the same rounds: {case['noise']:.1%}."
    if "floor_seconds" in case:
        lines[-1] += f" Floor at the best rates below: {case['floor_seconds']:.3g} s."
    return lines


def cells_of(row: dict[str, Any]) -> list[str]:
    return [form.format(row[key]) if key in row else "" for key, form in COLUMNS.values()]


def floor_line(row: dict[str, Any]) -> str:
    what = ", ".join([row["what"], *(str(row[k]) for k in ("kernel", "layout") if k in row)])
    if "bias" in row:
        what += ", bias" if row["bias"] else ", no bias"
    rate = row.get("note") or (f"{row['tflops']:.3g} TFLOP/s" if "tflops" in row else f"{row['gbps']:.3g} GB/s")
    return f"| {what} | {rate} | {row['error']:.2e} |" if "error" in row else f"| {what} | {rate} | |"
