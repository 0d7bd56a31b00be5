"""Positions: what must hold whatever the numbers are (equality with diffusers is in tests/parity)."""

import math

import pytest
import torch
from einops import einsum

from videogen.config import DiTConfig
from videogen.models.positions import (
    learned_table_shape,
    rotary_positions,
    rotary_table,
    rotate,
    sincos_table,
    time_sinusoid,
)

ROTARY_10 = DiTConfig(use_rotary_positional_embeddings=True)
ROTARY_15 = DiTConfig(use_rotary_positional_embeddings=True, patch_size_t=2, sample_height=96, sample_width=170)


def scores(positions: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """q·k of every pair of tokens when all carry the same query and the same key."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 1, 1, 64, generator=generator).expand(1, 1, len(positions), 64) for _ in range(2))
    rotary = rotary_table(positions, 64)
    return einsum(rotate(q, rotary), rotate(k, rotary), "b k i c, b k j c -> i j")


def test_rotary_attention_depends_on_relative_positions_only():
    positions = torch.tensor([[0, 0, 0], [3, 1, 4], [1, 5, 9], [2, 6, 5]], dtype=torch.float32)
    base = scores(positions)
    assert torch.allclose(scores(positions + torch.tensor([7.0, 2.0, 11.0])), base, atol=1e-4)
    assert torch.allclose(base.diagonal(), base[0, 0].expand(4), atol=1e-4)  # no distance: no turn
    for axis in range(3):  # and on every axis of them
        moved = positions.clone()
        moved[1, axis] += 1
        assert (scores(moved) - base).abs().max() > 0.1


def test_rotation_keeps_lengths_and_leaves_the_origin_alone():
    x = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 0, 0], [1, 2, 3], [9, 9, 9], [0, 40, 0], [0, 0, 80]], dtype=torch.float32)
    turned = rotate(x, rotary_table(positions, 64))
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    assert not torch.allclose(turned[:, :, 1], x[:, :, 1])


@pytest.mark.parametrize(("axis", "channels"), [(0, range(0, 16)), (1, range(16, 40)), (2, range(40, 64))])
def test_each_axis_turns_its_own_channels(axis: int, channels: range):
    position = torch.zeros(1, 3)
    position[0, axis] = 1.0
    x = torch.ones(1, 1, 1, 64)
    changed = (rotate(x, rotary_table(position, 64)) - x).abs()[0, 0, 0] > 0
    assert changed.nonzero().flatten().tolist() == list(channels)


def test_rotation_is_computed_in_float32_for_every_dtype():
    x = torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(0))
    rotary = rotary_table(torch.tensor([[5.0, 6.0, 7.0]]), 64)
    assert rotary.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        turned = rotate(x.to(dtype), rotary)
        assert turned.dtype == dtype
        assert torch.equal(turned, rotate(x.to(dtype).float(), rotary).to(dtype))


def test_native_positions_are_integers():
    positions = rotary_positions(ROTARY_10, 13, 60, 90)
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (13, 30, 45)), indexing="ij"), -1)
    assert torch.equal(positions, grid.reshape(-1, 3).float())


def test_temporal_patches_share_a_position_and_larger_grids_than_trained_work():
    positions = rotary_positions(ROTARY_15, 6, 170, 400)  # trained table: 48 x 85 tokens
    assert positions.shape == (3 * 85 * 200, 3)
    assert positions.max(dim=0).values.tolist() == [2, 84, 199]
    assert rotary_table(positions, 64).isfinite().all()


@pytest.mark.parametrize(("h", "w"), [(60, 60), (90, 60), (48, 84), (120, 180), (30, 90)])
def test_fitted_positions_stay_inside_the_trained_grid(h: int, w: int):
    positions = rotary_positions(ROTARY_10, 2, h, w)
    assert positions.min() >= 0
    assert positions[:, 1].max() < 30
    assert positions[:, 2].max() < 45


def test_sincos_table_separates_every_token():
    config = DiTConfig(num_attention_heads=2, sample_height=8, sample_width=12)
    table = sincos_table(config, 4, 8, 12)
    assert table.shape == (4 * 4 * 6, 128)
    assert table.dtype == torch.float64
    distances = torch.cdist(table, table) + torch.eye(len(table)) * 10
    assert distances.min() > 0.1
    assert torch.allclose(table.pow(2).sum(1), torch.full((len(table),), 64.0, dtype=torch.float64))  # sin² + cos²


def test_learned_table_covers_text_and_video():
    config = DiTConfig(num_attention_heads=48, use_rotary_positional_embeddings=True)
    assert learned_table_shape(config) == (1, 17776, 3072)


def test_time_sinusoid_values():
    features = time_sinusoid(torch.tensor([0, 500]), 8)
    assert features[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]  # cosines first
    assert features[1, 0].item() == pytest.approx(math.cos(500), abs=1e-4)
    assert features[1, 5].item() == pytest.approx(math.sin(50), abs=1e-4)  # the second frequency is 10000^(-1/4)
    assert torch.equal(time_sinusoid(torch.tensor([500]), 8, flip_sin_to_cos=False), features[1:].roll(4, 1))
