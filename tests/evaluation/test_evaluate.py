from __future__ import annotations

import json

import numpy as np
import pytest

from videogen.data.world import caption, is_held_out, is_held_out_pair, render
from videogen.evaluation import (
    ATTRIBUTES,
    ceiling,
    evaluate,
    floor,
    held_out_prompts,
    markdown,
    reconstruction,
    swap_attribute,
    swap_rate,
)
from videogen.evaluation.score import attributes, measure


def darker(clips):
    return [c * 0.9 for c in clips]


def test_prompts_are_held_out_and_repeat():
    prompts = held_out_prompts(40, seed=3)
    assert prompts == held_out_prompts(60, seed=3)[:40]
    assert prompts != held_out_prompts(40, seed=4)
    assert all(is_held_out(scene) and not is_held_out_pair(scene) for scene, _ in prompts)
    assert all(words == caption(scene) and not scene.checkered for scene, words in prompts)
    assert all(is_held_out_pair(scene) for scene, _ in held_out_prompts(5, pairs=True))


def test_truth_scores_one_and_floor_scores_chance():
    rows = {
        "truth": evaluate(ceiling(lambda clips: clips), n=24, batch=10, given=(0, -1)),
        "floor": evaluate(floor(), n=60),
    }
    top, bottom = rows["truth"], rows["floor"]
    assert [top["rates"][name]["rate"] for name in (*ATTRIBUTES, "all")] == [1.0] * 8
    assert top["rates"]["all"]["low"] == pytest.approx(24 / (24 + 1.96**2))
    assert (top["swap"], top["figures"]["first_psnr"], top["figures"]["last_ssim"]) == (0, 100, pytest.approx(1))
    assert bottom["rates"]["all"]["rate"] < 0.1
    assert bottom["rates"]["shape"]["rate"] < 0.5
    assert 0.3 < bottom["swap"] < 0.7
    lines = markdown(rows).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    json.loads(json.dumps(rows, allow_nan=False))


def test_given_frames_are_compared_with_the_image_and_with_what_the_vae_keeps():
    exact = evaluate(ceiling(lambda clips: clips), n=4, given=(-1,), reconstruct=darker)["figures"]
    through = evaluate(ceiling(darker), n=4, given=(-1,), reconstruct=darker)["figures"]
    assert exact["last_psnr"] == 100
    assert exact["last_psnr_to_vae"] == pytest.approx(exact["vae_last_psnr"])
    assert through["last_psnr"] == pytest.approx(through["vae_last_psnr"])
    assert through["last_psnr_to_vae"] == 100


def test_prompts_and_scenes_reach_the_generator_in_batches():
    asked = []

    def generate(prompts, scenes):
        asked.append(list(prompts))
        return [render(scene, 9) for scene in scenes]

    result = evaluate(generate, n=5, batch=2)
    assert [len(batch) for batch in asked] == [2, 2, 1]
    assert [row["prompt"] for row in result["clips"]] == [words for batch in asked for words in batch]
    with pytest.raises(ValueError, match="shorter"):
        evaluate(lambda prompts, scenes: [], n=2)


def test_reconstruction_of_a_known_error():
    same = reconstruction(lambda clips: clips, n=2)
    assert (same["psnr"], same["ssim"]) == (100, pytest.approx(1))
    assert reconstruction(lambda clips: [c + 0.1 for c in clips], n=2)["psnr"] == pytest.approx(20, abs=1e-3)


@pytest.mark.parametrize("name", ["colour", "shape", "size", "motion", "background"])
def test_swap_changes_one_attribute(name):
    scene, _ = held_out_prompts(1)[0]
    before, after = attributes(scene), attributes(swap_attribute(scene, name, np.random.default_rng(0)))
    assert [key for key in before if before[key] != after[key]] == [name]


def test_swap_rate_counts_wrong_prompts_and_half_of_ties():
    a, b = (scene for scene, _ in held_out_prompts(2))
    seen = [measure(render(scene)) for scene in (a, b)]
    assert swap_rate(seen, [a, b]) == 0
    assert swap_rate(seen, [b, a]) == 1
    assert swap_rate(seen, [a, a]) == 0.5
