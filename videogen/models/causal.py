"""3D convolution that is causal in time, and the memory that carries its last frames from one chunk to the next."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass
class Memory:
    """The last frames each convolution saw: `past` is only read, `future` only written, swapped by `next_chunk`.

    Two dicts instead of one updated in place: activation checkpointing runs a chunk a second time in the backward pass,
    and must then read what the chunk read the first time. Everybody goes through `take` and `keep`, so that a subclass
    can hold the frames elsewhere, or have them from another process.
    """

    past: dict[nn.Module, Tensor] = field(default_factory=dict)
    future: dict[nn.Module, Tensor] = field(default_factory=dict)
    chunk: int = 0  # which of the clip's chunks is going through
    last: bool = False  # no chunk comes after this one, so nothing is kept for it

    def next_chunk(self) -> Memory:
        return replace(self, past=self.future, future={}, chunk=self.chunk + 1)

    def take(self, module: nn.Module) -> Tensor | None:
        """What `module` kept of the chunk before, None in the first. Freed at once if no backward pass asks again."""
        return self.past.get(module) if torch.is_grad_enabled() else self.past.pop(module, None)

    def keep(self, module: nn.Module, frames: Tensor) -> None:
        """Hand `frames`, the caller's no more, to `module` in the next chunk."""
        if not self.last:
            self.future[module] = frames


class CausalConv3d(nn.Conv3d):
    """Conv3d with stride 1 that sees no later frame (arXiv:2310.05737, section 3.1).

    In time, the k - 1 frames of the chunk before stand in front of the input, in the first chunk copies of the first
    frame; in space, zeros stand around it.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        space = (kernel_size - 1) // 2
        super().__init__(in_channels, out_channels, kernel_size, padding=(0, space, space))

    def forward(self, x: Float[Tensor, "b c f h w"], memory: Memory) -> Float[Tensor, "b _c f h w"]:
        kept = self.kernel_size[0] - 1
        if kept:
            before = memory.take(self)
            if before is None:
                before = x[:, :, :1].expand(-1, -1, kept, -1, -1)
            x = torch.cat([before, x], dim=2)
            memory.keep(self, x[:, :, -kept:].clone())  # a view would keep the whole chunk alive
        return super().forward(x)
