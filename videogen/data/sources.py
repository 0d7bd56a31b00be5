"""Clips with words, from where they are: a folder, a list of files, tar shards, Hugging Face datasets. No torch here.

    FOLDER                      with metadata.jsonl or .csv (`file_name`, `text`), or with clip.txt beside clip.mp4
    FILE.jsonl, FILE.csv        such a list by itself; files are named relative to it
    FILE.tar, FOLDER of them    webdataset shards, read as a stream and never unpacked
    hf:NAME[:SPLIT]             Hugging Face `datasets`, or a folder that it saved

Beside any of the first three, `captions.jsonl` adds captions by name (`videogen data caption`).

Nothing of a data set is trusted: a list cannot name files outside its folder, of a shard only members whose ending is
in `SHARDED` or `WORDS` are looked at, and no pickle is opened, whatever its name.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import re
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from jaxtyping import UInt8

from videogen.data.files import local, read_lines, sha256_of
from videogen.data.manifest import Caption, captions_of, in_utf8, json_lines
from videogen.data.video import MOST_IN_CLIP, read_image, stream_video
from videogen.errors import FileError, InvalidRequest, VideogenError

Pictures = Iterator[UInt8[np.ndarray, "_H _W 3"]]
STILLS = (".png", ".jpg", ".jpeg")
SHARDED = (".mp4", ".webm", ".gif", ".webp", *STILLS, ".npy")  # what is decoded of a shard
MEDIA = (*SHARDED, ".mov", ".mkv")
WORDS = (".txt", ".json")
LISTS = ("metadata.jsonl", "metadata.csv")
FILE_COLUMNS = ("file_name", "video", "image", "path")
TEXT_COLUMNS = ("captions", "text", "caption", "prompt")
TEXT_LIMIT = 2**20  # bytes of a caption's file
MEMBER_LIMIT = 2**30  # bytes of a clip in a shard, which is held in memory
MEMBERS = 32  # of one sample in a shard


@dataclass(frozen=True)
class Sample:
    """A clip or picture and its words; the file is opened by `stream`.

    media  a file, a folder of pictures, or the bytes of a shard's member; `kind` is its ending ("": a folder)
    fps    for files that have no rate of their own
    """

    name: str
    captions: tuple[Caption, ...]
    media: Path | bytes
    kind: str
    fps: float | int | None = None

    def sha256(self) -> str:
        """Of the file's bytes. Raises FileError if it cannot be read (any more)."""
        if isinstance(self.media, bytes):
            return hashlib.sha256(self.media).hexdigest()
        try:
            return sha256_of(self.media)
        except (OSError, InvalidRequest) as error:
            raise FileError(f"{self.name} cannot be read.", why=str(error)) from error

    @property
    def is_still(self) -> bool:
        return self.kind in STILLS

    @contextlib.contextmanager
    def stream(self) -> Iterator[tuple[float | None, int, Pictures]]:
        """Frame rate, number of frames by the header (0: unknown), and the frames. Raises FileError."""
        with self._file() as path:
            if self.kind == ".npy":
                frames = read_array(path)
                yield self.fps, len(frames), iter(frames)
            elif self.is_still:
                yield self.fps, 1, iter([np.asarray(read_image(path))])
            else:
                with stream_video(path) as (fps, count, frames):
                    yield fps or self.fps, count, frames

    @contextlib.contextmanager
    def _file(self) -> Iterator[Path]:
        if isinstance(self.media, Path):
            yield self.media
            return
        with tempfile.NamedTemporaryFile(suffix=self.kind) as file:  # decoders want a path; the name is ours
            file.write(self.media)
            file.flush()
            yield Path(file.name)


@dataclass(frozen=True)
class Dropped:
    """What is in a source and cannot be trained on: a short `reason` to count by, and the details."""

    name: str
    reason: str
    detail: str = ""


Samples = Iterator[Sample | Dropped]


def samples(where: str | Path) -> Samples:
    """The samples of a source in its own order, each name once; what is unusable comes as `Dropped`, and none is lost.

    Raises InvalidRequest if there is no such source.
    """
    return _unique(_source(str(where)))


def _source(where: str) -> Samples:
    if where.startswith("hf:"):
        return huggingface(where.removeprefix("hf:"))
    path = local(where)
    if path.is_dir():
        if listed := [path / name for name in LISTS if (path / name).is_file()]:
            return with_captions(from_list(listed[0]), path)
        if shards := sorted(path.glob("*.tar")):
            return with_captions((one for shard in shards for one in from_shard(shard)), path)
        return with_captions(from_folder(path), path)
    if path.suffix.lower() == ".tar":
        return with_captions(from_shard(path), path.parent)
    if path.suffix.lower() in (".jsonl", ".csv"):
        return with_captions(from_list(path), path.parent)
    raise InvalidRequest(
        f"{path} is no set of clips.",
        why="it is a folder, a list (.jsonl, .csv) or a shard (.tar, not compressed).",
        hint="give the folder that the clips are in.",
    )


