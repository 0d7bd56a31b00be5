"""`videogen post`, measured on what comes out, decoded again: frame counts, lengths, loudness, fades, packets."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import av
import numpy as np
import pytest

from videogen.cli import main
from videogen.data import world
from videogen.data.post import RATE, between, post, prepared
from videogen.data.video import read_recipe, read_video, write_video
from videogen.errors import FileError, InvalidRequest
from videogen.evaluation import psnr

RECIPE = {"prompt": "a red square moves right", "seed": 7, "fps": 8}


def moment(time: float, height: int = 64, width: int = 96) -> np.ndarray:
    """A red square on a smooth ground, three pixels further for each unit of time."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([60 + x, 80 + y / 2, 100 + 0 * x], -1)
    picture[(abs(x - (12 + 3 * time)) < 7) & (abs(y - height // 2) < 7)] = (220, 40, 40)
    return picture.clip(0, 255).astype(np.uint8)


CLIP = np.stack([moment(k) for k in range(17)])


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_video(tmp_path / "clip.mp4", CLIP, 8, recipe=RECIPE)


def tone(path: Path, seconds: float, *, amplitude: float = 0.05, hertz: float = 1000, rate: int = 44100) -> Path:
    samples = amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def heard(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.concatenate([frame.to_ndarray() for frame in file.decode(audio=0)], axis=1)


def rms(sound: np.ndarray) -> float:
    return float(np.sqrt(np.mean(sound.astype(float) ** 2)))


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as file:
        return [bytes(packet) for packet in file.demux(video=0)]


@pytest.mark.parametrize(("fps", "count"), [(16, 34), (24, 51), (12, 26), (23.976, 51), (8, 17), (4, 8)])
def test_another_rate_is_as_long_as_before(clip, tmp_path, fps, count):
    path = post(clip, tmp_path / "out.mp4", fps=fps)
    frames, rate = read_video(path)
    assert len(frames) == count
    assert rate == pytest.approx(fps, rel=1e-4)
    assert len(frames) / rate == pytest.approx(17 / 8, abs=0.5 / fps)
    assert read_recipe(path) == RECIPE | {"post": [{"format": "mp4", "fps": fps, "method": "minterpolate"}]}


def test_frames_between_follow_the_motion():
    """Old frames stay; of moving clips whose every second frame was taken away, those come back better than a blend."""
    made = np.concatenate(list(between(CLIP, 8, 16))).astype(float)
    assert np.abs(made[::2] - CLIP).mean() < 1
    gains = []
    for index in (0, 1, 4, 7):
        truth = (255 * world.clip(index)[1]).round().astype(np.uint8)
        made = np.concatenate(list(between(truth[::2], 4, 8)))[1:-1:2]
        blend = (truth[:-2:2].astype(float) + truth[2::2]) / 2
        gains.append(psnr(made, truth[1::2]) - psnr(blend.round().astype(np.uint8), truth[1::2]))
    assert min(gains) > 2, gains
    assert np.mean(gains) > 5, gains


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_short_and_odd_clips(count, size):
    frames = np.stack([moment(k, *size) for k in range(count)])
    made = np.concatenate(list(between(frames, 8, 24)))
    assert made.shape == (3 * count, *size, 3)
    assert np.abs(made[0].astype(float) - frames[0]).mean() < 2


def test_music_is_as_long_as_the_clip_and_frames_are_not_encoded_again(clip, tmp_path):
    """A short tone repeats, a long one is cut; 1 kHz in stereo at -16 LUFS is 0.112 RMS (EBU R 128)."""
    for seconds in (0.7, 9.0):
        music = tone(tmp_path / "tone.wav", seconds)
        path = post(clip, tmp_path / "out.mp4", music=music, fade=0.5, overwrite=True)
        sound = heard(path)
        assert sound.shape[1] / RATE == pytest.approx(17 / 8, abs=1024 / RATE)
        assert rms(sound[:, RATE // 2 : RATE]) == pytest.approx(0.112, rel=0.05)
        assert packets(path) == packets(clip), "not a byte of the pictures has changed"
    recipe = read_recipe(path) or {}
    assert recipe["post"][0]["music"].startswith("sha256:")
    assert str(tmp_path) not in json.dumps(recipe)
    with av.open(str(path)) as file:
        assert float(file.duration or 0) / 1e6 == pytest.approx(17 / 8, abs=0.05)
        assert file.streams.video[0].codec_context.color_primaries == 1, "still tagged BT.709"


def test_it_comes_and_goes(tmp_path):
    sound = prepared(tone(tmp_path / "a.wav", 1.0), 2.0, fade=0.5, loudness=-20)
    assert sound.shape == (2, 2 * RATE)
    tenths = [rms(sound[:, k * RATE // 10 : (k + 1) * RATE // 10]) for k in range(20)]
    middle = tenths[10]
    assert middle == pytest.approx(0.112 * 10 ** (-4 / 20), rel=0.05), "4 dB below -16"
    for k in range(5):
        assert tenths[k] == pytest.approx(middle * (k + 0.5) / 5, rel=0.2)
        assert tenths[-1 - k] == pytest.approx(middle * (k + 0.5) / 5, rel=0.2)
    assert tenths[6:14] == pytest.approx([middle] * 8, rel=0.03)
    assert abs(sound[:, 0]).max() == 0
    hard = prepared(tmp_path / "a.wav", 2.0, fade=0)
    assert rms(hard[:, :100]) > 0.5 * rms(hard)


def test_silence_stays_silent(tmp_path):
    sound = prepared(tone(tmp_path / "a.wav", 1.0, amplitude=0), 2.0)
    assert np.isfinite(sound).all()
    assert rms(sound) < 1e-4


def test_rate_and_music_at_once_and_sound_is_kept(clip, tmp_path):
    both = post(clip, tmp_path / "both.mp4", fps=16, music=tone(tmp_path / "a.wav", 1))
    frames, rate = read_video(both)
    assert (len(frames), rate) == (34, 16)
    before = heard(both)
    slower = post(both, tmp_path / "slower.mp4", fps=8)
    assert len(read_video(slower)[0]) == 17
    assert np.array_equal(heard(slower), before), "the sound is copied"
    assert len((read_recipe(slower) or {})["post"]) == 2, "what was done, in order"


@pytest.mark.parametrize("ending", [".gif", ".webp", ".png"])
def test_other_formats(clip, tmp_path, ending):
    path = post(clip, tmp_path / f"out{ending}", fps=16, loop=0 if ending == ".png" else 2)
    frames, rate = read_video(path)
    assert len(frames) in (33, 34), "gif and webp join equal neighbours, as the last two are"
    if rate:
        assert len(frames) / rate == pytest.approx(34 / 16, rel=0.02)
    assert np.abs(frames[:34:2].astype(float) - CLIP).mean() < 6
    recipe = read_recipe(path) or {}
    assert recipe["prompt"] == RECIPE["prompt"]
    assert recipe["post"][0]["format"] == ending[1:]
    back = post(path, tmp_path / "back.mp4")
    assert len(read_video(back)[0]) == len(frames)


@pytest.mark.parametrize("ending", [".gif", ".webp"])
@pytest.mark.parametrize("loop", [0, 1, 3])
def test_how_often_it_plays(clip, tmp_path, ending, loop):
    from PIL import Image

    with Image.open(post(clip, tmp_path / f"out{ending}", loop=loop)) as image:
        again = image.info.get("loop")
    assert again == {".webp": loop, ".gif": {0: 0, 1: None, 3: 2}[loop]}[ending]


def test_a_gif_lasts_as_long_as_it_should(tmp_path):
    """It counts in hundredths of a second: 17 frames of 1/24 s are 4 or 5 of them each, 71 together."""
    frames, rate = read_video(write_video(tmp_path / "a.gif", CLIP, 24))
    assert len(frames) / rate == pytest.approx(17 / 24, abs=0.006)


def test_refused(clip, tmp_path):
    music = tone(tmp_path / "a.wav", 0.2)
    (tmp_path / "bad.mp3").write_bytes(b"no sound" * 100)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.aac\n")
    out = tmp_path / "out.mp4"
    for options in (
        {"fps": 0},
        {"fps": 999},
        {"fps": 0.0001},
        {"fps": float("nan")},
        {"music": "gone.mp3"},
        {"music": "https://example.org/a.mp3"},
        {"music": music, "fade": -1},
        {"music": music, "loudness": 3},
        {"loop": 2},
        {"loop": -1},
    ):
        with pytest.raises(InvalidRequest) as caught:
            post(clip, out, **options)
        assert caught.value.why
        assert caught.value.hint
    for name in ("bad.mp3", "list.m3u8", "clip.mp4"):
        with pytest.raises(FileError):
            post(clip, out, music=tmp_path / name)
    with pytest.raises(InvalidRequest, match="no sound"):
        post(clip, tmp_path / "a.gif", music=music)
    with pytest.raises(FileError, match="exists"):
        post(clip, clip, fps=16)
    with pytest.raises(InvalidRequest, match="itself"):
        post(clip, clip, fps=16, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.wav", "bad.mp3", "clip.mp4", "list.m3u8"]


@pytest.mark.parametrize("fps", ["x", [8], 0.0001, None])
def test_a_recipe_may_say_no_rate(tmp_path, fps):
    frames = write_video(tmp_path / "a.png", np.zeros((2, 16, 16, 3), np.uint8), 8, recipe={"prompt": "a", "fps": fps})
    with pytest.raises(InvalidRequest, match="frame rate"):
        post(frames, tmp_path / "a.mp4")


def test_an_error_leaves_nothing(clip, tmp_path, monkeypatch):
    monkeypatch.setattr("videogen.data.post._sound_frame", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        post(clip, tmp_path / "out.mp4", music=tone(tmp_path / "a.wav", 1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.wav", "clip.mp4"]


def test_the_command(clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["post", "clip.mp4", "--fps", "16"]) == 0
    assert main(["post", "clip.mp4", "--format", "gif", "--json"]) == 0
    assert main(["post", "clip.mp4", "--format", "gif", "--no-metadata"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == ["clip-post.mp4", '{"path": "clip-post.gif"}', "clip-post-2.gif"]
    assert read_recipe("clip-post.gif")
    assert read_recipe("clip-post-2.gif") is None
    for flags in (["--format", "avi"], ["--format", "gif", "--out", "a.mp4"], ["--fps", "-3"]):
        assert main(["post", "clip.mp4", *flags]) == 2
    assert main(["post", "clip.mp4", "--out", "clip-post.mp4"]) == 6
