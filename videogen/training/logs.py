"""A run's figures: a line of JSON each time, always; the same to TensorBoard, W&B and others where asked for."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from videogen.data.files import written
from videogen.errors import InvalidRequest

Value = float | int | str | bool | Sequence[str] | None
LOG = "log.jsonl"


class Log:
    """`folder/log.jsonl`, one line per `write`, which a killed process leaves behind whole; and the trackers by name.

    trackers  of accelerate: "tensorboard", "wandb", "mlflow", "comet_ml", "aim", "swanlab", "trackio" and others. Each
              needs its own package
    settings  of the run, told to the trackers once

    Made on one process only. Raises InvalidRequest for a tracker that does not exist or is not installed.
    """

    def __init__(self, folder: Path, trackers: Sequence[str] = (), settings: Mapping[str, Any] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOG
        self._file = self.path.open("a+b")
        if _is_torn(self.path):  # a process was killed in the middle of a line
            self._file.write(b"\n")
        self._trackers = [_open_tracker(name, folder, flat(settings or {})) for name in dict.fromkeys(trackers)]

    def write(self, step: int, facts: Mapping[str, Value]) -> None:
        """Append {"step": step, **facts}. Numbers that are not finite are written as "nan", "inf" or "-inf"."""
        line = {"step": step} | {name: _plain(value) for name, value in facts.items()}
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()
        numbers = {name: value for name, value in facts.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.log(numbers, step=step)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run by rising step. Of a step that was written twice, before a stop and after it, the later ones
    count; a line that is not whole is passed over."""
    lines: dict[int, dict[str, Any]] = {}
    for text in (folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
            lines.setdefault(line["step"], {}).update(line)
        except (ValueError, TypeError, KeyError):
            continue
    return [lines[step] for step in sorted(lines)]


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names, as overrides write them: what trackers can show.

    >>> flat({"fit": {"steps": 3}, "folder": "runs"})
    {'fit.steps': 3, 'folder': 'runs'}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, int | float | str | bool) else str(value)
    return found


def _plain(value: Value) -> Value:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _is_torn(path: Path) -> bool:
    with path.open("rb") as file:
        end = file.seek(0, 2)
        return end > 0 and file.seek(end - 1) >= 0 and file.read(1) != b"\n"


def _open_tracker(name: str, folder: Path, settings: dict[str, Any]) -> Any:
    """accelerate's tracker of this name, started. A run that is started again goes on in the same run of W&B."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in LOGGER_TYPE_TO_CLASS:
        known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
        raise InvalidRequest(f"there is no tracker {name!r}.", why=f"there are {known}.", param="trackers")
    if name not in map(str, get_available_trackers()):
        extra = f'pip install "videogen[{name}]"' if name in ("tensorboard", "wandb") else f"pip install {name}"
        raise InvalidRequest(f"{name} is not installed.", why="a tracker needs its package.", hint=extra, param=name)
    PartialState()  # accelerate's own messages need it
    kind = LOGGER_TYPE_TO_CLASS[name]
    where = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
    if name == "wandb":
        where = {"id": _run_id(folder), "name": folder.name, "resume": "allow", "dir": str(folder)}
    tracker = kind("videogen" if name != "tensorboard" else name, **where)
    tracker.start()
    tracker.store_init_configuration(settings)
    return tracker


def _run_id(folder: Path) -> str:
    path = folder / "run_id"
    if not path.exists():
        with written(path) as part:
            part.write_text(uuid.uuid4().hex)
    return path.read_text()
