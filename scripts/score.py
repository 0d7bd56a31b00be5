"""Score a model on the procedural world: held-out prompts alone, with a first frame, with a first and a last frame.

    python scripts/score.py checkpoints/tiny --n 256 --out runs/score

Prints a Markdown table (rates with 95 % Wilson intervals) and writes score.json, score.md and samples.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videogen.data.world import Scene, render
from videogen.demo import contact_sheet
from videogen.evaluation import ceiling, evaluate, floor, held_out_prompts, markdown, reconstruction
from videogen.pipeline import Pipeline, load

MODES = {"text": (), "first frame": (0,), "first and last frame": (0, -1)}


def score(
    pipeline: Pipeline, workers: ProcessPoolExecutor, *, n: int, n_frames: int, batch: int, **keywords: Any
) -> dict[str, dict]:
    """One table per mode, with the ceiling (the truth through the VAE) and the floor (clips of other scenes)."""
    reconstruct = through_vae(pipeline)
    rows = {}
    for mode, given in MODES.items():
        generate = generator(pipeline, workers, given, batch, keywords)
        rows[mode] = evaluate(
            generate, n=n_frames if given else n, batch=8 * batch, given=given, reconstruct=reconstruct
        )
        print(f"{mode}: done", flush=True)
    rows["ceiling: the truth through the VAE"] = evaluate(ceiling(reconstruct), n=n_frames, batch=batch)
    rows["floor: clips of other scenes"] = evaluate(floor(), n=n, batch=batch)
    return rows


def generator(pipeline: Pipeline, workers: ProcessPoolExecutor, given: Sequence[int], batch: int, keywords: dict):
    """The model as the evaluation wants it: prompts and scenes in, clips out; the scenes give the known frames."""

    def generate(prompts: list[str], scenes: list[Scene]) -> list[np.ndarray]:
        card = pipeline.card
        truth = [render(scene, card.num_frames, card.height, card.width) for scene in scenes]
        jobs = []
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            job: dict[str, Any] = {"prompt": prompts[part], "seed": [hash_of(text) for text in prompts[part]]}
            for name, index in (("first_frame", 0), ("last_frame", -1)):
                if index in given:
                    job[name] = [clip[index] for clip in truth[part]]
            jobs.append(job | keywords)
        return [frames for clips in workers.map(make, jobs) for frames in clips]

    return generate


def open_model(model: str) -> None:
    """Each worker has a pipeline of its own, and one thread: two of one process are slower than one on a small CPU."""
    global worker
    torch.set_num_threads(1)
    worker = load(model)


def make(keywords: dict[str, Any]) -> list[np.ndarray]:
    return [video.frames for video in worker.generate(**keywords)]


def hash_of(text: str) -> int:
    """A seed for a prompt that does not change between runs."""
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])


def through_vae(pipeline: Pipeline):
    @torch.no_grad()
    def reconstruct(clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        out = []
        for clip in clips:
            pixels = torch.from_numpy(np.asarray(clip, dtype=np.float32)).permute(3, 0, 1, 2)[None] * 2 - 1
            decoded = pipeline.vae.decode(pipeline.vae.encode(pixels.to(pipeline.device, pipeline.dtype)))
            out.append((decoded[0] / 2 + 0.5).clamp(0, 1).float().cpu().permute(1, 2, 3, 0).numpy())
        return out

    return reconstruct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--n", type=int, default=256, help="clips from text alone")
    parser.add_argument("--n-frames", type=int, default=64, help="clips of each mode with frames, and for the ceiling")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/score"))
    args = parser.parse_args()

    torch.set_num_threads(1)
    pipeline = load(args.model)
    pool = {"mp_context": get_context("spawn"), "initializer": open_model, "initargs": (args.model,)}
    with ProcessPoolExecutor(args.processes, **pool) as workers:
        keywords = {"num_inference_steps": args.steps}
        rows = score(pipeline, workers, n=args.n, n_frames=args.n_frames, batch=args.batch, **keywords)
    vae = reconstruction(through_vae(pipeline), n=40)
    table = markdown(rows) + f"\n\nVAE over 40 held-out clips: {vae['psnr']:.1f} dB, SSIM {vae['ssim']:.3f}\n"
    print(table)

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "score.md").write_text(table)
    (args.out / "score.json").write_text(json.dumps({"rows": rows, "vae": vae}, indent=1))
    prompts = [text for _, text in held_out_prompts(8)]
    contact_sheet(pipeline.generate(prompts, seed=list(range(8))), args.out / "samples.png")  # uncurated: seeds 0 to 7
    (args.out / "samples.txt").write_text("\n".join(prompts) + "\n")


if __name__ == "__main__":
    main()
