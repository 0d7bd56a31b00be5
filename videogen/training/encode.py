"""Clips to a cache that `cached_examples` reads: moments by the VAE, then embeddings by the text encoder.

One encoder is in memory at a time, and only if something is missing: entries are addressed by what made them, so a run
that was stopped goes on, another caption costs one embedding, and another VAE or size is never mistaken for this one.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from videogen.data.cache import (
    CacheFacts,
    Row,
    Window,
    entry,
    read_json,
    sweep,
    text_key,
    write_entry,
    write_facts,
    write_manifest,
)
from videogen.data.files import sha256_of
from videogen.data.manifest import key_of, write_json
from videogen.data.sources import Dropped, Sample, samples
from videogen.data.windows import Cut, windows
from videogen.errors import FileError, InvalidRequest, NumericalError
from videogen.models.text import count_tokens
from videogen.models.vae import VAE
from videogen.training.cached import ABSENT
from videogen.weights.card import Card
from videogen.weights.diffusers import hashes
from videogen.weights.header import read_shapes
from videogen.weights.single import file_parts, load_parts

TEXT_BATCH = 8
UNUSABLE = {FileError: "unreadable", InvalidRequest: "too short", NumericalError: "not finite"}


@dataclass
class CacheReport:
    """What a run did. `dropped` are names with reasons; `long_captions` counts those the model does not read whole."""

    clips: int = 0
    windows: int = 0
    encoded: int = 0  # windows, in this run; the others were there
    embedded: int = 0  # captions, in this run
    captions: int = 0
    without_caption: int = 0
    long_captions: int = 0
    dropped: list[Dropped] = field(default_factory=list)

    @property
    def reasons(self) -> dict[str, int]:
        return dict(Counter(one.reason for one in self.dropped).most_common())


def make_cache(
    source: str,
    card: Card,
    folder: str | Path,
    cut: Cut,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    words: bool = False,
    frame_latents: bool | None = None,
    quarantine: Mapping[str, str] | None = None,
    cuts: Mapping[str, list[int]] | None = None,
    share: tuple[int, int] = (0, 1),
    say: Callable[[str], object] = lambda line: None,
) -> CacheReport:
    """Encode what `folder` lacks of a source (`videogen.data.sources`), and write its manifest.

    words          keep captions as words, for trainings that have a text encoder of their own
    frame_latents  each latent frame's picture encoded alone, for conditions on frames; None: if the model has those
    quarantine     names that are left out, with the reason
    cuts           name -> frames that begin a new scene
    share          (this process, of how many): each encodes its part of the clips, and all but a single one leave the
                   captions and the manifest to a last run without it, which finds everything made

    A clip that cannot be read is left out and reported; an error of the disk ends the run.
    """
    folder, say_every = Path(folder), 100
    device, report, rank, world = torch.device(device), CacheReport(), *share
    if not 0 <= rank < world:
        raise InvalidRequest(f"there is no share {rank} of {world}.", why="they count from 0.", param="share")
    frame_latents = card.layout == "frames" if frame_latents is None else frame_latents
    facts = CacheFacts(
        model=card.name,
        vae=encoder_hash(card, "vae", dtype),
        text="" if words else encoder_hash(card, "text_encoder", dtype),
        scale=card.vae.scaling_factor,
        frame_scale=card.vae.scaling_factor ** (-1 if card.vae.invert_scale_latents else 1),
        made_for=asdict(cut) | {"frame_latents": frame_latents},
    )
    encoder = Encoder(card, folder, cut, facts, frame_latents, dtype, device)
    rows: list[Row] = []
    for index, sample in enumerate(samples(source)):
        if isinstance(sample, Dropped) or sample.name in (quarantine or {}):
            known = (quarantine or {}).get(sample.name, "")
            report.dropped.append(sample if isinstance(sample, Dropped) else Dropped(sample.name, "quarantined", known))
            continue
        if index % world != rank:
            continue
        try:
            found, made = encoder.windows(sample, sorted((cuts or {}).get(sample.name, [])))
        except tuple(UNUSABLE) as error:  # of the clip; one of the disk is an OSError
            report.dropped.append(Dropped(sample.name, UNUSABLE[type(error)], f"{error.what} {error.why}".strip()))
            continue
        rows += [Row(**vars(window), captions=sample.captions) for window in found]
        report.clips, report.encoded = report.clips + 1, report.encoded + made
        report.without_caption += not sample.captions
        if report.clips % say_every == 0:
            say(f"{report.clips} clips, {len(rows)} windows, {report.encoded} encoded now")
    report.windows = len(rows)
    encoder.close()
    if world > 1:
        say(f"share {rank} of {world} is encoded; run once more without shares for the captions and the manifest")
        return report
    if not rows:
        raise InvalidRequest(
            f"nothing in {source} can be trained on.",
            why="; ".join(f"{name}: {count}" for name, count in report.reasons.items()) or "it is empty.",
            hint=f"videogen data check {source}",
        )
    if not words:
        embed(card, folder, rows, facts, dtype, device, report)
    write_facts(folder, facts)
    write_manifest(folder, rows)
    sweep(folder)
    return report


class Encoder:
    """The VAE, opened for the first window that is missing, and the entries it makes."""

    def __init__(
        self,
        card: Card,
        folder: Path,
        cut: Cut,
        facts: CacheFacts,
        frame_latents: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.card, self.folder, self.cut = card, folder, cut
        self.frame_latents, self.dtype, self.device = frame_latents, dtype, device
        self.made_with = [facts.vae, frame_latents]
        self.vae: VAE | None = None

    def windows(self, sample: Sample, cuts: list[int]) -> tuple[list[Window], int]:
        """The windows of a clip, and how many of them were encoded now."""
        sha = sample.sha256()
        index = entry(self.folder, "latents", key_of(sha, asdict(self.cut), cuts, sample.fps, self.made_with), ".json")
        if index.is_file():
            told_of = _windows_told(index)
            found = [self._window(sample, sha, number, told) for number, told in enumerate(told_of)]
            if found and all(entry(self.folder, "latents", window.latents).is_file() for window in found):
                return found, 0
        listed, made = [], 0
        for window in windows(sample, self.cut, cuts=cuts):
            frames, _, height, width = window.pixels.shape
            told: dict[str, Any] = {"start": window.start, "num_frames": frames, "fps": window.fps}
            key = key_of(sha, told, height, width, self.cut.fit, self.made_with)
            path = entry(self.folder, "latents", key)
            if not path.is_file():
                write_entry(path, self.encode(torch.from_numpy(window.pixels)))
                made += 1
            shapes = read_shapes([path])
            f, c, h, w = shapes["mean"]
            told |= {"latents": key, "shape": [f, h, w], "channels": c, "frame_latents": "frame_mean" in shapes}
            listed.append(told)
        write_json(index, {"windows": listed})
        return [self._window(sample, sha, number, told) for number, told in enumerate(listed)], made

    def _window(self, sample: Sample, sha: str, number: int, told: dict[str, Any]) -> Window:
        name = sample.name if number == 0 else f"{sample.name}#{number}"
        values: dict[str, Any] = told | {"shape": tuple(told["shape"])}
        return Window(name=name, clip=sample.name, sha256=sha, **values)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """Moments [f, c, h, w] of a window [F, 3, H, W], and of the pictures that its latent frames end with."""
        if self.vae is None:
            vae = load_parts(self.card, components=("vae",), device=str(self.device), dtype=self.dtype).vae
            assert vae is not None
            vae.config = self.card.vae  # with what the card tells of its use
            self.vae = vae.eval()
        clip = rearrange(pixels, "F c H W -> 1 c F H W").to(self.device, self.dtype)
        found = {"": self.vae.moments(clip)}
        shown = clip[:, :, :: int(self.card.vae.temporal_compression_ratio)]
        if self.frame_latents and shown.shape[2] == found[""][0].shape[2]:
            stills = [self.vae.moments(still) for still in shown.split(1, dim=2)]
            found["frame_"] = torch.cat([s[0] for s in stills], 2), torch.cat([s[1] for s in stills], 2)
        tensors = {
            f"{part}{name}": rearrange(value, "1 c f h w -> f c h w")
            for part, moments in found.items()
            for name, value in zip(("mean", "logvar"), moments, strict=True)
        }
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise NumericalError("its latents are not finite.", why=f"the VAE overflows in {self.dtype}.")
        return tensors

    def close(self) -> None:
        self.vae = None
        _free(self.device)


def _windows_told(index: Path) -> list[dict[str, Any]]:
    """What an index says of a clip's windows; nothing if it is damaged: it is then made again."""
    try:
        return read_json(index)["windows"]
    except (FileError, InvalidRequest, KeyError):
        return []


