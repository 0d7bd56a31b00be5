"""What training reads in place of clips: posterior moments and text embeddings on disk, addressed by what made them.

    cache.json                         which encoders, how latents are scaled, what the cache was made for
    manifest.jsonl                     a line per window of a clip: its name, shape, rate, captions and their sources
    latents/ab/KEY.json                the windows of a clip; KEY is a hash of its file and of what windows may be
    latents/ab/KEY.safetensors         of a window: mean, logvar [f, c, h, w]; with frame conditions frame_mean and
                                       frame_logvar; KEY is a hash of the file, the place, the size, and the VAE
    text/ab/KEY.safetensors            embedding [l, e]; KEY is a hash of the words and the text encoder

Moments are unscaled and in the type that they were computed in: nothing is rounded twice. Each file is written whole.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from videogen.config import from_dict
from videogen.data.files import local, read_lines, written
from videogen.data.manifest import Caption, captions_of, json_lines, key_of, write_json, write_lines
from videogen.errors import FileError, InvalidRequest

FORMAT = 1
KEY = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class CacheFacts:
    """`cache.json`. Hashes are of the encoders' files, types and settings; `text` is "" where captions are kept as
    words. `frame_scale` is what the VAE's scaling is for a frame that is told: CogVideoX1.5-5B-I2V divides by it."""

    format: int = FORMAT
    model: str
    vae: str
    text: str
    scale: float | int
    frame_scale: float | int
    made_for: dict = field(default_factory=dict)  # lengths, sizes, rate, fit


@dataclass(frozen=True, kw_only=True)
class Window:
    """One stretch of one clip, as it was encoded."""

    name: str  # unique: the clip's, and #1, #2 … for its further windows
    clip: str
    sha256: str  # of the clip's file
    latents: str  # the entry's key
    shape: tuple[int, ...]  # latent f, h, w
    channels: int
    start: int  # its first frame, at the cache's rate
    num_frames: int
    fps: float | int
    frame_latents: bool


@dataclass(frozen=True, kw_only=True)
class Row(Window):
    """A line of the manifest."""

    captions: tuple[Caption, ...]


def text_key(text: str, encoder: str) -> str:
    return key_of("text", text, encoder)


def entry(folder: Path, kind: str, key: str, ending: str = ".safetensors") -> Path:
    """Where an entry of kind "latents" or "text" lies; a key that is none is refused, for it becomes a path."""
    if not KEY.fullmatch(key):
        raise InvalidRequest(f"{folder} names an entry {key[:80]!r}.", why="that is no key.", hint="make it again.")
    return folder / kind / key[:2] / f"{key}{ending}"


def write_entry(path: Path, tensors: dict[str, Tensor]) -> None:
    with written(path) as part:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)


def read_entry(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The named tensors of an entry. Raises FileError if it is missing, damaged, or not finite."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise FileError(
            f"{path} cannot be read.",
            why=f"{type(error).__name__}: {error}",
            hint="videogen data cache again: it makes what is missing; delete the file first if it is damaged.",
        ) from error
    if wrong := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise FileError(f"{path} holds numbers that are not finite.", why=f"in {wrong[0]}.", hint="delete it.")
    return tensors


def sweep(folder: Path, *, age: float | int = 600) -> int:
    """Remove what killed writers left and count it; what is younger than `age` seconds may be another process's."""
    found = [part for part in folder.rglob(".*.part") if part.is_file() and time.time() - part.stat().st_mtime > age]
    for part in found:
        part.unlink(missing_ok=True)
    return len(found)


# ---- cache.json and the manifest ------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Of a small file that we wrote. Raises FileError if it is damaged."""
    try:
        values = json.loads("\n".join(read_lines(path)))
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
        return values
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged.", why=str(error), hint="delete it; it is made again.") from error


def write_facts(folder: Path, facts: CacheFacts) -> None:
    write_json(folder / "cache.json", asdict(facts))


def read_facts(folder: str | Path) -> CacheFacts:
    """Raises InvalidRequest if the folder is no cache, or one of another format."""
    path = local(folder) / "cache.json"
    if not path.is_file():
        raise InvalidRequest(
            f"{folder} is no cache.", why="it has no cache.json.", hint=f"videogen data cache CLIPS --out {folder}"
        )
    values = read_json(path)
    if values.get("format") != FORMAT:
        raise InvalidRequest(
            f"{path} is of format {values.get('format')}.",
            why=f"format {FORMAT} is read.",
            hint="make the cache again.",
        )
    return from_dict(CacheFacts, values, where=str(path))


def write_manifest(folder: Path, rows: Iterable[Row]) -> int:
    """Replaces the old one when the last line is written; returns how many there are."""
    return write_lines(folder / "manifest.jsonl", (asdict(row) for row in rows))


def read_manifest(folder: str | Path) -> list[Row]:
    path = local(folder) / "manifest.jsonl"
    rows = [_row(values, f"{path}, line {number}") for number, values in json_lines(path)]
    if len({row.name for row in rows}) != len(rows):
        raise InvalidRequest(f"{path} names a window twice.", why="names are unique.", hint="make the cache again.")
    return rows


def _row(values: dict[str, Any], where: str) -> Row:
    captions = captions_of(values.pop("captions", []), where=where)
    window = from_dict(Window, values, where=where)
    if len(window.shape) != 3 or min(*window.shape, window.num_frames, window.channels) < 1:
        raise InvalidRequest(f"{where} describes no window.", why=f"{window}"[:200], hint="make the cache again.")
    if captions and not sum(caption.weight for caption in captions):
        raise InvalidRequest(f"{where} has captions without weight.", why="one is drawn.", hint="correct the weights.")
    return Row(**{one.name: getattr(window, one.name) for one in fields(Window)}, captions=captions)
