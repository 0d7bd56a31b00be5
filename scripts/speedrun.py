"""From an empty folder to a measured text-to-video model and its four-step student.

    python scripts/speedrun.py                  checkpoints/tiny from nothing: hours on two cores, minutes on a GPU
    python scripts/speedrun.py --scale smoke    every stage in a few minutes, into runs/smoke (the result is no good)

The VAE learns to compress clips of the world, the DiT to make its latents from words, the student to do it in four
steps; then both are scored on prompts that training never showed. Stopped at any point, it goes on where it was when
started again. Everything lies in runs/tiny; --install puts the models in place of checkpoints/tiny and tiny-4step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["fit.save_every=10", "fit.log_every=5"]
SMOKE = {
    "vae": ["fit.steps=30", *QUICK],
    "dit": ["fit.steps=20", "clips=64", "batch_size=8", *QUICK],
    "student": ["fit.steps=9", "clips=64", "batch_size=4", *QUICK],
}
SMOKE_SCORE = ["--n", "8", "--n-frames", "4", "--batch", "4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("full", "smoke"), default="full")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each, for DiT and student")
    parser.add_argument("--install", action="store_true", help="replace checkpoints/tiny and checkpoints/tiny-4step")
    args = parser.parse_args()

    smoke = args.scale == "smoke"
    runs = Path("runs/smoke" if smoke else "runs/tiny")
    processes = 1 if smoke else args.processes
    teacher, student = runs / "dit/model", runs / "student/model"

    def train(task: str, config: str, *settings: str, processes: int = processes) -> None:
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [str(ROOT / "scripts/train.py"), str(ROOT / "configs/train" / config), f"folder={runs / task}"]
        run([*command, *settings, *(SMOKE[task] if smoke else [])])

    def score(model: Path, out: str) -> None:
        steps = ["--steps", "4"] if smoke else []
        scores = [*SMOKE_SCORE, *steps] if smoke else []
        run([sys.executable, str(ROOT / "scripts/score.py"), str(model), "--out", str(runs / out), *scores])

    stages: list[tuple[str, Path, Callable[[], None]]] = [
        ("vae", runs / "vae/vae/config.json", lambda: train("vae", "tiny_vae.yaml", processes=1)),
        ("dit", teacher / "videogen.json", lambda: train("dit", "tiny_dit.yaml", f"vae={runs / 'vae/vae'}")),
        ("student", student / "videogen.json", lambda: train("student", "distill-tiny.yaml", f"teacher={teacher}")),
        ("score", runs / "score/score.json", lambda: score(teacher, "score")),
        ("student score", runs / "student_score/score.json", lambda: score(student, "student_score")),
    ]
    for name, result, make in stages:
        if not result.exists():
            timed(name, make, runs / "seconds.json")
    print(report(runs), end="")
    if args.install:
        install(teacher, runs / "score", "tiny")
        install(student, runs / "student_score", "tiny-4step")


def timed(name: str, make: Callable[[], None], clock: Path) -> None:
    """Do a stage and add its time to what it took in earlier runs that were stopped."""
    started = time.monotonic()
    try:
        make()
    finally:
        seconds = json.loads(clock.read_text()) if clock.exists() else {}
        seconds[name] = round(seconds.get(name, 0) + time.monotonic() - started, 1)
        clock.parent.mkdir(parents=True, exist_ok=True)
        clock.write_text(json.dumps(seconds, indent=1) + "\n")


def run(command: list[str]) -> None:
    print("+", " ".join(command), file=sys.stderr, flush=True)
    # One thread per process: two threads of one process are slower than one on a small CPU.
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def report(runs: Path) -> str:
    """The time of each stage, and both score tables."""
    seconds = json.loads((runs / "seconds.json").read_text()) if (runs / "seconds.json").exists() else {}
    lines = [f"{name:<14} {value / 60:6.1f} min" for name, value in seconds.items()]
    lines += [f"{'together':<14} {sum(seconds.values()) / 60:6.1f} min", ""]
    for name, folder in (("teacher", "score"), ("student", "student_score")):
        lines += [f"{name}:", (runs / folder / "score.md").read_text()]
    return "\n".join(lines)


def install(model: Path, score: Path, name: str) -> None:
    """Copy a model with its score in `videogen.json` to checkpoints/, and its samples beside it."""
    target, staging = ROOT / "checkpoints" / name, ROOT / "checkpoints" / f".{name}.part"
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(model, staging)
    card = json.loads((staging / "videogen.json").read_text())
    rows = json.loads((score / "score.json").read_text())
    card["provenance"]["score"] = {
        label: {attribute: round(cell["rate"], 4) for attribute, cell in row["rates"].items()} | {"n": row["n"]}
        for label, row in rows["rows"].items()
    }
    card["provenance"]["vae_psnr"] = round(rows["vae"]["psnr"], 2)
    (staging / "videogen.json").write_text(json.dumps(card, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
    prefix = "" if name == "tiny" else f"{name}-"
    for file in ("score.md", "samples.png", "samples.txt"):
        shutil.copy(score / file, ROOT / "checkpoints" / f"{prefix}{file}")


if __name__ == "__main__":
    main()
