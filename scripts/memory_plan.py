"""The planner's estimates beside what is counted and measured: `python scripts/memory_plan.py counted | measured`.

counted    peaks of the networks on the meta device, without weights and workspaces, over models and sizes
measured   whole clips of random models, in each stage the most bytes that torch's allocator holds, under every plan;
           --device cuda where there is a GPU, --model FOLDER for another model

--full tries more of either. Prints a table of GiB, or with --json rows. Both run without checks of shapes, which would
keep tensors alive.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from memory_peaks import FIVE, Away
from torch import nn

import videogen
from videogen.config import DiTConfig, VAEConfig
from videogen.models.causal import Memory
from videogen.models.dit import DiT
from videogen.models.text import TextEncoder, tiny_t5
from videogen.models.vae import VAE
from videogen.request import Request
from videogen.runtime import plan as planner
from videogen.runtime.counters import count
from videogen.runtime.dit import fast_dit
from videogen.runtime.memory import PLANS
from videogen.runtime.plan import Job, estimate, job_of
from videogen.runtime.vae import fast_vae
from videogen.testing import TINY_DIT, randomize, tiny_pipeline
from videogen.types import Conditioning

Row = dict[str, Any]
META = torch.device("meta")
TWO_BLOCKS = DiTConfig(**FIVE | {"num_layers": 2})
DITS = {
    "2b": DiTConfig(num_layers=2),
    "5b": TWO_BLOCKS,
    "1.5 from an image": replace(
        TWO_BLOCKS, patch_size_t=2, sample_height=96, sample_width=170, ofs_embed_dim=512, in_channels=32
    ),
}
MID_VAE = VAEConfig(
    block_out_channels=(32, 64, 64, 128),
    latent_channels=4,
    layers_per_block=2,
    norm_num_groups=8,
    sample_height=32,
    sample_width=48,
    scaling_factor=0.7,
)
VAES = {"the published VAE": VAEConfig(), "a smaller VAE": MID_VAE}
SMALL = [(17, 64, 96)]
LARGE = [(17, 128, 192), (9, 64, 96), (1, 512, 512), (49, 480, 720), (81, 768, 1360)]


# ---- counted --------------------------------------------------------------------------------------------------------


def counted(*, full: bool) -> Iterator[Row]:
    planner.UNFOLDED = 0  # what torch's convolutions take for themselves on a CPU does not show here
    for clip in [*SMALL, *LARGE] if full else SMALL:
        for name, config in DITS.items():
            for plan in ("fast", "balanced"):
                yield {"what": f"a step of {name}, {plan}", "clip": clip, **step(config, plan, clip)}
    for clip in [*SMALL, *LARGE] if full else SMALL:
        for name, config in VAES.items():
            for plan, rows in (("balanced", True), ("minimal", True), ("balanced", False)):
                for half in ("decode", "encode"):
                    what = f"{half}, {name}, {plan if rows else 'plain rows'}"
                    yield {"what": what, "clip": clip, **vae(config, plan, clip, half, rows=rows)}


def step(config: DiTConfig, plan: str, clip: tuple[int, int, int]) -> Row:
    """One evaluation of the transformer, its two blocks."""
    job = Job(dit=config, vae=VAEConfig(), num_frames=clip[0], height=clip[1], width=clip[2])
    f, h, w = job.grid
    rows, more = 1 if plan == "balanced" else 2, config.in_channels - config.out_channels
    with META:
        dit = fast_dit(DiT(config).bfloat16().eval())
        x = torch.zeros(rows, f, config.out_channels, h, w, dtype=torch.bfloat16)
        cond = Conditioning(
            text=torch.zeros(rows, config.max_text_seq_length, config.text_embed_dim, dtype=torch.bfloat16),
            channels=torch.zeros(rows, f, more, h, w, dtype=torch.bfloat16) if more else None,
            vectors={"ofs": torch.full((1,), 2.0, dtype=torch.bfloat16)} if config.ofs_embed_dim else {},
        )
    found = count(lambda: dit(x, torch.full((rows,), 500, device="cpu"), cond)).peak_bytes
    return {"found": found, "estimate": planner.step_activations(job, PLANS[plan])}


def vae(config: VAEConfig, plan: str, clip: tuple[int, int, int], half: str, *, rows: bool) -> Row:
    """As on a GPU, or with `rows=False` as on a CPU beside a small transformer. Later chunks are all alike."""
    clip = (min(clip[0], 17), *clip[1:])
    job = Job(
        dit=DITS["5b"] if rows else TINY_DIT,
        vae=config,
        num_frames=clip[0],
        height=clip[1],
        width=clip[2],
        device="cuda" if rows else "cpu",
    )
    with META:
        network = VAE(config).bfloat16().eval()
        latents = torch.zeros(1, *network.latent_shape(*clip), dtype=torch.bfloat16)
        pixels = torch.zeros(1, 3, *clip, dtype=torch.bfloat16)
    if rows:
        fast_vae(network)
        network.new_memory = Away if plan == "minimal" else Memory

    def run() -> None:
        if half == "encode":
            network.moments(pixels)
            return
        for chunk in network.decode_chunks(latents):
            del chunk

    frames = clip[0] if half == "encode" else latents.shape[2]
    need = planner.vae_need(job, PLANS[plan], frames, encode=half == "encode")
    return {"found": count(run).peak_bytes, "estimate": need.activations + need.kept}


# ---- measured -------------------------------------------------------------------------------------------------------


def random_model(folder: Path, *, heads: int) -> Path:
    """In float16; `heads` of 64: from 16 on the fast rows compute on a CPU too."""
    sizes = {"sample_height": 4, "sample_width": 6, "sample_frames": 9, "max_text_seq_length": 64}
    width = {"num_attention_heads": heads, "attention_head_dim": 64, "time_embed_dim": 32 * heads}
    pipeline = tiny_pipeline(dit=replace(TINY_DIT, num_layers=3, text_embed_dim=256, **sizes, **width), vae=MID_VAE)
    encoder = tiny_t5(len(pipeline.tokenizer), d_model=256, num_layers=4, d_ff=1024)
    pipeline.text_encoder = TextEncoder(encoder, pipeline.tokenizer, 64)
    for network in (randomize(pipeline.text_encoder), pipeline.dit, pipeline.vae):
        network.half()
    return pipeline.save(folder)


def measured(models: dict[str, Path], device: str) -> Iterator[Row]:
    for name, folder in models.items():
        for plan in PLANS:
            yield from clip_of(name, folder, plan, device)


def clip_of(name: str, folder: Path, plan: str, device: str) -> Iterator[Row]:
    """Load the model, make a clip in one step, and give the peak of each stage."""
    keywords: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 3.0}
    dtype = "float32" if device == "cpu" else "auto"
    with (traced if device == "cpu" else watched)() as (watch, peaks):
        pipe = videogen.load(folder, device=device, dtype=dtype, memory=plan)
        watch(pipe)
        pipe.generate("a red circle", output="tensor", **keywords)
    request = Request("a red circle", **keywords).checked(pipe.card)
    job = job_of(pipe.card, request, dtype=str(pipe.dtype).removeprefix("torch."), device=device)
    files = next(pipe.vae.parameters()).dtype if pipe.plan.stages_in_turn else torch.float16
    found = estimate(replace(job, files=str(files).removeprefix("torch.")), PLANS[plan])
    mapped = sum(path.stat().st_size for path in pipe.card.folder.rglob("*.safetensors"))
    beside = mapped if device == "cpu" and pipe.plan.stages_in_turn else 0  # counted by the allocator, but the file's
    for stage, peak in peaks.items():
        yield {
            "what": f"{name}, {plan}, {stage}",
            "clip": request.size,
            "found": peak - beside,
            "estimate": found.stages[stage].total,
        }


def stages_of(pipe: Any) -> dict[nn.Module, str]:
    return {pipe.text_encoder: "text", pipe.dit: "denoise", pipe.vae: "decode"}


@contextmanager
def traced() -> Iterator[tuple[Any, dict[str, int]]]:
    """On a CPU: the events of torch's allocator, from loading on. `peaks` is filled in the end."""
    from torch.profiler import ProfilerActivity, profile

    marks: list[tuple[str, int, int]] = []
    peaks: dict[str, int] = {}

    def watch(pipe: Any) -> None:
        stages, at_work = stages_of(pipe), pipe.stages.at_work

        @contextmanager
        def timed(network: nn.Module) -> Iterator[None]:
            start = time.time_ns()
            with at_work(network):
                yield
            marks.append((stages[network], start, time.time_ns()))

        pipe.stages.at_work = timed

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield watch, peaks
    results: Any = profiled.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    alive = 0
    for now, change in sorted((e.start_ns(), e.nbytes()) for e in events):
        alive += change
        for name, start, stop in marks:
            if start <= now <= stop:
                peaks[name] = max(peaks.get(name, 0), alive)


