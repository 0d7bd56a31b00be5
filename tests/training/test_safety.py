"""What keeps a run from harm: numbers that are not finite, norms out of range, processes that hang or are stopped."""

import json
import math
import os
import signal
import time

import pytest
import torch
from toy import Processes, losses, settings, train, weights

from videogen.config import SafetyConfig
from videogen.data.manifest import read_quarantine
from videogen.errors import NumericalError
from videogen.training.logs import read_log
from videogen.training.safety import QUARANTINE, REQUEUE, Interrupted, NormLimit, Watchdog
from videogen.training.state import saved_states


def quarantined(folder) -> list[str]:
    """As whoever prepares the data next reads it."""
    found = read_quarantine(folder / QUARANTINE)
    assert set(found.values()) == {"not finite"}
    assert len((folder / QUARANTINE).read_text().splitlines()) == len(found)
    return list(found)


def skipping(skips: int, **fit):
    return settings(safety=SafetyConfig(skips=skips, timeout=20.0), **fit)


def test_a_sample_that_is_not_finite_is_named_and_never_learned_from(tmp_path):
    """The run stops before the step; with a budget it goes on without the step, as if it had not been."""
    with pytest.raises(NumericalError, match="clip 7"):
        train(tmp_path / "stops", skipping(0), broken="clip 7")
    assert quarantined(tmp_path / "stops") == ["clip 7"]
    skipped = [line for line in read_log(tmp_path / "stops") if "skipped" in line]
    assert [line["skipped"] for line in skipped] == [["clip 7"]]

    dit = train(tmp_path / "skips", skipping(3), broken="clip 7")
    assert torch.isfinite(weights(dit)).all()
    at = [line["step"] for line in read_log(tmp_path / "skips") if "skipped" in line]
    assert quarantined(tmp_path / "skips") == ["clip 7"]
    assert len(at) == 2  # 12 steps are two epochs and a bit
    assert all(math.isfinite(loss) for step, loss in enumerate(losses(tmp_path / "skips"), 1) if step not in at)


def test_two_processes_agree_on_what_they_leave_out(tmp_path):
    """One of them has the broken sample. Then both were told to stop, by a signal to one."""
    finals = tmp_path / "weights"
    finals.mkdir()

    def both(rank):
        dit = train(tmp_path / "skips", skipping(3), broken="clip 7")
        (finals / f"{rank}").write_bytes(weights(dit).numpy().tobytes())

        def stop(step):
            if step == 4 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        train(tmp_path / "stopped", settings(save_every=100), at_step=stop)

    run = Processes(2, both, tmp_path / "out")
    assert run.wait() == [Interrupted.exit_code] * 2 == [85, 85]
    assert (finals / "0").read_bytes() == (finals / "1").read_bytes()
    assert quarantined(tmp_path / "skips") == ["clip 7"]
    assert [state.name for state in saved_states(tmp_path / "stopped")] == ["step_00000005"]
    assert (tmp_path / "stopped" / REQUEUE).exists()


def test_told_to_stop_it_saves_and_goes_on_later_as_if_nothing_had_been(tmp_path):
    config = settings(save_every=100)
    expected, before = weights(train(tmp_path / "whole", config)), signal.getsignal(signal.SIGTERM)
    for last, number in ((3, signal.SIGTERM), (8, signal.SIGUSR1)):

        def stop(step, last=last, number=number):
            if step == last:
                os.kill(os.getpid(), number)

        with pytest.raises(Interrupted, match=f"after step {last + 1} of 12"):
            train(tmp_path / "stopped", config, at_step=stop)
        assert (tmp_path / "stopped" / REQUEUE).exists()
    assert signal.getsignal(signal.SIGTERM) == before
    again = weights(train(tmp_path / "stopped", config))
    assert torch.equal(again, expected)
    assert not (tmp_path / "stopped" / REQUEUE).exists()


def test_a_hung_process_is_found_and_shows_where_it_hangs(tmp_path):
    """The one that waits gives up and says so; the one that hangs is ended with its stack on stderr."""

    def hang_here(step):
        if step == 2 and os.environ["RANK"] == "1":
            time.sleep(1000)

    config = settings(safety=SafetyConfig(timeout=2.0))
    run = Processes(2, lambda rank: train(tmp_path / "run", config, at_step=hang_here), tmp_path / "out")
    codes = run.wait(60)
    assert all(code not in (0, -signal.SIGKILL) for code in codes)
    assert "does not answer" in run.told(0)
    assert "hang_here" in run.told(1)
    assert "Timeout" in run.told(1)


def test_a_watchdog_that_is_fed_stays_quiet():
    with Watchdog(1.0) as watchdog:
        for _ in range(3):
            time.sleep(0.02)
            watchdog.feed()
    with Watchdog(0.0):
        pass


def test_a_norm_out_of_its_range_is_clipped_to_the_range():
    limit = NormLimit(fixed=10.0, sigmas=3.0, warmup=20)
    rng = torch.Generator().manual_seed(0)
    norms = (2 + 0.1 * torch.randn(500, generator=rng)).tolist()
    for norm in norms[:19]:
        limit.see("dit", norm)
    assert limit.limit("dit") == 10.0  # not yet known
    for norm in norms[19:]:
        limit.see("dit", min(norm, limit.limit("dit")))
    assert 2.15 < limit.limit("dit") < 2.45
    assert limit.limit("critic") == 10.0  # roles have ranges of their own
    assert NormLimit(fixed=1.0, sigmas=3.0, warmup=20, figures=limit.figures).limit("dit") == 1.0
    assert NormLimit(fixed=10.0, figures=limit.figures).limit("dit") == 10.0
    assert json.loads(json.dumps(limit.figures)) == limit.figures
