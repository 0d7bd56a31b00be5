"""Frames on disk: clips written whole or not at all, read from anything, images made ready. Imports no torch.

Frames are uint8 numpy `[F, H, W, 3]`, RGB. mp4 is H.264 by PyAV with BT.709 colour, converted and tagged as such; gif,
webp and PNG frames go through imageio, as does all reading. Each clip carries its recipe as JSON.
"""

from __future__ import annotations

import base64
import contextlib
import html
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from videogen.data.files import check_output, local, written
from videogen.errors import FileError, InvalidRequest, NumericalError, VideogenError

Frames = UInt8[np.ndarray, "F H W 3"]
PICTURES = (".gif", ".webp", ".png")  # what Pillow opens; the rest is for PyAV
BT709 = 1  # the number of BT.709 in H.264's tables of primaries, transfer and matrix
LIMITED = 1  # AVCOL_RANGE_MPEG: luma 16..235
DESCRIPTION = 0x010E  # EXIF ImageDescription: where webp keeps the recipe
# What is opened, of all that Pillow and FFmpeg could: no format that runs a program, or names other files or addresses.
PICTURE_KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
CLIP_KINDS = "mov,matroska,webm,avi,mpegts,mpeg,ogg,flv"
CODECS = """
    h264 hevc vp8 vp9 av1 mpeg4 mpeg2video mpeg1video mjpeg ffv1 prores rawvideo theora png huffyuv ffvhuff utvideo
    qtrle dnxhd vc1 wmv3 flv1 h263 msmpeg4v3
""".split()  # noqa: SIM905
MOST_PIXELS = 50_000_000  # of one picture, 8660 x 5773: known from its header, before it is decoded
MOST_IN_FRAME = 17_000_000  # of a frame of a clip: twice 4K
MOST_IN_CLIP = 600_000_000  # of all frames together: 72 frames of 4K, and 1.8 GB
RECIPE_LIMIT = 16 * 2**20  # bytes; a recipe is a few kB, and more with pictures inside


class Video:
    """A clip: its frames, frame rate, seed, and the settings that made it.

    `frames` may be given as the path they were written to; they are then read when first asked for.
    """

    def __init__(
        self,
        frames: np.ndarray | str | Path,
        fps: float | int,
        seed: int | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.path = Path(frames) if isinstance(frames, str | Path) else None
        self.fps, self.seed, self.settings = fps, seed, settings or {}
        if isinstance(frames, np.ndarray):
            self.frames = to_uint8(frames)

    @cached_property
    def frames(self) -> Frames:
        assert self.path is not None
        return read_video(self.path)[0]

    def save(self, path: str | Path, *, overwrite: bool = False, crf: int = 17, metadata: bool = True) -> Path:
        """Write the clip as .mp4, .gif, .webp or .png frames, by the ending of `path`; returns where it is."""
        recipe = self.settings if metadata else None
        return write_video(path, self.frames, self.fps, recipe=recipe, crf=crf, overwrite=overwrite)

    def __repr__(self) -> str:
        where = f", path={str(self.path)!r}" if self.path else "x".join(map(str, ("", *self.frames.shape[:3])))
        return f"Video({where.lstrip(', x')}, fps={self.fps}, seed={self.seed})"

    def _repr_html_(self) -> str:
        """The clip itself, playing inside a notebook."""
        with tempfile.TemporaryDirectory() as folder:
            data = self.save(Path(folder) / "clip.mp4", metadata=False).read_bytes()
        source = "data:video/mp4;base64," + base64.b64encode(data).decode()
        title = html.escape(str(self.settings.get("prompt", "")), quote=True)
        return f'<video controls loop autoplay muted title="{title}" src="{source}"></video>'


def to_uint8(frames: Shaped[np.ndarray, "*n H W 3"]) -> UInt8[np.ndarray, "*n H W 3"]:
    """Float frames in [0, 1], clamped and rounded to 0..255; uint8 frames pass. NaN or Inf never becomes a picture."""
    if frames.dtype == np.uint8:
        return frames
    if not np.isfinite(frames).all():
        raise NumericalError(
            "the frames are not finite; nothing was written.",
            why="the model produced NaN or Inf, usually float16 overflowing.",
            hint="--dtype bfloat16 or --dtype float32",
        )
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)


# Writing


