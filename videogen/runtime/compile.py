"""`torch.compile` for one block, used by all: as many seconds as one block takes, whatever the depth of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from videogen.models.dit import Block, DiT


def compile_blocks(dit: DiT, **options: Any) -> DiT:
    """Compiles the blocks of `dit` as they are now (fast rows, kernel, 8-bit maps), when they are first called.

    Once per shape, dtype and device, and never again from step to step or from block to block. `options` are
    `torch.compile`'s: mode="max-autotune-no-cudagraphs" searches longer. With gradients on nothing is compiled.
    """
    uncompile_blocks(dit)
    compiled: dict[Callable, Callable] = {}  # the blocks of a model may differ, but in kinds only
    for block in dit.blocks:
        assert isinstance(block, Block)
        forward = block.__dict__.get("forward")
        function = forward.__func__ if isinstance(forward, MethodType) else Block.forward
        if function not in compiled:
            compiled[function] = torch.compile(function, **{"dynamic": False, "fullgraph": True, **options})
        block.forward = Compiled(block, function, compiled[function])  # type: ignore[assignment]
    return dit


def uncompile_blocks(dit: DiT) -> DiT:
    """Undoes `compile_blocks`."""
    for block in dit.blocks:
        forward = block.__dict__.get("forward")
        if isinstance(forward, Compiled):
            del block.forward
            if forward.function is not Block.forward:
                block.forward = MethodType(forward.function, block)
    return dit


@dataclass(frozen=True)
class Compiled:
    """The forward of a block, which is an argument of what is compiled, so that its weights are none of the code."""

    block: Block
    function: Callable[..., Tensor]
    compiled: Callable[..., Tensor]

    def __call__(self, *args: Any) -> Tensor:
        return (self.function if torch.is_grad_enabled() else self.compiled)(self.block, *args)
