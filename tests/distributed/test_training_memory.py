"""The memory of a training step that is told beforehand is what the step takes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from videogen.config import DiTConfig, FitConfig, ParallelConfig
from videogen.distributed.checkpointing import set_checkpointing
from videogen.distributed.training_memory import bytes_alive, step_memory
from videogen.models.dit import DiT
from videogen.models.lora import add_lora, train_only_lora
from videogen.training.ema import ema_copy, ema_update
from videogen.training.optim import build_optimizers
from videogen.types import Conditioning

CONFIG = DiTConfig(
    num_layers=4,
    num_attention_heads=4,
    attention_head_dim=32,
    time_embed_dim=32,
    text_embed_dim=32,
    max_text_seq_length=8,
    sample_height=16,
    sample_width=16,
    sample_frames=9,
    use_rotary_positional_embeddings=True,
)
FIVE = DiTConfig(num_layers=42, num_attention_heads=48, use_rotary_positional_embeddings=True)
SHAPE, SAMPLES = (3, 16, 16), 2


def empty(config: DiTConfig):
    def network(layers: int) -> DiT:
        with torch.device("meta"):
            return DiT(replace(config, num_layers=layers))

    return network


def fit(**settings) -> FitConfig:
    return FitConfig(steps=10, **{"bfloat16": False, **settings})


def two_steps(config: DiTConfig, shape: tuple[int, int, int], samples: int, settings: FitConfig) -> None:
    """With real weights: forward, backward, optimiser and average. In the second step all of them are there."""
    dit = set_checkpointing(DiT(config), settings.parallel.checkpointing)
    average, optimizers = ema_copy(dit), build_optimizers({"dit": dit}, settings)
    f, h, w = shape
    latents = torch.randn(samples, f, config.in_channels, h, w)
    cond = Conditioning(text=torch.randn(samples, config.max_text_seq_length, config.text_embed_dim))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
            loss = (dit(latents, torch.ones(samples), cond) - latents).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema_update(average, dit, 0.9, 1)


@pytest.mark.parametrize(
    ("mode", "bfloat16", "optimizer"),
    [
        pytest.param("none", False, "adamw", marks=pytest.mark.slow),
        ("selective", False, "muon"),
        ("full", True, "adamw"),
    ],
    ids=str,
)
def test_what_a_step_takes_is_told_beforehand(mode, bfloat16, optimizer):
    """Against all tensors of two real steps, of another depth than the two that are counted."""
    settings = fit(bfloat16=bfloat16, optimizer=optimizer, parallel=ParallelConfig(checkpointing=mode))
    told = step_memory(empty(CONFIG), CONFIG, SHAPE, settings, samples=SAMPLES)
    with bytes_alive() as alive:
        two_steps(CONFIG, SHAPE, SAMPLES, settings)
    print(mode, bfloat16, told.total / alive.peak)
    assert abs(told.total / alive.peak - 1) < 0.05, (told, alive.peak)


def test_what_is_spread_is_divided():
    alone = step_memory(empty(CONFIG), CONFIG, SHAPE, fit(), processes=4)
    spread = step_memory(empty(CONFIG), CONFIG, SHAPE, fit(parallel=ParallelConfig(shard=0)), processes=4)
    for name in ("weights", "averages", "optimizer", "gradients"):
        assert 0.25 <= getattr(spread, name) / getattr(alone, name) < 0.26
    assert alone.gathered == 0 < spread.gathered
    several = step_memory(empty(CONFIG), CONFIG, SHAPE, fit(), micro_batches=2)
    assert several.total > step_memory(empty(CONFIG), CONFIG, SHAPE, fit()).total


@pytest.mark.slow
def test_activations_fall_with_the_tokens_of_a_process_and_with_what_is_computed_again():
    long = (13, 32, 32)
    whole, shared = (
        step_memory(empty(CONFIG), CONFIG, long, fit(parallel=ParallelConfig(sequence=n)), processes=4) for n in (1, 4)
    )
    assert shared.weights == whole.weights
    assert shared.activations < 0.35 * whole.activations
    order = [
        step_memory(empty(CONFIG), CONFIG, SHAPE, fit(parallel=ParallelConfig(checkpointing=mode))).activations
        for mode in ("none", "selective", "full")
    ]
    assert order == sorted(order, reverse=True)
    assert order[2] < order[0] / 2


def test_adapters_need_little_beside_their_model():
    def network(layers: int) -> DiT:
        with torch.device("meta"):
            dit = DiT(replace(CONFIG, num_layers=layers)).to(torch.bfloat16)
            add_lora(dit, rank=4, dtype=torch.float32)
            train_only_lora(dit)
            return dit

    told = step_memory(network, CONFIG, SHAPE, fit(bfloat16=True))
    learning = sum(p.numel() for p in network(4).parameters() if p.requires_grad)
    assert told.gradients == told.averages == 4 * learning
    assert told.optimizer == 8 * learning
    assert told.weights == 4 * learning + 2 * sum(p.numel() for p in empty(CONFIG)(4).parameters())


def test_the_whole_5b_model_is_told_of_without_loading_it():
    """On 8 GPUs, 49 frames of 480 x 720: what a reader of docs/parallel_training.md finds there."""
    settings = fit(bfloat16=True, parallel=ParallelConfig(shard=0, checkpointing="full"))
    told = step_memory(empty(FIVE), FIVE, (13, 60, 90), settings, processes=8)
    parameters = sum(p.numel() for p in empty(FIVE)(42).parameters())
    assert abs(told.weights / (parameters * 4 / 8) - 1) < 0.01
    print({name: round(value / 2**30, 2) for name, value in dataclasses.asdict(told).items()}, told.total / 2**30)
    assert 17 < told.total / 2**30 < 21


PROGRAM = """
import sys
sys.path[:0] = {path!r}
import json, torch
from dataclasses import replace
from test_training_memory import CONFIG, fit, two_steps
from videogen.config import ParallelConfig
torch.set_num_threads(1)
def high():
    line = next(line for line in open("/proc/self/status") if line.startswith({what!r}))
    return 1024 * int(line.split()[1])
settings = fit(parallel=ParallelConfig(checkpointing={mode!r}))
two_steps(CONFIG, (3, 16, 16), 1, settings)  # what libraries take
before = high()
two_steps(replace(CONFIG, num_attention_heads=16, num_layers=6), (5, 32, 32), 2, settings)
print(json.dumps(high() - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mode", ["none", "full"])
def test_the_process_grows_by_what_was_told(mode):
    """By the kernel's count of its memory, in float32, with an allocator that gives back what is freed."""
    config = replace(CONFIG, num_attention_heads=16, num_layers=6)
    settings = fit(parallel=ParallelConfig(checkpointing=mode))
    told = step_memory(empty(config), config, (5, 32, 32), settings, samples=2)
    program = PROGRAM.format(path=sys.path, mode=mode, what="VmHWM")
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    print(mode, told.total / grown)
    assert abs(told.total / grown - 1) < 0.15, (told, grown)
