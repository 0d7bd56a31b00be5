"""The short experiments that choose the bundled model's recipe: arms of equal CPU time, one seed, one thread.

    python scripts/experiments.py list
    python scripts/experiments.py run dit dit/uniform vae/no-detail --seconds 300
    python scripts/experiments.py table > runs/experiments/table.md

An arm is the recipe (configs/train/tiny_{vae,dit}.yaml) with some settings changed. As many steps are made as the time
allows (measured before, on the processor's clock, so other work on the machine does not count), and the rate falls to
zero at the end. Results are appended to runs/experiments/results.jsonl; docs/experiments.md says what they mean.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import torch

from videogen.config import load_training
from videogen.training.run import main as train

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path("runs/experiments")


def crops(image_share: float) -> str:
    """The VAE's first stage alone: 9-frame crops, and a share of single frames."""
    return f"stages=[{{steps: 100000, num_frames: 9, size: 32, batch_size: 2, image_share: {image_share}}}]"


SETTINGS = {
    "dit": ["clips=4096", "batch_size=16", "fit.warmup_steps=50"],
    "vae": [
        crops(0.5),
        "fit.warmup_steps=50",
    ],
}
ARMS: dict[str, list[str]] = {
    "dit": [],
    "dit/frames-first": ["curriculum=[{share: 0.33, latent_frames: 1}, {share: 0.25, latent_frames: 3}]"],
    "dit/frames-short": ["curriculum=[{share: 0.2, latent_frames: 1}]"],
    "dit/uniform": ["timesteps=uniform"],
    "dit/rotary-only": ["model.use_learned_positional_embeddings=false"],
    "dit/adamw": ["fit.optimizer=adamw"],
    "dit/muon-6e-3": ["fit.muon_learning_rate=6e-3"],
    "dit/batch-32": ["batch_size=32"],
    "dit/batch-8": ["batch_size=8"],
    "dit/text-only": ["conditions.shares={none: 1.0}"],
    "dit/no-dropout": ["caption_dropout=0.0"],
    "dit/masked": ["masking={share: 0.75, mixer_layers: 1, finish: 0.2}"],
    "dit/deep": ["model.num_layers=9", "model.num_attention_heads=2"],
    "vae": [],
    "vae/clips-only": [crops(0.0)],
    "vae/frames-only": [crops(1.0)],
    "vae/no-detail": ["detail_weight=0"],
    "vae/8-groups": ["model.norm_num_groups=8"],
    "vae/adamw": ["fit.optimizer=adamw"],
    "vae/kl-1e-3": ["kl_weight=1e-3"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the arms, each with what it changes")
    run = commands.add_parser("run", help="train arms, one after another")
    run.add_argument("arms", nargs="+", choices=ARMS)
    run.add_argument("--seconds", type=float, default=300, help="processor time of each (default: 300)")
    run.add_argument("--vae", default="checkpoints/tiny/vae", help="whose latents the DiT learns")
    commands.add_parser("table", help="the results as Markdown")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "list":
        print("\n".join(f"{name:<18} {' '.join(changes)}" for name, changes in ARMS.items()))
    elif args.command == "table":
        print(table([json.loads(line) for line in (RUNS / "results.jsonl").read_text().splitlines()]))
    else:
        for arm in args.arms:
            print(json.dumps(run_arm(arm, args.seconds, args.vae)), flush=True)


def run_arm(arm: str, seconds: float, vae: str) -> dict:
    """Train an arm for so much processor time, and append what became of it to the results."""
    task = arm.partition("/")[0]
    settings = [*SETTINGS[task], *ARMS[arm], *([f"vae={vae}"] if task == "dit" else [])]
    latents = RUNS / "latents"
    if task == "dit" and not latents.exists():
        processor_seconds(arm, settings, 2, latents)  # encodes the clips
    few = processor_seconds(arm, settings, 4, latents)
    per_step = (processor_seconds(arm, settings, 16, latents) - few) / 12
    steps = max(20, round(seconds / per_step))
    took = processor_seconds(arm, settings, steps, latents)
    log = [json.loads(line) for line in (folder_of(arm) / "log.jsonl").read_text().splitlines()]
    figures = {k: v for k, v in log[-1].items() if k.startswith(("held_out", "wrong", "gap"))}
    row = {"arm": arm, "changes": ARMS[arm], "steps": steps, "samples": log[-1]["samples"], "cpu_s": round(took)}
    row |= {"vae": vae} if task == "dit" else {}
    RUNS.mkdir(parents=True, exist_ok=True)
    with (RUNS / "results.jsonl").open("a") as file:
        print(json.dumps(row | figures), file=file)
    return row | figures


def processor_seconds(arm: str, settings: list[str], steps: int, latents: Path) -> float:
    """What a training of so many steps costs this process, from an empty folder, with the encoded clips at hand."""
    folder = folder_of(arm)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if latents.exists() and arm.startswith("dit"):
        shutil.copytree(latents, folder / "latents")
    config = ROOT / f"configs/train/tiny_{arm.partition('/')[0]}.yaml"
    overrides = [f"folder={folder}", f"fit.steps={steps}", f"fit.save_every={steps}", "fit.decay_fraction=0.4"]
    load_training(config, [*overrides, *settings])  # an arm that is misspelt says so before it trains
    started = time.process_time()
    train(config, [*overrides, *settings])
    took = time.process_time() - started
    if arm.startswith("dit") and not latents.exists():
        shutil.copytree(folder / "latents", latents)
    return took


def folder_of(arm: str) -> Path:
    return RUNS / arm.replace("/", "-")


def table(rows: list[dict]) -> str:
    """A line per result, with the columns its kind has."""
    texts = []
    for task in ("dit", "vae"):
        mine = [row for row in rows if row["arm"].partition("/")[0] == task]
        if not mine:
            continue
        names = [k for k in mine[-1] if k.startswith(("held_out", "wrong", "gap"))]
        texts.append("| arm | steps | samples | cpu_s | " + " | ".join(names) + " |")
        texts.append("|" + "---|" * (4 + len(names)))
        for row in mine:
            cells = [row["arm"], row["steps"], row["samples"], row["cpu_s"], *(row.get(n, "") for n in names)]
            texts.append("| " + " | ".join(map(str, cells)) + " |")
        texts.append("")
    return "\n".join(texts)


if __name__ == "__main__":
    sys.exit(main())
