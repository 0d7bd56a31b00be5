"""What generate() promises, on a miniature model with random weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import videogen
import videogen.pipeline as room
from videogen.data.video import read_video
from videogen.errors import Cancelled, InvalidRequest, NumericalError
from videogen.pipeline import Pipeline
from videogen.testing import SCHEDULER, TINY_DIT, TINY_VAE, tiny_batch, tiny_pipeline

STEPS = {"num_inference_steps": 2, "guidance_scale": 3.0}
WORDS = "a red circle"


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((32, 48, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def exact() -> Pipeline:
    return tiny_pipeline(dtype=torch.float64)


def latents(pipeline: Pipeline, prompt=WORDS, **keywords) -> torch.Tensor:
    return pipeline.generate(prompt, output="latent", **{**STEPS, **keywords})


def told(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, **keywords) -> list:
    """The conditionings the network is called with."""
    seen, forward = [], pipeline.dit.forward
    monkeypatch.setattr(pipeline.dit, "forward", lambda x, t, cond: seen.append(cond) or forward(x, t, cond))
    latents(pipeline, **keywords)
    return seen


# Kinds of answers


def test_a_prompt_gives_a_video(pipeline: Pipeline):
    video = pipeline.generate(WORDS, seed=5, **STEPS)
    assert video.frames.shape == (9, 32, 48, 3)
    assert video.frames.dtype == np.uint8
    assert (video.fps, video.seed) == (8, 5)
    assert video.settings["prompt"] == WORDS
    assert video.settings["model"] == "tiny-random"
    assert video.settings["videogen"] == videogen.__version__
    assert video.settings["num_inference_steps"] == 2
    assert "transformer_sha256" not in video.settings


def test_a_list_of_prompts_gives_a_list_even_of_one(pipeline: Pipeline):
    assert [type(v) for v in pipeline.generate([WORDS], **STEPS)] == [videogen.Video]
    videos = pipeline.generate([WORDS, "a blue square"], seed=[4, 9], **STEPS)
    assert [v.seed for v in videos] == [4, 9]
    assert [v.settings["prompt"] for v in videos] == [WORDS, "a blue square"]
    assert pipeline.generate([WORDS, WORDS], output="tensor", **STEPS).shape == (2, 9, 3, 32, 48)


def test_tensor_is_the_video_before_it_is_rounded(pipeline: Pipeline):
    frames = pipeline.generate(WORDS, output="tensor", **STEPS)
    video = pipeline.generate(WORDS, **STEPS)
    assert frames.dtype == torch.float32
    assert 0 <= frames.min() < frames.max() <= 1
    rounded = (frames[0] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(rounded, video.frames)


@torch.no_grad()
def test_decoded_latents_are_the_tensor(pipeline: Pipeline):
    frames = pipeline.generate(WORDS, output="tensor", **STEPS)
    assert torch.equal(torch.cat(list(pipeline.decode(latents(pipeline)[0]))), frames[0])


# Randomness


def test_two_runs_are_bit_equal_and_seeds_differ(pipeline: Pipeline):
    for sampler in ("ddim", "dpm", "diffusers"):
        first = latents(pipeline, sampler=sampler, first_frame=picture(0))
        assert torch.equal(latents(pipeline, sampler=sampler, first_frame=picture(0)), first)
        assert not torch.allclose(latents(pipeline, sampler=sampler, first_frame=picture(0), seed=1), first, atol=0.1)


@pytest.mark.parametrize("sampler", ["dpm", "diffusers"])
def test_with_a_list_of_seeds_each_clip_is_its_own_run(exact: Pipeline, sampler: str):
    pipeline = (
        exact
        if sampler == "dpm"
        else tiny_pipeline(dtype=torch.float64, scheduler={**SCHEDULER, "_class_name": "CogVideoXDPMScheduler"})
    )
    prompts, seeds, images = [WORDS, "a blue square"], [7, 8], [picture(0), picture(1)]
    keywords = {"sampler": sampler, "num_inference_steps": 3}
    both = latents(pipeline, prompts, seed=seeds, first_frame=images, last_frame=picture(2), **keywords)
    for i in range(2):
        alone = latents(pipeline, prompts[i], seed=seeds[i], first_frame=images[i], last_frame=picture(2), **keywords)
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=1e-5)  # guidance is float32


def test_numpy_seeds(pipeline: Pipeline):
    assert torch.equal(latents(pipeline, seed=np.int64(3)), latents(pipeline, seed=3))


def test_our_ddim_is_the_checkpoints(exact: Pipeline):
    keywords = {"num_inference_steps": 4, "first_frame": picture(0)}
    ours, theirs = (latents(exact, sampler=name, **keywords) for name in ("ddim", "diffusers"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# Guidance


def test_guidance_1_is_no_guidance(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    seen = told(pipeline, monkeypatch, guidance_scale=1.0)
    assert [len(cond.text) for cond in seen] == [1, 1]  # one half, no negative prompt
    plain = latents(pipeline, guidance_scale=1.0)
    assert torch.equal(latents(pipeline, guidance_scale=1.0, negative_prompt="a blue square"), plain)
    # where both halves are told the same, no weight matters
    torch.testing.assert_close(latents(pipeline, negative_prompt=WORDS), plain, rtol=0, atol=1e-4)
    assert not torch.allclose(latents(pipeline), plain, atol=0.01)


def test_both_halves_see_the_frames(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    seen = told(pipeline, monkeypatch, first_frame=picture(0))
    without, with_ = seen[0].channels
    assert torch.equal(without, with_)
    assert not torch.equal(*seen[0].text)


def test_embeddings_of_different_lengths_are_refused():
    pipeline = tiny_pipeline(dit=replace(TINY_DIT, use_learned_positional_embeddings=False))
    with pytest.raises(InvalidRequest, match="negative") as caught:
        pipeline.generate(prompt_embeds=torch.zeros(1, 5, 16), **STEPS)
    assert caught.value.param == "negative_prompt_embeds"


# Known frames


def test_known_frames_land_in_their_latent_frames(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    channels = {}
    for name, keywords in {
        "none": {},
        "first": {"first_frame": picture(0)},
        "middle": {"keyframes": {4: picture(0)}},
        "last": {"last_frame": picture(0)},
        "key 0": {"keyframes": {0: picture(0)}},
        "key 8": {"keyframes": {8: picture(0)}},
        "all": {"first_frame": picture(0), "keyframes": {4: picture(1)}, "last_frame": picture(2)},
    }.items():
        with monkeypatch.context() as patch:
            channels[name] = told(pipeline, patch, **keywords)[0].channels[0]

    filled = {name: [bool(frame.any()) for frame in value] for name, value in channels.items()}
    assert filled == {
        "none": [False, False, False],
        "first": [True, False, False],
        "middle": [False, True, False],
        "last": [False, False, True],
        "key 0": [True, False, False],
        "key 8": [False, False, True],
        "all": [True, True, True],
    }
    # one picture, one draw: the same latent wherever it stands
    assert torch.equal(channels["first"][0], channels["middle"][1])
    assert torch.equal(channels["first"][0], channels["last"][2])
    assert torch.equal(channels["key 0"], channels["first"])
    assert torch.equal(channels["key 8"], channels["last"])
    assert torch.equal(channels["all"][0], channels["first"][0])  # drawn first


def test_each_prompt_has_its_own_picture_or_shares_one(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    keywords = {"prompt": [WORDS, WORDS], "seed": [1, 1], "guidance_scale": 1.0}
    with monkeypatch.context() as patch:
        shared = told(pipeline, patch, first_frame=picture(0), **keywords)[0].channels
    own = told(pipeline, monkeypatch, first_frame=[picture(0), picture(1)], **keywords)[0].channels
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(own[0], shared[0])
    assert not torch.equal(own[1], shared[1])


def test_last_frame_until(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    keywords = {"num_inference_steps": 4, "first_frame": picture(0)}
    both = {**keywords, "last_frame": picture(1)}
    always = latents(pipeline, **both)
    assert torch.equal(latents(pipeline, last_frame_until=1, **both), always)
    never = told(pipeline, monkeypatch, last_frame_until=0, **both)
    assert all(not cond.channels[:, 2].any() for cond in never)
    monkeypatch.undo()
    half = told(pipeline, monkeypatch, last_frame_until=0.5, **both)
    assert [bool(cond.channels[:, 2].any()) for cond in half] == [True, True, False, False]
    assert all(cond.channels[:, 0].any() for cond in half)


def test_last_frame_until_0_is_giving_none(pipeline: Pipeline):
    noise = tiny_batch().latents[:1]
    with_, without = (
        latents(pipeline, latents=noise, **keywords)
        for keywords in ({"last_frame": picture(1), "last_frame_until": 0}, {})
    )
    assert torch.equal(with_, without)


def test_behind_the_padding_of_15_frames_keep_their_place(monkeypatch: pytest.MonkeyPatch):
    """9 frames are 3 latents, padded in front to 4: the first frame is told at 0, all others one later."""
    config = replace(TINY_DIT, use_learned_positional_embeddings=False, patch_size_t=2)
    pipeline = tiny_pipeline(dit=config)
    keywords = {"first_frame": picture(0), "keyframes": {4: picture(1)}, "last_frame": picture(2)}
    channels = told(pipeline, monkeypatch, **keywords)[0].channels[0]
    assert [bool(frame.any()) for frame in channels] == [True, False, True, True]
    assert pipeline.generate(WORDS, output="tensor", **STEPS).shape == (1, 9, 3, 32, 48)


def test_channels_of_a_layout_nobody_fills_are_zeros(monkeypatch: pytest.MonkeyPatch):
    """Fun's 33 channels (noise, mask, masked clip) with nothing told make a clip from text."""
    config = replace(TINY_DIT, in_channels=9, use_learned_positional_embeddings=False)
    seen = told(tiny_pipeline(dit=config, conditions=("text",)), monkeypatch)
    assert seen[0].channels.shape[2] == 5
    assert not seen[0].channels.any()


