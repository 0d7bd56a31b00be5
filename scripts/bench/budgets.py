"""Exact costs at full size on the meta device: a DiT block of 5B and the VAE, of diffusers, of ours, and the floors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.models import SHAPES, Weights
from videogen.runtime.counters import Counts, count

META, BF16 = torch.device("meta"), torch.bfloat16
GIB = 2**30


class Budget(NamedTuple):
    """What is computed, its floor with the reason for each number, and the ways of computing it."""

    what: str
    floor: Counts
    why: str
    ways: dict[str, Callable[[], Counts]]


def block_floor() -> Counts:
    """Attention and four products read and write once; all else goes along inside them."""
    shape = SHAPES["5b"]
    s, d = shape.tokens(shape.dit_clip), shape.dit.width
    stream, weights = 2 * s * d * 2, 12 * d * d * 2  # bytes; stream: one tensor of [2, s, d]
    qkv, attention, out, up, down = 1 + 3, 3 + 1, 1 + 1 + 1, 1 + 4, 4 + 1 + 1  # out and down add to the residual
    moved = (qkv + attention + out + up + down) * stream + weights
    return Counts(flops=2 * (24 * s * d * d + 4 * s * s * d), bytes=moved, ops=5, peak_bytes=5 * stream // 2)


def dit_block(way: str) -> Counts:
    """One of 5B's 42 blocks on a guidance step of 49 frames of 480 x 720, batch 2, without what happens once."""
    weights = Weights(SHAPES["5b"], BF16, META)
    inputs = weights.dit_inputs(0)
    if way == "diffusers":
        model, rotary = weights.their_dit(), weights.their_rotary()
        blocks = model.transformer_blocks

        def run() -> Any:
            return model(inputs[0], inputs[2].text, inputs[1], image_rotary_emb=rotary)
    else:
        model = weights.dit()
        if way == "ours, fast":
            from videogen.runtime.dit import fast_dit

            model = fast_dit(model)
        blocks = model.blocks

        def run() -> Any:
            return model(*inputs)

    del blocks[2:]
    with torch.no_grad():
        run()  # makes what is made once and kept
    two = count(run)
    del blocks[1:]
    return difference(two, count(run))


def difference(more: Counts, less: Counts) -> Counts:
    return Counts(more.flops - less.flops, more.bytes - less.bytes, more.ops - less.ops, more.peak_bytes)


def vae(way: str, half: str) -> Counts:
    weights = Weights(SHAPES["5b"], BF16, META)
    if way == "diffusers":
        model = weights.their_vae()
        return count(model.decode, weights.latents()) if half == "decode" else count(model.encode, weights.pixels())
    model = weights.vae()
    if way == "ours, fast":
        from videogen.runtime.vae import fast_vae

        model = fast_vae(model)
    if half == "encode":
        return count(model.encode, weights.pixels())

    def run() -> None:
        for _ in model.decode_chunks(weights.latents()):
            pass

    return count(run)


WAYS = ("diffusers", "ours, plain", "ours, fast")
BUDGETS = {
    "block": Budget(
        "A DiT block of 5B: 17,776 tokens of width 3072, batch 2 (guidance), bfloat16",
        block_floor(),
        "closed form of the FLOPs; four products and attention read and write their tensors once, all else goes along "
        "inside them; five tensors of the stream's size are alive, for one half of guidance at a time",
        {way: lambda way=way: dit_block(way) for way in WAYS},
    ),
    "decode": Budget(
        "VAE decode: 49 frames of 480 × 720, bfloat16",
        Counts(flops=int(289.7e12), bytes=int(173e9), ops=0, peak_bytes=int(2.45 * GIB)),
        "convolutions after exact algebra (duplicated frames and enlarged pictures computed once); what they alone "
        "read and write; the frames that they must keep from chunk to chunk",
        {way: lambda way=way: vae(way, "decode") for way in WAYS},
    ),
    "encode": Budget(
        "VAE encode: 49 frames of 480 × 720, bfloat16",
        Counts(flops=int(149.0e12), bytes=0, ops=0, peak_bytes=0),
        "the convolutions",
        {way: lambda way=way: vae(way, "encode") for way in WAYS},
    ),
}


def markdown(counted: dict[str, dict[str, Counts]]) -> str:
    lines = ["# What it costs, counted", ""]
    lines += ["Made by `python scripts/benchmark.py counters`: exact, the same on every machine (the meta device)."]
    lines += ["How it is counted: `videogen/runtime/counters.py`. `tests/test_budgets.py` keeps it from growing."]
    for name, budget in BUDGETS.items():
        lines += ["", f"## {budget.what}", "", "| | TFLOP | GB moved | operations | peak beside weights, GiB |"]
        lines += ["|---|---|---|---|---|"]
        lines += [line(way, counts) for way, counts in counted[name].items()]
        lines += [line("floor", budget.floor), "", f"Floor: {budget.why}."]
    return "\n".join(lines) + "\n"


def line(name: str, counts: Counts) -> str:
    def cell(value: float, form: str) -> str:
        return form.format(value) if value else ""

    cells = [name, cell(counts.flops / 1e12, "{:.1f}"), cell(counts.bytes / 1e9, "{:.1f}"), cell(counts.ops, "{:.0f}")]
    return f"| {' | '.join([*cells, cell(counts.peak_bytes / GIB, '{:.2f}')])} |"


def write(folder: Path) -> str:
    """Count everything; `counters.md`, which is returned, and `counters.json` in the folder."""
    counted = {name: {way: make() for way, make in budget.ways.items()} for name, budget in BUDGETS.items()}
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: {way: asdict(counts) for way, counts in ways.items()} for name, ways in counted.items()}
    (folder / "counters.json").write_text(json.dumps(values, indent=1) + "\n")
    (folder / "counters.md").write_text(markdown(counted))
    return (folder / "counters.md").read_text()
