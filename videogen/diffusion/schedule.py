"""Noise schedules: how much signal alpha(t) and noise sigma(t) a noisy latent holds at time t.

    x_t = alpha(t) · x0 + sigma(t) · noise,   noise ~ N(0, 1)

Time is the number the network is told: 0 … 999 for the published models, larger is noisier. A schedule also knows the
time that means "no noise left" (`clean`), at which no network is ever called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from videogen.errors import InvalidRequest


class Schedule:
    """The pair (alpha, sigma) as functions of time; numbers in, Python floats out; tensors in, float64 tensors out."""

    num_train_timesteps: int
    clean: float

    def alpha(self, t: Any) -> Any:
        raise NotImplementedError

    def sigma(self, t: Any) -> Any:
        raise NotImplementedError

    def times(self, num_inference_steps: int) -> list[float]:
        """The n times at which the network is called, noisiest first, and then `clean`: n + 1 entries."""
        raise NotImplementedError

    def time(self, u: Float[Tensor, "..."]) -> Tensor:
        """The training time at quantile u in [0, 1), small to large."""
        raise NotImplementedError

    def snr(self, t: Any) -> Any:
        """Signal-to-noise ratio alpha² / sigma²; infinite where there is no noise."""
        alpha, sigma = (torch.as_tensor(value, dtype=torch.float64) for value in (self.alpha(t), self.sigma(t)))
        ratio = (alpha / sigma) ** 2
        return ratio if isinstance(t, Tensor) else float(ratio)

    @staticmethod
    def from_config(config: dict[str, Any]) -> Schedule:
        """The schedule of a `scheduler_config.json`, in the order of diffusers: betas, shift, zero terminal SNR."""
        name = config.get("_class_name", "CogVideoXDDIMScheduler")
        steps = config.get("num_train_timesteps", 1000)
        if name.startswith("FlowMatch"):
            return FlowSchedule(num_train_timesteps=steps, shift=config.get("shift", 1.0))

        # What a key means when the file leaves it out: CogVideoX's classes differ from the other classes of diffusers.
        ours = name.startswith("CogVideoX")
        start = config.get("beta_start", 0.00085 if ours else 0.0001)
        end = config.get("beta_end", 0.012 if ours else 0.02)
        kind = config.get("beta_schedule", "scaled_linear" if ours else "linear")
        shift = config.get("snr_shift_scale", 3.0 if ours else 1.0)

        if config.get("trained_betas") is not None:
            betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
        elif kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        elif kind == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float64)
        else:
            raise InvalidRequest(
                f"the scheduler's beta_schedule {kind!r} is not known to our samplers.",
                why="they know 'scaled_linear' and 'linear'.",
                hint='use sampler="diffusers".',
                param="sampler",
            )
        table = shift_snr(torch.cumprod(1 - betas, 0), shift)
        return DiscreteSchedule(zero_terminal_snr(table) if config.get("rescale_betas_zero_snr") else table)


def shift_snr(alphas_cumprod: Float64[Tensor, "t"], shift: float) -> Float64[Tensor, "t"]:
    """Divide the signal-to-noise ratio by `shift`: larger latents need more noise to be hidden as well."""
    return alphas_cumprod / (shift + (1 - shift) * alphas_cumprod)


def zero_terminal_snr(alphas_cumprod: Float64[Tensor, "t"]) -> Float64[Tensor, "t"]:
    """Move the last level to pure noise and keep the first one (algorithm 1 of arXiv:2305.08891)."""
    root = alphas_cumprod.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * (first / (first - last))) ** 2


@dataclass(frozen=True, eq=False)
class DiscreteSchedule(Schedule):
    """Variance preserving (alpha² + sigma² = 1), given by a table of alpha² at the integer times 0 … T-1.

    Below time 0 lies the clean latent at time -1; between table entries alpha² is interpolated.
    """

    alphas_cumprod: Float64[Tensor, "t"]
    clean: float = -1.0

    @property
    def num_train_timesteps(self) -> int:  # type: ignore[override]
        return len(self.alphas_cumprod)

    def alpha_cumprod(self, t: Any) -> Float64[Tensor, "..."]:
        """alpha², float64, on t's device."""
        t = torch.as_tensor(t, dtype=torch.float64)
        table = torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod]).to(t.device)
        place = (t + 1).clamp(0, len(table) - 1)
        below = place.floor().long()
        above = (below + 1).clamp(max=len(table) - 1)
        return table[below] + (place - below) * (table[above] - table[below])

    def alpha(self, t: Any) -> Any:
        value = self.alpha_cumprod(t) ** 0.5
        return value if isinstance(t, Tensor) else float(value)

    def sigma(self, t: Any) -> Any:
        value = (1 - self.alpha_cumprod(t)) ** 0.5
        return value if isinstance(t, Tensor) else float(value)

    def times(self, num_inference_steps: int) -> list[float]:
        """Trailing spacing, so that the first time is the one of pure noise: 999, 979, …, 19, -1 for 50 steps."""
        n = checked_steps(num_inference_steps, self.num_train_timesteps)
        # arange decides ties as diffusers does, and for some n yields an entry too many
        levels = np.arange(self.num_train_timesteps, 0, -self.num_train_timesteps / n)[:n]
        return [*(levels.round() - 1).tolist(), self.clean]

    def time(self, u: Float[Tensor, "..."]) -> Tensor:
        return (u * self.num_train_timesteps).long()


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """Straight lines from data to noise: sigma = t / T, alpha = 1 - sigma (rectified flow, arXiv:2209.03003).

    `shift` > 1 spends more of the steps, and of the training draws, at high noise (arXiv:2403.03206, equation 23).
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    clean: float = 0.0

    def alpha(self, t: Any) -> Any:
        return 1 - self.sigma(t)

    def sigma(self, t: Any) -> Any:
        value = (torch.as_tensor(t, dtype=torch.float64) / self.num_train_timesteps).clamp(0, 1)
        return value if isinstance(t, Tensor) else float(value)

    def times(self, num_inference_steps: int) -> list[float]:
        n = checked_steps(num_inference_steps, self.num_train_timesteps)
        return self.time(1 - torch.arange(n + 1, dtype=torch.float64) / n).tolist()

    def time(self, u: Float[Tensor, "..."]) -> Tensor:
        return self.num_train_timesteps * self.shift * u / (1 + (self.shift - 1) * u)


def checked_steps(num_inference_steps: int, most: int) -> int:
    if not 1 <= num_inference_steps <= most:
        raise InvalidRequest(
            f"num_inference_steps={num_inference_steps} is not possible.",
            why=f"the model knows {most} noise levels.",
            hint=f"choose 1 to {most}; 50 is usual.",
            param="num_inference_steps",
        )
    return num_inference_steps
