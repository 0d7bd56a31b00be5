"""Samples come from wherever they are, each once, none lost; a hostile data set reaches nothing but its own clips."""

import io
import json
import os
import pickle
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from videogen.data import video
from videogen.data.files import sha256_of
from videogen.data.manifest import Caption, add_line, json_lines, quarantine, read_quarantine
from videogen.data.sources import MEMBERS, Dropped, Sample, samples
from videogen.data.video import write_video
from videogen.data.world import clip
from videogen.errors import FileError, InvalidRequest

FRAMES = (clip(3, num_frames=5, height=32, width=48)[1] * 255).round().astype(np.uint8)
WORDS = ["a red circle", "a blue bar"]


def png(frame=FRAMES[0]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(frame).save(data, "PNG")
    return data.getvalue()


def npy(array) -> bytes:
    data = io.BytesIO()
    np.save(data, array, allow_pickle=True)
    return data.getvalue()


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for index in range(2):
        write_video(folder / f"{index}.mp4", FRAMES[index:], 8)
    return folder


def shard(path: Path, members, **options) -> Path:
    """A tar of (name or TarInfo, bytes)."""
    with tarfile.open(path, "w", **options) as file:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data) if info.isreg() else 0
            file.addfile(info, io.BytesIO(data))
    return path


def frames_of(sample: Sample) -> np.ndarray:
    with sample.stream() as (_, _, pictures):
        return np.stack(list(pictures))


def test_a_folder_a_list_and_a_shard_tell_the_same(clips, tmp_path):
    data = [(clips / f"{index}.mp4").read_bytes() for index in range(2)]
    ways = {}
    for kind in ("beside", "jsonl", "csv"):
        folder = tmp_path / kind
        folder.mkdir()
        for index in range(2):
            (folder / f"{index}.mp4").write_bytes(data[index])
            if kind == "beside":
                (folder / f"{index}.txt").write_text(f" {WORDS[index]}\n")
        if kind == "jsonl":
            rows = [json.dumps({"file_name": f"{index}.mp4", "text": WORDS[index]}) for index in range(2)]
            (folder / "metadata.jsonl").write_text("\n".join(rows))
        if kind == "csv":
            (folder / "metadata.csv").write_text(f'video,caption\n0.mp4,{WORDS[0]}\n1.mp4,"{WORDS[1]}"\n')
        ways[kind] = list(samples(folder))
    members = [(f"{i}.{end}", part) for i in range(2) for end, part in (("mp4", data[i]), ("txt", WORDS[i].encode()))]
    ways["tar"] = list(samples(shard(tmp_path / "a.tar", members)))
    for found in ways.values():
        assert [one.captions for one in found] == [(Caption(words),) for words in WORDS]
        assert [one.sha256() for one in found] == [sha256_of(clips / f"{index}.mp4") for index in range(2)]
    assert [one.name for one in ways["jsonl"]] == ["0.mp4", "1.mp4"]
    assert [one.name for one in ways["tar"]] == ["a/0", "a/1"]
    assert np.array_equal(frames_of(ways["tar"][1]), frames_of(ways["jsonl"][1]))


def test_captions_have_sources_and_weights(clips, tmp_path):
    row = {"file_name": "0.mp4", "fps": 12, "captions": ["short", {"text": "long", "source": "vlm", "weight": 19}]}
    (tmp_path / "0.mp4").write_bytes((clips / "0.mp4").read_bytes())
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    for text in ("old", "new"):
        add_line(tmp_path / "captions.jsonl", {"name": "0.mp4", "text": text, "source": "world", "sha256": "…"})
    with (tmp_path / "captions.jsonl").open("a") as file:
        file.write('{"name": "0.mp4", "te')  # a killed writer
    (sample,) = samples(tmp_path)
    assert sample.captions == (Caption("short"), Caption("long", "vlm", 19), Caption("new", "world"))
    assert sample.fps == 12


