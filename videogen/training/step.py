"""Which samples a step sees, and everything random about them. What is learned from them stands in `lesson.py`.

All of it is a function of the seed, the epoch, the step and the samples' names: the same on any number of processes and
in micro-batches of any size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor

from videogen.conditioning.text import ABSENT
from videogen.config import ClipTraining, ConditionsConfig, DiTConfig, MaskingConfig
from videogen.data.buckets import epoch_batches, micro_batches, packs, share, token_count
from videogen.diffusion.denoiser import Model
from videogen.diffusion.schedule import Schedule
from videogen.errors import InvalidRequest
from videogen.models.dit import DiT
from videogen.training.draws import draw_level, draw_noise, draws
from videogen.training.examples import Examples
from videogen.training.lesson import Lesson, Told, told_frames, told_nothing
from videogen.training.masking import draw_kept, masked, shown
from videogen.training.packing import lesson_packed
from videogen.training.processes import Parallel
from videogen.training.trainer import LossesAt, MicroBatch


class Batches:
    """The global batch of every step: each sample once per epoch, in an order of its own."""

    def __init__(self, examples: Examples, config: ClipTraining, dit: DiTConfig) -> None:
        self.shapes = [examples.shape(i) for i in range(len(examples))]
        self.tokens = [token_count(dit, shape) for shape in self.shapes]
        self.config = config
        self._firsts, self._last = [0], (-1, [[]])  # the first steps of epochs; an epoch and its batches

    def at(self, step: int) -> tuple[int, list[int]]:
        """The epoch that a step falls into, and the numbers of its samples."""
        while step >= self._firsts[-1]:
            self._firsts.append(self._firsts[-1] + len(self._epoch(len(self._firsts) - 1)))
        epoch = int(np.searchsorted(self._firsts, step, "right")) - 1
        return epoch, self._epoch(epoch)[step - self._firsts[epoch]]

    def parts(self, batch: list[int], parallel: Parallel) -> list[list[int]]:
        """This process's micro-batches. Where processes compute in step with each other, empty ones may be among them,
        so that all have as many."""
        part = share(batch, self.tokens, parallel.data_rank, parallel.data_world)

        def divided(count: int = 0) -> list[list[int]]:
            if self.config.packed_tokens:
                return packs(part, self.tokens, self.config.packed_tokens, count=count)
            return micro_batches(part, self.shapes, self.config.micro_batch_size, count=count)

        parts = divided()
        rounds = getattr(parallel, "rounds", None)
        return divided(rounds(len(parts))) if rounds else parts

    def _epoch(self, epoch: int) -> list[list[int]]:
        if self._last[0] != epoch:
            budget = self.config.token_budget
            batches = epoch_batches(
                self.shapes,
                tokens=self.tokens,
                seed=self.config.fit.seed,
                epoch=epoch,
                batch_size=0 if budget else self.config.batch_size,
                token_budget=budget,
            )
            self._last = (epoch, batches)
        return self._last[1]


def losses_of(
    config: ClipTraining,
    batches: Batches,
    examples_at: Callable[[float], Examples],
    lesson: Lesson,
    model: Model,
    parallel: Parallel,
    *,
    conditions: ConditionsConfig | None = None,
    timesteps: str = "uniform",
    masking: MaskingConfig | None = None,
) -> LossesAt:
    """What `fit` asks for: the losses of this process's micro-batches of a step.

    examples_at  the samples as a step sees them that comes when this share of the run is done
    conditions   the frames that are told; None: none, for a model that can be told none
    timesteps    how often which time is drawn: a name of `DENSITIES`
    masking      computes a part of the video's tokens only, but for the end of the run; `model` is a DiT then
    """
    if timesteps not in DENSITIES:
        raise InvalidRequest(
            f"there are no timesteps {timesteps!r}.",
            why=f"they say how often each time is drawn: {', '.join(DENSITIES)}.",
            hint="timesteps: uniform",
            param="timesteps",
        )
    if masking and config.packed_tokens:
        raise InvalidRequest(
            "masking and packed_tokens do not go together.",
            why="masked clips share one set of tokens, packed ones have sizes of their own.",
            hint="leave one of them out.",
            param="packed_tokens",
        )
    density = DENSITIES[timesteps](lesson.schedule)
    seed, steps = config.fit.seed, config.fit.steps

    def losses_at(step: int) -> MicroBatches:
        done = step / steps
        examples = examples_at(done)
        epoch, batch = batches.at(step)

        def micro_batch(part: list[int]) -> MicroBatch:
            drawn = [
                draw_sample(
                    config, examples, index, step=step, epoch=epoch, batch=batch, conditions=conditions, done=done
                )
                for index in part or batch[:1]
            ]
            t = lesson.schedule.time(density(torch.tensor([one.level for one in drawn], dtype=torch.float64)))
            if config.packed_tokens:
                assert isinstance(model, DiT)
                loss = lesson_packed(lesson, model, [one.told for one in drawn], t, [one.noise for one in drawn])
                loss = loss / len(batch)
                return (loss, {}, [one.name for one in drawn]) if part else (loss * 0, {}, [])
            noise = torch.stack([one.noise for one in drawn])
            predict, where = model, None
            if masking and done < 1 - masking.finish:
                assert isinstance(model, DiT)
                f, _, h, w = noise.shape[1:]
                generator = torch.Generator().manual_seed(_number(draws(seed, step, f"{f} {h} {w}", "masking")))
                kept = draw_kept(model.config, masking, f, h, w, generator).to(lesson.device)
                predict = masked(model, kept, masking.mixer_layers)
                where = shown(kept, model.config, f, h, w)
            loss = lesson(predict, [one.told for one in drawn], t, noise, where=where) / len(batch)
            return (loss, {}, [one.name for one in drawn]) if part else (loss * 0, {}, [])

        return MicroBatches(batches.parts(batch, parallel), micro_batch)

    return losses_at


@dataclass(frozen=True)
class MicroBatches:
    """A step's micro-batches, each computed when it is asked for."""

    parts: Sequence[list[int]]
    compute: Callable[[list[int]], MicroBatch]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[MicroBatch]:
        return map(self.compute, self.parts)


