"""Styles and presets are data: those shipped are whole, the user's win, and what was chosen stands in the recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from videogen.cli import main, parse
from videogen.cli.generate import TYPES
from videogen.data.video import read_recipe
from videogen.enhance import Template
from videogen.errors import InvalidRequest
from videogen.styles import Style, find_preset, find_style, read_named
from videogen.testing import tiny_pipeline


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_style_that_is_shipped_says_something():
    for name in read_named("styles"):
        prompt, avoided = find_style(name).applied("a red circle.", "blur")
        assert prompt.startswith("a red circle, ")
        assert avoided.startswith("blur")


def test_words_around_a_prompt():
    assert Style(prompt="a sketch of {prompt}, faint").applied("a cat") == ("a sketch of a cat, faint", "")
    assert Style(prompt="sepia", negative_prompt="red").applied("", "") == ("sepia", "red")
    assert Style(prompt="{prompt}", negative_prompt="red").applied("a {b}", "blue") == ("a {b}", "blue, red")


def test_the_users_own_come_first(home):
    (home / "mine.yaml").write_text("noir: {prompt: hard shadows}\nsepia: {prompt: brown}\n")
    (home / "config" / "videogen").mkdir(parents=True)
    (home / "config" / "videogen" / "styles.yaml").write_text("sepia: old paper\nhaze: fog\n")
    assert find_style("sepia").prompt == "old paper"
    assert find_style("sepia", "mine.yaml").prompt == "brown"
    assert find_style("haze", "mine.yaml").prompt == "fog"
    assert find_style("noir", "mine.yaml").prompt == "hard shadows"


@pytest.mark.parametrize("text", ["x: 3", "x:", "x: {negative_prompt: a}", "x: {prompt: [a]}", "x: {promt: a}"])
def test_a_style_without_words_is_refused(home, text):
    (home / "mine.yaml").write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        find_style("x", "mine.yaml")
    assert caught.value.hint


def test_unknown_names_are_told_the_nearest(capsys):
    with pytest.raises(InvalidRequest) as caught:
        find_style("oil-panting")
    assert caught.value.hint == "--style oil-painting"
    assert main(["t2v", "a", "--preset", "drft"]) == 2
    assert "--preset draft" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["tiny", "org/name"])
def test_presets_are_flags_and_lose_to_flags(home, model):
    known = {*TYPES, "model", "memory", "kernel", "quantize", "compile", "dtype"}
    steps = {}
    for name in ("draft", "balanced", "quality"):
        assert set(find_preset(name, model)) <= known
        steps[name] = parse(["t2v", "a", "--preset", name, "--model", model]).num_inference_steps or 50
    assert steps["draft"] < steps["balanced"] < steps["quality"]
    args = parse(["t2v", "a", "--preset", "draft", "--steps", "7", "--model", model])
    assert args.num_inference_steps == 7
    (home / "a.yaml").write_text("preset: draft\nsteps: 9\n")
    assert parse(["t2v", "a", "--model", model, "--config", "a.yaml"]).num_inference_steps == 9
    assert parse(["t2v", "a", "--model", model, "--config", "a.yaml", "preset=quality"]).num_inference_steps == 9


def test_what_was_chosen_stands_in_the_recipe(home, capsys):
    """Final values; the prompt before; and -n makes a clip for each seed from the same words."""
    folder = str(tiny_pipeline().save(home / "small"))
    (home / "config" / "videogen").mkdir(parents=True)
    (home / "config" / "videogen" / "presets.yaml").write_text("fast: {steps: 2, guidance: 3, sampler: euler}\n")
    flags = ["--model", folder, "--preset", "fast", "--steps", "1", "--style", "sepia", "--enhance", "-n", "4"]
    assert main(["t2v", "a red circle", *flags, "--seed", "5", "--json", "--quiet"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["seed"] for row in rows] == [5, 6, 7, 8]
    assert len({row["path"] for row in rows}) == 4
    enhanced = Template()("a red circle", seed=5)
    for row in rows:
        recipe = read_recipe(row["path"]) or {}
        assert recipe == row["settings"]
        assert (recipe["num_inference_steps"], recipe["guidance_scale"], recipe["sampler"]) == (1, 3.0, "euler")
        assert recipe["prompt"] == find_style("sepia").applied(enhanced)[0]
        assert (recipe["original_prompt"], recipe["enhanced_prompt"]) == ("a red circle", enhanced)
        assert (recipe["style"], recipe["enhanced_by"]) == ("sepia", "template")
    clip = rows[2]["path"]
    assert main(["rerun", clip, "--model", folder, "--quiet", "--out", "b.mp4"]) == 0
    assert read_recipe("b.mp4") == read_recipe(clip)
    assert main(["rerun", clip, "--model", folder, "--quiet", "--out", "c.mp4", "--style", "pencil-sketch"]) == 0
    varied = read_recipe("c.mp4") or {}
    assert varied["prompt"] == "a red circle, as a pencil sketch", "from the words as they were at first"


def test_an_enhancer_takes_its_value_with_an_equals_sign(capsys):
    assert main(["t2v", "--enhance", "a cat"]) == 2
    assert main(["t2v", "a", "--enhance", "a cat"]) == 2
    assert "=template" in capsys.readouterr().err
    assert main(["t2v", "a", "-n", "0"]) == 2
    assert main(["t2v", "a", "-n", "2", "--out", "x.mp4"]) == 2
