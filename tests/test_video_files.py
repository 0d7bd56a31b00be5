"""Clips on disk: the right pixels, colour, count and rate, whole or not at all; images made ready as diffusers does."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from PIL import Image

from videogen.data.files import local, sha256_of, written
from videogen.data.video import Video, fit_image, read_image, read_recipe, read_video, to_uint8, write_video
from videogen.errors import FileError, InvalidRequest, NumericalError
from videogen.request import Request

RECIPE = {"prompt": 'a "red" circle, é and 雪', "seed": 7, "height": 32}


def clip(frames: int = 9, height: int = 32, width: int = 48) -> np.ndarray:
    """A smooth ground and a bright square that moves two pixels a frame."""
    y, x = np.mgrid[:height, :width]
    ground = np.stack([40 + x, 60 + y, 100 + 0 * x], -1).astype(np.uint8)
    pictures = np.repeat(ground[None], frames, 0)
    for i in range(frames):
        pictures[i, 8:16, 2 * i : 2 * i + 8] = 220, 30, 30
    return pictures


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


@pytest.mark.parametrize(("frames", "fps"), [(1, 8), (2, 29.97), (17, 16)])
def test_mp4_has_the_exact_size_count_and_rate(tmp_path, frames, fps):
    path = write_video(tmp_path / "new" / "a.mp4", clip(frames, 30, 46), fps)
    back, rate = read_video(path)
    assert back.shape == (frames, 30, 46, 3)
    assert rate == pytest.approx(fps, rel=1e-4)
    with av.open(path) as file:
        stream = file.streams.video[0]
        assert (stream.frames, stream.width, stream.height, stream.codec_context.name) == (frames, 46, 30, "h264")
        assert stream.codec_context.pix_fmt == "yuv420p"


def test_mp4_is_close_to_the_pixels_and_crf_decides_how_close(tmp_path):
    quality = [
        psnr(read_video(write_video(tmp_path / f"{crf}.mp4", clip(), 8, crf=crf))[0], clip()) for crf in (1, 17, 45)
    ]
    assert quality[0] > quality[1] > 30 > quality[2]


@pytest.mark.parametrize("colour", [(255, 0, 0), (220, 30, 30), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)])
def test_colours_are_converted_with_the_matrix_that_is_tagged(tmp_path, colour):
    path = write_video(tmp_path / "a.mp4", np.full((3, 32, 32, 3), colour, np.uint8), 8)
    with av.open(path) as file:
        codec = file.streams.video[0].codec_context
        assert (codec.color_primaries, codec.color_trc, codec.colorspace, codec.color_range) == (1, 1, 1, 1)
        y, u, v = (np.asarray(p, np.uint8).reshape(-1) for p in next(file.decode(video=0)).planes)
    # BT.709, limited range (ITU-R BT.709-6, section 3): with BT.601's matrix red would have luma 81 instead of 63.
    r, g, b = (c / 255 for c in colour)
    luma = 0.2126 * r + 0.7152 * g + 0.0722 * b
    expected = 16 + 219 * luma, 128 + 224 * (b - luma) / 1.8556, 128 + 224 * (r - luma) / 1.5748
    assert np.abs(np.array([y[0], u[0], v[0]]) - expected).max() < 1.5
    assert np.abs(read_video(path)[0].astype(int) - colour).max() <= 4, "a player that heeds the tags shows the colour"


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "a.png", "there/%02d.png"])
def test_every_format_keeps_frames_and_recipe(tmp_path, name):
    path = write_video(tmp_path / name, clip(), 10, recipe=RECIPE)
    frames, fps = read_video(path)
    assert frames.shape == clip().shape
    assert np.abs(frames.astype(int) - clip()).mean() < 5
    assert fps == (None if ".png" in name else pytest.approx(10, rel=0.02))
    assert read_recipe(path) == RECIPE
    assert read_recipe(write_video(tmp_path / "plain" / name, clip(), 10)) is None
    if ".png" in name:
        assert np.array_equal(frames, clip())
        assert sorted(p.name for p in path.iterdir())[:2] == (
            ["00.png", "01.png"] if "%" in name else ["0000.png", "0001.png"]
        )


def test_mp4_recipe_is_found_by_other_tools(tmp_path):
    path = write_video(tmp_path / "a.mp4", clip(), 8, recipe=RECIPE)
    with av.open(path) as file:
        assert json.loads(file.metadata["videogen"]) == json.loads(file.metadata["comment"]) == RECIPE
    head = path.read_bytes()
    assert head.index(b"moov") < head.index(b"mdat"), "the index stands first, so that players start at once"


def test_chunks_are_written_as_they_come(tmp_path):
    seen = []

    def chunks():
        for start in (0, 1, 5):
            seen.append([p.suffix for p in tmp_path.iterdir()])
            yield clip()[start : {0: 1, 1: 5, 5: 9}[start]] / 255

    path = write_video(tmp_path / "a.mp4", chunks(), 8)
    assert np.array_equal(read_video(path)[0], read_video(write_video(tmp_path / "b.mp4", clip(), 8))[0])
    assert {suffix for names in seen for suffix in names} <= {".part"}, "until it is complete, it has another name"


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "a.png"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError(28, "No space left on device")])
def test_an_interrupt_leaves_nothing(tmp_path, name, error):
    def chunks():
        yield from [clip()] * 12  # more than the encoder keeps in memory
        assert len(list(tmp_path.iterdir())) == (name in ("a.mp4", "a.png"))
        raise error

    with pytest.raises(FileError if isinstance(error, OSError) else error):
        write_video(tmp_path / name, chunks(), 8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_never_becomes_a_video(tmp_path, name, bad):
    frames = clip() / 255
    frames[5, 3, 3, 1] = bad
    with pytest.raises(NumericalError) as caught:
        write_video(tmp_path / name, frames, 8)
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NumericalError):
        Video(frames, 8)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_never_overwritten_unasked(tmp_path, name):
    path = write_video(tmp_path / name, clip(), 8, recipe={"seed": 1})
    with pytest.raises(FileError, match="exists") as caught:
        write_video(tmp_path / name, clip(), 8)
    assert caught.value.exit_code == 6
    assert read_recipe(path) == {"seed": 1}
    write_video(tmp_path / name, clip()[:2], 8, recipe={"seed": 2}, overwrite=True)
    assert read_recipe(path) == {"seed": 2}
    assert len(read_video(path)[0]) == 2, "no frame of the longer clip is left"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_refused_sizes_and_formats(tmp_path):
    with pytest.raises(InvalidRequest, match="even") as caught:
        write_video(tmp_path / "a.mp4", clip(2, 31, 47), 8)
    assert "48x32" in caught.value.hint
    with pytest.raises(InvalidRequest, match="ending"):
        write_video(tmp_path / "a.avi", clip(), 8)
    with pytest.raises(InvalidRequest, match="no frames"):
        write_video(tmp_path / "a.mp4", iter([]), 8)
    assert list(tmp_path.iterdir()) == []
    assert read_video(write_video(tmp_path / "odd.webp", clip(2, 31, 47), 8))[0].shape == (2, 31, 47, 3)


def test_reading_stops_early_and_says_what_failed(tmp_path):
    path = write_video(tmp_path / "a.mp4", clip(), 8)
    assert len(read_video(path, limit=3)[0]) == 3
    assert len(read_video(write_video(tmp_path / "a.gif", clip(), 8), limit=3)[0]) == 3
    (tmp_path / "bad.mp4").write_bytes(b"not a clip" * 20)
    (tmp_path / "empty").mkdir()
    for name in ("bad.mp4", "empty"):
        with pytest.raises(FileError, match="cannot be read as a clip"):
            read_video(tmp_path / name)
    with pytest.raises(FileError):
        read_recipe(tmp_path / "bad.mp4")
    with pytest.raises(InvalidRequest, match="address"):
        read_video("https://example.org/a.mp4")


def test_foreign_clips_are_read(tmp_path):
    iio.imwrite(tmp_path / "a.mkv", clip(), plugin="pyav", codec="libx264", fps=12)
    frames, fps = read_video(tmp_path / "a.mkv")
    assert frames.shape == clip().shape
    assert fps == 12
    assert read_recipe(tmp_path / "a.mkv") is None


def test_float_frames_are_clamped_and_rounded():
    frames = np.array([-0.1, 0.0, 0.49 / 255, 0.51 / 255, 1.0, 1.2], np.float32).reshape(1, 2, 1, 3)
    assert to_uint8(frames).ravel().tolist() == [0, 0, 0, 1, 255, 255], "a uint8 cast alone would wrap 1.2 to 50"


def test_a_video_saves_shows_and_reads_back_lazily(tmp_path):
    video = Video(clip() / 255, 8, seed=7, settings=RECIPE)
    assert video.frames.dtype == np.uint8
    assert np.array_equal(video.frames, clip())
    path = video.save(tmp_path / "a.mp4")
    assert read_recipe(path) == RECIPE
    assert read_recipe(video.save(tmp_path / "b.mp4", metadata=False)) is None
    lazy = Video(path, 8, seed=7)
    assert "frames" not in vars(lazy)
    assert lazy.frames.shape == clip().shape
    assert 'src="data:video/mp4;base64,' in video._repr_html_()
    assert "9x32x48" in repr(video)


# Images


def picture(height: int = 40, width: int = 72) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))


@pytest.mark.parametrize("size", [(32, 48), (40, 72), (64, 64)])
def test_stretch_is_diffusers_own_preprocessing_bit_for_bit(size):
    ours = fit_image(picture(), *size, "stretch")
    theirs = VideoProcessor(vae_scale_factor=8).preprocess(picture(), height=size[0], width=size[1])[0]
    assert np.array_equal(ours, theirs.numpy())
    assert ours.dtype == np.float32


def test_crop_cuts_pad_adds_and_both_keep_the_aspect():
    wide = Image.new("RGB", (100, 50), "red")
    wide.paste("blue", (0, 0, 25, 50))
    wide.paste("blue", (75, 0, 100, 50))
    crop, pad, stretch = (fit_image(wide, 32, 32, how) for how in ("crop", "pad", "stretch"))
    assert crop.shape == pad.shape == stretch.shape == (3, 32, 32)
    assert np.allclose(crop[0, :, 4:28], 1, atol=0.05), "only the middle is left, and it is red"
    assert (pad[:, :7] == -1).all()
    assert (pad[:, -7:] == -1).all(), "black above and below"
    assert pad[0, 16, 16] > 0.95
    assert stretch[2, 16, 2] > 0.95, "the blue sides are still there"


def test_images_come_in_many_kinds(tmp_path):
    image = picture()
    array = np.asarray(image)
    image.save(tmp_path / "a.png")
    kinds = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        image,
        array,
        array / 255,
        torch.tensor(array).permute(2, 0, 1),
        torch.tensor(array / 255).permute(2, 0, 1),
    ]
    for kind in kinds:
        assert np.array_equal(np.asarray(read_image(kind)), array)
    for bad in (np.zeros((3, 8, 8)), torch.zeros(8, 8, 3), np.zeros((8, 8)), np.zeros((8, 8, 3), np.int64)):
        with pytest.raises(InvalidRequest, match="cannot be used"):
            read_image(bad)


def test_floats_of_the_right_size_are_not_rounded():
    values = np.random.default_rng(0).random((16, 16, 3), np.float32)
    expected = 2 * values.transpose(2, 0, 1) - 1
    assert np.array_equal(fit_image(values, 16, 16), expected)
    assert np.allclose(fit_image(torch.tensor(values).permute(2, 0, 1).double(), 16, 16), expected, atol=1e-7)
    with pytest.raises(InvalidRequest, match="NaN"):
        fit_image(values * np.float32(np.nan), 16, 16)


def test_exif_turns_and_transparency_lies_on_white(tmp_path):
    image = picture(16, 32)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees to the right
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "turned.png")), np.rot90(np.asarray(image), -1))
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    clear.save(tmp_path / "clear.png")
    pixels = np.asarray(read_image(tmp_path / "clear.png"))
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[3, 3].tolist() == [255, 255, 255]
    assert np.asarray(read_image(Image.new("L", (2, 2), 9))).tolist() == [[[9] * 3] * 2] * 2


@pytest.mark.parametrize("kind", ["grey", "grey16", "palette", "clear palette", "grey alpha", "cmyk", "1 bit", "rgb16"])
def test_every_kind_of_picture_looks_as_it_should(tmp_path, kind):
    """A ramp from black to white, the last column clear where the kind knows transparency."""
    ramp = np.linspace(0, 255, 32).astype(np.uint8)[None].repeat(8, 0)
    expected, path = np.stack([ramp] * 3, -1).copy(), tmp_path / "a.png"
    clear = np.where(np.arange(32) == 0, 0, 255).astype(np.uint8)[None].repeat(8, 0)
    grey = Image.fromarray(ramp)
    if kind == "grey16":
        Image.fromarray(ramp.astype(np.uint16) * 257).save(path)
        assert Image.open(path).mode == "I;16"
    elif kind == "rgb16":  # Pillow writes none: 16 bits a colour, big-endian, no filter
        rows = b"".join(b"\0" + (expected[0].astype(">u2") * 257).tobytes() for _ in range(8))
        header = struct.pack(">IIBBBBB", 32, 8, 16, 2, 0, 0, 0)
        parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
        chunks = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in parts]
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    elif kind == "cmyk":
        path = tmp_path / "a.jpg"
        grey.convert("RGB").convert("CMYK").save(path, quality=100, subsampling=0)
        assert Image.open(path).mode == "CMYK"
    elif kind == "1 bit":
        grey.point(lambda v: 255 * (v > 127)).convert("1").save(path)
        expected = np.where(expected > 127, 255, 0)
    elif kind == "palette":
        grey.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path)
        assert Image.open(path).mode == "P"
    elif kind == "clear palette":
        grey.convert("P").save(path, transparency=0)  # its black
        expected[ramp == 0] = 255
    elif kind == "grey alpha":
        Image.merge("LA", (grey, Image.fromarray(clear))).save(path)
        expected[clear == 0] = 255
    else:
        grey.save(path)
    found = np.asarray(read_image(path)).astype(int)
    assert np.abs(found - expected).max() <= (3 if kind == "cmyk" else 0)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(read_image(image)), found)


def test_a_turned_photo_is_fitted_upright(tmp_path):
    """All eight orientations that a camera writes come out as the same picture."""
    upright = np.asarray(picture(16, 32))
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2)}
    stored |= {6: np.rot90(upright), 7: np.rot90(upright[:, ::-1], -1), 8: np.rot90(upright, -1)}
    expected = fit_image(Image.fromarray(upright), 16, 32)
    for orientation, pixels in stored.items():
        image = Image.fromarray(np.ascontiguousarray(pixels))
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(tmp_path / "turned.png", exif=exif)
        assert np.array_equal(fit_image(tmp_path / "turned.png", 16, 32), expected), orientation


def test_broken_images_are_file_errors(tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    with pytest.raises(FileError, match="cannot be read as an image"):
        read_image(tmp_path / "cut.png")
    with pytest.raises(InvalidRequest, match="address"):
        read_image("https://example.org/a.png")


def test_the_sha256_of_a_file_and_of_a_folder_is_one_function_everywhere(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "b.png").write_bytes(b"second")
    (tmp_path / "a.png").write_bytes(b"first")
    assert sha256_of(tmp_path / "a.png") == hashlib.sha256(b"first").hexdigest()
    whole = hashlib.sha256(b"firstsecond").hexdigest()
    assert sha256_of(tmp_path) == whole, "a folder inside is passed over"
    assert Request("a", video=tmp_path).recipe()["video"] == f"sha256:{whole}"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_file_is_written_whole_with_the_rights_of_the_umask_or_not_at_all(tmp_path, umask):
    path, before = tmp_path / "new" / "a.json", os.umask(umask)
    try:
        with written(path) as part:
            os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors writes
            part.write_text("one")
            assert not path.exists()
    finally:
        os.umask(before)
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("one", 0o666 & ~umask)

    def interrupted() -> None:
        with written(path) as part:
            part.write_text("two")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path.read_text(), list(path.parent.iterdir())) == ("one", [path])


def test_a_missing_file_is_told_by_its_flag(tmp_path):
    with pytest.raises(InvalidRequest) as caught:
        local(tmp_path / "gone.png", param="first_frame")
    assert caught.value.hint == "check the path of --first-frame."
