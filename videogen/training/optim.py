"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from videogen.config import FitConfig


def build_optimizers(modules: dict[str, nn.Module], config: FitConfig) -> list[Optimizer]:
    """AdamW for everything, or Muon (Jordan 2024; arXiv:2502.16982) for the hidden matrices and AdamW for the rest.

    Embeddings, norms, biases, convolutions and the first and last layers always go to AdamW: Muon's orthogonal updates
    are meant for matrices between hidden layers. Every group remembers its peak rate under `peak_lr`.
    """
    if config.optimizer not in ("adamw", "muon"):
        raise ValueError(f"optimizer {config.optimizer!r}: adamw or muon")
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules.values():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                hidden = parameter.ndim == 2 and "block" in name and config.optimizer == "muon"
                (matrices if hidden else others).append(parameter)

    optimizers: list[Optimizer] = [
        torch.optim.AdamW(
            others, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
    ]
    if matrices:
        # match_rms_adamw gives updates the size of AdamW's, so one rate suits matrices of every shape.
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=config.muon_learning_rate,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def rate_at(step: int, config: FitConfig) -> float:
    """Share of the peak rate at `step`: linear warm-up, constant, linear decay to 0 over the last `decay_fraction`.

    >>> config = FitConfig(steps=100, warmup_steps=10, decay_fraction=0.5)
    >>> [rate_at(s, config) for s in (0, 9, 40, 75)]
    [0.1, 1.0, 1.0, 0.5]
    """
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay_steps = max(1, round(config.steps * config.decay_fraction))
    return min(warm, 1.0, (config.steps - step) / decay_steps)
