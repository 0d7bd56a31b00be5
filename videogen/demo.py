"""`videogen demo`: three clips from the bundled model, checked, with a contact sheet. No downloads, no GPU."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from videogen.data.files import written
from videogen.data.video import Video, read_image, read_recipe, read_video
from videogen.data.world import Scene, Thing, caption, render
from videogen.errors import NumericalError
from videogen.progress import Progress

FOLDER = Path("outputs/demo")


def run(folder: Path = FOLDER) -> list[Path]:
    """Make, check and name text-to-video, first-frame and first+last-frame clips and `contact_sheet.png`."""
    import sys

    from videogen.pipeline import load

    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = load("tiny")
    scene = example_scene()
    truth = render(scene, pipeline.card.num_frames, pipeline.card.height, pipeline.card.width)
    first, last = (_picture(frame, folder / name) for frame, name in ((truth[0], "first.png"), (truth[-1], "last.png")))

    progress = Progress()
    clips = {}
    for name, prompt, images in (
        ("text_to_video", "a small red circle moves right on a navy background", {}),
        ("image_to_video", caption(scene), {"first_frame": first}),
        ("first_and_last_frame", caption(scene), {"first_frame": first, "last_frame": last}),
    ):
        print(f"{name}: {prompt}", file=sys.stderr)
        video = pipeline.generate(prompt, seed=7, on_step=progress, **images)
        progress.close()
        clips[name] = (video, video.save(folder / f"{name}.mp4", overwrite=True))
    for name, (video, path) in clips.items():
        check(video, path)
        if name != "text_to_video":
            _require_near(video.frames[0], first, f"{name}: its first frame")
    _require_near(clips["first_and_last_frame"][0].frames[-1], last, "first_and_last_frame: its last frame")

    sheet = contact_sheet([video for video, _ in clips.values()], folder / "contact_sheet.png")
    paths = [path for _, path in clips.values()] + [sheet]
    print("\n".join(map(str, paths)))
    print(f"made and checked in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return paths


def example_scene() -> Scene:
    """A large yellow ring that moves up a teal ground."""
    ring = Thing(
        colour="yellow", shape="ring", size="large", motion="up", radius=(16, 16), start=(32, 43), end=(32, 21)
    )
    return Scene(background="teal", checkered=False, objects=(ring,))


def check(video: Video, path: Path) -> None:
    """The file holds what was made: frame count, size, rate, recipe, and a picture that is neither flat nor frozen."""
    frames, fps = read_video(path)
    recipe = read_recipe(path) or {}
    facts = {
        "frame count and size": frames.shape == video.frames.shape,
        "frame rate": fps == video.fps,
        "recipe": recipe.get("prompt") == video.settings["prompt"] and recipe.get("seed") == video.seed,
        "contrast": float(video.frames.std()) > 5,
        "motion": float(np.abs(np.diff(video.frames.astype(float), axis=0)).max()) > 20,
        "fidelity of the file": float(np.abs(frames.astype(float) - video.frames).mean()) < 12,
    }
    if wrong := [name for name, right in facts.items() if not right]:
        raise NumericalError(f"{path} failed its check: {', '.join(wrong)}.", hint="videogen doctor")


def contact_sheet(videos: list[Video], path: Path, columns: int = 9, scale: int = 2) -> Path:
    """A PNG with a row of frames for each clip."""
    from PIL import Image

    rows = []
    for video in videos:
        picks = np.linspace(0, len(video.frames) - 1, columns).round().astype(int)
        rows.append(
            np.concatenate(
                [np.pad(f, ((2, 2), (2, 2), (0, 0)), constant_values=255) for f in video.frames[picks]], axis=1
            )
        )
    picture = Image.fromarray(np.concatenate(rows))
    with written(path) as part:
        size = (picture.width * scale, picture.height * scale)
        picture.resize(size, Image.Resampling.NEAREST).save(part, format="PNG")
    return path


def _picture(frame: np.ndarray, path: Path) -> Path:
    from PIL import Image

    Image.fromarray((frame * 255).round().astype(np.uint8)).save(path)
    return path


def _require_near(frame: np.ndarray, image: Path, what: str, limit: float = 15.0) -> None:
    """PSNR of a generated frame to the image it was told, in dB; far above what an unrelated frame reaches."""
    error = np.mean((frame.astype(float) - np.asarray(read_image(image), dtype=float)) ** 2)
    psnr = 10 * np.log10(255**2 / max(error, 1e-9))
    if psnr < limit:
        raise NumericalError(f"{what} is {psnr:.1f} dB from the image given.", why=f"at least {limit} is expected.")
