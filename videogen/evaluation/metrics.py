"""Numbers between two videos, and the interval around a rate. Frames are [F, H, W, 3], uint8 or float in [0, 1]."""

from __future__ import annotations

import math

import numpy as np


def unit(frames: np.ndarray) -> np.ndarray:
    """Frames as float32 in [0, 1]."""
    return frames.astype(np.float32) / 255 if frames.dtype == np.uint8 else frames.astype(np.float32)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all values; at most 100, so that equal frames stay a number in JSON."""
    error = float(np.mean((unit(a).astype(np.float64) - unit(b)) ** 2))
    return -10 * math.log10(max(error, 1e-10))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 px with sigma 1.5, mean over channels and frames.

    Takes [..., H, W, 3]; only windows that lie inside the image count.
    """
    x, y = unit(a).astype(np.float64), unit(b).astype(np.float64)
    mean_x, mean_y = _window(x), _window(y)
    var_x = _window(x * x) - mean_x**2
    var_y = _window(y * y) - mean_y**2
    covariance = _window(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return float(similarity.mean())


def _window(x: np.ndarray) -> np.ndarray:
    """Weighted mean of the 11×11 neighbourhood, along H and then W."""
    weights = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    for axis in (-3, -2):
        length = x.shape[axis] - 10
        x = sum(w * np.take(x, range(i, i + length), axis) for i, w in enumerate(weights))  # type: ignore[assignment]
    return x


def motion(frames: np.ndarray) -> float:
    """How much changes from a frame to the next: mean of the absolute difference, 0 (a still) to 1."""
    x = unit(frames)
    return float(np.abs(np.diff(x, axis=0)).mean()) if len(x) > 1 else 0.0


def flicker(frames: np.ndarray) -> float:
    """How much of a change the next frame takes back: mean over pixels of the smaller of two neighbouring differences
    where their signs differ, 0 to 1. Smooth motion and a fade have little, noise and blinking much.

    >>> flicker(np.full((5, 1, 1, 3), 0.5)), flicker(np.array([0.0, 1, 0, 1])[:, None, None, None])
    (0.0, 1.0)
    """
    change = np.diff(unit(frames), axis=0)
    if len(change) < 2:
        return 0.0
    before, after = change[:-1], change[1:]
    back = np.where(before * after < 0, np.minimum(np.abs(before), np.abs(after)), 0)
    return float(back.mean())


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a rate (95 % by default): sensible also at 0 and 1, unlike the normal interval."""
    if n == 0:
        return 0.0, 1.0
    rate, spread = successes / n, z * z / n
    middle = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)
