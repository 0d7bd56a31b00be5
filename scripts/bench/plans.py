"""Memory plans: whole clips from a model folder, each plan in a process of its own, with nothing else resident."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bench.cases import PROMPT, our_pipeline
from bench.measure import first_line
from bench.models import Shape, Weights

PLANS = ("fast", "balanced", "low", "minimal")


def compare_plans(shape: Shape, device: torch.device) -> Iterator[dict[str, Any]]:
    """Seconds and peak memory over `generate()`, weights included: of the GPU, or the resident set of the process.

    Yields all rows there are, each time one is added: the processes take their time.
    """
    names = ["diffusers", *(f"ours, {plan}" for plan in PLANS)]
    if device.type == "cuda":
        names += ["diffusers, model offload", "diffusers, group offload"]
    rows: dict[str, dict[str, Any]] = {}
    frames: dict[str, np.ndarray] = {}
    what = "{} frames of {} x {}, {} steps, from a folder".format(*shape.clip, shape.steps)
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        our_pipeline(shape, Weights(shape, shape.dtype, device), fast=False).save(folder)
        for name in names:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own:
                try:
                    threads = torch.get_num_threads()
                    row, frames[name] = own.submit(run_plan, name, folder, shape, str(device), threads).result()
                    base = rows.get("diffusers", row)
                    row |= {"faster": base["seconds"] / row["seconds"]}
                    row |= {"total_ratio": row["total_gib"] / base["total_gib"]}
                    if name.startswith("ours"):
                        row["same_frames"] = bool(np.array_equal(frames[name], frames["ours, fast"]))
                except Exception as problem:
                    row = {"note": first_line(problem)}
            rows[name] = row
            yield {"what": what, "rows": rows, "rounds": 1}


@torch.no_grad()
def run_plan(name: str, folder: Path, shape: Shape, device: str, threads: int) -> tuple[dict[str, float], np.ndarray]:
    """Load, make a short clip to warm up, then the clip that is timed."""
    import diffusers.pipelines.cogvideo.pipeline_cogvideox  # noqa: F401

    import videogen.pipeline  # noqa: F401

    torch.set_num_threads(threads)
    before = resident()  # both libraries included
    make = (our_clip if name.startswith("ours") else their_clip)(name, folder, device, shape.dtype)
    make(shape, 2)
    started, cpu = time.perf_counter(), time.process_time()
    frames = make(shape, shape.steps)
    row = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    if device.startswith("cuda"):
        row |= {"total_gib": torch.cuda.max_memory_allocated() / 2**30}
        row |= {"reserved_gib": torch.cuda.max_memory_reserved() / 2**30}
    else:
        row["total_gib"] = (resident(peak=True) - before) / 2**30
    return row, frames


def resident(*, peak: bool = False) -> int:
    """Bytes of this process in memory, now or at most (mapped files included, as far as they are)."""
    wanted = "VmHWM:" if peak else "VmRSS:"
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(wanted))


def our_clip(name: str, folder: Path, device: str, dtype: torch.dtype):
    import videogen

    pipe = videogen.load(folder, device=device, dtype=dtype, memory=name.removeprefix("ours, "))

    def make(shape: Shape, steps: int) -> np.ndarray:
        return np.array(pipe.generate(PROMPT, seed=0, num_inference_steps=steps).frames)

    return make


def their_clip(name: str, folder: Path, device: str, dtype: torch.dtype):
    from diffusers import CogVideoXPipeline

    pipe: Any = CogVideoXPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if name == "diffusers, model offload":
        pipe.enable_model_cpu_offload()
    elif name == "diffusers, group offload":
        how: dict[str, Any] = {"onload_device": torch.device(device), "offload_type": "leaf_level", "use_stream": True}
        pipe.transformer.enable_group_offload(**how)
        pipe.text_encoder.to(device)
        pipe.vae.to(device)
    else:
        pipe.to(device)

    def make(shape: Shape, steps: int) -> np.ndarray:
        frames, height, width = shape.clip
        size = {"num_frames": frames, "height": height, "width": width}
        generator = torch.Generator().manual_seed(0)
        made = pipe(prompt=PROMPT, num_inference_steps=steps, generator=generator, **size).frames[0]
        return np.stack([np.asarray(picture) for picture in made])

    return make
