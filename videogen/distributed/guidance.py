"""Guidance on two groups of processes: one computes the half without the condition, the other the half with it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from videogen.distributed.mesh import Mesh, part_sizes
from videogen.models.dit import DiT
from videogen.models.replaced import give_back
from videogen.types import Conditioning


@dataclass
class Halves:
    """A DiT's forward for the rows of the batch that this process's row of the mesh has, and the exchange of outputs.

    `diffusion.denoiser.guided` calls the network with [without, with] in one batch, and is left as it is. Any batch is
    shared this way, a list of prompts too; one that is too short is computed by everyone.
    """

    forward: Any  # the one that was there
    mesh: Mesh

    def __call__(
        self, latents: Float[Tensor, "b f c h w"], t: Shaped[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b f out h w"]:
        if torch.is_grad_enabled():  # collectives here have no backward: every process computes the whole
            return self.forward(latents, t, cond)
        groups, own = self.mesh.shape[0], self.mesh.place[0]
        if len(latents) < groups:
            groups, own = 1, 0
        sizes = part_sizes(len(latents), groups)
        start = sum(sizes[:own])
        rows = slice(start, start + sizes[own])
        output = self.forward(latents[rows], t[rows], take_rows(cond, rows, len(latents)))

        # From one process each, so that all of them go on with the same bits, whichever kernels their devices chose.
        parts = [
            output.contiguous() if i == own else output.new_empty(n, *output.shape[1:]) for i, n in enumerate(sizes)
        ]
        for half, part in enumerate(parts):
            dist.broadcast(part, src=self.mesh.leader(half))
        return torch.cat(parts)


def split_guidance(dit: DiT, mesh: Mesh) -> DiT:
    """Let the rows of the mesh share each batch, in place; every process returns the whole."""
    dit.forward = Halves(dit.forward, mesh)
    return dit


def unsplit_guidance(dit: DiT) -> Mesh:
    """Undo `split_guidance`: the forward that was there. Returns the mesh it had."""
    halves = dit.forward
    assert isinstance(halves, Halves), "what was put in last is taken out first"
    give_back(dit, "forward", halves.forward)
    return halves.mesh


def take_rows(cond: Conditioning, rows: slice, batch: int) -> Conditioning:
    """The conditioning of some clips of the batch; a vector of one row serves them all."""

    def take(x: Tensor | None) -> Tensor | None:
        return x if x is None or len(x) != batch else x[rows]

    vectors = {name: value[rows] if len(value) == batch else value for name, value in cond.vectors.items()}
    return dataclasses.replace(
        cond, text=take(cond.text), channels=take(cond.channels), tokens=take(cond.tokens), vectors=vectors
    )
