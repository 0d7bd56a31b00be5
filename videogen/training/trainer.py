"""The training loop: one for every model. What is learned stands in `vae_step.py` and `step.py`."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from videogen.config import FitConfig
from videogen.errors import NumericalError
from videogen.training.ema import ema_copy, ema_update
from videogen.training.optim import build_optimizers, rate_at
from videogen.training.state import load_state, save_state, saved_states

Facts = dict[str, float | int]
LossAt = Callable[[int], tuple[Tensor, Facts]]


def fit(
    modules: dict[str, nn.Module],
    loss_at: LossAt,
    config: FitConfig,
    folder: Path,
    *,
    validate: Callable[[dict[str, nn.Module]], dict[str, float]] | None = None,
    shares: dict[str, float] | None = None,
    averaged: Collection[str] | None = None,
) -> dict[str, nn.Module]:
    """Train `modules` (name -> module) for `config.steps` and return the moving averages of their weights.

    loss_at(step) draws everything it needs from the step and the rank alone, so a run that was killed goes on from its
    newest state in `folder` as if nothing had happened. `folder/log.jsonl` gets a line every `log_every` steps,
    validated ones (on the averages) with every saved state. Under torchrun, gradients are averaged over the processes.

    A module that a step's loss does not reach rests in that step: its weights, its optimiser's memory and its average
    stay as they are. So roles can learn in turn, each at a rate of its own.

    shares    module -> its share of the learning rates; 1 where it has none
    averaged  the modules whose averages are kept and returned; None: all

    Raises NumericalError before a loss or gradient that is not finite reaches the weights.
    """
    rank, world = join_process_group()
    averages = {name: ema_copy(modules[name]) for name in (modules if averaged is None else averaged)}
    shares = {name: 1.0 for name in modules} | (shares or {})
    optimizers = [
        optimizer
        for share in sorted({*shares.values()}, reverse=True)
        for optimizer in build_optimizers({n: m for n, m in modules.items() if shares[n] == share}, config, share)
    ]
    stored = {**modules, **{f"{name}_ema": average for name, average in averages.items()}}
    run = {"fit": asdict(config), "world": world} | ({"shares": shares} if {*shares.values()} != {1.0} else {})

    states = saved_states(folder)
    first, samples = load_state(states[-1], stored, optimizers, run) if states else (0, 0)
    started = time.monotonic()
    log = (folder / "log.jsonl").open("a") if rank == 0 and folder.mkdir(parents=True, exist_ok=True) is None else None

    for step in range(first, config.steps):
        loss, facts = loss_at(step)
        loss.backward()
        learning = {name for name, module in modules.items() if any(p.grad is not None for p in module.parameters())}
        parameters = [p for name in sorted(learning) for p in modules[name].parameters() if p.requires_grad]
        average_gradients(parameters, world)
        norm = float(nn.utils.clip_grad_norm_(parameters, config.gradient_clip))
        value = float(loss.detach())
        if not math.isfinite(norm) or not math.isfinite(value):
            raise NumericalError(f"step {step}: loss {value}, gradient norm {norm}.", hint="lower the rate.")
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate_at(step, config)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for name, average in averages.items():
            if name in learning:
                ema_update(average, modules[name], config.ema_decay, step)

        done = step + 1
        samples += int(facts.get("samples", 0)) * world
        save = done % config.save_every == 0 or done == config.steps
        if log and (done % config.log_every == 0 or save):
            line = {"step": done, "loss": value, "norm": norm, **facts, "samples": samples}
            line["seconds"] = round(time.monotonic() - started, 1)
            if save and validate:
                line |= validate(averages)
            print(json.dumps(line), file=log, flush=True)
        if save and rank == 0:
            save_state(folder, done, samples, stored, optimizers, run)
        if save and world > 1:
            dist.barrier()  # nobody runs ahead of a state that is being written
    return averages


def join_process_group() -> tuple[int, int]:
    """(rank, world size): 0 of 1, or this process's place among those that torchrun started."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return (dist.get_rank(), world) if world > 1 else (0, 1)


def average_gradients(parameters: list[nn.Parameter], world: int) -> None:
    """Replace each gradient by its mean over the processes, in one message."""
    if world == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world
    for parameter, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = mean.view_as(parameter)
