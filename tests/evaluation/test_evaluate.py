from __future__ import annotations

import json

import numpy as np
import pytest

from videogen.data.world import CAMERAS, STYLES, caption, is_held_out, is_held_out_pair, render
from videogen.evaluation import (
    KINDS,
    caption_gaps,
    ceiling,
    evaluate,
    floor,
    held_out_prompts,
    markdown,
    reconstruction,
    score_prompts,
    score_table,
    swap,
    swap_attribute,
)
from videogen.evaluation.score import measure

ONE_OBJECT = ("found", "background", "pattern", "colour", "size", "motion", "shape", "all")


def darker(clips):
    return [c * 0.9 for c in clips]


def test_prompts_are_held_out_and_repeat():
    prompts = held_out_prompts(40, seed=3)
    assert prompts == held_out_prompts(60, seed=3)[:40]
    assert prompts != held_out_prompts(40, seed=4)
    assert all(is_held_out(scene) and not is_held_out_pair(scene) for scene, _ in prompts)
    assert all(words == caption(scene) and not scene.checkered for scene, words in prompts)
    assert all(is_held_out_pair(scene) for scene, _ in held_out_prompts(5, split="pairs"))
    assert not any(is_held_out(scene) for scene, _ in held_out_prompts(20, split="none"))


def test_the_prompts_that_the_recorded_scores_are_of():
    """A change here is another examination: scores of before and after do not compare."""
    prompts = held_out_prompts(32)
    assert [words for _, words in prompts[:2]] == [
        "a small orange ring stays still on a brown background",
        "a large yellow cross moves right on a teal background",
    ]
    assert sum(render(scene, 1, 32, 32).mean() for scene, _ in prompts) == pytest.approx(12.548145, abs=1e-3)


def test_kinds_of_scenes():
    drawn = {kind: [scene for scene, _ in held_out_prompts(20, **shares)] for kind, shares in KINDS.items()}
    assert all(len(scene.objects) == (2 if kind == "two" else 1) for kind in KINDS for scene in drawn[kind])
    assert all(s.checkered == (kind in ("checkered", "camera")) for kind in KINDS for s in drawn[kind])
    assert {scene.camera for scene in drawn["camera"]} == set(CAMERAS)
    assert {scene.style for scene in drawn["style"]} == set(STYLES) - {"none"}
    assert {(s.camera, s.style) for kind in ("one", "checkered", "two") for s in drawn[kind]} == {("static", "none")}


def test_truth_scores_one_and_floor_scores_chance():
    rows = {
        "truth": evaluate(ceiling(lambda clips: clips), n=12, batch=5, given=(0, -1)),
        "floor": evaluate(floor(), n=30),
    }
    top, bottom = rows["truth"], rows["floor"]
    assert {name: cell["rate"] for name, cell in top["rates"].items()} == dict.fromkeys(ONE_OBJECT, 1.0)
    assert top["rates"]["all"]["low"] == pytest.approx(12 / (12 + 1.96**2))
    assert (top["figures"]["swap"], top["figures"]["first_psnr"]) == (0, 100)
    assert top["figures"]["last_ssim"] == pytest.approx(1)
    assert bottom["rates"]["all"]["rate"] < 0.1
    assert bottom["rates"]["shape"]["rate"] < 0.5
    assert 0.3 < bottom["figures"]["swap"] < 0.7
    rates, figures = (block.splitlines() for block in markdown(rows).split("\n\n"))
    assert len(rates) == len(figures) == 4
    assert len({line.count("|") for line in rates}) == len({line.count("|") for line in figures}) == 1
    json.loads(json.dumps(rows, allow_nan=False))


def test_given_frames_are_compared_with_the_image_and_with_what_the_vae_keeps():
    exact = evaluate(ceiling(lambda clips: clips), n=4, given=(-1,), reconstruct=darker)["figures"]
    through = evaluate(ceiling(darker), n=4, given=(-1,), reconstruct=darker)["figures"]
    assert exact["last_psnr"] == 100
    assert exact["last_psnr_to_vae"] == pytest.approx(exact["vae_last_psnr"])
    assert through["last_psnr"] == pytest.approx(through["vae_last_psnr"])
    assert through["last_psnr_to_vae"] == 100
    assert exact["last_ssim"] == pytest.approx(1)
    assert through["last_ssim"] == pytest.approx(through["vae_last_ssim"])
    assert through["last_ssim_to_vae"] == pytest.approx(1)
    assert through["last_ssim"] < 1