@torch.no_grad()
def embed(
    card: Card,
    folder: Path,
    rows: list[Row],
    facts: CacheFacts,
    dtype: torch.dtype,
    device: torch.device,
    report: CacheReport,
) -> None:
    """The embeddings of all captions that are missing, and of no caption."""
    texts = dict.fromkeys([ABSENT, *(caption.text for row in rows for caption in row.captions)])
    missing = [text for text in texts if not _text_entry(folder, text, facts).is_file()]
    report.captions = len(texts) - 1
    if missing:
        encoder = load_parts(card, components=("text_encoder",), device=str(device), dtype=dtype).text_encoder
        assert encoder is not None
        for start in range(0, len(missing), TEXT_BATCH):
            batch = missing[start : start + TEXT_BATCH]
            for text, embedding in zip(batch, encoder.eval()(batch), strict=True):
                if not bool(torch.isfinite(embedding).all()):
                    raise NumericalError(
                        f"the embedding of {text[:60]!r} is not finite.",
                        why=f"the text encoder overflows in {dtype}.",
                        hint="--dtype bfloat16 or float32",
                    )
                write_entry(_text_entry(folder, text, facts), {"embedding": embedding.clone()})
            report.long_captions += sum(count_tokens(encoder.tokenizer, text) > encoder.max_length for text in batch)
        report.embedded = len(missing)
        del encoder
        _free(device)


def _text_entry(folder: Path, text: str, facts: CacheFacts) -> Path:
    return entry(folder, "text", text_key(text, facts.text))


def encoder_hash(card: Card, part: str, dtype: torch.dtype) -> str:
    """Of the files of a part of a model, the type it computes in and the settings that it is used with."""
    if card.file is not None and part in file_parts(card):
        files = {"": sha256_of(card.file)}
    else:
        names = (part, "tokenizer") if part == "text_encoder" else (part,)
        files = {f"{name}/{file}": sha for name in names for file, sha in hashes(card.folder / name).items()}
    use = asdict(card.vae) if part == "vae" else {"max_length": card.max_sequence_length}
    return key_of(part, files, str(dtype), use)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
