"""A training on several processes learns what one learns. What they do is in `training_checks.py`."""

from __future__ import annotations

from functools import cache

import processes
import pytest
import torch
import training_checks
from torch import nn

from videogen.config import ParallelConfig
from videogen.distributed.training import check, parallelize, skeleton
from videogen.errors import InvalidRequest
from videogen.models.dit import DiT

NAMES = [
    pytest.param(count, one.__name__, marks=[pytest.mark.slow] if count == 4 else [])
    for count, some in training_checks.CHECKS.items()
    for one in some
]
results = cache(processes.run)


@pytest.mark.parametrize(("count", "name"), NAMES, ids=str)
def test_processes(count, name):
    assert not results(count, module="training_checks")[name], results(count, module="training_checks")[name]


@pytest.mark.parametrize(
    ("settings", "found", "hint"),
    [
        ({"shard": 3}, "parallel.shard=3 does not divide 4 processes", "1, 2, 4"),
        ({"sequence": 8}, "parallel.sequence=8 does not divide 4 processes", "1, 2, 4"),
        ({"shard": -1}, "parallel.shard=-1", "1, 2, 4"),
        ({"sequence": 2}, "does not fit vae", "parallel.sequence=1"),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit_are_refused(settings, found, hint):
    with pytest.raises(InvalidRequest, match=found) as caught:
        check(ParallelConfig(**settings), {"dit": DiT(training_checks.VARIANTS["5B"]), "vae": nn.Linear(1, 1)}, 4)
    assert hint in caught.value.hint
    assert caught.value.param in ("parallel.shard", "parallel.sequence")


def test_one_process_is_as_plain_as_can_be():
    modules = training_checks.networks("5B")
    parallel = parallelize(modules, ParallelConfig(shard=0), torch.device("cpu"))
    assert (parallel.data_rank, parallel.data_world, parallel.is_collective) == (0, 1, False)
    assert parallel.whole("dit", modules["dit"]) is modules["dit"]
    whole = training_checks.whole_step(training_checks.networks("5B"))
    training_checks.shared_step(modules, parallel)
    ours = training_checks.gradients(modules)
    assert all(torch.equal(ours[name], gradient) for name, gradient in whole.items())
    with pytest.raises(InvalidRequest, match="no activation checkpointing 'some'"):
        parallelize(modules, ParallelConfig(checkpointing="some"), torch.device("cpu"))


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_what_is_computed_again_gives_the_same_bits(mode):
    whole = training_checks.whole_step(training_checks.networks("5B-I2V"))
    modules = training_checks.networks("5B-I2V")
    parallelize(modules, ParallelConfig(checkpointing=mode), torch.device("cpu"))
    calls = []
    dit = modules["dit"]
    for block in dit.blocks:
        kernel = block.attention.kernel
        block.attention.kernel = lambda *qkv, kernel=kernel: calls.append(1) or kernel(*qkv)
    again = training_checks.whole_step(modules)
    assert all(torch.equal(again[name], gradient) for name, gradient in whole.items())
    assert len(calls) == 2 * len(dit.blocks) * training_checks.SAMPLES


def test_a_skeleton_has_the_layout_and_no_memory():
    modules = training_checks.networks("5B-I2V")
    for module in modules.values():
        empty = skeleton(module)
        assert type(empty) is type(module)
        assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {
            k: (v.shape, v.dtype) for k, v in module.state_dict().items()
        }
        assert all(value.is_meta for value in [*empty.parameters(), *empty.buffers()])
