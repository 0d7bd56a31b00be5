"""Exponential moving average of parameters: the weights that are judged and shipped."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def ema_copy(module: nn.Module) -> nn.Module:
    """A frozen copy to hold the average."""
    return copy.deepcopy(module).requires_grad_(False).eval()


@torch.no_grad()
def ema_update(average: nn.Module, module: nn.Module, decay: float, step: int) -> None:
    """average <- decay * average + (1 - decay) * module; the decay grows with the steps: the start is forgotten."""
    weight = 1.0 - min(decay, (1 + step) / (10 + step))
    pairs = zip(average.parameters(), module.parameters(), strict=True)
    kept, current = zip(*[(_local(a), _local(p.detach())) for a, p in pairs], strict=True)
    torch._foreach_lerp_(kept, current, weight)
    for a, b in zip(average.buffers(), module.buffers(), strict=True):
        _local(a).copy_(_local(b))


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor: averages lie where their weights do."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
