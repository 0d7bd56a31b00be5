"""Every sample once per epoch, on one process, whatever its size, the budget and the number of processes."""

import os
import subprocess
import sys

import numpy as np
import pytest

from videogen.config import DiTConfig
from videogen.data.buckets import (
    buckets,
    epoch_batches,
    micro_batches,
    packs,
    padding_waste,
    share,
    token_count,
    token_spread,
)
from videogen.errors import InvalidRequest

DIT = DiTConfig(patch_size=2, max_text_seq_length=48)
KINDS = [(1, 8, 8), (3, 8, 8), (5, 8, 8), (5, 6, 10), (1, 12, 12)]  # images and clips, of three proportions
BUDGET = 4000
WAYS = [{"batch_size": 16}, {"token_budget": BUDGET}, {"token_budget": BUDGET, "together": 4}]


def mixture(count: int = 500) -> tuple[list, list[int]]:
    rng = np.random.default_rng(0)
    shapes = [KINDS[i] for i in rng.choice(len(KINDS), size=count, p=[0.4, 0.2, 0.2, 0.1, 0.1])]
    return shapes, [token_count(DIT, shape) for shape in shapes]


def total(batch: list[int], tokens: list[int]) -> int:
    return sum(tokens[index] for index in batch)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_sample_is_in_one_batch_of_each_epoch(way):
    shapes, tokens = mixture()
    epochs = [epoch_batches(shapes, tokens=tokens, seed=1, epoch=epoch, **way) for epoch in range(3)]
    for batches in epochs:
        assert sorted(index for batch in batches for index in batch) == list(range(500))
        assert all(batches)
    assert epochs[0] == epoch_batches(shapes, tokens=tokens, seed=1, epoch=0, **way)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != epoch_batches(shapes, tokens=tokens, seed=2, epoch=0, **way)


def test_left_overs_are_spread_not_dropped_and_no_step_is_made_of_a_few():
    shapes, tokens = mixture(100)
    sizes = [len(batch) for batch in epoch_batches(shapes, tokens=tokens, seed=0, epoch=0, batch_size=16)]
    assert sum(sizes) == 100
    assert set(sizes) == {14, 15}
    assert [len(b) for b in epoch_batches(shapes, tokens=tokens, seed=0, epoch=0, batch_size=1000)] == [100]
    assert [len(b) for b in epoch_batches(shapes, tokens=tokens, seed=0, epoch=0, batch_size=20)] == [20] * 5


@pytest.mark.parametrize("way", WAYS[1:], ids=str)
def test_a_token_budget_is_kept_and_used_and_every_step_sees_images_and_clips(way):
    shapes, tokens = mixture()
    batches = epoch_batches(shapes, tokens=tokens, seed=0, epoch=0, **way)
    assert max(total(batch, tokens) for batch in batches) <= BUDGET
    assert token_spread(batches, tokens) <= 0.1
    assert sum(tokens) >= 0.9 * BUDGET * len(batches)
    images = [sum(shapes[index][0] == 1 for index in batch) / len(batch) for batch in batches]
    assert min(images) > 0.2
    assert max(images) < 0.8


def test_samples_of_a_bucket_stay_together_where_it_is_asked_for():
    shapes, tokens = mixture()

    def tensors(together: int) -> int:
        kind = {"batch_size": 8, "together": together}
        return sum(len(buckets(shapes, b)) for b in epoch_batches(shapes, tokens=tokens, seed=0, epoch=0, **kind))

    assert tensors(4) < 0.75 * tensors(1)


def test_a_sample_larger_than_the_budget_is_named():
    shapes, tokens = mixture()
    shapes[7], tokens[7] = (13, 60, 90), token_count(DIT, (13, 60, 90))
    with pytest.raises(InvalidRequest, match=r"sample 7 has 17598 tokens[\s\S]*nothing is dropped"):
        epoch_batches(shapes, tokens=tokens, seed=0, epoch=0, token_budget=BUDGET)
    with pytest.raises(InvalidRequest, match="sample 7 has"):
        packs(range(10), tokens, BUDGET)


