"""What a run tells while it works, and how a terminal shows it. Imports no torch."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """One step of a stage is done: `step` of `steps`, about `eta` seconds left; `latents` are those of now, or None.

    `skipped`: how many evaluations of the network a step cache has left out so far.
    """

    stage: str
    step: int
    steps: int
    eta: float | int | None = None
    latents: Any = None
    skipped: int = 0


class Progress:
    """Shows events on a stream: on a terminal one line that is rewritten, else a plain line every tenth of a stage."""

    def __init__(self, stream: Any = None) -> None:
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.stage: str | None = None
        self.tenth = -1
        self.started = time.monotonic()

    def __call__(self, event: Any) -> None:
        if event.stage != self.stage:
            self.close()
            self.stage, self.tenth, self.started = event.stage, -1, time.monotonic()
        text = f"{event.stage} {event.step}/{event.steps}"
        if event.eta is not None and event.step < event.steps:
            text += f", {duration(event.eta)} left"
        elif event.step >= event.steps:
            text += f", {duration(time.monotonic() - self.started)}"
            text += f", {event.skipped} evaluations left out" if event.skipped else ""
        if self.live:
            self.stream.write(f"\r\x1b[K{text}")
        elif (tenth := 10 * event.step // max(event.steps, 1)) > self.tenth:
            self.tenth = tenth
            self.stream.write(text + "\n")
        self.stream.flush()

    def close(self) -> None:
        """End the line that is being rewritten, so that what follows stands on its own."""
        if self.live and self.stage is not None:
            self.stream.write("\n")
            self.stream.flush()
        self.stage = None


def duration(seconds: float | int) -> str:
    """`0.8 s`, `42 s`, `3:05 min`, `1:02 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"
