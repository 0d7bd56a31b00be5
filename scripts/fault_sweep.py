"""What the states of a training survive: a fault at every file operation of a save, by five kinds, and damage later.

    python scripts/fault_sweep.py calls     # kill, torn write, EIO, ENOSPC, full disk, at each call of the writer
    python scripts/fault_sweep.py strace    # kill, EIO, ENOSPC at each call to the system (needs strace)
    python scripts/fault_sweep.py ranks     # one of two processes that save a sharded state is killed, at each call
    python scripts/fault_sweep.py damage    # 200 damaged states: refused by name, and the one before is used
    python scripts/fault_sweep.py times     # how long a save holds a step up, and how long reading takes

Prints JSON; exit code 1 if anything was lost. Each save happens in a forked process, in a folder with two states, a
third, damaged one that it replaces, and the litter of an earlier kill. Afterwards every state that shows must be whole,
the newest must be the old or the new one bit for bit, and saving again must work and leave no litter.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videogen.errors import FileError
from videogen.training import state_files
from videogen.training.state import StateWriter, newest_state, saved_states

OLD, NEW = 20, 30
CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "open")
FAULTS = ("kill", "torn", "EIO", "ENOSPC", "full")
SYSTEM_CALLS = ("openat", "mkdir", "write", "fsync", "rename", "unlink", "unlinkat", "rmdir", "ftruncate")


def content(step: int) -> dict[str, Tensor]:
    """A small state, another one at each step."""
    generator = torch.Generator().manual_seed(step)
    sizes = {"dit/weight": (40, 16), "dit_ema/weight": (40, 16), "optimizer/dit/weight/exp_avg": (40, 16)}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def save(folder: Path, *steps: int, keep_last: int = 2) -> None:
    with StateWriter(folder, keep_last) as writer:
        for step in steps:
            writer.save(step, content(step), {"samples": step})


def prepare(folder: Path) -> Path:
    """Two states, a third with a flipped bit, and what a kill has left."""
    save(folder, 10, OLD, NEW, keep_last=3)
    flip(folder / f"step_{NEW:08d}" / "dit.safetensors", 4000)
    shutil.copytree(folder / f"step_{OLD:08d}", folder / ".step_00000040.part")
    return folder


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def verdict(folder: Path, code: int) -> str:
    """What is wrong with a folder after a fault; empty if nothing is. `code`: how the process that saved ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        newest = newest_state(folder)
        if newest is None or newest.step not in (OLD, NEW):
            return f"newest is {newest and newest.step}"
        if code == 0 and newest.step != NEW:
            return "the save reported success, and the state is not there"
        if code not in (0, 6, -signal.SIGKILL):
            return f"the process ended with {code}"
        tensors = {name: torch.zeros_like(tensor) for name, tensor in content(newest.step).items()}
        newest.read(into=tensors)
        if not all(torch.equal(tensors[name], tensor) for name, tensor in content(newest.step).items()):
            return "other numbers"
        save(folder, NEW)
    if [path.name for path in saved_states(folder)] != [f"step_{OLD:08d}", f"step_{NEW:08d}"]:
        return f"after saving again: {[path.name for path in saved_states(folder)]}"
    if litter := [path.name for path in folder.iterdir() if path.name.startswith(".") and path.name != ".lock"]:
        return f"litter: {litter}"
    after = newest_state(folder)
    return "" if after and after.step == NEW else "saving again left nothing"


def forked(work: Callable[[], Any]) -> int:
    """Process id of a child that does `work`: it ends with 0, with 6 for a FileError, with 9 for anything else."""
    if child := os.fork():
        return child
    code = 9
    try:
        warnings.simplefilter("ignore")
        work()
        code = 0
    except FileError:
        code = 6
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def end_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# Faults under the writer, in Python


