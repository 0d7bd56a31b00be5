"""`videogen batch`: every row checked first, one load, nothing made twice, failures counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from videogen import pipeline
from videogen.cli import generate, main
from videogen.data.video import read_recipe, read_video
from videogen.errors import NumericalError
from videogen.pipeline import Pipeline, load
from videogen.recipe import fingerprint
from videogen.testing import tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline().save(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In a folder of its own; the list of models that were loaded."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 32), "red").save("red.png")
    seen: list[str] = []

    def counted(model, **options):
        seen.append(str(model))
        return load(model, **options)

    monkeypatch.setattr(pipeline, "load", counted)
    monkeypatch.setitem(vars(__import__("videogen")), "load", counted)
    return seen


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def batch(*argv: str, model: Path) -> int:
    return main(["batch", *argv, "--model", str(model), "--steps", "1", "--quiet"])


ROWS = [
    {"prompt": "a red circle", "seed": 3},
    {"prompt": "a blue ring", "steps": 2, "first_frame": "red.png", "out": "ring.png"},
    {"prompt": "a bar", "num": 2, "size": "48x32", "keyframes": {"4": "red.png"}, "style": "sepia"},
]


def test_a_clip_for_each_row_and_none_twice(folder, loads, capsys):
    Path("rows.jsonl").write_text("\n\n".join(map(json.dumps, ROWS)))
    assert batch("rows.jsonl", model=folder) == 0
    *rows, last = lines(capsys)
    assert last == {"made": 4, "skipped": 0, "failed": 0, "left": 0}
    assert [(row["row"], row["status"]) for row in rows] == [(1, "made"), (3, "made"), (5, "made"), (5, "made")]
    assert [Path(row["path"]).name for row in rows] == [
        *("0001_a-red-circle_s3.mp4", "ring", "0005_a-bar-in-sepia-tones_s0.mp4", "0005_a-bar-in-sepia-tones_s1.mp4")
    ]
    assert len(loads) == 1
    recipe = read_recipe(rows[1]["path"]) or {}
    assert (recipe["num_inference_steps"], recipe["seed"], recipe["row"]) == (2, 0, 3), "a row wins over a flag"
    styled = read_recipe(rows[2]["path"]) or {}
    assert (styled["prompt"], styled["original_prompt"]) == ("a bar, in sepia tones", "a bar")
    alone = load(folder).generate("a blue ring", first_frame="red.png", num_inference_steps=2)
    assert np.array_equal(read_video(rows[1]["path"])[0], alone.frames), "a row is what the same keywords make"

    Path(rows[0]["path"]).unlink()
    assert batch("rows.jsonl", model=folder) == 0
    *rows, last = lines(capsys)
    assert last == {"made": 1, "skipped": 3, "failed": 0, "left": 0}
    assert batch("rows.jsonl", model=folder) == 0
    assert lines(capsys)[-1]["skipped"] == 4
    assert len(loads) == 2, "with nothing to do, nothing is loaded"


def test_a_row_that_was_changed_is_not_taken_for_done(folder, loads, capsys):
    Path("rows.txt").write_text("a red circle\n")
    assert batch("rows.txt", model=folder) == 0
    assert batch("rows.txt", "--guidance", "2", model=folder) == 6
    err = capsys.readouterr().err
    assert "row 1: " in err
    assert "--overwrite" in err
    assert batch("rows.txt", "--guidance", "2", "--overwrite", model=folder) == 0
    assert lines(capsys)[-1]["made"] == 1


def test_csv_and_shards(folder, loads, capsys):
    Path("rows.csv").write_text(
        'prompt,seed,guidance,size,snap\n"a red, round circle",1,2.5,48x32,\n'
        "a ring,2,,,true\na bar,3,,,\na cross,4,,,\n"
    )
    for shard, expected in (("1/2", [1, 3]), ("2/2", [2, 4])):
        assert batch("rows.csv", "--shard", shard, "--out", "clips", model=folder) == 0
        assert [row["row"] for row in lines(capsys)[:-1]] == expected
    recipes = [read_recipe(path) or {} for path in sorted(Path("clips").iterdir())]
    assert [r["seed"] for r in recipes] == [1, 2, 3, 4]
    assert (recipes[0]["prompt"], recipes[0]["guidance_scale"]) == ("a red, round circle", 2.5)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "sed": 3}, ["row 2: ", "'sed'", "did you mean seed?"]),
        ({"prompt": "a", "model": "tiny"}, ["row 2: ", "--model"]),
        ({"prompt": "a", "frames": 10}, ["row 2: ", "10 frames"]),
        ({"prompt": "a", "seed": "x"}, ["row 2: ", "seed"]),
        ({"prompt": "a", "size": "big"}, ["row 2: ", "720x480"]),
        ({"prompt": "a", "first_frame": "gone.png"}, ["row 2: ", "gone.png"]),
        ({"prompt": "a", "first_frame": "https://example.org/a.png"}, ["row 2: ", "address"]),
        ({"prompt": "a", "out": "x.avi"}, ["row 2: ", "x.mp4"]),
        ({"prompt": "a", "out": "1.mp4"}, ["rows 1 and 2", "1.mp4"]),
        ({"prompt": "a", "style": "sepiaa"}, ["row 2: ", "--style sepia"]),
        ({"seed": 3}, ["row 2: ", "no prompt"]),
        ({"prompt": "a", "num": "b"}, ["row 2: ", "num"]),
        ({"prompt": "a", "num": 0}, ["row 2: ", "num"]),
        ({"prompt": "a", "num": 10**12}, ["row 2: ", "num"]),
        ({"prompt": "a", "size": 720}, ["row 2: ", "size"]),
        ({"prompt": "a", "size": [720]}, ["row 2: ", "size"]),
        ({"prompt": "a", "out": 5}, ["row 2: ", "out"]),
        ({"prompt": "a", "style": 5}, ["row 2: ", "style"]),
        ({"prompt": "a", "keyframes": {"x": "red.png"}}, ["row 2: ", "keyframes"]),
        ({"prompt": "a", "keyframes": {"4": 5}}, ["row 2: ", "keyframes"]),
        ({"prompt": "a", "fps": "b", "seconds": 2}, ["row 2: ", "fps"]),
        ({"prompt": "a", "seconds": "b"}, ["row 2: ", "seconds"]),
        ({"prompt": 5, "style": "sepia"}, ["row 2: ", "prompt"]),
        ({"prompt": ["a", "b"]}, ["row 2: ", "prompt"]),
        ({"prompt": "a", "negative_prompt": ["b"], "style": "sepia"}, ["row 2: ", "negative_prompt"]),
        ([1], ["row 2 "]),
    ],
)
def test_a_bad_row_is_named_before_anything_is_loaded(folder, loads, capsys, row, words):
    Path("rows.jsonl").write_text(json.dumps({"prompt": "a", "out": "1.mp4"}) + "\n" + json.dumps(row))
    assert batch("rows.jsonl", model=folder) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(word in err for word in words), err
    assert err.count("\n") == 3, "three lines"
    assert loads == []


def test_a_rows_own_count_and_rate(folder, loads, capsys):
    """Two clips of one name have their seeds in it; the length counts at the rate that the clip will have."""
    rows = [{"prompt": "a", "num": 2, "out": "x.mp4"}, {"prompt": "b", "seconds": 1}, {"prompt": "c", "fps": 32}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert batch("rows.jsonl", "--shard", "1/1", "--fps", "16", "--seconds", "0.5", model=folder) == 0
    paths = [Path(row["path"]) for row in lines(capsys)[:-1]]
    assert [path.name for path in paths[:2]] == ["x_s0.mp4", "x_s1.mp4"]
    assert [len(read_video(path)[0]) for path in paths] == [9, 9, 17, 17]


def test_what_all_rows_share_is_asked_once_and_when_the_weights_are_here(folder, loads, capsys, monkeypatch):
    """A first run fetches the model: its clips are known again by the second."""
    shutil.copytree(folder, "partly", ignore=lambda _, names: [n for n in names if n.endswith(".safetensors")])
    seen = []

    def find(model, *, offline, weights):
        if weights:
            shutil.copytree(folder, "partly", dirs_exist_ok=True)
        return Path("partly")

    def counted(*args):
        seen.append(args)
        return fingerprint(*args)

    monkeypatch.setattr(generate, "find_model", find)
    monkeypatch.setattr(generate, "fingerprint", counted)
    Path("rows.txt").write_text("a red circle\na blue ring\n")
    assert batch("rows.txt", model=Path("partly")) == 0
    assert lines(capsys)[-1]["made"] == 2
    assert len(seen) == 1
    assert batch("rows.txt", model=Path("partly")) == 0
    assert lines(capsys)[-1]["skipped"] == 2


@pytest.mark.parametrize("text", ["", "{", "\n\n"])
def test_bad_files(folder, loads, capsys, text):
    Path("rows.jsonl").write_text(text)
    assert batch("rows.jsonl", model=folder) == 2
    assert batch("gone.jsonl", model=folder) == 2
    assert batch("rows.xml", model=folder) == 2
    assert main(["batch", "rows.jsonl", "--shard", "0/4"]) == 2
    assert loads == []


def test_failures_are_counted_and_nothing_half_made_is_left(folder, loads, capsys, monkeypatch):
    """A row whose numbers are not finite fails; without --keep-going the batch ends there."""
    Path("rows.txt").write_text("a red circle\na blue ring\na bar\n")
    real = Pipeline.denoise

    def denoise(self, request, *args, **keywords):
        if "ring" in request.prompt:
            raise NumericalError("not finite.", why="a test.", hint="none.")
        return real(self, request, *args, **keywords)

    monkeypatch.setattr(Pipeline, "denoise", denoise)
    assert batch("rows.txt", model=folder) == 5
    assert lines(capsys)[-1] == {"made": 1, "skipped": 0, "failed": 1, "left": 1}
    assert batch("rows.txt", "--keep-going", model=folder) == 5
    *rows, last = lines(capsys)
    assert last == {"made": 1, "skipped": 1, "failed": 1, "left": 0}
    assert next(row for row in rows if row["status"] == "failed")["error"]["exit_code"] == 5
    assert len(list(Path("outputs/rows").iterdir())) == 2
    (Path("outputs/rows") / ".0002_a-blue-ring_s0.mp4.999999999.part").write_bytes(b"killed")
    desk = Path.cwd()
    monkeypatch.undo()
    monkeypatch.chdir(desk)
    assert batch("rows.txt", model=folder) == 0
    assert sorted(path.suffix for path in Path("outputs/rows").iterdir()) == [".mp4"] * 3
