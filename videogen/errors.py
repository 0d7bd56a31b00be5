"""What can go wrong, said in three lines: what, why, try.

Every error a user can cause or meet carries an exit code for the command line, the parameter it is about, and a hint.
"""

from __future__ import annotations


class VideogenError(Exception):
    """Base of all errors shown without a traceback: `what` happened, `why`, and what to `hint` at."""

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", hint: str = "", param: str | None = None) -> None:
        super().__init__(what)
        self.what, self.why, self.hint, self.param = what, why, hint, param

    def __str__(self) -> str:
        lines = [f"error: {self.what}"]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.hint:
            lines.append(f"  try: {self.hint}")
        return "\n".join(lines)


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


class Cancelled(VideogenError):
    """Raise it inside `on_step` to stop a run cleanly."""

    exit_code = 130

    def __init__(self, what: str = "cancelled", **kwargs) -> None:
        super().__init__(what, **kwargs)
