"""Defects are found from pixels alone: planted ones in clips of the world, and none where there is none."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from videogen.data.filters import DEFECTS, Measures, blur, measure
from videogen.data.world import WHOLE_WORLD, clip


def moving(index: int) -> np.ndarray:
    """A clip of the whole world in which something moves."""
    while True:
        scene, frames, _ = clip(index, seed=11, **WHOLE_WORLD)
        if any(thing.motion != "still" for thing in scene.objects):
            return (frames * 255).round().astype(np.uint8)
        index += 100_000


def planted(defect: str, index: int, rng: np.random.Generator) -> np.ndarray:
    frames = moving(1000 * (1 + [*DEFECTS, ""].index(defect)) + index)
    if defect == "cuts":
        at = int(rng.integers(3, 15))
        return np.concatenate([frames[:at], moving(50_000 + index)[at:]])
    if defect == "static":  # with the noise of a camera
        noise = rng.normal(0, rng.choice([0, 1, 2]), frames.shape)
        return np.clip(np.repeat(frames[:1], len(frames), 0) + noise, 0, 255).astype(np.uint8)
    if defect == "black":
        frames[: int(rng.integers(3, 17))] = rng.integers(0, 12)
    if defect == "blurry":
        kernel = ImageFilter.GaussianBlur(float(rng.choice([1.5, 2, 3])))
        return np.stack([np.asarray(Image.fromarray(frame).filter(kernel)) for frame in frames])
    return frames


def figures(count: int) -> dict[str, tuple[float, float]]:
    """Recall and precision of each filter, on `count` clips of each defect and as many sound ones."""
    rng = np.random.default_rng(0)
    right, wrong = dict.fromkeys(DEFECTS, 0), dict.fromkeys(DEFECTS, 0)
    for kind in (*DEFECTS, ""):
        for index in range(count):
            found = measure(planted(kind, index, rng)).defects()
            for defect in found.keys() - ({"cuts"} if kind == "black" else set()):  # from black to light is a cut too
                (right if defect == kind else wrong)[defect] += 1
    return {name: (right[name] / count, right[name] / max(right[name] + wrong[name], 1)) for name in DEFECTS}


def test_planted_defects_are_found():
    for name, (recall, precision) in figures(20).items():
        assert recall >= 0.95, name
        assert precision >= 0.95, name


@pytest.mark.slow
def test_planted_defects_are_found_in_many():
    measured = figures(200)
    print(measured)
    assert all(min(pair) >= 0.95 for pair in measured.values())


def test_cuts_are_placed_and_motion_is_none():
    rng = np.random.default_rng(1)
    a, b = (np.repeat(rng.integers(0, 255, (1, 40, 60, 3), dtype=np.uint8), 6, 0) for _ in range(2))
    assert measure([*a, *b, *a]).cuts() == [6, 12]
    pan = np.stack([np.roll(a[0], 3 * shift, axis=1) for shift in range(12)])
    assert measure(pan).cuts() == []
    with pytest.raises(ValueError, match="without frames"):
        measure([])


def test_a_picture_is_not_static():
    assert measure(moving(0)[:1]).defects() == {}


def test_blur_ignores_contrast_and_size_of_what_is_flat():
    """The figure is a ratio: half the contrast, or an empty margin around, leave it where it is."""
    rng = np.random.default_rng(2)
    luma = rng.random((64, 64)).astype(np.float32)
    soft = np.asarray(Image.fromarray((luma * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2))) / 255
    soft = soft.astype(np.float32)
    assert blur(luma) < 0.4 < 0.6 < blur(soft) <= 1
    assert blur(0.5 * soft) == pytest.approx(blur(soft), abs=1e-4)
    assert blur(np.full((64, 64), 0.3, np.float32)) == 0


def test_limits_are_the_users():
    found = Measures(num_frames=5, jumps=(0.01, 0.1, 0.01, 0.01), motion=0.02, black=0.0, blur=0.6)
    assert list(found.defects()) == ["cuts", "blurry"]
    assert found.cuts() == [2]
