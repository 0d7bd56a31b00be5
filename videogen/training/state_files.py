"""The files of a training's state: tensors, or parts of them, in safetensors; a manifest that vouches for all of it."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videogen.errors import FileError, ModelNotFound, visible
from videogen.weights.guard import HEADER_LIMIT
from videogen.weights.header import NAME_LIMIT, TENSOR_LIMIT, Entry, read_header

MANIFEST = "manifest.json"
MANIFEST_LIMIT = 64 * 2**20  # bytes
FORMAT = 1
CHUNK = 2**24  # bytes that are hashed and written at once
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


# Tensors


@dataclass(frozen=True)
class Part:
    """What this process holds of a tensor: `local` lies at `offset` in a tensor of `shape`."""

    local: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A tensor in a file, and its place in the whole tensor; `start` is the file's first byte behind the header."""

    path: Path
    start: int
    entry: Entry
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], places: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> dict[str, Any]:
    """A safetensors file of CPU tensors, on the disk when this returns; its size in bytes and sha256.

    places   name -> (offset, shape) in the tensor that it is a part of, kept in the header where it is not all of it
    """
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # aligned, as the format asks
    ends = list(itertools.accumulate(tensors[name].nbytes for name in order))
    shards = {
        name: {"offset": offset, "shape": shape}
        for name, (offset, shape) in places.items()
        if shape != tuple(tensors[name].shape)
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | ({"shards": json.dumps(shards)} if shards else {})}
    for name, end in zip(order, ends, strict=True):
        tensor = tensors[name]
        if tensor.dtype not in kinds or len(name) > NAME_LIMIT:
            raise FileError(
                f"{visible(name)} cannot be saved.", why=f"its type is {tensor.dtype}, or its name too long."
            )
        place = [end - tensor.nbytes, end]
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT or len(tensors) > TENSOR_LIMIT:
        raise FileError(f"{path.name} cannot be saved.", why=f"{len(tensors)} tensors are more than a file may name.")
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for data in (len(text).to_bytes(8, "little") + text, *(_bytes_of(tensors[name]) for name in order)):
            for start in range(0, len(data), CHUNK):
                digest.update(data[start : start + CHUNK])
                file.write(data[start : start + CHUNK])
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def pieces_of(paths: Iterable[Path]) -> dict[str, list[Piece]]:
    """Where each tensor of some files lies. Raises FileError for files that nobody here has written."""
    pieces: dict[str, list[Piece]] = {}
    for path in paths:
        try:
            header = read_header(path)
            shards = json.loads(header.metadata.get("shards", "{}"))
            start = path.stat().st_size - max((entry.end for entry in header.tensors.values()), default=0)
            for tensor, entry in header.tensors.items():
                place = shards.get(tensor, {"offset": [0] * len(entry.shape), "shape": list(entry.shape)})
                pieces.setdefault(tensor, []).append(
                    Piece(path, start, entry, tuple(place["offset"]), tuple(place["shape"]))
                )
                if not _fits(pieces[tensor][-1]):
                    raise ValueError(f"{tensor} does not lie in itself")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ModelNotFound) as error:
            why = f"{getattr(error, 'why', '') or error}"
            raise FileError(f"{path} holds no part of a state.", why=why, hint="another state.") from error
    return pieces


def read_piece(piece: Piece, part: Part) -> None:
    """Copy what a piece and a local part have in common. Only its rows along the first dimension are read."""
    shape = piece.entry.shape
    first = [max(a, b) for a, b in zip(piece.offset, part.offset, strict=True)]
    last = [min(a + n, b + m) for a, n, b, m in zip(piece.offset, shape, part.offset, part.local.shape, strict=True)]
    if not math.prod(part.local.shape) or any(a >= b for a, b in zip(first, last, strict=True)):
        return
    dtype = DTYPES[piece.entry.dtype]
    inside = [slice(a - o, b - o) for a, b, o in zip(first, last, piece.offset, strict=True)]
    outside = [slice(a - o, b - o) for a, b, o in zip(first, last, part.offset, strict=True)]
    row = math.prod(shape[1:]) * dtype.itemsize
    skipped, count = (inside[0].start, inside[0].stop - inside[0].start) if shape else (0, 1)
    rows = torch.empty((count, *shape[1:]) if shape else (), dtype=dtype)
    with open(piece.path, "rb") as file:
        file.seek(piece.start + piece.entry.start + skipped * row)
        if file.readinto(_bytes_of(rows)) != rows.nbytes:
            raise FileError(f"{piece.path} ended early.", why="it changed while it was read.", hint="start again.")
    is_all = all(b - a == size for a, b, size in zip(first, last, part.local.shape, strict=True))
    target = part.local if is_all else part.local[tuple(outside)]
    target.copy_(rows[(slice(None), *inside[1:])] if shape else rows)


