"""`videogen extend`, on the bundled model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from videogen import cli
from videogen.cli.generate import frames_of
from videogen.data.video import read_recipe, read_video, write_video
from videogen.data.world import clip
from videogen.pipeline import Pipeline
from videogen.recipe import sha256_of
from videogen.weights.card import read_card
from videogen.weights.hub import find_model

FAST = ["--steps", "2", "--quiet"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scene = clip(0)[1]
    path = tmp_path_factory.mktemp("clip") / "start.webp"
    pixels = (scene * 255).round().astype(np.uint8)
    return write_video(path, pixels, 8, recipe={"prompt": "a red circle moves right", "model": "tiny"})


def test_a_clip_goes_on(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "longer.png"
    assert cli.main(["extend", str(start), "--frames", "6", "--seed", "3", "--out", str(out), "--json", *FAST]) == 0
    printed = json.loads(capsys.readouterr().out)
    folder = tmp_path / "longer"
    assert printed["path"] == str(folder)
    before, after = read_video(start)[0], read_video(folder)[0]
    assert len(after) == len(before) + 6
    assert np.array_equal(after[: len(before) - 4], before[:-4])
    recipe = read_recipe(folder)
    assert recipe is not None
    assert recipe["extends"]["sha256"] == sha256_of(start)
    assert recipe["prompt"] == "a red circle moves right"  # of the clip's own recipe
    assert recipe["extends"]["pieces"][0]["seed"] == 3
    assert start.exists()
    assert cli.main(["rerun", str(folder), *FAST]) == 2
    assert "extended" in capsys.readouterr().err


def test_it_is_refused_before_a_model_is_loaded(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = str(tmp_path / "x.mp4")
    for arguments, word in (
        (["extend", str(tmp_path / "no.mp4")], "does not exist"),
        (["extend", str(start), "--overlap", "17", "--out", out], "overlap"),
        (["extend", str(start), "--frames", "-1", "--out", out], "num_frames"),
        (["extend", str(start), "--steps", "0", "--out", out], "num_inference_steps"),
        (["extend", str(start), "--out", str(start)], "exists already"),
    ):
        assert cli.main([*arguments, "--quiet"]) in (2, 6)
        assert word in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_seconds_are_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    card = read_card(find_model("tiny"))
    for flags, frames in ((["--seconds", "2"], 17), (["--seconds", "4.1"], 33), (["--seconds", "0"], 1), ([], None)):
        assert frames_of(cli.parse(["t2v", "a", *flags]), card).get("num_frames") == frames
    for flags in (["--seconds", "2", "--frames", "17"], ["--seconds", "-2"], ["--seconds", "nan"]):
        assert cli.main(["t2v", "a red circle", *flags]) == 2
        assert "seconds" in capsys.readouterr().err


@pytest.mark.parametrize("fps", ["inf", "nan", "0", "1e-9"])
def test_seconds_at_a_rate_that_is_none(fps: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["t2v", "a red circle", "--seconds", "2", "--fps", fps]) == 2
    assert "fps" in capsys.readouterr().err


def test_pieces_that_were_made_are_kept(start: Path, tmp_path: Path, monkeypatch, capsys):
    real, calls = Pipeline.generate, []

    def generate(self, *args, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args, **keywords)

    monkeypatch.setattr(Pipeline, "generate", generate)
    assert cli.main(["extend", str(start), "--frames", "20", "--out", str(tmp_path / "a.png"), *FAST]) == 130
    assert "a-part" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a-part"]
    assert len(read_video(tmp_path / "a-part")[0]) == 17 + 12
    assert len((read_recipe(tmp_path / "a-part") or {})["extends"]["pieces"]) == 1


def test_a_clip_beyond_the_native_length_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "long.webp"
    assert cli.main(["t2v", "a red circle", "--seconds", "3", "--steps", "1", "--out", str(out)]) == 0
    assert "overlapping windows of 17 frames" in capsys.readouterr().err
    recipe = read_recipe(out)
    assert recipe is not None
    assert recipe["num_frames"] == 25
    assert recipe["windows"] == {"frames": 17, "count": 2}
