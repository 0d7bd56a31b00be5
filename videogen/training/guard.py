"""One run is one group of processes: what keeps copies that know nothing of each other from training side by side.

Started by the wrong command, N processes each train alone, on the same samples, into the same folder, and nothing looks
wrong. Launchers leave traces in the environment; the folder can be locked; the group can be counted.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from videogen.errors import InvalidRequest, Note
from videogen.training.state_files import lock

# How many processes a launcher started, by the variable in which it tells them so: Slurm's srun, and MPI's launchers.
STARTED = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
}
TORCHRUN = "torchrun --nproc-per-node N scripts/train.py CONFIG   (on several nodes: scripts/launch/)"


def check_launch(environment: Mapping[str, str]) -> None:
    """Refuse an environment in which other processes were started that this one would not hear of.

    `environment` is `os.environ`. torchrun, and what stands in its place, gives WORLD_SIZE, RANK and where to meet.
    Raises InvalidRequest.
    """
    world = _count(environment, "WORLD_SIZE", 1)
    torchrun = "TORCHELASTIC_RUN_ID" in environment  # the launcher's copies are torchruns then, not this process's like
    local = _count(environment, "LOCAL_WORLD_SIZE", 1) if torchrun else 1
    for name, launcher in STARTED.items():
        launched = _count(environment, name, 1)
        if launched > 1 and launched * local > world:
            each = f" of {local} processes" if local > 1 else ""
            raise InvalidRequest(
                f"{launcher} started {launched} copies{each}, and this one knows of {world} in all.",
                why=f"{name}={launched}, but WORLD_SIZE={environment.get('WORLD_SIZE', 'is not set')}: they would "
                "train side by side without exchanging anything.",
                hint="one torchrun per node, all with the same --rdzv-endpoint: scripts/launch/.",
                param="WORLD_SIZE",
            )
    if world == 1 and "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment:
        raise InvalidRequest(
            "accelerate was asked for several processes and started one.",
            why="without GPUs `accelerate launch` starts a single process, and says nothing.",
            hint=TORCHRUN,
            param="WORLD_SIZE",
        )
    meeting = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    if world > 1 and (missing := [name for name in meeting if not environment.get(name)]):
        raise InvalidRequest(
            f"WORLD_SIZE is {world}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set.",
            why="the processes could not find each other.",
            hint=TORCHRUN,
            param="WORLD_SIZE",
        )


def check_devices(environment: Mapping[str, str], gpus: int) -> None:
    """Refuse more processes on this machine than it has GPUs; say it where GPUs are left idle. None: nothing to say."""
    local = _count(environment, "LOCAL_WORLD_SIZE", 1)
    if gpus and local > gpus:
        raise InvalidRequest(
            f"{local} processes were started for {gpus} GPU{'s' if gpus > 1 else ''}.",
            why="each needs one of its own.",
            hint=f"--nproc-per-node {gpus}, or more in CUDA_VISIBLE_DEVICES.",
            param="WORLD_SIZE",
        )
    if local < gpus:
        idle = gpus - local
        note = f"{idle} of {gpus} GPUs stay idle: torchrun --nproc-per-node {gpus} uses them all"
        warnings.warn(Note(note), stacklevel=2)


def check_group(environment: Mapping[str, str]) -> None:
    """Count the processes that really exchange messages: as many as WORLD_SIZE promised. Raises InvalidRequest."""
    world, met = _count(environment, "WORLD_SIZE", 1), 1
    if dist.is_initialized():
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        ones = torch.ones((), device=device)
        dist.all_reduce(ones)
        met = round(float(ones))
    if met != world:
        raise InvalidRequest(
            f"WORLD_SIZE is {world}, and {met} process{'es' if met > 1 else ''} met.",
            why="the others would train without this one.",
            hint=TORCHRUN,
            param="WORLD_SIZE",
        )


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """For the time of a `with`, no other run may write to `folder`: the lock is the kernel's and ends with the process.

    Raises FileError that names the process that has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = lock(folder, ".run.lock")  # not that of its states, which the run itself takes
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _count(environment: Mapping[str, str], name: str, otherwise: int) -> int:
    text = environment.get(name, "")
    if text and not text.isdecimal():
        raise InvalidRequest(f"{name} is {text!r}.", why="it is a number of processes.", hint=TORCHRUN, param=name)
    return int(text) if text else otherwise
