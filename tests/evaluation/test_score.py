"""The score is right on clips whose truth is known, also after blur and noise, and wrong things are called wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from videogen.data.world import Scene, Thing, draw_scene, render
from videogen.evaluation import ATTRIBUTES, attributes, measure, score_clip


def blur(frames: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian, along H and W."""
    weights = np.exp(-(np.arange(-4, 5) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    for axis in (1, 2):
        pad = np.pad(frames, [(4, 4) if a == axis else (0, 0) for a in range(4)], mode="edge")
        frames = sum(w * np.take(pad, range(i, i + frames.shape[axis]), axis) for i, w in enumerate(weights))
    return frames


def truth(i: int, sigma: float = 0, noise: float = 0, **render_options) -> tuple[Scene, np.ndarray]:
    """Clip i, as uint8; blurred by sigma (px) and with Gaussian noise (of 255)."""
    rng = np.random.default_rng((5, i))
    scene = draw_scene(rng, held_out=None, checkered=0.3)
    frames = render(scene, **render_options)
    frames = blur(frames, sigma) if sigma else frames
    frames = frames + rng.standard_normal(frames.shape) * noise / 255
    return scene, np.clip(frames * 255, 0, 255).round().astype(np.uint8)


def rates(n: int, **damage) -> dict[str, float]:
    results = [score_clip(frames, scene) for scene, frames in (truth(i, **damage) for i in range(n))]
    return {name: float(np.mean([bool(row[name]) for row in results])) for name in (*ATTRIBUTES, "all")}


def example(**changes) -> Scene:
    thing = Thing("red", "circle", "small", "right", (10.0, 10.0), (15.0, 30.0), (45.0, 30.0))
    return Scene("navy", False, (replace(thing, **changes),))


@pytest.mark.parametrize("damage", [{}, {"sigma": 1.0, "noise": 6}], ids=["clean", "blurred"])
def test_truth_is_scored_right(damage):
    assert min(rates(50, **damage).values()) >= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("damage", [{}, {"sigma": 1.0, "noise": 6}, {"sigma": 1.5, "noise": 12}])
def test_truth_is_scored_right_1000(damage):
    assert min(rates(1000, **damage).values()) >= 0.99


def test_other_sizes_and_lengths():
    assert min(rates(6, height=48, width=80, num_frames=9).values()) == 1
    assert min(rates(2, height=128, width=128, num_frames=25).values()) == 1


@pytest.mark.parametrize(
    ("attribute", "changes"),
    [
        ("colour", {"colour": "orange"}),
        ("shape", {"shape": "ring"}),
        ("size", {"radius": (16.0, 16.0)}),
        ("motion", {"start": (45.0, 30.0), "end": (15.0, 30.0)}),
        ("motion", {"end": (15.0, 30.0)}),
        ("motion", {"end": (15.0, 30.0), "start": (15.0, 55.0)}),
        ("motion", {"end": (15.0, 30.0), "start": (15.0, 30.0), "radius": (7.0, 14.0)}),
        ("motion", {"start": (30.0, 30.0), "end": (30.0, 30.0), "orbit": 8.0, "turns": 1.0}),
    ],
)
def test_one_wrong_attribute_is_one_wrong_attribute(attribute, changes):
    score = score_clip(render(example(**changes)), example())
    assert [name for name in ATTRIBUTES if not score[name]] == [attribute]
    assert not score["all"]


def test_growing_on_the_way_is_neither():
    assert measure(render(example(radius=(7.0, 14.0)))).motion is None


def test_wrong_ground_is_wrong():
    clip = render(example())
    wrong = [name for name in ATTRIBUTES if not score_clip(clip, replace(example(), background="teal"))[name]]
    assert wrong == ["background"]
    wrong = [name for name in ATTRIBUTES if not score_clip(clip, replace(example(), checkered=True))[name]]
    assert wrong == ["pattern"]


def test_attributes_left_open_are_not_scored():
    score = score_clip(render(example()), {"colour": "red", "motion": "right"})
    assert score["all"] is True
    assert "shape" not in score
    assert attributes(example())["pattern"] == "plain"


@pytest.mark.parametrize("kind", ["empty", "noise", "flash", "full"])
def test_no_object_is_not_found(kind):
    rng = np.random.default_rng(0)
    frames = {
        "empty": render(Scene("navy", False, ())),
        "noise": rng.random((17, 64, 64, 3)),
        "flash": np.concatenate([render(example(), 5), render(Scene("navy", False, ()), 12)]),
        "full": np.broadcast_to(np.array([220, 30, 30], np.float32) / 255, (17, 64, 64, 3)),
    }[kind]
    seen = measure(frames)
    assert not seen.found
    assert (seen.colour, seen.shape, seen.size, seen.motion) == (None, None, None, None)
    assert not score_clip(frames, example())["all"]


def test_temporal_figures_see_temporal_damage():
    clean = render(example())
    seen = measure(clean)
    assert seen.residual is not None
    assert seen.jump is not None
    assert (seen.motion, seen.residual < 0.3, seen.jump < 0.8) == ("right", True, True)
    assert (seen.drift, seen.flicker) == (pytest.approx(0, abs=1e-4), pytest.approx(0, abs=1e-4))
    assert seen.seam == pytest.approx(1, abs=0.1)

    rng = np.random.default_rng(1)
    shuffled = measure(clean[rng.permutation(17)])
    assert shuffled.residual > 3  # type: ignore[operator]
    assert shuffled.motion is None
    assert measure(clean[::-1]).motion == "left"

    teleport = np.concatenate([clean[:8], render(example(start=(15.0, 50.0), end=(45.0, 50.0)))[8:]])
    assert measure(teleport).jump > 10  # type: ignore[operator]

    fade = clean * np.linspace(1, 0.7, 17, dtype=np.float32)[:, None, None, None]
    assert measure(fade).drift > 0.03

    flicker = np.clip(clean + 0.1 * rng.choice([-1, 1], (17, 1, 1, 1)), 0, 1)
    assert measure(flicker).flicker > 0.05  # type: ignore[operator]

    held = clean[np.repeat(np.arange(0, 17, 4), [1, 4, 4, 4, 4])]  # moves at the borders of latent frames only
    assert measure(held).seam > 2
