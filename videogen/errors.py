"""What can go wrong, said in three lines: what, why, try.

Every error a user can cause or meet carries an exit code for the command line, the parameter it is about, and a hint.
"""

from __future__ import annotations

import re


def visible(text: str) -> str:
    """Text that only shows: what would steer a terminal (colours, titles, turned writing) becomes its escape.

    >>> visible("a\\x1b[31m red circle")
    'a\\\\x1b[31m red circle'
    """
    hidden = "[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
    return re.sub(hidden, lambda found: found[0].encode("unicode_escape").decode(), text)


class VideogenError(Exception):
    """Base of all errors shown without a traceback: `what` happened, `why`, and what to `hint` at."""

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", hint: str = "", param: str | None = None) -> None:
        super().__init__(what)
        self.what, self.why, self.hint, self.param = what, why, hint, param

    def __str__(self) -> str:
        lines = [f"error: {self.what}", self.why and f"  why: {self.why}", self.hint and f"  try: {self.hint}"]
        return "\n".join(visible(line) for line in lines if line)


class InvalidRequest(VideogenError, ValueError):
    """The request cannot be carried out by this model; nothing was loaded."""

    exit_code = 2


class ModelNotFound(VideogenError):
    """The model is missing, damaged, or of a kind that cannot be opened."""

    exit_code = 3


class OutOfMemory(VideogenError):
    exit_code = 4


class NumericalError(VideogenError):
    """NaN or Inf appeared; no video was made of it."""

    exit_code = 5


class FileError(VideogenError):
    """A file could not be read or written."""

    exit_code = 6


class RemoteError(VideogenError):
    """Another machine that the user named did not answer as it should."""

    exit_code = 7


class Cancelled(VideogenError):
    """Raise it inside `on_step` to stop a run cleanly."""

    exit_code = 130

    def __init__(self, what: str = "cancelled", **kwargs) -> None:
        super().__init__(what, **kwargs)


class Note(UserWarning):
    """Something was done otherwise than asked or hoped, and the clip is made all the same. One line, on stderr."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no room for a tensor. Imports no torch: the classes are known by name."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text))
    )


def as_known(error: Exception) -> VideogenError:
    """Any error as one that can be shown in three lines; what has no better name is a bug of ours, exit code 1."""
    if isinstance(error, VideogenError):
        return error
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if is_out_of_memory(error):
        return OutOfMemory("out of memory.", why=line, hint="--memory low, or a smaller --size or --frames.")
    if isinstance(error, OSError):
        hint = next(iter(getattr(error, "__notes__", [])), "check the disk and the path.")
        return FileError(f"{line}.", why="reading or writing failed.", hint=hint)
    what = f"{type(error).__name__}: {line}"
    return VideogenError(what, why="this is a bug in videogen.", hint="--debug shows where; please report it.")
