"""A run's state: bit for bit what it was, complete or absent, never silently another one."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from videogen.config import FitConfig, ParallelConfig
from videogen.errors import FileError, InvalidRequest, Note
from videogen.training import state as states
from videogen.training.ema import ema_copy, ema_update
from videogen.training.optim import build_optimizers
from videogen.training.state import StateWriter, newest_state, saved_states, settings_to_apply, tensors_of

SCRIPT = Path(__file__).parents[2] / "scripts" / "fault_sweep.py"


class Net(nn.Module):
    """A matrix for Muon, a bias for AdamW, a buffer, and a weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(6, 6)])
        self.again = self.blocks[0]
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](x)


def start(optimizer: str) -> tuple[dict[str, nn.Module], list[torch.optim.Optimizer]]:
    net = Net()
    config = FitConfig(steps=9, optimizer=optimizer, learning_rate=0.1, weight_decay=0.1)
    return {"net": net, "net_ema": ema_copy(net)}, build_optimizers({"net": net}, config)


def steps(modules: dict[str, nn.Module], optimizers: list[torch.optim.Optimizer], first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        modules["net"](x).square().mean().backward()
        modules["net"].seen += 1
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema_update(modules["net_ema"], modules["net"], 0.9, step)


def some(step: int) -> dict[str, torch.Tensor]:
    return {"a/x": torch.full((3, 2), float(step)), "b/y": torch.tensor(step)}


def save(folder: Path, *numbers: int, **settings) -> None:
    with StateWriter(folder, **settings) as writer:
        for number in numbers:
            writer.save(number, some(number), {"samples": 2 * number})


def names(folder: Path) -> list[int]:
    return [int(state.name[5:]) for state in saved_states(folder)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_state_is_put_back_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    modules, optimizers = start(optimizer)
    steps(modules, optimizers, 0, 3)
    with StateWriter(tmp_path) as writer:
        writer.save(3, tensors_of(modules, optimizers), {"samples": 12, "norm": 0.1})
        steps(modules, optimizers, 3, 6)  # while it is written
    again, more = start(optimizer)
    state = newest_state(tmp_path)
    assert state is not None
    assert (state.step, state.facts) == (3, {"samples": 12, "norm": 0.1})
    state.read(into=tensors_of(again, more))
    steps(again, more, 3, 6)
    wanted, found = tensors_of(modules, optimizers), tensors_of(again, more)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert "net/blocks.0.weight" in wanted
    assert "net/again.weight" not in wanted, "each tensor once"


def test_moments_of_a_byte_are_put_back_bit_for_bit(tmp_path: Path) -> None:
    """AdamW with 8-bit moments: it learns what AdamW does, nearly; a state holds its codes and scales."""
    pytest.importorskip("torchao")
    ends = {}
    for optimizer in ("adamw8bit", "adamw"):
        torch.manual_seed(0)
        net = nn.Linear(64, 64)
        modules, config = {"net": net}, FitConfig(steps=9, optimizer=optimizer, learning_rate=0.01, weight_decay=0.1)
        optimizers = build_optimizers(modules, config)
        assert optimizers[0].param_groups[0]["peak_lr"] == pytest.approx(0.01)
        found = []
        for _ in range(2):  # the second time from the state
            for step in range(3):
                net(torch.randn(4, 64, generator=torch.Generator().manual_seed(step))).square().mean().backward()
                optimizers[0].param_groups[0]["lr"] = 0.01  # as the loop sets it
                optimizers[0].step()
                optimizers[0].zero_grad()
                if step == 0 and not found:
                    with StateWriter(tmp_path / optimizer) as writer:
                        writer.save(1, tensors_of(modules, optimizers), {})
                if step == 0 and found:
                    state = newest_state(tmp_path / optimizer)
                    assert state is not None
                    state.read(into=tensors_of(modules, optimizers))
            found.append({name: value.clone() for name, value in tensors_of(modules, optimizers).items()})
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
        ends[optimizer] = found[0]
    moments = ends["adamw8bit"]
    assert moments["optimizer/net/weight/exp_avg.codes"].dtype == torch.uint8
    assert moments["optimizer/net/bias/exp_avg"].dtype == torch.float32
    assert torch.allclose(moments["net/weight"], ends["adamw"]["net/weight"], atol=5e-3)
    assert not torch.equal(moments["net/weight"], ends["adamw"]["net/weight"])


def test_moments_of_a_byte_are_refused_where_they_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    config = FitConfig(steps=9, optimizer="adamw8bit")
    with pytest.raises(InvalidRequest, match="needs torchao") as error:
        build_optimizers({"net": Net()}, config)
    assert "eight-bit" in error.value.hint
    with pytest.raises(InvalidRequest, match="spread over processes"):
        build_optimizers({"net": Net()}, dataclasses.replace(config, parallel=ParallelConfig(shard=0)))


def test_names_depend_on_modules_and_optimisers_alone() -> None:
    """Memory that is made for a state is what the first step would have made; nothing else moves."""
    modules, optimizers = start("muon")
    net, twin = modules["net"], copy.deepcopy(modules["net"])
    net.blocks[0].weight.grad = torch.ones(6, 6)
    first = tensors_of(modules, optimizers)
    assert {"optimizer/net/blocks.0.weight/momentum_buffer", "optimizer/net/blocks.0.bias/step"} < first.keys()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    assert net.blocks[0].weight.grad is not None
    assert net.blocks[0].bias.grad is None
    net.blocks[0].weight.grad = None
    fresh, others = start("muon")
    for each in ((modules, optimizers), (fresh, others)):
        steps(*each, 0, 3)
    wanted, found = tensors_of(fresh, others), tensors_of(modules, optimizers)
    assert first.keys() == wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_what_runs_a_module_does_not_change_its_names() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._checkpoint_wrapped_module = inner

    net = Net()
    plain = tensors_of({"net": net}).keys()
    net.blocks[0] = Wrapper(net.blocks[0])
    net.again = net.blocks[0]
    assert tensors_of({"net": net}).keys() == plain


def test_parameters_of_nobody_are_refused() -> None:
    with pytest.raises(ValueError, match="no module of the state"):
        tensors_of({"net": Net()}, [torch.optim.AdamW(Net().parameters())])


def test_files_are_plain_safetensors_of_any_type(tmp_path: Path) -> None:
    tensors = {f"m/{name}": torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in states.DTYPES.items()}
    tensors |= {"m/number": torch.tensor(1.5), "m/none": torch.zeros(0, 4), "m/turned": torch.randn(4, 3).T}
    with StateWriter(tmp_path) as writer:
        writer.save(1, tensors, {})
    stored = load_file(tmp_path / "step_00000001" / "m.safetensors")
    state = newest_state(tmp_path)
    assert state is not None
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    state.read(into=found)
    for name, tensor in tensors.items():
        assert stored[name].dtype == found[name].dtype == tensor.dtype
        for other in (stored[name], found[name]):
            assert torch.equal(other.double(), tensor.double()), name


def test_a_save_waits_for_the_one_before_and_not_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may, begun, write = threading.Event(), threading.Event(), states.write_tensors

    def slow(*args):
        begun.set()
        assert may.wait(60)
        return write(*args)

    monkeypatch.setattr(states, "write_tensors", slow)
    with StateWriter(tmp_path) as writer:
        live = some(1)
        writer.save(1, live, {})
        assert begun.wait(60)
        assert names(tmp_path) == []
        live["a/x"].fill_(7)  # the training goes on
        threading.Timer(0.1, may.set).start()
        writer.save(2, live, {})
        assert names(tmp_path) == [1]
    assert names(tmp_path) == [1, 2]
    read = some(0)
    state = states._open(tmp_path / "step_00000001")
    state.read(into=read)
    assert torch.equal(read["a/x"], some(1)["a/x"]), "what it was when it was saved"


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    with StateWriter(tmp_path, keep_last=2, keep_best=2) as writer:
        for step, score in enumerate([None, 0.5, 0.1, 0.4, 0.2, 0.9, 0.8, None], start=1):
            writer.save(step, some(step), {}, score)
    assert names(tmp_path) == [3, 5, 7, 8]
    state = newest_state(tmp_path)
    assert state is not None
    assert (state.step, state.score) == (8, None)
    save(tmp_path, 9, keep_last=1)
    assert names(tmp_path) == [9]


def test_a_state_that_is_reached_again_stays_or_is_replaced_if_it_was_damaged(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    manifest = tmp_path / "step_00000002" / "manifest.json"
    before = manifest.read_bytes()
    save(tmp_path, 2)
    assert manifest.read_bytes() == before
    (tmp_path / "step_00000002" / "a.safetensors").write_bytes(b"")
    with pytest.warns(Note, match=r"step_00000002 is damaged and passed over: a.safetensors has 0 bytes"):
        state = newest_state(tmp_path)
    assert state is not None
    assert state.step == 1
    save(tmp_path, 2)
    state = newest_state(tmp_path)
    assert state is not None
    assert state.step == 2


@pytest.mark.gpu
def test_a_save_from_a_gpu_is_what_was_there(tmp_path: Path) -> None:
    """The copies are under way when `save` returns at the latest; the training overwrites the tensors at once."""
    live = {name: tensor.cuda() for name, tensor in {**some(1), "c/z": torch.ones(2**24)}.items()}
    with StateWriter(tmp_path) as writer:
        for step in (1, 2):
            writer.save(step, live, {})
            for tensor in live.values():
                tensor.zero_()
        writer.wait()
        for step, name in ((1, "step_00000001"), (2, "step_00000002")):
            read = {name: torch.full_like(tensor, 5) for name, tensor in live.items()}
            states._open(tmp_path / name).read(into=read)
            assert bool((read["c/z"] == (1 if step == 1 else 0)).all())
            assert read["c/z"].is_cuda


def test_nobody_begins_anew_where_all_states_are_damaged(tmp_path: Path) -> None:
    assert newest_state(tmp_path / "nothing") is None
    (tmp_path / "step_00000007").mkdir()  # of an older version, or cut off
    with (
        pytest.warns(Note, match="manifest.json is missing"),
        pytest.raises(FileError, match=r"no state in .* is whole"),
    ):
        newest_state(tmp_path)


def test_a_state_of_something_else_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    save(tmp_path, 1)
    state = newest_state(tmp_path)
    assert state is not None
    good = some(0)
    others = {
        "lacks c/z": good | {"c/z": torch.zeros(1)},
        "has b/y too": {"a/x": good["a/x"]},
        r"a/x is torch.float32 \[2, 3\] here": good | {"a/x": torch.zeros(2, 3)},
        "b/y is torch.int32": good | {"b/y": torch.tensor(0, dtype=torch.int32)},
    }
    for words, other in others.items():
        with pytest.raises(FileError, match=words):
            state.read(into=other)
        assert all(not tensor.any() for tensor in other.values())
    alone = {"a/x": good["a/x"]}
    state.read(into=alone, some=True)
    assert torch.equal(alone["a/x"], some(1)["a/x"])


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_fails_is_told_and_the_state_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    save(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "optimizer.safetensors")

    monkeypatch.setattr(states, "write_manifest", full)
    with pytest.raises(FileError, match=r"state of step 2 was not saved.*\n.*No space left on device"):
        save(tmp_path, 2, asynchronous=asynchronous)
    with pytest.warns(Note, match="goes on without a newer state"):
        save(tmp_path, 3, asynchronous=asynchronous, on_error="go on")

    def stopped() -> None:
        with StateWriter(tmp_path) as writer:
            writer.save(4, some(4), {})
            raise KeyError  # what ended the training is what is seen

    with pytest.warns(Note, match="step 4 was not saved"), pytest.raises(KeyError):
        stopped()
    assert names(tmp_path) == [1]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".lock"]


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9, 9, 10))
    with pytest.raises(FileError, match="GB are free"):
        save(tmp_path, 1)
    assert names(tmp_path) == []


