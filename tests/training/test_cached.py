"""A cache is the clips: what it gives is what encoding on the fly gives, and every entry is made once."""

import gc
import json
import os
import shutil
import weakref

import numpy as np
import pytest
import torch

from videogen.data.cache import entry, read_facts, text_key
from videogen.data.manifest import Caption
from videogen.data.video import write_video
from videogen.data.windows import Cut
from videogen.data.world import clip
from videogen.errors import FileError, InvalidRequest
from videogen.testing import tiny_pipeline
from videogen.training import encode
from videogen.training.cached import cached_examples, draw_caption
from videogen.training.draws import draw_noise, draws
from videogen.training.encode import make_cache
from videogen.training.examples import Examples
from videogen.weights.card import read_card

CUT = Cut(lengths=(9,), sizes=((16, 16),), rate=8)
CLIPS = {"a": 9, "b": 20, "c": 9, "short": 5}


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    return read_card(tiny_pipeline().save(tmp_path_factory.mktemp("model") / "m"))


@pytest.fixture(scope="module")
def made(card, tmp_path_factory):
    """Clips, and a cache of them."""
    folder = tmp_path_factory.mktemp("made")
    for index, (name, count) in enumerate(CLIPS.items()):
        write_video(folder / "clips" / f"{name}.mp4", clip(index, num_frames=count, height=40, width=48)[1], 8)
    words(folder / "clips", {name: f"a clip {name}" for name in CLIPS})
    report = make_cache(str(folder / "clips"), card, folder / "cache", CUT)
    assert (report.clips, report.windows, report.encoded, report.embedded) == (3, 4, 4, 4)  # and of no words
    assert report.reasons == {"too short": 1}
    return folder


@pytest.fixture
def source(made, tmp_path):
    return shutil.copytree(made / "clips", tmp_path / "clips")


def words(folder, texts):
    rows = [json.dumps({"file_name": f"{name}.mp4", "text": text}) for name, text in texts.items()]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def cached(made, tmp_path):
    return shutil.copytree(made / "cache", tmp_path / "cache")


def test_cached_is_encoded_on_the_fly(cached, source, card):
    """Bit for bit: the same clip read, fitted and encoded by the pipeline's parts, with the same random numbers."""
    from videogen.conditioning.frames import encode_frames
    from videogen.data.video import fit_image, read_video
    from videogen.weights.diffusers import load_folder

    examples = cached_examples(cached)
    assert isinstance(examples, Examples)
    assert [examples.name(i) for i in range(len(examples))] == ["a.mp4", "b.mp4", "b.mp4#1", "c.mp4"]
    parts = load_folder(card.folder, dtype=torch.float32)
    assert parts.vae is not None
    assert parts.text_encoder is not None
    frames = read_video(source / "b.mp4")[0][9:18]
    pixels = torch.from_numpy(np.stack([fit_image(frame, 16, 16) for frame in frames], axis=1))[None]
    example = examples.read(2, draws(0, 0, "b.mp4#1", "caption"))
    assert tuple(examples.shape(2)) == (example.latents.shape[0], *example.latents.shape[2:]) == (3, 2, 2)
    assert example.fps == 8

    rng = draws(0, 0, "b.mp4#1", "caption")
    rng.random()
    with torch.no_grad():
        mean, logvar = (x[0].movedim(1, 0) for x in parts.vae.moments(pixels))
        latents = (mean + torch.exp(0.5 * logvar) * draw_noise(rng, mean.shape)) * card.vae.scaling_factor
        told = pixels[0].movedim(1, 0)[::4]
        mode = encode_frames(parts.vae, told, [None] * 3)
        spread = torch.cat([parts.vae.moments(one[None, :, None])[1][:, :, 0] for one in told])
        stills = mode + torch.exp(0.5 * spread) * draw_noise(rng, mean.shape) * card.vae.scaling_factor
        embedding = parts.text_encoder(["a clip b"])[0]
    assert torch.equal(example.latents, latents)
    assert torch.equal(example.text, embedding)
    assert example.frame_latents is not None
    assert torch.allclose(example.frame_latents, stills, atol=1e-6)
    assert torch.equal(examples.text(""), parts.text_encoder([""])[0])


