"""The header of a safetensors file: names, dtypes, shapes and places of its tensors. Imports no torch.

All of it is checked before a tensor is read or memory reserved: a file from anywhere costs a few milliseconds and its
header's few kilobytes, whatever it claims.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videogen.errors import ModelNotFound
from videogen.weights.guard import HEADER_LIMIT, check_file

Shape = tuple[int, ...]

NAME_LIMIT, RANK_LIMIT, TENSOR_LIMIT = 512, 8, 10_000  # the largest published file names 2,000
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8}
BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
BITS |= {"I64": 64, "U64": 64, "F64": 64, "C64": 64}


@dataclass(frozen=True)
class Entry:
    """One tensor: `start` and `end` are bytes behind the header."""

    dtype: str
    shape: Shape
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    tensors: dict[str, Entry]
    metadata: dict[str, str]

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: entry.shape for name, entry in self.tensors.items()}


def read_header(path: Path) -> Header:
    """The header of the file at `path`; ModelNotFound says what is wrong with it."""
    check_file(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little") if len(start) == 8 else size
        if length > min(size - 8, HEADER_LIMIT):
            raise _damaged(path, f"{size} bytes, with a header said to have {length}")
        text = file.read(length)
    try:
        values = json.loads(text, object_pairs_hook=_without_doubles)
        if not isinstance(values, dict):
            raise ValueError("the header is not an object")
        metadata = values.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not texts")
        if len(values) > TENSOR_LIMIT:
            raise ValueError(f"it names {len(values)} tensors")
        tensors = {name: _entry(name, value) for name, value in values.items()}
        _check_places(tensors, size - 8 - length)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error).splitlines()[0][:200]) from error
    return Header(tensors, metadata)


def read_shapes(files: list[Path]) -> dict[str, Shape]:
    """Name -> shape of all tensors of several files; a name that two of them hold is an error."""
    shapes: dict[str, Shape] = {}
    for path in files:
        new = read_header(path).shapes
        if twice := next((name for name in new if name in shapes), None):
            raise _damaged(path, f"{twice} lies in another of its shards too")
        shapes |= new
    return shapes


def _damaged(path: Path, why: str) -> ModelNotFound:
    return ModelNotFound(
        f"{path} is not a readable safetensors file.",
        why=f"damaged or cut short ({why}).",
        hint="fetch or copy the file again.",
    )


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("it names a tensor twice")
    return values


def _entry(name: str, value: Any) -> Entry:
    if len(name) > NAME_LIMIT or re.search(r"[\x00-\x1f\x7f]", name):
        raise ValueError("the name of a tensor is no name")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name} has not dtype, shape and data_offsets")
    dtype, shape, places = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in BITS if isinstance(dtype, str) else True:
        raise ValueError(f"{name} is of unknown type {str(dtype)[:20]!r}")
    if not _counts(shape) or len(shape) > RANK_LIMIT or not _counts(places) or len(places) != 2:
        raise ValueError(f"shape or place of {name} are no counts")
    if math.prod(shape) * BITS[dtype] != 8 * (places[1] - places[0]):
        raise ValueError(f"{name} has not the bytes of its shape")
    return Entry(dtype, tuple(shape), *places)


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _check_places(tensors: dict[str, Entry], size: int) -> None:
    """The tensors fill the file, without gaps and without sharing a byte."""
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        end = entry.end
    if end != size:
        raise ValueError(f"its tensors need {end} bytes, it holds {size}")
