"""Where a video token sits: rotary angles, the sin-cos table and the diffusion time's sinusoid.

Two ideas are kept apart. *Rotary* angles are a function of each token's own (t, y, x), so that any subset of tokens
carries what it needs. The *absolute* table is a function of the grid and added once, at embedding: computed in 2B,
stored in 5B-I2V.

Where a value is float32 and where float64 follows diffusers: it is part of the numbers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from videogen.config import DiTConfig

ROTARY_BASE = 10000.0


def token_grid(config: DiTConfig, f: int, h: int, w: int) -> tuple[int, int, int]:
    """Latent size to the token grid (frames, rows, columns)."""
    return f // (config.patch_size_t or 1), h // config.patch_size, w // config.patch_size


def rotary_positions(
    config: DiTConfig, f: int, h: int, w: int, device: torch.device | str | None = None
) -> Float[Tensor, "n 3"]:
    """(t, y, x) of every video token of an `f h w` latent, frame-major, then rows, then columns.

    With `patch_size_t` (1.5) positions are integers on every axis. diffusers slices them from a table of the trained
    size; nothing is sliced here, so that a larger grid works. Without it (1.0) the grid is fitted into the trained one:
    see `_fit`.
    """
    frames, rows, columns = token_grid(config, f, h, w)
    t = torch.arange(frames, dtype=torch.float32, device=device)
    if config.patch_size_t is not None:
        y = torch.arange(rows, dtype=torch.float32, device=device)
        x = torch.arange(columns, dtype=torch.float32, device=device)
    else:
        base = config.sample_height // config.patch_size, config.sample_width // config.patch_size
        (top, left), (bottom, right) = _fit((rows, columns), base)
        # The end is `stop * (n - 1) / n`, not the last point of an even crop: it shows when the crop starts beyond 0.
        # Published models are used with these values, so they stay.
        y = torch.linspace(top, bottom * (rows - 1) / rows, rows, dtype=torch.float32, device=device)
        x = torch.linspace(left, right * (columns - 1) / columns, columns, dtype=torch.float32, device=device)
    return rearrange(torch.stack(torch.meshgrid(t, y, x, indexing="ij")), "tyx t y x -> (t y x) tyx")


def _fit(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The largest centred region of `base` with the aspect ratio of `grid`: (top, left), (bottom, right)."""
    (rows, columns), (base_rows, base_columns) = grid, base
    if rows / columns > base_rows / base_columns:
        height, width = base_rows, round(base_rows / rows * columns)  # Python's round: halves go to the even neighbour
    else:
        height, width = round(base_columns / columns * rows), base_columns
    top, left = round((base_rows - height) / 2), round((base_columns - width) / 2)
    return (top, left), (top + height, left + width)


def rotary_table(position: Float[Tensor, "s 3"], head_dim: int) -> Float[Tensor, "2 s c"]:
    """Cosines and sines per token and channel pair (c = head_dim / 2), float32.

    A quarter of the channels turns with time, three eighths with y and three eighths with x, in this order.
    """
    angles = []
    for axis, dim in enumerate((head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)):
        exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=position.device) / dim
        angles.append(torch.outer(position[:, axis], 1.0 / ROTARY_BASE**exponent))
    angle = torch.cat(angles, dim=-1)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Float[Tensor, "b k s d"], rotary: Float[Tensor, "2 s c"]) -> Float[Tensor, "b k s d"]:
    """Turns each pair of neighbouring channels by its angle, in float32 whatever the dtype of `x`."""
    cos, sin = rotary
    even, odd = rearrange(x.float(), "b k s (c pair) -> pair b k s c", pair=2)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rearrange(turned, "b k s c pair -> b k s (c pair)").to(x.dtype)


def sincos_table(
    config: DiTConfig,
    f: int,
    h: int,
    w: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "n d"]:
    """The fixed absolute table for an `f h w` latent: ¼ of the channels time, then ⅜ x, ⅜ y. Computed in float64."""
    frames, rows, columns = token_grid(config, f, h, w)
    across, along = config.spatial_interpolation_scale, config.temporal_interpolation_scale
    t = _sincos(frames, along, config.width // 4, device).to(dtype)
    y = _sincos(rows, across, config.width // 8 * 3, device).to(dtype)
    x = _sincos(columns, across, config.width // 8 * 3, device).to(dtype)
    parts = [
        repeat(t, "t d -> (t y x) d", y=rows, x=columns),
        repeat(x, "x d -> (t y x) d", t=frames, y=rows),  # x before y: that is how the weights were trained
        repeat(y, "y d -> (t y x) d", t=frames, x=columns),
    ]
    return torch.cat(parts, dim=-1)


def resized_table(
    config: DiTConfig,
    f: int,
    h: int,
    w: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "n d"]:
    """The table of the native height and width, stretched to another as CogVideoX-Fun 2B does (aigc-apps/VideoX-Fun).

    Neighbouring rows are mixed linearly, pixel centres kept in place; time is as in `sincos_table`, of any length.
    """
    frames, rows, columns = token_grid(config, f, h, w)
    _, base_rows, base_columns = token_grid(config, f, config.sample_height, config.sample_width)
    table = sincos_table(config, f, config.sample_height, config.sample_width, device)
    if (rows, columns) == (base_rows, base_columns):
        return table.to(dtype)
    grid = rearrange(table, "(t y x) d -> t d y x", t=frames, y=base_rows)
    grid = F.interpolate(grid, size=(rows, columns), mode="bilinear", align_corners=False)
    return rearrange(grid, "t d y x -> (t y x) d").to(dtype)


def _sincos(n: int, scale: float, dim: int, device: torch.device | str | None) -> Float[Tensor, "n dim"]:
    """Sines, then cosines, of positions 0 … n-1 divided by `scale` (in float32; the angles are float64)."""
    position = torch.arange(n, dtype=torch.float32, device=device) / scale
    wide = torch.float32 if position.device.type == "mps" else torch.float64  # Metal has no float64
    frequency = 1.0 / 10000 ** (torch.arange(dim // 2, dtype=wide, device=device) / (dim / 2.0))
    angle = torch.outer(position.to(wide), frequency)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def learned_table_shape(config: DiTConfig) -> tuple[int, int, int]:
    """[1, text rows + video tokens at the trained size, width]."""
    frames, rows, columns = token_grid(config, trained_latent_frames(config), config.sample_height, config.sample_width)
    return 1, config.max_text_seq_length + frames * rows * columns, config.width


def trained_latent_frames(config: DiTConfig) -> int:
    return (config.sample_frames - 1) // config.temporal_compression_ratio + 1


def time_sinusoid(t: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: int = 0) -> Float[Tensor, "b dim"]:
    """Sinusoidal features of a scalar per sample (diffusion time, `ofs`), float32. Flipped means cosines first."""
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angle = t.float()[:, None] * torch.exp(exponent)
    first, second = (angle.cos(), angle.sin()) if flip_sin_to_cos else (angle.sin(), angle.cos())
    return torch.cat([first, second], dim=-1)