def test_one_caption_costs_one_embedding(cached, source, card):
    words(source, {name: "another" if name == "c" else f"a clip {name}" for name in CLIPS})
    report = make_cache(str(source), card, cached, CUT)
    assert (report.encoded, report.embedded, report.windows) == (0, 1, 4)
    example = cached_examples(cached).read(3, draws(0, 0, "c", ""))
    assert not torch.equal(example.text, cached_examples(cached).text(""))


def test_another_length_or_vae_is_another_entry_and_the_same_window_is_not(cached, source, card, tmp_path):
    assert make_cache(str(source), card, cached, Cut(lengths=(9, 1), sizes=((16, 16),), rate=8)).encoded == 0
    assert make_cache(str(source), card, cached, Cut(lengths=(17,), sizes=((16, 16),), rate=8)).encoded == 1
    assert make_cache(str(source), card, cached, CUT, frame_latents=False).encoded == 4
    assert not any(row.frame_latents for row in cached_examples(cached).rows)
    other = read_card(tiny_pipeline(seed=1).save(tmp_path / "other"))
    report = make_cache(str(source), other, cached, CUT)
    assert (report.encoded, report.embedded) == (4, 4)
    assert make_cache(str(source), card, cached, CUT).encoded == 0  # nothing was replaced


def test_a_stopped_run_goes_on_and_one_encoder_is_in_memory(source, card, tmp_path, monkeypatch):
    alive, encoded = [], []
    load, original = encode.load_parts, encode.Encoder.encode

    def loaded(*args, **options):
        gc.collect()
        assert not any(one() for one in alive), "another encoder is still in memory"
        parts = load(*args, **options)
        alive.append(weakref.ref(parts.vae or parts.text_encoder))
        return parts

    def stopped(self, pixels):
        encoded.append(1)
        if len(encoded) == 3:  # between the two windows of one clip
            raise KeyboardInterrupt
        return original(self, pixels)

    monkeypatch.setattr(encode, "load_parts", loaded)
    monkeypatch.setattr(encode.Encoder, "encode", stopped)
    with pytest.raises(KeyboardInterrupt):
        make_cache(str(source), card, tmp_path / "cache", CUT)
    with pytest.raises(InvalidRequest, match="no cache"):
        cached_examples(tmp_path / "cache")
    alive.clear()
    report = make_cache(str(source), card, tmp_path / "cache", CUT)
    assert report.encoded == 2
    assert len(alive) == 2
    assert not list((tmp_path / "cache").rglob("*.part"))
    again = make_cache(str(source), card, tmp_path / "cache", CUT)
    assert (again.encoded, again.embedded, len(alive)) == (0, 0, 2)  # nothing is missing: nothing is opened


def test_shares_make_the_parts_and_a_last_run_the_manifest(cached, source, card, tmp_path):
    folder = tmp_path / "shared"
    assert sum(make_cache(str(source), card, folder, CUT, share=(rank, 2)).encoded for rank in (1, 0)) == 4
    report = make_cache(str(source), card, folder, CUT)
    assert (report.encoded, report.embedded) == (0, 4)
    assert (folder / "manifest.jsonl").read_text() == (cached / "manifest.jsonl").read_text()


def test_what_a_killed_writer_left_is_swept(cached, source, card):
    old, young = (cached / "latents" / f".{name}.part" for name in ("old", "young"))
    for part in (old, young):
        part.touch()
    os.utime(old, (1, 1))
    make_cache(str(source), card, cached, CUT)
    assert (old.exists(), young.exists()) == (False, True)


