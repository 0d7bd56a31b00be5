"""Several processes give what one gives. What they do is in `checks.py`; they are started once for each count."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import cache

import checks
import processes
import pytest
import torch

from videogen import distributed
from videogen.cli import main
from videogen.distributed.mesh import degrees, start
from videogen.distributed.vae import choose
from videogen.errors import InvalidRequest, VideogenError

SLOW = {3: [pytest.mark.slow]}
NAMES = [
    pytest.param(count, check.__name__, marks=SLOW.get(count, []))
    for count, some in checks.CHECKS.items()
    for check in some
]
results = cache(processes.run)


@pytest.mark.parametrize(("count", "name"), NAMES, ids=lambda value: str(value))
def test_processes(count, name):
    assert not results(count)[name], results(count)[name]


@pytest.mark.gpu
def test_two_gpus():
    """The same over NCCL, with everything on the GPUs."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    found = processes.run(2, device="cuda")
    assert not any(found.values()), found


def torchrun(count: int, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.run(
        [*command, "-m", "videogen", "text-to-video", "a red circle moves right", "--device", "cpu", *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_torchrun_makes_the_same_clip_of_the_bundled_model(tmp_path, count):
    """Two: guidance, and the VAE in time. Three: sequence, and the VAE in space."""
    flags = ["--steps", "3", "--seed", "7", "--dtype", "float64", "--crf", "0"]
    done = torchrun(count, *flags, "--out", str(tmp_path / "many.mp4"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'many.mp4'}\n"
    assert main(["text-to-video", "a red circle moves right", *flags, "--out", str(tmp_path / "one.mp4")]) == 0
    assert (tmp_path / "many.mp4").read_bytes() == (tmp_path / "one.mp4").read_bytes()


@pytest.mark.slow
def test_an_error_ends_all_processes_and_is_said_once():
    done = torchrun(4, "--steps", "1")
    assert done.returncode != 0
    assert done.stderr.count("error: 4 processes cannot share this model's 3 attention heads.") == 1
    assert "with 1 or 2 or 3" in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_an_interrupt_ends_all_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "videogen"]
    flags = ["text-to-video", "a red circle", "--device", "cpu", "--steps", "900", "--out", str(tmp_path / "clip.mp4")]
    run = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert run.stderr is not None
    try:
        heard = []
        while "denoise" not in (heard or [""])[-1]:
            heard.append(run.stderr.readline())
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        rest = run.communicate(timeout=60)[1]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode != 0
    assert rest.count("interrupted") == 1
    assert list(tmp_path.iterdir()) == []


def test_of_what_all_meet_the_first_speaks(monkeypatch):
    """The others are ended by torchrun while they wait; who is not was alone with it."""
    waited = []
    monkeypatch.setattr(distributed.time, "sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, seconds in (("0", 0), ("1", distributed.PATIENCE)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(InvalidRequest), distributed.one_voice():
            raise InvalidRequest("no")
        assert waited.pop() == seconds
        with pytest.raises(VideogenError, match=f"process {rank} lost another one"), distributed.one_voice():
            raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
        with pytest.raises(RuntimeError, match="of its own"), distributed.one_voice():
            raise RuntimeError("of its own")
        with pytest.raises(SystemExit if rank == "1" else KeyboardInterrupt), distributed.one_voice():
            raise KeyboardInterrupt
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(InvalidRequest), distributed.one_voice():
        raise InvalidRequest("no")


def test_starts_that_cannot_work_are_said(monkeypatch):
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InvalidRequest, match="no others to work with"):
        start()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InvalidRequest, match="4 processes were started on a machine with 2 GPUs") as error:
        start("auto")
    assert "--nproc-per-node 2" in str(error.value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InvalidRequest, match="device 'cuda:1'"):
        start("cuda:1")


def test_standard_input_has_one_reader(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["text-to-video", "-"]) == 2
    assert "several processes cannot read the same standard input" in capsys.readouterr().err


def test_degrees():
    assert degrees(2, 30) == (2, 1)
    assert degrees(2, 30, is_guided=False) == (1, 2)
    assert degrees(5, 30) == (1, 5)
    assert degrees(8, 48) == (2, 4)
    with pytest.raises(InvalidRequest, match="8 processes cannot share this model's 30 attention heads") as error:
        degrees(8, 30)
    assert "with 1 or 2 or 3 or 4 or 5 or 6" in str(error.value)


def test_how_the_vae_is_split():
    """49 frames are chunks of 3, 2, 2, 2, 2 and 2 latents of 60 rows."""
    chunks = [3, 2, 2, 2, 2, 2]
    assert [choose(chunks, 60, n) for n in (1, 2, 3, 4, 8)] == [None, "time", "time", "space", "space"]
    assert [choose(chunks, 60, n, fast=True) for n in (2, 4, 8)] == ["time"] * 3  # strips have plain rows only
    assert choose([1], 60, 2) == "space"
    assert choose([1], 60, 8, fast=True) == "space"
    assert choose([1], 3, 4) is None
    assert choose([3, 2], 3, 4) == "time"