def _fits(piece: Piece) -> bool:
    sizes = zip(piece.offset, piece.entry.shape, piece.shape, strict=True)
    return all(type(o) is type(n) is int and 0 <= o <= o + size <= n for o, size, n in sizes)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)


# Manifest


def write_manifest(path: Path, values: dict[str, Any]) -> None:
    """`values` and the sha256 of their text as JSON, on the disk when this returns."""
    with open(path, "wb") as file:
        file.write(_manifest_text(values))
        file.flush()
        os.fsync(file.fileno())


def read_manifest(state: Path) -> dict[str, Any]:
    """Raises ValueError or OSError for one that is not, byte for byte, as it was written."""
    path = state / MANIFEST
    if path.stat().st_size > MANIFEST_LIMIT:
        raise ValueError(f"{MANIFEST} has {path.stat().st_size} bytes")
    text = path.read_bytes()
    values = json.loads(text)
    if not isinstance(values, dict) or _manifest_text({k: v for k, v in values.items() if k != "sha256"}) != text:
        raise ValueError(f"{MANIFEST} was changed")
    if values.get("format") != FORMAT:
        raise ValueError(f"format {values.get('format')!r}; this version reads {FORMAT}")
    return values


def _manifest_text(values: Mapping[str, Any]) -> bytes:
    text = json.dumps(values, indent=1, sort_keys=True, allow_nan=False)
    own = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**values, "sha256": own}, indent=1, sort_keys=True, allow_nan=False).encode()


def problem_of(state: Path, share: slice = slice(None)) -> str:
    """What is wrong with a state, empty if it is whole. `share`: of its files, those whose bytes are looked at."""
    try:
        values = read_manifest(state)
        files = values["files"]
        if values["step"] != step_of(state):
            return f"it is of step {values['step']}"
        found = {path.name for path in state.iterdir()}
        if odd := sorted(found ^ {*files, MANIFEST}):
            return f"{odd[0]} {'does not belong there' if odd[0] in found else 'is missing'}"
        for name in files:
            if (state / name).is_symlink() or not (state / name).is_file():
                return f"{name} is no plain file"
            if (size := (state / name).stat().st_size) != files[name]["bytes"]:
                return f"{name} has {size} bytes instead of {files[name]['bytes']}"
        for name in sorted(files)[share]:
            with open(state / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != files[name]["sha256"]:
                    return f"the bytes of {name} are not those that were written"
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        missing = isinstance(error, FileNotFoundError)
        return f"{MANIFEST} is missing" if missing else f"{type(error).__name__}: {error}"
    return ""


# Folders


def saved_states(folder: Path) -> list[Path]:
    """The states of a run, oldest first: whole when they were written."""
    found = [path for path in Path(folder).glob("step_*") if path.name[5:].isdecimal() and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(state: Path) -> int:
    return int(state.name[5:])


def score_of(state: Path) -> float | None:
    try:
        return read_manifest(state)["score"]
    except (OSError, ValueError, RecursionError, KeyError):
        return None


def lock(folder: Path, name: str = ".lock") -> int | None:
    """Keep other processes out of a folder for as long as the descriptor is open: the system lets go of the file when
    this process ends, however it ends. None where the file system has no locks.

    Raises FileError that names the process that has it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise FileError(
            f"another run is training into {folder}.",
            why=f"it is {visible(holder) or 'a process that has just begun'}.",
            hint="end that one, or give this one another folder=.",
        ) from error
    except OSError:
        os.close(descriptor)
        return None
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor
