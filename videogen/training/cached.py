"""Clips that were encoded beforehand (`videogen data cache`) as examples for training."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from videogen.data.cache import CacheFacts, Row, entry, read_entry, read_facts, read_manifest, text_key
from videogen.data.manifest import Caption
from videogen.errors import InvalidRequest
from videogen.training.draws import draw_noise
from videogen.training.examples import Example

ABSENT = ""  # the words of no caption: its embedding is in every cache


class CachedExamples:
    """The windows of a cache (`Examples`). Each reading draws a caption by its weight and samples the posteriors.

    facts  what the cache was made with: compare `vae` and `text` before training another model on it
    """

    def __init__(self, folder: Path, rows: Sequence[Row], facts: CacheFacts) -> None:
        self.folder, self.rows, self.facts = folder, rows, facts

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.rows[index].name

    def shape(self, index: int) -> tuple[int, int, int]:
        f, h, w = self.rows[index].shape
        return f, h, w

    def read(self, index: int, rng: np.random.Generator) -> Example:
        row = self.rows[index]
        text = draw_caption(row.captions, rng)
        parts = ("mean", "logvar", *(("frame_mean", "frame_logvar") if row.frame_latents else ()))
        moments = read_entry(entry(self.folder, "latents", row.latents), parts)
        latents = sample(moments["mean"], moments["logvar"], rng) * self.facts.scale
        frames = None
        if row.frame_latents:
            frames = sample(moments["frame_mean"], moments["frame_logvar"], rng) * self.facts.frame_scale
        return Example(latents, frames, self.text(text), float(row.fps))

    def text(self, words: str) -> str | Float[Tensor, "l e"]:
        """The embedding of a caption of this cache, or of no caption (`text("")`); the words themselves where the cache
        keeps those."""
        if not self.facts.text:
            return words
        return read_entry(entry(self.folder, "text", text_key(words, self.facts.text)), ["embedding"])["embedding"]


def cached_examples(
    folder: str | Path, *, quarantine: Collection[str] = (), held_out: float | int = 0.0, part: str = "train"
) -> CachedExamples:
    """The examples of a cache.

    quarantine  names of windows, or of clips with all their windows, that are left out
    held_out    share of the clips that "train" leaves out and `part="held_out"` has alone: by a hash of the clip's
                contents, so that a copy of a clip is on the same side, and a clip stays there when others are added
    """
    if part not in ("train", "held_out") or not 0 <= held_out < 1:
        raise InvalidRequest(
            f"there is no part {part!r} with {held_out} held out.",
            why="it is train or held_out, and the share from 0 to below 1.",
            param="part",
        )
    folder, out, facts = Path(folder), set(quarantine), read_facts(folder)
    rows = [row for row in read_manifest(folder) if not out & {row.name, row.clip}]
    rows = [row for row in rows if (_place(row.sha256) < held_out) == (part == "held_out")]
    if not rows:
        raise InvalidRequest(
            f"{folder} has no examples for {part}.",
            why=f"with {held_out} held out and {len(out)} names in quarantine.",
            hint="videogen data check CLIPS says what is there.",
        )
    return CachedExamples(folder, rows, facts)


def draw_caption(captions: Sequence[Caption], rng: np.random.Generator) -> str:
    """One of them by weight, or none. One number is drawn however many there are: captions leave the noise as it is."""
    place = rng.random()
    if not captions:
        return ABSENT
    ends = np.cumsum([caption.weight for caption in captions])
    return captions[min(int(np.searchsorted(ends, place * ends[-1], side="right")), len(captions) - 1)].text


def sample(mean: Tensor, logvar: Tensor, rng: np.random.Generator) -> Float[Tensor, "f c h w"]:
    """A draw from the posterior, in float32."""
    return mean.float() + torch.exp(0.5 * logvar.float()) * draw_noise(rng, mean.shape)


def _place(sha256: str) -> float:
    """Where in [0, 1) the contents of a clip fall."""
    return int(hashlib.sha256(f"held out {sha256}".encode()).hexdigest()[:13], 16) / 16**13
