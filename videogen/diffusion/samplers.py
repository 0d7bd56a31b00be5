"""Samplers: from noise to a latent, by repeated calls of one `denoise(x, t)`.

Ours are pure functions over the pair (alpha, sigma) of the schedule. They start at alpha = 0 (zero terminal SNR) with
no special case, because no formula divides by alpha of the noisier time; they take any list of times, and each step
goes to the list's next entry. The latent is kept in float32 at least. `diffusers_sampler` drives any scheduler object
of diffusers instead, step by step as diffusers' CogVideoX pipelines do: same draws, same rounding.

    x       [b, f, c, h, w]: noise at times[0], or a noised latent to start half way
    times   noisiest first, ends with the time to arrive at (`schedule.times(n)`, or a tail of it)
    draw    gives N(0, 1) noise like the tensor it is shown; only `dpm` and `lcm` ask for any
    on_step called with (finished steps, x) after each step; it may raise to stop
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from videogen.diffusion.denoiser import Denoiser
from videogen.diffusion.prediction import Prediction, to_eps, to_x0
from videogen.diffusion.schedule import Schedule
from videogen.errors import InvalidRequest
from videogen.types import Latent

Draw = Callable[[Tensor], Tensor]
OnStep = Callable[[int, Tensor], Any]


@torch.no_grad()
def ddim(
    denoise: Denoiser,
    x: Latent,
    times: Sequence[float],
    *,
    schedule: Schedule,
    prediction: Prediction,
    draw: Draw | None = None,
    on_step: OnStep | None = None,
) -> Latent:
    """DDIM without noise (arXiv:2010.02502): keep x0 and eps of this level, mix them anew for the next. First order."""
    x = _wide(x)
    for i, (t, t_next) in enumerate(pairwise(times), 1):
        (alpha, sigma), (alpha_next, sigma_next) = _levels(schedule, t, t_next)
        x0 = to_x0(denoise(x, t), x, alpha, sigma, prediction)
        ratio = sigma_next / sigma
        x = ratio * x + (alpha_next - alpha * ratio) * x0
        _report(on_step, i, x)
    return x


@torch.no_grad()
def euler(
    denoise: Denoiser,
    x: Latent,
    times: Sequence[float],
    *,
    schedule: Schedule,
    prediction: Prediction,
    draw: Draw | None = None,
    on_step: OnStep | None = None,
) -> Latent:
    """Euler's method on dx = x0 · d(alpha) + eps · d(sigma). First order.

    On a flow schedule that is x + (sigma' - sigma) · output. On any schedule it is DDIM written differently: the two
    agree to rounding.
    """
    x = _wide(x)
    for i, (t, t_next) in enumerate(pairwise(times), 1):
        (alpha, sigma), (alpha_next, sigma_next) = _levels(schedule, t, t_next)
        x0, eps = _x0_eps(denoise(x, t), x, alpha, sigma, prediction)
        x = x + (alpha_next - alpha) * x0 + (sigma_next - sigma) * eps
        _report(on_step, i, x)
    return x


@torch.no_grad()
def heun(
    denoise: Denoiser,
    x: Latent,
    times: Sequence[float],
    *,
    schedule: Schedule,
    prediction: Prediction,
    draw: Draw | None = None,
    on_step: OnStep | None = None,
) -> Latent:
    """Heun's method on Euler's equation: the mean of both ends' directions. Second order, two calls per step.

    The step onto the clean latent stays Euler's: no network is trained there.
    """
    x = _wide(x)
    for i, (t, t_next) in enumerate(pairwise(times), 1):
        (alpha, sigma), (alpha_next, sigma_next) = _levels(schedule, t, t_next)
        x0, eps = _x0_eps(denoise(x, t), x, alpha, sigma, prediction)
        guess = x + (alpha_next - alpha) * x0 + (sigma_next - sigma) * eps
        if sigma_next > 0:
            x0_next, eps_next = _x0_eps(denoise(guess, t_next), guess, alpha_next, sigma_next, prediction)
            x = x + (alpha_next - alpha) * (x0 + x0_next) / 2 + (sigma_next - sigma) * (eps + eps_next) / 2
        else:
            x = guess
        _report(on_step, i, x)
    return x


@torch.no_grad()
def dpm(
    denoise: Denoiser,
    x: Latent,
    times: Sequence[float],
    *,
    schedule: Schedule,
    prediction: Prediction,
    draw: Draw,
    on_step: OnStep | None = None,
) -> Latent:
    """DPM-Solver++ 2M, stochastic (arXiv:2211.01095): CogVideoX's own choice. One draw per step."""
    x, x0_old, lambda_old = _wide(x), None, math.nan
    for i, (t, t_next) in enumerate(pairwise(times), 1):
        (alpha, sigma), (alpha_next, sigma_next) = _levels(schedule, t, t_next)
        x0 = to_x0(denoise(x, t), x, alpha, sigma, prediction)
        towards = _extrapolated(x0, x0_old, lambda_old, _lambda(alpha, sigma), _lambda(alpha_next, sigma_next))
        # exp(lambda - lambda_next): 0 from pure noise and 0 onto the clean latent
        decay = (alpha * sigma_next) / (sigma * alpha_next)
        x = (
            (sigma_next / sigma * decay) * x
            + (alpha_next * (1 - decay**2)) * towards
            + (sigma_next * (1 - decay**2) ** 0.5) * draw(x)
        )
        x0_old, lambda_old = x0, _lambda(alpha, sigma)
        _report(on_step, i, x)
    return x


@torch.no_grad()
def dpm_ode(
    denoise: Denoiser,
    x: Latent,
    times: Sequence[float],
    *,
    schedule: Schedule,
    prediction: Prediction,
    draw: Draw | None = None,
    on_step: OnStep | None = None,
) -> Latent:
    """DPM-Solver++ 2M without noise (arXiv:2211.01095): DDIM with x0 extrapolated to mid-step. Second order."""
    x, x0_old, lambda_old = _wide(x), None, math.nan
    for i, (t, t_next) in enumerate(pairwise(times), 1):
        (alpha, sigma), (alpha_next, sigma_next) = _levels(schedule, t, t_next)
        x0 = to_x0(denoise(x, t), x, alpha, sigma, prediction)
        towards = _extrapolated(x0, x0_old, lambda_old, _lambda(alpha, sigma), _lambda(alpha_next, sigma_next))
        ratio = sigma_next / sigma
        x = ratio * x + (alpha_next - alpha * ratio) * towards
        x0_old, lambda_old = x0, _lambda(alpha, sigma)
        _report(on_step, i, x)
    return x


@torch.no_grad()
def lcm(
    denoise: Denoiser,
    x: Latent,
    times: Sequence[float],
    *,
    schedule: Schedule,
    prediction: Prediction,
    draw: Draw,
    on_step: OnStep | None = None,
) -> Latent:
    """For students of few steps: predict the clean latent, noise it anew to the next time (arXiv:2310.04378).

    Nothing is kept of x, so an ordinary network needs many steps more with it than with `ddim`. One draw per step, none
    onto the clean latent.
    """
    x = _wide(x)
    for i, (t, t_next) in enumerate(pairwise(times), 1):
        (alpha, sigma), (alpha_next, sigma_next) = _levels(schedule, t, t_next)
        x0 = to_x0(denoise(x, t), x, alpha, sigma, prediction)
        x = alpha_next * x0 + sigma_next * draw(x) if sigma_next > 0 else x0
        _report(on_step, i, x)
    return x


SAMPLERS = {"ddim": ddim, "dpm": dpm, "dpm-ode": dpm_ode, "euler": euler, "heun": heun, "lcm": lcm}


def _wide(x: Tensor) -> Tensor:
    """At least float32: a latent rounded to bfloat16 after each step loses what small steps change."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _levels(schedule: Schedule, t: float, t_next: float) -> tuple[tuple[float, float], tuple[float, float]]:
    return (schedule.alpha(t), schedule.sigma(t)), (schedule.alpha(t_next), schedule.sigma(t_next))


def _x0_eps(output: Tensor, x: Tensor, alpha: float, sigma: float, prediction: Prediction) -> tuple[Tensor, Tensor]:
    return to_x0(output, x, alpha, sigma, prediction), to_eps(output, x, alpha, sigma, prediction)


def _lambda(alpha: float, sigma: float) -> float:
    """log(alpha / sigma), half the log SNR: -inf in pure noise, inf in the clean latent."""
    return -math.inf if alpha == 0 else math.inf if sigma == 0 else math.log(alpha / sigma)


def _extrapolated(x0: Tensor, x0_old: Tensor | None, lambda_old: float, lambda_: float, lambda_next: float) -> Tensor:
    """x0 at the middle of the step in lambda, on the line through the last two; plain x0 in the first and last step.

    After a first step from pure noise (lambda = -inf) the old x0 is infinitely far away: its weight is 0 by itself.
    """
    if x0_old is None or lambda_next == math.inf:
        return x0
    weight = (lambda_next - lambda_) / (lambda_ - lambda_old) / 2
    return (1 + weight) * x0 - weight * x0_old


def load_scheduler(config: dict[str, Any]) -> Any:
    """A fresh scheduler from a `scheduler_config.json`; its `_class_name` may only name a scheduler of diffusers."""
    from diffusers import SchedulerMixin, schedulers

    name = str(config.get("_class_name", ""))
    found = getattr(schedulers, name, None) if name.endswith("Scheduler") else None
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        near = get_close_matches(name, [known for known in dir(schedulers) if known.endswith("Scheduler")], n=1)
        raise InvalidRequest(
            f"diffusers has no scheduler {name!r}.",
            why="`_class_name` in scheduler_config.json must name one.",
            hint=f"did you mean {near[0]!r}?" if near else "CogVideoXDDIMScheduler is the usual one.",
            param="sampler",
        )
    try:
        return found.from_config(config)  # type: ignore[attr-defined]
    except Exception as error:  # each scheduler raises its own kinds
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = "fetch or copy scheduler_config.json again."
        raise InvalidRequest(f"{name} cannot be made of its config.", why=why, hint=hint, param="sampler") from error


def scheduler_times(scheduler: Any, num_inference_steps: int) -> list[float]:
    """The times of the steps `diffusers_sampler` will make. Not always n of them: see docs/diffusion.md."""
    scheduler.set_timesteps(num_inference_steps)
    return [float(t) for t in scheduler.timesteps]


@torch.no_grad()
def diffusers_sampler(
    denoise: Denoiser,
    x: Latent,
    num_inference_steps: int,
    *,
    scheduler: Any,
    generator: torch.Generator | list[torch.Generator] | None = None,
    first_step: int = 0,
    on_step: OnStep | None = None,
) -> Latent:
    """Sample with a scheduler of diffusers, bit-equal to diffusers' CogVideoX pipelines given equal network outputs.

    x is plain N(0, 1) noise; with `first_step` > 0 it is a latent that `scheduler.add_noise` took to that step's time.
    The latent returns to x's dtype after every step (diffusers: to the prompt's): in bfloat16 part of the numbers.
    """
    scheduler.set_timesteps(num_inference_steps, device=x.device)
    timesteps = scheduler.timesteps[first_step * scheduler.order :]
    accepts = inspect.signature(scheduler.step).parameters
    # flow-matching schedulers have neither of these two: their noise has unit variance and their input is not scaled
    scale_model_input = getattr(scheduler, "scale_model_input", lambda sample, t: sample)
    dtype, x0_old = x.dtype, None
    if first_step == 0:
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)

    extra = {name: value for name, value in {"generator": generator, "eta": 0.0}.items() if name in accepts}
    for i, (t, time) in enumerate(zip(timesteps, timesteps.tolist(), strict=True)):
        output = denoise(scale_model_input(x, t), float(time))
        if "old_pred_original_sample" in accepts:  # CogVideoXDPMScheduler keeps no memory of its own
            back = timesteps[i - 1] if i > 0 else None
            x, x0_old = scheduler.step(output, x0_old, t, back, x, **extra, return_dict=False)
        else:
            x = scheduler.step(output, t, x, **extra, return_dict=False)[0]
        x = x.to(dtype)
        _report(on_step, i + 1, x)
    return x


def _report(on_step: OnStep | None, step: int, x: Tensor) -> None:
    if on_step is not None:
        on_step(step, x)
