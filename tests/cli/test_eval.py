"""`videogen eval`: a folder per evaluation, goes on where it was, refuses what it is not."""

from __future__ import annotations

import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from videogen.cli import evaluate as room
from videogen.cli import main, tools
from videogen.cli.evaluate import CEILING, FLOOR, MODES, Evaluation, run
from videogen.data.world import render
from videogen.errors import InvalidRequest
from videogen.evaluation import KINDS, SPLITS, held_out_prompts


class Machine:
    """Workers that render the truth instead of asking a model, and a VAE that keeps everything."""

    def __init__(self, monkeypatch) -> None:
        self.jobs: list[dict] = []
        self.fail_after = 10**9
        monkeypatch.setattr(room, "workers", self.workers)
        monkeypatch.setattr(room, "through_vae", lambda pipeline: lambda clips: list(clips))
        self.truth = {words: render(scene) for scene, words in held_out_prompts(20)}

    @contextmanager
    def workers(self, model, processes):
        card = SimpleNamespace(num_frames=17, height=64, width=64)
        yield SimpleNamespace(card=card), self.make, 2

    def make(self, jobs):
        for job in jobs:
            if len(self.jobs) == self.fail_after:
                raise KeyboardInterrupt
            self.jobs.append(job)
            yield [self.truth[prompt] for prompt in job["prompt"]]


@pytest.fixture
def machine(monkeypatch) -> Machine:
    return Machine(monkeypatch)


def test_a_stopped_evaluation_goes_on_and_a_finished_one_is_read(machine, tmp_path):
    what, out = Evaluation(model="tiny", mode="first_and_last_frame", n=7), tmp_path / "score"
    machine.fail_after = 3  # in the second round of two batches of two
    with pytest.raises(KeyboardInterrupt):
        run(what, out, batch=2)
    assert len((out / "clips.jsonl").read_text().splitlines()) == 4
    assert (out / "samples.png").is_file()
    with (out / "clips.jsonl").open("a") as file:
        file.write('{"half of a')

    machine.fail_after = 10**9
    table = run(what, out, batch=2)
    assert [seed for job in machine.jobs for seed in job["seed"]] == [0, 1, 2, 3, 4, 5, 4, 5, 6]
    assert list(table) == ["first and last frame", CEILING, FLOOR]
    model = table["first and last frame"]
    assert (model["n"], model["rates"]["all"]["right"], model["figures"]["first_psnr"]) == (7, 7, 100)
    assert [row["prompt"] for row in model["clips"]] == [words for _, words in held_out_prompts(7)]
    assert table[FLOOR]["rates"]["all"]["rate"] < 0.5
    first = machine.jobs[0]
    assert np.array_equal(first["last_frame"][1], machine.truth[first["prompt"][1]][-1])
    assert "num_inference_steps" not in first  # the model's own

    asked = len(machine.jobs)
    assert run(what, out, batch=2) == json.loads(json.dumps(table))
    assert len(machine.jobs) == asked
    assert {path.name for path in out.iterdir()} == {
        "clips.jsonl",
        "evaluation.json",
        "samples.png",
        "samples.txt",
        "score.json",
        "score.md",
    }


def test_a_folder_holds_one_evaluation(machine, tmp_path, monkeypatch):
    run(Evaluation(model="tiny", n=2), tmp_path)
    with pytest.raises(InvalidRequest, match="another evaluation"):
        run(Evaluation(model="tiny", n=2, steps=9), tmp_path)
    monkeypatch.setattr(room, "fingerprint", lambda model: "trained again")
    with pytest.raises(InvalidRequest, match="another evaluation"):
        run(Evaluation(model="tiny", n=2), tmp_path)


def test_settings_reach_the_model_and_the_label(machine, tmp_path):
    what = Evaluation(model="tiny", n=1, steps=9, guidance=2.0)
    run(what, tmp_path)
    assert machine.jobs[0]["num_inference_steps"] == 9
    assert machine.jobs[0]["guidance_scale"] == 2.0
    assert "first_frame" not in machine.jobs[0]
    assert what.label == "text"
    assert Evaluation(model="tiny", mode="last_frame", scenes="two", split="pairs").label == "last frame, two, pairs"


def test_the_command_line_says_what_there_is(machine, tmp_path, capsys):
    assert (tuple(MODES), tuple(KINDS), SPLITS) == (tools.MODES, tools.KINDS, tools.SPLITS)
    assert main(["eval", "tiny", "--n", "2", "--out", str(tmp_path)]) == 0
    assert "| text | 2 | 1.000 [" in capsys.readouterr().out
    assert main(["eval", "tiny", "--n", "0"]) == 2
    assert main(["eval", "tiny", "--mode", "sound"]) == 2
    assert main(["eval", "no/such/model", "--n", "2"]) == 3