@pytest.mark.parametrize("kind", [".png", ".jpg", ".webp", ".gif", ".npy", ""])
def test_every_kind_is_decoded(tmp_path, kind):
    path = tmp_path / f"clip{kind}"
    if kind == ".npy":
        np.save(path, FRAMES)
    elif kind == "":
        path.mkdir()
        for index, frame in enumerate(FRAMES):
            Image.fromarray(frame).save(path / f"{index:03}.png")
    elif kind in (".webp", ".gif"):
        write_video(path, FRAMES, 8)
    else:
        Image.fromarray(FRAMES[0]).save(path, quality=95)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": path.name, "text": "a clip"}))
    (sample,) = samples(tmp_path)
    found = frames_of(sample)
    assert len(found) == (1 if kind in (".png", ".jpg") else 5)
    assert np.abs(found[0].astype(int) - FRAMES[0]).mean() < 8


def test_nothing_is_lost_silently(clips, tmp_path):
    good = (clips / "0.mp4").read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.mp4").write_bytes(good)
    (tmp_path / "in" / "notes.pdf").write_bytes(b"%PDF")
    (tmp_path / "outside.mp4").write_bytes(good)
    (tmp_path / "in" / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    (tmp_path / "in" / "1.mp4").write_bytes(good)
    (tmp_path / "in" / "1.txt").symlink_to("/etc/passwd")
    names = ["0.mp4", "0.mp4", "../outside.mp4", str(tmp_path / "outside.mp4"), "link.mp4", "1.mp4", "x.mp4"]
    names += ["notes.pdf", "a\0b", "http://host/x.mp4", "x" * 5000]
    rows = [{"file_name": name} for name in names] + [{"text": "no file"}, {"file_name": "0.mp4", "fps": "fast"}]
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = list(samples(tmp_path / "in"))
    assert [one.reason if isinstance(one, Dropped) else "good" for one in found] == [
        "good",
        "name twice",
        "outside the folder",
        "outside the folder",
        "outside the folder",
        "outside the folder",
        "no such file",
        "unknown kind",
        "no such file",
        "no such file",
        "no such file",
        "no file named",
        "bad row",
    ]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_of_all_tar_formats(tmp_path, form):
    names = ["plain", "deep/er/0001", *([] if form == tarfile.USTAR_FORMAT else ["x" * 150, "ünï/ço" + "d" * 120])]
    path = shard(tmp_path / "s.tar", [(f"{name}.png", png()) for name in names], format=form)
    assert [one.name for one in samples(path)] == [f"s/{name}" for name in names]


def typed(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


class Evil:
    def __reduce__(self):
        return open, ("/tmp/videogen-was-unpickled", "w")


def test_a_hostile_shard_reaches_nothing(tmp_path, monkeypatch):
    """Reliability T14 and T15: links, devices, sparse members, traversal, pickles by any name, arrays that lie."""
    evil = pickle.dumps(Evil())
    lies = npy(np.zeros((1, 4, 4, 3), np.uint8)).replace(b"(1, 4, 4, 3)", b"(9**9,4, 3)")
    members = [
        ("../../escape.png", png()),
        ("/etc/absolute.png", png()),
        *((typed(f"link{kind[0]}.png", kind, "/etc/passwd"), b"") for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)),
        *((typed(f"device{kind[0]}.mp4", kind), b"") for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)),
        (typed("sparse.png", tarfile.GNUTYPE_SPARSE), b""),
        *((f"pickle.{end}", evil) for end in ("pkl", "pickle", "pth", "pt", "pyd", "joblib")),
        ("object.npy", npy(np.array([Evil()], dtype=object))),
        ("lies.npy", lies),
        ("raw.npy", evil),
        ("float.npy", npy(np.zeros((1, 4, 4, 3)))),
        ("words.png", png()),
        ("words.json", b"[" * 100_000),
        ("twice.png", png()),
        ("twice.jpg", png()),
        *((f"many.{index}.txt", b"x") for index in range(MEMBERS + 5)),
        ("good.png", png()),
        ("good.cls", b"7"),
    ]
    monkeypatch.setattr(pickle, "load", pytest.fail)
    monkeypatch.setattr(tarfile.TarFile, "extract", pytest.fail)
    found = {one.name: one for one in samples(shard(tmp_path / "s.tar", members))}
    escaped = {"s/../../escape", "s/etc/absolute"}  # names, and nothing more: their bytes are in memory
    decoded = {name for name, one in found.items() if isinstance(one, Sample)}
    assert decoded == escaped | {"s/object", "s/lies", "s/raw", "s/float", "s/good"}
    for name in ("s/object", "s/lies", "s/raw", "s/float"):
        with pytest.raises(FileError, match="holds no frames"):
            frames_of(found[name])
    assert found["s/pickle"].reason == "no clip"
    assert not Path("/tmp/videogen-was-unpickled").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.tar"]
    assert np.array_equal(frames_of(found["s/good"])[0], FRAMES[0])


