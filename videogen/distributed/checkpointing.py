"""Activation checkpointing: what the backward pass computes again instead of keeping it.

    none       everything a block's backward needs is kept
    selective  what a block was given, and what attention gave: linear maps and norms are computed again
    full       what a block was given: all of it is computed again

Gradients are the same to the bit: what is computed again is computed in the same way.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from videogen.errors import InvalidRequest
from videogen.models.dit import DiT

MODES = ("none", "selective", "full")
KEPT = (  # what is dear to compute and small to keep: torch's attention on its devices
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


def set_checkpointing(dit: DiT, mode: str) -> DiT:
    """Let the blocks' backward compute again what `mode` does not keep, in place. "none" leaves the model as it is."""
    if mode not in MODES:
        raise InvalidRequest(
            f"there is no activation checkpointing {mode!r}.",
            why="it says what is computed again in the backward pass.",
            hint=f"one of {', '.join(MODES)}",
            param="parallel.checkpointing",
        )
    if mode != "none":
        dit.gradient_checkpointing = mode == "full" or partial(create_selective_checkpoint_contexts, keep_attention)
    return dit


def keep_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Which results of a block are kept: those of the attention kernels, whose cost grows with the tokens squared."""
    return CheckpointPolicy.MUST_SAVE if op in _kept() else CheckpointPolicy.PREFER_RECOMPUTE


def _kept() -> set[Any]:
    return {getattr(torch.ops.aten, name).default for name in KEPT if hasattr(torch.ops.aten, name)}
