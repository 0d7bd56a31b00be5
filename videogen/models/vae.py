"""The 3D causal VAE: video [b, 3, F, H, W] in [-1, 1] to latents [b, c, f, h, w] and back (arXiv:2408.06072, 2.1).

A clip goes through in chunks. GroupNorm runs over a chunk, so the chunk plan is part of the function and stands in the
config; what a chunk must know of the one before travels in a `Memory`.

The door for speed is `VAEOps`: the few functions that do all the work, plain PyTorch by default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from videogen.config import VAEConfig
from videogen.models.causal import CausalConv3d, Memory
from videogen.models.tiling import Tiling, tiled

Video5D = Float[Tensor, "b _c _f _h _w"]  # `_`: a stage may change that size, so it is not bound within a call


class VAE(nn.Module):
    """`encode` returns scaled latents and `decode` takes them: nobody else sees the scaling factor.

    tiling                 a `Tiling` for pictures larger than a tile (not equal to the untiled result), or None
    slicing                one clip of the batch at a time, to save memory
    new_memory             makes the `Memory` that a clip goes through with
    gradient_checkpointing recompute each resnet in the backward pass
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.tiling: Tiling | None = None
        self.slicing = False
        self.new_memory: Callable[[], Memory] = Memory

    @property
    def gradient_checkpointing(self) -> bool:
        return any(m.gradient_checkpointing for m in self.modules() if isinstance(m, Resnet))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, Resnet):
                module.gradient_checkpointing = on

    @property
    def default_tiling(self) -> Tiling:
        """Half the native size, as the published models are tiled."""
        return Tiling(self.config.sample_height // 2, self.config.sample_width // 2)

    def encode(self, pixels: Float[Tensor, "b 3 F H W"], generator: torch.Generator | None = None) -> Video5D:
        """Scaled latents: a sample of the posterior if a generator is given, its mode otherwise."""
        mean, logvar = self.moments(pixels)
        if generator is not None:
            # Drawn where the generator lives and in float32 at least: the same numbers on every device, in every dtype.
            wide = torch.promote_types(mean.dtype, torch.float32)
            noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=wide)
            mean = mean + torch.exp(0.5 * logvar) * noise.to(mean)
        return mean * self.config.scaling_factor

    def decode(self, latents: Video5D) -> Float[Tensor, "b 3 F H W"]:
        """Pixels in about [-1, 1], not clamped."""
        return torch.cat(list(self.decode_chunks(latents)), dim=2)

    def decode_chunks(self, latents: Video5D) -> Iterator[Float[Tensor, "b 3 _F H W"]]:
        """The pixels of one chunk of frames after another. Tiled or sliced, all frames come as one chunk."""
        latents = latents / self.config.scaling_factor
        if self.slicing and len(latents) > 1:
            yield torch.cat([self._decode_tiles(one) for one in latents.split(1)])
        elif self._decodes_in_tiles(latents):
            yield self._decode_tiles(latents)
        else:
            yield from self._decode(latents)

    def moments(self, pixels: Float[Tensor, "b 3 F H W"]) -> tuple[Video5D, Video5D]:
        """Mean and log variance of the posterior, unscaled, each [b, c, f, h, w]."""
        if self.slicing and len(pixels) > 1:
            encoded = torch.cat([self._encode_tiles(one) for one in pixels.split(1)])
        else:
            encoded = self._encode_tiles(pixels)
        mean, logvar = encoded.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(c, f, h, w) of a clip of F frames of H x W pixels: (16, 13, 60, 90) for 49 frames of 480 x 720."""
        space = self.config.spatial_compression
        return self.config.latent_channels, latent_frames(self.config, num_frames), height // space, width // space

    def _encode(self, pixels: Tensor) -> Tensor:
        memory, parts = self.new_memory(), []
        for start, stop in chunk_plan(pixels.shape[2], self.config.frame_batch_size):
            memory.last = stop == pixels.shape[2]
            parts.append(self.encoder(pixels[:, :, start:stop], memory))
            memory = memory.next_chunk()
        return torch.cat(parts, dim=2)

    def _decode(self, latents: Tensor) -> Iterator[Tensor]:
        memory = self.new_memory()
        for start, stop in decode_plan(self.config, latents.shape[2]):
            memory.last = stop == latents.shape[2]
            yield self.decoder(latents[:, :, start:stop], memory)
            memory = memory.next_chunk()

    def _encode_tiles(self, pixels: Tensor) -> Tensor:
        t = self.tiling
        if t is None or (pixels.shape[3] <= t.height and pixels.shape[4] <= t.width):
            return self._encode(pixels)
        latent_tile, pixel_tile = self._tile_sizes(t)
        overlap = (t.overlap_height, t.overlap_width)
        return tiled(self._encode, pixels, tile=pixel_tile, out_tile=latent_tile, overlap=overlap)

    def _decodes_in_tiles(self, latents: Tensor) -> bool:
        t, space = self.tiling, self.config.spatial_compression
        return t is not None and (latents.shape[3] > t.height // space or latents.shape[4] > t.width // space)

    def _decode_tiles(self, latents: Tensor) -> Tensor:
        def whole(x: Tensor) -> Tensor:
            return torch.cat(list(self._decode(x)), dim=2)

        t = self.tiling
        if t is None or not self._decodes_in_tiles(latents):
            return whole(latents)
        latent_tile, pixel_tile = self._tile_sizes(t)
        overlap = (t.overlap_height, t.overlap_width)
        return tiled(whole, latents, tile=latent_tile, out_tile=pixel_tile, overlap=overlap)

    def _tile_sizes(self, t: Tiling) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) of a tile in latents, and in as many whole pixels."""
        space = self.config.spatial_compression
        height, width = max(1, t.height // space), max(1, t.width // space)
        return (height, width), (height * space, width * space)


def chunk_plan(length: int, batch: int) -> list[tuple[int, int]]:
    """(start, stop) of the chunks of a clip: `batch` frames each, and the first takes what is left over.

    >>> chunk_plan(49, 8)[:2], chunk_plan(13, 2)[:2], chunk_plan(5, 8)
    ([(0, 9), (9, 17)], [(0, 3), (3, 5)], [(0, 5)])
    """
    count = max(length // batch, 1)
    first = length - batch * (count - 1)
    return [(0, first)] + [(first + batch * i, first + batch * (i + 1)) for i in range(count - 1)]


def decode_plan(config: VAEConfig, latents: int) -> list[tuple[int, int]]:
    """(start, stop) of the chunks in which so many latent frames are decoded.

    With `first_latent_alone` the first frame goes alone and the last chunk takes what is left: then every number of
    latents becomes 4 · (f - 1) + 1 frames, an even one too (`chunk_plan` makes 4 · f of those).

    >>> from dataclasses import replace
    >>> decode_plan(VAEConfig(), 5), decode_plan(replace(VAEConfig(), first_latent_alone=True), 6)
    ([(0, 3), (3, 5)], [(0, 1), (1, 3), (3, 5), (5, 6)])
    """
    batch = config.latent_batch_size
    if not config.first_latent_alone:
        return chunk_plan(latents, batch)
    return [(0, 1)] + [(start, min(start + batch, latents)) for start in range(1, latents, batch)]


def latent_frames(config: VAEConfig, num_frames: int) -> int:
    """How many latent frames `num_frames` pixel frames become: each halving keeps a chunk's odd first frame.

    >>> [latent_frames(VAEConfig(), n) for n in (1, 4, 5, 9, 17, 49, 81, 85)]
    [1, 1, 2, 3, 5, 13, 21, 22]
    """
    total = 0
    for start, stop in chunk_plan(num_frames, config.frame_batch_size):
        frames = stop - start
        for _ in range(int(math.log2(config.temporal_compression_ratio))):
            frames = frames // 2 + frames % 2
        total += frames
    return total


def conv(x: Video5D, conv: CausalConv3d, memory: Memory) -> Video5D:
    return conv(x, memory)


def norm_silu_conv(
    x: Video5D,
    norm: GroupNorm | LatentNorm,
    conv: CausalConv3d,
    latents: Video5D | None,
    memory: Memory,
    residual: Video5D | None = None,
) -> Video5D:
    """What a resnet is made of: norm, SiLU, causal convolution, plus the residual if there is one."""
    y = conv(F.silu(norm(x, latents)), memory)
    return y if residual is None else residual + y


def shortcut(x: Video5D, conv: nn.Conv3d | nn.Identity) -> Video5D:
    """The way around a resnet: 1x1x1, where the width changes."""
    return conv(x)


def upsample(x: Video5D, conv: nn.Conv2d, double_time: bool) -> Video5D:
    """A picture twice as large, and twice as many frames if `double_time`; then a convolution over each frame."""
    frames, height, width = x.shape[2:]
    if double_time:
        frames = 2 * frames - frames % 2
    return per_frame(conv, enlarge_to(x, (frames, 2 * height, 2 * width)))


def downsample(x: Video5D, conv: nn.Conv2d, halve_time: bool) -> Video5D:
    """A picture half as large, and half as many frames if `halve_time`."""
    return per_frame(conv, F.pad(halve_frames(x) if halve_time else x, (0, 1, 0, 1)))


@dataclass(frozen=True)
class VAEOps:
    """The row of functions a VAE computes with; `set_ops(vae, replace(VAEOps(), upsample=…))` swaps one.

    Without gradients a row may write into `residual`, and `shortcut`, `upsample` and `downsample` into their `x`: no
    caller reads those again.
    """

    conv: Callable[..., Tensor] = conv
    norm_silu_conv: Callable[..., Tensor] = norm_silu_conv
    shortcut: Callable[..., Tensor] = shortcut
    upsample: Callable[..., Tensor] = upsample
    downsample: Callable[..., Tensor] = downsample


def set_ops(vae: VAE, ops: VAEOps) -> VAE:
    """Let every part of `vae` compute with `ops`; `set_ops(vae, VAEOps())` makes it plain again."""
    for module in vae.modules():
        if isinstance(module, Encoder | Decoder | Resnet | DownStage | UpStage):
            module.ops = ops
    return vae


class Encoder(nn.Module):
    """Pixels to mean and log variance, stacked on the channel axis."""

    ops = VAEOps()

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        time_levels = int(math.log2(config.temporal_compression_ratio))
        self.conv_in = CausalConv3d(config.in_channels, widths[0], 3)
        self.down = nn.ModuleList(
            DownStage(
                config,
                width_in=widths[max(level - 1, 0)],
                width_out=width,
                halve_space=level < len(widths) - 1,
                halve_time=level < time_levels,
            )
            for level, width in enumerate(widths)
        )
        self.mid = nn.ModuleList(Resnet(config, widths[-1], widths[-1]) for _ in range(2))
        self.norm_out = GroupNorm(config, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels, 3)

    def forward(self, x: Video5D, memory: Memory) -> Video5D:
        x = self.ops.conv(x, self.conv_in, memory)
        for stage in self.down:
            x = stage(x, memory)
        for resnet in self.mid:
            x = resnet(x, None, memory)
        return self.ops.norm_silu_conv(x, self.norm_out, self.conv_out, None, memory)


class Decoder(nn.Module):
    """Latents to pixels. Every norm is modulated by the raw latents, so that detail is told at each resolution anew."""

    ops = VAEOps()

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = tuple(reversed(config.block_out_channels))
        time_levels = int(math.log2(config.temporal_compression_ratio))
        self.conv_in = CausalConv3d(config.latent_channels, widths[0], 3)
        self.mid = nn.ModuleList(Resnet(config, widths[0], widths[0], modulated=True) for _ in range(2))
        self.up = nn.ModuleList(
            UpStage(
                config,
                width_in=widths[max(level - 1, 0)],
                width_out=width,
                double_space=level < len(widths) - 1,
                double_time=level < time_levels,
            )
            for level, width in enumerate(widths)
        )
        self.norm_out = LatentNorm(config, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.out_channels, 3)

    def forward(self, latents: Video5D, memory: Memory) -> Video5D:
        x = self.ops.conv(latents, self.conv_in, memory)
        for resnet in self.mid:
            x = resnet(x, latents, memory)
        for stage in self.up:
            x = stage(x, latents, memory)
        return self.ops.norm_silu_conv(x, self.norm_out, self.conv_out, latents, memory)


class GroupNorm(nn.GroupNorm):
    """The encoder's norm. It takes and ignores the latents, so that one `Resnet` serves both halves."""

    def __init__(self, config: VAEConfig, channels: int) -> None:
        super().__init__(config.norm_num_groups, channels, eps=config.norm_eps)

    def forward(self, x: Video5D, latents: Video5D | None) -> Video5D:
        return super().forward(x)


class LatentNorm(nn.Module):
    """The decoder's norm: GroupNorm, then scale and shift that 1x1x1 convolutions read from the latents.

    The convolutions run at the latents' size and their result is enlarged: nearest-neighbour resizing and a pointwise
    convolution commute, and the small picture has 1/256 of the values.
    """

    def __init__(self, config: VAEConfig, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        self.scale = nn.Conv3d(config.latent_channels, channels, 1)
        self.shift = nn.Conv3d(config.latent_channels, channels, 1)

    def forward(self, x: Video5D, latents: Video5D) -> Video5D:
        size = x.shape[2:]
        return self.norm(x) * enlarge_to(self.scale(latents), size) + enlarge_to(self.shift(latents), size)


class Resnet(nn.Module):
    """norm, SiLU, causal conv, twice, plus the input."""

    gradient_checkpointing = False
    ops = VAEOps()

    def __init__(self, config: VAEConfig, width_in: int, width_out: int, *, modulated: bool = False) -> None:
        super().__init__()
        norm = LatentNorm if modulated else GroupNorm
        self.norm1 = norm(config, width_in)
        self.conv1 = CausalConv3d(width_in, width_out, 3)
        self.norm2 = norm(config, width_out)
        self.conv2 = CausalConv3d(width_out, width_out, 3)
        self.conv_shortcut = nn.Conv3d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Video5D, latents: Video5D | None, memory: Memory) -> Video5D:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, x, latents, memory, use_reentrant=False)  # type: ignore[return-value]
        return self._forward(x, latents, memory)

    def _forward(self, x: Tensor, latents: Tensor | None, memory: Memory) -> Tensor:
        y = self.ops.norm_silu_conv(x, self.norm1, self.conv1, latents, memory)
        x = self.ops.shortcut(x, self.conv_shortcut)
        return self.ops.norm_silu_conv(y, self.norm2, self.conv2, latents, memory, residual=x)


class DownStage(nn.Module):
    """Some resnets, then a picture half as large, and half as many frames if `halve_time`."""

    ops = VAEOps()

    def __init__(
        self, config: VAEConfig, *, width_in: int, width_out: int, halve_space: bool, halve_time: bool
    ) -> None:
        super().__init__()
        self.halve_time = halve_time
        self.resnets = nn.ModuleList(
            Resnet(config, width_in if i == 0 else width_out, width_out) for i in range(config.layers_per_block)
        )
        self.downsample = nn.Conv2d(width_out, width_out, 3, stride=2) if halve_space else None

    def forward(self, x: Video5D, memory: Memory) -> Video5D:
        for resnet in self.resnets:
            x = resnet(x, None, memory)
        return x if self.downsample is None else self.ops.downsample(x, self.downsample, self.halve_time)


class UpStage(nn.Module):
    """Some resnets, then a picture twice as large, and twice as many frames if `double_time`."""

    ops = VAEOps()

    def __init__(
        self, config: VAEConfig, *, width_in: int, width_out: int, double_space: bool, double_time: bool
    ) -> None:
        super().__init__()
        self.double_time = double_time
        self.resnets = nn.ModuleList(
            Resnet(config, width_in if i == 0 else width_out, width_out, modulated=True)
            for i in range(config.layers_per_block + 1)
        )
        self.upsample = nn.Conv2d(width_out, width_out, 3, padding=1) if double_space else None

    def forward(self, x: Video5D, latents: Video5D, memory: Memory) -> Video5D:
        for resnet in self.resnets:
            x = resnet(x, latents, memory)
        if self.upsample is None:
            return x
        if self.double_time and x.shape[2] == 1 and memory.chunk > 0:  # one frame stands for itself only at the start
            return self.ops.upsample(x.repeat(1, 1, 2, 1, 1), self.upsample, False)
        return self.ops.upsample(x, self.upsample, self.double_time)


def group_sums(x: Video5D, groups: int) -> Float[Tensor, "b g 2"]:
    """Sum and sum of squares of each group of channels: those of a picture's parts add up to the picture's.

    In float64 from float32 values, so that the order of adding does not show.
    """
    values = rearrange(x, "b (g c) f h w -> b g f h w c", g=groups).to(torch.promote_types(x.dtype, torch.float32))
    sums = [part.sum(dim=(2, 3, 4, 5), dtype=torch.float64) for part in (values, values.square())]
    return torch.stack(sums, dim=-1)


def group_affine(
    norm: nn.GroupNorm, sums: Float[Tensor, "b g 2"], count: int
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c"]]:
    """(scale, shift) such that x · scale + shift is `norm(x)`, from the sums over the `count` values of a group."""
    mean, square = (sums / count).unbind(-1)
    rate = torch.rsqrt((square - mean.square()).clamp(min=0) + norm.eps)
    rate, mean = (value.repeat_interleave(norm.num_channels // norm.num_groups, dim=1) for value in (rate, mean))
    scale = rate * norm.weight
    shift = norm.bias - mean * scale
    wide = torch.promote_types(norm.weight.dtype, torch.float32)
    return scale.to(wide), shift.to(wide)


def per_frame(conv: nn.Conv2d, x: Video5D) -> Video5D:
    y = conv(rearrange(x, "b c f h w -> (b f) c h w"))
    return rearrange(y, "(b f) c h w -> b c f h w", b=len(x))


def halve_frames(x: Video5D) -> Video5D:
    """Mean of each pair of frames; an odd first frame stays as it is (it stands for itself alone, like an image)."""
    first, rest = x[:, :, : x.shape[2] % 2], x[:, :, x.shape[2] % 2 :]
    return torch.cat([first, (rest[:, :, 0::2] + rest[:, :, 1::2]) / 2], dim=2)


def enlarge_to(x: Video5D, size: tuple[int, int, int] | torch.Size) -> Video5D:
    """Nearest-neighbour resize to (frames, height, width); an odd first frame stands for itself, the rest the same."""
    frames = size[0]
    if frames == 1 or frames % 2 == 0:
        return F.interpolate(x, size=tuple(size))
    first = F.interpolate(x[:, :, :1], size=(1, *size[1:]))
    rest = F.interpolate(x[:, :, 1:], size=(frames - 1, *size[1:]))
    return torch.cat([first, rest], dim=2)
