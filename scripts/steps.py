"""What each step, guidance scale and share of last-frame steps buys, for a teacher and its few-step student.

    python scripts/steps.py checkpoints/tiny checkpoints/tiny-4step --n 128 --out runs/steps
    python scripts/steps.py checkpoints/tiny --n 2 --batch 2 --steps 4 2      # to look at it

Held-out prompts of the world, clip i from seed i, the same in every row. Seconds are of the processor, per clip, with
one thread, decoding included. A run that was stopped goes on where it was. Writes steps.json, steps.md and steps.png.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videogen.data.world import Scene, render
from videogen.evaluation import held_out_prompts, score_prompts, score_table
from videogen.pipeline import Pipeline, load

ATTRIBUTES = ("found", "colour", "size", "motion", "shape", "all")


@dataclass(frozen=True)
class Row:
    """One line of the table: a model and keywords of `generate`; `frames`: told the first and the last frame, too."""

    who: str  # "teacher" or "student"
    keywords: dict[str, Any] = field(default_factory=dict)
    frames: bool = False

    @property
    def label(self) -> str:
        said = [f"{name}={value}" for name, value in self.keywords.items()]
        return ", ".join([self.who, *said, *(["first and last frame"] if self.frames else [])])


def rows(steps: list[int], student: bool) -> list[Row]:
    """Steps of both, the teacher's guidance scales at its most steps, and how long a last frame is told."""
    most = {"num_inference_steps": max(steps)}
    lines = [Row("teacher", {"num_inference_steps": n}) for n in steps]
    lines += [Row("teacher", most | {"guidance_scale": scale}) for scale in (1.0, 3.0, 9.0)]
    lines += [Row("teacher", most | {"last_frame_until": until}, True) for until in (0.0, 0.25, 0.5, 1.0)]
    return lines + [Row("student", {"num_inference_steps": n}) for n in (8, 4, 2, 1) if student]


def measure(pipeline: Pipeline, row: Row, n: int, batch: int) -> list[dict]:
    """A score for each clip, with its seconds and, with frames told, the PSNR of the last one."""
    card, seconds = pipeline.card, []

    def generate(words: list[str], scenes: list[Scene], seeds: list[int]) -> list[np.ndarray]:
        told: dict[str, Any] = {}
        if row.frames:
            truth = [render(scene, card.num_frames, card.height, card.width) for scene in scenes]
            told = {"first_frame": [clip[0] for clip in truth], "last_frame": [clip[-1] for clip in truth]}
        began = time.process_time()
        clips = [video.frames for video in pipeline.generate(words, seed=seeds, **told, **row.keywords)]
        seconds.extend([(time.process_time() - began) / len(words)] * len(words))
        return clips

    given = (0, -1) if row.frames else ()
    parts = score_prompts(generate, held_out_prompts(n), batch=batch, given=given)
    scored = [result for part in parts for result in part]
    return [result | {"seconds": s} for result, s in zip(scored, seconds, strict=True)]


def table(results: dict[str, list[dict]]) -> str:
    lines = [
        f"| | n | {' | '.join(ATTRIBUTES)} | last frame, dB | CPU s per clip |",
        "|---" * (len(ATTRIBUTES) + 4) + "|",
    ]
    for label, scored in results.items():
        rates = score_table(scored)["rates"]
        cells = [f"{rates[name]['rate']:.3f}" for name in ATTRIBUTES]
        last = [result["last_psnr"] for result in scored if "last_psnr" in result]
        cells += [f"{np.mean(last):.1f}" if last else "", f"{np.mean([r['seconds'] for r in scored]):.3f}"]
        lines.append(f"| {label} | {len(scored)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, list[dict]], lines: list[Row], path: Path) -> None:
    """Score against seconds on a logarithmic axis: one curve per model, a point per number of steps, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for who in ("teacher", "student"):
        points = [
            r for r in lines if r.who == who and list(r.keywords) == ["num_inference_steps"] and r.label in results
        ]
        if not points:
            continue
        seconds = [np.mean([clip["seconds"] for clip in results[r.label]]) for r in points]
        rates = [score_table(results[r.label])["rates"]["all"] for r in points]
        spread = [[c["rate"] - c["low"] for c in rates], [c["high"] - c["rate"] for c in rates]]
        axes.errorbar(seconds, [c["rate"] for c in rates], yerr=spread, marker="o", capsize=3, label=who)
        for r, x, c in zip(points, seconds, rates, strict=True):
            at = (x, c["rate"])
            axes.annotate(f"{r.keywords['num_inference_steps']}", at, textcoords="offset points", xytext=(6, -12))
    axes.set(xscale="log", ylim=(0, 1), xlabel="CPU seconds per clip (numbers: steps)", ylabel="all attributes right")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(teacher: str, student: str | None, *, n: int, batch: int, steps: list[int], out: Path) -> str:
    """The table, after every row that an earlier run left open."""
    out.mkdir(parents=True, exist_ok=True)
    path, lines = out / "steps.json", rows(steps, student is not None)
    models = {"teacher": load(teacher)} | ({"student": load(student)} if student else {})
    about = {"n": n, "batch": batch} | {who: pipe.card_hash().get("transformer_sha256") for who, pipe in models.items()}
    found = json.loads(path.read_text()) if path.exists() else {"about": about, "results": {}}
    if found["about"] != about:
        raise SystemExit(f"{path} is of another run: {found['about']}; give another --out")
    for row in lines:
        if row.label not in found["results"]:
            found["results"][row.label] = measure(models[row.who], row, n, batch)
            found["rows"] = [asdict(line) for line in lines]
            path.write_text(json.dumps(found))
            print(row.label, flush=True)
    text = table(found["results"])
    (out / "steps.md").write_text(text)
    plot(found["results"], lines, out / "steps.png")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("student", nargs="?")
    parser.add_argument("--n", type=int, default=128, help="clips per row")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 20, 8, 4], help="the teacher's")
    parser.add_argument("--out", type=Path, default=Path("runs/steps"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(run(args.teacher, args.student, n=args.n, batch=args.batch, steps=args.steps, out=args.out))


if __name__ == "__main__":
    main()
