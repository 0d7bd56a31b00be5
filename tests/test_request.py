"""A request is filled in from the card and refused, with what would be valid, before anything is loaded."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from videogen.conditioning.layouts import LAYOUTS as ways
from videogen.config import DiTConfig, VAEConfig
from videogen.data.video import Video, write_video
from videogen.errors import FileError, InvalidRequest, ModelNotFound, Note
from videogen.request import HELP, Request
from videogen.weights.card import Card, read_card
from videogen.weights.hub import find_model
from videogen.weights.limits import ANY_LENGTH, ANY_SIZE, Frames, Sizes
from videogen.weights.models import CONDITIONS, LAYOUTS, PUBLISHED


def card(**changes) -> Card:
    """A model like the bundled one, but with rotary positions, so that sizes are free."""
    small = Card(
        folder=Path(),
        name="small",
        dit=DiTConfig(in_channels=32, use_rotary_positional_embeddings=True, text_embed_dim=16, max_text_seq_length=6),
        vae=VAEConfig(),
        scheduler={},
        conditions=("text", "first_frame", "last_frame", "keyframes", "video"),
        height=64,
        width=96,
        num_frames=17,
        fps=8,
        size_multiple=16,
        fixed_size=False,
        max_sequence_length=6,
    )
    return replace(small, **changes)


TEXT_ONLY = card(name="words", conditions=("text",))
FIXED = card(name="fixed", fixed_size=True)
PATCHED = card(dit=DiTConfig(patch_size_t=2, use_rotary_positional_embeddings=True))
IMAGE = np.zeros((8, 8, 3), np.uint8)


def refused(request: Request, by: Card | None = None) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        request.checked(by or card())
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["error", "why", "try"], lines
    assert caught.value.exit_code == 2
    return caught.value


def test_keywords_of_the_contract():
    contract = """
        prompt negative_prompt prompt_embeds negative_prompt_embeds first_frame last_frame keyframes last_frame_until
        video strength control_video mask fit image_latent_scale height width num_frames fps snap
        num_inference_steps guidance_scale use_dynamic_cfg guidance_until uncond sampler step_cache seed latents
        on_step output out keep_latents
    """.split()  # noqa: SIM905
    assert [f.name for f in fields(Request)] == contract == list(HELP)
    kinds = [p.kind for p in inspect.signature(Request).parameters.values()]
    assert kinds == [inspect.Parameter.POSITIONAL_OR_KEYWORD] + [inspect.Parameter.KEYWORD_ONLY] * (len(contract) - 1)


def test_none_means_what_the_model_was_made_for():
    request = Request("a").checked(card(num_inference_steps=20, guidance_scale=4.5, sampler="dpm"))
    assert request.size == (17, 64, 96)
    assert (request.fps, request.num_inference_steps, request.guidance_scale, request.sampler) == (8, 20, 4.5, "dpm")
    assert request.checked(card()) == request, "checking twice changes nothing"
    assert Request("a", num_frames=1, sampler="heun").checked(card()).num_frames == 1


@pytest.mark.parametrize(
    ("frames", "near"), [(0, "1 9"), (2, "1 9"), (16, "9 17"), (20, "17 25"), (48, "41 49"), (82, "81 89")]
)
@pytest.mark.parametrize("model", [card(), PATCHED], ids=["1.0", "1.5"])
def test_frames_are_one_or_a_multiple_of_eight_and_one(frames, near, model):
    for n in (1, 9, 17, 25, 49, 81, 161):
        assert Request("a", num_frames=n).checked(model).num_frames == n
    error = refused(Request("a", num_frames=frames), model)
    assert error.hint.startswith(" or ".join(f"--frames {n}" for n in near.split()))
    assert error.param == "num_frames"


@pytest.mark.parametrize(
    ("width", "height", "hint"),
    [(70, 64, "--size 64x64 or --size 80x64"), (720, 479, "--size 720x480 or --size 720x464"), (8, 8, "--size 16x16")],
)
def test_sizes_are_multiples_with_the_nearest_named(width, height, hint):
    assert refused(Request("a", width=width, height=height)).hint == hint


def test_a_learned_table_has_one_size_and_length():
    assert Request("a", height=64, width=96, num_frames=17).checked(FIXED).size == (17, 64, 96)
    assert refused(Request("a", height=96, width=96), FIXED).hint == "--size 96x64"
    assert refused(Request("a", num_frames=9), FIXED).hint == "--frames 17"
    assert Request("a", num_frames=25).checked(FIXED).num_frames == 25 > FIXED.native_frames, "made of windows"


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("num_inference_steps", 0),
        ("num_inference_steps", -1),
        ("guidance_scale", float("nan")),
        ("guidance_scale", float("inf")),
        ("guidance_scale", -1.0),
        ("fps", 0),
        ("fps", 0.0001),
        ("strength", 0.0),
        ("strength", 1.5),
        ("last_frame_until", -0.1),
        ("last_frame_until", 1.1),
        ("guidance_until", -0.1),
        ("guidance_until", 1.5),
        ("step_cache", -0.1),
        ("step_cache", 1.1),
        ("fit", "squeeze"),
        ("output", "gif"),
        ("sampler", "ddmi"),
        ("seed", -1),
        ("seed", 1.5),
        ("seed", True),
        ("seed", [1, 2]),
        ("height", 0),
        ("prompt", None),
        ("prompt", []),
        ("prompt", ["a", 3]),
        ("negative_prompt", 3),
    ],
)
def test_values_out_of_range(param, value):
    assert refused(Request(**{"prompt": "a", param: value})).param == param


def test_the_nearest_name_is_suggested():
    assert refused(Request("a", sampler="dmp")).hint == "--sampler dpm"
    assert refused(Request("a", fit="padd")).hint == "--fit pad"


def test_conditions_the_model_was_not_trained_for():
    for name, models in (("first_frame", "CogVideoX-5b-I2V"), ("last_frame", "tiny"), ("video", "CogVideoX-2b")):
        error = refused(Request("a", **{name: IMAGE}), TEXT_ONLY)
        assert "text" in error.why
        assert "--model tiny" in error.hint
        assert models in error.hint
        assert error.param == name
    first_only = card(conditions=("text", "first_frame"))
    assert Request("a", keyframes={0: IMAGE}).checked(first_only).images == {0: IMAGE}
    assert refused(Request("a", keyframes={8: IMAGE}), first_only).param == "keyframes"
    assert refused(Request("a", keyframes={16: IMAGE}), first_only).what.endswith("a last frame.")


def test_key_frames_stand_at_multiples_of_four_and_once():
    a, b, c = (np.full((8, 8, 3), i, np.uint8) for i in range(3))
    request = Request("a", first_frame=a, last_frame=c, keyframes={8: b}).checked(card())
    assert list(request.images) == [0, 8, 16]
    assert request.images[8] is b
    assert refused(Request("a", keyframes={5: a})).hint == "--keyframe 4=IMAGE or --keyframe 8=IMAGE"
    assert refused(Request("a", keyframes={20: a})).hint == "--keyframe 16=IMAGE"
    refused(Request("a", keyframes={-4: a}))
    assert "both frame 0" in refused(Request("a", first_frame=a, keyframes={0: b})).what
    assert "both frame 16" in refused(Request("a", last_frame=a, keyframes={16: b})).what
    assert "both frame 0" in refused(Request("a", first_frame=a, last_frame=b, num_frames=1)).what


def test_nothing_is_silently_ignored():
    assert refused(Request("a", strength=0.5)).param == "strength"
    assert refused(Request("a", last_frame_until=0.5)).param == "last_frame_until"
    Request("a", last_frame=IMAGE, last_frame_until=0.5).checked(card())
    Request("a", video=np.zeros((17, 8, 8, 3), np.uint8), strength=0.5).checked(card())


def test_images_are_local_files_or_pixels(tmp_path):
    picture, text = tmp_path / "a.png", tmp_path / "a.txt"
    Image.fromarray(IMAGE).save(picture)
    text.write_text("no image")
    for image in (picture, str(picture), Image.open(picture), IMAGE, torch.zeros(3, 8, 8)):
        Request("a", first_frame=image).checked(card())
    for image in (
        "https://example.org/a.png",
        "data:image/png;base64,AA==",
        text,
        tmp_path / "gone.png",
        3,
        np.zeros(3),
    ):
        assert refused(Request("a", first_frame=image)).param == "first_frame"
    assert refused(Request("a", video="http://example.org/a.mp4")).param == "video"


def test_a_video_to_start_from_is_long_enough(tmp_path):
    frames = np.zeros((12, 16, 16, 3), np.uint8)
    path = write_video(tmp_path / "a.mp4", frames, 8)
    for video in (path, frames, Video(frames, 8)):
        assert Request("a", video=video, num_frames=9).checked(card()).recipe()["video"].startswith("sha256:")
        assert refused(Request("a", video=video)).hint == "--frames 9"
    (tmp_path / "bad.mp4").touch()
    with pytest.raises(FileError):
        Request("a", video=tmp_path / "bad.mp4").checked(card())


def test_snap_goes_to_the_nearest_and_says_so():
    table = card(name="table", sizes=Sizes((32, 64), (64, 96)), frames=Frames(16, 33), rates=(8,))
    asked = Request("a", width=200, height=100, num_frames=20, fps=24, snap=True)
    with pytest.warns(
        Note, match="width 200 became 96, height 100 became 48, num_frames 20 became 17, fps 24 became 8"
    ):
        request = asked.checked(table)
    assert (request.size, request.fps) == ((17, 48, 96), 8)
    assert request.snap == {"width": 200, "height": 100, "num_frames": 20, "fps": 24} == request.recipe()["snap"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert request.checked(table) == request, "checking twice changes and says nothing more"
        assert Request("a", snap=True).checked(table).snap is True
    refused(replace(asked, snap=False), table)
    refused(Request("a", width=0, snap=True), table)
    with pytest.warns(Note):
        assert Request("a", width=480, height=640, num_frames=3, snap=True).checked(FIXED).size == (17, 64, 96)


def test_a_rate_the_model_was_not_trained_for():
    eight = card(rates=(8,))
    assert refused(Request("a", fps=24), eight).hint == "--fps 8, or --snap"
    assert Request("a", fps=24).checked(card()).fps == 24, "nothing is known of others"


def test_control_clips_and_masks_are_for_models_that_read_them():
    clip = np.zeros((17, 8, 8, 3), np.uint8)
    for name in ("control_video", "mask"):
        assert "alibaba-pai/CogVideoX-Fun" in refused(Request("a", **{name: clip})).hint
    able = card(conditions=("text", "video", "control_video", "mask"))
    Request("a", control_video=clip).checked(able)
    Request("a", video=clip, mask=clip).checked(able)
    assert refused(Request("a", mask=clip), able).param == "mask"
    assert refused(Request("a", control_video=clip[:9]), able).param == "control_video"


def test_how_guidance_and_images_are_meant():
    for mode in (False, True, "diffusers", "sat"):
        Request("a", use_dynamic_cfg=mode).checked(card())
    Request("a", uncond="zeros").checked(card())
    assert refused(Request("a", uncond="zeros", negative_prompt="dull")).param == "negative_prompt"
    frames = card(layout="frames")
    Request("a", first_frame=IMAGE, image_latent_scale="none").checked(frames)
    assert refused(Request("a", image_latent_scale="mul"), frames).param == "image_latent_scale"
    assert refused(Request("a", first_frame=IMAGE, image_latent_scale="mul")).param == "image_latent_scale"
    for name in ("use_dynamic_cfg", "uncond", "image_latent_scale"):
        assert refused(Request("a", first_frame=IMAGE, **{name: "sta"}), frames).param == name


def test_an_image_alone_is_enough_and_text_alone_too():
    assert Request(first_frame=IMAGE).checked(card()).prompt == ""
    refused(Request())


def test_lists_match_the_prompts():
    images = [IMAGE, IMAGE]
    request = Request(["a", "b"], first_frame=images, seed=[1, 2], negative_prompt=["x", "y"]).checked(card())
    assert request.batch_size == 2
    assert request.is_batch
    assert Request(["a"]).is_batch
    assert not Request("a").is_batch
    for name, value in {
        "first_frame": [IMAGE],
        "seed": [1],
        "negative_prompt": ["x"],
        "keyframes": {4: [IMAGE]},
    }.items():
        assert refused(Request(["a", "b"], **{name: value})).param == name


def test_embeddings_have_the_models_shape():
    good = torch.zeros(2, 6, 16)
    request = Request(prompt_embeds=good, negative_prompt_embeds=good).checked(card())
    assert request.batch_size == 2
    assert Request(prompt_embeds=torch.zeros(1, 4, 16)).checked(card()), "rotary positions take any text length"
    tables = card(dit=DiTConfig(text_embed_dim=16, max_text_seq_length=6))
    refused(Request(prompt_embeds=torch.zeros(1, 4, 16)), tables)
    refused(Request(prompt_embeds=torch.zeros(1, 6, 8)))
    refused(Request("a", prompt_embeds=good))
    refused(Request(prompt_embeds=good, negative_prompt_embeds=good[:1]))
    refused(Request("a", negative_prompt="x", negative_prompt_embeds=good[:1]))


def test_latents_have_diffusers_layout_and_padding():
    Request("a", latents=torch.zeros(1, 5, 16, 8, 12)).checked(card())
    Request("a", latents=torch.zeros(1, 6, 16, 8, 12)).checked(PATCHED)
    assert "[1, 5, 16, 8, 12]" in refused(Request("a", latents=torch.zeros(1, 16, 5, 8, 12))).why
    assert "[1, 6, 16, 8, 12]" in refused(Request("a", latents=torch.zeros(1, 5, 16, 8, 12)), PATCHED).why


def test_output_files(tmp_path):
    Request("a", out=tmp_path / "new.mp4").checked(card())
    assert refused(Request("a", out=tmp_path / "new.avi")).hint.endswith("new.mp4")
    refused(Request("a", out=tmp_path / "new.mp4", output="latent"))
    refused(Request(["a", "b"], out=tmp_path / "new.mp4"))
    refused(Request(["a", "b"], out=[tmp_path / "new.mp4"] * 2))
    (tmp_path / "old.mp4").touch()
    with pytest.raises(FileError, match="exists"):
        Request("a", out=tmp_path / "old.mp4").checked(card())


def test_a_place_where_nothing_can_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="no folder"):
        Request("a", out=tmp_path / "file" / "new.mp4").checked(card())
    Request("a", out=tmp_path / "not" / "yet" / "new.mp4").checked(card())
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    with pytest.raises(FileError, match="read-only"):
        Request("a", out=tmp_path / "not" / "yet" / "new.mp4").checked(card())


def test_recipe_is_json_without_paths_or_pixels(tmp_path):
    path = tmp_path / "secret_place.png"
    Image.fromarray(IMAGE).save(path)
    request = Request("a", first_frame=path, last_frame=IMAGE, on_step=print, out=tmp_path / "x.mp4").checked(card())
    recipe = json.loads(json.dumps(request.recipe()))
    assert str(tmp_path) not in json.dumps(recipe)
    assert "secret_place" not in json.dumps(recipe)
    assert recipe["first_frame"].startswith("sha256:")
    assert recipe["seed"] == 0
    assert recipe["height"] == 64
    same, other = Request("a", last_frame=IMAGE.copy()), Request("a", last_frame=IMAGE + 1)
    assert same.recipe()["last_frame"] == recipe["last_frame"] != other.recipe()["last_frame"]
    assert Request("a", latents=torch.zeros(2, dtype=torch.bfloat16)).recipe()["latents"].startswith("sha256:")


def test_recipe_of_one_item():
    batch = Request(["a", "b"], seed=[3, 4], first_frame=[IMAGE, IMAGE + 1], keyframes={8: [IMAGE, IMAGE + 1]})
    alone = Request("b", seed=4, first_frame=IMAGE + 1, keyframes={8: IMAGE + 1})
    assert batch.recipe(1) == alone.recipe()
    shared = Request(["a", "b"], seed=3).recipe(1)
    assert (shared["prompt"], shared["item"]) == (["a", "b"], 1), "a shared seed draws the noise of both in turn"


def test_no_torch_until_the_request_is_valid():
    code = (
        "import sys, videogen.request, videogen.weights.card, videogen.data.video, videogen.progress;"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Cards


def write_model(folder: Path, dit: dict, *, own: dict | None = None, scheduler: str = "CogVideoXDDIMScheduler") -> Path:
    for name, values in {
        "model_index.json": {
            "_class_name": "CogVideoXPipeline",
            "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLCogVideoX"],
        },
        "transformer/config.json": {"_class_name": "CogVideoXTransformer3DModel", **dit},
        "vae/config.json": {"_class_name": "AutoencoderKLCogVideoX"},
        "scheduler/scheduler_config.json": {"_class_name": scheduler},
        **({} if own is None else {"videogen.json": own}),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(values))
    return folder


B5 = {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True}
PATCH = {"patch_size_t": 2, "sample_height": 300, "sample_width": 300, "sample_frames": 81}


@pytest.mark.parametrize(
    ("dit", "name", "native"),
    [
        ({}, "CogVideoX-2b", (480, 720, 49, 8, "ddim", False)),
        (B5, "CogVideoX-5b", (480, 720, 49, 8, "dpm", False)),
        (
            {**B5, "in_channels": 32, "use_learned_positional_embeddings": True},
            "CogVideoX-5b-I2V",
            (480, 720, 49, 8, "dpm", True),
        ),
        ({**B5, **PATCH}, "CogVideoX1.5-5B", (768, 1360, 81, 16, "dpm", False)),
        (
            {**B5, **PATCH, "in_channels": 32, "ofs_embed_dim": 512},
            "CogVideoX1.5-5B-I2V",
            (768, 1360, 81, 16, "dpm", False),
        ),
    ],
    ids=["2b", "5b", "5b-i2v", "1.5", "1.5-i2v"],
)
def test_published_models_are_known_by_shape(tmp_path, dit, name, native):
    card = read_card(write_model(tmp_path / "renamed", dit))
    row = next(r for r in PUBLISHED if r.name.endswith("/" + name))
    assert (card.height, card.width, card.num_frames, card.fps, card.sampler, card.fixed_size) == native
    assert card.conditions == row.conditions
    assert ("first_frame" in card.conditions) == ("I2V" in name)
    assert (card.licence, card.dtypes, card.sizes, card.frames) == (row.licence, row.dtypes, row.sizes, row.frames)
    assert card.rates == (card.fps,)
    assert (card.size_multiple, card.num_inference_steps, card.guidance_scale) == (16, 50, 6)
    assert card.name == "renamed"


def test_unpublished_models_follow_their_configs(tmp_path):
    small = {"num_attention_heads": 3, "sample_height": 8, "sample_width": 12, "sample_frames": 17, "in_channels": 32}
    card = read_card(write_model(tmp_path / "a", small, scheduler="CogVideoXDPMScheduler"))
    assert (card.height, card.width, card.num_frames, card.fps, card.sampler) == (64, 96, 17, 8, "dpm")
    assert card.conditions == ("text", "first_frame", "video")
    assert (card.sizes, card.frames, card.dtypes, card.rates) == (ANY_SIZE, ANY_LENGTH, (), ())
    own = {"name": "mine", "conditions": ["text", "keyframes"], "fps": 12, "sampler": "heun", "sha256": {}}
    card = read_card(write_model(tmp_path / "b", small, own=own))
    assert (card.name, card.conditions, card.fps, card.sampler) == ("mine", ("text", "keyframes"), 12, "heun")


def test_own_facts_go_before_the_table_and_save_what_they_say(tmp_path):
    """A fine-tune of 5B for other sizes, in its own `videogen.json`."""
    wide = read_card(write_model(tmp_path / "a", B5, own={"width": 1280, "height": 720, "fps": 24, "num_frames": 97}))
    assert (wide.sizes, wide.rates, wide.frames.allow(57)) == (ANY_SIZE, (), True), "its defaults are beyond the table"
    sizes = {"short": [512, 768], "long": [512, 768]}
    own = {"height": 512, "width": 768, "sizes": sizes, "frames": {"most": 97}, "rates": [8, 12], "dtypes": ["float16"]}
    card = read_card(write_model(tmp_path / "b", B5, own=own))
    assert (card.sizes, card.frames) == (Sizes((512, 768), (512, 768)), Frames(most=97))
    assert (card.rates, card.dtypes, card.native_frames) == ((8, 12), ("float16",), 97)
    again = read_card(write_model(tmp_path / "c", B5, own=json.loads(json.dumps(card.facts))))
    assert replace(again, folder=card.folder) == card
    for bad in (
        *({"sizes": {"short": [9, 1]}}, {"frames": {"step": 3}}, {"rates": ["8"]}, {"dtypes": [None]}),
        *({"frames": {"first": 3}}, {"frames": {"first": -3}}, {"layout": "mine"}, {"conditions": ["text", "smell"]}),
    ):
        with pytest.raises((InvalidRequest, ModelNotFound)):
            read_card(write_model(tmp_path / "d", B5, own=bad))


def test_limits_that_no_multiple_is_within_have_a_nearest_all_the_same():
    for limits in ((481, 483), (1, 8)):
        assert all(n > 0 and n % 16 == 0 for n in Sizes(short=limits, long=limits).nearest(480, 480, 16))


def test_what_the_table_says_is_what_a_model_may_say():
    assert {row.layout for row in PUBLISHED} == set(LAYOUTS) == set(ways)
    assert {name for row in PUBLISHED for name in row.conditions} == set(CONDITIONS)


def test_windows_of_one_patch_are_refused():
    for patch, most in ((None, 1), (2, 5)):
        short = card(dit=replace(PATCHED.dit, patch_size_t=patch), frames=Frames(most=most))
        with pytest.raises(InvalidRequest, match="at once") as caught:
            Request("a", num_frames=17).checked(short)
        assert caught.value.param == "num_frames"


def test_folders_that_are_no_models(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelNotFound, match="no model_index") as caught:
        read_card(find_model(tmp_path))
    assert "notes.txt" in str(caught.value)
    for name, text in (("transformer/config.json", "{"), ("vae/config.json", "[]")):
        folder = write_model(tmp_path / name.split("/")[0], {})
        (folder / name).write_text(text)
        with pytest.raises(ModelNotFound, match="config"):
            read_card(folder)
    folder = write_model(tmp_path / "other", {})
    index = json.loads((folder / "model_index.json").read_text()) | {
        "transformer": ["diffusers", "WanTransformer3DModel"]
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFound, match="WanTransformer3DModel"):
        read_card(folder)
    with pytest.raises(InvalidRequest, match="num_layers"):
        read_card(write_model(tmp_path / "typo", {"num_layer": 3}))


def test_names_that_are_no_models(tmp_path):
    for name in ("nowhere", "https://example.org/model", "../x/y"):
        with pytest.raises(ModelNotFound, match="there is no model") as caught:
            find_model(name)
        assert caught.value.exit_code == 3
    for file in ("model.bin", "notes.txt"):
        (tmp_path / file).touch()
        with pytest.raises(ModelNotFound, match=r"pickle|no model"):
            find_model(tmp_path / file)
    with pytest.raises(ModelNotFound, match="not in the local cache") as caught:
        find_model("nobody/nothing@v1", offline=True)
    assert "hf download nobody/nothing --revision v1" in str(caught.value)


def test_a_hub_snapshot_keeps_its_name(tmp_path):
    folder = write_model(tmp_path / "models--zai-org--CogVideoX-2b" / "snapshots" / "abc", {})
    assert read_card(folder).name == "zai-org/CogVideoX-2b"


def test_a_refusal_takes_no_time_and_no_torch(tmp_path):
    """From the shell: half a second of a processor's time at most; a fifth is usual."""
    code = (
        "import sys, time; from videogen.cli import main; code = main(['text-to-video', 'a', '--frames', '50']);"
        "print(code, time.process_time(), *{m.split('.')[0] for m in sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    exit_code, seconds, *modules = run.stdout.split()
    assert (exit_code, run.stderr.splitlines()[0][:16]) == ("2", "error: 50 frames")
    assert not {"torch", "numpy", "PIL", "diffusers", "transformers", "yaml", "huggingface_hub"} & set(modules)
    assert float(seconds) < 0.5
