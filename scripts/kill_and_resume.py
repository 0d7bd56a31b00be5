"""How much of the time is training, if the run is killed again and again?

    python scripts/kill_and_resume.py configs/train/tiny_dit.yaml folder=runs/kill --log runs/kill/log.jsonl --every 120

Starts the training, ends all its processes with SIGKILL after `--every` seconds, starts it again, and so on. Effective
training time is the time that the steps which count would have taken undisturbed, over the time on the clock: what is
lost are starts, steps that had to be done twice, and the saving of states. The run must log every step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--every", type=float, default=120.0, help="seconds between kills")
    parser.add_argument("--minutes", type=float, default=20.0, help="of the whole measurement")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--log", required=True, help="the run's log.jsonl")
    args = parser.parse_intermixed_args(arguments)
    launch = [sys.executable]
    if args.processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
    command = [*launch, str(ROOT / "scripts/train.py"), args.config, *args.overrides, "fit.log_every=1"]
    figures = measure(command, Path(args.log), args.every, 60 * args.minutes)
    print(json.dumps(figures, indent=1))
    return figures


def measure(command: list[str], log: Path, every: float, seconds: float) -> dict:
    """Run the command until the time is over or it ends by itself; figures of what came of it."""
    begun, kills, durations, recoveries, repeated, furthest = time.monotonic(), 0, [], [], 0, 0
    ended = False
    while not ended and time.monotonic() - begun < seconds:
        started = time.monotonic()
        process = subprocess.Popen(command, start_new_session=True)
        times: dict[int, float] = {}
        size = log.stat().st_size if log.exists() else 0
        while time.monotonic() - started < every and time.monotonic() - begun < seconds and not ended:
            time.sleep(0.05)
            ended = process.poll() is not None
            for step in new_steps(log, size):
                times.setdefault(step, time.monotonic())
        if not ended:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        steps = sorted(times)
        durations += [times[b] - times[a] for a, b in itertools.pairwise(steps)]
        repeated += sum(step <= furthest for step in steps)
        new = [times[step] for step in steps if step > furthest]
        if furthest and new:
            recoveries.append(new[0] - started)
        furthest = max([furthest, *steps])
    wall = time.monotonic() - begun
    step = statistics.median(durations) if durations else 0.0
    return {
        "kills": kills,
        "seconds": round(wall, 1),
        "steps": furthest,
        "seconds_per_step": round(step, 4),
        "steps_done_twice": repeated,
        "seconds_from_start_to_a_new_step": [round(r, 1) for r in recoveries],
        "effective_training_time": round(furthest * step / wall, 4),
        "ended_by_itself": ended,
    }


def new_steps(log: Path, start: int) -> list[int]:
    """Steps in the lines that were added behind byte `start`; the last line may not be whole yet."""
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().split(b"\n")[:-1]
    found = []
    for line in lines:
        try:
            found.append(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found


if __name__ == "__main__":
    main()
