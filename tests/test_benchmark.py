"""The benchmark and the GPU checks at toy size: they run, compare equal things, lose nothing and hide nothing."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import benchmark  # noqa: E402
from bench import measure, models, report  # noqa: E402
from bench.cases import Case, Variant  # noqa: E402

CPU = torch.device("cpu")


def gpu_checks():
    path = str(ROOT / "scripts" / "gpu_checks")
    loader = importlib.machinery.SourceFileLoader("gpu_checks", path)
    spec = importlib.util.spec_from_loader("gpu_checks", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode, kept = True, sys.dont_write_bytecode
    loader.exec_module(module)
    sys.dont_write_bytecode = kept
    return module


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmarks")
    options = ["--shape", "smoke", "--stage", "text", "dit", "decode", "--rounds", "1", "--device", "cpu"]
    assert benchmark.main([*options, "--out", str(out)]) == 0
    return out


def test_a_run_leaves_tables_with_every_number(smoke):
    (path,) = smoke.glob("*.json")
    content = json.loads(path.read_text())
    assert set(content["cases"]) == {
        "smoke: text encoder",
        "smoke: DiT guidance step",
        "smoke: VAE decode",
    }
    for name, case in content["cases"].items():
        for row in case["rows"].values():
            assert row.keys() >= {"seconds", "cpu_seconds", "faster", "peak_gib", "total_gib", "runs"}, (name, row)
        if "text" not in name:
            plain = case["rows"]["ours, plain"]
            assert 0.5 < plain["error_ratio"] < 2  # both a dtype's rounding away from the same reference
            assert plain["error"] < 0.05
            assert case["floor_seconds"] > 0
    assert set(content["floors"]) == {"products", "attention", "convolutions", "copies"}
    page = path.with_suffix(".md").read_text()
    assert content["commit"] in page
    assert "| ours, plain |" in page


def test_fast_rows_are_no_further_from_the_truth(smoke):
    (path,) = smoke.glob("*.json")
    for name, case in json.loads(path.read_text())["cases"].items():
        if "text" not in name:
            assert case["rows"]["ours, fast"]["error_ratio"] < 1.05, name


def test_weights_are_one_set_and_never_zero():
    weights = models.Weights(models.SHAPES["smoke"], torch.bfloat16, CPU)
    for make in (weights.dit, weights.vae, weights.their_dit, weights.their_vae):
        network = make()
        for name, value in network.named_parameters():
            assert value.abs().max() > 0, name
    ours = {p.untyped_storage()._cdata for p in weights.dit().parameters()}
    theirs = {p.untyped_storage()._cdata for p in weights.their_dit().parameters()}
    assert ours == theirs


def fake_case(**variants) -> Case:
    def variant(value, bytes_):
        def run():
            torch.empty(bytes_, dtype=torch.uint8)
            return torch.full((1, 4), value)

        return Variant(run, run, (nn.Linear(2, 2),))

    def broken():
        raise RuntimeError("no such kernel\nand more")

    made = {
        name: broken if value is None else (lambda value=value: variant(*value)) for name, value in variants.items()
    }
    return Case("fake", "nothing", made, reference=lambda: torch.ones(1, 4))


def test_errors_peaks_and_failures_are_told_apart():
    case = fake_case(diffusers=(1.1, 2**20), ours=(1.05, 2**18), absent=None)
    result = benchmark.measure(case, CPU, [], rounds=1)
    rows = result["rows"]
    assert rows["ours"]["error_ratio"] == pytest.approx(0.5, rel=1e-4)
    assert rows["ours"]["peak_ratio"] == pytest.approx(0.25, rel=1e-2)
    assert rows["ours"]["total_gib"] - rows["ours"]["peak_gib"] == pytest.approx(24 / 2**30)
    assert rows["absent"] == {"note": "RuntimeError: no such kernel"}
    assert "not run: RuntimeError: no such kernel" in "\n".join(report.table(result))
    with pytest.raises(RuntimeError, match="no such kernel"):  # without the one all are held against there is no table
        benchmark.measure(fake_case(diffusers=None, ours=(1.0, 1)), CPU, [], rounds=1)


def test_rounds_go_there_and_back():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ABC"}
    times = measure.interleaved(runs, CPU, rounds=3)
    assert "".join(order) == "ABCCBAABC"
    assert {len(t) for t in times.values()} == {3}


def test_peak_sees_what_a_custom_operation_takes():
    assert measure.peak(lambda: torch.empty(2**20, dtype=torch.uint8) + torch.empty(2**20, dtype=torch.uint8), CPU) == (
        3 * 2**20,
        0,
    )


def test_a_report_of_another_commit_stays(tmp_path, monkeypatch):
    def write(commit, case):
        monkeypatch.setenv("VIDEOGEN_COMMIT", commit)
        made = report.Report(tmp_path, CPU)
        made.add("cases", case, {"what": case, "rows": {}, "rounds": 1})
        return made.path

    first = write("aaa", "one")
    assert write("aaa", "two") == first
    assert list(json.loads(first.read_text())["cases"]) == ["one", "two"]
    before = first.read_bytes()
    other = write("bbb", "three")
    assert other != first
    assert "bbb" in other.name
    assert first.read_bytes() == before


def test_a_stage_that_runs_too_long_ends_with_all_it_started(tmp_path):
    started = time.monotonic()
    said = gpu_checks().run(["sh", "-c", "echo kept; sleep 60 & wait"], 1.5, tmp_path / "log", {})
    assert said.startswith("stopped after 2 s")
    assert time.monotonic() - started < 20
    assert (tmp_path / "log").read_text() == "kept\n"


def test_a_stage_that_fails_is_named(tmp_path):
    run = gpu_checks().run
    assert run(["sh", "-c", "exit 3"], 30, tmp_path / "log", {}).startswith("failed with 3")
    assert run(["true"], 30, tmp_path / "log", {}) == "done"
    assert run(["true"], 0.5, tmp_path / "log", {}) == "not begun, no time left"


def test_no_wheels_are_asked_for_where_nothing_is_missing(tmp_path, monkeypatch):
    checks = gpu_checks()
    assert checks.site(None) == ""
    monkeypatch.setattr(checks, "NEEDED", ["torch", "no_such_module"])
    with pytest.raises(SystemExit, match="lacks no_such_module"):
        checks.site(tmp_path)


def test_every_call_fits_into_ten_minutes_and_its_commands_exist():
    checks = gpu_checks()
    for call, stages in checks.CALLS.items():
        assert sum(limit for _, limit, _ in stages) <= 600, call
        for _, _, command in stages:
            if command[0].endswith("benchmark.py"):
                for arguments in (command[1:], checks.toy(command)[1:]):
                    benchmark.parse(arguments)  # ends the process if it does not understand them


@pytest.mark.slow
def test_the_first_call_at_toy_size(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "gpu_checks", "--dry-run", "--out", tmp_path, "--minutes", "9"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("*.log"))) == len(gpu_checks().CALLS["first"])
