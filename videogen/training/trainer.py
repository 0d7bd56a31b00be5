"""The training loop: one for every model. What is learned stands in `vae_step.py`, `step.py` and `distill_step.py`."""

from __future__ import annotations

import itertools
import math
import operator
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from videogen.config import FitConfig
from videogen.errors import NumericalError
from videogen.training.draws import draws
from videogen.training.ema import ema_copy, ema_update
from videogen.training.logs import Log
from videogen.training.optim import build_optimizers, rate_at
from videogen.training.processes import Parallel, Replicated, gather_values, join_process_group, sum_over_all
from videogen.training.safety import (
    REQUEUE,
    Interrupted,
    NormLimit,
    StopSignal,
    Watchdog,
    peers_answer,
    quarantine,
)
from videogen.training.state import State, StateWriter, settings_to_apply, tensors_of

Facts = Mapping[str, float | int]
MicroBatch = tuple[Tensor, Facts, Sequence[str]]  # loss, what else there is to know, the samples' names
LossesAt = Callable[[int], Iterable[MicroBatch]]
FOREVER = 10.0**8  # seconds
Validate = Callable[[Mapping[str, nn.Module], int], Mapping[str, float]]


def fit(
    modules: dict[str, nn.Module],
    losses_at: LossesAt,
    config: FitConfig,
    folder: Path,
    *,
    parallel: Parallel | None = None,
    validate: Validate | None = None,
    shares: dict[str, float] | None = None,
    averaged: Collection[str] | None = None,
    averages: dict[str, nn.Module] | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, nn.Module]:
    """Train `modules` (name -> module) for `config.steps` and return the moving averages of their weights.

    losses_at(step) gives this process's micro-batches of a step, one after the other: the loss, already divided by the
    number of samples of the *global* batch (one number, or one per sample), facts about it (means over its samples) and
    the samples' names. Gradients add up over micro-batches and data ranks, so neither changes what is learned. It draws
    everything from the seed, the step and the samples' names alone: a run that was killed goes on from its newest state
    in `folder` as if nothing had happened. Where it gives something with a length, the loop knows which micro-batch is
    the last. A step is a step of the optimisers; clipping, averages, the schedule, validation and saving happen once
    in each.

    A module that a step's loss does not reach rests in that step: its weights, its optimiser's memory and its average
    stay as they are. So roles can learn in turn, each at a rate of its own.

    parallel  how the modules are spread over processes; None: whole, on each of those that torchrun started
    validate  of the averages and the number of steps done: figures for the log, with every saved state. All processes
              call it
    shares    module -> its share of the learning rates; 1 where it has none
    averaged  the modules whose averages are kept and returned; None: all
    averages  these averages, where their copies were already made and put in place beside the modules
    settings  of the whole training, which a run must not change when it goes on; None: those of `config`

    `folder/log.jsonl` gets a line every `log_every` steps. Raises NumericalError before a loss or gradient that is not
    finite reaches the weights, Interrupted when the process was told to stop (its state is saved then), and LostProcess
    when another process does not answer.
    """
    parallel = parallel or Replicated(*join_process_group(config.safety.timeout))
    if averages is None:
        averages = {name: ema_copy(modules[name]) for name in (modules if averaged is None else averaged)}
    shares = {name: 1.0 for name in modules} | (shares or {})
    optimizers = [
        optimizer
        for share in sorted({*shares.values()}, reverse=True)
        for optimizer in build_optimizers({n: m for n, m in modules.items() if shares[n] == share}, config, share)
    ]
    run = Run(modules, averages, optimizers, config, parallel)
    if settings is None:
        settings = {"fit": asdict(config)} | ({"shares": shares} if {*shares.values()} != {1.0} else {})
    tensors = tensors_of({**modules, **{f"{name}_ema": average for name, average in averages.items()}}, optimizers)
    timeout = config.safety.timeout
    with (
        StateWriter(folder, **asdict(config.state), timeout=timeout or FOREVER) as states,
        Log(folder, config.trackers, settings) if run.rank == 0 else nullcontext() as log,
        Watchdog(2 * timeout) as watchdog,  # the others give up first, and say so
        StopSignal() as stop,
    ):
        first = run.resume(states.newest(), tensors, settings)
        (folder / REQUEUE).unlink(missing_ok=True)
        started = time.monotonic()
        for step in range(first, config.steps):
            watchdog.feed()
            done, figures = step + 1, {}
            with peers_answer(step):
                line, stopping = run.step(step, losses_at(step), stop)
                save = done % config.save_every == 0 or done == config.steps or stopping
                if save and validate and not stopping:
                    watchdog.feed()
                    figures = dict(validate(averages, done))
                    spread_again([*modules.values(), *averages.values()])
            if "skipped" in line:
                run.skip(step, line, folder, log)
            elif log and (done % config.log_every == 0 or save):
                seconds = round(time.monotonic() - started, 1)
                log.write(done, {**line, "samples": run.samples, "seconds": seconds, **figures})
            if save:
                watchdog.feed()
                states.save(done, tensors, run.facts(settings), figures.get("held_out_loss"))
            if stopping and done < config.steps:
                if run.rank == 0:
                    (folder / REQUEUE).touch()  # while the others wait: the first to end may end all
                states.wait()
                raise Interrupted(
                    f"told to stop after step {done} of {config.steps}.",
                    why="the state is saved.",
                    hint="the same command goes on from there.",
                )
    return averages