# Video to video


def test_strength_says_how_much_is_made_anew(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    clip = np.random.default_rng(3).random((9, 32, 48, 3)).astype(np.float32)
    keywords = {"video": clip, "num_inference_steps": 4}
    counts = {}
    for strength in (0.1, 0.5, 1):
        with monkeypatch.context() as patch:
            counts[strength] = len(told(pipeline, patch, strength=strength, **keywords))
    assert counts == {0.1: 1, 0.5: 2, 1: 4}  # one step at least
    monkeypatch.undo()
    with torch.no_grad():
        original = pipeline.vae.encode(torch.from_numpy(clip).permute(3, 0, 1, 2)[None] * 2 - 1, None)
    distances = [
        float((latents(pipeline, strength=s, **keywords) - original.transpose(1, 2)).std()) for s in (0.3, 1.0)
    ]
    assert distances[0] < distances[-1]
    ours, theirs = (latents(pipeline, strength=0.5, sampler=name, **keywords) for name in ("ddim", "diffusers"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_video_is_noised_only_where_no_latents_are_given(pipeline: Pipeline):
    """As in diffusers: `latents` is then the clip to start from, noised already."""
    clip, start = np.zeros((9, 32, 48, 3), np.uint8), tiny_batch().latents[:1]
    keywords = {"video": clip, "num_inference_steps": 4, "strength": 0.5}
    a, b = (latents(pipeline, latents=start, **{**keywords, "video": v}) for v in (clip, clip + 200))
    assert torch.equal(a, b)
    assert not torch.equal(latents(pipeline, latents=start, num_inference_steps=4), a)


# What happens on the way


def test_events_tell_every_step(pipeline: Pipeline):
    events = []
    frames = pipeline.generate(WORDS, on_step=events.append, **STEPS).frames
    assert [(e.stage, e.step, e.steps) for e in events] == [
        ("text", 0, 1),
        ("text", 1, 1),
        ("denoise", 1, 2),
        ("denoise", 2, 2),
        ("decode", 3, 3),
    ]
    assert events[3].latents.shape == (1, 3, 4, 4, 6)
    assert all(e.eta >= 0 for e in events[2:])
    assert frames.shape[0] == 9


@pytest.mark.parametrize("stage", ["text", "denoise", "decode"])
def test_cancelling_stops_and_leaves_no_clip(pipeline: Pipeline, tmp_path: Path, stage: str):
    def cancel(event):
        if event.stage == stage:
            raise Cancelled

    with pytest.raises(Cancelled):
        pipeline.generate(WORDS, on_step=cancel, out=tmp_path / "clip.mp4", **STEPS)
    kept = ["clip.mp4.latents.safetensors"] if stage == "decode" else []
    assert [path.name for path in tmp_path.iterdir()] == kept


@pytest.mark.parametrize("part", ["dit.blocks.0.mlp.up.weight", "vae.decoder.conv_out.bias"])
def test_what_is_not_finite_is_an_error_and_no_clip(tmp_path: Path, part: str):
    pipeline = tiny_pipeline()
    network, _, name = part.partition(".")
    getattr(pipeline, network).get_parameter(name).data.flatten()[0] = float("nan")
    for keywords in ({"out": tmp_path / "clip.mp4"}, {"output": "tensor"}):
        with pytest.raises(NumericalError, match="not finite"):
            pipeline.generate(WORDS, **STEPS, **keywords)
    kept = ["clip.mp4.latents.safetensors"] if network == "vae" else []
    assert [path.name for path in tmp_path.iterdir()] == kept


def test_a_bad_request_is_refused_before_anything_is_computed(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    def never(*_):
        raise AssertionError("computed")

    monkeypatch.setattr(pipeline.text_encoder, "forward", never)
    monkeypatch.setattr(pipeline.dit, "forward", never)
    for keywords in ({"num_frames": 10}, {"height": 40}, {"sampler": "eulr"}, {"last_frame_until": 0.5}):
        with pytest.raises(InvalidRequest):
            pipeline.generate(WORDS, **keywords)


# Files


def test_written_as_decoded_is_what_stays_in_memory(tmp_path: Path):
    config = replace(TINY_DIT, use_learned_positional_embeddings=False)
    pipeline = tiny_pipeline(dit=config, num_frames=17)  # two chunks
    prompts = [WORDS, "a blue square"]
    inside = pipeline.generate(prompts, seed=[1, 2], **STEPS)
    outside = pipeline.generate(prompts, seed=[1, 2], out=[tmp_path / "a.png", tmp_path / "b.png"], **STEPS)
    for one, other in zip(inside, outside, strict=True):
        assert "frames" not in vars(other)  # not read yet
        assert np.array_equal(one.frames, other.frames)
        assert len(one.frames) == 17
    assert np.array_equal(read_video(tmp_path / "b")[0], inside[1].frames)


def test_save_and_load_give_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipeline = tiny_pipeline(guidance_scale=2.5, licence="none", provenance={"made by": "chance"})
    folder = pipeline.save(tmp_path / "model")
    loaded = videogen.load(folder, device="cpu")
    assert replace(loaded.card, folder=pipeline.card.folder, sha256={}) == pipeline.card
    assert loaded.config == pipeline.config
    keywords = {"first_frame": picture(0), "num_inference_steps": 2}
    frames = loaded.generate(WORDS, output="tensor", **keywords)
    plain = pipeline.generate(WORDS, output="tensor", **keywords)  # by the plain rows: equal up to rounding
    torch.testing.assert_close(frames, plain, rtol=0, atol=1e-5)
    assert len(loaded.generate(WORDS, **keywords).settings["transformer_sha256"]) == 64

    # generate() loads once, and keeps what it loaded
    room._kept.cache_clear()
    loads, load = [], room.load
    monkeypatch.setattr(room, "load", lambda model: loads.append(model) or load(model, device="cpu"))
    try:
        for _ in range(2):
            assert torch.equal(videogen.generate(WORDS, model=folder, output="tensor", **keywords), frames)
        with pytest.raises(InvalidRequest):
            videogen.generate(WORDS, model=folder, num_frames=10)
    finally:
        room._kept.cache_clear()
    assert len(loads) == 1


def test_parts_can_be_reached(pipeline: Pipeline):
    assert pipeline.capabilities.conditions == ("text", "first_frame", "last_frame", "keyframes", "video")
    assert pipeline.tokenizer is pipeline.text_encoder.tokenizer
    assert pipeline.config["transformer"]["num_layers"] == TINY_DIT.num_layers
    assert pipeline.config["vae"]["scaling_factor"] == TINY_VAE.scaling_factor
    assert pipeline.config["scheduler"] == SCHEDULER
    assert (pipeline.device.type, pipeline.dtype) == ("cpu", torch.float32)


# Choices at loading


def test_noise_our_samplers_cannot_read_still_works_with_diffusers():
    pipeline = tiny_pipeline(
        scheduler={**SCHEDULER, "_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"}
    )
    assert latents(pipeline, sampler="diffusers").isfinite().all()
    with pytest.raises(InvalidRequest, match="beta_schedule"):
        latents(pipeline, sampler="ddim")


@torch.no_grad()
def test_a_flow_model_samples():
    pipeline = tiny_pipeline(scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000})
    euler = latents(pipeline, sampler="euler", num_inference_steps=4)
    assert euler.isfinite().all()
    assert latents(pipeline, sampler="diffusers", num_inference_steps=4).shape == euler.shape


@torch.no_grad()
def test_tiny_batch_is_what_the_network_takes():
    for config in (TINY_DIT, replace(TINY_DIT, in_channels=4, patch_size_t=2, use_learned_positional_embeddings=False)):
        pipeline = tiny_pipeline(dit=config)
        batch = tiny_batch(config)
        assert pipeline.dit(*batch).shape == batch.latents.shape
