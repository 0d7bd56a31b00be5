"""The score is right on clips whose truth is known, also after blur and noise, and wrong things are called wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from videogen.data.world import Scene, Thing, draw_scene, render
from videogen.evaluation import ATTRIBUTES, KINDS, Measurement, attributes, measure, score_clip, score_table
from videogen.evaluation.score import Seen, score_measurement


def blur(frames: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian, along H and W."""
    weights = np.exp(-(np.arange(-4, 5) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    for axis in (1, 2):
        pad = np.pad(frames, [(4, 4) if a == axis else (0, 0) for a in range(4)], mode="edge")
        frames = sum(w * np.take(pad, range(i, i + frames.shape[axis]), axis) for i, w in enumerate(weights))
    return frames


def truth(i: int, kind: str = "any", sigma: float = 0, noise: float = 0, **render_options) -> tuple[Scene, np.ndarray]:
    """Clip i, as uint8; blurred by sigma (px) and with Gaussian noise (of 255)."""
    rng = np.random.default_rng((5, i))
    scene = draw_scene(rng, held_out=None, **({"checkered": 0.3} if kind == "any" else KINDS[kind]))
    frames = render(scene, **render_options)
    frames = blur(frames, sigma) if sigma else frames
    frames = frames + rng.standard_normal(frames.shape) * noise / 255
    return scene, np.clip(frames * 255, 0, 255).round().astype(np.uint8)


def rates(n: int, **damage) -> dict[str, float]:
    results = [{"prompt": "", **score_clip(frames, scene)} for scene, frames in (truth(i, **damage) for i in range(n))]
    return {name: cell["rate"] for name, cell in score_table(results)["rates"].items()}


def example(**changes) -> Scene:
    thing = Thing("red", "circle", "small", "right", (10.0, 10.0), (15.0, 30.0), (45.0, 30.0))
    return Scene("navy", False, (replace(thing, **changes),))


def thing(seen: Measurement) -> Seen:
    (one,) = seen.things
    return one


@pytest.mark.parametrize("damage", [{}, {"sigma": 1.0, "noise": 6}], ids=["clean", "blurred"])
def test_truth_is_scored_right(damage):
    right = rates(24, **damage)
    assert min(right.values()) >= 0.97
    assert set(right) == {*ATTRIBUTES, "all"} - {"style"}


@pytest.mark.parametrize("kind", ["two", "camera", "style"])
def test_truth_of_the_whole_world_is_scored_right(kind):
    right = rates(10, kind=kind, sigma=0.8, noise=4)
    assert min(right.values()) >= 0.97
    assert {"two": "colour", "camera": "camera", "style": "style"}[kind] in right


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", [{}, {"sigma": 1.0, "noise": 6}, {"sigma": 1.5, "noise": 12}])
def test_truth_is_scored_right_1000(kind, damage):
    right = rates(1000, kind=kind, **damage)
    print(kind, damage, right)
    assert min(right.values()) >= (0.99 if kind in ("one", "checkered") else 0.98)


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
    assert [name for name in ATTRIBUTES if score.get(name) is False] == [attribute]
    assert not score["all"]


def test_growing_on_the_way_is_neither():
    assert thing(measure(render(example(radius=(7.0, 14.0))))).motion is None


def test_wrong_ground_is_wrong():
    clip = render(example())
    score = score_clip(clip, replace(example(), background="teal"))
    assert [name for name in ATTRIBUTES if score.get(name) is False] == ["background"]
    score = score_clip(clip, replace(example(), checkered=True))
    assert [name for name in ATTRIBUTES if score.get(name) is False] == ["pattern"]


def test_cameras_are_told_from_the_ground():
    def seen(camera: str, travel: float, **changes) -> Measurement:
        return measure(render(replace(example(**changes), checkered=True, camera=camera, travel=travel)))

    for camera, travel in (("pans left", 13.0), ("pans right", 27.0), ("zooms in", 1.55), ("zooms out", 1.95)):
        for motion in ({}, {"end": (15.0, 30.0)}):
            measured = seen(camera, travel, **motion)
            assert (measured.pattern, measured.camera, measured.found) == ("checkered", camera, True)
    assert seen("static", 0.0).camera == "static"
    assert seen("pans left", 3.0).camera == "static"  # less than half of the least
    wrong = score_clip(
        render(replace(example(), checkered=True)), replace(example(), checkered=True, camera="pans left", travel=20.0)
    )
    assert [name for name in ATTRIBUTES if wrong.get(name) is False] == ["camera"]


def test_style_is_scored_alone_and_told_from_colours():
    styles = {"black and white", "sepia", "pencil sketch"}
    for style in styles:
        scene = replace(example(colour="yellow"), style=style)
        assert measure(render(scene)).style == style
        score = score_clip(render(scene), scene)
        assert {name for name in ATTRIBUTES if name in score} == {"style"}
        assert score["all"] is True
        assert score_clip(render(replace(scene, style="none")), scene)["all"] is False
    for ground in ("black", "gray", "brown"):
        for colour in ("white", "red"):
            assert measure(render(replace(example(colour=colour), background=ground))).style == "none"


def test_each_of_two_objects_has_its_answers():
    red = Thing("red", "circle", "small", "right", (10.0, 10.0), (15.0, 15.0), (45.0, 15.0))
    blue = Thing("blue", "bar", "small", "still", (10.0, 10.0), (32.0, 48.0), (32.0, 48.0))
    scene = Scene("gray", False, (red, blue))
    clip = render(scene)
    score = score_clip(clip, scene)
    assert score["colour"] == score["shape"] == score["found"] == [True, True]
    assert score["all"] is True
    turned = score_clip(clip, replace(scene, objects=(blue, red)))
    assert turned["all"] is True  # whatever the order
    asked = replace(scene, objects=(red, replace(blue, shape="ring", colour="green")))
    score = score_clip(clip, asked)
    assert (score["colour"], score["shape"], score["motion"]) == ([True, False], [True, False], [True, True])
    assert score["all"] is False
    alone = score_clip(render(replace(scene, objects=(red,))), scene)
    assert alone["found"] == alone["motion"] == [True, False]
    exchanged = replace(scene, objects=(replace(red, colour="blue"), replace(blue, colour="red")))
    assert score_clip(clip, exchanged)["all"] is False


def test_objects_are_paired_for_the_most_right_answers():
    def seen(colour: str, shape: str) -> Seen:
        return Seen(colour, "small", "up", shape, 0.9, 0.1, 0.2, 0.3)

    measured = Measurement("navy", "plain", "static", "none", (seen("red", "bar"), seen("blue", "ring")))
    score = score_measurement(measured, {"colour": ("blue", "green"), "shape": ("ring", "bar")})
    assert (score["colour"], score["shape"], score["found"]) == ([True, False], [True, True], [True, True])
    assert (score["residual"], score["velocity"], score["jump"]) == (0.1, 0.2, 0.3)


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
    assert seen.things == ()
    score = score_clip(frames, example())
    assert [score[name] for name in ("found", "colour", "shape", "size", "motion", "all")] == [False] * 6
    assert score["residual"] is None


def test_temporal_figures_see_temporal_damage():
    clean = render(example())
    whole = measure(clean)
    seen = thing(whole)
    assert (seen.motion, seen.residual < 0.3, seen.velocity < 0.3, seen.jump < 0.8) == ("right", True, True, True)
    assert (whole.drift, whole.flicker) == (pytest.approx(0, abs=1e-4), pytest.approx(0, abs=1e-4))
    assert whole.seam == pytest.approx(1, abs=0.1)

    rng = np.random.default_rng(1)
    shuffled = thing(measure(clean[rng.permutation(17)]))
    assert shuffled.residual > 3
    assert shuffled.velocity > 3
    assert shuffled.motion is None
    assert thing(measure(clean[::-1])).motion == "left"

    teleport = np.concatenate([clean[:8], render(example(start=(15.0, 50.0), end=(45.0, 50.0)))[8:]])
    assert thing(measure(teleport)).jump > 10

    fade = clean * np.linspace(1, 0.7, 17, dtype=np.float32)[:, None, None, None]
    assert measure(fade).drift > 0.03

    flicker = np.clip(clean + 0.1 * rng.choice([-1, 1], (17, 1, 1, 1)), 0, 1)
    assert measure(flicker).flicker > 0.05  # type: ignore[operator]

    held = clean[np.repeat(np.arange(0, 17, 4), [1, 4, 4, 4, 4])]  # moves at the borders of latent frames only
    assert measure(held).seam > 2
