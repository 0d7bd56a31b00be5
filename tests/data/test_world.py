"""The procedural world: what is drawn, what is kept from training, what the pixels and the captions say."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from videogen.data.world import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    STYLES,
    VOCABULARY,
    WHOLE_WORLD,
    Scene,
    Thing,
    caption,
    clip,
    draw_scene,
    is_held_out,
    is_held_out_pair,
    render,
)
from videogen.data.world.caption import CAMERA_WORDS, MOTION_WORDS, SHAPE_WORDS, SIZE_WORDS, STYLE_WORDS
from videogen.data.world.render import checkers
from videogen.data.world.scene import DIRECTIONS, HELD_OUT_PAIRS, LUMA, clearance, stands_out
from videogen.weights.hub import find_model

EVERYTHING = {"checkered": 0.6, "two": 0.5, "camera": 0.8, "style": 0.5}


def scenes(n: int, **options) -> list[Scene]:
    return [draw_scene(np.random.default_rng((7, i)), **options) for i in range(n)]


def still(colour="red", shape="circle", radius=10.0, centre=(32.0, 32.0), **changes) -> Thing:
    return Thing(colour, shape, "small", "still", (radius, radius), centre, centre, **changes)


def test_sample_depends_on_seed_and_index_only():
    scene, frames, words = clip(11, seed=3)
    clip(12, seed=3)
    again = clip(11, seed=3)
    assert again[0] == scene
    assert again[2] == words
    assert np.array_equal(again[1], frames)
    assert clip(12, seed=3)[0] != scene
    assert clip(11, seed=4)[0] != scene
    assert (frames.shape, frames.dtype) == ((17, 64, 64, 3), np.float32)


def test_stream_is_the_same_in_every_version():
    """Training runs resume by index and scores compare over time: a change here is a new world, say so."""
    assert [clip(i)[2] for i in range(3)] == [
        "a blue bar",
        "a large purple object on a black background",
        "a large yellow circle stays still on a black background",
    ]
    assert clip(0)[1].mean() == pytest.approx(0.0802109, abs=1e-5)
    assert [clip(i, **WHOLE_WORLD)[2] for i in (1, 2, 3)] == [
        "a big object moving up, in pencil sketch style",
        "a small blue bar moves left and a small red circle moves up on a black checkered background",
        "a small white cross grows, the camera zooms in",
    ]


def test_scene_is_plain_data():
    scene = draw_scene(np.random.default_rng(0), two=1.0, checkered=1.0, camera=1.0, style=1.0)
    data = json.loads(json.dumps(dataclasses.asdict(scene)))
    things = [Thing(**{k: tuple(v) if isinstance(v, list) else v for k, v in o.items()}) for o in data["objects"]]
    assert Scene(**{**data, "objects": tuple(things)}) == scene


def test_paths_stay_inside_and_are_long_enough():
    t = np.linspace(0, 1, 65)
    things = [o for scene in [*scenes(800, held_out=None), *scenes(40, two=1.0)] for o in scene.objects]
    for thing in things:
        x, y, r = thing.at(t)
        half = SHAPES[thing.shape]
        for centre, h in ((x, half[0]), (y, half[1])):
            assert (centre - h * r).min() > 0.99, thing
            assert (centre + h * r).max() < 63.01, thing
        growth, moved = r[-1] / r[0], np.hypot(x[-1] - x[0], y[-1] - y[0])
        if thing.motion in DIRECTIONS:
            direction = np.array(DIRECTIONS[thing.motion])
            axis = int(np.abs(direction).argmax())
            free = 62 - 2 * half[axis] * r[0]
            assert direction @ [x[-1] - x[0], y[-1] - y[0]] == pytest.approx(moved)
            assert moved >= max(10, 0.45 * free) - 1e-6
        elif thing.motion == "orbit":
            assert thing.orbit >= 5
            assert moved == pytest.approx(0, abs=1e-6)
        else:
            assert moved == 0
        if thing.motion in ("grow", "shrink"):
            assert (growth if thing.motion == "grow" else 1 / growth) >= 1.8 - 1e-9
        else:
            assert growth == pytest.approx(1)
        assert 0.93 <= math.sqrt(r[0] * r[-1]) / SIZES[thing.size] <= 1.07


def test_held_out_is_the_documented_rule():
    pairs = {("red", "ring"), ("blue", "cross"), ("yellow", "bar"), ("white", "circle")}
    for (c, colour), (s, shape), (m, motion) in product(enumerate(COLOURS), enumerate(SHAPES), enumerate(MOTIONS)):
        thing = Thing(colour, shape, "small", motion, (10.0, 10.0), (32.0, 32.0), (32.0, 32.0))
        scene = Scene("black", False, (still("green", "bar"), thing))
        assert is_held_out_pair(scene) == ((colour, shape) in pairs)
        other = (3 * 1 + 5 * 1 + 7 * 4) % 8 == 0  # the green bar that stays still
        assert is_held_out(scene) == (other or (3 * c + 5 * s + 7 * m) % 8 == 0 or (colour, shape) in pairs)


def test_training_split_holds_nothing_back_but_combinations():
    train = scenes(1200, held_out=False)
    assert not any(is_held_out(scene) for scene in train)
    assert all(is_held_out(s) and not is_held_out_pair(s) for s in scenes(200, held_out=True))
    seen = [{getattr(s.objects[0], name) for s in train} for name in ("colour", "shape", "size", "motion")]
    assert seen == [set(COLOURS), set(SHAPES), set(SIZES), set(MOTIONS)]
    assert {s.background for s in train} == set(BACKGROUNDS)
    assert 0.07 < np.mean([s.checkered for s in train]) < 0.13


def test_of_two_objects_neither_is_held_out():
    train = scenes(150, two=1.0)
    assert not any(is_held_out(scene) for scene in train)
    kept = [o for scene in scenes(30, held_out=True, two=1.0) for o in scene.objects]
    assert all(is_held_out(Scene("black", False, (o,))) and (o.colour, o.shape) not in HELD_OUT_PAIRS for o in kept)
    for name, values in {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "motion": MOTIONS}.items():
        count = Counter(getattr(o, name) for scene in train for o in scene.objects)
        assert min(count[value] for value in values) > 0.2 * 300 / len(values), count


def test_two_objects_never_overlap():
    """Drawn alone and finely, no pixel holds a part of both."""
    for scene in scenes(40, held_out=None, two=1.0):
        one, other = scene.objects
        assert one.colour != other.colour
        assert clearance([one], [other]).item() >= 2
        shares = [
            render(Scene("black", False, (replace(o, colour="white"),)), 33, 128, 128)[..., 0] > 0.06
            for o in scene.objects
        ]
        assert not (shares[0] & shares[1]).any(), caption(scene)


def test_whole_world_has_what_it_says():
    drawn = scenes(1000, **WHOLE_WORLD)
    assert 0.16 < np.mean([len(s.objects) == 2 for s in drawn]) < 0.24
    assert 0.16 < np.mean([s.checkered for s in drawn]) < 0.24
    assert 0.07 < np.mean([s.camera != "static" for s in drawn]) < 0.13
    assert 0.07 < np.mean([s.style != "none" for s in drawn]) < 0.13
    assert {s.camera for s in drawn} == set(CAMERAS)
    assert {s.style for s in drawn} == set(STYLES)
    assert all(s.checkered for s in drawn if s.camera != "static")
    assert all(stands_out(s) for s in drawn if s.style != "none")
    assert {len(s.objects) for s in scenes(200)} == {1}


def test_shapes_have_equal_areas_and_differ():
    masks = {}
    for shape in SHAPES:
        frame = render(Scene("black", False, (still("white", shape, radius=16.0),)), 1)[0, ..., 0]
        masks[shape] = (frame - frame.min()) / (frame.max() - frame.min())
        assert masks[shape].sum() == pytest.approx(math.pi * 16**2, rel=0.025)
    for a, b in combinations(SHAPES, 2):
        overlap = np.minimum(masks[a], masks[b]).sum() / np.maximum(masks[a], masks[b]).sum()
        assert overlap < 0.65, (a, b)


@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_hold_the_covered_share(shape):
    """Against sixteen samples per pixel and axis; also at a place that is not on the pixel grid."""
    thing = still("white", shape, radius=10.3, centre=(30.21, 33.64))
    fine = render(Scene("black", False, (thing,)), 1, 1024, 1024)[0]
    mean = fine.reshape(64, 16, 64, 16, 3).mean((1, 3))
    frame = render(Scene("black", False, (thing,)), 1)[0]
    assert np.abs(frame - mean).max() < 0.08
    assert np.abs(frame - mean).mean() < 0.001


def test_length_and_resolution_are_free():
    scene = draw_scene(np.random.default_rng(5), checkered=1.0)
    short, long = render(scene, 17), render(scene, 33)
    assert np.allclose(short, long[::2], atol=1e-5)
    wide = render(scene, 3, 48, 96)
    assert wide.shape == (3, 48, 96, 3)
    large = render(scene, 17, 128, 128).reshape(17, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(large - short).mean() < 0.002


def test_colours_and_grounds():
    thing = still("orange", centre=(40.0, 20.0))
    frame = render(Scene("pink", False, (thing,)), 1)[0]
    assert np.allclose(frame[20, 40] * 255, COLOURS["orange"], atol=1e-3)
    assert np.allclose(frame[60, 3] * 255, BACKGROUNDS["pink"], atol=1e-3)
    squares = render(Scene("pink", True, ()), 1)[0]
    assert np.allclose(squares[:8, :8], squares[8:16, 8:16])
    assert (squares[0, 8] < squares[0, 0]).all()  # light grounds get a darker second colour,
    dark = render(Scene("navy", True, ()), 1)[0]
    assert (dark[0, 8] > dark[0, 0]).all()  # dark ones a lighter


def test_checkers_hold_the_covered_share_at_any_size():
    for camera, travel in (("static", 0.0), ("pans right", 17.3), ("zooms out", 1.7)):
        t = None if camera == "static" else np.array([0.0, 0.37, 1.0])
        fine = checkers(camera, travel, 48 * 16, 100 * 16, t)
        mean = fine.reshape(*fine.shape[:-2], 48, 16, 100, 16).mean((-3, -1))
        assert np.allclose(checkers(camera, travel, 48, 100, t), mean, atol=1e-5)


def test_camera_moves_the_ground_and_nothing_else():
    thing = still("white")
    for camera, travel in (("pans left", 16.0), ("pans right", 16.0), ("zooms in", 1.6), ("zooms out", 1.6)):
        scene = Scene("teal", True, (thing,), camera, travel)
        frames, plain = render(scene), render(replace(scene, checkered=False))
        covered = plain[..., 0] > 0.96
        assert covered.sum() > 3000
        assert np.allclose(frames[covered], plain[covered])
        bare = render(replace(scene, objects=()))
        if camera.startswith("pans"):
            # one pixel to the other side with every frame
            step = 1 if camera == "pans left" else -1
            assert np.allclose(np.roll(bare[0], step, 1)[:, 2:-2], bare[1][:, 2:-2], atol=1e-4)
            assert np.allclose(bare[0], bare[-1], atol=1e-4)  # a whole period
        else:
            cells = [np.abs(np.diff(frame[32, :, 0])).astype(bool).sum() for frame in (bare[0], bare[-1])]
            assert (cells[0] > cells[1]) == (camera == "zooms in")


def test_styles_leave_luma_or_its_edges():
    scene = Scene("teal", True, (still("yellow", "ring"),))
    plain = render(scene, 5)
    luma = plain @ np.array(LUMA, np.float32)
    gray = render(replace(scene, style="black and white"), 5)
    assert np.allclose(gray, luma[..., None], atol=1e-6)
    sepia = render(replace(scene, style="sepia"), 5)
    order = np.argsort(luma.ravel())
    assert (np.diff(sepia.reshape(-1, 3)[order], axis=0) >= -1e-6).all()  # brighter stays brighter, in each channel
    assert (sepia[..., 0] > sepia[..., 1] + 0.03).all()
    assert (sepia[..., 1] > sepia[..., 2] + 0.03).all()
    sketch = render(replace(scene, style="pencil sketch", checkered=False), 5)
    assert (sketch[:, :10] > 0.9).all()  # paper
    assert (sketch[:, 32, 19:23].min(1) < 0.4).all()  # the ring's outer edge, at 32 - 11.5
    assert (sketch[:, 32, 23:26].max(1) > 0.9).all()  # paper within the ring


def test_later_objects_are_drawn_over_earlier():
    both = Scene("black", False, (still("red"), still("green", radius=5.0)))
    frame = render(both, 1)[0]
    assert np.allclose(frame[32, 32] * 255, COLOURS["green"], atol=1e-3)
    assert np.allclose(frame[32, 39] * 255, COLOURS["red"], atol=1e-3)


def test_canonical_captions():
    thing = Thing("orange", "bar", "small", "orbit", (10.0, 10.0), (32.0, 32.0), (32.0, 32.0))
    assert caption(Scene("navy", False, (thing,))) == "a small orange bar orbits on a navy background"
    assert caption(Scene("navy", True, (thing,))) == "a small orange bar orbits on a navy checkered background"
    said = {caption(Scene("navy", False, (thing,)), np.random.default_rng(i), dropout=1.0) for i in range(500)}
    assert {"the bar orbits", "a bar", "orbits", "an orange bar orbits", "a navy background"} <= said


def test_captions_of_the_whole_world():
    bar = Thing("orange", "bar", "small", "orbit", (10.0, 10.0), (32.0, 32.0), (32.0, 32.0))
    scene = Scene("navy", True, (bar, still("red")), "pans left", 20.0, "pencil sketch")
    assert caption(scene) == (
        "a small orange bar orbits and a small red circle stays still on a navy checkered background, "
        "the camera pans left, as a pencil sketch"
    )
    assert caption(Scene("navy", False, (bar,), style="sepia")).endswith("on a navy background, in sepia tones")
    short = [caption(scene, np.random.default_rng(i), dropout=1.0, synonyms=0.0) for i in range(300)]
    assert {"orbits and stays still", "an orange bar and a red circle"} <= {s.split(",")[0] for s in short}
    assert all(words.endswith(", the camera pans left, as a pencil sketch") for words in short)


def test_bundled_models_tokenizer_knows_every_word():
    file = find_model("tiny") / "tokenizer/tokenizer.json"
    assert set(VOCABULARY) <= set(json.loads(file.read_text())["model"]["vocab"])


def test_vocabulary_is_closed_and_says_what_users_say():
    words = set(VOCABULARY)
    assert len(words) == len(VOCABULARY)
    for i, scene in enumerate(scenes(200, held_out=None, **EVERYTHING)):
        said = caption(scene, np.random.default_rng(i), synonyms=0.7).replace(",", " ,").split()
        assert set(said) <= words
        assert len(said) < 48  # and the end mark: `max_text_seq_length` of the bundled model
    for prompt in (
        "a small red circle moves right on a navy background",
        "a large green ring grows on a black background",
        "the circle moves up",
    ):
        assert set(prompt.split()) <= words


def test_grammar_is_drawn_as_documented():
    drawn = [(scene, caption(scene, np.random.default_rng(i))) for i, scene in enumerate(scenes(1000))]
    canonical = np.mean([words == caption(scene) for scene, words in drawn])
    assert 0.48 < canonical < 0.58  # 0.7 · 0.75
    assert len({words for _, words in drawn}) > 400


def meaning(scene: Scene) -> tuple:
    """What a whole caption says, with the values of the objects dealt together: order is what tells them apart."""
    values = (v for o in scene.objects for v in (o.colour, o.shape, o.size, o.motion))
    return tuple(sorted(values)), scene.background, scene.checkered, scene.camera, scene.style


def test_same_bag_of_words_means_the_same():
    """One object: the caption's words in any order say the scene. Two: they say all but whose value is whose."""
    known: dict[tuple[str, ...], tuple] = {}
    for i, scene in enumerate([*scenes(1000, held_out=None, checkered=0.5), *scenes(200, held_out=None, **EVERYTHING)]):
        words = caption(scene, np.random.default_rng(i), dropout=0.0, synonyms=0.8)
        bag = tuple(sorted(words.replace(",", "").split()))
        assert known.setdefault(bag, meaning(scene)) == meaning(scene), bag


