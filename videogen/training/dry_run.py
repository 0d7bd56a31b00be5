"""`videogen train CONFIG --dry-run`: what a training would take, before anything is loaded or encoded.

Sizes come from the settings and, for a fine-tune, from the base's small files; FLOPs from the network itself on the
meta device, where nothing is computed. Times are those FLOPs over a GPU's peak and a stated utilisation: estimates, not
measurements.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from videogen.config import (
    ClipTraining,
    DistillTraining,
    DiTConfig,
    DiTTraining,
    FinetuneTraining,
    FitConfig,
    LoraConfig,
    Training,
    VAEConfig,
    VAETraining,
)
from videogen.data.buckets import epoch_batches, token_count, token_spread
from videogen.distributed.training_memory import step_memory
from videogen.errors import VideogenError
from videogen.models.dit import DiT
from videogen.models.lora import ALL, add_lora, train_only_lora
from videogen.models.vae import VAE
from videogen.types import Conditioning

GIB = 2**30
Shape = tuple[int, int, int]


class Gpu(NamedTuple):
    """Dense bfloat16 TFLOP/s without sparsity, and GB of memory, as the maker's data sheets have them."""

    name: str
    tflops: float
    memory: float


GPUS = (
    Gpu("RTX 4090", 165, 24),
    Gpu("L40S", 362, 48),
    Gpu("A100 80GB", 312, 80),
    Gpu("H100 SXM", 989, 80),
    Gpu("H200", 989, 141),
    Gpu("B200", 2250, 180),
)

