"""All randomness of training, as a function of what it is for: no state to save, the same numbers on any machine.

Order, crop, caption, condition, time, noise and dropout of a sample depend on (seed, epoch, its name) alone. So a run
that was killed goes on with the numbers it would have drawn, and one process draws what several would.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def draws(seed: int, epoch: int, name: str, purpose: str) -> np.random.Generator:
    """A stream of random numbers of its own for each sample and purpose: `draws(0, 3, "clips/a.mp4", "noise")`.

    Philox is counter-based (Salmon et al. 2011): streams of different keys are independent, and a key costs nothing to
    make. The key is a hash of the four, so the streams are the same in every process and after every restart.
    """
    key = hashlib.blake2b(f"{seed}\n{epoch}\n{purpose}\n{name}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def draw_noise(rng: np.random.Generator, shape: Sequence[int]) -> Float[Tensor, "..."]:
    """N(0, 1) in float32 on the CPU."""
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


def draw_level(seed: int, step: int, place: int, count: int, rng: np.random.Generator) -> float:
    """Where in [0, 1) the sample at `place` of the `count` of a step's global batch lies on the scale of times.

    Each sample has one of `count` equal bands to itself, another one in each step, and its own place inside it: uniform
    for each sample, and a quieter loss for all together, at any number of processes.
    """
    if not 0 <= place < count:
        raise ValueError(f"place {place} of {count}")
    band = _bands(seed, step, count)[place]
    return min((int(band) + rng.random()) / count, 1 - 2**-24)


_last: dict[tuple[int, int, int], np.ndarray] = {}  # of one step: every sample of it asks


def _bands(seed: int, step: int, count: int) -> np.ndarray:
    key = (seed, step, count)
    if key not in _last:
        _last.clear()
        _last[key] = draws(seed, step, "", "bands").permutation(count)
    return _last[key]
