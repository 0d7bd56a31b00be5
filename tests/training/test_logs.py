"""The log survives what kills a run, trackers hear the same, and pictures show what stands in it."""

import json

import accelerate.tracking
import numpy as np
import pytest
from PIL import Image

from videogen.errors import InvalidRequest
from videogen.training.logs import Log, read_log
from videogen.training.plots import chart, plot_run


def test_every_line_is_json_whatever_the_numbers(tmp_path):
    with Log(tmp_path) as log:
        log.write(1, {"loss": 0.5, "skipped": ["clips/ä.mp4"]})
        log.write(2, {"loss": float("nan"), "norm": float("-inf")})
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 0.5, "skipped": ["clips/ä.mp4"]},
        {"step": 2, "loss": "nan", "norm": "-inf"},
    ]


def test_a_name_may_hold_what_ends_a_line_elsewhere(tmp_path):
    with Log(tmp_path) as log:
        log.write(1, {"skipped": ["two\u2028lines\x85.mp4"]})
    assert read_log(tmp_path) == [{"step": 1, "skipped": ["two\u2028lines\x85.mp4"]}]


def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path):
    with Log(tmp_path) as log:
        for step in (10, 20, 30):
            log.write(step, {"loss": step / 10})
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # killed while it wrote the third
    with Log(tmp_path) as log:  # and started again at the state of step 10
        log.write(20, {"loss": 2.5})
        log.write(20, {"held_out_loss": 1.0})
        log.write(30, {"loss": 3.0})
    assert read_log(tmp_path) == [
        {"step": 10, "loss": 1.0},
        {"step": 20, "loss": 2.5, "held_out_loss": 1.0},
        {"step": 30, "loss": 3.0},
    ]


class Recorder:
    """A tracker that keeps what it is told, in place of accelerate's."""

    requires_logging_directory = True
    made: list = []  # noqa: RUF012  (a test's own)

    def __init__(self, project, **where):
        self.project, self.where, self.told, self.settings, self.open = project, where, [], None, False
        self.made.append(self)

    def start(self):
        self.open = True

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step):
        assert self.open
        self.told.append((step, values))

    def finish(self):
        self.open = False


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_trackers_hear_the_numbers_and_the_settings(tmp_path, monkeypatch, name):
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setattr(Recorder, "requires_logging_directory", name == "tensorboard")
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, name, Recorder)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [name])
    for first in (1, 3):  # stopped and started again
        with Log(tmp_path, [name], {"fit": {"steps": 3, "betas": (0.9, 0.99)}}) as log:
            log.write(first, {"loss": 0.25, "skipped": ["a"]})
    one, again = Recorder.made
    assert one.told == [(1, {"loss": 0.25})]
    assert again.told == [(3, {"loss": 0.25})]
    assert one.settings == {"fit.steps": 3, "fit.betas": "(0.9, 0.99)"}
    assert not one.open
    if name == "wandb":  # the same run goes on there
        assert one.where["id"] == again.where["id"]
        assert one.where["resume"] == "allow"
    else:
        assert one.where == {"logging_dir": str(tmp_path)}


def test_a_tracker_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    with pytest.raises(InvalidRequest, match=r"videogen\[tensorboard\]"):
        Log(tmp_path, ["tensorboard"])
    with pytest.raises(InvalidRequest, match="no tracker 'tensorbord'"):
        Log(tmp_path, ["tensorbord"])


def test_a_picture_for_each_kind_of_figure(tmp_path):
    with Log(tmp_path) as log:
        for step in range(1, 301):
            log.write(step, {"loss": 2 / step, "norm": float("inf") if step == 5 else 1.0, "samples": 8 * step})
            if step % 100 == 0:
                log.write(step, {f"held_out_loss_t{t:02d}": t / step for t in (5, 15)} | {"held_out_loss": 1 / step})
    made = plot_run(tmp_path)
    assert [path.name for path in made] == ["loss.png", "held_out_times.png", "norm.png"]
    for path in made:
        picture = Image.open(path)
        assert (picture.format, picture.size) == ("PNG", (900, 540))


def test_a_curve_lies_where_its_numbers_are(tmp_path):
    chart({"a": [(0, 1.0), (10, 1.0), (10, 2.0)]}, tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    blue = (pixels == (0x1F, 0x77, 0xB4)).all(-1)[:, :715]  # without its name on the right
    rows, columns = np.nonzero(blue)
    assert (columns.min() - 80, columns.max() - 710) == pytest.approx((0, 0), abs=2)  # from the first step to the last
    level = rows[columns < 600]
    assert (level.min() - 490, level.max() - 490) == pytest.approx((0, 0), abs=2)  # at the bottom
    assert rows.min() - 40 == pytest.approx(0, abs=2)  # then up to the top


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [-3.0, 5.0], [1e-9, 1e9], [float(2**60)]])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_any_numbers_can_be_drawn(tmp_path, values, logarithmic):
    chart({"a": list(enumerate(values)), "none": []}, tmp_path / "a.png", logarithmic=logarithmic)
    assert Image.open(tmp_path / "a.png").size == (900, 540)