# Of bases that need not be here: their transformers differ from `DiTConfig()`, which is CogVideoX-2B, in this.
FIVE = {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True}
BASES = {
    "zai-org/CogVideoX-2b": {},
    "zai-org/CogVideoX-5b": FIVE,
    "zai-org/CogVideoX-5b-I2V": FIVE | {"in_channels": 32, "use_learned_positional_embeddings": True},
    "zai-org/CogVideoX1.5-5B": FIVE
    | {"patch_size_t": 2, "sample_height": 96, "sample_width": 170, "sample_frames": 81, "patch_bias": False},
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is computed in a training of a DiT.

    shapes       of the samples in latents; where they are not there yet (`samples` is 0), of one like them
    evaluations  calls of a network of this size in a step, as (forward alone, forward and backward) per sample
    """

    dit: DiTConfig
    shapes: Sequence[Shape]
    samples: int
    batch_size: int
    token_budget: int
    micro_batch_size: int
    fit: FitConfig
    lora: LoraConfig | None = None
    evaluations: tuple[float, float] = (0.0, 1.0)
    notes: list[str] = field(default_factory=list)


def estimate(config: Training, *, processes: int = 1, utilisation: float = 0.3) -> dict[str, Any]:
    """All that the report shows, JSON-ready.

    processes    GPUs, each with a process of its own
    utilisation  model FLOPs that are done, over the peak's: recomputed activations do not count as done
    """
    facts: dict[str, Any] = {"task": config.task, "folder": config.folder, "processes": processes}
    if isinstance(config, VAETraining):
        facts |= vae_facts(config, processes)
    else:
        work = work_of(config)
        facts |= dit_facts(work, processes)
        if isinstance(config, DistillTraining):
            facts["notes"].append("memory of the three roles: python scripts/distill_memory.py CONFIG")
        else:
            facts["memory"] = memory_facts(work, facts["tokens"]["micro_batch_size"], processes)
    flops = facts["compute"]["flops_per_step"]
    need = facts.get("memory", {}).get("total")
    facts["gpus"] = {
        gpu.name: {
            "seconds_per_step": flops / (processes * gpu.tflops * 1e12 * utilisation),
            "hours": facts["steps"] * flops / (processes * gpu.tflops * 1e12 * utilisation) / 3600,
            "fits": None if need is None else need * GIB <= gpu.memory * 1e9 * 0.95,
        }
        for gpu in GPUS
    }
    return facts | {"utilisation": utilisation}


# ---- a DiT ----------------------------------------------------------------------------------------------------------


def work_of(config: DiTTraining | FinetuneTraining | DistillTraining) -> Work:
    """The networks and samples of a training, without opening weights or reading clips."""
    common: dict[str, Any] = {"fit": config.fit, "notes": []}
    common |= {name: getattr(config, name) for name in ("batch_size", "token_budget", "micro_batch_size")}
    if isinstance(config, DiTTraining):
        scale, temporal = _vae_factors(config.vae)
        shape = _latent_shape(config, config.model, scale, temporal)
        return Work(dit=config.model, shapes=[shape] * config.clips, samples=config.clips, **common)
    base = config.model if isinstance(config, FinetuneTraining) else config.teacher
    dit, scale, temporal, size, note = base_of(base)
    sized = config if config.height else dataclasses.replace(config, **size)
    shape = _latent_shape(sized, dit, scale, temporal)
    common |= {"dit": dit, "notes": [note] * bool(note)}
    if isinstance(config, DistillTraining):
        samples = config.clips
        if config.prompts:
            path = Path(config.prompts)
            samples = sum(1 for line in path.open(encoding="utf-8") if line.strip()) if path.is_file() else 0
            common["notes"] += [] if samples else [f"{path} is not here: its prompts are not counted"]
        # Both roles' steps begin with the student's roll-out, half its steps long on average. The critic's: the student
        # once more, and itself. The student's: the critic, the teacher with guidance, and itself.
        alone = (config.num_inference_steps - 1) / 2 + 1 + 2 / (config.critic_steps + 1)
        return Work(shapes=[shape] * max(1, samples), samples=samples, evaluations=(alone, 1.0), **common)
    shapes, notes = [shape] * config.clips, list(common.pop("notes"))
    if config.data:
        shapes, missing = cached_shapes(config, dit)
        notes += [missing] * bool(missing)
    return Work(shapes=shapes or [shape], samples=len(shapes), lora=config.lora, notes=notes, **common)


def base_of(name: str) -> tuple[DiTConfig, int, int, dict[str, int], str]:
    """(transformer, factor of the VAE in space, in time, native size, a note) of a model that may not be here."""
    from videogen.weights.hub import find_model
    from videogen.weights.models import published
    from videogen.weights.single import open_card

    try:
        card = open_card(find_model(name, offline=True, weights=False))
    except VideogenError:
        if name not in BASES:
            raise
        dit = DiTConfig(**BASES[name])
        row = published(dit, name)
        assert row is not None
        size = {"height": row.height, "width": row.width, "num_frames": row.num_frames}
        return dit, 8, 4, size, f"{name} is not here: sizes are those of its published files"
    size = {"height": card.height, "width": card.width, "num_frames": card.num_frames}
    return card.dit, card.vae.spatial_compression, int(card.vae.temporal_compression_ratio), size, ""


def cached_shapes(config: FinetuneTraining, dit: DiTConfig) -> tuple[list[Shape], str]:
    """Of the windows of a cache that are trained on; none, and why, where there is no cache yet."""
    from videogen.training.cached import cached_examples

    if not Path(config.data).is_dir():
        return [], f"{config.data} is not there: videogen data cache makes it; counted for clips of the native size"
    examples = cached_examples(config.data, held_out=config.held_out)
    step = dit.patch_size_t or 1
    shapes = [examples.shape(index) for index in range(len(examples))]
    return [(f + -f % step, h, w) for f, h, w in shapes], ""


def dit_facts(work: Work, processes: int) -> dict[str, Any]:
    size = token_count(work.dit, work.shapes[0])
    # Of samples that are not there, one batch of equal ones.
    shapes = work.shapes if work.samples else list(work.shapes[:1]) * (work.token_budget // size or work.batch_size)
    kinds = Counter(shapes)
    counts = {shape: token_count(work.dit, shape) for shape in kinds}
    tokens = [counts[shape] for shape in shapes]
    by = {"token_budget": work.token_budget} if work.token_budget else {"batch_size": work.batch_size}
    batches = epoch_batches(shapes, tokens=tokens, seed=work.fit.seed, epoch=0, **by)
    per_step, ranks = len(shapes) / len(batches), processes // work.fit.parallel.sequence

    costs = {shape: flops_per_sample(work.dit, shape, lora=work.lora) for shape in kinds}
    alone, both = work.evaluations
    total = sum(number * (alone * costs[shape][0] + both * costs[shape][1]) for shape, number in kinds.items())
    return {
        "steps": work.fit.steps,
        "notes": work.notes,
        "parameters": parameters(work),
        "data": {
            "samples": work.samples,
            "buckets": {"x".join(map(str, shape)): number for shape, number in kinds.items()},
            "steps_per_epoch": len(batches) if work.samples else None,
            "epochs": round(work.fit.steps / len(batches), 2) if work.samples else None,
            "dropped": len(shapes) - sum(map(len, batches)),
        },
        "tokens": {
            "per_sample": round(sum(tokens) / len(tokens), 1),
            "most": max(tokens),
            "samples_per_step": round(per_step, 2),
            "per_step": round(sum(tokens) / len(batches)),
            "per_process": round(sum(tokens) / len(batches) / processes),
            "micro_batch_size": work.micro_batch_size or math.ceil(per_step / max(1, ranks)),
            "spread": round(token_spread(batches, tokens), 4),
        },
        "compute": {"flops_per_sample": total / len(shapes), "flops_per_step": total / len(batches)},
    }


def memory_facts(work: Work, samples: int, processes: int) -> dict[str, float]:
    """GiB of each process in a micro-batch of the largest bucket; text encoder, VAE and libraries come on top."""
    largest = max(work.shapes, key=partial(token_count, work.dit))
    made = partial(network, work.dit, lora=work.lora, bfloat16=work.fit.bfloat16)
    need = step_memory(made, work.dit, largest, work.fit, samples=samples, processes=processes)
    return {name: round(value / GIB, 3) for name, value in [*vars(need).items(), ("total", need.total)]}


def parameters(work: Work) -> dict[str, int]:
    """All of the transformer's, and those that learn."""
    dit = network(work.dit, work.dit.num_layers, lora=work.lora)
    return {
        "all": sum(p.numel() for p in dit.parameters()),
        "learning": sum(p.numel() for p in dit.parameters() if p.requires_grad),
    }


def network(config: DiTConfig, layers: int, *, lora: LoraConfig | None = None, bfloat16: bool = False) -> DiT:
    """The transformer with so many layers, on the meta device, as it learns: whole, or resting beside its adapters."""
    with torch.device("meta"):
        dit = DiT(dataclasses.replace(config, num_layers=layers))
        if lora is not None:
            dit = dit.to(torch.bfloat16) if bfloat16 else dit
            targets = ALL if "all" in lora.targets else lora.targets
            add_lora(dit, rank=lora.rank, alpha=lora.alpha, targets=targets, dtype=torch.float32)
            train_only_lora(dit)
    return dit


def flops_per_sample(config: DiTConfig, shape: Shape, *, lora: LoraConfig | None = None) -> tuple[int, int]:
    """FLOPs of (a forward pass, a forward and a backward pass) of one sample of latent shape (f, h, w).

    Those of matrix products, convolutions and attention, twice the multiplications, counted with one block and with
    two: all blocks cost the same.
    """
    one, two = (_counted(network(config, layers, lora=lora), config, shape) for layers in (1, 2))
    forward, step = (a + (config.num_layers - 1) * (b - a) for a, b in zip(one, two, strict=True))
    return forward, step


def _counted(dit: DiT, config: DiTConfig, shape: Shape) -> tuple[int, int]:
    f, h, w = shape
    f += -f % (config.patch_size_t or 1)
    with torch.device("meta"):
        latents = torch.empty(1, f, config.in_channels, h, w)
        text = torch.empty(1, config.max_text_seq_length, config.text_embed_dim)
        t = torch.zeros(1)
        vectors = {"ofs": torch.zeros(1)} if config.ofs_embed_dim else {}
    cond = Conditioning(text=text, vectors=vectors)
    return _flops(partial(dit, latents, t, cond))


def _flops(forward: Any) -> tuple[int, int]:
    """FLOPs of a forward pass, and of it with its backward pass."""
    with FlopCounterMode(display=False) as counter:
        out = forward()
        first = counter.get_total_flops()
        out.sum().backward()
    return first, counter.get_total_flops()


def _vae_factors(folder: str) -> tuple[int, int]:
    """How much a VAE makes smaller, in space and in time; those of the family if it is not trained yet."""
    from videogen.config import from_dict
    from videogen.weights.guard import read_json

    path = Path(folder) / "config.json"
    if not path.is_file():
        return 8, 4
    config = from_dict(VAEConfig, read_json(path), where=str(path))
    return config.spatial_compression, int(config.temporal_compression_ratio)


def _latent_shape(config: ClipTraining, dit: DiTConfig, scale: int, temporal: int) -> Shape:
    f = (config.num_frames - 1) // temporal + 1
    return f + -f % (dit.patch_size_t or 1), config.height // scale, config.width // scale


# ---- a VAE ----------------------------------------------------------------------------------------------------------


def vae_facts(config: VAETraining, processes: int) -> dict[str, Any]:
    """By stages: what a step sees, and its FLOPs for encoder and decoder (those of a discriminator are not counted)."""
    with torch.device("meta"):
        vae = VAE(vae_config(config))
    if not config.train_encoder:
        vae.encoder.requires_grad_(False)
    stages, total = [], 0.0
    for stage in config.stages:
        step = vae_flops(vae, stage.num_frames, stage.size)
        total += stage.steps * step * stage.batch_size
        values = stage.num_frames * stage.size**2
        stages.append(
            {
                "steps": stage.steps,
                "frames": stage.num_frames,
                "size": stage.size,
                "batch_size": stage.batch_size,
                "pixels_per_step": values * stage.batch_size,
                "flops_per_step": step * stage.batch_size,
            }
        )
    steps = sum(stage.steps for stage in config.stages)
    learning = sum(p.numel() for p in vae.parameters() if p.requires_grad)
    return {
        "steps": config.fit.steps,
        "notes": ["the memory of a VAE's training, and the FLOPs of a discriminator, are not counted"],
        "data": {"samples": sum(stage.steps * stage.batch_size for stage in config.stages), "stages": stages},
        "compute": {"flops_per_step": total / max(1, steps)},
        "parameters": {"all": sum(p.numel() for p in vae.parameters()), "learning": learning},
    }


def vae_flops(vae: VAE, frames: int, size: int) -> float:
    """FLOPs of encoding and decoding a clip, forward and backward. Of a long clip each further chunk costs the same."""
    if frames > 33:
        short, longer = (vae_flops(vae, n, size) for n in (17, 33))
        return short + (frames - 17) / 16 * (longer - short)
    with torch.device("meta"):
        pixels = torch.empty(1, 3, frames, size, size)

    def forward() -> torch.Tensor:
        mean, logvar = vae.moments(pixels)
        return vae.decode(mean + logvar)

    return float(_flops(forward)[1])


def vae_config(config: VAETraining) -> VAEConfig:
    """Of the VAE that learns; one that goes on has the published shape unless its folder is here and says otherwise."""
    from videogen.config import from_dict
    from videogen.weights.guard import read_json

    places = [Path(config.start) / name / "config.json" for name in ("", "vae")] if config.start else []
    found = next((path for path in places if path.is_file()), None)
    return from_dict(VAEConfig, read_json(found), where=str(found)) if found else config.model


# ---- for people -----------------------------------------------------------------------------------------------------


def table(facts: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{facts['task']} into {facts['folder']}: {facts['steps']} steps, {_processes(facts['processes'])}"]
    data, tokens = facts["data"], facts.get("tokens")
    count = facts["parameters"]
    learning = "all of them learn" if count["all"] == count["learning"] else f"{_short(count['learning'])} learn"
    lines.append(f"network    {_short(count['all'])} parameters, {learning}")
    if "buckets" in data:
        epochs = f", {data['epochs']:g} epochs of {data['steps_per_epoch']} steps" if data["epochs"] else ""
        count = f"{data['samples']} samples{epochs}; {data['dropped']} dropped" if data["samples"] else "not here yet"
        lines.append(f"data       {count}")
        lines += [
            f"           {number if data['samples'] else '':8} x latents {s}" for s, number in data["buckets"].items()
        ]
    for stage in data.get("stages", []):
        what = f"{stage['batch_size']} x {stage['frames']} frames of {stage['size']} px"
        lines.append(f"stage      {stage['steps']} steps of {what}: {_short(stage['flops_per_step'])} FLOP each")
    if tokens:
        lines.append(f"tokens     {tokens['per_sample']:g} per sample, {tokens['most']} at most")
        own = f"{tokens['per_process']} per process in micro-batches of {tokens['micro_batch_size']}"
        lines.append(f"           {tokens['per_step']} per step of {tokens['samples_per_step']:g} samples, {own}")
        lines.append(f"           batches differ by {tokens['spread']:.1%}")
    if memory := facts.get("memory"):
        parts = ", ".join(f"{name} {value:.2f}" for name, value in memory.items() if value >= 0.005 and name != "total")
        lines.append(f"memory     {memory['total']:.2f} GiB per process: {parts or 'next to nothing'}")
    lines.append(f"compute    {_short(facts['compute']['flops_per_step'])} FLOP per step, forward and backward")
    lines += [
        "",
        f"estimates at {facts['utilisation']:.0%} of each GPU's peak in bfloat16, on {_processes(facts['processes'])}:",
    ]
    lines.append(f"{'':12}{'s per step':>12}{'hours':>12}")
    for name, gpu in facts["gpus"].items():
        room = {True: "", False: "  too little memory", None: ""}[gpu["fits"]]
        lines.append(f"{name:12}{gpu['seconds_per_step']:12.3g}{gpu['hours']:12.3g}{room}")
    if any(gpu["seconds_per_step"] < 0.02 for gpu in facts["gpus"].values()):
        lines.append("note: so small a network is not bound by FLOPs: tens of milliseconds per step are to be expected")
    lines += [f"note: {note}" for note in facts["notes"]]
    return "\n".join(lines)


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _short(number: int | float) -> str:
    """`1.69G`, `12.3P`."""
    for power, letter in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g}{letter}"
    return f"{number:g}"


__all__ = ["GPUS", "estimate", "table"]
