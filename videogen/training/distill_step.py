"""What a student of few steps learns: to jump along its teacher's path, then to match its teacher's distribution.

    consistency_loss   every point of one path of the teacher leads the student to one end (arXiv:2310.04378)
    matching_loss      the student's samples move to where the teacher's score and the critic's agree (arXiv:2405.14867)
    critic_loss        the critic learns to denoise what the student makes now

Three roles, each a `Model`: (x, t [b], conditioning) -> raw output. All speak of the clean latent that an output means,
so any prediction and any schedule will do; at alpha = 0 nothing is divided by alpha. Guidance is part of the teacher:
the student is told what to make and is asked once per step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import reduce
from jaxtyping import Float, Int, Num
from torch import Tensor

from videogen.diffusion import objective
from videogen.diffusion.denoiser import Model, denoiser, stack
from videogen.diffusion.prediction import Prediction, to_x0
from videogen.diffusion.samplers import lcm
from videogen.diffusion.schedule import Schedule
from videogen.types import Conditioning, Latent

Draw = Callable[[Tensor], Tensor]  # N(0, 1) like the tensor it is shown


@dataclass(frozen=True)
class Process:
    """How latents are noised, and what all networks of the family predict."""

    schedule: Schedule
    prediction: Prediction

    def clean(self, model: Model, x: Latent, t: Num[Tensor, " b"], cond: Conditioning) -> Latent:
        """The clean latent that the model sees in x; where no noise is left, x itself."""
        alpha, sigma = objective.levels(t, self.schedule, x.dtype)
        return torch.where(sigma > 0, to_x0(model(x, t, cond).to(x.dtype), x, alpha, sigma, self.prediction), x)

    def jump(self, x: Latent, x0: Latent, t: Num[Tensor, " b"], to: Num[Tensor, " b"]) -> Latent:
        """One step of DDIM, each sample between times of its own; what is clean stays."""
        (alpha, sigma), (alpha_to, sigma_to) = (objective.levels(s, self.schedule, x.dtype) for s in (t, to))
        ratio = (sigma_to / sigma).nan_to_num(0.0)
        return ratio * x + (alpha_to - alpha * ratio) * x0


@dataclass(frozen=True)
class Told:
    """What a batch is told, and the same without the words: the two halves of the teacher's guidance."""

    cond: Conditioning
    uncond: Conditioning


@dataclass(frozen=True)
class Teacher:
    """A frozen model with its guidance folded in."""

    model: Model
    guidance_scale: float
    process: Process

    @torch.no_grad()
    def __call__(self, x: Latent, t: Num[Tensor, " b"], told: Told) -> Latent:
        """The clean latent it sees. Guiding x0 is guiding the output: one is affine in the other."""
        if self.guidance_scale <= 1:
            return self.process.clean(self.model, x, t, told.cond)
        both = stack(told.uncond, told.cond)
        without, with_ = self.process.clean(self.model, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return without + self.guidance_scale * (with_ - without)


def consistency_loss(
    student: Model,
    teacher: Teacher,
    told: Told,
    x0: Latent,
    noise: Latent,
    place: Int[Tensor, " b"],
    *,
    times: Sequence[float],
    jumps: int = 1,
) -> Float[Tensor, " b"]:
    """From `times[place]` the student must see what it sees `jumps` steps of the teacher further on.

    The second look is the student's own, without gradient (arXiv:2310.14189), and so is the pseudo-Huber distance. With
    as many jumps as there are steps nothing is left to look at: then the student learns where the teacher's path ends.
    """
    process, levels = teacher.process, torch.tensor(times, dtype=torch.float64, device=x0.device)
    t = levels[place]
    x = further = objective.noised(x0, noise, t, process.schedule)
    with torch.no_grad():
        for _ in range(jumps):
            at, place = levels[place], (place + 1).clamp(max=len(times) - 1)
            further = process.jump(further, teacher(further, at, told), at, levels[place])
        wanted = process.clean(student, further, levels[place], told.cond)
    square = reduce((process.clean(student, x, t, told.cond) - wanted) ** 2, "b f c h w -> b", "mean")
    bend = 5.4e-4
    return (square + bend**2).sqrt() - bend


def matching_loss(
    student: Model,
    critic: Model,
    teacher: Teacher,
    told: Told,
    noise: Latent,
    t: Num[Tensor, " b"],
    step: int,
    draw: Draw,
    *,
    times: Sequence[float],
) -> Float[Tensor, " b"]:
    """Its gradient moves the student's samples from where the critic sees them to where the teacher does.

    The difference is divided by the teacher's own mean error per sample, so that every time t pulls alike
    (arXiv:2311.18828, equation 8). The value is half the mean square of that pull.
    """
    process = teacher.process
    x0 = sample(student, told, noise, step, draw, times=times, process=process)
    with torch.no_grad():
        x = objective.noised(x0, draw(x0), t, process.schedule)
        real, fake = teacher(x, t, told), process.clean(critic, x, t, told.cond)
        size = reduce((x0 - real).abs(), "b f c h w -> b 1 1 1 1", "mean")
        wanted = x0 - (fake - real) / size.clamp(min=1e-6)
    return reduce((x0 - wanted) ** 2, "b f c h w -> b", "mean") / 2


def critic_loss(
    critic: Model,
    student: Model,
    told: Told,
    noise: Latent,
    t: Num[Tensor, " b"],
    step: int,
    draw: Draw,
    *,
    times: Sequence[float],
    process: Process,
) -> Float[Tensor, " b"]:
    """The family's own training loss, on what the student makes now."""
    with torch.no_grad():
        x0 = sample(student, told, noise, step, draw, times=times, process=process)
    return objective.loss(
        lambda x, t: critic(x, t, told.cond),
        x0,
        draw(x0),
        t,
        schedule=process.schedule,
        prediction=process.prediction,
    )


def sample(
    student: Model, told: Told, noise: Latent, step: int, draw: Draw, *, times: Sequence[float], process: Process
) -> Latent:
    """What the student makes at its step `step`, from the input that its own earlier steps lead to.

    Those steps are the sampler's, without gradient: training sees what sampling will see.
    """
    kind = {"schedule": process.schedule, "prediction": process.prediction}
    x = lcm(denoiser(student, told.cond), noise, times[: step + 1], draw=draw, **kind)
    return process.clean(student, x, torch.full((len(x),), times[step], device=x.device), told.cond)
