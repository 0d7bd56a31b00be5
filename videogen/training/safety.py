"""What keeps a run from harm: numbers that are not finite, a norm out of its usual range, a process that hangs or is
told to stop.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from videogen.data import manifest
from videogen.data.manifest import read_quarantine
from videogen.errors import VideogenError

QUARANTINE = "quarantine.jsonl"
REQUEUE = "requeue"


class Interrupted(VideogenError):
    """The run was told to stop and has saved its state: start it again with the same command, and it goes on."""

    exit_code = 85  # the batch system may queue the job again


class LostProcess(VideogenError):
    """Another process of the run does not answer, or has ended."""


@dataclass
class NormLimit:
    """The norm to which gradients are clipped: `fixed`, or less where a norm is far out of its usual range.

    Usual is the moving average of the norms and `sigmas` standard deviations above it (as Open-Sora-Plan does, with 3).
    Each set of roles that learn together has averages of its own. `figures` is what a resumed run needs.
    """

    fixed: float
    sigmas: float = 0.0  # 0: the fixed limit alone
    decay: float = 0.99
    warmup: int = 50  # norms seen before the average counts
    figures: dict[str, list[float | int]] = field(default_factory=dict)  # roles -> mean, variance, norms seen

    def limit(self, roles: str) -> float:
        mean, variance, seen = self.figures.get(roles, [0.0, 0.0, 0])
        if not self.sigmas or seen < self.warmup:
            return self.fixed
        return min(self.fixed, mean + self.sigmas * math.sqrt(variance))

    def see(self, roles: str, norm: float) -> None:
        """Take a norm, as it was after clipping, into the averages."""
        mean, variance, seen = self.figures.get(roles, [norm, 0.0, 0])
        weight = max(1 - self.decay, 1 / (seen + 1))
        change = norm - mean
        self.figures[roles] = [mean + weight * change, (1 - weight) * (variance + weight * change**2), seen + 1]


def quarantine(folder: Path, step: int, names: Sequence[str], why: str) -> None:
    """Add samples to `folder/quarantine.jsonl` (`data.manifest.read_quarantine` reads it), each name once."""
    path = folder / QUARANTINE
    known = read_quarantine(path) if path.exists() else {}
    for name in names:
        if name not in known:
            manifest.quarantine(path, name, "not finite", f"step {step}: {why}")


class Watchdog:
    """Ends this process, with the stacks of its threads on stderr, when it is not fed for `seconds`.

    A process that hangs holds up all others; ended, it lets the launcher start the run again from its newest state.
    0 seconds: no watch.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self._fed = seconds, -math.inf

    def feed(self) -> None:
        now = time.monotonic()
        if self.seconds > 0 and now - self._fed > min(1.0, self.seconds / 20):  # each costs a new thread
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=2)
            self._fed = now

    def __enter__(self) -> Watchdog:
        self.feed()
        return self

    def __exit__(self, *_) -> None:
        if self.seconds > 0:
            faulthandler.cancel_dump_traceback_later()


class StopSignal:
    """Remembers, inside a `with`, that the process was told to stop: SIGTERM, or SIGUSR1 as Slurm can send it ahead.

    The run ends after its step; a second signal ends it at once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.came = False
        self._before: dict[signal.Signals, object] = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # no other thread may handle signals
            self._before = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        self._restore()


@contextlib.contextmanager
def peers_answer(step: int) -> Iterator[None]:
    """Names what a failed exchange between processes means: another one has ended, or hangs."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not any(
            sign in text for sign in ("gloo", "NCCL", "ncclUnhandled", "Connection closed by peer", "Timed out")
        ):
            raise
        faulthandler.dump_traceback(file=2, all_threads=True)
        line = text.strip().splitlines()[0].split(". This is")[0]
        raise LostProcess(
            f"step {step}: another process of this run does not answer.",
            why=line,
            hint="its own output says why; torchrun --max-restarts starts all again from the newest state.",
        ) from error
