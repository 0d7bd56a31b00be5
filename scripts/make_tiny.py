"""Make `checkpoints/tiny` from nothing: train the VAE, then the DiT and text encoder, score and install the result.

    python scripts/make_tiny.py                 the bundled model: about two hours on two cores, less on a GPU
    python scripts/make_tiny.py --scale smoke   every stage in a few minutes, into runs/smoke (the result is no good)

Stopped at any point, it goes on where it was when started again. The trained model is written to runs/tiny/dit/model;
it replaces checkpoints/tiny only with --install.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMOKE = {
    "vae": ["fit.steps=30", "fit.save_every=15", "fit.log_every=5"],
    "dit": [
        "fit.steps=20",
        "fit.save_every=10",
        "fit.log_every=5",
        "clips=64",
        "batch_size=8",
        "vae=runs/smoke/vae/vae",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("full", "smoke"), default="full")
    parser.add_argument("--processes", type=int, default=2, help="processes that train the DiT, one thread each")
    parser.add_argument("--install", action="store_true", help="replace checkpoints/tiny")
    args = parser.parse_args()

    smoke = args.scale == "smoke"
    runs = Path("runs/smoke" if smoke else "runs/tiny")
    for task in ("vae", "dit"):
        overrides = [f"folder={runs / task}", *(SMOKE[task] if smoke else [])]
        processes = args.processes if task == "dit" and not smoke else 1
        train(ROOT / f"configs/train/tiny_{task}.yaml", overrides, processes)
    model = runs / "dit" / "model"
    count = ["--n", "8", "--n-frames", "4", "--batch", "4", "--steps", "4"] if smoke else []
    run([sys.executable, str(ROOT / "scripts/score.py"), str(model), "--out", str(runs / "score"), *count])
    if args.install:
        install(model, runs / "score")


def train(config: Path, overrides: list[str], processes: int) -> None:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    run([*launch, str(ROOT / "scripts/train.py"), str(config), *overrides])


def run(command: list[str]) -> None:
    print("+", " ".join(command), file=sys.stderr, flush=True)
    # One thread per process: two threads of one process are slower than one on a small CPU.
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def install(model: Path, score: Path) -> None:
    """Copy the model with its score in `videogen.json` to checkpoints/tiny, and its samples beside it."""
    target, staging = ROOT / "checkpoints/tiny", ROOT / "checkpoints/.tiny.part"
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(model, staging)
    card = json.loads((staging / "videogen.json").read_text())
    rows = json.loads((score / "score.json").read_text())
    card["provenance"]["score"] = {
        name: {attribute: round(cell["rate"], 4) for attribute, cell in row["rates"].items()} | {"n": row["n"]}
        for name, row in rows["rows"].items()
    }
    card["provenance"]["vae_psnr"] = round(rows["vae"]["psnr"], 2)
    (staging / "videogen.json").write_text(json.dumps(card, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
    for name in ("score.md", "samples.png", "samples.txt"):
        shutil.copy(score / name, ROOT / "checkpoints" / name)


if __name__ == "__main__":
    main()
