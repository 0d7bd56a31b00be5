"""Convolutions in fewer multiplications are convolutions: exact in float64, as exact as direct ones in float32."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX

import videogen.runtime.vae as fast
from videogen.config import VAEConfig, to_dict
from videogen.models.vae import VAE
from videogen.runtime import winograd
from videogen.runtime.vae import fast_vae
from videogen.runtime.winograd import EACH, ENLARGE, ONE, PAIR, SAME, TWO, Room, Scheme
from videogen.testing import TINY_VAE, randomize
from videogen.weights.table import VAE_RULES, to_theirs

ALL = {"two": TWO, "one": ONE, "same": SAME, "pair": PAIR, "enlarge": ENLARGE, "each": EACH}


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture(autouse=True)
def widths_of_one(monkeypatch: pytest.MonkeyPatch):
    """Tiny networks take the way of wide ones, in blocks and products of few channels."""
    monkeypatch.setattr(fast, "WIDE", 1)
    monkeypatch.setattr(fast, "FEW", 1)
    monkeypatch.setattr(winograd, "SPLIT", 3)


@pytest.mark.parametrize("name", ALL)
def test_a_scheme_is_three_taps_along_one_axis(name: str):
    """What a tile gives, written out for each: values it sees, in the order of the taps."""
    scheme, a = ALL[name], normal(9)
    windows = {
        "two": [(0, 1, 2), (1, 2, 3)],
        "one": [(0, 1, 2)],
        "same": [(0, 0, 0)],
        "pair": [(0, 0, 1), (0, 1, 1)],
        "enlarge": [(0, 1, 1), (1, 1, 2)],
        "each": [(0,)],
    }[name]
    weight, tiles = normal(len(scheme.taps[0]), seed=2), 3
    schemes = (scheme, EACH, EACH)
    out = torch.empty(tiles * scheme.outputs, 1, 1, 1, dtype=torch.float64)
    matrices = winograd.transformed(weight.view(1, 1, -1, 1, 1), schemes)
    winograd.convolve(a.view(-1, 1, 1, 1), matrices, schemes, out)
    expected = [a[torch.tensor(w) + tile * scheme.step] @ weight for tile in range(tiles) for w in windows]
    close(out.flatten(), torch.stack(expected))
    furthest = 3 if name == "two" else max(map(max, windows))
    assert scheme.span(tiles) == 1 + (tiles - 1) * scheme.step + furthest


@pytest.mark.parametrize("block", [1, 400, 2**21])
@pytest.mark.parametrize("time", [TWO, ONE], ids=["two", "one"])
@pytest.mark.parametrize(("size", "i", "o"), [((4, 6, 8), 7, 5), ((3, 5, 7), 3, 4), ((1, 1, 1), 1, 2)])
def test_three_axes_are_a_convolution(size, i: int, o: int, time: Scheme, block: int, monkeypatch):
    """Even and odd sizes, whole or in blocks, with a bias, into memory with gaps, over what is there or added to it."""
    monkeypatch.setattr(winograd, "BLOCK", block)
    whole = tuple(n + n % 2 + 2 for n in size)
    x, weight, bias = normal(*whole, i), normal(o, i, 3, 3, 3, seed=2), normal(o, seed=3)
    seen = x[tuple(slice(n + 2) for n in size)].movedim(-1, 0)[None]
    expected = F.conv3d(seen, weight, bias)[0].movedim(0, -1)
    schemes = (time, TWO, TWO)
    out = normal(*(2 * n for n in size), o, seed=4)[tuple(slice(n) for n in size)]
    before, matrices, room = out.clone(), winograd.transformed(weight, schemes), Room()
    winograd.convolve(x, matrices, schemes, out, bias, add=True, room=room)
    close(out, before + expected)
    winograd.convolve(x, matrices, schemes, out, bias, room=room)
    close(out, expected)


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
def test_frames_of_a_causal_convolution(frames: int, pairs: bool, begins: bool):
    if pairs and (frames == 1 or (frames % 2 and not begins)):
        pytest.skip("a frame alone is doubled nowhere but at the beginning of a clip")
    x, past, weight = normal(1, 2, frames, 4, 6), normal(1, 2, 2, 4, 6, seed=2), normal(3, 2, 3, 3, 3, seed=3)
    past = x[:, :, :1].expand_as(past) if begins else past
    past = past[:, :, :1].expand_as(past) if pairs else past  # one frame stands for two there too
    doubled = fast.repeat_pairs(fast.know(x, pairs=pairs))
    expected = F.conv3d(torch.cat([past, doubled], 2), weight, padding=(0, 1, 1))
    plan = winograd.causal_plan(frames, begins=begins, pairs=pairs)
    seen = F.pad(torch.cat([past[:, :, : 1 if pairs else 2], x], 2), (1, 1, 1, 1))
    out = torch.empty_like(expected)
    matrices = winograd.transformed(weight, (plan[0][0], TWO, TWO))
    winograd.causal_conv(seen, matrices, plan, out, None, Room(), add=False)
    close(out, expected)


def test_only_as_many_products_as_needed():
    """The products of a clip's first nine frames: 16 for the first, 64 for two more; 48 for two of a pair."""

    def products(frames: int, **how: bool) -> int:
        plan = winograd.causal_plan(frames, **how)
        return sum(16 * scheme.products * (count // scheme.outputs) for scheme, _, _, count in plan)

    assert products(9, begins=True, pairs=False) == 16 + 4 * 64
    assert products(8, begins=False, pairs=False) == 4 * 64
    assert products(2, begins=True, pairs=False) == 16 + 48
    assert products(5, begins=True, pairs=True) == 16 + 4 * 48
    assert products(4, begins=False, pairs=True) == 4 * 48


@pytest.mark.parametrize(
    ("latents", "frames", "height", "width", "strips"), [(5, 9, 3, 1, None), (1, 1, 2, 3, 3), (4, 8, 1, 2, 2)]
)
@torch.no_grad()
def test_the_fast_vae_with_it_is_the_plain_one(latents, frames, height, width, strips, monkeypatch):
    """Several chunks, frames that stand for two, odd sizes, strips of an odd number of rows."""
    monkeypatch.setattr(winograd, "SPLIT", 64)
    vae = randomize(VAE(TINY_VAE).double().eval())
    z, x = normal(2, 4, latents, height, width), normal(2, 3, frames, 8 * height, 8 * width)
    pixels, code = vae.decode(z), vae.encode(x)
    fast_vae(vae, strips=strips)
    for found, expected in ((vae.decode(z), pixels), (vae.encode(x), code)):
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-12


@torch.no_grad()
def test_as_exact_as_a_direct_convolution(monkeypatch: pytest.MonkeyPatch):
    """In float32 at the decoder's widths, to a float64 reference; products of all channels at once are not."""
    size, channels = (4, 8, 8), 256
    x = F.silu(normal(*(n + 2 for n in size), channels))
    weight = normal(channels, channels, 3, 3, 3, seed=2) / (27 * channels) ** 0.5
    x, weight = x.float(), weight.float()
    seen = x.movedim(-1, 0)[None].contiguous()
    exact = F.conv3d(seen.double(), weight.double())[0].movedim(0, -1)
    schemes, errors = (TWO, TWO, TWO), {}
    for split in (64, channels):
        monkeypatch.setattr(winograd, "SPLIT", split)
        out = torch.empty(*size, channels)
        winograd.convolve(x, winograd.transformed(weight, schemes), schemes, out)
        errors[split] = float((out - exact).norm() / exact.norm())
    assert errors[64] < 4e-7
    assert errors[64] < 0.9 * errors[channels]


@pytest.mark.slow
@torch.no_grad()
def test_error_at_full_width_is_no_more_than_that_of_diffusers(monkeypatch: pytest.MonkeyPatch):
    """All of 128 channels and more through it, float32, decoded: at most 1.05 times as far from a float64 reference."""
    monkeypatch.setattr(fast, "WIDE", 128)
    monkeypatch.setattr(winograd, "SPLIT", 64)
    model = VAE(VAEConfig(scaling_factor=1.0)).eval()
    for name, value in model.named_parameters():
        seed = sum(name.encode())
        scale = value[0].numel() ** -0.5 if value.ndim > 1 else 0.1
        value.copy_(
            scale * normal(*value.shape, dtype=torch.float32, seed=seed) + (value.ndim == 1) * ("weight" in name)
        )
    theirs = AutoencoderKLCogVideoX(**to_dict(model.config)).eval()
    theirs.load_state_dict(to_theirs(model.state_dict(), VAE_RULES))
    z = normal(1, 16, 3, 4, 6, dtype=torch.float32)
    other, mine = theirs.decode(z).sample, fast_vae(model).decode(z)
    exact = fast_vae(model.double()).decode(z.double())

    def error(found: torch.Tensor) -> float:
        return float((found.double() - exact).norm() / exact.norm())

    print(f"ours {error(mine):.2e}, diffusers {error(other):.2e}")
    assert error(mine) <= 1.05 * error(other)


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fast, "WIDE", 8)
    conv = torch.nn.Conv3d(8, 8, 3)
    assert fast.pays(normal(1, 8, 1, 1, 1, dtype=torch.float32), conv)
    assert not fast.pays(normal(1, 8, 1, 1, 1, dtype=torch.bfloat16), conv)
    assert not fast.pays(torch.empty(1, 8, 1, 1, 1, device="meta"), conv)
    assert not fast.pays(normal(1, 8, 1, 1, 1), torch.nn.Conv3d(8, 4, 3))
    assert not fast.pays(normal(1, 8, 1, 1, 1), torch.nn.Conv3d(8, 8, 1))
    monkeypatch.setattr(fast, "FEW", 2)
    assert not fast.pays(normal(1, 8, 1, 1, 1), conv)
    assert fast.pays(normal(1, 8, 1, 1, 1), torch.nn.Conv2d(8, 8, 3))  # four times as many come of it
