"""`videogen rerun`: bit for bit the frames that were made, from the clip alone; refused where that cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import videogen
from videogen.cli import main
from videogen.data.video import Video, read_recipe, read_video, write_video
from videogen.errors import InvalidRequest
from videogen.pipeline import Pipeline, load
from videogen.recipe import fingerprint, request_of
from videogen.testing import tiny_pipeline
from videogen.weights.card import read_card

STEPS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline().save(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return load(folder)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0)
    for name, size in (("start.png", (70, 50)), ("end.jpg", (48, 32))):
        Image.fromarray(noise.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(name)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def again(clip: Path, folder: Path, *flags: str, out: str = "again.png") -> np.ndarray:
    """The frames that `videogen rerun` makes: PNG keeps them as they are before encoding."""
    assert main(["rerun", str(clip), "--model", str(folder), "--out", out, "--quiet", *flags]) == 0
    return read_video(Path(out).with_suffix(""))[0]


def test_a_clip_from_text(pipe, folder, capsys):
    video = pipe.generate("a red circle", negative_prompt="blue", seed=5, sampler="dpm", guidance_scale=3, **STEPS)
    clip = video.save("a.mp4")
    assert np.array_equal(again(clip, folder), video.frames)
    assert capsys.readouterr().out.split() == ["again"]
    assert {k: v for k, v in (read_recipe("again") or {}).items()} == video.settings, "and it tells the same"


@pytest.mark.parametrize("ending", ["mp4", "gif", "webp", "png"])
def test_from_pictures_that_are_gone(pipe, folder, here, ending):
    """The pictures are in the clip as they were conditioned on: at its size, and lossless."""
    images = {"first_frame": "start.png", "keyframes": {4: Image.open("start.png")}, "last_frame": "end.jpg"}
    video = pipe.generate("a red circle", seed=1, fit="pad", **images, **STEPS)
    clip = video.save(f"a.{ending}")
    for path in ("start.png", "end.jpg"):
        (here / path).unlink()
    assert np.array_equal(again(clip, folder), video.frames)
    recipe = read_recipe("again") or {}
    assert recipe == video.settings, "a clip made again can be made again"
    assert str(here) not in json.dumps(recipe)
    assert np.array_equal(again(Path("again"), folder, out="third.png"), video.frames)


def test_one_of_a_batch(pipe, folder):
    """With one seed for all, the noise of the others comes before; with seeds of their own, the shape still counts."""
    for seed in (3, [3, 4, 5]):
        videos = pipe.generate(["a red circle", "a blue ring", "a bar"], seed=seed, first_frame="start.png", **STEPS)
        for place in (0, 1):
            clip = videos[place].save(f"{place}.webp", overwrite=True)
            frames = again(clip, folder, "--overwrite")
            assert np.array_equal(frames, videos[place].frames), (seed, place)
            request, item = request_of(videos[place].settings)
            assert (request.batch_size, item) == (3, place), "the shape of the batch, which the last bits depend on"
            assert read_recipe("again") == videos[place].settings


def test_as_it_was_run(pipe, folder):
    """The recipe says with how many threads and by which plan: rerun follows, and a flag wins."""
    low = load(folder, memory="low", dtype="bfloat16")
    video = low.generate("a cross", **STEPS)
    made_with = video.settings["made_with"]
    assert (made_with["memory"], made_with["guidance_in_two"]) == ("low", True)
    assert made_with["threads"] == torch.get_num_threads()
    assert set(made_with) <= {
        *("torch", "device", "capability", "threads", "kernel", "compile", "memory", "guidance_in_two"),
    }
    assert np.array_equal(again(video.save("a.mp4"), folder), video.frames)
    again(Path("a.mp4"), folder, "--dtype", "float32", "--memory", "fast", out="other.png")
    recipe = read_recipe("other") or {}
    assert (recipe["dtype"], recipe["made_with"]["memory"]) == ("float32", "fast")


def test_varied(pipe, folder, capsys):
    video = pipe.generate("a red circle", first_frame="start.png", **STEPS)
    clip = video.save("a.mp4")
    wanted = pipe.generate("a blue ring", first_frame="start.png", seed=9, **STEPS)
    assert np.array_equal(again(clip, folder, "--seed", "9", "--prompt", "a blue ring"), wanted.frames)
    assert main(["rerun", str(clip), "--model", str(folder), "--out", "many", "-n", "3", "--seed", "8", "--quiet"]) == 0
    paths = capsys.readouterr().out.split()[1:]
    assert [(read_recipe(path) or {})["seed"] for path in paths] == [8, 9, 10]


def test_of_the_bundled_model(capsys):
    video = load("tiny").generate("a small red circle moves right", first_frame="start.png", seed=2, **STEPS)
    video.save("a.mp4")
    assert main(["rerun", "a.mp4", "--out", "again.png", "--json"]) == 0
    assert np.array_equal(read_video("again")[0], video.frames)
    out, err = capsys.readouterr()
    assert json.loads(out)["settings"]["images"] == [video.settings["first_frame"]], "pictures by name, for people"
    assert "not promised" not in err


def refused(capsys, *argv: str, code: int = 2) -> str:
    assert main(["rerun", *argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.strip().splitlines()[-3:]
    assert [line.split(":")[0].strip() for line in lines] == ["error", "why", "try"], err
    return "\n".join(lines)


def with_recipe(video: Video, path: str, **changes) -> str:
    recipe = {k: v for k, v in (video.settings | changes).items() if v is not None}
    return str(write_video(path, video.frames, video.fps, recipe=recipe, overwrite=True))


def test_refused_where_it_would_be_another_clip(pipe, folder, capsys):
    model = ("--model", str(folder))
    video = pipe.generate("a red circle", first_frame="start.png", seed=1, **STEPS)
    (name,) = video.settings["images"]
    entry = video.settings["images"][name]
    plain = write_video("plain.mp4", video.frames, 8)
    assert "no recipe" in refused(capsys, str(plain), *model)
    refused(capsys, "gone.mp4", *model)
    other = with_recipe(video, "b.mp4", images={name: entry | {"pixels": "0" * 64}})
    assert "not the one" in refused(capsys, other, *model)
    broken = with_recipe(video, "b.mp4", images={name: entry | {"webp": "AAAA"}})
    assert "cannot be read" in refused(capsys, broken, *model, code=6)
    weights = with_recipe(video, "b.mp4", weights="0" * 64)
    assert "weights differ" in refused(capsys, weights, *model)
    assert "is not here" in refused(capsys, with_recipe(video, "b.mp4", model="another-name"), code=3)
    refused(capsys, with_recipe(video, "b.mp4"), *model, "--frames", "10")
    assert not Path("outputs").exists()


HOSTILE = [
    {"first_frame": "/etc/hostname"},
    {"keyframes": {"4": "/etc/hostname"}},
    {"keyframes": {"z": "sha256:0"}},
    {"keyframes": [5]},
    {"mask": ["start.png"]},
    {"video": 5},
    {"batch_size": "x"},
    {"batch_size": 10**10, "item": 0},
    {"batch_size": 3, "item": 3},
    {"batch_size": 3},
    {"item": 0},
    {"prompt": ["a", "b"]},
    {"prompt": {"a": 1}},
    {"negative_prompt": 5},
    {"made_with": "x"},
    {"made_with": {"device": "cpu", "threads": -1}},
    {"made_with": {"memory": ["x"]}},
    {"dtype": {}},
    {"lora": "x"},
    {"lora": [5]},
    {"images": 5},
    {"images": {"sha256:0": 5}},
    {"weights": 5},
    {"model": ["x"]},
    {"seed": "x"},
    {"fps": "x"},
    {"height": {"z": 1}},
]


@pytest.mark.parametrize("changes", HOSTILE, ids=json.dumps)
def test_a_hostile_recipe_is_refused(folder, capsys, changes, clip_of):
    """It names no files of this machine, and whatever else is in it is of its kind or refused."""
    refused(capsys, clip_of(**changes), "--model", str(folder), "--quiet", "--style", "sepia")
    assert not Path("outputs").exists()


@pytest.mark.parametrize("name", ["out", "on_step", "output", "keep_latents"])
def test_only_a_caller_says_where_a_clip_goes(clip_of, name):
    with pytest.raises(InvalidRequest, match=f"the {name} in this recipe"):
        request_of(read_recipe(clip_of(**{name: "/etc/x.mp4"})) or {})


@pytest.fixture
def clip_of():
    """A small clip with a recipe that was changed."""

    def made(**changes) -> str:
        recipe = {"videogen": "1", "model": "small", "prompt": "a", "num_inference_steps": 1, "fps": 8} | changes
        return str(write_video("a.png", np.zeros((1, 32, 48, 3), np.uint8), 8, recipe=recipe))

    return made


def test_weights_are_compared_when_all_are_here(pipe, folder, capsys, monkeypatch):
    """Of a model that is half in the cache the fingerprint would be another."""
    clip = pipe.generate("a", **STEPS).save("a.mp4")
    shutil.copytree(folder, "partly")
    for path in Path("partly/transformer").glob("*.safetensors"):
        path.unlink()

    def find(model, *, offline, weights):
        if weights:
            shutil.copytree(folder, "partly", dirs_exist_ok=True)
        return Path("partly")

    monkeypatch.setattr("videogen.cli.generate.find_model", find)
    again(clip, Path("partly"))


def test_pictures_are_found_by_their_sha256(pipe, folder, capsys, here):
    video = pipe.generate("a red circle", first_frame="start.png", seed=1, **STEPS)
    clip = with_recipe(video, "b.mp4", images=None)
    (here / "originals").mkdir()
    message = refused(capsys, clip, "--model", str(folder), "--images", "originals")
    assert "first_frame" in message
    assert "--images" in message
    (here / "start.png").rename(here / "originals" / "renamed.bin.png")
    frames = again(Path(clip), folder, "--images", "originals")
    assert np.array_equal(frames, video.frames)


def test_a_video_is_found_by_its_sha256(pipe, folder, capsys, here):
    write_video("from.mp4", np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), np.uint8), 8)
    video = pipe.generate("a red circle", video="from.mp4", strength=0.5, **STEPS)
    clip = video.save("b.mp4")
    assert "--images" in refused(capsys, str(clip), "--model", str(folder))
    assert np.array_equal(again(clip, folder, "--images", "."), video.frames)


def test_what_is_not_as_it_was_is_said(pipe, folder, capsys):
    video = pipe.generate("a red circle", **STEPS)
    made_with = video.settings["made_with"] | {"torch": "1.0", "threads": torch.get_num_threads()}
    clip = with_recipe(video, "b.mp4", videogen="9.9", made_with=made_with, shininess=3)
    assert main(["rerun", clip, "--model", str(folder)]) == 0
    err = capsys.readouterr().err
    assert f"videogen 9.9, now {videogen.__version__}" in err
    assert "torch 1.0, now" in err
    assert "does not know: shininess" in err


def test_other_weights_under_the_same_name_have_another_fingerprint(folder, tmp_path):
    same = tiny_pipeline().save(tmp_path / "same")
    other = tiny_pipeline(seed=1).save(tmp_path / "other")
    assert fingerprint(same) == fingerprint(folder) != fingerprint(other)
    (same / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant, not opened")
    assert fingerprint(same) == fingerprint(folder)
    assert fingerprint(tmp_path / "nothing") is None
    assert read_card(folder).name == read_card(other).name


def test_a_lora_is_found_by_its_sha256(folder, capsys, here):
    from safetensors.torch import save_file

    (here / "kept").mkdir()
    generator = torch.Generator().manual_seed(0)
    width = 32  # of the random model
    place = "transformer.transformer_blocks.0.attn1.to_q"
    factors = {f"{place}.lora_A.weight": (2, width), f"{place}.lora_B.weight": (width, 2)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in factors.items()}
    save_file(tensors, "style.safetensors")
    video = load(folder, lora=("style.safetensors", 0.5), merge_lora=False).generate("a red circle", **STEPS)
    clip = video.save("a.mp4")
    (here / "style.safetensors").rename(here / "kept" / "renamed.safetensors")
    assert "LoRA style.safetensors" in refused(capsys, str(clip), "--model", str(folder))
    assert np.array_equal(again(clip, folder, "--images", "kept"), video.frames)
    assert (read_recipe("again") or {})["made_with"]["merge_lora"] is False, "beside the weights, as it was"
    with_flag = again(clip, folder, "--lora", "kept/renamed.safetensors:0.5", out="b.png")
    assert np.array_equal(with_flag, video.frames)