def test_what_is_left_out(cached, source, card):
    assert len(cached_examples(cached, quarantine=["b.mp4"])) == 2  # a clip, with all its windows
    assert len(cached_examples(cached, quarantine=["b.mp4#1", "other"])) == 3
    report = make_cache(str(source), card, cached, CUT, quarantine={"a.mp4": "static"}, cuts={"b.mp4": [10]})
    assert report.reasons == {"quarantined": 1, "too short": 1}
    assert [(row.name, row.start) for row in cached_examples(cached).rows] == [
        ("b.mp4", 0),
        ("b.mp4#1", 10),
        ("c.mp4", 0),
    ]
    with pytest.raises(InvalidRequest, match="no examples"):
        cached_examples(cached, quarantine=["b.mp4", "c.mp4"])


def test_parts_are_disjoint_and_whole(cached):
    shares = np.linspace(0.05, 0.95, 19)
    split = 0
    for share in shares:
        try:
            names = [
                {row.clip for row in cached_examples(cached, held_out=share, part=part).rows}
                for part in ("train", "held_out")
            ]
        except InvalidRequest:  # all are on one side
            continue
        assert not names[0] & names[1]
        assert names[0] | names[1] == {"a.mp4", "b.mp4", "c.mp4"}
        split += 1
    assert split


def test_captions_as_words(source, card, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "embed", pytest.fail)
    make_cache(str(source), card, tmp_path / "cache", CUT, words=True)
    examples = cached_examples(tmp_path / "cache")
    assert examples.read(0, draws(0, 0, "", "")).text == "a clip a"
    assert examples.text("") == ""


def test_captions_are_drawn_by_weight_and_leave_the_noise():
    captions = (Caption("short"), Caption("never", weight=0), Caption("long", weight=3))
    rng = np.random.default_rng(0)
    drawn = [draw_caption(captions, rng) for _ in range(4000)]
    assert set(drawn) == {"short", "long"}
    assert abs(drawn.count("long") / 4000 - 0.75) < 2 * np.sqrt(0.75 * 0.25 / 4000)
    rests = []
    for some in ((), captions[:1], captions):
        rng = np.random.default_rng(1)
        draw_caption(some, rng)
        rests.append(rng.random())
    assert len(set(rests)) == 1


def test_damage_is_named(cached):
    examples = cached_examples(cached)
    path = entry(cached, "latents", examples.rows[0].latents)
    whole = path.read_bytes()
    for data in (whole[:-10], b"", whole[:20] + b"x" + whole[21:]):
        path.write_bytes(data)
        with pytest.raises(FileError, match=str(path.name)):
            examples.read(0, draws(0, 0, "", ""))
    path.unlink()
    with pytest.raises(FileError, match=str(path.name)):
        examples.read(0, draws(0, 0, "", ""))


@pytest.mark.parametrize(
    "change",
    [
        {"latents": "../../../etc/passwd"},
        {"shape": [3, 4]},
        {"shape": [3, 4, "6"]},
        {"fps": "8"},
        {"captions": [{"text": 5}]},
        {"captions": [{"text": "x", "weight": -1}]},
        {"captions": [{"text": "x", "weight": 0}]},
        {"extra": 1},
    ],
)
def test_an_edited_manifest_is_refused(cached, change):
    path = cached / "manifest.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | change), *rest]))
    with pytest.raises(InvalidRequest):
        cached_examples(cached).read(0, draws(0, 0, "", ""))


def test_facts_say_what_made_a_cache(cached, card):
    facts = read_facts(cached)
    assert facts.vae == encode.encoder_hash(card, "vae", torch.float32)
    assert facts.vae != encode.encoder_hash(card, "vae", torch.bfloat16)
    assert facts.made_for["lengths"] == [9]
    assert text_key("a", facts.text) != text_key("b", facts.text)


def test_a_damaged_list_of_windows_is_made_again_and_no_clip_is_lost(cached, source, card):
    for index in (cached / "latents").rglob("*.json"):
        index.write_text("{")
    report = make_cache(str(source), card, cached, CUT)
    assert (report.clips, report.windows, report.encoded) == (3, 4, 0)
    assert report.reasons == {"too short": 1}
