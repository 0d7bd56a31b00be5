"""A finished clip made ready to show: another frame rate, a music track, another format. No model; imports no torch.

FFmpeg's filters do the work, through PyAV. What was done is added to the clip's recipe, under `post`.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from videogen.data.files import check_output, local, sha256_of
from videogen.data.video import open_clip, read_recipe, read_video, tags, write_video, written_whole
from videogen.errors import FileError, InvalidRequest

RATE = 48_000  # samples per second
PEAK, RANGE = -1.5, 11  # dB true peak and LU that loudnorm keeps to
SOUND_KINDS = "mp3,wav,flac,ogg,aac,aiff,mov,matroska,webm"
SOUND_CODECS = ("aac", "mp3", "mp3float", "flac", "vorbis", "opus", "libopus", "libvorbis", "alac")  # and pcm_*
LONGEST = 3600  # seconds of sound
QUIET = 1e-4  # amplitude: below -80 dB there is nothing to bring to a loudness
LOOKAHEAD = 4  # frames minterpolate keeps back at the end: the last one, repeated, goes in its place


def post(
    clip: str | Path,
    out: str | Path,
    *,
    fps: float | int | None = None,
    music: str | Path | None = None,
    fade: float | int = 0.5,
    loudness: float | int = -16,
    loop: int = 0,
    crf: int = 17,
    metadata: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write `clip` again as `out` (.mp4, .gif, .webp or .png frames), and return where it is.

    fps       frames per second of `out`, as long as before: frames between are made from the motion of their neighbours
    music     a sound file, repeated or cut to the clip's length, mp4 only; in place of any sound the clip has
    fade      seconds in which the music comes and goes, at most half the clip each
    loudness  of the music in LUFS (EBU R 128)
    loop      how often gif and webp play, 0 for ever

    An mp4 whose frames stay the same is not encoded again. Raises InvalidRequest or FileError before any work is done.
    """
    clip, out = local(clip, param="clip"), Path(out)
    target, suffix = check_output(out, overwrite=overwrite), out.suffix.lower()
    _check(clip, target, suffix, fps, music, fade, loudness, loop)
    recipe = read_recipe(clip) or {}
    made = recipe | {"post": [*_list(recipe.get("post")), _said(clip, suffix, fps, music, fade, loudness)]}
    kept = made if metadata else None
    has_sound = clip.suffix.lower() == ".mp4" and _has_sound(clip)
    with tempfile.TemporaryDirectory() as folder:
        pictures = clip
        if fps is not None or suffix != ".mp4" or clip.suffix.lower() != ".mp4":
            frames, rate = read_video(clip)
            rate = rate or recipe.get("fps")
            if not isinstance(rate, int | float) or not 0.1 <= rate <= 240:
                raise InvalidRequest(
                    f"{clip} has no frame rate." if not rate else f"{clip} has a frame rate of {rate!r:.60}.",
                    why="pictures have none, and their recipe says it as a number from 0.1 to 240.",
                    hint="make it an mp4 first.",
                    param="clip",
                )
            chunks = iter([frames]) if fps is None else between(frames, rate, fps)
            options: dict[str, Any] = {"crf": crf, "loop": loop}
            if suffix != ".mp4" or not (music or has_sound):
                return write_video(out, chunks, fps or rate, recipe=kept, overwrite=overwrite, **options)
            pictures = write_video(Path(folder) / "pictures.mp4", chunks, fps or rate, **options)
        sound = prepared(music, _seconds(pictures), fade, loudness) if music else None
        with written_whole(out, overwrite=overwrite) as part:
            _join(part, pictures, sound, clip if has_sound else None, tags(kept))
    return target


