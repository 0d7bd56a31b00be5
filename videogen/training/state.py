"""A run's state on disk: complete or absent, written behind the training, read into any sharding.

    runs/x/step_00000200/
        dit.safetensors, dit_ema.safetensors, optimizer.safetensors   of several processes one file of each
        manifest.json     step, facts, size and sha256 of every file, and of itself: written last

A state is written under a hidden name, synced, and renamed when it is whole; only safetensors and JSON are read. Of a
tensor that is sharded (DTensor) each process writes its own part, with its place in the file's header, so that any
other number of processes can read it.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from videogen.data.files import sync
from videogen.errors import FileError, InvalidRequest, Note, VideogenError
from videogen.training.processes import gather_values
from videogen.training.state_files import (
    DTYPES,
    FORMAT,
    MANIFEST,
    Part,
    lock,
    pieces_of,
    problem_of,
    read_manifest,
    read_piece,
    saved_states,
    score_of,
    step_of,
    write_manifest,
    write_tensors,
)

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")  # in names, by what runs a module


# What a state is made of


def tensors_of(modules: Mapping[str, nn.Module], optimizers: Iterable[Optimizer] = ()) -> dict[str, Tensor]:
    """Everything that a training changes, by name: `dit/blocks.0.weight`, `optimizer/dit/blocks.0.weight/exp_avg`.

    They are the tensors themselves, so `State.read(into=...)` puts a state back. Parameters and buffers come once, tied
    ones under their first name. An optimiser that has not stepped yet gets the memory it would begin with, so the names
    depend on modules and optimisers alone. Rates and the like are settings, not state.

    Raises ValueError for an optimiser over other parameters than those of `modules`.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    for role, module in modules.items():
        if "/" in role or role == "optimizer":
            raise ValueError(f"a module cannot be called {role!r} in a state")
        for kind in (module.named_parameters(), module.named_buffers()):
            for name, tensor in kind:
                for wrapper in WRAPPERS:
                    name = name.replace(wrapper, "")
                if names.setdefault(id(tensor), f"{role}/{name}") == f"{role}/{name}":
                    tensors[f"{role}/{name}"] = tensor.detach()
    for optimizer in optimizers:
        _prepare(optimizer)
        for parameter, key in _pairs(optimizer):
            if id(parameter) not in names:
                raise ValueError(f"{type(optimizer).__name__} moves a parameter that no module of the state has")
            for entry, value in sorted(optimizer.state[key].items()):
                name = f"optimizer/{names[id(parameter)]}/{entry}"
                kept = _plain(name, value) if isinstance(value, Tensor) else {}
                if not kept or kept.keys() & tensors.keys():
                    kind = type(value).__name__
                    raise ValueError(f"{name} is a {kind} of {type(optimizer).__name__}: one tensor of a name is kept")
                tensors |= kept
    return tensors


def _plain(name: str, value: Tensor) -> dict[str, Tensor]:
    """The tensors that a value is made of: of a moment in 8 bits its codes and their scales. DTensors stay whole."""
    if hasattr(value, "device_mesh") or not hasattr(value, "__tensor_flatten__"):
        return {name: value}
    return {f"{name}.{part}": getattr(value, part) for part in cast("Any", value).__tensor_flatten__()[0]}


