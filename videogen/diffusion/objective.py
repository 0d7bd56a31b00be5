"""The training loss, and at which times to take it.

The network is trained on its own output (plain MSE against `prediction.target`). For v-prediction that is the x0 error
weighted with 1 / (1 - alpha²), the form in which CogVideoX writes it: x0's error is sigma times v's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Num
from torch import Tensor

from videogen.diffusion.prediction import Prediction, add_noise, target
from videogen.diffusion.schedule import Schedule
from videogen.types import Latent


def noised(x0: Latent, noise: Latent, t: Num[Tensor, "b"], schedule: Schedule) -> Latent:
    """x0 at time t, in x0's dtype."""
    return add_noise(x0, noise, *levels(t, schedule, x0.dtype))


def loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    x0: Latent,
    noise: Latent,
    t: Num[Tensor, "b"],
    *,
    schedule: Schedule,
    prediction: Prediction,
    where: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "b"]:
    """Mean squared error per sample. `predict(x_t, t [b])` is the network with its conditioning filled in.

    where  1 at the latents that count and 0 at the others, broadcast against x0; None: all count

    Give x0 and noise in float32 (the network may compute in less): the error is taken in their precision.
    """
    wanted = target(x0, noise, *levels(t, schedule, x0.dtype), prediction)
    error = predict(noised(x0, noise, t, schedule), t).to(x0.dtype) - wanted
    square = error**2 if where is None else error**2 * (where / where.mean())
    return reduce(square, "b f c h w -> b", "mean")


def levels(t: Tensor, schedule: Schedule, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of each sample, shaped to multiply latents."""
    alpha, sigma = schedule.alpha(t).to(dtype), schedule.sigma(t).to(dtype)
    return rearrange(alpha, "b -> b 1 1 1 1"), rearrange(sigma, "b -> b 1 1 1 1")


def uniform(batch: int, schedule: Schedule, generator: torch.Generator) -> Num[Tensor, "b"]:
    """Independent training times."""
    return schedule.time(torch.rand(batch, generator=generator))


def stratified(batch: int, schedule: Schedule, generator: torch.Generator) -> Num[Tensor, "b"]:
    """One time from each of `batch` equal ranges, in random order: uniform for each sample, and a quieter loss.

    Over several devices: draw for the whole batch with one seed everywhere, and take this device's share.
    """
    place = torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)
    return schedule.time((place / batch).clamp(max=1 - 2**-24))


def banded(
    batch: int,
    schedule: Schedule,
    generator: torch.Generator,
    *,
    low: float = 0.03,
    high: float = 10.0,
    share: float = 0.75,
) -> Num[Tensor, "b"]:
    """Uniform times, except that a `share` of the samples is drawn where low <= SNR <= high.

    There the picture is decided; near pure noise and near the clean latent a small model has little left to learn.
    """
    cells = schedule.num_train_timesteps
    u = (torch.arange(cells) + 0.5) / cells
    snr = schedule.snr(schedule.time(u))
    band = u[(snr >= low) & (snr <= high)]
    inside = band[torch.randint(len(band), (batch,), generator=generator)]
    anywhere = torch.rand(batch, generator=generator)
    return schedule.time(torch.where(torch.rand(batch, generator=generator) < share, inside, anywhere))
