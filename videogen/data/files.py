"""Which files may be read and written, asked before any work is done; a file written whole; the sha256 of one.

Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from videogen.errors import FileError, InvalidRequest

FORMATS = (".mp4", ".gif", ".webp", ".png")
FLAGS = ("first_frame", "last_frame", "video", "control_video", "mask", "music")  # that take a path
LATENTS = ".latents.safetensors"  # behind a clip's name: the latents it was to be decoded from


def check_output(path: str | Path, *, overwrite: bool = False) -> Path:
    """Refuse an unknown format or an existing clip, before any work is done; returns the file or folder to be made."""
    path = Path(path)
    if "\0" in str(path):
        raise InvalidRequest(
            "a file name has a zero byte in it.", why="no file can.", hint="--out clip.mp4", param="out"
        )
    if path.suffix.lower() not in FORMATS:
        raise InvalidRequest(
            f"{path.name!r} is no known kind of clip.",
            why=f"the ending chooses the format: {', '.join(FORMATS)} (.png makes a folder of frames).",
            hint=f"--out {path.with_suffix('.mp4')}",
            param="out",
        )
    target = path
    if path.suffix.lower() == ".png":
        target = path.parent if "%" in path.name else path.with_suffix("")
        if "%" in path.name and not re.fullmatch(r"[^%]*%(0?[1-9])?d[^%]*", path.name):
            raise InvalidRequest(
                f"{path.name!r} is no pattern of frame names.",
                why="one %d, or %03d for three digits, stands for the frame's number.",
                hint="--out frames/%04d.png",
                param="out",
            )
    try:
        exists = target.exists()
    except OSError as error:
        why = error.strerror or "the system refuses it."
        raise FileError("no file can be called that.", why=why, hint="a shorter name.", param="out") from error
    if exists and not overwrite:
        raise FileError(
            f"{target} exists already.",
            why="a clip is never overwritten unasked.",
            hint="--overwrite (overwrite=True in Python), or another name",
            param="out",
        )
    home = next((folder for folder in target.parents if folder.exists()), Path())
    if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
        raise FileError(
            f"nothing can be written in {home}.",
            why="it is read-only, or somebody else's." if home.is_dir() else "it is no folder.",
            hint="--out with another place",
            param="out",
        )
    return target


def local(path: str | Path, *, param: str | None = None) -> Path:
    """A path that exists here; addresses are refused (what a URL holds can change, and would be fetched unasked)."""
    if re.match(r"[a-zA-Z][\w+.-]+://", str(path)) or str(path).startswith("data:"):
        raise InvalidRequest(
            f"{path} is an address.",
            why="only files here are opened.",
            hint="download it and give its path.",
            param=param,
        )
    try:
        path = Path(path).expanduser()
        mode = path.stat().st_mode
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, a zero byte in it, `~` and nobody's name
        shown = str(path) if len(str(path)) <= 200 else f"{str(path)[:197]}..."
        raise InvalidRequest(
            f"{shown!r} does not exist." if "\0" in shown else f"{shown} does not exist.",
            why="no such file.",
            hint=f"check the path of --{param.replace('_', '-')}." if param in FLAGS else "check the path.",
            param=param,
        ) from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe would be waited for, a device has no end
        raise InvalidRequest(f"{path} is no file.", why="it is a pipe or a device.", hint="give a file.", param=param)
    return path


def read_lines(path: str | Path, *, limit: int = 4 * 2**20) -> list[str]:
    """The lines of a small text file, without those that are empty."""
    path = local(path)
    try:
        if path.stat().st_size > limit:
            raise ValueError(f"it has {path.stat().st_size / 2**20:.0f} MiB; {limit / 2**20:.0f} MiB are read at most")
        return [line for line in map(str.strip, path.read_text(encoding="utf-8-sig").splitlines()) if line]
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} cannot be read.", why=str(error), hint="a text file in UTF-8.") from error


def sha256_of(path: str | Path) -> str:
    """Of a file's bytes, or of a folder's plain files in order of their names, one behind the other."""
    path = local(path)
    digest = hashlib.sha256()
    for part in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        with part.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


# Writing


def sync(path: Path) -> None:
    """To the disk, so that a rename that follows cannot be the first thing to arrive there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def written(path: Path, *, move: Callable[[Path, Path], object] | None = None) -> Iterator[Path]:
    """A temporary name beside `path` for a file or folder, which takes its place when the block ends well.

    It is on the disk before that, with the rights that the umask gives (safetensors makes private files), and is
    removed if the block ends otherwise. `move` puts it there in place of a rename. An OSError passes.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)
        part.touch()
        rights = part.stat().st_mode
        part.unlink()
        yield part
        if part.is_dir():
            for inside in part.iterdir():
                sync(inside)
        else:
            part.chmod(stat.S_IMODE(rights))
        sync(part)
        (move or os.replace)(part, path)
        sync(path.parent)
    finally:
        _remove(part)


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