def test_prompts_and_scenes_reach_the_generator_in_batches():
    asked, given = [], []

    def generate(prompts, scenes, seeds):
        asked.append(list(prompts))
        given.extend(seeds)
        return [render(scene, 9) for scene in scenes]

    result = evaluate(generate, n=5, batch=2)
    assert [len(batch) for batch in asked] == [2, 2, 1]
    assert [row["prompt"] for row in result["clips"]] == [words for batch in asked for words in batch]
    assert given == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="shorter"):
        evaluate(lambda prompts, scenes, seeds: [], n=2)


def test_rows_of_a_run_that_was_stopped_go_on():
    prompts, generate = held_out_prompts(5), ceiling(lambda clips: clips)
    whole = [row for part in score_prompts(generate, prompts, batch=2) for row in part]
    rest = [row for part in score_prompts(generate, prompts, first=3, batch=2) for row in part]
    assert [row["prompt"] for row in whole] == [words for _, words in prompts]
    assert rest == whole[3:]


def test_answers_about_objects_are_counted_by_object():
    rows = [{"prompt": "", "found": [True, False], "all": False, "jump": None, "swap": 0.0}]
    rows += [{"prompt": "", "found": [True, True], "all": True, "jump": 2.0, "swap": 1.0}]
    table = score_table(rows)
    assert (table["n"], table["rates"]["found"]["right"], table["rates"]["found"]["of"]) == (2, 3, 4)
    assert (table["rates"]["all"]["rate"], table["figures"]) == (0.5, {"jump": 2.0, "swap": 0.5})
    two = evaluate(ceiling(lambda clips: clips), n=3, **KINDS["two"])
    assert {cell["of"] for name, cell in two["rates"].items() if name in ("found", "colour", "shape")} == {6}
    assert (two["rates"]["all"]["of"], two["rates"]["all"]["rate"]) == (3, 1)


@pytest.mark.parametrize("kind", ["two", "camera", "style"])
def test_floors_of_other_kinds(kind):
    rates = evaluate(floor(**KINDS[kind]), n=8, **KINDS[kind])["rates"]
    assert rates["all"]["rate"] < 0.7
    assert ("style" in rates) == (kind == "style")
    assert ("camera" in rates) == (kind == "camera")


def test_reconstruction_of_a_known_error():
    same = reconstruction(lambda clips: clips, n=2)
    assert (same["psnr"], same["ssim"]) == (100, pytest.approx(1))
    assert reconstruction(lambda clips: [c + 0.1 for c in clips], n=2)["psnr"] == pytest.approx(20, abs=1e-3)


@pytest.mark.parametrize("name", ["colour", "shape", "size", "motion", "background", "camera", "style"])
def test_swap_changes_one_attribute(name):
    scene, _ = held_out_prompts(1, checkered=1.0)[0]
    before, after = (
        vars(s) | vars(s.objects[0]) for s in (scene, swap_attribute(scene, name, np.random.default_rng(0)))
    )
    assert [key for key in before if before[key] != after[key] and key != "objects"] == [name]


def test_caption_gaps_show_which_words_are_read():
    scenes = [scene for scene, _ in held_out_prompts(12)]
    right = [caption(scene) for scene in scenes]

    def loss(captions: list[str]) -> float:
        """Of a model that reads the size, the first word but one, and nothing else."""
        return 1 + sum(a.split()[1] != b.split()[1] for a, b in zip(captions, right, strict=True)) / len(right)

    gaps = caption_gaps(loss, scenes)
    assert gaps == {"gap_background": 0, "gap_colour": 0, "gap_size": 1, "gap_motion": 0, "gap_shape": 0}


def test_swap_is_lost_won_or_even():
    a, b = (scene for scene, _ in held_out_prompts(2))
    seen = measure(render(a))
    assert (swap(seen, a, b), swap(seen, b, a), swap(seen, a, a)) == (0, 1, 0.5)
