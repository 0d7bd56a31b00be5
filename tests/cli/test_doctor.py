"""`videogen doctor`: all is tried for real, problems come with a fix, and only what is needed counts as broken."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest

from videogen.cli import doctor, main
from videogen.cli.doctor import FIX, NOTE, OK, examine


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def findings(check) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in check()}


def test_all_that_is_needed_works_here_in_a_moment(here, capsys):
    list(examine())  # imports
    started = time.process_time()
    assert main(["doctor"]) == 0
    assert time.process_time() - started < 5
    out, err = capsys.readouterr()
    assert "all that is needed works" in err
    for line in (
        "ok    packages",
        "ok    codecs",
        "sdpa",
        "ok    bundled model",
        "compiler",
    ):
        assert line in out
    assert "float32, bfloat16, float16" in out
    assert list(here.iterdir()) == [], "nothing is left behind"


def test_json_says_the_same(here, capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["broken"] == 0
    assert {finding["status"] for finding in facts["findings"]} <= {OK, NOTE}
    assert all(finding["found"] for finding in facts["findings"])
    names = {finding["name"] for finding in facts["findings"]}
    assert {"torch", "cuda", "dtypes on cpu", "memory", "disk of the cache", "triton", "network"} <= names


def test_what_is_broken_says_how_to_fix_it_and_is_an_exit_code(here, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "installed", lambda name: "0.1" if name == "torch" else None)
    found = findings(doctor.packages)["packages"]
    assert (found.status, found.fix.split()[:2]) == (FIX, ["pip", "install"])
    assert "torch 0.1 (needs >=" in found.found
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert "fix   packages" in out
    assert "to fix" in err


def test_a_damaged_bundled_model_is_found(here, monkeypatch):
    def damaged(folder):
        from videogen.errors import ModelNotFound

        raise ModelNotFound("1 file differs.", why="damaged: vae/x.safetensors")

    monkeypatch.setattr("videogen.weights.diffusers.verify_folder", damaged)
    found = findings(doctor.bundled_model)["bundled model"]
    assert found.status == FIX
    assert "vae/x.safetensors" in found.found


def test_codecs_are_tried(here, monkeypatch):
    def broken(path, *_, **__):
        raise ValueError("no such encoder")

    monkeypatch.setattr("videogen.data.video.write_video", broken)
    found = findings(doctor.codecs)
    assert (found["codec mp4"].status, found["codec gif"].status) == (FIX, NOTE)
    assert "no such encoder" in found["codec mp4"].found


def test_missing_kernels_are_notes_with_a_way_to_get_them(here):
    found = findings(doctor.kernels)
    assert found["attention"].status == OK
    others = [finding for name, finding in found.items() if name != "attention"]
    assert all(finding.status == NOTE and finding.found for finding in others)


def test_a_check_that_fails_is_a_finding(here, monkeypatch):
    def hub():
        raise RuntimeError("AttributeError: Surprise, a CUDA one\nand more")
        yield

    monkeypatch.setattr(doctor, "hub", hub)
    found = {finding.name: finding for finding in examine()}
    assert (found["hub"].status, found["hub"].found) == (FIX, "surprise, a CUDA one")


def test_low_disk_and_offline_are_notes(here, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    assert {f.status for f in doctor.disk()} == {NOTE}
    assert all("little room" in f.found and f.fix for f in doctor.disk())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert findings(doctor.hub)["network"].fix.startswith("unset HF_HUB_OFFLINE")


def test_a_driver_without_a_cuda_build_is_told(here, monkeypatch):
    import torch

    if torch.version.cuda:
        pytest.skip("this torch is built with CUDA")
    monkeypatch.setattr(doctor, "driver_version", lambda: "570.1")
    found = findings(doctor.torch_and_devices)["cuda"]
    assert found.status == NOTE
    assert "pip install torch" in found.fix