def _unique(found: Samples) -> Samples:
    seen: set[str] = set()
    for one in found:
        one = replace(one, name=in_utf8(one.name))
        if isinstance(one, Sample) and one.name in seen:
            one = Dropped(one.name, "name twice", "the first of this name is used")
        elif isinstance(one, Sample) and one.captions and not any(caption.weight for caption in one.captions):
            one = Dropped(one.name, "bad caption", "none of its captions has a weight above 0")
        seen.add(one.name)
        yield one


def with_captions(found: Samples, folder: Path) -> Samples:
    """With those that `captions.jsonl` in the folder adds, behind the sample's own; of a source the last one counts."""
    path = folder / "captions.jsonl"
    added: dict[str, dict[str, Caption]] = {}
    for number, values in json_lines(path, torn=True) if path.is_file() else ():
        told = {name: values[name] for name in ("text", "source", "weight") if name in values}
        for caption in captions_of(told, where=f"{path}, line {number}"):
            added.setdefault(str(values.get("name")), {})[caption.source] = caption
    for one in found:
        more = tuple(added.get(one.name, {}).values())
        yield replace(one, captions=one.captions + more) if isinstance(one, Sample) and more else one


# ---- folders and lists ----------------------------------------------------------------------------------------------


def from_folder(folder: Path) -> Samples:
    """Every clip and picture below a folder, with the words of the .txt of the same name."""
    empty = True
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in MEDIA and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            empty = False
            yield _listed(folder, name, (), None)
    if empty:
        raise InvalidRequest(
            f"{folder} holds no clips.", why=f"nothing in it ends with {', '.join(MEDIA)}.", hint="another folder."
        )


def from_list(path: Path) -> Samples:
    """The files of metadata.jsonl or metadata.csv; a folder of pictures counts as a clip."""
    for number, values in _rows(path):
        where = f"{path.name}, line {number}"
        name = next((values[column] for column in FILE_COLUMNS if values.get(column)), None)
        if not isinstance(name, str):
            yield Dropped(where, "no file named", f"a row has one of {', '.join(FILE_COLUMNS)}")
            continue
        try:
            told, fps = _words(values, where)
        except InvalidRequest as error:
            yield Dropped(name, "bad row", f"{where}: {error.what}")
            continue
        yield _listed(path.parent, name, told, fps)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix.lower() == ".jsonl":
        yield from json_lines(path)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for values in reader:
                yield reader.line_num, {name: value for name, value in values.items() if isinstance(name, str)}
    except (OSError, ValueError, csv.Error) as error:
        raise InvalidRequest(f"{path} cannot be read.", why=str(error), hint="a csv in UTF-8.") from error


def _words(values: dict[str, Any], where: str) -> tuple[tuple[Caption, ...], float | None]:
    """The captions and the frame rate that a row or a shard's JSON tells."""
    told = next((values[column] for column in TEXT_COLUMNS if values.get(column)), "")
    fps = values.get("fps") or None
    try:
        fps = None if fps is None else float(fps)
        if fps is not None and not 0.01 <= fps <= 1000:
            raise ValueError("out of range")
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{where} has a frame rate of {str(fps)[:40]}.", why=str(error)) from error
    return captions_of(told, where=where), fps


def _listed(folder: Path, name: str, captions: tuple[Caption, ...], fps: float | int | None) -> Sample | Dropped:
    """A file that is named, if it lies in the folder, links followed."""
    try:
        path = (folder / name).resolve()
        inside, there = path.is_relative_to(folder.resolve()), path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte, too long, a link to itself
        return Dropped(name, "no such file", str(error))
    if not inside:
        return Dropped(name, "outside the folder", "a list, or a link, names files of its own folder only")
    if not there:
        return Dropped(name, "no such file", str(path))
    if not (path.is_dir() or path.is_file()):
        return Dropped(name, "no plain file", "a pipe or a device")
    kind = "" if path.is_dir() else path.suffix.lower()
    if not kind and any(not one.resolve().is_relative_to(folder.resolve()) for one in path.iterdir()):
        return Dropped(name, "outside the folder", "a picture in it is a link")
    if kind not in ("", *MEDIA):
        return Dropped(name, "unknown kind", f"{kind or 'no ending'}: clips are {', '.join(MEDIA)}")
    beside = (folder / name).with_suffix(".txt")
    if not captions and kind and beside.is_file():
        if not beside.resolve().is_relative_to(folder.resolve()):
            return Dropped(name, "outside the folder", f"{beside.name} is a link")
        try:
            captions = captions_of(" ".join(read_lines(beside, limit=TEXT_LIMIT)), where=str(beside))
        except InvalidRequest as error:
            return Dropped(name, "bad caption", error.why)
    return Sample(name, captions, path, kind, fps)


