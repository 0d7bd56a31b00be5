"""Leaving out evaluations of the blocks whose answer can be foretold, within an error budget. Lossy, for one clip.

What all blocks together add to the video tokens changes smoothly from step to step. A left-out evaluation adds what
the last two computed ones say by a straight line over time, or, where the sampler adds noise that such a line would
magnify, what the last one added; embedding and projection still run. Which evaluations are left out depends on their
times alone, by the account of MagCache (arXiv:2506.09045): the addition's mean magnitude over time is measured once per
model (`recorded`, a `Curve`), its change since the last computed evaluation stands for the error, and evaluations are
left out while the sum of these errors stays below the budget. So a clip does not depend on those it is made with, nor
on how guidance is batched, every process decides the same, and the GPU is not waited for.
"""

from __future__ import annotations

import dataclasses
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videogen.data.files import written
from videogen.errors import InvalidRequest
from videogen.models.dit import DiT
from videogen.models.replaced import give_back
from videogen.types import Conditioning, Tokens

EARLY = 800.0  # above this time everything is computed: here the picture is laid out, and errors grow on the way
FILE = "step_cache.json"  # where a model's folder keeps its curve


@dataclass(frozen=True)
class Curve:
    """Mean magnitude of what the blocks add to the video tokens, at ascending times; between them its logarithm is
    straight, outside them it stays."""

    times: tuple[float, ...]
    magnitudes: tuple[float, ...]

    def at(self, t: float) -> float:
        times, logs = self.times, [math.log(m) for m in self.magnitudes]
        if t <= times[0] or t >= times[-1]:
            return self.magnitudes[0 if t <= times[0] else -1]
        after = bisect_left(times, t)
        share = (t - times[after - 1]) / (times[after] - times[after - 1])
        return math.exp(logs[after - 1] + share * (logs[after] - logs[after - 1]))


@dataclass
class Branch:
    """Of one branch of guidance: the last two additions [b, n, d] with their times, and the account."""

    told: tuple[Conditioning, ...]
    computed: list[tuple[float, Tensor]] = field(default_factory=list)
    error: float = 0.0


class StepCache:
    """The block loop of one clip. `announce` goes to `diffusion.denoiser.guided`; the counts are for reports."""

    def __init__(
        self, run_blocks: Callable[[Tokens], Tokens], curve: Curve, budget: float, *, straight: bool = True
    ) -> None:
        self.run_blocks, self.curve, self.budget, self.straight = run_blocks, curve, budget, straight
        self.evaluations = self.skipped = 0
        self.branches: dict[tuple[str, ...], Branch] = {}
        self.time, self.branch = 0.0, Branch(())

    def announce(self, t: float, told: Mapping[str, Conditioning]) -> None:
        """The coming evaluation is at time t, for these branches. One told something else than before starts anew."""
        branch = self.branches.get(tuple(told))
        if branch is None or any(a is not b for a, b in zip(branch.told, told.values(), strict=True)):
            branch = self.branches[tuple(told)] = Branch(tuple(told.values()))
        self.time, self.branch = t, branch

    def __call__(self, tokens: Tokens) -> Tokens:
        if torch.is_grad_enabled():
            return self.run_blocks(tokens)
        self.evaluations += 1
        if self._may_skip():
            self.skipped += 1
            text, video = tokens.x.split([tokens.text_length, tokens.x.shape[1] - tokens.text_length], dim=1)
            return dataclasses.replace(tokens, x=torch.cat([text, video + self._foretold()], dim=1))
        after = self.run_blocks(tokens)
        added = after.x[:, tokens.text_length :] - tokens.x[:, tokens.text_length :]
        known = [(t, x) for t, x in self.branch.computed if t != self.time]  # heun asks twice at one time
        self.branch.computed, self.branch.error = [*known[-1:], (self.time, added)], 0.0
        return after

    def _may_skip(self) -> bool:
        branch = self.branch
        if self.time > EARLY or len(branch.computed) < 2:
            return False
        branch.error += abs(1 - self.curve.at(self.time) / self.curve.at(branch.computed[-1][0]))
        return branch.error < self.budget

    def _foretold(self) -> Tensor:
        (before, a), (last, b) = self.branch.computed
        return torch.lerp(a, b, (self.time - before) / (last - before)) if self.straight else b


@contextmanager
def step_cache(dit: DiT, curve: Curve, budget: float, *, straight: bool = True) -> Iterator[StepCache]:
    """For the time of a `with`, which is one clip's, the loop of `dit` is a `StepCache`; then it is what it was.

    straight  foretell by a straight line through the last two; False where the sampler adds noise on the way
    """
    cache = StepCache(dit.run_blocks, curve, budget, straight=straight)
    with _loop(dit, cache):
        yield cache


@contextmanager
def recorded(dit: DiT) -> Iterator[dict[float, list[float]]]:
    """Calibration: generate one clip or a few in this `with`, then make a curve of what it gives by `curve_of`.

    with recorded(pipe.dit) as seen:
        pipe.generate(["a red circle moves right"], num_inference_steps=50)
    """
    run_blocks, seen, now = dit.run_blocks, {}, []

    def run(tokens: Tokens) -> Tokens:
        after = run_blocks(tokens)
        added = after.x[:, tokens.text_length :] - tokens.x[:, tokens.text_length :]
        seen.setdefault(now[-1], []).append(float(added.float().abs().mean()))
        return after

    def told_time(module: Any, args: tuple) -> None:
        now[:] = [float(args[1][0])]

    hook = dit.register_forward_pre_hook(told_time)
    try:
        with _loop(dit, run):
            yield seen
    finally:
        hook.remove()


def curve_of(seen: Mapping[float, list[float]]) -> Curve:
    times = sorted(seen)
    return Curve(tuple(times), tuple(round(sum(seen[t]) / len(seen[t]), 4) for t in times))


def save_curve(folder: str | Path, curve: Curve, *, transformer_sha256: str | None) -> Path:
    """Beside the weights it was measured on, with their hash: after further training it is another model's."""
    path = Path(folder) / FILE
    data = {"transformer_sha256": transformer_sha256, **dataclasses.asdict(curve)}
    with written(path) as part:
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return path


def load_curve(folder: str | Path, *, transformer_sha256: str | None) -> Curve:
    """The model's curve, or an InvalidRequest that says how to measure one."""
    path, how = Path(folder) / FILE, "python scripts/price.py calibrate MODEL"
    if not path.is_file():
        raise InvalidRequest(
            "this model is not calibrated for a step cache.",
            why=f"there is no {path.name}.",
            hint=how,
            param="step_cache",
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size < 2**20 else {}
        curve = Curve(tuple(map(float, data["times"])), tuple(map(float, data["magnitudes"])))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InvalidRequest(f"{path} is damaged.", why="it holds no curve.", hint=how, param="step_cache") from error
    if data.get("transformer_sha256") != transformer_sha256:
        raise InvalidRequest(
            f"{path.name} was measured on other weights than this model has.",
            why="what may be left out is each model's own.",
            hint=how,
            param="step_cache",
        )
    return curve


@contextmanager
def _loop(dit: DiT, run: Callable[[Tokens], Tokens]) -> Iterator[None]:
    before = dit.run_blocks
    dit.run_blocks = run  # type: ignore[assignment]
    try:
        yield
    finally:
        give_back(dit, "run_blocks", before)
