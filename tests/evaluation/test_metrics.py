from __future__ import annotations

import numpy as np
import pytest

from videogen.evaluation import psnr, ssim, wilson


def test_psnr_of_a_known_error():
    a = np.full((2, 8, 8, 3), 0.5)
    assert psnr(a, a + 0.1) == pytest.approx(20.0)
    assert psnr(a, a) == 100
    assert psnr(np.zeros((1, 8, 8, 3), np.uint8), np.full((1, 8, 8, 3), 255, np.uint8)) == pytest.approx(0, abs=1e-6)


def test_ssim_is_the_definition():
    """Against the formula, written out for one window."""
    rng = np.random.default_rng(0)
    a = rng.random((11, 11, 1))
    b = np.clip(a + 0.2 * rng.standard_normal(a.shape), 0, 1)
    weights = np.exp(-(np.subtract.outer(np.arange(11) - 5.0, 1j * (np.arange(11) - 5)).__abs__() ** 2) / (2 * 1.5**2))
    weights = (weights / weights.sum())[..., None]
    x, y = a.astype(np.float32).astype(float), b.astype(np.float32).astype(float)
    mx, my = (weights * x).sum(), (weights * y).sum()
    vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
    cov = (weights * (x - mx) * (y - my)).sum()
    expected = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert ssim(a, b) == pytest.approx(expected, abs=1e-6)
    assert ssim(a, a) == pytest.approx(1.0)


def test_ssim_takes_videos():
    rng = np.random.default_rng(0)
    a = rng.random((3, 16, 20, 3))
    b = np.clip(a + 0.1 * rng.standard_normal(a.shape), 0, 1)
    assert ssim(a, b) == pytest.approx(np.mean([ssim(x, y) for x, y in zip(a, b, strict=True)]))


def test_wilson_interval():
    """Values of the closed formula, as in Brown, Cai and DasGupta 2001."""
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(256, 256) == pytest.approx((0.9852, 1.0), abs=1e-4)
    assert wilson(0, 0) == (0, 1)
