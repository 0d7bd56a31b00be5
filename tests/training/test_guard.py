"""Copies of a run that know nothing of each other are refused: by the launcher's traces, the folder, the count."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from videogen.errors import FileError, InvalidRequest
from videogen.training.guard import alone, check_devices, check_group, check_launch
from videogen.training.run import main

MEET = {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", **MEET}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", **MEET},  # torchrun
        {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "2", **TORCHRUN},  # one per node
        {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "16", **MEET},  # srun, a task per GPU
        {"WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "4", **MEET},  # srun, with the variables exported
        {"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "bf16", **MEET},  # accelerate launch on GPUs
        {"ACCELERATE_MIXED_PRECISION": "no"},  # accelerate launch of one process
        {"SLURM_NTASKS": "8"},  # a batch script for eight, whose first line is this command
    ],
)
def test_a_run_whose_processes_know_of_each_other_starts(environment) -> None:
    check_launch(environment)


@pytest.mark.parametrize(
    ("environment", "word"),
    [
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun started 8 copies"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 copies"),
        ({"PMI_SIZE": "4", "WORLD_SIZE": "2", **MEET}, "knows of 2"),
        # a torchrun on each of 2 nodes, without a common place to meet: two groups of eight
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "2", **TORCHRUN}, "of 8 processes"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2", **TORCHRUN}, "of 2 processes"),
        # `accelerate launch --cpu --num_processes 2` starts one process and sets where to meet, not how many
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "started one"),
        ({"WORLD_SIZE": "4"}, "RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE is 'four'"),
    ],
)
def test_copies_that_know_nothing_of_each_other_are_refused(environment, word) -> None:
    with pytest.raises(InvalidRequest, match=word) as error:
        check_launch(environment)
    assert error.value.why
    assert error.value.hint


def test_accelerate_sets_on_a_cpu_what_the_guard_looks_for() -> None:
    pytest.importorskip("accelerate")
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    kind = {"num_processes": "2", "num_machines": "1", "mixed_precision": "no", "dynamo_backend": "no"}
    asked = ["--cpu", *(word for name, value in kind.items() for word in (f"--{name}", value)), "scripts/train.py"]
    _, environment = prepare_simple_launcher_cmd_env(launch_command_parser().parse_args(asked))
    with pytest.raises(InvalidRequest, match="accelerate was asked for several"):
        check_launch({name: value for name, value in environment.items() if name not in os.environ})


def test_every_process_has_a_gpu_and_idle_ones_are_named() -> None:
    check_devices({"LOCAL_WORLD_SIZE": "4"}, 4)
    check_devices({}, 0)
    with pytest.raises(InvalidRequest, match="8 processes were started for 4 GPUs"):
        check_devices({"LOCAL_WORLD_SIZE": "8"}, 4)
    with pytest.warns(UserWarning, match="7 of 8 GPUs stay idle"):
        check_devices({}, 8)


def test_fewer_processes_than_promised_are_refused() -> None:
    check_group({})
    with pytest.raises(InvalidRequest, match="WORLD_SIZE is 2, and 1 process met"):
        check_group({"WORLD_SIZE": "2"})


HOLDER = """
import sys, time
from pathlib import Path
from videogen.training.guard import alone
from videogen.training.run import main
with alone(Path(sys.argv[1])):
    print("here", flush=True)
    time.sleep(600)
"""


def test_a_folder_belongs_to_one_run_until_that_ends_even_by_kill(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "here\n"
        with pytest.raises(FileError, match="another run") as error, alone(tmp_path):
            pass
        assert str(other.pid) in error.value.why
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    with alone(tmp_path), pytest.raises(FileError), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


def test_a_training_is_refused_before_it_begins(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(InvalidRequest, match="srun started 4 copies"):
        main("configs/train/lora-tiny.yaml", [f"folder={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()
