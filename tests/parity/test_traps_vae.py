"""Mistakes in the VAE that would run without an error. Each is made here on purpose, and shown to miss diffusers."""

import pytest
import torch
import torch.nn.functional as F
from pipeline_pairs import difference, their_vae

import videogen.models.vae as room
from videogen.models.causal import CausalConv3d, Memory
from videogen.models.vae import VAE, LatentNorm
from videogen.testing import TINY_VAE, randomize

VISIBLE = 1e-3


@pytest.fixture
def vae() -> VAE:
    return randomize(VAE(TINY_VAE).double().eval())  # type: ignore[return-value]


def clip(frames: int) -> torch.Tensor:
    return torch.randn(1, 3, frames, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def latent(frames: int) -> torch.Tensor:
    return torch.randn(1, 4, frames, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def errors(vae: VAE, frames: int = 17, latents: int = 5) -> tuple[float, float]:
    """How far encoding and decoding are from diffusers."""
    reference, x, z = their_vae(vae), clip(frames), latent(latents)
    encoded = difference(vae.moments(x)[0], reference.encode(x).latent_dist.mean)
    return encoded, difference(vae.decode(z * TINY_VAE.scaling_factor), reference.decode(z).sample)


def test_trap_02_time_is_padded_with_the_first_frame_and_space_with_zeros(vae: VAE, monkeypatch: pytest.MonkeyPatch):
    assert max(errors(vae)) < 1e-10

    def zeros_in_time(self: CausalConv3d, x: torch.Tensor, memory: Memory) -> torch.Tensor:
        before = memory.past.get(self)
        x = torch.cat([torch.zeros_like(x[:, :, :2]) if before is None else before, x], 2)
        memory.future[self] = x[:, :, -2:]
        return super(CausalConv3d, self).forward(x)

    def repeated_in_space(self: CausalConv3d, x: torch.Tensor, memory: Memory) -> torch.Tensor:
        before = memory.past.get(self)
        x = torch.cat([x[:, :, :1].expand(-1, -1, 2, -1, -1) if before is None else before, x], 2)
        memory.future[self] = x[:, :, -2:]
        return F.conv3d(F.pad(x, (1, 1, 1, 1, 0, 0), "replicate"), self.weight, self.bias)

    for wrong in (zeros_in_time, repeated_in_space):
        monkeypatch.setattr(CausalConv3d, "forward", wrong)
        assert min(errors(vae)) > VISIBLE


def test_trap_03_chunks_are_8_and_2_and_the_first_takes_the_rest(vae: VAE, monkeypatch: pytest.MonkeyPatch):
    assert max(errors(vae)) < 1e-10

    def all_at_once(length: int, batch: int) -> list[tuple[int, int]]:
        return [(0, length)]

    def rest_last(length: int, batch: int) -> list[tuple[int, int]]:
        starts = list(range(0, length - batch + 1, batch))
        return [*((start, start + batch) for start in starts[:-1]), (starts[-1], length)]

    monkeypatch.setattr(room, "chunk_plan", all_at_once)
    assert min(errors(vae)) > VISIBLE
    monkeypatch.setattr(room, "chunk_plan", rest_last)
    assert min(errors(vae)) > VISIBLE


def test_trap_04_an_odd_chunk_resizes_its_first_latent_alone(vae: VAE, monkeypatch: pytest.MonkeyPatch):
    assert errors(vae)[1] < 1e-10
    right = LatentNorm.forward

    def resized_in_one(self: LatentNorm, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        scale, shift = (F.interpolate(conv(latents), size=x.shape[2:]) for conv in (self.scale, self.shift))
        return self.norm(x) * scale + shift

    monkeypatch.setattr(LatentNorm, "forward", resized_in_one)
    assert errors(vae, latents=3)[1] > VISIBLE
    monkeypatch.setattr(LatentNorm, "forward", right)


def test_trap_04_every_norm_reads_the_raw_latents(vae: VAE, monkeypatch: pytest.MonkeyPatch):
    right = LatentNorm.forward

    def processed(self: LatentNorm, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return right(self, x, F.silu(latents))

    monkeypatch.setattr(LatentNorm, "forward", processed)
    assert errors(vae)[1] > VISIBLE


@torch.no_grad()
def test_trap_05_an_even_number_of_latents_has_no_first_frame(vae: VAE, monkeypatch: pytest.MonkeyPatch):
    """2 latents are 8 frames, not 5; in a longer clip only an odd first chunk has a first frame that stands alone."""
    assert vae.decode(latent(2)).shape[2] == their_vae(vae).decode(latent(2)).sample.shape[2] == 8
    assert errors(vae, latents=4)[1] < 1e-10

    right = room.enlarge_to

    def always_a_first_frame(x: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        frames = x.shape[2]
        if size[0] != 2 * frames:
            return right(x, size)
        first, rest = x[:, :, :1], x[:, :, 1:]
        return torch.cat([F.interpolate(first, (1, *size[1:])), F.interpolate(rest, (size[0] - 1, *size[1:]))], 2)

    monkeypatch.setattr(room, "enlarge_to", always_a_first_frame)
    assert errors(vae, latents=4)[1] > VISIBLE
