"""`videogen data`: from a folder of clips to a cache that a training reads."""

import json

import numpy as np
import pytest

from videogen.cli import main
from videogen.data.video import write_video
from videogen.data.world import clip
from videogen.testing import tiny_pipeline
from videogen.training.cached import cached_examples


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_pipeline().save(tmp_path_factory.mktemp("model") / "m"))


def answer(capsys, *argv):
    assert main(["data", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_check_caption_cache(tmp_path, capsys, model):
    source = tmp_path / "clips"
    for index in range(3):
        frames = clip(index, seed=1, num_frames=9)[1]
        write_video(source / f"{index}.mp4", frames, 8)
    write_video(source / "black.mp4", np.zeros((9, 64, 64, 3), np.uint8), 8)
    (source / "broken.mp4").write_bytes(b"\0" * 100)
    cut = ["--model", model, "--frames", "9", "--size", "32x32"]
    report = answer(capsys, "check", source, "--out", tmp_path / "check", "--drop", "black", *cut)
    assert (report["samples"], report["kept"], report["windows"]) == (5, 3, {"9 frames": 3})
    assert {name: found["count"] for name, found in report["left out"].items()} == {"black": 1, "unreadable": 1}
    assert report["captions"]["without"] == 4
    counts = answer(capsys, "caption", source, "--with", "world")
    assert (counts["captioned"], counts["dropped"]) == (4, 1)
    told = answer(capsys, "cache", source, "--out", tmp_path / "cache", "--check", tmp_path / "check", *cut)
    assert (told["clips"], told["windows"], told["encoded"], told["without caption"]) == (3, 3, 3, 0)
    assert told["left out"]["quarantined"]["count"] == 2
    examples = cached_examples(tmp_path / "cache")
    assert [examples.name(index) for index in range(3)] == ["0.mp4", "1.mp4", "2.mp4"]
    assert examples.rows[0].captions[0].source == "world"
    assert examples.rows[0].captions[0].weight == 19


@pytest.mark.parametrize(
    "argv",
    [
        ["check", "nowhere"],
        ["check", ".", "--drop", "ugly"],
        ["cache", ".", "--out", "x", "--model", "tiny", "--size", "33x32"],
        ["cache", ".", "--out", "x", "--frames", "nine"],
        ["cache", ".", "--out", "x", "--share", "2/2"],
        ["cache", ".", "--out", "x", "--fps", "nan"],
        ["cache", ".", "--out", "x", "--fps", "0"],
        ["cache", ".", "--out", "x", "--size", "²x32"],
        ["check", ".", "--frames", "9"],
        ["caption", ".", "--with", "gpt"],
        ["caption", ".", "--with", "world", "--share", "1"],
        ["caption", "hf:some/thing", "--with", "world"],
    ],
)
def test_what_cannot_be_done_is_said_before_work(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())
