"""Every attack of `attacks.py`, tried in a process of its own: refused or without effect, soon and in little memory.

Nothing is executed, nobody is connected to, no file outside is read or changed. docs/security.md shows what this finds.
"""

from __future__ import annotations

import ast
import json
import os
import random
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import attacks
import numpy as np
import pytest

from videogen.data.video import write_video
from videogen.errors import ModelNotFound
from videogen.testing import tiny_pipeline
from videogen.weights.diffusers import verify_folder, verify_on_load

ROOT = Path(__file__).parents[2]
THREATS = ["T1", "T2", "T3", "T4", "T5", "T6", "T7", "T8", "T9", "T10", "T11", "T13", "T14", "T16", "T18", "T19", "F4"]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    command = [sys.executable, str(Path(attacks.__file__))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("threat", THREATS)
def test_every_attack_is_stopped(rows, threat):
    own = [row for row in rows if row["threat"] == threat]
    assert own
    assert not list(filter(None, map(attacks.failed, own)))


def test_what_must_be_noticed_is_noticed(rows):
    """The watch itself: a row that opened, ran or took too much would not pass."""
    good = {"threat": "T0", "name": "x", "outcome": "refused", "expected": ["refused"], "text": ""}
    good |= {"cpu": 0.1, "seconds": 0.1, "megabytes": 1, "events": []}
    assert not attacks.failed(good)
    worse = [{"outcome": "harmless"}, {"cpu": 3}, {"megabytes": 300}, {"seconds": 31}, {"events": ["os.system"]}]
    assert all(attacks.failed(good | change) for change in worse)
    assert {row["threat"] for row in rows} == set(THREATS)
    assert sum(row["outcome"] == attacks.HARMLESS for row in rows) > 20, "models and clips that are good do open"


def test_the_page_counts_these_attacks(rows):
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    told = {cells[0]: int(cells[1]) for cells in re.findall(r"^\| (\w+) \| (\d+) \| \d+ \|", page, re.MULTILINE)}
    counted = {threat: sum(row["threat"] == threat for row in rows) for threat in THREATS}
    assert told == counted | {"all": len(rows)}


# ---- the code itself ------------------------------------------------------------------------------------------------

UNSAFE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads"}
UNSAFE |= {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.load", "importlib.import_module", "shelve.open"}
ALLOWED = {
    ("runtime/kernels.py", "__import__"),  # a package by a name in the code
    ("cli/doctor.py", "__import__"),
    ("weights/unpickle.py", "torch.load"),  # the child process of `convert`: with weights_only
    ("weights/convert.py", "torch.load"),
    ("weights/sat.py", "torch.load"),
}


def calls(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_no_code_runs_what_it_reads():
    for path in sorted((ROOT / "videogen").rglob("*.py")):
        name = path.relative_to(ROOT / "videogen").as_posix()
        for function, options in calls(path):
            assert function not in UNSAFE or (name, function) in ALLOWED, f"{name} calls {function}"
            assert function != "torch.load" or options.get("weights_only") == "True", name
            for option in ("trust_remote_code", "allow_pickle", "shell"):
                assert options.get(option, "False") == "False", f"{name}: {function}({option})"


def test_libraries_with_known_holes_are_too_old():
    """CVE-2026-24747 (torch), CVE-2026-1260 (sentencepiece), CVE-2026-4372 (transformers)."""
    needed = dict(
        re.match(r"([\w-]+)(.*)", line).groups() for line in requires("videogen") or [] if "extra" not in line
    )
    text = (ROOT / "pyproject.toml").read_text()
    assert "2.10" in needed["torch"]
    assert '"sentencepiece>=0.2.1"' in text
    assert re.search(r'"transformers>=5\.[3-9]', text)


# ---- files that are written -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return tiny_pipeline().save(tmp_path_factory.mktemp("saved") / "model")


def test_no_damage_passes_the_hashes(saved):
    """200 random flips, cuts, zeros, additions and swaps, over all files: every one is found and named."""
    random.seed(0)
    verify_folder(saved)
    files = sorted(json.loads((saved / "videogen.json").read_text())["sha256"])
    for _ in range(200):
        name = random.choice(files)
        path, good = saved / name, (saved / name).read_bytes()
        data, at = bytearray(good), random.randrange(len(good))
        kind = random.choice(["flip", "cut", "zero", "add", "swap"])
        if kind == "flip":
            data[at] ^= 1 << random.randrange(8)
        elif kind == "cut":
            del data[at:]
        elif kind == "zero":
            data[at:] = bytes(len(data) - at)
        elif kind == "add":
            data += b"x"
        else:
            data = bytearray((saved / files[files.index(name) - 1]).read_bytes())
        if data == good:
            continue
        path.write_bytes(data)
        with pytest.raises(ModelNotFound, match=re.escape(name)):
            verify_on_load(saved)
        path.write_bytes(good)
    verify_on_load(saved)


def test_large_models_compare_sizes_unless_asked(saved, monkeypatch):
    monkeypatch.setattr("videogen.weights.diffusers.VERIFIED", 0)
    path = saved / "vae/diffusion_pytorch_model.safetensors"
    good = path.read_bytes()
    try:
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        verify_on_load(saved)
        with pytest.raises(ModelNotFound, match="damaged: vae"):
            verify_on_load(saved, verify=True)
        path.write_bytes(good[:-1])
        with pytest.raises(ModelNotFound, match="damaged: vae"):
            verify_on_load(saved)
        path.unlink()
        with pytest.raises(ModelNotFound, match="missing: vae"):
            verify_on_load(saved)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_are_synced_renamed_and_follow_the_umask(tmp_path, monkeypatch, umask):
    """Models, clips and states: no file reaches its name before its bytes reach the disk."""
    import torch
    from torch import nn

    from videogen.data.latents import save_latents
    from videogen.models.lora import Update
    from videogen.runtime.step_cache import Curve, save_curve
    from videogen.training.state import StateWriter, tensors_of
    from videogen.weights.hub import _write_ref
    from videogen.weights.lora import save_lora

    events: list[tuple[str, str]] = []
    fsync, replace, rename = os.fsync, os.replace, Path.rename

    def synced(descriptor: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def moved(source, target, call=replace):
        events.append(("move", str(source)))
        return call(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved)
    monkeypatch.setattr(Path, "rename", lambda self, target: moved(self, target, rename))
    before = os.umask(umask)
    try:
        model = tiny_pipeline().save(tmp_path / "model")
        clip = write_video(tmp_path / "clip.mp4", np.zeros((2, 16, 16, 3), np.uint8), 8)
        frames = write_video(tmp_path / "frames.png", np.zeros((2, 16, 16, 3), np.uint8), 8)
        with StateWriter(tmp_path / "run") as writer:
            writer.save(1, tensors_of({"model": nn.Linear(2, 2)}), {})
        state = tmp_path / "run" / "step_00000001"
        single = [save_curve(tmp_path / "curve", Curve((0.0,), (1.0,)), transformer_sha256=None)]
        single.append(save_lora(tmp_path / "lora", {"proj_out": Update(torch.ones(1, 8), torch.ones(8, 1), 1.0)}))
        single.append(save_latents(tmp_path / "late" / "clip.mp4", torch.zeros(1, 1, 1, 1), {}))
        _write_ref(tmp_path / "refs" / "main", "0" * 40)
    finally:
        os.umask(before)
    files = [p for folder in (model, frames, state) for p in folder.rglob("*") if p.is_file()]
    files += [clip, *single, tmp_path / "refs" / "main"]
    assert {p.stat().st_mode & 0o777 for p in files} == {0o666 & ~umask}
    moves = {source: index for index, (kind, source) in enumerate(events) if kind == "move"}
    for source, index in moves.items():
        inside = [path for kind, path in events[:index] if kind == "sync" and path.startswith(source)]
        assert inside, f"{source} was renamed before it was synced"
    assert len(moves) >= 8, "all of them are renamed"
    synced_names = {Path(path).name for kind, path in events if kind == "sync"}
    inside = [p for folder in (model, frames, state) for p in folder.rglob("*") if p.is_file()]
    assert {p.name for p in inside} <= synced_names
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