@contextmanager
def watched() -> Iterator[tuple[Any, dict[str, int]]]:
    """On a GPU: the allocator's own peak in each stage."""
    peaks: dict[str, int] = {}

    def watch(pipe: Any) -> None:
        stages, at_work = stages_of(pipe), pipe.stages.at_work

        @contextmanager
        def measure(network: nn.Module) -> Iterator[None]:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            with at_work(network):
                yield
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated()
            peaks[stages[network]] = max(peaks.get(stages[network], 0), peak)

        pipe.stages.at_work = measure

    gc.collect()
    torch.cuda.empty_cache()
    yield watch, peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("counted", "measured"))
    parser.add_argument("--full", action="store_true", help="more sizes, a wider model and the bundled one")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", type=Path, help="measure this model")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.what == "counted":
            rows = counted(full=args.full)
        else:
            heads = {"narrow": 4} | ({"wide": 16} if args.full else {})
            models = {name: random_model(Path(scratch) / name, heads=n) for name, n in heads.items()}
            rows = measured({"the model": args.model} if args.model else models, args.device)
        if args.json:
            print(json.dumps(list(rows)))
            return
        print("| what | frames, height, width | found, GiB | estimate, GiB | error |\n|---|---|---|---|---|")
        for row in rows:
            error = row["estimate"] / row["found"] - 1
            sizes = f"{row['found'] / 2**30:.4f} | {row['estimate'] / 2**30:.4f}"
            print(f"| {row['what']} | {' x '.join(map(str, row['clip']))} | {sizes} | {error:+.1%} |", flush=True)


if __name__ == "__main__":
    main()
