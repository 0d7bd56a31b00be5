"""The processes of a run: joining the group, and what they exchange besides tensors of the model."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Float64
from torch import Tensor, nn


def join_process_group(timeout: float = 1800.0) -> tuple[int, int]:
    """(rank, world size): 0 of 1, or this process's place among those that torchrun started.

    timeout  seconds after which an exchange with a process that does not answer fails; the first call decides
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout or 1800.0))
    return (dist.get_rank(), world) if world > 1 else (0, 1)


@runtime_checkable
class Parallel(Protocol):
    """How a model is spread over processes, as the loop sees it (`distributed.training`, or `Replicated` below).

    Processes that compute parts of the same samples share a data rank.
    """

    @property
    def data_rank(self) -> int: ...

    @property
    def data_world(self) -> int: ...

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around the forward and backward pass of each of a step's micro-batches."""
        ...

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """After the last: gradients become their sums over the data ranks."""
        ...

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        """Scale gradients to a norm of `max_norm` at most; the norm before, the same on all processes."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the data ranks."""
        ...


@dataclass(frozen=True)
class Replicated:
    """Every process holds the whole model and computes samples of its own; one message sums the gradients."""

    data_rank: int = 0
    data_world: int = 1

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        if self.data_world == 1 or not parameters:
            return
        reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32).to(parameters[0].device)
        dist.all_reduce(reached)
        parameters = list(itertools.compress(parameters, reached.tolist()))  # the others rest, as in one process
        if not parameters:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = total.view_as(parameter)

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        return float(nn.utils.clip_grad_norm_(parameters, max_norm))

    def sum(self, tensor: Tensor) -> Tensor:
        if self.data_world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor


def sum_over_all(numbers: Float64[Tensor, " n"]) -> list[float]:
    """Each number's sum over all processes, in one message."""
    if dist.is_initialized():
        numbers = numbers.clone()
        dist.all_reduce(numbers)
    return numbers.tolist()


def gather_values(value: Any, device: torch.device, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What each process gives, by rank: anything JSON holds, in tensors on `device`. Of a `group`, or of all."""
    text = json.dumps(value).encode()
    if not dist.is_initialized():
        return [json.loads(text)]
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    sizes = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor(len(data), device=device), group=group)
    longest = max(int(size) for size in sizes)
    texts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in sizes]
    dist.all_gather(texts, nn.functional.pad(data, (0, longest - len(data))), group=group)
    return [json.loads(t[: int(n)].cpu().numpy().tobytes()) for t, n in zip(texts, sizes, strict=True)]
