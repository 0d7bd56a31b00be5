"""`videogen train` by Ray Train, one worker per GPU: for clusters where Ray runs already (pip install "ray[train]").

    python scripts/launch/ray_train.py configs/train/lora-tiny.yaml --workers 16 fit.steps=1000

Ray sets up the process group and starts all workers again when one is lost; the run goes on from its newest state, so
its folder must be on storage that all nodes share. Signals do not reach the workers: states are those of `save_every`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from videogen.config import load_training


def worker(job: dict) -> None:
    from videogen.training.run import main

    os.chdir(job["folder"])
    main(job["config"], job["overrides"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--cpu", action="store_true", help="workers without GPUs")
    parser.add_argument("--max-failures", type=int, default=3, help="times that all workers are started again")
    args = parser.parse_intermixed_args(argv)
    load_training(args.config, args.overrides)  # what is wrong with it is said here, once

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    config = str(Path(args.config).resolve())
    TorchTrainer(
        worker,
        train_loop_config={"config": config, "overrides": args.overrides, "folder": os.getcwd()},
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=not args.cpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=args.max_failures)),
    ).fit()


if __name__ == "__main__":
    main()
