"""The counters, against what can be counted by hand and against what diffusers is known to cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import nn

from videogen.config import DiTConfig, VAEConfig, to_dict
from videogen.runtime.counters import count

A, B = torch.zeros(30, 40), torch.zeros(40, 50)
DEVICES = ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)]


@torch.library.custom_op("videogen::test_double", mutates_args={"out"})
def double(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_((x + x) @ torch.eye(x.shape[1]))  # what goes on inside does not count


@double.register_fake
def _(x, out):
    pass


@pytest.mark.parametrize("device", DEVICES)
def test_a_product_by_hand(device):
    counts = count(F.linear, A.to(device), B.T.contiguous().to(device), torch.zeros(50, device=device))
    assert counts.flops == 2 * 30 * 40 * 50
    assert counts.bytes == 4 * (30 * 40 + 40 * 50 + 50 + 30 * 50)
    assert counts.ops == 1


def test_views_and_room_are_free():
    counts = count(lambda: A.view(1200)[:7].unsqueeze(0).T.reshape(7, 1).expand(7, 9) is torch.empty(9))
    assert (counts.ops, counts.bytes, counts.flops) == (0, 0, 0)
    assert counts.peak_bytes == 9 * 4


def test_an_expanded_axis_is_read_once():
    assert count(lambda: torch.zeros(5, 1).expand(5, 8).clone()).bytes == 4 * (5 + 5 + 40)  # zeros, then the clone


def test_in_place_reads_and_writes_but_a_copy_only_writes():
    x, y = torch.zeros(10), torch.zeros(10)
    assert count(x.add_, y).bytes == 3 * 40
    assert count(x.copy_, y).bytes == 2 * 40
    assert count(x.zero_).bytes == 40
    assert count(torch.add, x, y, out=torch.zeros(10)).bytes == 3 * 40


@pytest.mark.parametrize("device", DEVICES)
def test_attention_is_one_operation(device):
    q, k, v = (torch.zeros(2, 3, n, 8, device=device) for n in (5, 7, 7))
    counts = count(F.scaled_dot_product_attention, q, k, v)
    assert list(counts.by_op) == ["aten.scaled_dot_product_attention"]
    assert counts.flops == 2 * 2 * 3 * 5 * 7 * (8 + 8)
    assert counts.bytes == 4 * 2 * 3 * 8 * (5 + 7 + 7 + 5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_custom_operation_is_one(device):
    x, out = (torch.zeros(4, 4, device=device) for _ in range(2))
    counts = count(double, x, out)
    assert (counts.ops, counts.bytes, counts.peak_bytes) == (1, 2 * 64, 0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_convolution_by_hand(device):
    conv = nn.Conv3d(3, 4, 3, device=device)
    counts = count(conv, torch.zeros(1, 3, 5, 6, 7, device=device))
    out = 4 * 3 * 4 * 5
    assert counts.flops == 2 * out * 3 * 27
    assert counts.bytes == 4 * (3 * 5 * 6 * 7 + conv.weight.numel() + 4 + out)


def test_nearest_enlargement_is_one_operation():
    counts = count(F.interpolate, torch.zeros(1, 2, 3, 4, 5), size=(3, 8, 10))
    assert (counts.ops, counts.bytes) == (1, 4 * (120 + 480))


@pytest.mark.parametrize("device", DEVICES)
def test_peak_follows_what_lives(device):
    x = torch.zeros(256, device=device)  # 1 KiB

    def chain():
        y = x + 1  # 1 alive
        z = torch.cat([y, y])  # 3
        del y
        w = torch.cat([z, z])  # 6
        return w[:1]  # keeps 4 of them

    def twice():
        kept = chain()
        return kept + chain()  # 4 + 6

    assert count(chain).peak_bytes == 6 * 1024
    assert count(twice).peak_bytes == 10 * 1024


def test_what_is_held_counts_for_as_long_as_it_lives():
    holder = [torch.zeros(256), torch.zeros(256)]

    def run():
        holder.pop()
        return torch.zeros(256) + 1

    linear = nn.Linear(16, 16, bias=False)  # 1 KiB
    counts = count(run, held=iter([*holder, linear]))  # three, less one, and two new ones
    assert counts.peak_bytes == 4 * 1024
    assert count(linear, torch.zeros(1, 16)).peak_bytes == 64


@pytest.fixture(scope="module")
def vae_decode():
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX(**to_dict(VAEConfig())).to(torch.bfloat16).eval()
        latents = torch.zeros(1, 16, 13, 60, 90, dtype=torch.bfloat16)
    return count(vae.decode, latents)


def test_diffusers_decode_of_49_frames_of_480x720(vae_decode):
    assert vae_decode.flops == pytest.approx(315.0e12, rel=1e-3)
    assert vae_decode.bytes == pytest.approx(1304e9, rel=1e-3)
    assert vae_decode.peak_bytes / 2**30 == pytest.approx(14.74, abs=0.01)


def test_diffusers_5b_guidance_step():
    config = DiTConfig(num_layers=2, num_attention_heads=48, use_rotary_positional_embeddings=True)
    with torch.device("meta"):
        dit = CogVideoXTransformer3DModel(**to_dict(config)).to(torch.bfloat16).eval()
        latents = torch.zeros(2, 13, 16, 60, 90, dtype=torch.bfloat16)
        text = torch.zeros(2, 226, 4096, dtype=torch.bfloat16)
        times, rotary = torch.zeros(2, dtype=torch.long), (torch.zeros(17550, 64), torch.zeros(17550, 64))
    two = count(dit, latents, text, times, image_rotary_emb=rotary)
    del dit.transformer_blocks[1]
    one = count(dit, latents, text, times, image_rotary_emb=rotary)

    s, d, layers = 17776, 3072, 42
    block = two.flops - one.flops
    assert block == pytest.approx(2 * (24 * s * d**2 + 4 * s**2 * d), rel=1e-4)  # the closed form; the rest is time
    assert two.ops - one.ops == 59  # 58, and one SiLU twice

    def beside_products(counts):
        products = ("addmm", "attention", "convolution")
        return sum(op.bytes for name, op in counts.by_op.items() if not any(p in name for p in products))

    total = beside_products(one) + (layers - 1) * (beside_products(two) - beside_products(one))
    assert total == pytest.approx(879e9, rel=2e-3)
