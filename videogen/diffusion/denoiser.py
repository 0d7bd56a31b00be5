"""From a conditioned network to `denoise(x, t)`: guidance and changing conditions live here, samplers never see them.

A denoiser maps a noisy latent [b, f, c, h, w] and a time to the network's raw output in float32. What it is told may be
a `Conditioning` or a function of time that returns one, which is how a condition ends half way (`switched`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from videogen.types import Conditioning, Latent

Denoiser = Callable[[Tensor, float], Tensor]  # (x [b, f, c, h, w], t) -> raw output [b, f, c, h, w], float32
Model = Callable[[Tensor, Tensor, Conditioning], Tensor]  # (x, t [b], cond) -> raw output: the DiT, or a stand-in
Given = Conditioning | Callable[[float], Conditioning]


def denoiser(model: Model, cond: Given, *, dtype: torch.dtype | None = None) -> Denoiser:
    """The network with its conditioning filled in. `dtype`: what the network computes in; None: x as it comes."""

    def denoise(x: Latent, t: float) -> Latent:
        return _call(model, x, t, _at(cond, t), dtype)

    return denoise


def guided(
    model: Model,
    cond: Given,
    uncond: Given | None,
    guidance_scale: float | Callable[[float], float],
    *,
    dtype: torch.dtype | None = None,
) -> Denoiser:
    """Classifier-free guidance (arXiv:2207.12598): uncond + scale · (cond - uncond), one call for both halves.

    A scale of 1 or less means none, and `uncond` is not evaluated; a scale that is a function of time always evaluates
    both. The halves are [uncond, cond] and the difference is taken in float32, both as in diffusers.
    """
    if uncond is None or (not callable(guidance_scale) and guidance_scale <= 1):
        return denoiser(model, cond, dtype=dtype)

    def denoise(x: Latent, t: float) -> Latent:
        both = stack(_at(uncond, t), _at(cond, t))
        without, with_ = _call(model, torch.cat([x, x]), t, both, dtype).chunk(2)
        scale = guidance_scale(t) if callable(guidance_scale) else guidance_scale
        return without + scale * (with_ - without)

    return denoise


def dynamic_cfg(guidance_scale: float, num_inference_steps: int) -> Callable[[float], float]:
    """The guidance of diffusers' `use_dynamic_cfg`, wave and all.

    Meant as a ramp over the step index, it has always been fed the time 0 … 999: the power of a large negative number
    makes it jump between 1 and 1 + scale. The published samples were made so (zai-org/CogVideo issue 267): it stays.
    """

    def scale(t: float) -> float:
        progress = (num_inference_steps - t) / num_inference_steps
        return 1 + guidance_scale * ((1 - math.cos(math.pi * progress**5.0)) / 2)

    return scale


def switched(
    first: Conditioning, then: Conditioning, *, times: Sequence[float], until: float
) -> Callable[[float], Conditioning]:
    """`first` for the steps i < until · n, `then` for the rest. `times`: the n steps', noisiest first, without the end.

    The rule is one of time, not of a counter: a sampler that calls the network twice per step gets each time's own.
    """
    count = math.ceil(until * len(times) - 1e-9)  # 0.07 · 100 is 7.000000000000001: that is no eighth step
    if count <= 0:
        return lambda t: then
    last = times[min(count, len(times)) - 1]
    return lambda t: first if t >= last else then


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


def _call(model: Model, x: Latent, t: float, cond: Conditioning, dtype: torch.dtype | None) -> Latent:
    # float32 holds every time exactly as diffusers' integer or float32 time steps do
    return model(x.to(dtype or x.dtype), torch.full((len(x),), t, device=x.device), cond).float()
