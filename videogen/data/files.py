"""Which files may be read and written: asked before any work is done, so it imports nothing heavy."""

from __future__ import annotations

import re
from pathlib import Path

from videogen.errors import FileError, InvalidRequest

FORMATS = (".mp4", ".gif", ".webp", ".png")


def check_output(path: str | Path, *, overwrite: bool = False) -> Path:
    """Refuse an unknown format or an existing clip, before any work is done; returns the file or folder to be made."""
    path = Path(path)
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
    if target.exists() and not overwrite:
        raise FileError(
            f"{target} exists already.",
            why="a clip is never overwritten unasked.",
            hint="--overwrite (overwrite=True in Python), or another name",
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
    path = Path(path).expanduser()
    if not path.exists():
        raise InvalidRequest(f"{path} does not exist.", why="no such file.", hint="check the path.", param=param)
    return path