# ---- shards ---------------------------------------------------------------------------------------------------------


def from_shard(path: Path) -> Samples:
    """The samples of a webdataset shard: members in a row whose names are equal up to the first dot of the last part.

    Only plain files are looked at, in memory; a name is a name, and becomes no path.
    """
    key, parts = None, _Parts("")
    try:
        with path.open("rb") as file:
            for member in members(file):
                name = PurePosixPath(member.name)
                stem, _, ending = name.name.partition(".")
                if (name.parent, stem) != key:
                    yield from parts.sample()
                    key = name.parent, stem
                    parts = _Parts(f"{path.stem}/{(name.parent / stem).as_posix().lstrip('/')}")
                parts.add(member, f".{ending.lower()}")
            yield from parts.sample()
    except tarfile.TarError as error:
        yield from parts.sample()
        yield Dropped(path.name, "damaged shard", str(error))
    except OSError as error:
        raise FileError(f"{path} cannot be read.", why=str(error)) from error


@dataclass
class Member:
    """A member of a tar file that is being read: `problem` says why there is nothing to read."""

    name: str
    size: int
    file: IO[bytes]
    problem: str = ""

    def read(self) -> bytes:
        return _exactly(self.file, self.size)


def members(file: IO[bytes]) -> Iterator[Member]:
    """One after the other, with no list of them kept; a member is read before the next one is asked for.

    The standard library's reader follows links, makes files sparse and takes headers of any length into memory: of the
    format only plain files are needed. Raises tarfile.TarError where the file is damaged.
    """
    if file.read(2) == b"\x1f\x8b":
        raise tarfile.ReadError("it is compressed, which saves nothing on clips: gunzip it")
    end = file.seek(0, io.SEEK_END)
    at, told = 0, {}
    while True:
        file.seek(at)
        header = file.read(tarfile.BLOCKSIZE)
        if not header:
            raise tarfile.ReadError("it has no end: it was cut off between two members")
        if not header.strip(b"\0"):
            if any(rest.strip(b"\0") for rest in iter(lambda: file.read(2**20), b"")):
                raise tarfile.ReadError("something follows its end, such as another shard: give each its own file")
            return
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        told_size = told.get("size", "")
        size = int(told_size) if re.fullmatch("[0-9]{1,18}", told_size) else info.size
        start, at = at + tarfile.BLOCKSIZE, at + tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if size < 0 or start + size > end:
            raise tarfile.ReadError(f"it ends inside {info.name[:80]!r}")
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            if size > 2**16:
                raise tarfile.ReadError("a header is too long")
            data = _exactly(file, size)
            told |= (
                _pax(data) if info.type == tarfile.XHDTYPE else {"path": data.rstrip(b"\0").decode(errors="replace")}
            )
            continue
        name, sparse, told = told.get("path", info.name), any("sparse" in key for key in told), {}
        if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not sparse:
            yield Member(name, size, file)
        elif info.type not in (tarfile.DIRTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            yield Member(name, 0, file, problem="no plain file")


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise tarfile.ReadError("it ends too early")
    return data


def _pax(data: bytes) -> dict[str, str]:
    """The records `LENGTH NAME=VALUE\\n` of an extended header."""
    found: dict[str, str] = {}
    while data:
        length = data.split(b" ", 1)[0]
        if not re.fullmatch(b"[0-9]{1,9}", length) or not len(length) < int(length) <= len(data):
            raise tarfile.HeaderError("an extended header is damaged")
        record, data = data[len(length) + 1 : int(length)], data[int(length) :]
        name, _, value = record.decode(errors="replace").rstrip("\n").partition("=")
        found[name] = value
    return found


class _Parts:
    """What a shard has told of one sample so far."""

    def __init__(self, name: str) -> None:
        self.name, self.count, self.unread = name, 0, []
        self.media: bytes | None = None
        self.kind, self.fps, self.problem = "", None, ""
        self.captions: tuple[Caption, ...] = ()

    def add(self, member: Member, ending: str) -> None:
        kind = "." + ending.rpartition(".")[2]
        self.count += 1
        if self.problem:
            return
        if self.count > MEMBERS:
            self.problem = f"more than {MEMBERS} members"
        elif member.problem:
            self.problem = f"{kind}: {member.problem}"
        elif kind not in (*SHARDED, *WORDS):
            self.unread.append(kind)
        elif member.size > (TEXT_LIMIT if kind in WORDS else MEMBER_LIMIT):
            self.problem = f"{kind} has {member.size / 2**20:.0f} MiB"
        elif kind in WORDS:
            self._read_words(member.read(), ending, kind)
        elif self.media is not None:
            self.problem = f"two clips, {self.kind} and {kind}"
        else:
            self.media, self.kind = member.read(), kind

    def _read_words(self, data: bytes, ending: str, kind: str) -> None:
        source = ending.removesuffix(kind).strip(".") or "given"  # 0001.short.txt: a caption of its own
        try:
            text = data.decode("utf-8-sig")
            if kind == ".txt":
                self.captions += captions_of(text, where=self.name, source=source)
                return
            values = json.loads(text)
            if isinstance(values, dict):
                told, fps = _words(values, self.name)
                self.captions, self.fps = self.captions + told, fps or self.fps
        except (ValueError, RecursionError) as error:
            self.problem = f"{kind}: {error}"

    def sample(self) -> Samples:
        if self.problem:
            yield Dropped(self.name, "bad sample", self.problem)
        elif self.media is not None:
            yield Sample(self.name, self.captions, self.media, self.kind, self.fps)
        elif self.count:
            yield Dropped(self.name, "no clip", f"unread: {', '.join(self.unread)}" if self.unread else "words alone")


# ---- arrays ---------------------------------------------------------------------------------------------------------


def read_array(path: Path) -> UInt8[np.ndarray, "F H W 3"]:
    """Frames in a .npy file: uint8 [F, H, W, 3] or [H, W, 3]. Nothing is unpickled, or allocated on a header's word."""
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, _, dtype = read(file)
            left = path.stat().st_size - file.tell()
        if dtype != np.uint8 or len(shape) not in (3, 4) or shape[-1] != 3 or math.prod(shape) != left or not left:
            raise ValueError(f"it holds {dtype} {list(shape)} in {left} bytes")
        if left > 3 * MOST_IN_CLIP:
            raise ValueError("it is too large")
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, KeyError, SyntaxError, RecursionError, MemoryError) as error:
        raise FileError(
            f"{path.name} holds no frames.", why=str(error), hint="a .npy file of uint8 [frames, height, width, 3]."
        ) from error
    return array if array.ndim == 4 else array[None]