@dataclass
class Run:
    """What a step works on."""

    modules: dict[str, nn.Module]
    averages: dict[str, nn.Module]
    optimizers: list[Optimizer]
    config: FitConfig
    parallel: Parallel
    samples: int = 0  # seen by all processes
    skips: int = 0
    norms: NormLimit = field(init=False)

    def __post_init__(self) -> None:
        self.norms = NormLimit(self.config.gradient_clip, self.config.safety.clip_sigmas)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.device = next(p for module in self.modules.values() for p in module.parameters()).device

    def resume(self, state: State | None, tensors: dict[str, Tensor], settings: dict[str, Any]) -> int:
        """Put a state back; the step to go on with."""
        if state is None:
            return 0
        settings_to_apply(state.facts["settings"], settings)
        state.read(into=tensors)
        self.samples, self.skips = state.facts["samples"], state.facts["skips"]
        self.norms.figures = state.facts["norms"]
        return state.step

    def facts(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What a state holds besides tensors."""
        return {"settings": settings, "samples": self.samples, "skips": self.skips, "norms": self.norms.figures}

    def step(self, step: int, pieces: Iterable[MicroBatch], stop: StopSignal) -> tuple[dict[str, Any], bool]:
        """One step of the optimisers. The line for the log, with "skipped" if nothing was learned because a number was
        not finite, and whether a process was told to stop. Both are the same on all processes."""
        losses, facts, names = self.backward(step, pieces)
        reached = [any(p.grad is not None for p in module.parameters()) for module in self.modules.values()]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for loss in losses:
            total += loss.sum()
        known = torch.tensor([stop.came, sum(map(len, names)), *reached], dtype=torch.float64, device=self.device)
        bad = (~torch.isfinite(total)).double()
        told, count, *learning, broken, value = sum_over_all(torch.cat([known, bad[None], total[None]]))
        peers = (dist.get_world_size() if dist.is_initialized() else 1) / self.parallel.data_world
        learns = [name for name, processes in zip(self.modules, learning, strict=True) if processes]

        parameters = [p for name in sorted(learns) for p in self.modules[name].parameters() if p.requires_grad]
        self.parallel.reduce_gradients(parameters)
        roles = "+".join(sorted(learns))
        limit = self.norms.limit(roles)
        norm = float(self.parallel.clip(parameters, limit))
        line: dict[str, Any] = {"loss": value / peers, "norm": norm}
        if broken or not math.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None
            return line | {"skipped": self.suspects(losses, names)}, told > 0

        self.norms.see(roles, min(norm, limit))
        self.update(step, learns)
        self.samples += round(count / peers)
        done, config = step + 1, self.config
        if not (done % config.log_every and done % config.save_every and done < config.steps) or told:
            line |= self.means(facts, names)
        return line, told > 0

    def backward(
        self, step: int, pieces: Iterable[MicroBatch]
    ) -> tuple[list[Tensor], list[Facts], list[Sequence[str]]]:
        """The gradients of this process's micro-batches, added up."""
        losses: list[Tensor] = []
        facts: list[Facts] = []
        names: list[Sequence[str]] = []
        known, rest = operator.length_hint(pieces), iter(pieces)
        while not known or len(losses) < known:
            # Layers that drop activations at random draw from torch's own generator.
            rng = draws(self.config.seed, step, f"{self.parallel.data_rank} {len(losses)}", "layers")
            seed_layers(int(rng.integers(2**63)), self.device)
            with self.parallel.micro_batch(len(losses) + 1 >= known):
                piece = next(rest, None)
                if piece is None:
                    break
                loss, fact, name = piece
                loss.sum().backward()
            losses.append(loss.detach())
            facts.append(fact)
            names.append(name)
        return losses, facts, names

    def update(self, step: int, learns: Sequence[str]) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate_at(step, self.config)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for name, average in self.averages.items():
            if name in learns:
                ema_update(average, self.modules[name], self.config.ema_decay, step)

    def means(self, facts: Sequence[Facts], names: Sequence[Sequence[str]]) -> dict[str, float]:
        """Each fact's mean over the samples of all processes that tell it."""
        sums: dict[str, list[float]] = {}
        for fact, name in zip(facts, names, strict=True):
            for key, value in fact.items():
                total = sums.setdefault(key, [0.0, 0])
                total[0] += float(value) * len(name)
                total[1] += len(name)
        merged: dict[str, list[float]] = {}
        for one in gather_values(sums, self.device):
            for key, (value, count) in one.items():
                total = merged.setdefault(key, [0.0, 0])
                total[0] += value
                total[1] += count
        return {key: value / max(1, count) for key, (value, count) in merged.items()}

    def suspects(self, losses: Sequence[Tensor], names: Sequence[Sequence[str]]) -> list[str]:
        """The samples, of all processes, whose loss is not finite; all of the step where only gradients are not."""
        found = []
        for loss, name in zip(losses, names, strict=True):
            bad = (~torch.isfinite(loss.reshape(-1))).tolist()
            found += list(itertools.compress(name, bad)) if len(bad) == len(name) else list(name) * any(bad)
        everywhere = gather_values([found, list(itertools.chain(*names))], self.device)
        return sorted(
            {name for one in everywhere for name in one[0]} or {name for one in everywhere for name in one[1]}
        )

    def skip(self, step: int, line: dict[str, Any], folder: Path, log: Log | None) -> None:
        """Write down what was left out; raise where it was once too often."""
        self.skips += 1
        if log:
            log.write(step + 1, line)
            quarantine(folder, step, line["skipped"], f"loss {line['loss']}, gradient norm {line['norm']}")
        if self.skips > self.config.safety.skips:
            shown = ", ".join(line["skipped"][:8]) + (" ..." if len(line["skipped"]) > 8 else "")
            raise NumericalError(
                f"step {step}: loss {line['loss']}, gradient norm {line['norm']}; nothing was learned from it.",
                why=f"among the samples of this step: {shown}" if shown else "",
                hint="look at these samples; a lower rate; safety.skips=N leaves out so many steps.",
            )


def spread_again(modules: Iterable[nn.Module]) -> None:
    """Lay sharded weights down where a forward without a backward pass has left them gathered: averages are updated,
    and saved, as they lie."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def seed_layers(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for this device alone: that one notes every call for devices that are not there."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
