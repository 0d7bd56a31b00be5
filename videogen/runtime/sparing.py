"""What is done when a device runs out of memory in the middle of a clip: once, all goes on under the next plan."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from traceback import clear_frames
from typing import Any, TypeVar

import torch
from torch import nn

from videogen.errors import Note, OutOfMemory, is_out_of_memory
from videogen.models.causal import Memory
from videogen.models.vae import VAE
from videogen.runtime.memory import next_plan
from videogen.runtime.offload import Stages
from videogen.runtime.vae import HostMemory

T = TypeVar("T")


class Sparing:
    """Runs the parts of one clip; steps down once, and the next time raises what `explain(stage)` says.

    What is run again starts from values that its caller still has, so the clip is that of an undisturbed run. Several
    processes that share a clip do not step down: the others would not know.
    """

    def __init__(self, stages: Stages, explain: Callable[[str], OutOfMemory], *networks: nn.Module) -> None:
        self.stages, self.explain, self.networks, self.may_step_down = stages, explain, networks, True

    def run(self, stage: str, work: Callable[[], T], undo: Callable[[], Any] = lambda: None) -> T:
        """`work()`; if memory runs out, `undo()` and once more. `stage` is a key of `runtime.memory.MATTERS`."""
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            self.step_down(stage, error)
        undo()
        return self.run(stage, work, undo)

    def step_down(self, stage: str, error: Exception) -> None:
        """Frees what the failed work still holds and goes over to the next plan. Raises any other error as it is."""
        if not is_out_of_memory(error):
            raise error
        clear_frames(error.__traceback__)
        plan, before = next_plan(self.stages.plan, stage), self.stages.plan.name
        shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        if plan is None or shared or not self.may_step_down:
            raise self.explain(stage) from error
        self.may_step_down = False
        try:
            self.stages.change(plan, *self.networks)
        except (RuntimeError, MemoryError) as second:
            if not is_out_of_memory(second):
                raise
            raise self.explain(stage) from second
        for vae in self.networks:
            if isinstance(vae, VAE):
                vae.new_memory = HostMemory if plan.caches_on_host else Memory
        note = f"out of memory in the stage {stage} under the memory plan {before}: it goes on with {plan.name}"
        warnings.warn(Note(note), stacklevel=2)
