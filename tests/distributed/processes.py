"""Some functions of `checks.py` in several gloo processes at once, and what became of each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
PROGRAM = "import {0}; {0}.main()"
CHECKED = f"import conftest; {PROGRAM}"  # with shapes, as everywhere in the suite; slow to start, so in one process
LIMIT = 240  # seconds; a process that waits for one that is gone would wait for longer


def run(count: int, device: str = "cpu", module: str = "checks") -> dict[str, str]:
    """Run every check of the module that is for `count` processes; {name: "" or what went wrong}."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{rank}.txt") for rank in range(count)]
        workers = []
        for rank, log in enumerate(logs):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            place |= {"MASTER_PORT": port, "CHECKS_DEVICE": device}
            environment = os.environ | {name: str(value) for name, value in place.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
            with log.open("w") as file:
                workers.append(
                    subprocess.Popen(
                        [sys.executable, "-c", (CHECKED if (count, rank) == (2, 0) else PROGRAM).format(module)],
                        env=environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            end = time.monotonic() + LIMIT
            while any(worker.poll() is None for worker in workers) and time.monotonic() < end:
                if any(worker.poll() for worker in workers):  # one failed; the others wait for it
                    end = min(end, time.monotonic() + 5)
                time.sleep(0.1)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        texts = [log.read_text() for log in logs]
    done = set.intersection(*({line[5:] for line in text.splitlines() if line.startswith("done ")} for text in texts))
    story = "\n\n".join(f"process {rank} of {count}:\n{text[-3000:]}" for rank, text in enumerate(texts))
    names = {line[5:] for text in texts for line in text.splitlines() if line.startswith("todo ")}
    return {name: "" if name in done else story for name in sorted(names)} or {"start": story}
