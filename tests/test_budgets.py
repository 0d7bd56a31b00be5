"""What a clip costs at full size, counted exactly on the meta device: it may shrink, and not grow.

`python scripts/benchmark.py counters` prints all of it, diffusers' costs and the floors beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from bench.budgets import BUDGETS, GIB, vae  # noqa: E402

LIMITS = {  # (what, how): TFLOP, GB moved, GiB at the peak, operations
    ("block", "ours, plain"): (15.9, 26.1, 2.5, 61),
    ("block", "ours, fast"): (15.9, 9.5, 1.1, 35),
    ("decode", "ours, plain"): (313.1, 1330, 7.95, 2810),
    ("decode", "ours, fast"): (290.1, 450, 5.2, 11500),
    ("encode", "ours, fast"): (149.1, 290, 3.8, 6500),
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """The command's own numbers, from a process of its own: here every call is checked, which keeps arguments alive."""
    out = tmp_path_factory.mktemp("counters")
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", "counters", "--out", out]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return json.loads((out / "counters.json").read_text())


@pytest.mark.parametrize(("what", "how"), LIMITS)
def test_a_cost_stays_within_its_budget(counted, what, how):
    counts, floor = counted[what][how], BUDGETS[what].floor
    cost = counts["flops"] / 1e12, counts["bytes"] / 1e9, counts["peak_bytes"] / GIB, counts["ops"]
    assert all(c <= limit for c, limit in zip(cost, LIMITS[what, how], strict=True)), cost
    lowest = 0.999 * floor.flops / 1e12, floor.bytes / 1e9, floor.peak_bytes / GIB, floor.ops
    assert all(c >= least for c, least in zip(cost, lowest, strict=True)), f"something is not counted: {cost}"


def test_the_fast_rows_do_no_less_work(counted):
    """A fused operation without a formula would hide its FLOPs."""
    assert counted["block"]["ours, fast"]["flops"] == pytest.approx(counted["block"]["ours, plain"]["flops"], rel=1e-4)


def test_against_diffusers(counted):
    for what, moved, peak in (("block", 0.4, 0.5), ("decode", 0.35, 0.36), ("encode", 0.75, 0.65)):
        theirs, fast = counted[what]["diffusers"], counted[what]["ours, fast"]
        assert fast["bytes"] < moved * theirs["bytes"], what
        assert fast["peak_bytes"] < peak * theirs["peak_bytes"], what


def test_a_budget_notices_growth(monkeypatch):
    """The plain rows instead of the fast ones would be found."""
    import videogen.runtime.vae as fast

    monkeypatch.setattr(fast, "fast_vae", lambda model: model)
    counts = vae("ours, fast", "encode")
    assert counts.bytes / 1e9 > LIMITS["encode", "ours, fast"][1]
    assert counts.peak_bytes / GIB > LIMITS["encode", "ours, fast"][2]
