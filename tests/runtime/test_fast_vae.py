"""The fast VAE is the plain one: in float64 to rounding, in low precision as exact as diffusers, undone exactly."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX

import videogen.runtime.vae as fast
from videogen.config import VAEConfig, to_dict
from videogen.models.tiling import Tiling
from videogen.models.vae import VAE, enlarge_to
from videogen.runtime.counters import count
from videogen.runtime.vae import fast_vae, plain_vae
from videogen.testing import TINY_VAE, randomize
from videogen.weights.diffusers import load_folder
from videogen.weights.table import VAE_RULES, to_theirs

ROOT = Path(__file__).parents[2]
WIDER = replace(TINY_VAE, block_out_channels=(16, 32, 32, 64), layers_per_block=2, norm_num_groups=4)
LAST = torch.channels_last_3d


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture
def vae() -> VAE:
    return randomize(VAE(TINY_VAE).double().eval())  # type: ignore[return-value]


# The same function


@pytest.mark.parametrize("strips", [None, 2, 5])
@pytest.mark.parametrize(
    ("latents", "frames", "height", "width", "batch"),
    [(5, 17, 2, 3, 1), (4, 8, 3, 5, 2), (1, 1, 2, 3, 1), (3, 9, 5, 1, 1), (2, 4, 1, 2, 2)],
)
@torch.no_grad()
def test_equals_the_plain_vae(vae: VAE, latents: int, frames: int, height: int, width: int, batch: int, strips):
    """Several chunks, even and odd numbers of frames, odd sizes, clips of one frame, strips of single rows."""
    z, x = normal(batch, 4, latents, height, width), normal(batch, 3, frames, 8 * height, 8 * width)
    pixels, (mean, logvar) = vae.decode(z), vae.moments(x)
    fast_vae(vae, strips=strips)
    assert difference(vae.decode(z), pixels) < 1e-12
    assert difference(vae.moments(x)[0], mean) < 1e-12
    assert difference(vae.moments(x)[1], logvar) < 1e-12


@torch.no_grad()
def test_strips_of_a_size_are_chosen(vae: VAE, monkeypatch: pytest.MonkeyPatch):
    z, rows = normal(1, 4, 3, 4, 3), []
    pixels = vae.decode(z)
    monkeypatch.setitem(fast.BUFFER, "cpu", 100_000)
    monkeypatch.setattr(fast, "norm_silu", lambda x, *a, run=fast.norm_silu: rows.append(x.shape[3]) or run(x, *a))
    assert difference(fast_vae(vae).decode(z), pixels) < 1e-12
    assert max(rows) < 32  # the largest picture has 32 rows, each of 11 frames, 24 pixels and 4 channels: 8.4 KB


@torch.no_grad()
def test_other_architectures():
    for changes in (
        {"block_out_channels": (8, 16, 8, 16), "layers_per_block": 2},
        {"temporal_compression_ratio": 8, "latent_batch_size": 3},
        {"temporal_compression_ratio": 2, "norm_num_groups": 4},
    ):
        model = randomize(VAE(replace(TINY_VAE, **changes)).double().eval())
        z = normal(1, 4, 5, 2, 3)
        pixels = model.decode(z)
        assert difference(fast_vae(model, strips=2).decode(z), pixels) < 1e-12, changes


@torch.no_grad()
def test_chunks_slices_and_tiles_go_on_working(vae: VAE):
    z, x = normal(2, 4, 5, 4, 6), normal(2, 3, 9, 32, 48)

    def results() -> list[torch.Tensor]:
        chunks = list(vae.decode_chunks(z))
        assert [chunk.shape[2] for chunk in chunks] == [9, 8]
        vae.slicing = True
        found = [torch.cat(chunks, 2), vae.decode(z)]
        vae.slicing, vae.tiling = False, Tiling(16, 24)
        found += [vae.decode(z), vae.encode(x)]
        vae.tiling = None
        return found

    expected = results()
    fast_vae(vae)
    for ours, plain in zip(results(), expected, strict=True):
        assert difference(ours, plain) < 1e-12


def test_undone_exactly_and_weights_never_touched(vae: VAE):
    z, x = normal(1, 4, 3, 2, 3), normal(1, 3, 9, 16, 24)
    before = {name: (value.data_ptr(), value.stride(), value.clone()) for name, value in vae.state_dict().items()}
    with torch.no_grad():
        expected = vae.decode(z), vae.encode(x)
        fast_vae(vae, strips=2, caches_on_host=True)
        vae.decode(z), vae.encode(x)
    for name, value in vae.state_dict().items():
        place, stride, values = before.pop(name)
        assert (value.data_ptr(), value.stride()) == (place, stride)
        assert torch.equal(value, values)
    assert not before
    plain_vae(vae)
    with torch.no_grad():
        assert torch.equal(vae.decode(z), expected[0])
        assert torch.equal(vae.encode(x), expected[1])


def test_with_gradients_the_plain_rows_compute(vae: VAE):
    gradients = []
    for change in (plain_vae, fast_vae):
        z = normal(1, 4, 3, 2, 3).requires_grad_()
        change(vae).decode(z).square().sum().backward()
        gradients.append(z.grad)
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0


@torch.no_grad()
def test_inputs_are_left_alone(vae: VAE):
    z, x = normal(1, 4, 3, 2, 3), normal(1, 3, 9, 16, 24)
    for value, run in ((z, vae.decode), (x, vae.encode), (z.contiguous(memory_format=LAST), vae.decode)):
        before = value.clone()
        run_fast = fast_vae(vae) and run(value)
        assert run_fast is not None
        assert torch.equal(value, before)


# What is exact, bit for bit


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_and_kept_frames_do_not_depend_on_strips(dtype: torch.dtype):
    """Nor on whether what is kept lies over what was kept before."""
    x, scale, shift = (
        normal(*s, dtype=dtype, seed=i) for i, s in enumerate([(2, 16, 5, 8, 4), (2, 16, 3, 4, 2), (2, 16, 3, 4, 2)])
    )
    wide = torch.promote_types(dtype, torch.float32)
    past, affine = normal(2, 16, 2, 8, 4, dtype=dtype), normal(2, 2, 16, dtype=wide)
    x, past = x.contiguous(memory_format=LAST), past.contiguous(memory_format=LAST)
    whole, kept = x.new_empty(2, 16, 7, 8, 4).contiguous(memory_format=LAST), past.clone()
    fast.norm_silu(x, affine, scale, shift, 2, 0, past, whole, kept)
    assert torch.equal(whole[:, :, :2], past)
    assert torch.equal(kept, whole[:, :, -2:])
    out, over = torch.empty_like(whole), past.clone()
    for top, bottom, done in ((0, 4, 3), (3, 8, 8)):
        rows = slice(top, bottom)
        table = fast.latent_rows(scale, shift, top, bottom, 8)
        fast.norm_silu(
            x[:, :, :, rows], affine, *table, over[:, :, :, rows], out[:, :, :, rows], over[:, :, :, top:done]
        )
    assert torch.equal(out, whole)
    assert torch.equal(over, kept)


def test_folded_weights_compute_the_same():
    """Two taps over frames that stand for two, and 2 x 2 over a picture that is not enlarged."""
    weight, conv = normal(3, 4, 3, 3, 3), torch.nn.Conv2d(4, 4, 3, padding=1).double()
    for frames in (2, 3, 4, 5):
        x = normal(1, 4, frames, 5, 6)
        doubled = fast.repeat_pairs(fast.know(x, pairs=True))
        assert doubled.shape[2] == fast.all_frames(frames)
        expected = F.conv3d(torch.cat([doubled[:, :, :1]] * 2 + [doubled], 2), weight)
        found = torch.empty_like(expected)
        for taps, read, written in fast.paired_taps(weight, frames):
            found[:, :, written] = F.conv3d(torch.cat([x[:, :, :1], x], 2)[:, :, read], taps)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            up = fast.repeat_pairs(fast.upsample(x.contiguous(memory_format=LAST), conv, True))
            large = enlarge_to(x, (fast.all_frames(frames), 10, 12))[0].transpose(0, 1)
            torch.testing.assert_close(up[0].transpose(0, 1), conv(large), rtol=1e-12, atol=1e-12)


# Low precision


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weights", ["trained", "random"])
def test_error_is_no_more_than_that_of_diffusers(weights: str, dtype: torch.dtype):
    """To a float64 reference with the same (rounded) weights and inputs, at most 1.05 times as much, in a batch too."""
    if weights == "trained":
        model = load_folder(ROOT / "checkpoints/tiny", device="cpu", dtype=dtype).vae
    else:
        model = randomize(VAE(WIDER).double()).to(dtype)
    assert model is not None
    exact, theirs = copy.deepcopy(model.eval()).double(), AutoencoderKLCogVideoX(**to_dict(model.config)).to(dtype)
    theirs.eval().load_state_dict(to_theirs(model.state_dict(), VAE_RULES))
    fast_vae(model)
    z = normal(2, model.config.latent_channels, 5, 6, 8, dtype=dtype)
    x = normal(2, 3, 17, 48, 64, dtype=dtype).clamp(-1, 1)

    def error(found: torch.Tensor, expected: torch.Tensor) -> float:
        return float((found.double() - expected).norm() / expected.norm())

    for name, mine, other, truth in (
        ("decode", model.decode(z), theirs.decode(z / model.config.scaling_factor).sample, exact.decode(z.double())),
        ("encode", model.moments(x)[0], theirs.encode(x).latent_dist.mean, exact.moments(x.double())[0]),
    ):
        print(f"{name} {weights} {dtype}: {error(mine, truth):.2e}, diffusers {error(other, truth):.2e}")
        assert error(mine, truth) <= 1.05 * error(other, truth)


# Memory and traffic


def test_counts_of_49_frames_of_480_by_720():
    """The first chunk and a later one, of which there are five; diffusers: 14.7 GiB and 1304 GB."""
    with torch.device("meta"):
        model = fast_vae(VAE(VAEConfig()).bfloat16())
        latents = torch.empty(1, 16, 5, 60, 90, dtype=torch.bfloat16)
    first = count(model.decode, latents[:, :, :3])
    both = count(model.decode, latents)
    peak = both.peak_bytes + (49 - 17) * 480 * 720 * 3 * 2 * 2  # the frames themselves, and once more to join them
    moved = first.bytes + 5 * (both.bytes - first.bytes)
    flops = first.flops + 5 * (both.flops - first.flops)
    print(f"peak {peak / 2**30:.2f} GiB, {moved / 1e9:.0f} GB, {flops / 1e12:.1f} TFLOP")
    assert peak < 4.93 * 2**30
    assert moved < 450e9
    assert flops < 290e12


@torch.no_grad()
def test_less_than_half_the_memory_of_diffusers():
    model = randomize(VAE(WIDER).eval())
    theirs = AutoencoderKLCogVideoX(**to_dict(WIDER)).eval()
    z = normal(1, 4, 3, 6, 8, dtype=torch.float32)
    assert count(fast_vae(model, strips=4).decode, z).peak_bytes < 0.45 * count(theirs.decode, z).peak_bytes


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu():
    """All kernels, strips and caches on the host, against the plain VAE in float64 on the CPU."""
    model = randomize(VAE(WIDER).double().eval())
    z, x = normal(1, 4, 5, 6, 8), normal(1, 3, 17, 48, 64)
    pixels, latents = model.decode(z), model.encode(x)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-2), (torch.bfloat16, 0.1)):  # TF32 convolutions
        model.to("cuda", dtype)
        for strips, host in ((None, False), (3, True)):
            fast_vae(model, strips=strips, caches_on_host=host)
            assert difference(model.decode(z.to("cuda", dtype)).cpu().double(), pixels) < bound
            assert difference(model.encode(x.to("cuda", dtype)).cpu().double(), latents) < bound


def test_kernels_under_tritons_interpreter():
    """In a process of its own: the interpreter is chosen when triton is imported."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(Path(__file__).with_name("vae_kernels.py"))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