# ---- one sample -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A sample of a step: what it shows and is told, and its noise."""

    name: str
    told: Told
    level: float  # in [0, 1): its place on the scale of times
    noise: Float[Tensor, "f c h w"]


def draw_sample(
    config: ClipTraining,
    examples: Examples,
    index: int,
    *,
    step: int,
    epoch: int,
    batch: Sequence[int],
    conditions: ConditionsConfig | None,
    done: float,
) -> Drawn:
    """Sample `index` of a step's global `batch`."""
    name, seed = examples.name(index), config.fit.seed

    def rng(purpose: str) -> np.random.Generator:
        return draws(seed, epoch, name, purpose)

    example = examples.read(index, rng("sample"))
    if rng("dropout").random() < config.caption_dropout:
        example = dataclasses.replace(example, text=ABSENT)
    told = told_frames(example, conditions, rng("condition"), done) if conditions else told_nothing(example)
    level = draw_level(seed, step, batch.index(index), len(batch), rng("time"))
    return Drawn(name, told, level, draw_noise(rng("noise"), example.latents.shape))


def _number(rng: np.random.Generator) -> int:
    return int(rng.integers(2**63))


# ---- times ----------------------------------------------------------------------------------------------------------

Density = Callable[[Num[Tensor, " b"]], Num[Tensor, " b"]]  # levels drawn evenly in [0, 1) -> as the density has them


def uniform(schedule: Schedule) -> Density:
    """All times alike."""
    return lambda u: u


def informative(schedule: Schedule, *, low: float = 0.03, high: float = 10.0, share: float = 0.75) -> Density:
    """All times alike, except that a `share` of the samples is drawn where low <= SNR <= high.

    There the picture is decided; near pure noise and near the clean latent a small model has little left to learn.
    """
    cells = schedule.num_train_timesteps
    snr = schedule.snr(schedule.time((torch.arange(cells) + 0.5) / cells))
    band = ((snr >= low) & (snr <= high)).double()
    weights = share * band / band.sum() + (1 - share) / cells
    ends = weights.cumsum(0)

    def quantile(u: Tensor) -> Tensor:
        cell = torch.searchsorted(ends, u.double(), right=True).clamp(max=cells - 1)
        inside = 1 - (ends[cell] - u) / weights[cell]
        return ((cell + inside.clamp(0, 1)) / cells).clamp(max=1 - 2**-24)

    return quantile


DENSITIES = {"uniform": uniform, "informative": informative}
