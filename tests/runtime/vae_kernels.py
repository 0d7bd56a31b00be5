"""The kernels of triton_vae.py against the operations of vae.py, under Triton's interpreter, for test_fast_vae.py."""

import torch

from videogen.runtime import triton_vae, vae

LAST = torch.channels_last_3d
BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
generator = torch.Generator().manual_seed(0)


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=LAST) if x.ndim == 5 else x


def same(a: torch.Tensor, b: torch.Tensor, bound: float) -> None:
    error = float((a.double() - b.double()).abs().max() / b.double().abs().max())
    assert error <= bound, error


def norm_silu(dtype: torch.dtype, channels: int, frames: int, latents: int, kept: int, past: bool) -> None:
    """A strip of 5 rows that starts in the middle of a latent row, one row of it not kept."""
    bound, wide = BOUNDS[dtype], torch.promote_types(dtype, torch.float32)
    x, affine = normal(2, channels, frames, 5, 6, dtype=dtype), normal(2, 2, channels, dtype=wide)
    scale, shift = (normal(2, channels, latents, 3, 3, dtype=dtype) if latents else None for _ in range(2))
    before = normal(2, channels, kept, 5, 6, dtype=dtype)
    results = []
    for run in (triton_vae.norm_silu, vae.norm_silu._init_fn):
        out = torch.zeros(2, channels, kept + frames, 5, 6, dtype=dtype).contiguous(memory_format=LAST)
        keep = before.clone(memory_format=torch.preserve_format)
        run(x, affine, scale, shift, 2, 1, keep if past else None, out, keep[:, :, :, :4])
        results.append((out, keep))
    for ours, plain in zip(*results, strict=True):
        same(ours, plain, bound)


def conv_add(dtype: torch.dtype, channels: int, kept: int, bias: bool, residual: bool) -> None:
    """Into rows in the middle of a picture; the rest of it stays as it was."""
    x, weight = normal(2, channels, kept + 3, 6, 7, dtype=dtype), normal(5, channels, kept + 1, 3, 3, dtype=dtype)
    term = normal(5, dtype=dtype) if bias else None
    picture = normal(2, 5, 3, 8, 7, dtype=dtype)
    results = []
    ways = [vae.conv_add._init_fn, triton_vae.library_conv]
    if dtype not in (torch.float64, torch.bfloat16):  # no kernel for the one; the interpreter's products lack the other
        ways.append(triton_vae.fused_conv)
    for run in ways:
        out = picture.clone(memory_format=torch.preserve_format)
        rows = out[:, :, :, 2:6]
        results.append((out, run(x, weight.contiguous(memory_format=LAST), term, rows if residual else None, rows)))
    for out, sums in results[1:]:
        same(out, results[0][0], BOUNDS[dtype])
        same(sums, results[0][1], 2 * BOUNDS[dtype])
        assert torch.equal(out[:, :, :, :2], picture[:, :, :, :2])
        assert torch.equal(out[:, :, :, 6:], picture[:, :, :, 6:])


def the_rest(dtype: torch.dtype) -> None:
    x = normal(2, 12, 1, 5, 4, dtype=dtype)[:, :, 0]
    ours, plain = (torch.zeros(2, 3, 8, 6, dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
    same(triton_vae.interleave(x, ours), vae.interleave._init_fn(x, plain), 1e-6)
    assert torch.equal(ours, plain)
    values = normal(2, 6, 3, 5, 4, dtype=dtype)
    same(triton_vae.channel_sums(values), vae.channel_sums._init_fn(values), 1e-6)


if __name__ == "__main__":
    for dtype in BOUNDS:
        norm_silu(dtype, 6, 4, 2, 2, past=True)
        norm_silu(dtype, 8, 5, 3, 2, past=False)
        norm_silu(dtype, 5, 3, 0, 1, past=True)
        norm_silu(dtype, 6, 1, 1, 2, past=True)  # what is kept was kept before, in part
        conv_add(dtype, 6, 2, bias=True, residual=True)
        conv_add(dtype, 70, 1, bias=False, residual=False)
        the_rest(dtype)
