"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from videogen.config import FitConfig
from videogen.errors import InvalidRequest


def build_optimizers(modules: dict[str, nn.Module], config: FitConfig, share: float = 1.0) -> list[Optimizer]:
    """AdamW for everything, or Muon (Jordan 2024; arXiv:2502.16982) for what is hidden and AdamW for the rest.

    Hidden are the matrices of the transformers' blocks and the VAE's convolutions that look around. Embeddings, norms,
    biases and the first and last layers always go to AdamW: Muon's orthogonal updates are meant for maps between hidden
    layers. "adamw8bit" is AdamW in less memory (`eight_bit`). Every group remembers its peak rate under `peak_lr`: the
    config's, times `share`.
    """
    if config.optimizer not in ("adamw", "adamw8bit", "muon"):
        raise ValueError(f"optimizer {config.optimizer!r}: adamw, adamw8bit or muon")
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules.values():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                hidden = config.optimizer == "muon" and is_hidden(name, parameter)
                (matrices if hidden else others).append(parameter)

    kind: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    optimizers: list[Optimizer] = [
        eight_bit(others, config, **kind)
        if config.optimizer == "adamw8bit"
        else torch.optim.AdamW(others, **kind, fused=True)
    ]
    if matrices:
        # match_rms_adamw gives updates the size of AdamW's, so one rate suits matrices of every shape.
        optimizers.append(
            Muon(
                matrices,
                lr=config.muon_learning_rate,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = share * float(group["lr"])
    return optimizers


def eight_bit(parameters: list[nn.Parameter], config: FitConfig, **kind: Any) -> Optimizer:
    """AdamW whose moments take a byte per value, with a scale per 256 (arXiv:2110.02861), by torchao.

    Moments of tensors of fewer than 4096 values stay as they are. Raises InvalidRequest where torchao is not installed,
    or weights are spread over processes.
    """
    if config.parallel.shard != 1:
        raise InvalidRequest(
            "optimizer adamw8bit does not go with weights that are spread over processes.",
            why="blocks of 256 values share a scale, and parts of a tensor would be divided otherwise.",
            hint="parallel.shard=1, or optimizer=adamw.",
            param="fit.optimizer",
        )
    try:
        from torchao.optim import AdamW8bit  # type: ignore[reportMissingImports]
    except ImportError as error:
        raise InvalidRequest(
            "optimizer adamw8bit needs torchao, which is not installed.",
            why=f"{error}",
            hint='pip install -e ".[eight-bit]", or optimizer=adamw.',
            param="fit.optimizer",
        ) from error
    optimizer: Optimizer = AdamW8bit(parameters, **kind)

    def rates_as_tensors(optimizer: Optimizer, *_: Any) -> None:  # torchao compiles its step and takes no other
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)

    optimizer.register_step_pre_hook(rates_as_tensors)
    return optimizer


def is_hidden(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon may turn this weight: a matrix of a transformer block, a kernel inside the VAE."""
    if parameter.ndim == 2:
        return "block" in name
    return (
        parameter.ndim >= 4
        and parameter.shape[-1] > 1
        and not {"conv_in", "conv_out", "patch_embed"} & {*name.split(".")}
    )


class Muon(torch.optim.Muon):
    """torch's Muon takes matrices only; here a convolution [out, in, *kernel] is the matrix [out, in · kernel].

    A matrix spread over processes is turned whole, by each of them: torch would add up bfloat16 parts of its products,
    and in directions in which a gradient says little that noise is most of the update (up to 40 % of it were found).
    """

    def __init__(self, parameters: list[nn.Parameter], **settings) -> None:
        self.parameters = parameters
        super().__init__([nn.Parameter(p.detach().flatten(1)) for p in parameters], **settings)  # views: one memory

    @torch.no_grad()
    def step(self, closure=None):
        for matrix, parameter in zip(self.param_groups[0]["params"], self.parameters, strict=True):
            matrix.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        if not any(isinstance(parameter, DTensor) for parameter in self.parameters):
            return super().step(closure)
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._step_whole(matrix, group)
        return None

    def _step_whole(self, matrix: DTensor, group: dict[str, Any]) -> None:
        """torch's step, with its Newton-Schulz iteration on the gathered matrix; momentum stays spread."""
        state, gradient = self.state[matrix], matrix.grad
        assert isinstance(gradient, DTensor)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        turned = _zeropower_via_newtonschulz(
            cast("DTensor", update).full_tensor(), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        part = distribute_tensor(turned, matrix.device_mesh, matrix.placements, src_data_rank=None)
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(part, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], matrix.shape))

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        super().zero_grad(set_to_none)


def rate_at(step: int, config: FitConfig) -> float:
    """Share of the peak rate at `step`: linear warm-up, constant, linear decay to 0 over the last `decay_fraction`.

    >>> config = FitConfig(steps=100, warmup_steps=10, decay_fraction=0.5)
    >>> [rate_at(s, config) for s in (0, 9, 40, 75)]
    [0.1, 1.0, 1.0, 0.5]
    """
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay_steps = max(1, round(config.steps * config.decay_fraction))
    return min(warm, 1.0, (config.steps - step) / decay_steps)
