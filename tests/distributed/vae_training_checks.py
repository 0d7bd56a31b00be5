"""What several processes that share the frames of a clip must agree on with one: run by `processes.py`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from videogen.config import ClipStage, FitConfig, GANConfig, VAEConfig, VAETraining
from videogen.distributed.mesh import start
from videogen.distributed.vae_training import share_time, time_parallel
from videogen.models.vae import VAE
from videogen.testing import TINY_VAE, randomize
from videogen.training import vae as vae_training
from videogen.training.discriminator import Discriminator
from videogen.training.perceptual import perceptual
from videogen.training.vae import train_vae
from videogen.training.vae_step import Time, WholeClips, vae_losses

WHOLE = replace(TINY_VAE, frame_batch_size=64, latent_batch_size=64)
GAN = GANConfig(start=0, channels=4, layers=2)
BOTH = (torch.float64, torch.float32)
SEVERAL = [  # VAE, frames, and in what
    (WHOLE, 17, BOTH),
    (TINY_VAE, 41, BOTH[:1]),  # five chunks: the third round has one process
]


def training(folder: str = "unused", **changes) -> VAETraining:
    settings = {
        "folder": folder,
        "model": VAEConfig(**{**vars(TINY_VAE), "sample_height": 16, "sample_width": 16, "scaling_factor": 1.0}),
        "stages": [ClipStage(steps=4, num_frames=17, size=16, batch_size=2, image_share=0.25)],
        # At a usual rate Adam's first steps make noise in tiny gradients as large as the rate.
        "fit": FitConfig(
            steps=4, save_every=4, log_every=1, warmup_steps=1, learning_rate=1e-5, decay_fraction=0.0, bfloat16=False
        ),
        "perceptual": "random",
        "gan": replace(GAN, start=1, head_start=1),
        "height": 16,
        "width": 16,
        "num_frames": 17,
    }
    return VAETraining(**{**settings, **changes})


def autoencoder(config: VAEConfig, dtype: torch.dtype = torch.float32) -> VAE:
    vae = VAE(config)
    randomize(vae, seed=2)
    return vae.to(dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def gradient_of(vae: VAE, discriminator: Discriminator, frames: int, time: Time) -> tuple[Tensor, Tensor, dict]:
    """Losses, this process's gradient of all weights in one vector, and facts."""
    dtype, g = next(vae.parameters()).dtype, torch.Generator().manual_seed(0)
    pixels = (torch.rand(2, 3, frames, 8, 16, generator=g) * 2 - 1).to(dtype)
    noise = torch.randn(2, *vae.latent_shape(frames, 8, 16), generator=g).to(dtype)
    kind = {"distance": perceptual("gradients"), "discriminator": discriminator}
    losses, facts = vae_losses(vae, pixels, noise, training(), **kind, time=time)
    weights = [*vae.parameters(), *discriminator.parameters()]
    for weight in weights:
        weight.grad = None
    losses.sum().backward()
    parts = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    return losses.detach(), torch.cat([part.flatten() for part in parts]).double(), facts


def a_clip_in_pieces_has_the_loss_and_gradients_of_the_whole() -> None:
    """With all that there is, the discriminator and the weight that balances it included. In float64 to the last
    digits; in float32 the losses to a millionth, and gradients as far from those of float64 as one process's are."""
    group = dist.group.WORLD
    assert group is not None
    for config, frames, dtypes in SEVERAL:
        found = {}
        for dtype in dtypes:
            vae = autoencoder(config, dtype)
            torch.manual_seed(0)
            discriminator = Discriminator(GAN.channels, GAN.layers).to(dtype)
            losses, whole, facts = gradient_of(vae, discriminator, frames, WholeClips())
            vae.gradient_checkpointing = True
            ours, parts, told = gradient_of(vae, discriminator, frames, share_time(vae, frames, group))
            dist.all_reduce(parts)
            tolerance = 1e-13 if dtype == torch.float64 else 1e-6
            assert relative(ours, losses) < tolerance
            for name, value in facts.items():
                assert abs(told[name] - value) <= 20 * tolerance * max(1, abs(value)), (name, told[name], value)
            found[dtype] = whole, parts
        truth, exact = found[torch.float64]
        assert relative(exact, truth) < 1e-12
        if torch.float32 in found:
            one, two = (relative(gradient, truth) for gradient in found[torch.float32])
            assert two < 1.5 * one + 1e-7


def norms_see_the_pieces_of_all() -> None:
    """A process by itself would have other norms, and other results."""
    group = dist.group.WORLD
    assert group is not None
    vae, pixels = autoencoder(WHOLE), torch.rand(1, 3, 17, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = vae.moments(pixels)[0]
    pieces = share_time(vae, 17, group)
    own = pieces.moments(vae, pieces.own_pixels(pixels))[0]
    assert relative(own, pieces.own_latents(whole)) < 1e-6
    alone = replace(pieces, plan=replace(pieces.plan, is_one_chunk=False))
    assert relative(alone.moments(vae, pieces.own_pixels(pixels))[0], pieces.own_latents(whole)) > 0.01


def each_process_computes_only_its_frames() -> None:
    group = dist.group.WORLD
    assert group is not None
    vae, seen = autoencoder(WHOLE), []
    vae.encoder.conv_out.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[2]))
    pieces = share_time(vae, 25, group)
    own = pieces.own_pixels(torch.rand(1, 3, 25, 16, 16))
    mean, _ = pieces.moments(vae, own)
    assert own.shape[2] == [9, 16][dist.get_rank()]
    assert mean.shape[2] == [3, 4][dist.get_rank()]
    assert pieces.decode(vae, mean).shape == own.shape


def single_frames_are_shared_by_number() -> None:
    parallel = time_parallel(2)
    assert (parallel.data_rank, parallel.data_world) == (0, 1)
    own = parallel.own_samples(range(5))
    weight = torch.ones((), requires_grad=True)
    losses = parallel.all_losses(weight * torch.tensor([*map(float, own)]), 5)
    losses.sum().backward()
    assert losses.tolist() == [0, 1, 2, 3, 4]
    assert weight.grad == sum(own)


def a_run_ends_as_that_of_one_process() -> None:
    """With the frames shared, and with the samples; clips, single frames and the discriminator's start included."""
    folder = Path(os.environ["VAE_RUNS"])
    few_clips()
    for name, degree in (("frames", 2), ("samples", 1)):
        train_vae(training(time_parallel=degree), folder / name, torch.device("cpu"))


CHECKS: list[Callable[[], None]] = [
    a_clip_in_pieces_has_the_loss_and_gradients_of_the_whole,
    norms_see_the_pieces_of_all,
    each_process_computes_only_its_frames,
    single_frames_are_shared_by_number,
    a_run_ends_as_that_of_one_process,
]


def few_clips() -> None:
    """Judge and measure on a few: that is no part of what is compared here."""
    vae_training.JUDGED, vae_training.MEASURED = 1, 2


def read_log(folder: Path) -> dict[int, dict[str, float]]:
    """The figures of each step."""
    steps: dict[int, dict[str, float]] = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        facts = json.loads(line)
        if "step" in facts:
            steps.setdefault(facts["step"], {}).update(facts)
    return steps


def main() -> None:
    for check in CHECKS:
        print("todo", check.__name__, flush=True)
    start("cpu")
    torch.set_num_threads(1)
    for check in CHECKS:
        check()
        print("done", check.__name__, flush=True)
    dist.destroy_process_group()
