"""The tensors of a pickle, and nothing else of it, into a safetensors file: the child process of `videogen convert`.

    python -I unpickle.py SOURCE TARGET        one line of JSON on stdout; exit code 3 where the pickle is refused

A pickle is a program. torch reads these with `weights_only=True`, an interpreter that knows tensors and plain values;
nothing else is ever tried. Should it have a hole, the process has little to gain: it imports nothing of ours, has no
environment, no network, limits on memory, time and what it writes, and any attempt to start a program, to open a
connection or to write a file ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import zipfile
from collections.abc import Mapping
from typing import Any

NESTED = ("module", "model", "state_dict")  # where checkpoints keep their weights, one inside the other at times
SLACK = 2**28  # bytes of memory beyond those of the file
REFUSED = ("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn")
REFUSED += ("subprocess.Popen", "ctypes.dlopen", "ctypes.dlsym", "os.remove", "os.rename", "os.rmdir", "os.mkdir")
REFUSED += ("os.symlink", "os.link", "os.truncate", "os.chmod", "os.kill", "shutil.rmtree", "code.__new__")


def main(source: str, target: str) -> int:
    no_network()
    import torch
    from safetensors.torch import save_file

    size = os.path.getsize(source)
    limit(size)
    sys.addaudithook(guard)
    try:
        # A file of torch before 1.6 is no archive and cannot be mapped.
        loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
        tensors, skipped = collect(loaded, 2 * size + 2**20)
        save_file(tensors, target, metadata={"format": "pt"})
    except Exception as error:  # every kind there is: the file is whatever somebody made it
        print(json.dumps({"error": reason(error)[:300]}))
        return 3
    print(json.dumps({"tensors": len(tensors), "skipped": skipped[:20]}))
    return 0


def reason(error: Exception) -> str:
    """torch's own words recommend to try again without its protection."""
    if type(error).__name__ == "UnpicklingError":
        asked = re.search(r"(?i)unsupported (?:global|class):? (?:global )?([\w.]+)", str(error))
        return f"it asks for {asked[1]}" if asked else "it holds more than tensors, or is no pickle"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def collect(loaded: Any, most: int) -> tuple[dict[str, Any], list[str]]:
    """The innermost state dict, each tensor with memory of its own, and the names of what is no tensor.

    `most`: bytes of all tensors; a view can claim a storage many times.
    """
    import torch

    while isinstance(loaded, Mapping):
        inner = [loaded[key] for key in NESTED if isinstance(loaded.get(key), Mapping)]
        if not inner:
            break
        loaded = inner[0]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"it holds {type(loaded).__name__}, no tensors by name")
    tensors: dict[str, Any] = {}
    for name, value in loaded.items():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise ValueError(f"{name[:80]} is no plain tensor")
            tensors[name] = value.detach()
    if not tensors:
        raise ValueError("it holds no tensors")
    if sum(t.numel() * t.element_size() for t in tensors.values()) > most:
        raise ValueError("its tensors are larger than the file")
    storages: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = (
            tensor.clone(memory_format=torch.contiguous_format) if storage in storages else tensor.contiguous()
        )
        storages.add(storage)
    return tensors, [str(name)[:80] for name in loaded if name not in tensors]


def no_network() -> None:
    """On Linux, a network of its own with nothing in it, where the system allows that."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    new_user, new_network = 0x10000000, 0x40000000
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).unshare(new_network if os.geteuid() == 0 else new_network | new_user)


def limit(size: int) -> None:
    """Memory, time and output that a file of `size` bytes can need."""
    try:
        import resource
    except ImportError:  # Windows
        return
    limits = {resource.RLIMIT_CPU: 120 + size // 10_000_000, resource.RLIMIT_FSIZE: 2 * size + 2**24}
    limits[resource.RLIMIT_CORE] = 0
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        limits[resource.RLIMIT_AS] = int(file.read().split()[0]) * resource.getpagesize() + 3 * size + SLACK
    for kind, most in limits.items():
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (most, most))


def guard(event: str, arguments: tuple[Any, ...]) -> None:
    """Ends the process at the first thing that reading tensors never does."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in REFUSED or event.startswith("socket."):
        os.write(1, json.dumps({"error": f"it tried {event}"}).encode())
        os._exit(3)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
