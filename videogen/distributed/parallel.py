"""Many devices for one clip: a pipeline in, the same pipeline out, run by all processes that torchrun started."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from videogen.distributed.guidance import split_guidance, unsplit_guidance
from videogen.distributed.mesh import Mesh, make_mesh
from videogen.distributed.sequence import shard_sequence, unshard_sequence
from videogen.distributed.vae import split_vae, unsplit_vae

AnyPipeline = TypeVar("AnyPipeline", bound=Any)  # a videogen.Pipeline: what has a `dit`, a `vae` and `stages`


def parallel(pipeline: AnyPipeline, mesh: Mesh | None = None) -> AnyPipeline:
    """Let all processes share the work on each clip, in place. Every one must make the same calls, and gets the clip.

    Guidance on two groups, in each of them the tokens in parts, as `make_mesh` says; the VAE on all processes, in time
    or in space. `mesh.start` comes before the model is loaded, this comes last: it wraps what is there.
    """
    mesh = mesh or make_mesh(pipeline.dit.config.num_attention_heads)
    if mesh.shape[1] > 1:
        shard_sequence(pipeline.dit, mesh.sequence)
    split_guidance(pipeline.dit, mesh)
    split_vae(pipeline.vae, mesh.everyone)
    pipeline.plan_alone = pipeline.stages.plan
    if mesh.shape[0] > 1:  # the halves are apart already: each must come here as one batch
        pipeline.stages.plan = replace(pipeline.stages.plan, guidance_in_two=False)
    return pipeline


def single(pipeline: AnyPipeline) -> AnyPipeline:
    """Undo `parallel`: each process is on its own again."""
    pipeline.stages.plan = pipeline.__dict__.pop("plan_alone")
    unsplit_vae(pipeline.vae)
    mesh = unsplit_guidance(pipeline.dit)
    if mesh.shape[1] > 1:
        unshard_sequence(pipeline.dit)
    return pipeline