def test_damaged_shards_give_what_they_have(tmp_path):
    path = shard(tmp_path / "s.tar", [(f"{index}.png", png()) for index in range(3)])
    whole = path.read_bytes()
    bombs = {
        "cut": whole[: len(png()) + 1500],
        "size": whole[:124] + b"77777777777\0" + whole[136:],
        "negative": whole[:124] + b"\xff" * 12 + whole[136:],
        "sum": whole[:300] + b"\1" + whole[301:],
        "gzip": b"\x1f\x8b" + whole,
    }
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 2**20
    bombs["header"] = header.tobuf(tarfile.USTAR_FORMAT) + b"1 path=x\n" * 2**17
    for name, data in bombs.items():
        path.write_bytes(data)
        found = list(samples(path))
        assert [one.name for one in found] == (["s/0", "s.tar"] if name == "cut" else ["s.tar"]), name
        assert found[-1].reason == "damaged shard", name


def test_a_shard_is_a_stream(tmp_path):
    """Members are read when their sample is asked for: the memory is that of one sample."""
    path = shard(tmp_path / "s.tar", [(f"{index}.png", png()) for index in range(2000)])
    found = samples(path)
    next(found)
    path.write_bytes(path.read_bytes()[:2000])
    assert sum(1 for _ in found) < 10


def test_hugging_face_rows_are_taken_undecoded(clips, monkeypatch):
    class Video:
        def __init__(self, decode=True):
            self.decode = decode

    class Rows(list):
        features = {"video": Video(), "caption": None}  # noqa: RUF012

        def cast_column(self, name, feature):
            assert (name, feature.decode) == ("video", False)
            return self

    rows = Rows(
        [
            {"video": {"path": "x.mp4", "bytes": (clips / "0.mp4").read_bytes()}, "caption": WORDS[0]},
            {"video": {"path": None, "bytes": (clips / "1.mp4").read_bytes()}, "caption": WORDS[1]},
            {"video": {"path": "https://host/x.mp4", "bytes": None}, "caption": "elsewhere"},
            {"video": {"path": None, "bytes": pickle.dumps(Evil())}, "caption": "evil"},
        ]
    )
    asked = []
    module = types.ModuleType("datasets")
    module.load_dataset = lambda name, **options: asked.append((name, options)) or rows
    monkeypatch.setitem(sys.modules, "datasets", module)
    found = list(samples("hf:someone/clips:validation"))
    assert asked == [("someone/clips", {"split": "validation", "streaming": True})]
    assert [one.captions[0].text for one in found[:2]] == WORDS
    assert len(frames_of(found[1])) == 4
    assert [one.reason for one in found[2:]] == ["bad row", "unknown kind"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidRequest, match="not installed"):
        list(samples("hf:someone/clips"))


