"""Which latent frames of a training clip the model is told, and with which picture.

One kind of condition is drawn per sample, by its share. What is told becomes a condition by the very function that
sampling uses, `conditioning.frames.known_frames`: here only the choice is made.

| kind       | told of f latent frames                               | for clips of |
|------------|-------------------------------------------------------|--------------|
| none       | nothing                                               | 1 or more    |
| first      | the first                                             | 2            |
| last       | the last                                              | 2            |
| first+last | both                                                  | 3            |
| prefix     | the first 2 … f - 1: the clip goes on                 | 3            |
| suffix     | the last 2 … f - 1: what came before                  | 3            |
| every      | each k-th from the first on, 2 or more: interpolation | 1 + k        |
| keyframes  | any 1 … f - 1                                         | 2            |
| all        | all: the clip is to be copied                         | 1            |

A clip too short for a kind is told one of the others, in the proportion of their shares; no other clip is drawn
differently for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from videogen.config import ConditionsConfig, ConditionStage
from videogen.errors import InvalidRequest

Known = Bool[np.ndarray, " f"]
Kind = Callable[[int, np.random.Generator, tuple[int, ...], float], Known]  # f, rng, the k of "every", the least share
WITH_LAST = ("last", "first+last")


def draw_conditions(config: ConditionsConfig, f: int, rng: np.random.Generator, done: float = 1.0) -> Known:
    """Which of the `f` latent frames of one sample are told. `done`: how much of the run is, for the curriculum."""
    return _draw(config, f, rng, done)[1]


def tell_frames(
    config: ConditionsConfig, frame_latents: Float[Tensor, "f c h w"], rng: np.random.Generator, done: float = 1.0
) -> tuple[Float[Tensor, "f c h w"], Bool[Tensor, " f"]]:
    """The latents a sample is told frame by frame, and which of them are known: for `frames.known_frames`.

    frame_latents  each latent frame's picture, encoded alone

    As "last" the model may be shown one of the pictures before it (`last_among`): so it learns to end near what
    a user draws, not on it. Noise (`noise`) is drawn for each sample with a strength of its own. The published one lies
    on pixels before they are encoded (`noisy_image`); pictures encoded beforehand get it on their latents.
    """
    f, told = len(frame_latents), frame_latents
    kind, known = _draw(config, f, rng, done)
    if kind in WITH_LAST and config.last_among > 1:
        back = int(rng.integers(min(config.last_among, f - 1)))  # never the first frame's picture
        told = torch.cat([told[:-1], told[f - 1 - back][None]])
    if config.noise is not None:
        told = noisy_image(config, told, rng)
    return told, torch.from_numpy(known)


def _draw(config: ConditionsConfig, f: int, rng: np.random.Generator, done: float) -> tuple[str, Known]:
    kinds, least = possible_kinds(config, f, done), stage_at(config, done).least
    place = int(np.searchsorted(np.cumsum(list(kinds.values())), rng.random(), "right"))
    kind = list(kinds)[min(place, len(kinds) - 1)]  # the sum of the probabilities may fall short of 1 by a rounding
    known = KINDS[kind](f, rng, config.every, least)
    if kind in WITH_LAST and rng.random() < config.last_dropout:
        known[-1] = False
    if rng.random() < config.dropout:
        known[:] = False
    return kind, known


def noisy_image(config: ConditionsConfig, image: Float[Tensor, "..."], rng: np.random.Generator) -> Tensor:
    """A sample's picture, or pictures, with noise of one strength (CogVideoX-I2V, arXiv:2408.06072 section 2.5).

    Pixels in [-1, 1] before the encoder, as published, or scaled latents.
    """
    assert config.noise is not None
    sigma = float(np.exp(rng.normal(config.noise.mean, config.noise.std)))
    noise = torch.from_numpy(rng.standard_normal(tuple(image.shape), dtype=np.float32))
    return image + sigma * noise.to(image)


def stages_of(config: ConditionsConfig) -> list[ConditionStage]:
    """The stages of a run, one after the other; the last has no end."""
    if config.preset and config.preset not in CURRICULA:
        raise InvalidRequest(
            f"no curriculum {config.preset!r}.", hint=f"one of {', '.join(CURRICULA)}.", param="conditions.preset"
        )
    return CURRICULA.get(config.preset) or [*config.curriculum, ConditionStage(share=1.0, shares=config.shares)]


def stage_at(config: ConditionsConfig, done: float) -> ConditionStage:
    """What holds when this part of the run is done."""
    stages = stages_of(config)
    for stage in stages[:-1]:
        if done < stage.share:
            return stage
        done -= stage.share
    return stages[-1]


def possible_kinds(config: ConditionsConfig, f: int, done: float = 1.0) -> dict[str, float]:
    """The probability of each kind for a clip of `f` latent frames: those that it is long enough for."""
    shares = stage_at(config, done).shares
    fits = {kind: share for kind, share in shares.items() if share and f >= _least(config, kind)}
    total = sum(fits.values())
    return {kind: share / total for kind, share in fits.items()} if fits else {"none": 1.0}


def _least(config: ConditionsConfig, kind: str) -> int:
    """The fewest latent frames that a kind can be drawn for."""
    lengths = {"none": 1, "all": 1, "first": 2, "last": 2, "keyframes": 2, "every": 1 + min(config.every)}
    return lengths.get(kind, 3)


# ---- kinds ----------------------------------------------------------------------------------------------------------


def _told(*slices: slice) -> Kind:
    """Always the same frames."""

    def draw(f: int, rng: np.random.Generator, every: tuple[int, ...], least: float) -> Known:
        known = np.zeros(f, dtype=bool)
        for part in slices:
            known[part] = True
        return known

    return draw


def _prefix(f: int, rng: np.random.Generator, every: tuple[int, ...], least: float) -> Known:
    return np.arange(f) < rng.integers(min(max(2, math.ceil(least * f)), f - 1), f)


def _suffix(f: int, rng: np.random.Generator, every: tuple[int, ...], least: float) -> Known:
    return _prefix(f, rng, every, least)[::-1].copy()


def _every(f: int, rng: np.random.Generator, every: tuple[int, ...], least: float) -> Known:
    return np.arange(f) % rng.choice([k for k in every if k < f]) == 0


def _keyframes(f: int, rng: np.random.Generator, every: tuple[int, ...], least: float) -> Known:
    return np.isin(np.arange(f), rng.permutation(f)[: rng.integers(min(max(1, math.ceil(least * f)), f - 1), f)])


KINDS: dict[str, Kind] = {
    "none": _told(),
    "first": _told(slice(1)),
    "last": _told(slice(-1, None)),
    "first+last": _told(slice(1), slice(-1, None)),
    "prefix": _prefix,
    "suffix": _suffix,
    "every": _every,
    "keyframes": _keyframes,
    "all": _told(slice(None)),
}


def _stage(millions: int, least: float = 0.0, **shares: float) -> ConditionStage:
    shares = {"first+last" if kind == "both" else kind: share for kind, share in shares.items()}
    return ConditionStage(share=millions / 50, shares=shares, least=least)


# Open-Sora-Plan v1.3's seven steps, 50 million samples long (report v1.3.0, "Progressive training"; arXiv:2412.00131):
# much is told at first, little in the end. Its second phase goes on as the last step.
CURRICULA: dict[str, list[ConditionStage]] = {
    "open-sora-plan": [
        _stage(4, 0.5, none=0.1, prefix=0.4, keyframes=0.4, all=0.1),
        _stage(4, 0.25, none=0.1, prefix=0.4, keyframes=0.4, all=0.1),
        _stage(4, 0.125, none=0.1, prefix=0.4, keyframes=0.4, all=0.1),
        _stage(4, 0.125, none=0.1, prefix=0.25, keyframes=0.6, all=0.05),
        _stage(8, none=0.1, prefix=0.25, keyframes=0.6, all=0.05),
        _stage(16, none=0.1, prefix=0.1, keyframes=0.2, first=0.4, both=0.2),
        _stage(10, none=0.05, prefix=0.05, keyframes=0.1, first=0.4, both=0.4),
    ]
}
