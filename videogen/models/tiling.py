"""Encode or decode a large picture tile by tile, with neighbours blended into each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """Tile size in pixels, and how much of a tile its neighbour covers again."""

    height: int
    width: int
    overlap_height: float = 1 / 6
    overlap_width: float = 1 / 5


def tiled(
    run: Callable[[Tensor], Tensor],
    x: Float[Tensor, "b c f h w"],
    *,
    tile: tuple[int, int],
    out_tile: tuple[int, int],
    overlap: tuple[float, float],
) -> Float[Tensor, "b _c _f _h _w"]:
    """`run` over overlapping tiles of `x`; `tile` is their size going in, `out_tile` coming out.

    Each tile is blended with the one above, then with the one on its left, which are blended already. Not equal to
    `run(x)`: a tile's GroupNorm and zero padding see the tile only. Tiles are laid on the coarser of the two grids, so
    that what is kept of them always adds up to the picture; for tiles of the published sizes that is diffusers' plan.
    """
    coarse = [min(sizes) for sizes in zip(tile, out_tile, strict=True)]
    steps = [max(1, int(size * (1 - o))) for size, o in zip(coarse, overlap, strict=True)]
    stride_h, stride_w = (step * size // unit for step, size, unit in zip(steps, tile, coarse, strict=True))
    keep_h, keep_w = (step * size // unit for step, size, unit in zip(steps, out_tile, coarse, strict=True))
    blend_h, blend_w = out_tile[0] - keep_h, out_tile[1] - keep_w

    above: list[Tensor] = []
    bands = []
    for top in range(0, x.shape[3], stride_h):
        row = [run(x[:, :, :, top : top + tile[0], left : left + tile[1]]) for left in range(0, x.shape[4], stride_w)]
        for column, piece in enumerate(row):
            if above:
                _blend(above[column], piece, blend_h, dim=3)
            if column:
                _blend(row[column - 1], piece, blend_w, dim=4)
        bands.append(torch.cat([piece[:, :, :, :keep_h, :keep_w] for piece in row], dim=4))
        above = row
    return torch.cat(bands, dim=3)


def _blend(before: Tensor, after: Tensor, extent: int, dim: int) -> None:
    """Fade from the end of `before` into the start of `after`, written into `after`."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    if extent == 0:
        return
    shape = [1] * after.ndim
    shape[dim] = extent
    ramp = (torch.arange(extent, device=after.device, dtype=torch.float64) / extent).to(after.dtype).reshape(shape)
    start = after.narrow(dim, 0, extent)
    start.copy_(before.narrow(dim, before.shape[dim] - extent, extent) * (1 - ramp) + start * ramp)
