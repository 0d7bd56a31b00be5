"""The VAE by itself: shapes, chunks, causality, gradients, memory."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from videogen.config import VAEConfig
from videogen.models.causal import Memory
from videogen.models.tiling import Tiling, tiled
from videogen.models.vae import VAE, VAEOps, chunk_plan, group_affine, group_sums, latent_frames, set_ops
from videogen.testing import TINY_VAE, randomize


@pytest.fixture(scope="module")
def vae() -> VAE:
    return randomize(VAE(TINY_VAE).double().eval())  # type: ignore[return-value]


def clip(frames: int, height: int = 16, width: int = 24, batch: int = 1, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, frames, height, width, dtype=torch.float64, generator=generator)


def latent(frames: int, height: int = 2, width: int = 3, batch: int = 1, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, frames, height, width, dtype=torch.float64, generator=generator)


# Sizes


@pytest.mark.parametrize(
    ("length", "batch", "plan"),
    [
        (49, 8, [9, 8, 8, 8, 8, 8]),
        (81, 8, [9] + [8] * 9),
        (22, 8, [14, 8]),
        (5, 8, [5]),
        (1, 8, [1]),
        (13, 2, [3, 2, 2, 2, 2, 2]),
        (22, 2, [2] * 11),
        (1, 2, [1]),
    ],
)
def test_the_first_chunk_takes_what_is_left_over(length: int, batch: int, plan: list[int]):
    chunks = chunk_plan(length, batch)
    assert [stop - start for start, stop in chunks] == plan
    assert chunks[0][0] == 0
    assert all(a[1] == b[0] for a, b in pairwise(chunks))
    assert chunks[-1][1] == length


# Measured on diffusers: 1.5 shows 85 -> 22
LENGTHS = {1: 1, 4: 1, 5: 2, 8: 2, 9: 3, 12: 3, 17: 5, 48: 12, 49: 13, 80: 20, 81: 21, 85: 22}


def test_lengths_of_published_clips():
    assert {n: latent_frames(VAEConfig(), n) for n in LENGTHS} == LENGTHS
    published = VAE.latent_shape
    with torch.device("meta"):
        assert published(VAE(VAEConfig()), 49, 480, 720) == (16, 13, 60, 90)


@pytest.mark.parametrize("frames", [1, 4, 5, 8, 9, 17, 22])
@torch.no_grad()
def test_encode_has_the_shape_it_announces(vae: VAE, frames: int):
    encoded = vae.encode(clip(frames))
    assert tuple(encoded.shape[1:]) == vae.latent_shape(frames, 16, 24)


@pytest.mark.parametrize(("latents", "frames"), [(1, 1), (2, 8), (3, 9), (4, 16), (5, 17)])
@torch.no_grad()
def test_decode_gives_4f_minus_3_frames_for_odd_and_4f_for_even(vae: VAE, latents: int, frames: int):
    assert vae.decode(latent(latents)).shape == (1, 3, frames, 16, 24)


def test_legal_lengths_come_back(vae: VAE):
    """1 and 8k + 1 frames decode to as many as were encoded."""
    for frames in (1, 9, 17, 25, 49, 81):
        f = latent_frames(TINY_VAE, frames)
        assert (4 * (f - 1) + 1 if f % 2 else 4 * f) == frames


def test_other_chunk_plans_are_a_setting():
    config = VAEConfig(**{**vars(TINY_VAE), "frame_batch_size": 16, "latent_batch_size": 4})
    assert latent_frames(config, 17) == 5
    other = VAE(config).double()
    plain = randomize(VAE(TINY_VAE).double())
    other.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert other.decode(latent(5)).shape == (1, 3, 17, 16, 24)
        assert not torch.allclose(other.decode(latent(5)), plain.decode(latent(5)), rtol=0.01)  # part of the numbers


# The posterior


@torch.no_grad()
def test_encode_is_the_scaled_mode_or_a_scaled_sample(vae: VAE):
    x = clip(9)
    mean, logvar = vae.moments(x)
    scale = TINY_VAE.scaling_factor
    assert torch.equal(vae.encode(x), mean * scale)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sample = vae.encode(x, torch.Generator().manual_seed(5))
    torch.testing.assert_close(sample, (mean + (logvar / 2).exp() * noise) * scale, rtol=1e-12, atol=1e-12)
    assert (sample - mean * scale).abs().mean() > 0.1


@torch.no_grad()
def test_log_variance_is_held_within_minus_30_and_20():
    model = randomize(VAE(TINY_VAE))
    model.encoder.conv_out.bias[4:6], model.encoder.conv_out.bias[6:] = 1e3, -1e3
    logvar = model.moments(clip(1).float())[1]
    assert (logvar[:, :2] == 20).all()
    assert (logvar[:, 2:] == -30).all()


@torch.no_grad()
def test_the_draw_is_the_same_in_bfloat16_and_float32():
    """Drawn in float32 and cast, so that a seed means the same picture."""
    x, samples = clip(1).float(), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = randomize(VAE(TINY_VAE)).to(dtype)
        mean = model.encode(x.to(dtype)).float()
        std = (model.moments(x.to(dtype))[1] / 2).exp().float()
        samples[dtype] = (model.encode(x.to(dtype), torch.Generator().manual_seed(5)).float() - mean) / std
    torch.testing.assert_close(*samples.values(), rtol=0.05, atol=0.1)


# Chunks


@torch.no_grad()
def test_a_later_chunk_never_changes_an_earlier_one(vae: VAE):
    """Causality is exact between chunks; inside one, GroupNorm mixes all frames."""
    x = clip(25)
    latents = vae.encode(x)
    for first, kept in ((9, 3), (17, 5)):
        y = x.clone()
        y[:, :, first:] += 1
        changed = vae.encode(y)
        assert torch.equal(changed[:, :, :kept], latents[:, :, :kept])
        assert not torch.allclose(changed[:, :, kept], latents[:, :, kept])

    pixels = vae.decode(latents)
    other = latents.clone()
    other[:, :, 3:5] += 1
    changed = vae.decode(other)
    assert torch.equal(changed[:, :, :9], pixels[:, :, :9])
    assert not torch.allclose(changed[:, :, 9:17], pixels[:, :, 9:17])
    assert not torch.allclose(changed[:, :, 17:], pixels[:, :, 17:])  # by the memory of the chunk before


@torch.no_grad()
def test_each_chunk_hears_of_the_one_before(vae: VAE):
    x = clip(17)
    y = x.clone()
    y[:, :, :9] += 1
    assert not torch.allclose(vae.encode(y)[:, :, 3:], vae.encode(x)[:, :, 3:])


@torch.no_grad()
def test_chunks_arrive_as_they_are_decoded(vae: VAE, monkeypatch: pytest.MonkeyPatch):
    latents, runs = latent(7), []
    monkeypatch.setattr(vae.decoder, "forward", lambda *a, run=vae.decoder.forward: runs.append(1) or run(*a))
    chunks = vae.decode_chunks(latents)
    first = next(chunks)
    assert (first.shape[2], len(runs)) == (9, 1)
    assert torch.equal(torch.cat([first, *chunks], 2), vae.decode(latents))


# Gradients


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_gradients_are_the_same_with_and_without_checkpointing(half: str):
    """Over two chunks: recomputing one must read the memory that it read the first time."""
    x = clip(17) if half == "encode" else latent(5)
    gradients = []
    for checkpointing in (False, True):
        model = randomize(VAE(TINY_VAE).double())
        model.gradient_checkpointing = checkpointing
        assert model.gradient_checkpointing == checkpointing
        x.grad = None
        getattr(model, half)(x.requires_grad_()).square().sum().backward()
        part = model.encoder if half == "encode" else model.decoder
        gradients.append([x.grad.clone(), *(p.grad for p in part.parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-12)
        assert plain.abs().max() > 0


def test_recomputing_runs_every_resnet_again():
    model = randomize(VAE(TINY_VAE).double())
    model.gradient_checkpointing = True
    calls, original = [], type(model.encoder.mid[0])._forward
    model.encoder.mid[0]._forward = lambda *a: calls.append(1) or original(model.encoder.mid[0], *a)
    model.encode(clip(1).requires_grad_()).sum().backward()
    assert len(calls) == 2


# Doors


@torch.no_grad()
def test_all_work_goes_through_the_ops(vae: VAE):
    """Every convolution of the VAE but the norms' own is called by a row, and an exchanged row is the one used."""
    calls: list[str] = []
    seen: set[nn.Module] = set()

    def counted(name: str):
        row = getattr(VAEOps(), name)

        def call(x: torch.Tensor, *rest, **named):
            calls.append(name)
            seen.update(part for part in (*rest, *named.values()) if isinstance(part, nn.modules.conv._ConvNd))
            return row(x, *rest, **named)

        return call

    latents = vae.encode(clip(9))
    pixels = vae.decode(latents)
    set_ops(vae, VAEOps(**{name: counted(name) for name in vars(VAEOps())}))
    try:
        assert torch.equal(vae.encode(clip(9)), latents)
        assert torch.equal(vae.decode(latents), pixels)
        assert set(calls) == set(vars(VAEOps()))
        convs = {n: m for n, m in vae.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
        assert {n.rsplit(".", 1)[1] for n, m in convs.items() if m not in seen} == {"scale", "shift"}
        set_ops(vae, replace(VAEOps(), norm_silu_conv=lambda x, norm, conv, *_, **__: conv(x, Memory())))
        assert not torch.allclose(vae.decode(latents), pixels, rtol=0.01)
    finally:
        set_ops(vae, VAEOps())
    assert torch.equal(vae.decode(latents), pixels)


@torch.no_grad()
def test_sums_of_parts_give_the_norm_of_the_whole():
    """In strips of the picture, as they lie on several processes."""
    torch.manual_seed(0)
    x, norm = 3 + torch.randn(2, 6, 3, 7, 5, dtype=torch.float64), nn.GroupNorm(3, 6, eps=1e-3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    sums = sum(group_sums(part, 3) for part in x.split([1, 4, 2], dim=3))
    scale, shift = (value[:, :, None, None, None] for value in group_affine(norm, sums, 2 * 3 * 7 * 5))
    torch.testing.assert_close(x * scale + shift, norm(x), rtol=1e-12, atol=1e-12)
    half = group_sums(x.bfloat16(), 3)
    assert half.dtype == torch.float64
    torch.testing.assert_close(half, group_sums(x.bfloat16().double(), 3), rtol=1e-6, atol=0)


@torch.no_grad()
def test_a_clip_goes_through_with_the_memory_asked_for(vae: VAE):
    """One of another kind is used for all chunks: frames that it takes away are missed."""

    class Forgetful(Memory):
        def take(self, module: nn.Module) -> torch.Tensor | None:
            return super().take(module) if module is not vae.decoder.conv_in else None

    whole = vae.decode(latent(5))
    vae.new_memory = Forgetful
    try:
        other = vae.decode(latent(5))
    finally:
        vae.new_memory = Memory
    assert torch.equal(other[:, :, :9], whole[:, :, :9])
    assert not torch.allclose(other[:, :, 9:], whole[:, :, 9:])


# Slices and tiles


@torch.no_grad()
def test_slicing_changes_nothing_but_memory(vae: VAE):
    x, z = clip(9, batch=2), latent(3, batch=2)
    whole = vae.encode(x), vae.decode(z)
    vae.slicing = True
    try:
        sliced = vae.encode(x), vae.decode(z)
    finally:
        vae.slicing = False
    for a, b in zip(sliced, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_a_picture_within_one_tile_is_not_tiled(vae: VAE):
    x, z = clip(1, 16, 24), latent(2)
    whole = vae.moments(x)[0], vae.decode(z)
    vae.tiling = Tiling(16, 24)
    try:
        assert torch.equal(vae.moments(x)[0], whole[0])
        assert torch.equal(vae.decode(z), whole[1])
        assert vae.decode(latent(2, 4, 6)).shape == (1, 3, 8, 32, 48)
    finally:
        vae.tiling = None


@pytest.mark.parametrize("shape", [(60, 90), (96, 170), (31, 46), (30, 45), (7, 50)])
@pytest.mark.parametrize(
    "tiling", [Tiling(240, 360), Tiling(32, 32), Tiling(32, 48), Tiling(120, 104, 0.3, 0.45), Tiling(64, 64, 0.0, 0.9)]
)
def test_tiles_add_up_to_the_picture(shape: tuple[int, int], tiling: Tiling):
    """With an enlargement that looks at no neighbour, tiles and their blends change nothing, whatever their size."""
    tile = (tiling.height // 8, tiling.width // 8)
    overlap = (tiling.overlap_height, tiling.overlap_width)
    x = torch.randn(1, 1, 1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def enlarge(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(8, 3).repeat_interleave(8, 4)

    def reduce(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, :, ::8, ::8]

    pixels = (tile[0] * 8, tile[1] * 8)
    large = tiled(enlarge, x, tile=tile, out_tile=pixels, overlap=overlap)
    torch.testing.assert_close(large, enlarge(x), rtol=1e-12, atol=1e-12)
    small = tiled(reduce, enlarge(x), tile=pixels, out_tile=tile, overlap=overlap)
    torch.testing.assert_close(small, x, rtol=1e-12, atol=1e-12)


def test_tiles_of_the_published_models_lie_as_in_diffusers():
    """60 x 90 latents: 3 x 3 tiles of 30 x 45, every 25 and 36."""
    seen: list[tuple[int, ...]] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        seen.append((*map(int, x[0, :, 0, 0, 0]), *x.shape[3:]))
        return x.repeat_interleave(8, 3).repeat_interleave(8, 4)

    rows, columns = torch.meshgrid(torch.arange(60.0), torch.arange(90.0), indexing="ij")
    x = torch.stack([rows, columns])[None, :, None]
    tiled(run, x, tile=(30, 45), out_tile=(240, 360), overlap=(1 / 6, 1 / 5))
    assert seen == [(top, left, min(30, 60 - top), min(45, 90 - left)) for top in (0, 25, 50) for left in (0, 36, 72)]


@torch.no_grad()
def test_default_tiles_of_a_small_model_keep_the_size(vae: VAE):
    vae.tiling = vae.default_tiling
    try:
        assert vae.decode(latent(1, 4, 6)).shape == (1, 3, 1, 32, 48)
        assert vae.encode(clip(1, 32, 48)).shape == (1, 4, 1, 4, 6)
    finally:
        vae.tiling = None


def test_default_tiles_are_half_the_native_size():
    with torch.device("meta"):
        assert VAE(VAEConfig()).default_tiling == Tiling(240, 360, 1 / 6, 1 / 5)


def test_compression_is_8_in_space_and_4_in_time():
    assert TINY_VAE.spatial_compression == 8
    assert math.log2(TINY_VAE.temporal_compression_ratio) == 2


@pytest.mark.parametrize(("latents", "frames"), [(1, 1), (2, 5), (3, 9), (4, 13), (13, 49), (22, 85)])
@torch.no_grad()
def test_with_the_first_latent_alone_every_number_of_latents_has_its_frames(latents: int, frames: int):
    """CogVideoX-Fun's plan 1, 2, 2, …: an even number of latents, too, becomes as many frames as it was made of."""
    config = replace(TINY_VAE, first_latent_alone=True)
    vae = randomize(VAE(config).eval())
    assert latent_frames(config, frames) == latents
    x = torch.randn(1, 4, latents, 2, 2, generator=torch.Generator().manual_seed(0))
    decoded = vae.decode(x)  # type: ignore[operator]
    assert decoded.shape[2] == frames
    # a frame depends on the latents up to its own chunk only
    shorter = vae.decode(x[:, :, :1])  # type: ignore[operator]
    torch.testing.assert_close(decoded[:, :, :1], shorter)
