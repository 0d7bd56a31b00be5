"""The VAE equals diffusers' on the same random weights."""

from dataclasses import replace

import pytest
import torch
from pipeline_pairs import their_vae

from videogen.config import VAEConfig, to_dict
from videogen.models.tiling import Tiling
from videogen.models.vae import VAE
from videogen.testing import randomize
from videogen.weights.table import VAE_RULES, to_theirs

SMALL = VAEConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=2)
TILES = (32, 48, 0.25, 0.5)  # of a size at which diffusers' tiles add up to the picture
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=["float64", "float32"])


def pair(dtype: torch.dtype, config: VAEConfig = SMALL):
    vae = randomize(VAE(config).to(dtype).eval())
    return vae, their_vae(vae)


def normal(*shape: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).double().abs().max() / b.double().abs().max())


def scaled(z: torch.Tensor, vae: VAE) -> torch.Tensor:
    return z * vae.config.scaling_factor


@DTYPES
@torch.no_grad()
def test_encode(dtype: torch.dtype):
    vae, reference = pair(dtype)
    for frames in (1, 5, 8, 9, 17, 22, 49):
        x = normal(1, 3, frames, 16, 24, dtype=dtype)
        expected = reference.encode(x).latent_dist
        mean, logvar = vae.moments(x)
        errors = relative(mean, expected.mean), relative(logvar, expected.logvar)
        print(f"encode {frames} frames, {dtype}: {max(errors):.1e}")
        assert max(errors) <= BOUNDS[dtype], frames


@DTYPES
@torch.no_grad()
def test_decode(dtype: torch.dtype):
    vae, reference = pair(dtype)
    for frames in (1, 2, 3, 4, 5, 6, 13):
        z = normal(1, 16, frames, 2, 3, dtype=dtype)
        error = relative(vae.decode(scaled(z, vae)), reference.decode(z).sample)
        print(f"decode {frames} latents, {dtype}: {error:.1e}")
        assert error <= BOUNDS[dtype], frames


@DTYPES
@torch.no_grad()
def test_tiled(dtype: torch.dtype):
    vae, reference = pair(dtype)
    reference.enable_tiling(*TILES)
    vae.tiling = Tiling(*TILES)
    x, z = normal(1, 3, 9, 56, 80, dtype=dtype), normal(1, 16, 3, 7, 8, dtype=dtype)
    errors = (
        relative(vae.moments(x)[0], reference.encode(x).latent_dist.mean),
        relative(vae.decode(scaled(z, vae)), reference.decode(z).sample),
    )
    print(f"tiled, {dtype}: {max(errors):.1e}")
    assert max(errors) <= BOUNDS[dtype]
    vae.tiling = None  # it is another result
    assert relative(vae.decode(scaled(z, vae)), reference.decode(z).sample) > 0.01


@torch.no_grad()
def test_sliced():
    vae, reference = pair(torch.float64)
    reference.enable_slicing()
    vae.slicing = True
    x, z = normal(2, 3, 9, 16, 24, dtype=torch.float64), normal(2, 16, 3, 2, 3, dtype=torch.float64)
    assert relative(vae.moments(x)[0], reference.encode(x).latent_dist.mean) <= 1e-10
    assert relative(vae.decode(scaled(z, vae)), reference.decode(z).sample) <= 1e-10


@DTYPES
@torch.no_grad()
def test_a_seed_draws_the_same_sample(dtype: torch.dtype):
    vae, reference = pair(dtype)
    x = normal(1, 3, 9, 16, 24, dtype=dtype)
    expected = reference.encode(x).latent_dist.sample(torch.Generator().manual_seed(4)) * vae.config.scaling_factor
    assert relative(vae.encode(x, torch.Generator().manual_seed(4)), expected) <= BOUNDS[dtype]


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_per_block": 2},
        {"block_out_channels": (8, 16, 8, 16)},
        {"norm_num_groups": 4, "latent_channels": 6, "norm_eps": 1e-6},
    ],
)
@torch.no_grad()
def test_other_settings(changes: dict):
    config = replace(SMALL, **changes)
    vae, reference = pair(torch.float64, config)
    x = normal(1, 3, 9, 16, 24, dtype=torch.float64)
    z = normal(1, config.latent_channels, 3, 2, 3, dtype=torch.float64)
    assert relative(vae.moments(x)[0], reference.encode(x).latent_dist.mean) <= 1e-10
    assert relative(vae.decode(scaled(z, vae)), reference.decode(z).sample) <= 1e-10


def test_full_size_has_the_published_tensors():
    from diffusers import AutoencoderKLCogVideoX

    with torch.device("meta"):
        vae, reference = VAE(VAEConfig()), AutoencoderKLCogVideoX(**to_dict(VAEConfig()))
    state = {key: tuple(value.shape) for key, value in to_theirs(vae.state_dict(), VAE_RULES).items()}
    assert len(state) == 436
    assert sum(p.numel() for p in vae.parameters()) == 215_583_907
    assert sum(p.numel() for p in vae.encoder.parameters()) == 92_215_456
    assert state == {key: tuple(value.shape) for key, value in reference.state_dict().items()}