class Faults:
    """Counts the file operations of this process and lets the one numbered `at` go wrong."""

    def __init__(self, at: int, fault: str) -> None:
        self.at, self.fault, self.count = at, fault, 0

    def come(self, name: str, torn: Callable[[], Any] | None = None) -> None:
        self.count += 1
        if self.count < self.at or (self.count > self.at and self.fault != "full"):
            return
        if self.fault in ("kill", "torn"):
            if torn and self.fault == "torn":
                torn()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "full" and name in ("unlink", "rmdir", "rename", "replace", "open"):
            return  # a full disk stays full; what takes no room still works
        number = errno.EIO if self.fault == "EIO" else errno.ENOSPC
        raise OSError(number, os.strerror(number), name)

    def install(self) -> Faults:
        for name in CALLS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        state_files.open = lambda path, mode="r": self._file(path, mode)  # type: ignore[attr-defined]
        return self

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **keywords: Any) -> Any:
            self.come(name)
            return call(*args, **keywords)

        return counted

    def _file(self, path: Path, mode: str) -> Any:
        if "w" not in mode:
            return open(path, mode)
        self.come("create")
        faults, file = self, io.FileIO(path, mode)

        class Written:
            def __enter__(self) -> Written:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, data: bytes) -> None:
                faults.come("write", lambda: file.write(data[: len(data) // 2]))
                file.write(data)

            def flush(self) -> None: ...

            def fileno(self) -> int:
                return file.fileno()

        return Written()


def sweep_calls(home: Path, every: int) -> dict[str, Any]:
    template = prepare(home / "template")
    child = forked(
        lambda: (counter := Faults(0, "none").install(), save(copied(template, home), NEW), note(home, counter))
    )
    assert end_of(child) == 0
    operations = int((home / "count").read_text())
    result: dict[str, Any] = {"operations": operations, "points": 0, "lost": [], "newest": Counter()}
    for fault in FAULTS:
        for at in range(1 + FAULTS.index(fault) % every, operations + 1, every):
            folder = copied(template, home)
            code = end_of(
                forked(lambda at=at, fault=fault, folder=folder: (Faults(at, fault).install(), save(folder, NEW)))
            )
            count(result, f"{fault} {at}", folder, code)
    return result


def copied(template: Path, home: Path) -> Path:
    shutil.rmtree(home / "run", ignore_errors=True)
    return Path(shutil.copytree(template, home / "run"))


def note(home: Path, counter: Faults) -> None:
    (home / "count").write_text(str(counter.count))


def count(result: dict[str, Any], point: str, folder: Path, code: int) -> None:
    result["points"] += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        newest = newest_state(folder)
    result["newest"][f"{'old' if newest and newest.step == OLD else 'new'} state, exit code {code}"] += 1
    if wrong := verdict(folder, code):
        result["lost"].append(f"{point}: {wrong}")


# Faults by strace


def sweep_strace(home: Path) -> dict[str, Any]:
    """`when=N` counts the calls of each thread by itself; N grows until nothing happens any more."""
    template = prepare(home / "template")
    result: dict[str, Any] = {"points": 0, "lost": [], "newest": Counter(), "calls": Counter()}
    for fault in ("signal=KILL", "error=EIO", "error=ENOSPC"):
        for call in SYSTEM_CALLS:
            for number in range(1, 1000):
                folder = copied(template, home)
                child = forked(lambda folder=folder: (os.kill(os.getpid(), signal.SIGSTOP), save(folder, NEW)))
                os.waitpid(child, os.WUNTRACED)
                log = home / "strace.txt"
                tracer = subprocess.Popen(
                    [*f"strace -f -e trace={call} -e inject={call}:{fault}:when={number} -p {child} -o".split(), log],
                    stderr=subprocess.PIPE,
                )
                assert tracer.stderr is not None
                tracer.stderr.readline()  # attached
                os.kill(child, signal.SIGCONT)
                code = end_of(child)
                tracer.wait()
                if "INJECTED" not in log.read_text() and code != -signal.SIGKILL:
                    break
                result["calls"][f"{call} {fault}"] += 1
                count(result, f"{call} {number} {fault}", folder, code)
    return result


# One of two processes


def save_sharded(folder: Path, rank: int, meeting: Path, step: int, faults: Faults) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    tensors = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in content(step).items()}
    faults.install()
    with StateWriter(folder, timeout=20) as writer:
        writer.save(step, tensors, {"samples": step})


def sweep_ranks(home: Path, every: int) -> dict[str, Any]:
    importlib.import_module("torch.distributed.tensor")  # slow: here once, and not in every process
    template = prepare(home / "template")
    result: dict[str, Any] = {"points": 0, "lost": [], "newest": Counter(), "operations": []}
    for victim in (0, 1):
        at = 1
        while True:
            folder, meeting = copied(template, home), home / "meeting"
            meeting.unlink(missing_ok=True)
            fault = [Faults(at if rank == victim else 0, "kill" if rank == victim else "none") for rank in (0, 1)]
            children = [
                forked(lambda r=rank, f=fault, d=folder, m=meeting: save_sharded(d, r, m, NEW, f[r])) for rank in (0, 1)
            ]
            codes = [end_of(child) for child in children]
            if codes[victim] != -signal.SIGKILL:
                result["operations"].append(at - 1)
                break
            count(result, f"rank {victim} killed at {at}", folder, codes[1 - victim])
            at += every
    return result


# Damage


def damages(random: random.Random) -> list[tuple[str, Callable[[Path], Any]]]:
    """Kinds of damage to a state's folder, each of them different whenever it is done."""

    def some(state: Path, *, data: bool = False) -> Path:
        return random.choice(sorted(state.glob("*.safetensors" if data else "*")))

    def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
        path.write_bytes(change(path.read_bytes()))

    def edit(state: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        path = state / "manifest.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values, indent=1, sort_keys=True))

    def swap(state: Path) -> None:
        (state / "dit.safetensors").rename(state / "x")
        (state / "dit_ema.safetensors").rename(state / "dit.safetensors")
        (state / "x").rename(state / "dit_ema.safetensors")

    def link(state: Path) -> None:
        path = some(state, data=True)
        shutil.copy(path, state.parent / "elsewhere")
        path.unlink()
        path.symlink_to(state.parent / "elsewhere")

    def zeros(data: bytes) -> bytes:
        place = random.randrange(len(data) // 2)
        return data[:place] + bytes(16) + data[place + 16 :]

    before = f"step_{OLD:08d}"
    return [
        ("bit flip", lambda s: flip(p := some(s), random.randrange(8 * p.stat().st_size))),
        ("bit flip in data", lambda s: flip(p := some(s, data=True), random.randrange(8 * p.stat().st_size))),
        ("cut short", lambda s: os.truncate(p := some(s), random.randrange(p.stat().st_size))),
        ("empty", lambda s: some(s).write_bytes(b"")),
        ("longer", lambda s: rewrite(some(s), lambda data: data + random.randbytes(random.randint(1, 64)))),
        ("zeros", lambda s: rewrite(some(s, data=True), zeros)),
        ("missing", lambda s: some(s).unlink()),
        ("extra", lambda s: (s / f"optimizer_{random.randint(0, 9)}.pt").write_bytes(random.randbytes(9))),
        ("swapped", swap),
        ("of the state before", lambda s: shutil.copy(s.parent / before / (n := some(s).name), s / n)),
        ("link", link),
        ("folder for a file", lambda s: ((p := some(s)).unlink(), p.mkdir())),
        ("renamed", lambda s: s.rename(s.with_name(f"step_{NEW + random.randint(1, 99):08d}"))),
        ("facts edited", lambda s: edit(s, lambda v: v["facts"].update(samples=random.randint(31, 10**6)))),
        ("step edited", lambda s: edit(s, lambda v: v.update(step=random.randint(31, 10**6)))),
        ("hash edited", lambda s: edit(s, lambda v: v["files"]["dit.safetensors"].update(sha256=f"{random.random()}"))),
        (
            "file left out",
            lambda s: (edit(s, lambda v: v["files"].pop("dit.safetensors")), (s / "dit.safetensors").unlink()),
        ),
        ("written anew", lambda s: edit(s, lambda v: v.update(saved=random.random()))),
    ]


def sweep_damage(home: Path, number: int) -> dict[str, Any]:
    template = home / "template"
    save(template, OLD, NEW)
    chance = random.Random(0)
    kinds = damages(chance)
    result: dict[str, Any] = {"damaged": 0, "refused": 0, "kinds": Counter(), "lost": []}
    for index in range(number):
        name, damage = kinds[index % len(kinds)]
        folder = copied(template, home)
        damage(folder / f"step_{NEW:08d}")
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            newest = newest_state(folder)
        loud = any("damaged and passed over" in str(note.message) for note in notes)
        result["damaged"] += 1
        result["kinds"][name] += 1
        if newest is not None and newest.step == OLD and loud:
            result["refused"] += 1
        else:
            result["lost"].append(f"{index} {name}: newest {newest and newest.step}, {[str(n.message) for n in notes]}")
    return result


# Times


def times(home: Path, megabytes: int, repeats: int) -> dict[str, Any]:
    """Seconds, medians. `holds up`: how long `save` takes to return; `behind`: until the state is on the disk."""
    rows = megabytes * 2**20 // 4 // 3 // 1024
    tensors = {
        name: torch.randn(rows, 1024) for name in ("dit/weight", "dit_ema/weight", "optimizer/dit/weight/exp_avg")
    }
    figures: dict[str, list[float]] = {}
    for kind, asynchronous in (("asynchronous", True), ("synchronous", False)):
        with StateWriter(home / kind, asynchronous=asynchronous) as writer:
            for step in range(repeats + 1):
                start = time.perf_counter()
                writer.save(step, tensors, {})
                returned = time.perf_counter()
                writer.wait()
                if step:  # the first one makes the copies
                    figures.setdefault(f"{kind} holds up", []).append(returned - start)
                    figures.setdefault(f"{kind} behind", []).append(time.perf_counter() - returned)
    for _ in range(repeats):
        start = time.perf_counter()
        newest = newest_state(home / "synchronous")
        assert newest is not None
        checked = time.perf_counter()
        newest.read(into=tensors)
        figures.setdefault("checked again", []).append(checked - start)
        figures.setdefault("read", []).append(time.perf_counter() - checked)
    size = sum(path.stat().st_size for path in saved_states(home / "synchronous")[-1].iterdir())
    return {"megabytes": round(size / 1e6, 1), **{k: round(statistics.median(v), 4) for k, v in figures.items()}}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("calls", "strace", "ranks", "damage", "times"))
    parser.add_argument("--number", type=int, default=200, help="of damaged states")
    parser.add_argument("--every", type=int, default=1, help="calls and ranks: only every so manieth")
    parser.add_argument("--megabytes", type=int, default=300, help="times: size of the state")
    parser.add_argument("--repeats", type=int, default=5, help="times: saves of each kind")
    parser.add_argument("--folder", help="where it happens; nowhere else (default: memory, or the disk for times)")
    args = parser.parse_args(arguments)
    memory = "/dev/shm" if args.what != "times" and os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=args.folder or memory) as folder:
        home = Path(folder)
        result = {
            "calls": lambda: sweep_calls(home, args.every),
            "strace": lambda: sweep_strace(home),
            "ranks": lambda: sweep_ranks(home, args.every),
            "damage": lambda: sweep_damage(home, args.number),
            "times": lambda: times(home, args.megabytes, args.repeats),
        }[args.what]()
    print(json.dumps(result, indent=1))
    return 1 if result.get("lost") else 0


if __name__ == "__main__":
    sys.exit(main())
