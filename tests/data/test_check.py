"""The report of a data set says what is in it: injected faults are found, named and counted, and nothing else is."""

import json

import numpy as np
import pytest

from videogen.data import check as checking
from videogen.data.check import check, cuts_of
from videogen.data.manifest import read_quarantine
from videogen.data.sources import Sample, samples
from videogen.data.video import write_video
from videogen.data.windows import Cut, kept_rate, nearest_size, planned, windows
from videogen.data.world import clip
from videogen.errors import FileError, InvalidRequest

CUT = Cut(lengths=(17, 9, 1), sizes=((32, 48),), rate=8)


def frames(index: int, count: int = 17) -> np.ndarray:
    return (clip(index, seed=5, num_frames=count, height=32, width=48)[1] * 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Six sound clips and one of each fault; the clips are of a world that moves."""
    folder = tmp_path_factory.mktemp("source")
    sound = [i for i in range(40) if clip(i, seed=5)[0].objects[0].motion != "still"][:6]
    for number, index in enumerate(sound):
        write_video(folder / f"good{number}.mp4", frames(index), 8)
    write_video(folder / "static.mp4", np.repeat(frames(0)[:1], 17, 0), 8)
    write_video(folder / "black.mp4", np.zeros_like(frames(0)), 8)
    write_video(folder / "short.mp4", frames(sound[0], 5), 8)
    write_video(folder / "cut.mp4", np.concatenate([frames(sound[1])[:10], 255 - frames(sound[2])[:10]]), 8)
    (folder / "copy.mp4").write_bytes((folder / "good0.mp4").read_bytes())
    whole = (folder / "good1.mp4").read_bytes()
    (folder / "damaged.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("no clip")
    rows = [{"file_name": path.name, "text": "a clip"} for path in sorted(folder.glob("*.mp4"))]
    rows.append({"file_name": "missing.mp4"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


FAULTS = {"static": "static", "black": "black", "short": "too short", "damaged": "unreadable", "text": "unreadable"}
FAULTS |= {"missing": "no such file"}


def test_the_quarantine_is_what_was_injected(source, tmp_path):
    report = check(source, tmp_path, cut=CUT)
    assert read_quarantine(tmp_path / "quarantine.jsonl") == {f"{name}.mp4": why for name, why in FAULTS.items()}
    assert (report["samples"], report["clips"], report["pictures"], report["kept"]) == (14, 11, 0, 8)
    assert {reason: found["count"] for reason, found in report["left out"].items()} == {
        "unreadable": 2,
        "static": 1,
        "black": 1,
        "too short": 1,
        "no such file": 1,
    }
    assert report["copies"] == {"count": 1, "examples": ["good0.mp4 = copy.mp4"]}
    assert report["frames"] == {"least": 5, "median": 17, "most": 20}
    assert report["captions"]["without"] == 0
    assert cuts_of(tmp_path) == {"cut.mp4": [10]}
    assert report["windows"] == {"17 frames": 7, "9 frames": 2}  # the clip with a cut gives two short ones
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_a_run_goes_on_where_it_was_stopped(source, tmp_path, monkeypatch):
    seen = []
    original = checking.measure

    def stopped(pictures):
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return original(pictures)

    monkeypatch.setattr(checking, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        check(source, tmp_path / "a")
    first = len(seen)
    report = check(source, tmp_path / "a")
    assert len(seen) < 2 * first + 14 - 4  # the four that were done are not decoded again
    monkeypatch.setattr(checking, "measure", original)
    assert check(source, tmp_path / "b") == report
    lines = [(tmp_path / name / "check.jsonl").read_text() for name in "ab"]
    assert lines[0] == lines[1]
    monkeypatch.setattr(checking, "measure", pytest.fail)
    assert check(source, tmp_path / "a") == report


def test_filters_are_chosen(source, tmp_path):
    check(source, tmp_path, drop=("cuts",))
    assert set(read_quarantine(tmp_path / "quarantine.jsonl").values()) == {"cuts", "unreadable", "no such file"}
    with pytest.raises(InvalidRequest, match="no filter 'ugly'"):
        check(source, tmp_path, drop=("ugly",))


# ---- windows --------------------------------------------------------------------------------------------------------


def numbered(count: int, fps: float | None = 8.0) -> Sample:
    """A clip whose frame k is k everywhere, as an array."""
    return Array("numbers", (), b"", ".npy", fps, count=count)


class Array(Sample):
    def __init__(self, *args, count: int) -> None:
        super().__init__(*args)
        object.__setattr__(self, "count", count)

    def stream(self):
        import contextlib

        pictures = (np.full((32, 48, 3), k, np.uint8) for k in range(self.count))
        return contextlib.nullcontext((self.fps, self.count, pictures))


def shown(window) -> list[int]:
    return [round(float((frame.mean() + 1) * 127.5)) for frame in window.pixels]


@pytest.mark.parametrize("fps", [6.0, 8.0, 12.0, 30.0, 59.94, None])
@pytest.mark.parametrize("cuts", [(), (1, 30, 31)])
def test_windows_show_each_moment_once_at_the_rate(fps, cuts):
    rate, step = kept_rate(fps, 8)
    for count in (1, 5, 9, 10, 26, 40, 100):
        lengths, left = planned(count, fps, CUT, cuts)
        try:
            found = list(windows(numbered(count, fps), CUT, cuts=cuts))
        except InvalidRequest:
            assert not lengths
            continue
        assert [len(window.pixels) for window in found] == lengths
        places = [k for window in found for k in shown(window)]
        wanted = [round(k * step) for k in range(count) if round(k * step) < count]
        assert sorted(set(places)) == places
        assert set(places) <= set(wanted)
        assert len(places) + left == len(wanted)
        for window in found:
            assert window.fps == rate
            assert shown(window)[0] == round(window.start * step)
            assert len({sum(at <= k for at in cuts) for k in shown(window)}) == 1  # no window reaches over a cut


def test_a_picture_is_a_clip_of_one_frame_and_of_a_clip_one_frame_is_taken():
    stills = Cut(lengths=(1,), sizes=((32, 48),), rate=8)
    assert [shown(window) for window in windows(numbered(1), CUT)] == [[0]]
    assert [shown(window) for window in windows(numbered(20), stills)] == [[0]]
    with pytest.raises(InvalidRequest, match="too short"):
        list(windows(numbered(1), Cut(lengths=(9,), sizes=((32, 48),), rate=8)))


def test_sizes_are_chosen_by_shape():
    sizes = [(480, 720), (720, 480), (512, 512), (240, 360)]
    assert nearest_size(1080, 1920, sizes) == (480, 720)
    assert nearest_size(1920, 1080, sizes) == (720, 480)
    assert nearest_size(300, 300, sizes) == (512, 512)
    assert nearest_size(300, 450, sizes) == (240, 360)  # nothing is enlarged where that can be helped


def test_a_clip_that_ends_early_is_damaged(source):
    (damaged,) = (one for one in samples(source) if one.name == "damaged.mp4")
    with pytest.raises(FileError):
        list(windows(damaged, CUT))