@pytest.mark.parametrize("both", [{}, {"batch_size": 4, "token_budget": 10}])
def test_a_batch_has_one_measure(both):
    with pytest.raises(InvalidRequest, match="in samples or in tokens"):
        epoch_batches([(1, 2, 2)], tokens=[5], seed=0, epoch=0, **both)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_sample_of_a_batch_is_on_one_process_and_their_work_is_about_equal(world):
    shapes, tokens = mixture()
    for batch in epoch_batches(shapes, tokens=tokens, seed=0, epoch=0, batch_size=24):
        parts = [share(batch, tokens, rank, world) for rank in range(world)]
        assert sorted(index for part in parts for index in part) == sorted(batch)
        assert all(part == [index for index in batch if index in part] for part in parts)  # in the batch's order
        loads = [total(part, tokens) for part in parts]
        assert max(loads) - min(loads) <= max(tokens)
        assert min(loads) > 0


def test_a_batch_with_fewer_samples_than_processes_leaves_some_without():
    parts = [share([3, 1], [5, 5, 5, 5], rank, 4) for rank in range(4)]
    assert sorted(parts) == [[], [], [1], [3]]


def test_micro_batches_have_one_shape_and_at_most_so_many_samples_or_tokens():
    shapes, tokens = mixture(60)
    for options in ({}, {"size": 4}, {"tokens": tokens, "most_tokens": 400}, {"size": 3, "count": 40}):
        parts = micro_batches(range(60), shapes, **options)
        assert sorted(index for part in parts for index in part) == list(range(60))
        assert all(len({shapes[index] for index in part}) <= 1 for part in parts)
        assert all(len(part) <= options.get("size", 60) for part in parts)
        if "most_tokens" in options:
            assert all(total(part, tokens) <= 400 or len(part) == 1 for part in parts)
    assert len(micro_batches(range(60), shapes)) == len(buckets(shapes))


def test_processes_can_make_equally_many_micro_batches():
    shapes, tokens = mixture(40)
    for batch in epoch_batches(shapes, tokens=tokens, seed=0, epoch=0, batch_size=10):
        parts = [share(batch, tokens, rank, 4) for rank in range(4)]
        most = max(len(micro_batches(part, shapes)) for part in parts)
        made = [micro_batches(part, shapes, count=most) for part in parts]
        assert {len(m) for m in made} == {most}
        assert [sorted(i for m in mine for i in m) for mine in made] == [sorted(part) for part in parts]
    assert micro_batches([0, 1], shapes, count=4)[2:] == [[], []]


def test_packs_are_full():
    shapes, tokens = mixture()
    streams = packs(range(500), tokens, 2000)
    assert sorted(index for stream in streams for index in stream) == list(range(500))
    assert max(total(stream, tokens) for stream in streams) <= 2000
    assert padding_waste(streams, tokens, 2000) < 0.05
    padded = epoch_batches(shapes, tokens=tokens, seed=0, epoch=0, batch_size=16)
    assert padding_waste(padded, tokens) > 0.2  # what a batch padded to its longest clip would cost
    assert len(packs(range(4), tokens, 2000, count=6)) == 6
    assert packs([], tokens, 2000, count=2) == [[], []]


def test_tokens_are_counted_as_the_model_makes_them():
    assert token_count(DIT, (5, 8, 8)) == 48 + 5 * 4 * 4
    assert token_count(DiTConfig(patch_size_t=2), (5, 8, 8)) == 226 + 3 * 4 * 4
    assert token_spread([[0, 1], [2]], [1, 1, 4]) == pytest.approx(2 / 3)
    assert padding_waste([[0, 1], [2]], [1, 3, 4]) == pytest.approx(0.2)


def test_the_plan_is_the_same_in_every_process():
    code = """
from videogen.data.buckets import *
shapes = [(1 + i * i % 3, 8, "wide" if i % 5 else "high") for i in range(50)]
tokens = [10 + 7 * f for f, _, _ in shapes]
batches = epoch_batches(shapes, tokens=tokens, seed=3, epoch=4, token_budget=100)
print(batches, [share(b, tokens, 1, 2) for b in batches], [micro_batches(b, shapes) for b in batches])
"""
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
