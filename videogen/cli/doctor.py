"""`videogen doctor`: what this machine and installation can do, each line ok, a note, or something to fix, and how.

Exit code 1 if something that every clip needs is broken, else 0: a missing GPU or an optional package is a note.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from videogen import __version__
from videogen.errors import VideogenError, visible

LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pillow", "av", "imageio", "xformers")
OK, NOTE, FIX = "ok", "note", "fix"
LOW_DISK, LOW_MEMORY = 5e9, 4e9  # bytes


@dataclass(frozen=True)
class Finding:
    """One line: `status` is ok, note (something optional is missing) or fix (something needed is broken)."""

    name: str
    status: str
    found: str
    fix: str = ""


def add_command(subparsers: Any) -> None:
    command = subparsers.add_parser("doctor", help="check this machine and installation, with a fix for each problem")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if something needed is broken."""
    findings = list(examine())
    broken = sum(finding.status == FIX for finding in findings)
    if args.json:
        facts = {"videogen": __version__, "python": platform.python_version(), "system": platform.platform()}
        facts |= {"libraries": {name: installed(name) for name in LIBRARIES}, "broken": broken}
        print(json.dumps(facts | {"findings": [asdict(finding) for finding in findings]}, indent=2))
        return int(broken > 0)
    print(f"videogen {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for finding in findings:
        print(f"{finding.status:<5} {finding.name:<22} {visible(finding.found)}")
        if finding.fix:
            print(f"{'':<28} try: {visible(finding.fix)}")
    print(f"{broken} to fix" if broken else "all that is needed works", file=sys.stderr)
    return int(broken > 0)


def examine() -> Iterator[Finding]:
    """All findings. A check that fails itself is a finding, never a traceback."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        packages,
        torch_and_devices,
        dtypes,
        memory,
        disk,
        codecs,
        kernels,
        compilers,
        hub,
        bundled_model,
    ]
    for check in checks:
        try:
            yield from check()
        except Exception as error:
            yield Finding(check.__name__, FIX, first_line(error), "pip install -e .   (in the checkout)")


def first_line(error: BaseException | str) -> str:
    """As the other lines are: without the name of an exception, and small at its beginning."""
    line = (str(error).strip().splitlines() or ["it fails without a word"])[0][:200]
    line = re.sub(r"^(?:[\w.]*(?:Error|Exception): )+", "", line)
    return line[:1].lower() + line[1:] if re.match(r"(?:[A-Z][a-z]+|A)\b", line) else line


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# ---- checks ---------------------------------------------------------------------------------------------------------


def packages() -> Iterator[Finding]:
    """Everything that pyproject.toml lists, in the versions it asks for."""
    from packaging.requirements import Requirement

    needed = [Requirement(line) for line in requires("videogen") or []]
    wrong = []
    for package in needed:
        if package.marker is None or package.marker.evaluate({"extra": ""}):
            have = installed(package.name)
            if have is None or not package.specifier.contains(have, prereleases=True):
                wrong.append(f"{package.name} {have or 'missing'} (needs {package.specifier or 'any'})")
    fix = "pip install -e .   (in the checkout)"
    yield Finding("packages", FIX if wrong else OK, ", ".join(wrong) or "all there", fix if wrong else "")
    if find_spec("torchvision") is not None:
        try:
            __import__("torchvision")
        except Exception as error:  # built for another torch; transformers imports it if it is there
            fix = "pip uninstall torchvision   (videogen does not need it)"
            yield Finding("torchvision", FIX, first_line(error), fix)


def torch_and_devices() -> Iterator[Finding]:
    import torch

    yield Finding("torch", OK, f"{torch.__version__}, {torch.get_num_threads()} threads")
    built, driver = torch.version.cuda, driver_version()
    if torch.cuda.is_available():
        yield Finding("cuda", OK, f"CUDA {built}, driver {driver or 'unknown'}")
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            old = facts.major < 7
            fix = "a GPU of compute capability 7.0 or more (2018 and later), or --device cpu" if old else ""
            found = f"{facts.name}, compute capability {facts.major}.{facts.minor}"
            yield Finding(f"gpu {index}", NOTE if old else OK, found, fix)
    elif driver and not built:
        fix = "pip install torch --index-url https://download.pytorch.org/whl/cu128   (a build with CUDA)"
        yield Finding("cuda", NOTE, f"driver {driver}, but this torch is built without CUDA", fix)
    elif driver:
        fix = f"a driver for CUDA {built} or newer, or a torch built for an older CUDA; nvidia-smi shows both"
        yield Finding("cuda", NOTE, f"driver {driver}, CUDA {built}, and torch finds no device", fix)
    else:
        yield Finding("cuda", NOTE, "no NVIDIA driver: clips are made on the CPU", "a machine with an NVIDIA GPU")


def driver_version() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=3, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip().splitlines() or [None])[0] if done.returncode == 0 else None


def dtypes() -> Iterator[Finding]:
    """A small product of matrices in each."""
    import torch

    for device in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        failed = {}
        for kind in ("float32", "bfloat16", "float16", "float8_e4m3fn"):
            try:
                multiply(device, getattr(torch, kind))
            except Exception as error:  # torch raises several kinds
                failed[kind] = first_line(error)
        works = [k for k in ("float32", "bfloat16", "float16", "float8_e4m3fn") if k not in failed]
        native = device == "cpu" or torch.cuda.get_device_capability(device)[0] >= 8
        if "float32" in failed:
            yield Finding(f"dtypes on {device}", FIX, failed["float32"], "install torch again")
        elif device != "cpu" and not native:
            fix = "CogVideoX-2b, which is made for float16; the 5B models with --dtype float32"
            yield Finding(f"dtypes on {device}", NOTE, f"{', '.join(works)}; bfloat16 is emulated", fix)
        else:
            yield Finding(f"dtypes on {device}", OK, ", ".join(works))


def multiply(device: str, dtype: Any) -> None:
    import torch

    x = torch.ones(32, 32, device=device)
    if dtype == torch.float8_e4m3fn:
        scale = torch.ones((), device=device)
        y = torch._scaled_mm(x.to(dtype), x.to(dtype).t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)
    else:
        y = x.to(dtype) @ x.to(dtype)
    if not bool((y.float() == 32).all()):
        raise ArithmeticError("a product of ones is wrong")


def memory() -> Iterator[Finding]:
    import torch

    free, total = ram()
    low = free is not None and free < LOW_MEMORY
    fix = (
        "close other programs; the bundled model needs 1 GB, CogVideoX-2b 25 GB (videogen plan says more)"
        if low
        else ""
    )
    yield Finding("memory", NOTE if low else OK, f"{gib(free)} of {gib(total)} free", fix)
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        low = free < LOW_MEMORY
        fix = "close what uses the GPU (nvidia-smi lists it), or --memory minimal" if low else ""
        yield Finding(f"memory of gpu {index}", NOTE if low else OK, f"{gib(free)} of {gib(total)} free", fix)


def ram() -> tuple[int | None, int | None]:
    """Free and total bytes, of this container where it has a limit of its own."""
    meminfo = Path("/proc/meminfo")
    facts = dict(re.findall(r"^(\w+):\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)) if meminfo.exists() else {}
    total = int(facts["MemTotal"]) * 1024 if "MemTotal" in facts else None
    free = int(facts["MemAvailable"]) * 1024 if "MemAvailable" in facts else None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        left = limit - int(Path("/sys/fs/cgroup/memory.current").read_text())
        return min(left, free or left), min(limit, total or limit)
    except (OSError, ValueError):  # no cgroup, or "max"
        return free, total


def gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def disk() -> Iterator[Finding]:
    from videogen.weights.hub import cache_folder

    for name, folder, move in (
        ("disk of the cache", cache_folder(), "HF_HUB_CACHE=/another/disk moves the cache"),
        ("disk of outputs", Path("outputs"), "--out on another disk"),
    ):
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        try:
            with tempfile.NamedTemporaryFile(dir=there, prefix=".videogen"):
                problem = "" if free >= LOW_DISK else "little room: CogVideoX-2b has 14 GB, 5b 22 GB"
        except OSError as error:
            problem = f"not writable ({first_line(error)})"
        found = f"{gib(free)} free in {folder}"
        yield Finding(name, NOTE if problem else OK, f"{found}; {problem}" if problem else found, move * bool(problem))


def codecs() -> Iterator[Finding]:
    """Two frames written and read back, in every format."""
    import numpy as np

    from videogen.data.video import read_recipe, read_video, write_video

    frames = np.zeros((2, 16, 16, 3), np.uint8)
    frames[1] = 255
    works, failed = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("mp4", "webp", "gif"):
            path = Path(folder) / f"clip.{name}"
            try:
                write_video(path, frames, 8, recipe={"seed": 1})
                if read_video(path)[0].shape != frames.shape or read_recipe(path) != {"seed": 1}:
                    raise ValueError("what was read is not what was written")
                works.append(name)
            except (VideogenError, ValueError) as error:
                failed[name] = first_line(getattr(error, "why", "") or error)
    if works:
        yield Finding("codecs", OK, f"{', '.join(works)} written and read")
    for name, why in failed.items():
        fix = "pip install --force-reinstall av" if name == "mp4" else "pip install --force-reinstall pillow imageio"
        yield Finding(f"codec {name}", FIX if name == "mp4" else NOTE, why, fix)


def kernels() -> Iterator[Finding]:
    """Which attention kernels load and compute here."""
    import torch

    from videogen.runtime.kernels import KERNELS, problem

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    works, failed = [], {}
    for name, make in KERNELS.items():
        try:
            why, fix = problem(make(), 64, device, dtype), ""
        except VideogenError as error:
            why, fix = " ".join(filter(None, (error.what, error.why))), error.hint
        if why:
            failed[name] = why, fix
        else:
            works.append(name)
    status = OK if "sdpa" in works else FIX
    yield Finding("attention", status, f"{', '.join(works)} on {device.type}", "" if works else "install torch again")
    for name, (why, fix) in failed.items():
        yield Finding(f"attention {name}", NOTE, first_line(why), fix)


def compilers() -> Iterator[Finding]:
    """What torch.compile (--compile) and the kernels of the fast rows need."""
    import torch

    triton = installed("triton")
    cuda = torch.cuda.is_available()
    fix = "" if triton or not cuda else "pip install triton   (it comes with torch's CUDA builds for Linux)"
    found = triton or ("not installed" if cuda else "not installed, and of no use without a GPU")
    yield Finding("triton", NOTE if fix else OK, found, fix)
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++", "cl")), None)
    headers = (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()
    lacking = [name for name, there in (("a C++ compiler", compiler), ("Python.h", headers)) if not there]
    fix = "apt install g++ python3-dev   (only --compile needs them)" if lacking else ""
    found = f"no {' and no '.join(lacking)}" if lacking else f"{compiler} and Python.h"
    yield Finding("compiler", NOTE if lacking else OK, found, fix)


def hub() -> Iterator[Finding]:
    """The Hub's cache, and whether the network may be used. Nothing is sent."""
    from huggingface_hub import constants

    from videogen.weights.hub import cache_folder, is_offline

    cached = sorted(path.name[8:].replace("--", "/") for path in cache_folder().glob("models--*"))
    found = f"{cache_folder()}: {', '.join(cached[:5]) or 'empty'}{', …' if len(cached) > 5 else ''}"
    yield Finding("models in the cache", OK, found)
    fix = "unset HF_HUB_OFFLINE to fetch models" if is_offline() else ""
    found = "forbidden by HF_HUB_OFFLINE" if is_offline() else f"allowed, to {constants.ENDPOINT}"
    yield Finding("network", NOTE if fix else OK, found, fix)


def bundled_model() -> Iterator[Finding]:
    from videogen.weights.diffusers import verify_folder
    from videogen.weights.hub import find_model

    try:
        folder = find_model("tiny")
        verify_folder(folder)
        yield Finding("bundled model", OK, f"{folder}, sha256 of every file as recorded")
    except VideogenError as error:
        fix = "git checkout checkpoints/tiny   (in the checkout; a wheel: install it again)"
        yield Finding("bundled model", FIX, f"{error.what} {error.why}", fix)
