"""A 3D patch discriminator and its losses: what makes a VAE's pictures sharp where pixel errors leave them soft."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import reduce
from jaxtyping import Float
from torch import Tensor, nn

Clip = Float[Tensor, "b 3 F H W"]


class Discriminator(nn.Module):
    """One verdict per patch of space and time: the patch discriminator of arXiv:1611.07004 with 3D kernels.

    `layers` convolutions halve the picture, the ones after the first the frames too; a single frame passes as well. The
    norms are group norms: a clip's verdict does not depend on what else is in the batch.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        stages: list[nn.Module] = [nn.Conv3d(3, widths[0], (3, 4, 4), (1, 2, 2), 1), nn.LeakyReLU(0.2)]
        for i, (before, width) in enumerate(pairwise(widths), 1):
            is_last = i == layers
            kernel, stride = (3, 3 if is_last else 4, 3 if is_last else 4), 1 if is_last else 2
            stages += [
                nn.Conv3d(before, width, kernel, stride, 1, bias=False),
                nn.GroupNorm(min(8, width), width),
                nn.LeakyReLU(0.2),
            ]
        self.stages = nn.Sequential(*stages, nn.Conv3d(widths[-1], 1, 3, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, clip: Clip) -> Float[Tensor, "b _f _h _w"]:
        """How real each patch looks: above 0 for real."""
        return self.stages(clip)[:, 0]


def verdict(discriminator: nn.Module, clip: Clip) -> Float[Tensor, " b"]:
    """Mean verdict on each clip; the discriminator learns nothing of it."""
    weights = {name: value.detach() for name, value in discriminator.named_parameters()}
    return reduce(wide(torch.func.functional_call(discriminator, weights, (clip,))), "b ... -> b", "mean")


def hinge(discriminator: nn.Module, real: Clip, made: Clip) -> Float[Tensor, " b"]:
    """The discriminator's loss per pair (arXiv:1705.02894): real patches should lie above 1, made ones below -1."""
    above = F.relu(1 - wide(discriminator(real)))
    below = F.relu(1 + wide(discriminator(made.detach())))
    return (reduce(above, "b ... -> b", "mean") + reduce(below, "b ... -> b", "mean")) / 2


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
