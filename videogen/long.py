"""Clips that go on: `extend` makes new pieces, each told how the one before it ended, and joins them. Imports no torch.

What a model takes decides how it is told: an inpainting model the whole overlap, one with key frames every fourth frame
of it, one with a first frame that frame alone. Frames are encoded anew: a file holds no latents, and the models were
trained on pictures encoded alone. Each piece knows only the end of the one before, so over many the look drifts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from videogen.checks import bad, is_int, require
from videogen.data.video import Video
from videogen.recipe import without_images
from videogen.request import Request
from videogen.weights.card import Card

if TYPE_CHECKING:
    from videogen.pipeline import Pipeline

Frames = UInt8[np.ndarray, "_F H W 3"]
OVERLAP = 5  # frames: two latent ones, so that a model is told where things are and how they move


@dataclass(frozen=True)
class Extension:
    """How a clip goes on: pieces of `length` frames, of which the first `overlap` are the last of what is there."""

    length: int
    overlap: int
    added: int  # frames, all together

    @property
    def pieces(self) -> int:
        return math.ceil(self.added / (self.length - self.overlap))


def plan_extension(card: Card, clip: Frames, *, num_frames: int | None = None, overlap: int | None = None) -> Extension:
    """What this model can do for the clip, or an InvalidRequest before anything is loaded.

    num_frames  how many to add; None: as many as one piece adds
    overlap     how many of the clip's last frames a piece begins with; None: 5, or 1 for models with a first frame only
    """
    require(card, "first_frame", param="clip")
    length = card.num_frames
    if overlap is None:
        overlap = OVERLAP if {"mask", "keyframes"} & set(card.conditions) else 1
    most = min(length - 1, len(clip))
    if not is_int(overlap) or not 1 <= overlap <= most:
        raise bad("overlap", overlap, f"a number of frames from 1 to {most}", f"--overlap {min(OVERLAP, most)}")
    if num_frames is None:
        num_frames = length - overlap
    if not is_int(num_frames) or num_frames < 1:
        raise bad("num_frames", num_frames, "how many frames to add, 1 or more", f"--frames {length - overlap}")
    return Extension(length, overlap, num_frames)


def piece(card: Card, before: Frames, plan: Extension, **keywords: Any) -> Request:
    """The request for a clip that goes on after these frames; `keywords` are further fields of Request."""
    known, (_, height, width, _) = before[-plan.overlap :], before.shape
    told: dict[str, Any] = {"first_frame": known[0]}
    if "mask" in card.conditions:
        video = np.concatenate([known, np.repeat(known[-1:], plan.length - plan.overlap, axis=0)])
        mask = np.zeros(video.shape[:3], np.uint8)
        mask[plan.overlap :] = 255
        told = {"video": video, "mask": mask, "strength": 1.0}
    elif "keyframes" in card.conditions and plan.overlap > 4:
        told["keyframes"] = {k: known[k] for k in range(4, plan.overlap, 4)}
    size = {"height": height, "width": width, "num_frames": plan.length}
    return Request(keywords.pop("prompt", ""), **told, **size, **keywords)


def joined(before: Frames, after: Frames, overlap: int) -> Frames:
    """Both clips as one, the last frames of the first faded into the first of the second: old · (1 - k/n) + new · k/n.

    >>> joined(np.full((3, 1, 1, 3), 0, np.uint8), np.full((3, 1, 1, 3), 100, np.uint8), 2)[:, 0, 0, 0].tolist()
    [0, 0, 50, 100]
    """
    share = (np.arange(overlap) / overlap)[:, None, None, None]
    mixed = before[-overlap:] * (1 - share) + after[:overlap] * share
    return np.concatenate([before[:-overlap], mixed.round().astype(np.uint8), after[overlap:]])


def extend(
    pipe: Pipeline,
    clip: Video,
    prompt: str = "",
    *,
    num_frames: int | None = None,
    overlap: int | None = None,
    seed: int = 0,
    parent: str | None = None,
    **keywords: Any,
) -> Video:
    """The clip with more frames, at its own rate. Every frame before the overlap is as it was.

    num_frames, overlap  as in `plan_extension`; several pieces have the seeds s, s + 1, …
    parent               sha256 of the clip's file, for the recipe
    keywords             of `Request`, for each piece

    What ends it after the first piece carries the clip so far as `video`.
    """
    plan = plan_extension(pipe.card, clip.frames, num_frames=num_frames, overlap=overlap)
    frames, settings = clip.frames, []

    def so_far() -> Video:
        extends = {"frames": len(clip.frames), "overlap": plan.overlap, "pieces": settings}
        extends |= {"sha256": parent} if parent else {}
        facts = {name: settings[0][name] for name in ("videogen", "model", "weights", "dtype") if name in settings[0]}
        told = {**facts, "prompt": prompt, "seed": seed, "extends": extends}
        return Video(frames[: len(clip.frames) + plan.added], clip.fps, seed, told)

    for k in range(plan.pieces):
        request = piece(pipe.card, frames, plan, prompt=prompt, seed=seed + k, **keywords)
        try:
            made = pipe.generate(**vars(request))
        except BaseException as error:
            if settings:
                setattr(error, "video", so_far())  # noqa: B010  (for Python; any kind of error)
            raise
        frames = joined(frames, made.frames, plan.overlap)
        settings.append(without_images(made.settings))
    return so_far()
