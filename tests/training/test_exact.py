"""A run is a function of its settings: not of where it was killed, nor of how many processes it had."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from toy import Clips, Processes, losses, settings, train, weights

from videogen.testing import TINY_DIT
from videogen.training.processes import Replicated
from videogen.training.step import Batches


def furthest(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b)
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def from_state(source: Path, target: Path, step: int) -> Path:
    """A run that was stopped after `step`."""
    shutil.copytree(source / f"step_{step:08d}", target / f"step_{step:08d}")
    return target


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, weights(train(folder, settings()))


def test_one_process_and_two_learn_the_same_and_go_on_from_one_another(whole, tmp_path):
    """1 against 2 processes, that hold whole weights or halves; 1 -> 2 and 2 -> 1 at half the way, in either form."""
    from_state(whole[0], tmp_path / "one to two", 6)
    from_state(whole[0], tmp_path / "one to halves", 6)

    def both(rank):
        train(tmp_path / "two", settings())
        train(tmp_path / "one to two", settings())
        train(tmp_path / "halves", settings(), shard=2)
        train(tmp_path / "one to halves", settings(), shard=2)

    assert Processes(2, both, tmp_path / "out").wait() == [0, 0]
    for name in ("two", "halves"):
        train(from_state(tmp_path / name, tmp_path / f"{name} to one", 6), settings())
    reference = losses(whole[0])
    assert len(reference) == 12
    for name in ("two", "one to two", "two to one", "halves", "one to halves", "halves to one"):
        difference = furthest(losses(tmp_path / name), reference[6 if "to" in name else 0 :])
        print(name, difference)
        assert difference < 1e-5, name


def test_accumulation_changes_nothing(whole, tmp_path):
    """Four micro-batches of one sample, and one of all."""
    each = weights(train(tmp_path, settings(micro_batch_size=1)))
    print("losses", furthest(losses(tmp_path), losses(whole[0])), "weights", float((each - whole[1]).abs().max()))
    assert furthest(losses(tmp_path), losses(whole[0])) < 1e-6


def test_validation_leaves_the_run_as_it_is(tmp_path):
    def validate(averages, step):
        torch.manual_seed(step)
        averages["dit"].train()
        return {"held_out_loss": float(torch.randn(3).sum())}

    with_, without = (
        weights(train(tmp_path / str(i), settings(save_every=2), dropout=0.1, validate=v))
        for i, v in enumerate((validate, None))
    )
    assert torch.equal(with_, without)


def test_killed_at_random_moments_it_ends_bit_for_bit_as_if_it_had_not_been(tmp_path):
    """SIGKILL, wherever it is: in a step, while a state is written, while it starts. Layers drop activations, too."""
    config, chance = settings(steps=20, save_every=3), random.Random(0)
    expected = weights(train(tmp_path / "whole", config, dropout=0.1))
    for last, after in [(last, chance.uniform(0, 0.03)) for last in (4, 11, 18)]:

        def dies(step, last=last, after=after):
            if step == last:
                threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()

        run = Processes(
            1, lambda rank, dies=dies: train(tmp_path / "killed", config, dropout=0.1, at_step=dies), tmp_path / "out"
        )
        assert run.wait() == [-signal.SIGKILL]
    again = weights(train(tmp_path / "killed", config, dropout=0.1))
    assert torch.equal(again, expected)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_each_sample_is_seen_once_per_epoch_by_one_process():
    config = settings(batch_size=3)
    batches = Batches(Clips(), config, TINY_DIT)
    for epoch in range(2):
        seen = []
        for step in range(epoch * 7, epoch * 7 + 7):
            of, batch = batches.at(step)
            assert of == epoch
            parts = [part for rank in range(2) for part in batches.parts(batch, Replicated(rank, 2))]
            assert all(len({Clips().shape(i) for i in part}) == 1 for part in parts)
            assert sorted(i for part in parts for i in part) == sorted(batch)
            seen += batch
        assert sorted(seen) == list(range(20))
    assert batches.at(3) == Batches(Clips(), config, TINY_DIT).at(3)
    assert batches.at(0)[1] != batches.at(7)[1]


@pytest.mark.slow
def test_torchrun_starts_all_again_after_one_was_killed_and_the_weights_are_the_same(tmp_path):
    def undisturbed(rank):
        (tmp_path / f"whole {rank}").write_bytes(weights(train(tmp_path / "whole", settings())).numpy().tobytes())

    assert Processes(2, undisturbed, tmp_path / "out").wait() == [0, 0]
    folder = tmp_path / "killed"
    folder.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = Path(__file__).with_name("toy.py")
    done = subprocess.run([*launch, "--max-restarts", "2", program, folder, "8"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:6000]
    assert (folder / "killed at 8").exists()
    assert (folder / "weights").read_bytes() == (tmp_path / "whole 0").read_bytes()
    assert losses(folder) == losses(tmp_path / "whole")