def write_video(
    path: str | Path,
    frames: np.ndarray | Iterable[np.ndarray],
    fps: float | int,
    *,
    recipe: dict[str, Any] | None = None,
    crf: int = 17,
    loop: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write `[F, H, W, 3]` frames, or an iterator of such chunks as they are decoded, and return where the clip is.

    The format is the ending of `path`. `clip.png` makes the folder `clip/` with `0000.png` and so on; `there/%03d.png`
    sets the names. The clip is written under a temporary name in the same folder and renamed when complete: an error
    or an interrupt leaves nothing behind. `loop`: how often gif and webp play, 0 for ever.
    """
    path = Path(path)
    chunks = (to_uint8(chunk) for chunk in ([frames] if isinstance(frames, np.ndarray) else frames))
    with written_whole(path, overwrite=overwrite) as part:
        if path.suffix.lower() == ".mp4":
            _write_mp4(part, chunks, fps, recipe, crf)
        elif path.suffix.lower() == ".png":
            _write_png(part, path.name if "%" in path.name else "%04d.png", chunks, recipe)
        else:
            _write_animation(part, path.suffix.lower(), chunks, fps, recipe, loop)
    return check_output(path, overwrite=True)


@contextlib.contextmanager
def written_whole(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary name beside the clip, which takes its place when the block ends well and is removed otherwise."""
    target = check_output(path, overwrite=overwrite)
    try:
        with written(target, move=_into_place) as part:
            yield part
            check_output(path, overwrite=overwrite)  # somebody else may have made it meanwhile
    except OSError as error:  # PyAV's errors are among them
        raise FileError(
            f"{path} could not be written.",
            why=str(error),
            hint="free some disk space, or choose another place with --out",
            param="out",
        ) from error


def _write_mp4(part: Path, chunks: Iterator[Frames], fps: float | int, recipe: dict[str, Any] | None, crf: int) -> None:
    import av

    # faststart: the index first, so that players start at once; use_metadata_tags: keys beyond the usual few are kept.
    with av.open(part, "w", format="mp4", options={"movflags": "use_metadata_tags+faststart"}) as file:
        file.metadata.update(tags(recipe))
        stream = None
        for index, picture in enumerate(picture for chunk in chunks for picture in chunk):
            if stream is None:
                height, width = picture.shape[:2]
                _even(height, width)
                stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
                stream.width, stream.height, stream.pix_fmt, stream.options = (
                    width,
                    height,
                    "yuv420p",
                    {"crf": str(crf)},
                )
                codec: Any = stream.codec_context
                codec.color_primaries = codec.color_trc = codec.colorspace = BT709
                codec.color_range = LIMITED
            # The tags alone would only claim BT.709: swscale converts with BT.601 unless it is told.
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(
                format="yuv420p",
                src_colorspace="ITU709",
                dst_colorspace="ITU709",
                src_color_range="JPEG",
                dst_color_range="MPEG",
            )
            frame.pts = index
            file.mux(stream.encode(frame))
        if stream is None:
            raise _no_frames()
        file.mux(stream.encode())


def tags(recipe: dict[str, Any] | None) -> dict[str, str]:
    """The metadata of an mp4: the recipe for us, and without pictures as the comment that every player shows."""
    return {} if recipe is None else {"videogen": json.dumps(recipe), "comment": json.dumps(_lean(recipe))}


def _write_animation(
    part: Path, suffix: str, chunks: Iterator[Frames], fps: float | int, recipe: dict | None, loop: int
) -> None:
    """Both formats join equal neighbours into one longer frame; gif counts time in hundredths of a second.

    A palette for each frame: on a smooth picture one for all of FFmpeg's making is larger and 4 dB worse.
    """
    import imageio.v3 as iio
    from PIL import Image

    pictures = [picture for chunk in chunks for picture in chunk]
    if not pictures:
        raise _no_frames()
    text = None if recipe is None else json.dumps(recipe)
    options: dict[str, Any] = {"duration": 1000 / fps} | _looped(suffix, loop)
    if suffix == ".gif":
        ends = [round(100 * (k + 1) / fps) for k in range(len(pictures))]
        options["duration"] = [10 * (end - start) for start, end in zip([0, *ends], ends, strict=False)]  # sums up
        options |= {} if text is None else {"comment": text.encode()}
    else:
        exif = Image.Exif()
        if text is not None:
            exif[DESCRIPTION] = text
        options |= {"quality": 90, "exif": exif}
    part.write_bytes(iio.imwrite("<bytes>", np.stack(pictures), extension=suffix, plugin="pillow", **options))


def _looped(suffix: str, times: int) -> dict[str, int]:
    """gif says how often it plays again, and nothing for once; webp how often it plays."""
    if suffix == ".gif" and times:
        return {} if times == 1 else {"loop": times - 1}
    return {"loop": times}


def _write_png(part: Path, pattern: str, chunks: Iterator[Frames], recipe: dict | None) -> None:
    import imageio.v3 as iio
    from PIL.PngImagePlugin import PngInfo

    part.mkdir()
    for index, picture in enumerate(picture for chunk in chunks for picture in chunk):
        info = PngInfo()
        if recipe is not None:
            info.add_text("videogen", json.dumps(_lean(recipe) if index else recipe))
        iio.imwrite(part / (pattern % index), picture, plugin="pillow", pnginfo=info)
    if not any(part.iterdir()):
        raise _no_frames()


def _lean(recipe: dict[str, Any]) -> dict[str, Any]:
    """Without the pictures inside it: for where a copy for other tools is enough."""
    return {name: value for name, value in recipe.items() if name != "images"}


def _into_place(part: Path, target: Path) -> None:
    """Rename; an existing folder of frames keeps its other files, but no frame of the longer clip before."""
    if not (part.is_dir() and target.is_dir()):
        os.replace(part, target)
        return
    for old in target.glob("*.png"):
        old.unlink()
    for new in sorted(part.iterdir()):
        os.replace(new, target / new.name)


def _even(height: int, width: int) -> None:
    if height % 2 or width % 2:
        raise InvalidRequest(
            f"{width}x{height} cannot be an mp4.",
            why="H.264 stores colour at half size, so width and height must be even.",
            hint=f"{width + width % 2}x{height + height % 2}, or --out with the ending .webp or .png",
            param="out",
        )


def _no_frames() -> InvalidRequest:
    return InvalidRequest("there are no frames to write.", hint="a clip needs at least one.")


# Reading


def read_video(path: str | Path, *, limit: int | None = None) -> tuple[Frames, float | None]:
    """The frames (at most `limit`) and the frame rate of any clip, or of a folder of pictures (which has no rate)."""
    path = local(path)
    try:
        if path.is_dir():
            pictures = sorted(p for p in path.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
            frames, fps = _within((np.asarray(read_image(p)) for p in pictures[:limit]), path), None
        elif path.suffix.lower() in PICTURES:
            frames, fps = _read_animation(path, limit)
        else:
            frames, fps = _read_stream(path, limit)
        return np.stack(frames), fps
    except VideogenError:
        raise
    except Exception as error:  # decoders raise their own kinds
        raise FileError(
            f"{path} cannot be read as a clip.",
            why=f"{type(error).__name__}: {error}",
            hint="an mp4, gif, webp or folder of PNGs",
        ) from error


def _read_animation(path: Path, limit: int | None) -> tuple[list[np.ndarray], float | None]:
    """By Pillow itself, since imageio does not pass on how long a webp frame lasts."""
    from PIL import ImageSequence

    with open_picture(path) as image:
        count = min(getattr(image, "n_frames", 1), limit or MOST_IN_CLIP)
        _check_size(path, image.width, image.height, count)
        frames, milliseconds = [], 0
        for picture in islice(ImageSequence.Iterator(image), limit):
            frames.append(np.asarray(picture.convert("RGB")))
            milliseconds += picture.info.get("duration", 0)
    return frames, 1000 * len(frames) / milliseconds if milliseconds else None


def _read_stream(path: Path, limit: int | None) -> tuple[list[np.ndarray], float | None]:
    with open_clip(path) as file:
        stream = file.streams.video[0]
        count = stream.frames or int((file.duration or 0) / 1e6 * float(stream.guessed_rate or 0)) or 1
        _check_size(path, stream.width, stream.height, min(count, limit or count))
        pictures = (_upright(frame) for frame in islice(file.decode(video=0), limit))
        return _within(pictures, path), float(stream.guessed_rate) if stream.guessed_rate else None


@contextlib.contextmanager
def stream_video(path: str | Path) -> Iterator[tuple[float | None, int, Iterator[UInt8[np.ndarray, "_H _W 3"]]]]:
    """The frame rate of a clip, how many frames its header promises (0: it does not say), and the frames one by one,
    upright: a long clip takes no more memory than a short one. Animations and folders of pictures are read whole.

    Stricter than `read_video`: what the decoder finds damaged is an error, and is not painted over.
    """
    path = local(path)
    if path.is_dir() or path.suffix.lower() in PICTURES:
        frames, fps = read_video(path)
        yield fps, len(frames), iter(frames)
        return
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_clip(path))
            stream = file.streams.video[0]
            stream.codec_context.options = {"err_detect": "explode"}
            _check_size(path, stream.width, stream.height, 1)
            rate = float(stream.guessed_rate) if stream.guessed_rate else None
        except VideogenError:
            raise
        except Exception as error:
            raise FileError(f"{path} cannot be read as a clip.", why=f"{type(error).__name__}: {error}") from error
        yield rate, stream.frames, _upright_frames(file, path)


def _upright_frames(file: Any, path: Path) -> Iterator[np.ndarray]:
    try:
        for frame in file.decode(video=0):
            _check_size(path, frame.width, frame.height, 1)
            if frame.is_corrupt:
                raise ValueError("a frame is damaged")
            yield _upright(frame)
    except VideogenError:
        raise
    except Exception as error:  # decoders raise their own kinds
        raise FileError(f"{path} cannot be read as a clip.", why=f"{type(error).__name__}: {error}") from error


def _upright(frame: Any) -> UInt8[np.ndarray, "_H _W 3"]:
    """A decoded frame as people see it: phones store how they were held."""
    picture = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90))) if frame.rotation else picture