def test_no_words_can_be_redealt():
    """Exhaustively, for one object and canonical wording of the rest: every wording of motion, camera and style."""
    known: dict[tuple[str, ...], tuple] = {}
    for camera, style, motion, colour in product(CAMERAS, STYLES, MOTIONS, ("white", "red")):
        if (camera, motion) in (("pans left", "right"), ("pans right", "left")):
            continue  # never drawn, since these two are each other's words
        for words in product(MOTION_WORDS[motion], CAMERA_WORDS[camera], STYLE_WORDS[style], ("black", "navy")):
            bag = tuple(sorted(" ".join([colour, *words]).split()))
            said = (camera, style, motion, colour, words[-1])
            assert known.setdefault(bag, said) == said, bag
    assert not [
        scene
        for scene in scenes(200, two=0.2, checkered=1.0, camera=1.0)
        if {("pans left", "right"), ("pans right", "left")} & {(scene.camera, o.motion) for o in scene.objects}
    ]

    said_by: dict[tuple[str, ...], str] = {}
    for table in (SIZE_WORDS, SHAPE_WORDS, MOTION_WORDS):
        for value, wordings in table.items():
            for phrase in wordings:
                assert said_by.setdefault(tuple(sorted(phrase.split())), value) == value, phrase

    def words(table: dict) -> set[str]:
        return {word for wordings in table.values() for phrase in wordings for word in phrase.split()}

    assert not words(SHAPE_WORDS) & words(MOTION_WORDS)
