"""Clips longer than a model was trained for: one denoising of the whole, evaluated in overlapping windows.

Each window is a clip of the native length to the network, with positions from 0 and the conditions that fall into it.
Where windows overlap, their outputs are averaged at every step, so that neighbours agree on one latent
(MultiDiffusion, arXiv:2302.08113, equation 5; over time and with ramps as in FreeNoise, arXiv:2310.15169, section 3.2).
What is further apart than a window is not seen together: a long clip keeps its look from neighbour to neighbour only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from videogen.diffusion.denoiser import Model
from videogen.types import Conditioning, Latent

Span = tuple[int, int]  # first latent frame, and the one behind the last


def spans(total: int, length: int, overlap: int | None = None, *, multiple: int = 1) -> list[Span]:
    """Windows of `length` over `total` latent frames, each sharing `overlap` with the one before.

    Three quarters by default, as FreeNoise has it: with less, motion begins anew in each window; a patch less than all
    where a window is only a few patches. The last window ends with the clip and shares what is left. `multiple`: of
    latent frames in a patch, which no window may cut.

    >>> spans(5, 5), spans(9, 5), spans(9, 5, 1), spans(12, 6, multiple=2)
    ([(0, 5)], [(0, 5), (2, 7), (4, 9)], [(0, 5), (4, 9)], [(0, 6), (2, 8), (4, 10), (6, 12)])
    """
    overlap = min(3 * length // 4, length - multiple) if overlap is None else overlap
    stride = (length - overlap) // multiple * multiple
    if not 0 < overlap < length or stride < 1:
        raise ValueError(f"windows of {length} latent frames cannot share {overlap}")
    starts = [*range(0, max(total - length, 0), stride), max(total - length, 0)]
    return [(start, min(start + length, total)) for start in starts]


def weights(windows: Sequence[Span]) -> list[Float[Tensor, " f"]]:
    """What each window counts at its frames, of all together 1: a ramp over what it shares with its neighbours.

    The first frame of a window counts nothing where another has it, too: the network takes it for the first of a clip,
    which stands for a single picture and not for four.
    """
    raw = []
    for i, (start, stop) in enumerate(windows):
        weight = torch.ones(stop - start, dtype=torch.float64)
        if i > 0 and (shared := windows[i - 1][1] - start) > 0:
            weight[:shared] *= torch.arange(shared, dtype=weight.dtype) / shared
        if i + 1 < len(windows) and (shared := stop - windows[i + 1][0]) > 0:
            weight[-shared:] *= 1 - torch.arange(shared, dtype=weight.dtype) / shared
        raw.append(weight)
    total = torch.zeros(windows[-1][1], dtype=torch.float64)
    for (start, stop), weight in zip(windows, raw, strict=True):
        total[start:stop] += weight
    return [weight / total[start:stop] for (start, stop), weight in zip(windows, raw, strict=True)]


def windowed(model: Model, windows: Sequence[Span]) -> Model:
    """`model` for latents of any length: evaluated window by window, in turn, and averaged. With one window: `model`.

    Memory is that of one window. Text, tokens and vectors are told to every window, channels to those they are in.
    """
    if len(windows) == 1:
        return model
    shares = weights(windows)

    def evaluate(x: Latent, t: Tensor, cond: Conditioning) -> Latent:
        whole = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        for (start, stop), share in zip(windows, shares, strict=True):
            channels = None if cond.channels is None else cond.channels[:, start:stop]
            output = model(x[:, start:stop], t, cond.replace(channels=channels))
            whole[:, start:stop] += output * rearrange(share.to(whole), "f -> f 1 1 1")
        return whole

    return evaluate


def padded_behind(model: Model, multiple: int) -> Model:
    """`model` for fewer latent frames than its patches need: zeros behind, in the channels too, and cut off again.

    CogVideoX-Fun V1.5 makes single frames so.
    """

    def evaluate(x: Latent, t: Tensor, cond: Conditioning) -> Latent:
        frames = x.shape[1]

        def pad(y: Tensor) -> Tensor:
            return torch.cat([y, torch.zeros_like(y[:, :1]).expand(-1, -frames % multiple, -1, -1, -1)], dim=1)

        channels = None if cond.channels is None else pad(cond.channels)
        return model(pad(x), t, cond.replace(channels=channels))[:, :frames]

    return evaluate
