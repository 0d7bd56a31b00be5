"""What a run is judged by while it trains: losses at fixed times, clips to look at, the world's score.

Everything random here is drawn for validation alone and never changes, so two validations compare and one that is
repeated gives the same bits. Training draws nothing from the same place and its modules are left as they were: a run
with validation equals one without, bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Num
from PIL import Image
from torch import Tensor, nn

from videogen.config import DiTTraining, VAEConfig, ValidationConfig
from videogen.data.files import written
from videogen.data.world.scene import Scene
from videogen.diffusion.schedule import Schedule
from videogen.evaluation import evaluate, flicker, held_out_prompts, motion
from videogen.models.dit import DiT
from videogen.models.text import TextEncoder
from videogen.models.vae import VAE
from videogen.training.draws import draw_noise, draws
from videogen.training.examples import Example, Examples
from videogen.types import Latent
from videogen.weights.card import Card

SEED = 2**31 - 1  # of validation, whatever the run's own is
Modules = Mapping[str, nn.Module]
Loss = Callable[[list[Example], Num[Tensor, " b"], Latent], Float[Tensor, " b"]]  # examples of one shape, times, noise
Generate = Callable[[list[str], list[Scene], list[int]], Sequence[np.ndarray]]  # as in `videogen.evaluation`
Sum = Callable[[Tensor], Tensor]  # over the data ranks; every rank must call it


@dataclass(frozen=True, kw_only=True)
class Validation:
    """`validation(averages, step)`: the figures of a state, as a line of the log has them.

    loss      of modules: the loss per sample at given times. None: no losses are taken
    examples  held-out ones; of one process or of many, each takes a share of them
    generate  of modules: makes clips from prompts. None: none are made
    prompts   of the clips to look at; clip i has seed i
    raw       the modules that learn: their clips stand below those of the averages
    total     sums over data ranks; with one process nothing

    With several processes, all call it, whether or not their weights are whole; the first writes the pictures.
    """

    config: ValidationConfig
    folder: Path
    schedule: Schedule
    loss: Callable[[Modules], Loss] | None = None
    examples: Examples | None = None
    generate: Callable[[Modules], Generate] | None = None
    prompts: Sequence[str] = ()
    raw: Modules = field(default_factory=dict)
    rank: int = 0  # among those that share the examples
    world: int = 1
    total: Sum = lambda x: x

    def __call__(self, averages: Modules, step: int) -> dict[str, float]:
        config, figures = self.config, {}
        with undisturbed([*averages.values(), *self.raw.values()]):
            if self.loss and self.examples is not None:
                figures |= decile_losses(
                    self.loss(averages),
                    self.examples,
                    self.schedule,
                    count=config.clips,
                    times=config.times,
                    batch=config.batch_size,
                    rank=self.rank,
                    world=self.world,
                    total=self.total,
                )
            if self.generate and config.samples:
                prompts = list(self.prompts or world_prompts(config.samples))[: config.samples]
                clips = {"average": sample(self.generate(averages), prompts)}
                if self.raw:
                    clips["raw"] = sample(self.generate({**averages, **self.raw}), prompts)
                figures["sample_motion"] = float(np.mean([motion(clip) for clip in clips["average"]]))
                figures["sample_flicker"] = float(np.mean([flicker(clip) for clip in clips["average"]]))
                if is_first_process():
                    save_grid(self.folder / "samples" / f"step_{step:08d}.png", list(clips.values()))
                    with written(self.folder / "samples" / "prompts.txt") as part:
                        part.write_text("\n".join(prompts) + "\n", encoding="utf-8")
            if self.generate and config.score:
                figures |= world_score(self.generate(averages), config.score, config.batch_size)
        return {name: float(f"{value:.6g}") for name, value in figures.items()}


def decile_losses(
    loss: Loss,
    examples: Examples,
    schedule: Schedule,
    *,
    count: int | None = None,
    times: int = 10,
    batch: int = 16,
    rank: int = 0,
    world: int = 1,
    total: Sum = lambda x: x,
) -> dict[str, float]:
    """Mean loss of the first `count` examples at the middles of `times` equal parts of the scale of training times.

    `held_out_loss` is the mean over all; `held_out_loss_t05`, `_t15`, … are those of each time (percent of the scale,
    from clean to noise). Examples of several shapes have theirs beside that: `held_out_loss_5x8x8`, `…_5x8x8_t05`.
    Noise and posterior of an example are the same at every time, in every validation and at any number of ranks.
    """
    chosen = range(min(len(examples), count or len(examples)))
    shapes = {i: examples.shape(i) for i in chosen}
    kinds = sorted(set(shapes.values()))
    sums = torch.zeros(len(kinds), times + 1, dtype=torch.float64)  # the last column counts examples
    for row, shape in enumerate(kinds):
        members = [i for i in chosen if shapes[i] == shape]
        for first in range(0, len(members), batch * world):
            whole = members[first : first + batch * world]
            mine = whole[rank::world]
            # A rank without one computes too: weights that are sharded are gathered by all together.
            indices = mine or whole[:1]
            read = [examples.read(i, draws(SEED, 0, examples.name(i), "validation")) for i in indices]
            noise = torch.stack(
                [
                    draw_noise(draws(SEED, 0, examples.name(i), "validation noise"), one.latents.shape)
                    for i, one in zip(indices, read, strict=True)
                ]
            )
            for column in range(times):
                t = schedule.time(torch.full((len(read),), (column + 0.5) / times))
                sums[row, column] += loss(read, t, noise).double().sum().cpu() * bool(mine)
            sums[row, -1] += len(mine)
    sums = total(sums)
    means = sums[:, :-1] / sums[:, -1:]

    figures = {"held_out_loss": float((sums[:, :-1].sum(0) / sums[:, -1].sum()).mean())}
    if len(kinds) > 1:
        overall = sums[:, :-1].sum(0) / sums[:, -1].sum()
        figures |= _by_time("held_out_loss", overall)
        for shape, row in zip(kinds, means, strict=True):
            name = "held_out_loss_" + "x".join(map(str, shape))
            figures |= {name: float(row.mean())} | _by_time(name, row)
    else:
        figures |= _by_time("held_out_loss", means[0])
    return figures


def _by_time(name: str, losses: Tensor) -> dict[str, float]:
    count = len(losses)
    return {f"{name}_t{round(100 * (k + 0.5) / count):02d}": float(value) for k, value in enumerate(losses)}


@contextlib.contextmanager
def undisturbed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, modules are in eval mode and nothing keeps gradients; afterwards modes and torch's own random state are
    what they were, whatever was drawn."""
    parts = {part: part.training for module in modules for part in module.modules()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        for part in parts:
            part.training = False
        try:
            yield
        finally:
            for part, mode in parts.items():
                part.training = mode


# ---- clips ----------------------------------------------------------------------------------------------------------


def world_prompts(count: int) -> list[str]:
    """Captions of the world's first held-out scenes."""
    return [words for _, words in held_out_prompts(count)]


def sample(generate: Generate, prompts: Sequence[str]) -> list[np.ndarray]:
    """A clip [F, H, W, 3] for each prompt, clip i from seed i; one at a time, so that their number changes none."""
    return [generate([words], [], [seed])[0] for seed, words in enumerate(prompts)]


def is_first_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def save_grid(path: Path, rows: Sequence[Sequence[np.ndarray]], *, columns: int = 5) -> None:
    """A picture of clips: for each prompt a line of frames from each set of weights, the averages' above."""
    lines = [clip for together in zip(*rows, strict=True) for clip in together]
    lines = [(clip * 255).round().astype(np.uint8) if clip.dtype != np.uint8 else clip for clip in lines]
    strips = [np.concatenate([clip[i] for i in _spread(len(clip), columns)], axis=1) for clip in lines]
    picture = Image.fromarray(np.concatenate(strips, axis=0))
    with written(path) as part:
        picture.save(part, format="PNG")


def _spread(count: int, columns: int) -> list[int]:
    return [round(i * (count - 1) / max(1, columns - 1)) for i in range(columns)]


def world_score(generate: Generate, n: int, batch: int) -> dict[str, float]:
    """Shares of the world's held-out prompts whose clips are right: in `all`, and in each attribute."""
    rates = evaluate(generate, n=n, batch=batch)["rates"]
    return {f"score_{name}": cell["rate"] for name, cell in rates.items()}


def pipeline_clips(
    card: Card, vae: VAE, text_encoder: TextEncoder | None = None, *, steps: int | None = None
) -> Callable[[Modules], Generate]:
    """Of modules `dit` and, if it is trained along, `text_encoder`: clips through the public pipeline."""
    from videogen.pipeline import Pipeline

    @lru_cache(maxsize=1)
    def decoder(dtype: torch.dtype) -> VAE:
        """The pipeline computes in one dtype: that of the DiT's weights, which rest in bfloat16 under a LoRA."""
        return vae if next(vae.parameters()).dtype == dtype else copy.deepcopy(vae).to(dtype)

    def of(modules: Modules) -> Generate:
        dit, words = modules["dit"], modules.get("text_encoder", text_encoder)
        assert isinstance(dit, DiT)
        assert isinstance(words, TextEncoder)
        pipe = Pipeline(card, dit, decoder(next(dit.parameters()).dtype), words)
        count = {} if steps is None else {"num_inference_steps": steps}
        return lambda prompts, _, seeds: [clip.frames for clip in pipe.generate(prompts, seed=seeds, **count)]

    return of


def card_of(config: DiTTraining, vae: VAEConfig, conditions: tuple[str, ...]) -> Card:
    """The card of a model that is being made: what the pipeline has to know of it."""
    return Card(
        folder=Path(config.folder),
        name=config.name,
        dit=config.model,
        vae=vae,
        scheduler=config.scheduler,
        conditions=conditions,
        height=config.height,
        width=config.width,
        num_frames=config.num_frames,
        fps=config.fps,
        size_multiple=vae.spatial_compression * config.model.patch_size,
        fixed_size=config.model.use_learned_positional_embeddings,
        max_sequence_length=config.model.max_text_seq_length,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        layout="frames" if config.model.in_channels > config.model.out_channels else "text",
    )
