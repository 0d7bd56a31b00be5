"""Sharded states: two processes write and read together (`state_checks.py`), one reads what two wrote."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import load_file
from state_checks import CHECKS, same, steps, training

from videogen.training.state import StateWriter, newest_state, tensors_of


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder that two processes worked in, beside a state that one process has left, and what became of each."""
    folder = tmp_path_factory.mktemp("states")
    net, optimizers = training("adamw", sharded=False)
    steps(net, optimizers, 0, 2)
    with StateWriter(folder / "one") as writer:
        writer.save(2, tensors_of({"net": net}, optimizers), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STATE_FOLDER", str(folder))
        return folder, processes.run(2, module="state_checks")


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS[2]])
def test_two_processes(results: tuple[Path, dict[str, str]], name: str) -> None:
    assert not results[1].get(name, results[1].get("start")), results[1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_process_reads_what_two_wrote(results: tuple[Path, dict[str, str]], optimizer: str) -> None:
    folder, _ = results
    assert any("-00002-of-00002" in path.name for path in (folder / optimizer / "step_00000002").iterdir())
    state = newest_state(folder / optimizer)
    assert state is not None
    net, optimizers = training(optimizer, seed=3, sharded=False)
    tensors = tensors_of({"net": net}, optimizers)
    state.read(into=tensors)
    same(tensors, load_file(folder / f"{optimizer}.safetensors"))
    steps(net, optimizers, 2, 3)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


@pytest.mark.slow
def test_four_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_FOLDER", str(tmp_path))
    found = processes.run(4, module="state_checks")
    assert found == {check.__name__: "" for check in CHECKS[4]}, found
