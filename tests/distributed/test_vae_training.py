"""A VAE trains on clips that several processes share, as it does on one. The checks are in `vae_training_checks.py`."""

import itertools

import pytest
import torch
import vae_training_checks as checks
from processes import run

from videogen.config import VAEConfig
from videogen.distributed.vae_training import plan_pieces, time_parallel
from videogen.errors import InvalidRequest
from videogen.training import vae as vae_training


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("vae_runs")


@pytest.fixture(scope="module")
def results(runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VAE_RUNS", str(runs))
        return run(2, module="vae_training_checks")


@pytest.mark.parametrize("name", [check.__name__ for check in checks.CHECKS])
def test_two_processes(results, name):
    assert not results[name], results[name]


def test_runs_of_two_processes_end_as_that_of_one(results, runs, monkeypatch):
    monkeypatch.setattr(vae_training, "JUDGED", 1)
    monkeypatch.setattr(vae_training, "MEASURED", 2)
    assert not results["a_run_ends_as_that_of_one_process"]
    vae_training.train_vae(checks.training(), runs / "alone", torch.device("cpu"))
    alone = checks.read_log(runs / "alone")
    for name in ("frames", "samples"):
        log = checks.read_log(runs / name)
        assert log.keys() == alone.keys()
        for step, facts in alone.items():
            for key in facts.keys() - {"seconds"}:
                assert log[step][key] == pytest.approx(facts[key], rel=1e-5, abs=1e-6), (name, step, key)
    assert {"generator", "discriminator", "balance"} <= alone[4].keys()
    assert "generator" not in alone[2]
    assert "discriminator" in alone[2]


def test_pieces_cover_the_clip_in_order():
    one = VAEConfig(frame_batch_size=256, latent_batch_size=256)
    for config in (one, VAEConfig()):
        for frames in (25, 49, 81, 161):
            for processes in (2, 3):
                plan = plan_pieces(config, frames, processes)
                for rounds, length in ((plan.pixels, frames), (plan.latents, (frames + 3) // 4)):
                    spans = [span for some in rounds for span in some]
                    assert spans[0][0] == 0
                    assert spans[-1][1] == length
                    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
                assert plan.is_one_chunk == (config is one)


def test_one_process_shares_with_nobody():
    with pytest.raises(InvalidRequest, match="1 processes cannot share clips 2 by 2"):
        time_parallel(2)


def test_clips_that_cannot_be_shared_are_refused():
    one = VAEConfig(frame_batch_size=64, latent_batch_size=64)
    with pytest.raises(InvalidRequest, match="cannot be shared"):
        plan_pieces(one, 16, 2)
    with pytest.raises(InvalidRequest, match="too few for 4 processes"):
        plan_pieces(one, 17, 4)
    with pytest.raises(InvalidRequest, match="too few for 3 processes"):
        plan_pieces(VAEConfig(), 17, 3)
    with pytest.raises(InvalidRequest, match="chunks cannot be shared"):
        plan_pieces(VAEConfig(frame_batch_size=16), 49, 2)
