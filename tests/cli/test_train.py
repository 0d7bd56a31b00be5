"""`videogen train` and `scripts/train.py`: one program that says what it takes, what is wrong, where the result is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from videogen import cli
from videogen.training.logs import Log

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/train/tiny_dit.yaml")


def test_settings_may_stand_before_and_behind_flags():
    args = cli.parse(["train", CONFIG, "fit.steps=1", "--dry-run", "folder=a", "--processes", "2", "clips=3"])
    assert args.overrides == ["fit.steps=1", "folder=a", "clips=3"]
    assert (args.dry_run, args.processes) == (True, 2)


def test_training_prints_where_the_result_lies(monkeypatch, capsys, tmp_path):
    given = []
    monkeypatch.setattr("videogen.training.run.main", lambda *words: given.append(words) or tmp_path / "model")
    assert cli.main(["train", CONFIG, f"folder={tmp_path}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'model'}\n"
    monkeypatch.setenv("RANK", "1")  # of several processes the first one speaks
    assert cli.main(["train", CONFIG, f"folder={tmp_path}"]) == 0
    assert capsys.readouterr().out == ""
    assert given == [(CONFIG, [f"folder={tmp_path}"])] * 2


def test_a_run_that_is_told_to_stop_leaves_pictures_and_the_code_that_queues_it_again(monkeypatch, capsys, tmp_path):
    from videogen.training.safety import Interrupted

    def stopped(*_):
        with Log(tmp_path) as log:
            log.write(1, {"loss": 1.0})
        raise Interrupted("told to stop.")

    monkeypatch.setattr("videogen.training.run.main", stopped)
    assert cli.main(["train", CONFIG, f"folder={tmp_path}"]) == 85
    assert "told to stop" in capsys.readouterr().err
    assert (tmp_path / "plots" / "loss.png").is_file()


def test_a_dry_run_says_what_it_would_take_and_trains_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("videogen.training.run.main", lambda *_: pytest.fail("trained"))
    assert cli.main(["train", CONFIG, "--dry-run", "clips=100", "batch_size=10"]) == 0
    out, err = capsys.readouterr()
    assert not out
    assert "100 samples" in err
    assert cli.main(["train", CONFIG, "--dry-run", "--json", "--processes", "4"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["processes"] == 4
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit.stpes=3"], "stpes"),
        (["steps"], "is no setting"),
        (["--dry-run", "--processes", "0"], "1 or more"),
        (["--dry-run", "--utilisation", "2"], "share of 1"),
        (["--json"], "belong to --dry-run"),
        (["--plot", "folder=nothing-here"], "has no figures"),
        (["--dryrun"], "did you mean --dry-run"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(words, message, monkeypatch, capsys):
    monkeypatch.setattr("videogen.training.run.main", lambda *_: pytest.fail("trained"))
    assert cli.main(["train", CONFIG, *words]) == 2
    assert message in capsys.readouterr().err


def test_pictures_of_a_run_can_be_drawn_while_it_goes_on(capsys, tmp_path):
    with Log(tmp_path) as log:
        log.write(1, {"loss": 1.0, "norm": 2.0})
        assert cli.main(["train", CONFIG, f"folder={tmp_path}", "--plot"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "plots" / f"{name}.png") for name in ("loss", "norm")]


def test_the_script_is_the_command():
    words = [CONFIG, "fit.steps=many"]
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts/train.py"), *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert "fit.steps" in run.stderr