# ---- Hugging Face datasets ------------------------------------------------------------------------------------------


def huggingface(name: str) -> Samples:
    """The rows of `NAME[:SPLIT]` as they stream; clips are taken undecoded and opened as a shard's are."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InvalidRequest(
            "Hugging Face datasets is not installed.", why="hf: is read by it.", hint="pip install datasets"
        ) from error
    name, _, split = name.partition(":")
    try:
        if Path(name).is_dir() and any(Path(name).glob("*.json")) and not any(Path(name).glob("*.jsonl")):
            rows: Any = datasets.load_from_disk(name)
            rows = rows[split or "train"] if hasattr(rows, "keys") else rows
        else:
            rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        columns = list(rows.features or {})
        column = next((one for one in FILE_COLUMNS if one in columns), None)
        if column is None:
            raise InvalidRequest(
                f"hf:{name} has no clips.", why=f"its columns are {columns}.", hint=f"one of {', '.join(FILE_COLUMNS)}."
            )
        rows = rows.cast_column(column, type(rows.features[column])(decode=False))
    except VideogenError:
        raise
    except Exception as error:  # the network, the hub, the format
        raise InvalidRequest(
            f"hf:{name} cannot be opened.", why=f"{type(error).__name__}: {error}", hint="check the name and the split."
        ) from error
    index, rows = 0, iter(rows)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # as above, and damaged rows
            raise FileError(
                f"hf:{name} breaks off after {index} rows.", why=f"{type(error).__name__}: {error}", hint="run again."
            ) from error
        yield _huggingface_row(f"{index:08}", row, column)
        index += 1


def _huggingface_row(name: str, row: dict[str, Any], column: str) -> Sample | Dropped:
    clip = row[column] or {}
    path, data = clip.get("path"), clip.get("bytes")
    try:
        told, fps = _words({key: row.get(key) for key in (*TEXT_COLUMNS, "fps")}, name)
        media = data if data is not None else local(path or "")
    except InvalidRequest as error:
        return Dropped(name, "bad row", f"{error.what} {error.why}")
    kind = PurePosixPath(str(path or "")).suffix.lower() or kind_of(media if isinstance(media, bytes) else b"")
    if kind not in MEDIA:
        return Dropped(name, "unknown kind", f"{kind or 'no ending'}: clips are {', '.join(MEDIA)}")
    return Sample(name, told, media, kind, fps)


def kind_of(data: bytes) -> str:
    """The ending that the first bytes of a file ask for, "" if they are of no known kind."""
    starts = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"\x1aE\xdf\xa3": ".webm"}
    found = next((kind for start, kind in starts.items() if data.startswith(start)), "")
    found = ".mp4" if data[4:8] == b"ftyp" else found
    return ".webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else found