def test_quarantine_lists_grow_and_survive_a_torn_line(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    quarantine(path, "a.mp4", "static", "0.1 %")
    with path.open("a") as file:
        file.write('{"name": "b.m')
    assert read_quarantine(path) == {"a.mp4": "static"}
    quarantine(path, "c.mp4", "nan")
    assert read_quarantine(path) == {"a.mp4": "static", "c.mp4": "nan"}
    path.write_text(path.read_text().rstrip("\n"))  # an editor that ends no file with a line
    quarantine(path, "d.mp4", "nan")
    assert list(read_quarantine(path)) == ["a.mp4", "c.mp4", "d.mp4"]
    path.write_text('{"name": "a.mp4"}\nnonsense\n')
    with pytest.raises(InvalidRequest, match="cannot be read"):
        list(json_lines(path, torn=True))


@pytest.mark.parametrize("where", ["nowhere", "http://host/clips", "clips.zip"])
def test_what_is_no_source_is_said(tmp_path, where, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("clips.zip").touch()
    with pytest.raises(InvalidRequest):
        list(samples(where))


def test_a_shard_without_an_end_or_with_more_behind_it_is_named(tmp_path):
    path = shard(tmp_path / "s.tar", [("0.png", png()), ("1.png", png())])
    whole, size = path.read_bytes(), tarfile.BLOCKSIZE * (1 + -(-len(png()) // tarfile.BLOCKSIZE))
    for data, names in ((whole[:size], ["s/0", "s.tar"]), (whole + whole, ["s/0", "s/1", "s.tar"])):
        path.write_bytes(data)
        found = list(samples(path))
        assert [one.name for one in found] == names
        assert found[-1].reason == "damaged shard"


def test_numbers_of_thousands_of_digits_end_nothing(tmp_path):
    path = shard(tmp_path / "s.tar", [("0.png", png())])
    for record in (b"000009000" + b"1" * 5000 + b" path=x\n", b"5021 size=" + b"9" * 5010 + b"\n"):
        header = tarfile.TarInfo("x")
        header.type, header.size = tarfile.XHDTYPE, len(record.ljust(9000, b"x") if b"path" in record else record)
        data = record.ljust(-(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, b"\0")
        hostile = tmp_path / "hostile.tar"
        hostile.write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + data + path.read_bytes())
        found = [getattr(one, "reason", "read") for one in samples(hostile)]
        assert found == (["damaged shard"] if b"path" in record else ["read"])


def test_words_and_names_that_are_no_utf8_can_be_written(tmp_path):
    (tmp_path / "0.png").write_bytes(png())
    Path(str(tmp_path / "metadata.jsonl")).write_text('{"file_name": "0.png", "text": "a \\ud800 cat"}\n')
    (found,) = samples(tmp_path)
    assert found.captions == (Caption("a \\ud800 cat"),)
    header = tarfile.TarInfo("\udcff.png")
    path = shard(tmp_path / "s.tar", [(header, png())], format=tarfile.GNU_FORMAT)
    (found,) = samples(path)
    assert found.name == "s/\\udcff"


def test_pipes_and_links_in_a_folder_of_pictures_are_left_out(tmp_path):
    source = tmp_path / "clips"
    (source / "frames").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png())
    (source / "frames/0.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(source / "pipe.mp4")
    add_line(source / "metadata.jsonl", {"file_name": "frames", "text": ""})
    add_line(source / "metadata.jsonl", {"file_name": "pipe.mp4", "text": ""})
    assert [one.reason for one in samples(source)] == ["outside the folder", "no plain file"]


def test_captions_that_are_never_drawn_are_said(clips):
    path = clips / "weights.jsonl"
    path.write_text(json.dumps({"file_name": "0.mp4", "captions": [{"text": "a", "weight": 0}]}) + "\n")
    assert [one.reason for one in samples(path)] == ["bad caption"]


def test_a_file_that_vanishes_is_unreadable(clips):
    with pytest.raises(FileError):
        Sample("a", (), clips / "gone.mp4", ".mp4").sha256()


def test_clips_of_phones_are_upright_however_they_are_read(monkeypatch, clips):
    monkeypatch.setattr(video, "_upright", lambda frame, upright=video._upright: upright(Turned(frame)))
    path = clips / "0.mp4"
    with video.stream_video(path) as (_, _, pictures):
        streamed = np.stack(list(pictures))
    read = video.read_video(path)[0]
    assert read.shape == (5, 48, 32, 3)
    assert np.array_equal(read, streamed)


class Turned:
    """A frame that says it was taken a quarter turn to the left."""

    rotation = 90

    def __init__(self, frame) -> None:
        self.to_ndarray = frame.to_ndarray
