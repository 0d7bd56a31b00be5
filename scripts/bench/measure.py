"""Time, memory and error of a function, on a CPU or a CUDA device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Run = Callable[[], Any]


class Seconds(NamedTuple):
    """`wall` is CUDA events' time on a GPU; `cpu` is the process's own time, all threads together."""

    wall: float
    cpu: float


class Peak(NamedTuple):
    """Bytes: the most that a run added to what was there before, and the most that the allocator took from the GPU."""

    added: int
    reserved: int = 0


def seconds(run: Run, device: torch.device) -> Seconds:
    if device.type != "cuda":
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        return Seconds(time.perf_counter() - wall, time.process_time() - cpu)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    cpu = time.process_time()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return Seconds(start.elapsed_time(end) / 1000, time.process_time() - cpu)


def interleaved(runs: dict[str, Run], device: torch.device, rounds: int) -> dict[str, list[Seconds]]:
    """Each run once per round, in order and then in reverse (A B B A), so that a drift of the machine meets all."""
    times: dict[str, list[Seconds]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            times[name].append(seconds(runs[name], device))
    return times


def median(times: list[Seconds]) -> Seconds:
    return Seconds(*(statistics.median(column) for column in zip(*times, strict=True)))


def peak(run: Run, device: torch.device) -> Peak:
    """On a CPU read off the events of torch's allocator, so what custom operations take for themselves is in it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return Peak(torch.cuda.max_memory_allocated(device) - before, torch.cuda.max_memory_reserved(device))

    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    result = profiled.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in result.events() if e.name() == "[memory]")
    most = alive = 0
    for _, change in changes:
        alive += change
        most = max(most, alive)
    return Peak(most)


def error(x: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference, relative to the reference's."""
    assert x.shape == reference.shape, (x.shape, reference.shape)
    difference = x.float() - reference.to(x.device).float()
    return float(difference.square().mean().sqrt() / reference.float().square().mean().sqrt())


def weight_bytes(*modules: torch.nn.Module, device: torch.device) -> int:
    """Of the parameters and buffers on `device`, each storage once."""
    tensors = [t for m in modules for t in [*m.parameters(), *m.buffers()] if t.device.type == device.type]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def first_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {(str(problem).strip().splitlines() or [''])[0]}"[:200].replace("|", "/")
