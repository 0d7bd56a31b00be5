"""The processes torchrun started, as a mesh: guidance × sequence.

Neighbours in a row of the mesh (a sequence group) share one half of guidance and exchange much; the rows meet once per
step. All processes together decode.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from videogen.errors import InvalidRequest


@dataclass(frozen=True)
class Mesh:
    """Which process this is, and the groups it works in."""

    grid: DeviceMesh  # named dimensions "guidance" and "sequence"; entries are ranks

    @property
    def shape(self) -> tuple[int, int]:
        """Degrees (guidance, sequence)."""
        return self.grid.size(0), self.grid.size(1)

    @property
    def place(self) -> tuple[int, int]:
        """(guidance, sequence) of this process."""
        return self.grid.get_local_rank("guidance"), self.grid.get_local_rank("sequence")

    @property
    def sequence(self) -> dist.ProcessGroup:
        """The processes that share a half of guidance, each with a part of its tokens."""
        return self.grid.get_group("sequence")

    @property
    def everyone(self) -> dist.ProcessGroup:
        group = dist.group.WORLD
        assert group is not None
        return group

    def leader(self, half: int) -> int:
        """The rank that speaks for a row of the mesh."""
        return int(self.grid.mesh[half, 0])


def start(device: str = "auto") -> torch.device:
    """Join the other processes and take this one's device: GPU `LOCAL_RANK` with NCCL, the CPU with gloo.

    "cuda" means that GPU from now on, so that a model loaded with device="cuda" lands on it.
    """
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        raise InvalidRequest(
            "this process has no others to work with.",
            why="torchrun starts the processes and tells each its place.",
            hint="torchrun --nproc-per-node 2 -m videogen text-to-video ...",
        )
    use_cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    if not use_cuda:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        return torch.device("cpu")
    here, found = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if device not in ("auto", "cuda") or here > found:
        raise InvalidRequest(
            f"{here} processes were started on a machine with {found} GPUs, for device {device!r}.",
            why="process i takes GPU i.",
            hint=f"torchrun --nproc-per-node {found} and --device cuda" if found else "--device cpu",
            param="device",
        )
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl", device_id=chosen)
    return chosen


def make_mesh(heads: int, *, is_guided: bool = True) -> Mesh:
    """All processes as guidance × sequence for a model of `heads` attention heads; every process must call it."""
    shape = degrees(dist.get_world_size(), heads, is_guided=is_guided)
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return Mesh(init_device_mesh(kind, shape, mesh_dim_names=("guidance", "sequence")))


def degrees(processes: int, heads: int, *, is_guided: bool = True) -> tuple[int, int]:
    """(guidance, sequence) whose product is `processes`: guidance in two if it can be, the rest is sequence.

    >>> degrees(8, 48), degrees(3, 48), degrees(6, 30), degrees(2, 30, is_guided=False)
    ((2, 4), (1, 3), (2, 3), (1, 2))
    """
    halves = (2, 1) if is_guided else (1,)
    for half in halves:
        if processes % half == 0 and heads % (processes // half) == 0:
            return half, processes // half
    fitting = [n for n in range(1, processes) if any(n % half == 0 and heads % (n // half) == 0 for half in halves)]
    raise InvalidRequest(
        f"{processes} processes cannot share this model's {heads} attention heads.",
        why="within each half of guidance, every process takes as many heads as the others.",
        hint=f"torchrun --nproc-per-node with {' or '.join(map(str, fitting))}",
        param="nproc_per_node",
    )


def part_sizes(length: int, parts: int) -> list[int]:
    """`length` in `parts` consecutive parts that differ by one at most, larger ones first.

    >>> part_sizes(17776, 6)
    [2963, 2963, 2963, 2963, 2962, 2962]
    """
    return [length // parts + (i < length % parts) for i in range(parts)]
