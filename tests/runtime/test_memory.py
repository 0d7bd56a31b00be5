"""Every memory plan makes the same clip, leaves the weights where they were, and does what it is for."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import videogen
from videogen.data.video import read_video, to_uint8, write_video
from videogen.errors import Cancelled, InvalidRequest
from videogen.pipeline import Pipeline, to_bytes
from videogen.runtime.counters import count
from videogen.runtime.dit import fast_dit
from videogen.runtime.memory import PLANS, Plan, choose_plan
from videogen.runtime.modulation import cache_modulation
from videogen.runtime.offload import Stages, tensors
from videogen.runtime.quantize import quantize
from videogen.runtime.vae import fast_vae
from videogen.testing import TINY_DIT, tiny_pipeline

STEPS = {"num_inference_steps": 2, "guidance_scale": 3.0}
WORDS = "a red circle moves right"
SAVING = [name for name in PLANS if name != "fast"]
OTHER = replace(TINY_DIT, use_learned_positional_embeddings=False, patch_size_t=2)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((32, 48, 3)).astype(np.float32)


REQUESTS = {
    "frames": {"first_frame": picture(0), "last_frame": picture(1), "sampler": "dpm"},
    "two prompts": {"prompt": [WORDS, "a blue square"], "seed": [1, 2], "sampler": "diffusers"},
    "video": {"video": np.random.default_rng(3).random((9, 32, 48, 3)).astype(np.float32), "strength": 0.5},
    "embeddings": {"prompt": None, "prompt_embeds": torch.ones(1, 8, 16), "guidance_scale": 1.0},
}


def stored(plan: Plan, **options) -> Pipeline:
    """The miniature model as if its files were float16, used in float32 under `plan`."""
    parts = tiny_pipeline(dtype=torch.float16, **options)
    networks = parts.dit, parts.vae, parts.text_encoder
    if not plan.stages_in_turn:
        return Pipeline(parts.card, *(network.float() for network in networks))
    dtypes = {x: torch.float32 for network in networks for x in tensors(network)}
    return Pipeline(parts.card, *networks, Stages(plan, torch.device("cpu"), dtypes))


def whole(plan: Plan) -> Plan:
    """The plan with both halves of guidance in one call, where alone results are the same bit for bit."""
    return replace(plan, guidance_in_two=False)


def places(pipeline: Pipeline) -> list[tuple]:
    networks = pipeline.dit, pipeline.vae, pipeline.text_encoder
    return [(x.data_ptr(), x.dtype) for network in networks for x in tensors(network)]


@pytest.fixture(scope="module")
def fast() -> Pipeline:
    return stored(PLANS["fast"])


@pytest.mark.parametrize("name", SAVING)
def test_every_plan_makes_the_same_clip_twice_in_a_row(fast: Pipeline, name: str):
    wanted = fast.generate(WORDS, output="tensor", seed=5, **STEPS)
    pipeline = stored(whole(PLANS[name]))
    before = places(pipeline)
    for _ in range(2):
        assert torch.equal(pipeline.generate(WORDS, output="tensor", seed=5, **STEPS), wanted)
        assert places(pipeline) == before


@pytest.mark.parametrize("keywords", REQUESTS.values(), ids=REQUESTS)
def test_every_kind_of_request_makes_the_same_clip(fast: Pipeline, keywords):
    keywords = {"prompt": WORDS, "output": "tensor", **STEPS, **keywords}
    assert torch.equal(stored(whole(PLANS["low"])).generate(**keywords), fast.generate(**keywords))


def test_other_variants_make_the_same_clip():
    for options in ({"dit": OTHER}, {"dit": replace(TINY_DIT, in_channels=4, use_learned_positional_embeddings=False)}):
        wanted = stored(PLANS["fast"], conditions=("text",), **options).generate(WORDS, output="tensor", **STEPS)
        pipeline = stored(whole(PLANS["low"]), conditions=("text",), **options)
        assert torch.equal(pipeline.generate(WORDS, output="tensor", **STEPS), wanted)


def test_guidance_in_two_calls_differs_by_rounding_only(fast: Pipeline):
    wanted = fast.generate(WORDS, output="tensor", **STEPS)
    pipeline, calls = stored(PLANS["balanced"]), []
    pipeline.dit.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    torch.testing.assert_close(pipeline.generate(WORDS, output="tensor", **STEPS), wanted, rtol=0, atol=1e-4)
    assert calls == [1, 1, 1, 1]


def test_with_the_fast_rows_too():
    """Packed q, k, v; modulation by time with its weights parked; the VAE's caches on the host; 8-bit weights."""
    results = []
    for plan in (PLANS["fast"], whole(PLANS["minimal"])):
        pipeline = stored(plan)
        quantize(cache_modulation(fast_dit(pipeline.dit)), "fp8", whole_ends=0)
        fast_vae(pipeline.vae, strips=plan.vae_strips, caches_on_host=plan.caches_on_host)
        results += [pipeline.generate(WORDS, output="tensor", first_frame=picture(0), **STEPS) for _ in range(2)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_in_each_stage_only_its_network_is_at_work(monkeypatch: pytest.MonkeyPatch):
    pipeline = stored(PLANS["balanced"])
    networks = {"text": pipeline.text_encoder, "dit": pipeline.dit, "vae": pipeline.vae}
    seen = []

    def present(*_) -> None:
        seen.append({name for name, net in networks.items() if next(net.parameters()).dtype == torch.float32})

    for network in (pipeline.text_encoder, pipeline.dit, pipeline.vae.encoder, pipeline.vae.decoder):
        network.register_forward_pre_hook(present)
    pipeline.generate(WORDS, first_frame=picture(0), **STEPS)
    assert [names for i, names in enumerate(seen) if not i or names != seen[i - 1]] == [
        {"text"},
        {"vae"},
        {"dit"},
        {"vae"},
    ]


@pytest.mark.parametrize("stage", ["text", "denoise", "decode"])
def test_a_run_that_was_stopped_leaves_the_pipeline_ready(fast: Pipeline, tmp_path: Path, stage: str):
    def cancel(event) -> None:
        if event.stage == stage:
            raise Cancelled

    pipeline = stored(whole(PLANS["low"]))
    before = places(pipeline)
    with pytest.raises(Cancelled):
        pipeline.generate(WORDS, on_step=cancel, out=tmp_path / "clip.mp4", **STEPS)
    assert places(pipeline) == before
    kept = ["clip.mp4.latents.safetensors"] if stage == "decode" else []
    assert [path.name for path in tmp_path.iterdir()] == kept
    frames = pipeline.generate(WORDS, output="tensor", **STEPS)
    assert torch.equal(frames, fast.generate(WORDS, output="tensor", **STEPS))


def test_a_saved_model_has_the_same_bytes_under_every_plan(fast: Pipeline, tmp_path: Path):
    wanted = fast.save(tmp_path / "fast")
    for name in SAVING:
        folder = stored(PLANS[name]).save(tmp_path / name)
        for path in wanted.rglob("*.safetensors"):
            assert (folder / path.relative_to(wanted)).read_bytes() == path.read_bytes(), (name, path)


def test_the_bundled_model_is_opened_without_reading_its_weights():
    """float16 in its files and float32 at work; all stay mapped until they are needed, but packed q, k and v."""
    pipeline = videogen.load(device="cpu", memory=whole(PLANS["low"]))
    assert (pipeline.device.type, pipeline.dtype, pipeline.plan.name) == ("cpu", torch.float32, "low")
    assert {x.dtype for network in (pipeline.dit, pipeline.vae) for x in tensors(network)} == {torch.float16}
    maps = Path("/proc/self/maps")
    if maps.exists():
        files = [line.split()[0].split("-") for line in maps.read_text().splitlines() if ".safetensors" in line]
        ranges = [(int(low, 16), int(high, 16)) for low, high in files]
        for network in (pipeline.dit, pipeline.vae, pipeline.text_encoder):
            for name, x in network.named_parameters():
                if not any(f"attention.to_{letter}." in name for letter in "qkv"):
                    assert any(low <= x.data_ptr() < high for low, high in ranges), name
    keywords = {"num_inference_steps": 1, "output": "tensor"}
    wanted = videogen.load(device="cpu").generate(WORDS, **keywords)
    assert torch.equal(pipeline.generate(WORDS, **keywords), wanted)


def test_float16_keeps_the_text_encoders_second_layer_in_float32(fast: Pipeline, tmp_path: Path):
    folder = fast.save(tmp_path / "model")
    found = []
    for memory in ("fast", "low"):
        pipeline = videogen.load(folder, device="cpu", dtype="float16", memory=memory)
        with pipeline.at_work(pipeline.text_encoder):
            found.append(pipeline.text_encoder([WORDS]))
    assert torch.equal(*found)


def test_plans_have_names():
    assert choose_plan("auto") is None  # by what there is
    assert [choose_plan(name) for name in PLANS] == list(PLANS.values())
    assert list(PLANS) == ["fast", "balanced", "low", "minimal"]
    own = Plan(name="mine", vae_strips=2)
    assert choose_plan(own) is own
    for load in (choose_plan, lambda name: videogen.load("no such model", memory=name)):
        with pytest.raises(InvalidRequest, match="tight") as caught:
            load("tight")
        assert caught.value.param == "memory"
        assert len(str(caught.value).splitlines()) == 3


# Frames on their way out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_frames_are_rounded_as_the_writer_rounds_them(dtype: torch.dtype):
    values = torch.cat([torch.linspace(0, 1, 9973), torch.arange(511) / 510, torch.rand(8)]).to(dtype)
    frames = values[: 3 * 3488].reshape(1, 3, 4, 872)
    wanted = to_uint8(frames.permute(0, 2, 3, 1).float().numpy())
    assert np.array_equal(to_bytes(frames), wanted)


def test_what_takes_the_frames_may_be_a_function(fast: Pipeline, tmp_path: Path):
    taken = []

    def write(chunks: Iterator[np.ndarray], fps: float, *, recipe: dict) -> Path:
        taken.append((fps, recipe["prompt"]))
        return write_video(tmp_path / "clip.png", chunks, fps)

    video = fast.generate(WORDS, out=write, **STEPS)
    assert taken == [(8, WORDS)]
    assert video.path == tmp_path / "clip"
    assert np.array_equal(read_video(video.path)[0], fast.generate(WORDS, **STEPS).frames)


def test_memory_does_not_grow_with_the_clip(tmp_path: Path):
    """Twice as many frames into a file: the same tensors alive at most, but for the latents themselves."""
    pipeline = tiny_pipeline(dit=replace(TINY_DIT, use_learned_positional_embeddings=False))

    def peak(latent_frames: int) -> int:
        latents, frames = torch.randn(latent_frames, 4, 4, 6), 4 * latent_frames - 3
        request = videogen.Request(WORDS, num_frames=frames, out=tmp_path / f"{latent_frames}.mp4")
        request = request.checked(pipeline.card)
        recipe = pipeline.recipe(request, 0)
        return count(lambda: pipeline.finish(latents, recipe, out=request.out)).peak_bytes - latents.nbytes

    short, long = peak(7), peak(13)  # a first chunk, a last one, and some between
    assert long <= 1.001 * short
    assert len(read_video(tmp_path / "13.mp4")[0]) == 49


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAVING)
def test_on_a_gpu_the_same_clip_and_nothing_stays(name: str):
    options = {"seed": 3, "first_frame": picture(0), "output": "tensor", **STEPS}
    wanted = videogen.load(device="cuda", dtype="float32").generate(WORDS, **options)
    pipeline = videogen.load(device="cuda", dtype="float32", memory=whole(PLANS[name]))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        assert torch.equal(pipeline.generate(WORDS, **options), wanted)
    weights = sum(x.nbytes for net in (pipeline.dit, pipeline.vae, pipeline.text_encoder) for x in tensors(net))
    assert torch.cuda.memory_allocated() - before < 0.1 * weights
    assert all(x.device.type == "cpu" for x in pipeline.dit.parameters())