def _pairs(optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
    """(the module's parameter, the tensor that the optimiser knows it by): our Muon knows matrices as views of them."""
    keys = [key for group in optimizer.param_groups for key in group["params"]]
    return list(zip(getattr(optimizer, "parameters", keys), keys, strict=True))


def _prepare(optimizer: Optimizer) -> None:
    """Make the memory of parameters that never had a gradient: a step of rate 0 on gradients of 0, uncounted."""
    pairs = _pairs(optimizer)
    idle = [(parameter, key) for parameter, key in pairs if not optimizer.state.get(key)]
    if not idle:
        return
    gradients = [parameter.grad for parameter, _ in pairs]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter, _ in pairs:
        parameter.grad = None
    for parameter, _ in idle:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for (parameter, _), gradient in zip(pairs, gradients, strict=True):
        parameter.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for _, key in idle:
        if isinstance(count := optimizer.state[key].get("step"), Tensor):
            count.zero_()


def part_of(tensor: Tensor) -> Part:
    """A DTensor's local part and its place; any other tensor is a whole. Raises ValueError for unreduced ones."""
    if not hasattr(tensor, "device_mesh"):
        return Part(tensor, (0,) * tensor.ndim, tuple(tensor.shape))
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded = cast(DTensor, tensor)
    if not all(type(placement) in (Shard, Replicate) for placement in sharded.placements):
        raise ValueError(f"a tensor placed {sharded.placements} cannot be kept: it has to be Shard or Replicate")
    local = sharded.to_local()
    shape, offset = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
    if tuple(local.shape) != tuple(shape):
        local, offset = local.new_empty((0,) * sharded.ndim), (0,) * sharded.ndim  # this process has no part in it
    return Part(local, tuple(offset), tuple(sharded.shape))


# Writing


class StateWriter:
    """Saves states of a run in `folder`, behind the training: `save` copies the tensors and returns.

    keep_last, keep_best   states that stay: the newest, and those with the lowest scores
    asynchronous           False: `save` returns when the state is on the disk
    on_error               a state that could not be written: "stop" (the next call raises FileError), or "go on"
    timeout                seconds that a process waits for the others

    Every process of a training makes one and calls the same methods. They speak over a gloo group of their own, so a
    save never meets the training's messages. The copies stay allocated, pinned where tensors are on a GPU: host memory
    of the size of this process's part of the state. Another process that trains in the same folder is refused.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int = 2,
        keep_best: int = 0,
        *,
        asynchronous: bool = True,
        on_error: str = "stop",
        timeout: float = 1800.0,
    ) -> None:
        if keep_last < 1 or keep_best < 0 or on_error not in ("stop", "go on"):
            raise InvalidRequest(
                f"keep_last={keep_last}, keep_best={keep_best}, on_error={on_error!r} cannot be.",
                why="the newest state at least stays; a failed save is 'stop' or 'go on'.",
                hint="keep_last=2",
            )
        self.folder, self.keep_last, self.keep_best = Path(folder), keep_last, keep_best
        self.asynchronous, self.on_error = asynchronous, on_error
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.group: dist.ProcessGroup | None = None
        if several:
            made = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            self.group = cast(dist.ProcessGroup, made)
        self.rank = dist.get_rank() if several else 0
        self.world = dist.get_world_size() if several else 1
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="state")
        self.pending: Future[None] | None = None
        self.copies: dict[str, Tensor] = {}
        self.owned: dict[str, tuple[tuple[Any, ...], bool]] = {}
        self.lock: int | None = None
        problem = ""
        if self.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = lock(self.folder)
                sweep(self.folder)
            except (OSError, FileError) as error:
                problem = str(error)
        self._agree(problem, f"no states can be kept in {self.folder}.")

    def save(
        self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], score: float | None = None
    ) -> None:
        """Save `tensors` (as `tensors_of` names them) with JSON-ready `facts` as the state after `step` steps.

        score   the lower the better; a state without one (or with NaN) is kept by its age alone

        Waits for the save before this one, and raises FileError if that failed.
        """
        self.wait()
        parts = {name: part_of(tensor) for name, tensor in tensors.items()}
        mine = self._mine(parts)
        copies = {name: self._copy(name, parts[name].local) for name in mine}
        if any(parts[name].local.is_cuda for name in mine):
            torch.cuda.current_stream().synchronize()
        places = {name: (parts[name].offset, parts[name].shape) for name in mine}
        text = json.dumps(dict(facts), allow_nan=False)  # now: the caller may go on to change them
        score = score if score is not None and math.isfinite(score) else None
        self.pending = self.thread.submit(self._write, step, copies, places, text, score)
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until the last save is on the disk; raises FileError if it failed (`on_error`)."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.result()
        except VideogenError as error:
            if self.on_error == "stop":
                raise
            _warn(f"the training goes on without a newer state: {error.what} {error.why}")

    def finish(self) -> None:
        """Wait for the last save and let go of the folder."""
        try:
            self.wait()
        finally:
            self.thread.shutdown()
            self.copies.clear()
            if self.group is not None:
                dist.destroy_process_group(self.group)
                self.group = None
            if self.lock is not None:
                os.close(self.lock)
                self.lock = None

    def __enter__(self) -> StateWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.finish()
        except Exception as failed:
            if error is None:
                raise
            _warn(f"the last state was not saved: {failed}".replace("\n", " "))  # what ended the training is raised

    def newest(self) -> State | None:
        """`newest_state` of the folder: the processes check its files together and agree."""
        self.wait()
        return newest_state(self.folder, self.group)

    def _mine(self, parts: dict[str, Part]) -> list[str]:
        """Names of the parts that this process writes: of those that several hold, the first process's."""
        layout = {name: (*part.offset, *part.local.shape) for name, part in parts.items()}
        if {name: place for name, (place, _) in self.owned.items()} != layout:
            held = {name: list(place) for name, place in layout.items() if parts[name].local.numel()}
            before = _gather(held, self.group)[: self.rank]
            taken = {(name, *place) for other in before for name, place in other.items()}
            is_mine = {name: name in held and (name, *layout[name]) not in taken for name in layout}
            whole = {name: not math.prod(part.shape) and self.rank == 0 for name, part in parts.items()}  # empty ones
            self.owned = {name: (layout[name], is_mine[name] or whole[name]) for name in layout}
            self.copies.clear()
        return [name for name, (_, is_mine) in self.owned.items() if is_mine]

    def _copy(self, name: str, local: Tensor) -> Tensor:
        if not self.asynchronous and local.device.type == "cpu":
            return local.detach()  # nothing changes until it is written
        if name not in self.copies or self.copies[name].dtype != local.dtype:
            self.copies[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        return self.copies[name].copy_(local, non_blocking=True)

    def _write(
        self,
        step: int,
        copies: dict[str, Tensor],
        places: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
        facts: str,
        score: float | None,
    ) -> None:
        """In the thread: every process its files, then the first one the manifest and the rename."""
        final = self.folder / f"step_{step:08d}"
        part = self.folder / f".{final.name}.part"
        what = f"the state of step {step} was not saved in {self.folder}."
        size = sum(copy.nbytes for copy in copies.values())
        asked = _gather({"step": step, "bytes": size}, self.group)
        self._agree("" if all(a["step"] == step for a in asked) else f"processes are at steps {asked}", what)
        files: dict[str, dict[str, Any]] = {}
        try:
            with self._together(what):
                if self.rank == 0:
                    _check_room(self.folder, sum(a["bytes"] for a in asked))
                    shutil.rmtree(part, ignore_errors=True)
                    part.mkdir()
            with self._together(what):
                for role in sorted({name.split("/")[0] for name in copies}):
                    path = part / _file_name(role, self.rank, self.world)
                    own = {name: copy for name, copy in copies.items() if name.split("/")[0] == role}
                    files[path.name] = write_tensors(path, own, {name: places[name] for name in own})
                sync(part)
            everyones = {name: facts for some in _gather(files, self.group) for name, facts in some.items()}
            with self._together(what):
                if self.rank == 0:
                    values = {"format": FORMAT, "step": step, "facts": json.loads(facts), "files": everyones}
                    write_manifest(part / MANIFEST, values | {"score": score, "saved": time.time()})
                    _check_files(part, everyones)
                    sync(part)
                    _put(part, final)
                    prune(self.folder, step, self.keep_last, self.keep_best)
        finally:
            if self.rank == 0:
                shutil.rmtree(part, ignore_errors=True)

    @contextlib.contextmanager
    def _together(self, what: str) -> Iterator[None]:
        """A block that has failed for all processes when it has failed for one."""
        problem = ""
        try:
            yield
        except OSError as error:
            problem = str(error) if error.filename else f"{error}, {_free(self.folder)} are free"
        except Exception as error:  # the others would wait for this process
            problem = str(getattr(error, "why", "")) or f"{type(error).__name__}: {error}"
        self._agree(problem, what)

    def _agree(self, problem: str, what: str) -> None:
        problems = [p for p in _gather(problem, self.group) if p]
        if problems:
            raise FileError(what, why=problems[0], hint="check the disk: the states before it are whole.")


def prune(folder: Path, step: int, keep_last: int, keep_best: int) -> None:
    """Remove states up to `step`, but for the newest and the best. Newer ones were passed over, and are replaced."""
    states = [state for state in saved_states(folder) if step_of(state) <= step]
    scores = {state: score for state in states if keep_best and (score := score_of(state)) is not None}
    best = sorted(scores, key=lambda state: (scores[state], -step_of(state)))[:keep_best]
    for state in {*states} - {*states[-keep_last:], *best}:
        hidden = state.with_name(f".{state.name}.part")
        with contextlib.suppress(OSError):  # the state that was to be saved is; what stays is tried again
            os.rename(state, hidden)  # no torn state is ever visible
            shutil.rmtree(hidden)


def sweep(folder: Path) -> None:
    """Remove what a save that was killed has left."""
    for part in folder.glob(".step_*.part"):
        shutil.rmtree(part, ignore_errors=True)


def _put(part: Path, final: Path) -> None:
    if final.exists():
        if not problem_of(final):
            return  # a run that was resumed, or ends here, reaches a step that is saved
        shutil.rmtree(final)
    os.replace(part, final)
    sync(final.parent)


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(errno.ENOSPC, f"the state has {size / 1e9:.2f} GB, {_free(folder)} are free", str(folder))


def _free(folder: Path) -> str:
    with contextlib.suppress(OSError):
        return f"{shutil.disk_usage(folder).free / 1e9:.2f} GB"
    return "nobody knows how many GB"


def _check_files(part: Path, files: Mapping[str, dict[str, Any]]) -> None:
    """Whether every process's files are where the first one sees them."""
    for name, facts in files.items():
        if not (part / name).is_file() or (part / name).stat().st_size != facts["bytes"]:
            raise OSError(errno.ENOENT, "not every process writes to the same disk", str(part / name))


def _file_name(role: str, rank: int, world: int) -> str:
    return f"{role}.safetensors" if world == 1 else f"{role}-{rank + 1:05d}-of-{world:05d}.safetensors"


def _gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """`gather_values` of a gloo group; without one, of this process alone. Raises FileError for a lost process."""
    if group is None:
        return [json.loads(json.dumps(value))]
    try:
        return gather_values(value, torch.device("cpu"), group)
    except RuntimeError as error:
        raise FileError(
            "another process was lost while a state was saved or read.",
            why=str(error).splitlines()[0],
            hint="start the run again: it goes on from the newest whole state.",
        ) from error


def _warn(text: str) -> None:
    """A line on stderr, of the first process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        warnings.warn(Note(text), stacklevel=3)


# Reading


@dataclass(frozen=True)
class State:
    """A whole state: every file of it is as it was written."""

    folder: Path
    step: int
    facts: dict[str, Any]
    score: float | None = None
    files: tuple[str, ...] = field(default=(), repr=False)

    @torch.no_grad()
    def read(self, into: Mapping[str, Tensor], *, some: bool = False) -> None:
        """Put the state into these tensors, sharded or not, whatever wrote it. Nothing is touched if anything is wrong.

        some   `into` may lack tensors of the state (the averages alone, for an export)

        Raises FileError where names, shapes or types differ.
        """
        pieces = pieces_of(self.folder / name for name in self.files)
        missing, more = sorted(into.keys() - pieces.keys()), sorted(pieces.keys() - into.keys())
        if missing or (more and not some):
            raise self._unlike(
                f"it lacks {', '.join(missing[:3])}." if missing else f"it has {', '.join(more[:3])} too.",
            )
        parts = {name: part_of(tensor) for name, tensor in into.items()}
        for name, part in parts.items():
            dtypes = {DTYPES.get(piece.entry.dtype) for piece in pieces[name]}
            if {part.shape} != {piece.shape for piece in pieces[name]} or dtypes != {part.local.dtype}:
                found = f"{pieces[name][0].entry.dtype} {list(pieces[name][0].shape)}"
                raise self._unlike(f"{name} is {part.local.dtype} {list(part.shape)} here, and {found} there.")
            if sum(math.prod(piece.entry.shape) for piece in pieces[name]) != math.prod(part.shape):
                raise self._unlike(f"parts of {name} are missing.")
        for name, part in parts.items():
            for piece in pieces[name]:
                read_piece(piece, part)

    def _unlike(self, why: str) -> FileError:
        hint = "the settings that it was saved with, or another folder for the run."
        return FileError(f"{self.folder} is not a state of this training.", why=why, hint=hint)


def newest_state(folder: Path, group: dist.ProcessGroup | None = None) -> State | None:
    """The newest whole state of a run, None for a run that has none. Damaged ones are named in a Note and passed over.

    With a `group` (gloo), its processes must all call this; each checks its share of the bytes.

    Raises FileError if there are states, and none is whole: nobody is to begin anew unasked.
    """
    folder = Path(folder)
    share = slice(None) if group is None else slice(dist.get_rank(group), None, group.size())
    names = _gather([state.name for state in saved_states(folder)], group)[0]
    problems = []
    for name in reversed(names):
        problem = next((p for p in _gather(problem_of(folder / name, share), group) if p), "")
        if not problem:
            return _open(folder / name)
        problems.append(f"{name}: {problem}")
        _warn(f"{folder / name} is damaged and passed over: {problem}")
    if problems:
        raise FileError(
            f"no state in {folder} is whole.",
            why="; ".join(problems[:3]) + ".",
            hint="bring a whole one back, or remove them (or choose another folder) to begin anew.",
        )
    return None


def _open(state: Path) -> State:
    values = read_manifest(state)
    return State(state, values["step"], values["facts"], values["score"], tuple(values["files"]))


# Settings


# What a resumed run may change, by the setting's path in its file; everything else is refused.
FIT = """
    steps learning_rate muon_learning_rate betas.* weight_decay gradient_clip warmup_steps decay_fraction ema_decay
    log_every save_every trackers trackers.* safety.* parallel.* state.*
""".split()  # noqa: SIM905
APPLIED = (*(f"{loop}.{name}" for loop in ("fit", "consistency") for name in FIT), "validation.*")
APPLIED += ("folder", "name", "dtype", "*micro_batch_size", "gradient_checkpointing", "time_parallel")


def settings_to_apply(
    saved: Mapping[str, Any], now: Mapping[str, Any], applied: Sequence[str] = APPLIED
) -> dict[str, tuple[Any, Any]]:
    """The settings that a resumed run changes and that hold from now on: dotted path -> (before, now). Each is noted.

    saved, now   settings as nested dicts (`dataclasses.asdict`); lists and tuples are the same
    applied      patterns of the paths that may change

    Raises FileError for every other change, and for settings that only one of the two knows: a resumed run equals an
    uninterrupted one, or says where it does not.
    """
    before, after = _flat(saved), _flat(now)
    changed = {
        path: (before.get(path), after.get(path))
        for path in sorted(before.keys() | after.keys())
        if path not in before or path not in after or before[path] != after[path]
    }
    shown = {
        path: [json.dumps(side[path]) if path in side else "absent" for side in (before, after)] for path in changed
    }
    refused = [path for path in changed if not any(fnmatch.fnmatchcase(path, pattern) for pattern in applied)]
    if refused:
        lines = [f"{path} was {shown[path][0]}, is {shown[path][1]}" for path in refused]
        raise FileError(
            f"the run was started with other settings: {'; '.join(lines[:5])}{' …' if len(lines) > 5 else ''}.",
            why="a resumed run must equal an uninterrupted one, and these cannot change on the way.",
            hint="restore the settings, or give the run another folder.",
        )
    for path in changed:
        _warn(f"{path} was {shown[path][0]}, is {shown[path][1]} from now on")
    return changed


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    """Nested dicts and lists as dotted path -> value; empty ones are values."""
    if isinstance(values, Mapping) and values:
        items: Iterable[tuple[Any, Any]] = values.items()
    elif isinstance(values, list | tuple) and values:
        items = enumerate(values)
    else:
        return {path: json.loads(json.dumps(values))}
    return {k: v for key, value in items for k, v in _flat(value, f"{path}.{key}" if path else str(key)).items()}