def clip_facts(path: str | Path) -> dict[str, Any]:
    """Width, height, number of frames and rate of a clip, decoded picture by picture: a long one takes no memory."""
    path = local(path)
    if path.is_dir() or path.suffix.lower() in PICTURES:
        frames, fps = read_video(path)
        count, height, width = frames.shape[:3]
        return {"width": width, "height": height, "num_frames": count, "fps": fps}
    try:
        with open_clip(path) as file:
            stream = file.streams.video[0]
            _check_size(path, stream.width, stream.height, 1)
            count, turned = 0, False
            for frame in file.decode(video=0):
                count, turned = count + 1, round(frame.rotation / 90) % 2 == 1
            width, height = (stream.height, stream.width) if turned else (stream.width, stream.height)
            rate = float(stream.guessed_rate) if stream.guessed_rate else None
            return {"width": width, "height": height, "num_frames": count, "fps": rate}
    except VideogenError:
        raise
    except Exception as error:
        raise FileError(f"{path} cannot be read as a clip.", why=f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def open_clip(path: Path) -> Iterator[Any]:
    """A clip with PyAV, of `CLIP_KINDS` and `CODECS` only: no playlist, pattern of names or protocol is understood."""
    import av

    options = {"protocol_whitelist": "file", "format_whitelist": CLIP_KINDS}
    with av.open(f"file:{path.absolute()}", options=options) as file:
        for stream in file.streams.video:
            if stream.codec_context.codec.canonical_name not in CODECS:
                raise FileError(
                    f"{path} has video of kind {stream.codec_context.codec.canonical_name}.",
                    why="only usual kinds of video are decoded.",
                    hint="an mp4 with H.264.",
                )
        yield file


@contextlib.contextmanager
def open_picture(path: Path) -> Iterator[Any]:
    """A picture with Pillow, of `PICTURE_KINDS` and no larger than `MOST_PIXELS`; only its header is read yet."""
    from PIL import Image

    try:
        image = Image.open(path, formats=PICTURE_KINDS)
    except Image.DecompressionBombError as error:
        raise _too_large(path) from error
    with image:
        _check_size(path, image.width, image.height, 1)
        yield image


def _check_size(path: Path, width: int, height: int, count: int) -> None:
    pixels = width * height
    if pixels > MOST_PIXELS or (count > 1 and (pixels > MOST_IN_FRAME or pixels * count > MOST_IN_CLIP)):
        raise _too_large(path)


def _too_large(path: Path) -> FileError:
    return FileError(
        f"{path} is too large.",
        why=f"at most {MOST_PIXELS // 10**6} megapixels in a picture, {MOST_IN_FRAME // 10**6} in a frame of a clip, "
        f"{MOST_IN_CLIP // 10**6} in all of its frames.",
        hint="make it smaller, or cut it.",
    )


def _within(pictures: Iterable[np.ndarray], path: Path) -> list[np.ndarray]:
    """The list of them, given up as soon as it is too large: what a header says need not be true."""
    frames, pixels = [], 0
    for picture in pictures:
        pixels += picture.shape[0] * picture.shape[1]
        if pixels > MOST_IN_CLIP:
            raise _too_large(path)
        frames.append(picture)
    return frames


def read_recipe(path: str | Path) -> dict[str, Any] | None:
    """The settings embedded in a clip by `write_video`, or None if it carries none."""
    path = local(path)
    if path.is_dir():
        path = next(iter(sorted(path.glob("*.png"))), path)
    try:
        texts = _texts(path)
    except Exception as error:
        raise FileError(f"{path} cannot be read as a clip.", why=f"{type(error).__name__}: {error}") from error
    for text in texts:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            recipe = json.loads(text) if len(text) <= RECIPE_LIMIT else None
            if isinstance(recipe, dict):
                return recipe
    return None


def _texts(path: Path) -> list[Any]:
    """Where a recipe may be, best first."""
    if path.suffix.lower() in PICTURES:
        with open_picture(path) as image:
            return [image.info.get("videogen"), image.info.get("comment"), image.getexif().get(DESCRIPTION)]
    with open_clip(path) as file:
        return [file.metadata.get("videogen"), file.metadata.get("comment")]


# Images


def read_image(image: Any) -> Any:
    """A path, PIL image, array `[H, W, 3]` or tensor `[3, H, W]` as an RGB `PIL.Image`.

    Turned as its EXIF tag says; transparency is laid on white; 16 bits become 8. Floats are in [0, 1] and rounded.
    Raises FileError for a file or PIL image that cannot be decoded, InvalidRequest for an array of another kind.
    """
    from PIL import Image

    if not isinstance(image, str | Path | Image.Image):
        return Image.fromarray(to_uint8(_array(image)))
    path = local(image) if isinstance(image, str | Path) else None
    try:
        if path is None:
            return _rgb(image)
        with open_picture(path) as file:
            return _rgb(file)
    except VideogenError:
        raise
    except Exception as error:  # decoders raise their own kinds
        raise FileError(
            f"{path or 'a picture'} cannot be read as an image.", why=str(error), hint="a PNG, JPEG or WebP file."
        ) from error


def _rgb(image: Any) -> Any:
    """A PIL image as people see it: upright, on white, 8 bits a colour."""
    from PIL import Image, ImageOps

    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):  # which Pillow would clamp to 255, nearly all white
        values = np.asarray(image).astype(np.float32) * (1 if image.mode == "F" else 1 / 65535)
        image = Image.fromarray(to_uint8(np.stack([values] * 3, axis=-1)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit_image(image: Any, height: int, width: int, fit: str = "crop") -> Float[np.ndarray, "3 H W"]:
    """An image at the size of the clip, float32 in [-1, 1].

    `crop` fills the frame and cuts what sticks out, `pad` fits inside and adds black, `stretch` ignores the aspect (and
    is diffusers' own way). Lanczos throughout. A float array or tensor that has the size already is not rounded.
    """
    from PIL import Image, ImageOps

    pixels = _array(image) if hasattr(image, "shape") else None
    if pixels is not None and pixels.shape[:2] == (height, width) and pixels.dtype != np.uint8:
        if not np.isfinite(pixels).all():
            raise InvalidRequest(
                "an image has NaN or Inf.", why="pixels are numbers in [0, 1].", hint="check the array."
            )
        return np.ascontiguousarray(2 * pixels.transpose(2, 0, 1) - 1, dtype=np.float32)
    picture, size = read_image(image), (width, height)
    if fit == "stretch":
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    elif fit == "pad":
        picture = ImageOps.pad(picture, size, Image.Resampling.LANCZOS, color="black")
    else:
        picture = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    pixels = np.asarray(picture).astype(np.float32) / 255
    return np.ascontiguousarray(2 * pixels.transpose(2, 0, 1) - 1)


def _array(image: Any) -> np.ndarray:
    """An array `[H, W, 3]` or tensor `[3, H, W]` as an array `[H, W, 3]`."""
    array = image
    if hasattr(image, "detach"):
        tensor = image.detach().cpu()
        tensor = tensor.double() if tensor.is_floating_point() else tensor  # numpy has no bfloat16
        array = np.moveaxis(tensor.numpy(), 0, -1) if tensor.ndim == 3 else tensor.numpy()
    if array.ndim != 3 or array.shape[-1] != 3 or not (array.dtype == np.uint8 or array.dtype.kind == "f"):
        raise InvalidRequest(
            f"an image of shape {list(image.shape)} and type {image.dtype} cannot be used.",
            why="an array is [height, width, 3], a tensor [3, height, width]; uint8, or float in [0, 1].",
            hint="give a path or a PIL image.",
        )
    return array