def between(
    frames: UInt8[np.ndarray, "F H W 3"], fps: float | int, new: float | int
) -> Iterator[UInt8[np.ndarray, "1 H W 3"]]:
    """The clip at another rate and of the same length, a frame at a time: FFmpeg's minterpolate.

    Motion is searched in blocks of 8 pixels (16, the filter's own, are 1 to 4 dB worse on clips of the bundled model),
    and no cut is looked for. A frame at a time of the old clip is the old frame, up to the rounding of its colours.
    """
    import av
    from av.filter import Graph

    old_rate, new_rate = (Fraction(rate).limit_denominator(1001) for rate in (fps, new))
    count, height, width = frames.shape[:3]
    wanted = max(1, round(count * new_rate / old_rate))
    graph = Graph()
    colours = "color_matrix=bt709:{}_range=full"  # there and back by the same table, in full range
    _linked(
        graph,
        graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=1 / old_rate),
        graph.add("scale", "out_" + colours.format("out")),
        graph.add("format", "yuv444p"),
        graph.add("minterpolate", f"fps={new_rate}:mi_mode=mci:mc_mode=aobmc:mb_size=8:scd=none"),
        graph.add("scale", f"in_{colours.format('in')}:out_range=full"),
        graph.add("format", "rgb24"),
        graph.add("buffersink"),
    )
    given = 0
    for index in range(count + LOOKAHEAD + 1):
        if index < count + LOOKAHEAD:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frames[min(index, count - 1)]), format="rgb24")
            frame.pts, frame.time_base = index, 1 / old_rate
            graph.push(frame)
        else:
            graph.push(None)
        for made in _pulled(graph):
            if given < wanted:
                given += 1
                yield made.to_ndarray(format="rgb24")[None]
    if not given:  # a single picture is too little for motion
        yield from np.repeat(frames[:1], wanted, axis=0)[:, None]


