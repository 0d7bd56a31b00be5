"""How different two pictures look, beyond their pixels: distances by name, for the loss of a VAE.

`lpips` is the learned one (arXiv:1801.03924), with weights of its own that must be installed. The other two have no
weights to fetch and say nothing about human eyes: `gradients` compares edges at several scales, `random` the features
of a fixed convolutional network that was never trained (arXiv:2202.06438: good features in expectation, no metric).
Both punish blur more than the mean of pixel errors does, which is all that is claimed of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from videogen.errors import InvalidRequest

Frames = Float[Tensor, "n 3 H W"]  # in [-1, 1]
Distance = Callable[[Tensor, Tensor], Tensor]  # two stacks of n frames to n distances; gradients flow to the first


def perceptual(name: str, device: torch.device | str = "cpu") -> Distance:
    """The distance of that name among `DISTANCES`, on `device`.

    Raises InvalidRequest for an unknown name, or where a library that it needs is not installed.
    """
    if name not in DISTANCES:
        raise InvalidRequest(
            f"there is no perceptual distance {name!r}.", why=f"known: {', '.join(DISTANCES)}.", param="perceptual"
        )
    return DISTANCES[name](torch.device(device))


def gradients(device: torch.device, scales: int = 3) -> Distance:
    """Mean difference between the steps from pixel to pixel, down and to the right, at several scales."""

    def distance(a: Frames, b: Frames) -> Float[Tensor, " n"]:
        difference = a - b
        total = difference.new_zeros(len(a))
        count = 0
        for _ in range(scales):
            for dim in (2, 3):
                if difference.shape[dim] > 1:
                    total = total + reduce(difference.diff(dim=dim).abs(), "n c h w -> n", "mean")
                    count += 1
            if min(difference.shape[2:]) < 2:
                break
            difference = F.avg_pool2d(difference, 2)
        return total / max(count, 1)

    return distance


def random(device: torch.device, seed: int = 0, widths: tuple[int, ...] = (32, 64, 128)) -> Distance:
    """Squared distance between unit features, pixel by pixel, after each of some strided random convolutions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stages = [
            nn.Conv2d(before, width, 3, stride=2, padding=1)
            for before, width in zip((3, *widths), widths, strict=False)
        ]
        for stage in stages:
            nn.init.orthogonal_(stage.weight, gain=2**0.5)
            stage.to(device).requires_grad_(False)

    def features(x: Tensor) -> list[Tensor]:
        found = []
        for stage in stages:
            x = F.relu(stage(x))
            found.append(F.normalize(x, dim=1, eps=1e-3))
        return found

    def distance(a: Frames, b: Frames) -> Float[Tensor, " n"]:
        pairs = zip(features(a), features(b), strict=True)
        return torch.stack(
            [reduce((x - y).square(), "n c h w -> n h w", "sum").mean(dim=(1, 2)) for x, y in pairs]
        ).mean(0)

    return distance


def lpips(device: torch.device) -> Distance:
    """LPIPS on VGG-16 by the library of its authors, which brings or fetches its own weights."""
    try:
        from lpips import LPIPS  # type: ignore[import-not-found]
    except ImportError as error:
        raise InvalidRequest(
            "perceptual=lpips needs the library lpips.",
            why="its weights are no part of this package.",
            hint="pip install lpips, or perceptual=gradients",
            param="perceptual",
        ) from error
    network = LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)
    return lambda a, b: network(a, b).flatten()


def frame_distances(
    distance: Distance, a: Float[Tensor, "b 3 F H W"], b: Float[Tensor, "b 3 F H W"]
) -> Float[Tensor, "b F"]:
    """`distance` between the frames of clips that lie at the same place."""
    frames = [rearrange(clip, "b c f h w -> (b f) c h w") for clip in (a, b)]
    return rearrange(distance(*frames), "(b f) -> b f", b=len(a))


DISTANCES: dict[str, Callable[[torch.device], Distance]] = {"gradients": gradients, "random": random, "lpips": lpips}
