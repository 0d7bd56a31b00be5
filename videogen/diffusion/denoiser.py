"""From a conditioned network to `denoise(x, t)`: guidance and changing conditions live here, samplers never see them.

A denoiser maps a noisy latent [b, f, c, h, w] and a time to the network's raw output in float32. What it is told may be
a `Conditioning` or a function of time that returns one, which is how a condition ends half way (`switched`). Whoever
must know which branch of guidance an evaluation belongs to (a step cache) is told before each: `Announce`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from videogen.types import Conditioning, Latent

Denoiser = Callable[[Tensor, float], Tensor]  # (x [b, f, c, h, w], t) -> raw output [b, f, c, h, w], float32
Model = Callable[[Tensor, Tensor, Conditioning], Tensor]  # (x, t [b], cond) -> raw output: the DiT, or a stand-in
Given = Conditioning | Callable[[float], Conditioning]
Announce = Callable[[float, dict[str, Conditioning]], None]  # t, and what each branch is told, in the order of the rows


def denoiser(
    model: Model, cond: Given, *, dtype: torch.dtype | None = None, announce: Announce | None = None
) -> Denoiser:
    """The network with its conditioning filled in. `dtype`: what the network computes in; None: x as it comes."""

    def denoise(x: Latent, t: float) -> Latent:
        return _evaluate(model, x, t, {"alone": _at(cond, t)}, dtype, announce)

    return denoise


def guided(
    model: Model,
    cond: Given,
    uncond: Given | None,
    guidance_scale: float | Callable[[float], float],
    *,
    dtype: torch.dtype | None = None,
    in_two: bool | Callable[[], bool] = False,
    down_to: float = -math.inf,
    announce: Announce | None = None,
) -> Denoiser:
    """Classifier-free guidance (arXiv:2207.12598): uncond + scale · (cond - uncond), one call for both halves.

    A scale of 1 or less means none, and `uncond` is not evaluated; a scale that is a function of time always evaluates
    both. The halves are [uncond, cond] and the difference is taken in float32, both as in diffusers.

    in_two    a call for each half: half the activations at once, the same numbers up to the order of sums in a kernel;
              a function is asked before each evaluation
    down_to   below this time `uncond` is not evaluated any more, and the last difference stands for the coming ones
    announce  is told the time and the branches before each evaluation
    """
    if uncond is None or (not callable(guidance_scale) and guidance_scale <= 1):
        return denoiser(model, cond, dtype=dtype, announce=announce)
    towards: Tensor | None = None  # cond - uncond as last evaluated; a denoiser is made for one clip

    def denoise(x: Latent, t: float) -> Latent:
        nonlocal towards
        scale = guidance_scale(t) if callable(guidance_scale) else guidance_scale
        if t < down_to:
            output = _evaluate(model, x, t, {"alone": _at(cond, t)}, dtype, announce)
            return output if towards is None else output + (scale - 1) * towards
        without, with_ = {"uncond": _at(uncond, t)}, {"cond": _at(cond, t)}
        if in_two() if callable(in_two) else in_two:
            halves = [_evaluate(model, x, t, half, dtype, announce) for half in (without, with_)]
        else:
            halves = _evaluate(model, torch.cat([x, x]), t, without | with_, dtype, announce).chunk(2)
        towards = halves[1] - halves[0]
        return halves[0] + scale * towards

    return denoise


def dynamic_cfg(
    guidance_scale: float, num_inference_steps: int, *, mode: str = "diffusers", times: Sequence[float] = ()
) -> Callable[[float], float]:
    """Guidance that changes over the n steps: 1 + g · (1 - cos(π p⁵)) / 2, where p is how far a clip is.

    mode   "diffusers": p = (n - t) / n with the time t, 0 … 999. Far below -1 in most steps, its fifth power makes the
           guidance jump between 1 and 1 + g. SAT feeds its formula the same number and the published samples were made
           so (zai-org/CogVideo issue 267): it stays
           "sat": p = i / n with the step i, 0 … n - 1, as SAT's guider is written: a smooth rise from none
    times  of the n steps, noisiest first, without the end; only "sat" needs them. A time between two belongs to the
           step that goes through it
    """
    n = num_inference_steps

    def scale(t: float) -> float:
        progress = (n - t) / n if mode == "diffusers" else sum(time > t for time in times) / n
        return 1 + guidance_scale * ((1 - math.cos(math.pi * progress**5.0)) / 2)

    return scale


def switched(
    first: Conditioning, then: Conditioning, *, times: Sequence[float], until: float
) -> Callable[[float], Conditioning]:
    """`first` for the steps i < until · n, `then` for the rest. `times`: the n steps', noisiest first, without the end.

    The rule is one of time, not of a counter: a sampler that calls the network twice per step gets each time's own.
    """
    last = last_time(times, until)
    return lambda t: first if t >= last else then


def last_time(times: Sequence[float], until: float) -> float:
    """The time of the last of the steps i < until · n: infinity if that is none, minus infinity if it is all."""
    count = math.ceil(until * len(times) - 1e-9)  # 0.07 · 100 is 7.000000000000001: that is no eighth step
    return math.inf if count <= 0 else -math.inf if count >= len(times) else times[count - 1]


def stack(a: Conditioning, b: Conditioning) -> Conditioning:
    """Both conditionings in one batch, a's rows first. They must hold the same fields: zeros stand for an absent one.

    A vector of one row serves the whole batch; it stays one row where both agree.
    """

    def rows(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        if (x is None) != (y is None):
            raise ValueError("only one of two conditionings to stack has a value for a field; give the other one zeros")
        return None if x is None or y is None else torch.cat([x, y])

    def vector(x: Tensor, y: Tensor) -> Tensor:
        if len(x) == len(y) == 1 and torch.equal(x, y):
            return x
        return torch.cat([x.expand(_batch(a)), y.expand(_batch(b))])

    if a.vectors.keys() != b.vectors.keys():
        raise ValueError(f"conditionings to stack differ in vectors: {sorted(a.vectors)} and {sorted(b.vectors)}")
    vectors = {name: vector(a.vectors[name], b.vectors[name]) for name in a.vectors}
    return Conditioning(rows(a.text, b.text), rows(a.channels, b.channels), rows(a.tokens, b.tokens), vectors)


def _batch(cond: Conditioning) -> int:
    parts = [part for part in (cond.text, cond.channels, cond.tokens) if part is not None]
    return len(parts[0]) if parts else max((len(v) for v in cond.vectors.values()), default=1)


def _at(cond: Given, t: float) -> Conditioning:
    return cond(t) if callable(cond) else cond


def _evaluate(
    model: Model,
    x: Latent,
    t: float,
    told: dict[str, Conditioning],
    dtype: torch.dtype | None,
    announce: Announce | None,
) -> Latent:
    if announce is not None:
        announce(t, told)
    # float32 holds every time exactly as diffusers' integer or float32 time steps do
    times = torch.full((len(x),), t)  # on the host: what is known by time is looked up without waiting for the device
    return model(x.to(dtype or x.dtype), times, reduce(stack, told.values())).float()
