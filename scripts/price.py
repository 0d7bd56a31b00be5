"""What each lossy switch costs on a model of the procedural world, against the lossless clips of the same seeds.

    python scripts/price.py calibrate checkpoints/tiny                 # writes step_cache.json beside the weights
    python scripts/price.py measure checkpoints/tiny --n 64 --out runs/price

`measure` goes through the prompts batch by batch and through all switches in each, so that what is there compares the
same clips at any time; it can be stopped, and goes on where it was. Prints a Markdown table and writes price.json and
price.md. Seconds are of the process's CPU time. On a CPU 8-bit products are computed in float32 from the same 8-bit
numbers: the loss is real, the time says nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videogen.data.world import Scene
from videogen.evaluation import held_out_prompts, psnr, score_prompts, score_table, ssim
from videogen.pipeline import Pipeline, load
from videogen.runtime.attention8 import restore_attention, set_attention8
from videogen.runtime.quantize import quantize, restore
from videogen.runtime.step_cache import curve_of, recorded, save_curve

LOSSLESS = "lossless"


@dataclass(frozen=True)
class Switch:
    """Keywords of `generate`, and what is put into the model."""

    keywords: dict[str, Any] = field(default_factory=dict)
    quantize: str | None = None
    attention: bool = False


SWITCHES = {
    LOSSLESS: Switch(),
    "25 of 50 steps, for comparison": Switch({"num_inference_steps": 25}),
    "guidance_until=0.7": Switch({"guidance_until": 0.7}),
    "guidance_until=0.5": Switch({"guidance_until": 0.5}),
    "step_cache=0.06": Switch({"step_cache": 0.06}),
    "step_cache=0.12": Switch({"step_cache": 0.12}),
    'quantize="fp8"': Switch(quantize="fp8"),
    'quantize="int8"': Switch(quantize="int8"),
    'kernel="int8"': Switch(attention=True),
    'step_cache=0.12, guidance_until=0.7, quantize="int8", kernel="int8"': Switch(
        {"step_cache": 0.12, "guidance_until": 0.7}, "int8", True
    ),
}


@contextmanager
def switched_on(pipeline: Pipeline, switch: Switch) -> Iterator[None]:
    if switch.quantize:
        quantize(pipeline.dit, switch.quantize)
    if switch.attention:
        set_attention8(pipeline.dit)
    try:
        yield
    finally:
        restore_attention(restore(pipeline.dit))


def calibrate(model: str) -> Path:
    """The curve of a model from four clips, of other prompts than those that are scored."""
    pipeline = load(model)
    prompts = [text for _, text in held_out_prompts(4, seed=1, split="none")]
    with recorded(pipeline.dit) as seen:
        pipeline.generate(prompts, seed=list(range(4)), output="latent")
    sha256 = pipeline.card_hash().get("transformer_sha256")
    return save_curve(pipeline.card.folder, curve_of(seen), transformer_sha256=sha256)


def measure(
    pipeline: Pipeline, switch: Switch, prompts: list[tuple[Scene, str]], first: int
) -> tuple[list, list[dict]]:
    """The clips of prompts[first:], and a row for each with its score, CPU seconds and evaluated rows of the DiT."""
    clips, evaluated, began = [], 0, time.process_time()

    def count(block: Any, args: tuple) -> None:
        nonlocal evaluated
        evaluated += len(args[0])

    def generate(words: list[str], scenes: list[Scene], seeds: list[int]) -> list[np.ndarray]:
        nonlocal began
        began = time.process_time()
        videos = pipeline.generate(words, seed=seeds, **switch.keywords)
        began = time.process_time() - began
        clips.extend(video.frames for video in videos)
        return clips

    hook = pipeline.dit.blocks[0].register_forward_pre_hook(count)
    with switched_on(pipeline, switch):
        (rows,) = score_prompts(generate, prompts, first=first, batch=len(prompts) - first)
    hook.remove()
    return clips, [row | {"seconds": began / len(rows), "evaluated": evaluated / len(rows)} for row in rows]


def table(results: dict[str, list[dict]]) -> str:
    """A line per switch over the clips that all of them have."""
    n = min(len(rows) for rows in results.values())
    if not n:
        return "no clip of every switch yet\n"
    lines = [
        f"{n} clips each.",
        "",
        "| | score `all` | right only without / only with it | PSNR, dB (worst clip) | SSIM | evaluations left out "
        "| CPU s per clip |",
        "|---" * 7 + "|",
    ]
    base = results[LOSSLESS][:n]
    for name, rows in results.items():
        rows = rows[:n]
        rate = score_table(rows)["rates"]["all"]
        lost, won = (
            sum(a["all"] > b["all"] for a, b in zip(x, y, strict=True)) for x, y in ((base, rows), (rows, base))
        )
        left_out = 1 - sum(r["evaluated"] for r in rows) / sum(r["evaluated"] for r in base)
        noise = [r["psnr"] for r in rows]
        cells = [name, f"{rate['rate']:.3f} [{rate['low']:.2f}, {rate['high']:.2f}]", f"{lost} / {won}"]
        if name == LOSSLESS:
            cells[2:] = ["", "", ""]
        else:
            cells += [f"{np.mean(noise):.1f} ({min(noise):.1f})", f"{np.mean([r['ssim'] for r in rows]):.4f}"]
        cells += [f"{left_out:.0%}", f"{np.mean([r['seconds'] for r in rows]):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run(model: str, n: int, batch: int, out: Path, minutes: float = float("inf")) -> str:
    """The table after n clips of each switch, or of as many as begin within the minutes."""
    until = time.monotonic() + 60 * minutes
    pipeline = load(model)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "price.json"
    found = json.loads(path.read_text()) if path.exists() else {"results": {name: [] for name in SWITCHES}}
    about = {"transformer_sha256": pipeline.card_hash().get("transformer_sha256"), "batch": batch, "model": model}
    if found.setdefault("about", about) != about:
        raise SystemExit(f"{path} is of another run: {found['about']}; give another --out")
    results: dict[str, list[dict]] = found["results"]
    prompts = held_out_prompts(n)
    for start in range(0, n, batch):
        kept = out / f"lossless-{start}.npz"
        for name, switch in SWITCHES.items():
            if len(results.setdefault(name, [])) > start or time.monotonic() > until:
                continue
            clips, rows = measure(pipeline, switch, prompts[: start + batch], start)
            if name == LOSSLESS:
                np.savez_compressed(kept, clips=np.stack(clips))
            truth = np.load(kept)["clips"]
            for row, clip, other in zip(rows, clips, truth, strict=True):
                row |= {"psnr": psnr(clip, other), "ssim": ssim(clip, other)}
            results[name] += rows
            path.write_text(json.dumps(found))
            print(f"{start + len(rows)} clips: {name}", flush=True)
        (out / "price.md").write_text(table(results))
    return table(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("calibrate", "measure"))
    parser.add_argument("model")
    parser.add_argument("--n", type=int, default=64, help="clips per switch")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so many")
    parser.add_argument("--out", type=Path, default=Path("runs/price"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        calibrate(args.model)
        if args.what == "calibrate"
        else run(args.model, args.n, args.batch, args.out, args.minutes)
    )


if __name__ == "__main__":
    main()