def prepared(
    music: str | Path, seconds: float | int, fade: float | int = 0.5, loudness: float | int = -16
) -> Float[np.ndarray, "2 n"]:
    """A sound file as stereo at 48 kHz of exactly this length: repeated or cut, at `loudness` LUFS, faded."""
    wanted = round(seconds * RATE)
    sound = read_sound(music, seconds)
    sound = np.tile(sound, -(-wanted // sound.shape[1]))[:, :wanted]
    if np.abs(sound).max() > QUIET:
        sound = _normalised(sound, loudness)
    ramp = min(round(fade * RATE), wanted // 2)
    if ramp:
        sound = sound.copy()
        rise = np.linspace(0, 1, ramp, endpoint=False, dtype=np.float32)
        sound[:, :ramp] *= rise
        sound[:, -ramp:] *= rise[::-1]
    return sound


def read_sound(path: str | Path, seconds: float | int) -> Float[np.ndarray, "2 n"]:
    """At most the first `seconds` of a file's sound, stereo in [-1, 1] at 48 kHz."""
    import av

    path = local(path, param="music")
    resampler = av.AudioResampler(format="fltp", layout="stereo", rate=RATE)
    parts: list[np.ndarray] = []
    length = 0
    try:
        with _open_sound(path) as file:
            for frame in file.decode(audio=0):
                for piece in resampler.resample(frame):
                    parts.append(piece.to_ndarray())
                    length += parts[-1].shape[1]
                if length >= seconds * RATE:
                    break
            else:
                parts += [piece.to_ndarray() for piece in resampler.resample(None)]
        sound = np.concatenate(parts, axis=1)[:, : round(seconds * RATE)]
        if not sound.size:
            raise ValueError("it holds no sound")
    except (FileError, InvalidRequest):
        raise
    except Exception as error:  # decoders raise their own kinds
        raise _no_music(path, f"{type(error).__name__}: {error}") from error
    return np.nan_to_num(sound).clip(-1, 1)


def _open_sound(path: Path) -> Any:
    """As `open_clip` does for pictures: of known kinds only, no other file or address is opened by it."""
    import av

    options = {"protocol_whitelist": "file", "format_whitelist": SOUND_KINDS}
    try:
        file = av.open(f"file:{path.absolute()}", options=options)
    except av.FFmpegError as error:
        raise _no_music(path, str(error)) from error
    names = [stream.codec_context.codec.canonical_name for stream in file.streams.audio]
    if not names or not (names[0] in SOUND_CODECS or names[0].startswith("pcm_")):
        file.close()
        raise _no_music(path, f"its sound is of kind {names[0]}." if names else "it has no sound at all.")
    return file


def _no_music(path: Path, why: str) -> FileError:
    return FileError(f"{path} cannot be read as music.", why=why, hint="an mp3, wav, flac or m4a file", param="music")


def _normalised(sound: Float[np.ndarray, "2 n"], loudness: float | int) -> Float[np.ndarray, "2 n"]:
    """By FFmpeg's loudnorm (EBU R 128), which works at 192 kHz; as long as before."""
    from av.filter import Graph

    graph = Graph()
    _linked(
        graph,
        graph.add_abuffer(sample_rate=RATE, format="fltp", layout="stereo", time_base=Fraction(1, RATE)),
        graph.add("loudnorm", f"I={loudness}:TP={PEAK}:LRA={RANGE}"),
        graph.add("aresample", str(RATE)),
        graph.add("aformat", "sample_fmts=fltp:channel_layouts=stereo"),
        graph.add("abuffersink"),
    )
    made: list[np.ndarray] = []
    for start in range(0, sound.shape[1], RATE // 10):
        graph.push(_sound_frame(sound[:, start : start + RATE // 10], start))
        made += [frame.to_ndarray() for frame in _pulled(graph)]
    graph.push(None)
    made += [frame.to_ndarray() for frame in _pulled(graph)]
    result = np.concatenate(made, axis=1)[:, : sound.shape[1]]
    return np.pad(result, ((0, 0), (0, sound.shape[1] - result.shape[1])))


def _join(part: Path, pictures: Path, sound: np.ndarray | None, source: Path | None, metadata: dict[str, str]) -> None:
    """An mp4 of the packets of `pictures`, untouched, and of `sound`, or else of the sound packets of `source`."""
    import av

    options = {"movflags": "use_metadata_tags+faststart"}
    with open_clip(pictures) as seen, av.open(part, "w", format="mp4", options=options) as file:
        file.metadata.update(metadata)
        video = file.add_stream_from_template(seen.streams.video[0])
        audio: Any = None
        if sound is not None:
            audio = file.add_stream("aac", rate=RATE)
            audio.layout, audio.bit_rate = "stereo", 192_000
        with contextlib.ExitStack() as stack:
            heard = stack.enter_context(open_clip(source)) if sound is None and source else None
            kept = file.add_stream_from_template(heard.streams.audio[0]) if heard else None
            for packet in seen.demux(video=0):
                if packet.dts is not None:  # the last one is empty: the end
                    packet.stream = video
                    file.mux(packet)
            for packet in heard.demux(audio=0) if heard else ():
                if packet.dts is not None:
                    packet.stream = kept
                    file.mux(packet)
        if sound is not None:
            for start in range(0, sound.shape[1], 1024):
                file.mux(audio.encode(_sound_frame(sound[:, start : start + 1024], start)))
            file.mux(audio.encode(None))


def _sound_frame(samples: Float[np.ndarray, "2 n"], start: int) -> Any:
    import av

    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples, dtype=np.float32), format="fltp", layout="stereo")
    frame.sample_rate, frame.pts, frame.time_base = RATE, start, Fraction(1, RATE)
    return frame


def _linked(graph: Any, *filters: Any) -> None:
    for before, after in itertools.pairwise(filters):
        before.link_to(after)
    graph.configure()


def _pulled(graph: Any) -> Iterator[Any]:
    """What is ready now."""
    import av

    with contextlib.suppress(av.BlockingIOError, av.EOFError):
        while True:
            yield graph.pull()


def _has_sound(clip: Path) -> bool:
    with open_clip(clip) as file:
        return bool(file.streams.audio)


def _seconds(clip: Path) -> float:
    with open_clip(clip) as file:
        stream = file.streams.video[0]
        return float((stream.duration or 0) * stream.time_base) or float(file.duration or 0) / 1e6


def _check(
    clip: Path, target: Path, suffix: str, fps: Any, music: Any, fade: float | int, loudness: float | int, loop: int
) -> None:
    problems = (
        (target.exists() and target.samefile(clip), "out", f"{target} is the clip itself.", "another name."),
        (fps is not None and not 0.1 <= fps <= 240, "fps", f"fps is {fps}.", "--fps 24, from 0.1 to 240."),
        (music and suffix != ".mp4", "music", f"{suffix[1:]} holds no sound.", "--out clip.mp4"),
        (not 0 <= fade <= 60, "fade", f"fade is {fade} seconds.", "--fade 0.5, from 0 to 60."),
        (not -70 <= loudness <= -5, "loudness", f"loudness is {loudness} LUFS.", "--loudness -16, from -70 to -5."),
        (loop < 0, "loop", f"loop is {loop}.", "--loop 0 plays for ever."),
        (loop > 0 and suffix not in (".gif", ".webp"), "loop", f"{suffix[1:]} says not how often it plays.", "a gif."),
    )
    for is_wrong, param, what, hint in problems:
        if is_wrong:
            raise InvalidRequest(what, why="so it cannot be made.", hint=hint, param=param)
    if music:
        _open_sound(local(music, param="music")).close()


def _said(clip: Path, suffix: str, fps: Any, music: Any, fade: Any, loudness: Any) -> dict[str, Any]:
    """What was done, for the recipe: files by their sha256."""
    said: dict[str, Any] = {"format": suffix[1:]}
    said |= {"fps": fps, "method": "minterpolate"} if fps is not None else {}
    if music:
        said |= {"music": f"sha256:{sha256_of(music)}", "fade": fade, "loudness": loudness}
    return said


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