def test_two_trainings_cannot_share_a_folder(tmp_path: Path) -> None:
    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('x', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(FileError, match="another run is training into"):
            StateWriter(tmp_path)
        other.communicate(b"\n")
    save(tmp_path, 1)
    save(tmp_path, 2)


def test_all_is_on_the_disk_before_the_state_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut cannot undo: files, then their folder, then the name, then the folder above."""
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def moved(source: Path, target: Path) -> None:
        replace(source, target)
        events.append(("move", str(target)))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved)
    save(tmp_path, 1)
    part = tmp_path / ".step_00000001.part"
    named = events.index(("move", str(tmp_path / "step_00000001")))
    files = ["a.safetensors", "b.safetensors", "manifest.json"]
    assert sorted(path.name for path in (tmp_path / "step_00000001").iterdir()) == files
    before = [path for kind, path in events[:named] if kind == "sync"]
    assert {str(part / name) for name in files} <= set(before)
    assert before[-1] == str(part), "the folder of the files, after the last of them"
    assert before[-2] == str(part / "manifest.json"), "which is the manifest"
    assert events[named + 1 :] == [("sync", str(tmp_path))]


def test_litter_of_a_killed_save_is_swept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / ".step_00000002.part")
    assert names(tmp_path) == [1]
    save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step_00000001", "step_00000003"]


def test_bad_settings_and_facts_are_refused(tmp_path: Path) -> None:
    for settings in ({"keep_last": 0}, {"keep_best": -1}, {"on_error": "hope"}):
        with pytest.raises(InvalidRequest):
            StateWriter(tmp_path, **settings)
    with StateWriter(tmp_path) as writer, pytest.raises(ValueError, match="not JSON compliant"):
        writer.save(1, some(1), {"loss": float("nan")})


def test_changed_settings_are_applied_loudly_or_refused_never_ignored() -> None:
    fit = {"steps": 10, "learning_rate": 0.1, "betas": (0.9, 0.99), "optimizer": "adamw", "seed": 0}
    saved = {"fit": fit, "stages": [{"batch_size": 4}], "batch_size": 8}
    same = json.loads(json.dumps(saved))
    assert settings_to_apply(saved, same) == {}
    now = same | {"fit": fit | {"learning_rate": 0.05, "betas": [0.9, 0.95], "steps": 20}}
    with pytest.warns(Note) as notes:
        applied = settings_to_apply(saved, now)
    assert applied == {"fit.learning_rate": (0.1, 0.05), "fit.betas.1": (0.99, 0.95), "fit.steps": (10, 20)}
    assert "fit.learning_rate was 0.1, is 0.05 from now on" in {str(note.message) for note in notes}
    for change, words in (
        ({"fit": fit | {"seed": 1}}, "fit.seed was 0, is 1"),
        ({"fit": fit | {"optimizer": "muon"}}, 'fit.optimizer was "adamw", is "muon"'),
        ({"batch_size": 16}, "batch_size was 8, is 16"),
        ({"stages": [{"batch_size": 2}]}, "stages.0.batch_size was 4, is 2"),
        ({"stages": []}, "stages was absent"),
        ({"new": 1}, "new was absent, is 1"),
    ):
        with pytest.raises(FileError, match=words):
            settings_to_apply(saved, now | change)
    with pytest.raises(FileError, match="batch_size was 8, is absent"):
        settings_to_apply(saved, {name: value for name, value in same.items() if name != "batch_size"})


def test_every_setting_of_a_fit_that_may_change_is_one(tmp_path: Path) -> None:
    """A renamed setting cannot stay on the list, where it would allow nothing, or something else."""
    fields = set(FitConfig.__dataclass_fields__)
    assert {name.split(".")[0] for name in states.FIT} <= fields


def test_two_hundred_damaged_states_are_refused(tmp_path: Path, script) -> None:
    result = script("fault_sweep").sweep_damage(tmp_path, 200)
    assert result["lost"] == []
    assert (result["damaged"], result["refused"]) == (200, 200)


def sweep(*arguments: str) -> dict:
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    run = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment)
    result = json.loads(run.stdout)
    assert result["lost"] == [], run.stderr[-2000:]
    assert run.returncode == 0
    return result


def test_a_fault_at_file_operations_of_a_save_loses_nothing() -> None:
    """Every third of them here; all in the slow test."""
    result = sweep("calls", "--every", "3")
    assert result["operations"] >= 40
    assert result["points"] >= 60


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["calls", "strace"])
def test_a_fault_at_every_file_operation_of_a_save_loses_nothing(kind: str) -> None:
    if kind == "strace" and not shutil.which("strace"):
        pytest.skip("needs strace")
    assert sweep(kind)["points"] >= 60


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_process_of_two_that_is_killed_while_they_save_loses_nothing() -> None:
    assert sweep("ranks", "--every", "3")["points"] >= 18
