"""Score a model on the procedural world: held-out prompts alone, with a first frame, with a first and a last frame.

    python scripts/score.py checkpoints/tiny --n 256 --out runs/score

One `videogen eval` per mode, in a folder of its own, so a run that was stopped goes on where it was; then one table of
all, with the VAE's PSNR. Writes score.json, score.md, samples.png and samples.txt.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from videogen.cli.evaluate import CEILING, FLOOR, Evaluation, run, through_vae, write
from videogen.evaluation import markdown, reconstruction
from videogen.pipeline import load

MODES = ("text", "first_frame", "first_and_last_frame")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--n", type=int, default=256, help="clips from text alone")
    parser.add_argument("--n-frames", type=int, default=64, help="clips of each mode with frames, and for the ceiling")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/score"))
    args = parser.parse_args()

    rows: dict[str, dict] = {}
    ends: dict[str, dict] = {}
    for mode in MODES:
        n = args.n if mode == "text" else args.n_frames
        what = Evaluation(model=args.model, mode=mode, n=n, steps=args.steps, ceiling=args.n_frames)
        table = run(what, args.out / mode, batch=args.batch, processes=args.processes)
        rows[what.label] = table[what.label]
        if mode == "text":
            ends = {name: table[name] for name in (CEILING, FLOOR)}
        print(f"{mode}: done", flush=True)
    rows |= ends

    vae = reconstruction(through_vae(load(args.model)), n=40)
    table = markdown(rows) + f"\n\nVAE over 40 held-out clips: {vae['psnr']:.1f} dB, SSIM {vae['ssim']:.3f}\n"
    print(table)
    write(args.out / "score.md", table)
    write(args.out / "score.json", json.dumps({"rows": rows, "vae": vae}, indent=1))
    for name in ("samples.png", "samples.txt"):
        shutil.copy(args.out / "text" / name, args.out / name)


if __name__ == "__main__":
    main()
