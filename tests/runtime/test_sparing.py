"""When something fails in the middle of a clip: nothing denoised is lost, and the clip is the undisturbed one."""

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import videogen
from videogen.cli import main
from videogen.data.latents import clip_of, read_latents, save_latents
from videogen.data.video import read_recipe, read_video
from videogen.errors import Cancelled, FileError, InvalidRequest, Note, NumericalError, OutOfMemory
from videogen.pipeline import Pipeline, model_name, not_finite
from videogen.progress import Event
from videogen.request import Request
from videogen.runtime.memory import PLANS, Plan
from videogen.runtime.offload import Stages, tensors
from videogen.testing import TINY_DIT, tiny_pipeline

WORDS = "a red circle moves right"
FREE = replace(TINY_DIT, use_learned_positional_embeddings=False)  # any size and length
TOGETHER = {name: replace(plan, guidance_in_two=False) for name, plan in PLANS.items()}


def pipeline(plan: Plan | str = "balanced", dtype: torch.dtype = torch.float32, **options: Any) -> Pipeline:
    pipe = tiny_pipeline(dtype=dtype, **options)
    pipe.stages = Stages(PLANS[plan] if isinstance(plan, str) else plan, torch.device("cpu"))
    return pipe


def failing(function: Callable, *times: int, error: BaseException | None = None) -> Callable:
    """`function`, which raises in these of its calls (from 1 on)."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in times:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return function(*args, **kwargs)

    return call


def places(pipe: Pipeline) -> list[tuple]:
    return [(x.data_ptr(), x.dtype) for network in (pipe.text_encoder, pipe.dit, pipe.vae) for x in tensors(network)]


# ---- out of memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "dpm", "dpm-ode", "heun", "lcm", "diffusers"])
def test_a_step_that_failed_is_made_again_under_the_next_plan(sampler: str):
    keywords = {"sampler": sampler, "guidance_scale": 3.0, "output": "tensor", "seed": 5}
    wanted = pipeline().generate(WORDS, **keywords)
    for call in (1, 4):  # the first half of the first step, the second half of a later one
        pipe, seen = pipeline(), []
        before = places(pipe)
        pipe.dit.run_blocks = failing(pipe.dit.run_blocks, call)
        with pytest.warns(Note, match="stage denoise under the memory plan balanced: it goes on with low"):
            frames = pipe.generate(WORDS, on_step=seen.append, **keywords)
        assert torch.equal(frames, wanted)
        assert pipe.plan.name == "low"
        assert places(pipe) == before
        assert [event.step for event in seen if event.stage == "denoise"] == [1, 2, 3, 4]


def test_from_all_resident_to_networks_in_turn():
    keywords = {"guidance_scale": 1.0, "output": "tensor", "sampler": "dpm"}
    wanted = pipeline("fast").generate(WORDS, **keywords)
    pipe = pipeline("fast")
    pipe.dit.run_blocks = failing(pipe.dit.run_blocks, 3)
    with pytest.warns(Note, match="it goes on with balanced"):
        assert torch.equal(pipe.generate(WORDS, **keywords), wanted)
    assert torch.equal(pipe.generate(WORDS, **keywords), wanted)


def test_the_halves_of_guidance_come_apart_in_the_middle():
    """Then only up to the order of sums."""
    wanted = pipeline("fast").generate(WORDS, output="tensor", guidance_scale=3.0)
    pipe = pipeline("fast")
    pipe.dit.run_blocks = failing(pipe.dit.run_blocks, 3)
    with pytest.warns(Note):
        frames = pipe.generate(WORDS, output="tensor", guidance_scale=3.0)
    torch.testing.assert_close(frames, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("where", ["text", "encode", "decode", "weights"])
def test_every_other_stage_is_made_again_too(where: str, monkeypatch: pytest.MonkeyPatch):
    keywords = {
        "first_frame": np.random.default_rng(0).random((32, 48, 3)).astype(np.float32),
        "last_frame": np.random.default_rng(1).random((32, 48, 3)).astype(np.float32),
        "num_frames": 25,
        "output": "tensor",
    }
    plan = "low" if where in ("encode", "decode") else "balanced"
    wanted = pipeline(plan, dit=FREE).generate(WORDS, **keywords)
    pipe = pipeline(plan, dit=FREE)
    if where == "text":
        pipe.text_encoder.encoder.forward = failing(pipe.text_encoder.encoder.forward, 2)
    elif where == "encode":  # of two images the second: what was drawn for the first is drawn again
        pipe.vae.encoder.forward = failing(pipe.vae.encoder.forward, 2)
    elif where == "decode":  # in the third chunk, when two are given already
        pipe.vae.decoder.forward = failing(pipe.vae.decoder.forward, 3)
    else:
        from videogen.runtime import offload

        monkeypatch.setattr(offload, "on_device", failing(offload.on_device, 4))  # text, two images, then the DiT
    with pytest.warns(Note, match="it goes on with"):
        assert torch.equal(pipe.generate(WORDS, **keywords), wanted)


def test_with_a_step_cache_all_steps_are_made_again():
    from videogen.runtime.step_cache import Curve

    def made(pipe: Pipeline) -> torch.Tensor:
        pipe.__dict__["curve"] = Curve((0.0, 500.0, 1000.0), (1.0, 1.0, 1.0))
        return pipe.generate(WORDS, num_inference_steps=8, step_cache=0.5, output="tensor", sampler="dpm")

    wanted, pipe = made(pipeline()), pipeline()
    pipe.dit.run_blocks = failing(pipe.dit.run_blocks, 3)
    with pytest.warns(Note):
        assert torch.equal(made(pipe), wanted)


def test_once_and_then_flags_that_would_fit(tmp_path: Path):
    pipe = pipeline(dit=FREE)
    pipe.dit.run_blocks = failing(pipe.dit.run_blocks, 2, 3)
    with pytest.warns(Note), pytest.raises(OutOfMemory, match="stage denoise, under the memory plan low") as caught:
        pipe.generate(WORDS, num_frames=25, height=128, width=192)
    text = str(caught.value)
    assert len(text.splitlines()) == 3
    assert "MiB are free" in text or "GiB are free" in text
    flags = caught.value.hint.split(" or ")
    assert [flag.split()[0] for flag in flags] == ["--frames", "--size", "--dtype"]
    assert all("iB)" in flag for flag in flags)
    smaller = int(flags[0].split()[1]), *map(int, flags[1].split()[1].split("x"))
    videogen.Request(WORDS, num_frames=smaller[0]).checked(pipe.card)
    videogen.Request(WORDS, width=smaller[1], height=smaller[2]).checked(pipe.card)
    # The next clip may step down again, and comes out.
    assert len(pipe.generate(WORDS).frames) == 9


def test_other_errors_are_left_alone():
    pipe = pipeline()
    pipe.dit.run_blocks = failing(pipe.dit.run_blocks, 2, error=RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        pipe.generate(WORDS)
    assert pipe.plan.name == "balanced"


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [4, 12])
def test_the_step_whose_latents_are_not_finite_is_named(steps: int):
    pipe, calls = pipeline(), 0

    def broken(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return output * (float("nan") if calls == 3 else 1)

    pipe.dit.register_forward_hook(broken)
    with pytest.raises(NumericalError, match=f"latents after step 3 of {steps}"):
        pipe.generate(WORDS, guidance_scale=1.0, num_inference_steps=steps)


def test_what_to_try_depends_on_the_dtype():
    hints = [not_finite("frames", dtype).hint for dtype in (torch.float16, torch.bfloat16, torch.float32)]
    assert hints[:2] == ["--dtype bfloat16 or --dtype float32", "--dtype float32"]
    assert "fetch the model again" in hints[2]
    pipe = pipeline()
    pipe.text_encoder.encoder.shared.weight.data[:] = float("inf")
    with pytest.raises(NumericalError, match="text embeddings"):
        pipe.generate(WORDS)


@pytest.mark.parametrize("plan", ["fast", "balanced"])
def test_frames_that_overflow_are_decoded_once_more_in_float32(plan: str, tmp_path: Path):
    """The last convolution of the decoder overflows in bfloat16 only, in the second of three chunks."""

    def make(pipe: Pipeline) -> Pipeline:
        conv, calls = pipe.vae.decoder.conv_out, 0

        def overflow(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return output + (float("inf") if output.dtype == torch.bfloat16 and calls == 2 else 0)

        conv.register_forward_hook(overflow)
        return pipe

    options = {"num_frames": 25, "guidance_scale": 1.0}
    latents = pipeline(plan, torch.bfloat16, dit=FREE).generate(WORDS, output="latent", **options)
    pipe = make(pipeline(plan, torch.bfloat16, dit=FREE))
    before = places(pipe)
    with pytest.warns(Note, match=r"not finite in bfloat16: they are decoded once more in float32"):
        video = pipe.generate(WORDS, out=tmp_path / "clip.png", **options)
    assert video.settings["decode_dtype"] == "float32"
    recipe = read_recipe(tmp_path / "clip")
    assert recipe is not None
    assert recipe["decode_dtype"] == "float32"
    wide = pipeline(plan, torch.bfloat16, dit=FREE)
    wanted = wide.vae.float().decode(latents.float().movedim(1, 2))[0].movedim(0, 1)
    wanted = ((wanted / 2 + 0.5).clamp(0, 1) * 255).round().byte().movedim(1, -1).numpy()
    assert np.array_equal(video.frames, wanted)
    assert places(pipe) == before
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]


# ---- latents that are kept ------------------------------------------------------------------------------------------


def interrupted(stage: str, error: BaseException) -> Callable[[Any], None]:
    def watch(event: Any) -> None:
        if event.stage == stage:
            raise error

    return watch


FAILURES = {
    "interrupt": KeyboardInterrupt(),
    "cancelled": Cancelled(),
    "memory": torch.OutOfMemoryError("no"),
    "disk": OSError(errno.ENOSPC, "No space left on device"),
}


@pytest.mark.filterwarnings("ignore::videogen.errors.Note")
@pytest.mark.parametrize("failure", FAILURES)
def test_latents_are_kept_when_decoding_fails_and_finished_later(failure: str, tmp_path: Path):
    error, out = FAILURES[failure], tmp_path / "clip.png"
    wanted = pipeline().generate(WORDS, seed=3, out=tmp_path / "wanted.png")
    pipe = pipeline()
    pipe.vae.decoder.forward = failing(pipe.vae.decoder.forward, 1, 2, error=error)
    kinds = {"memory": OutOfMemory, "disk": FileError, "interrupt": KeyboardInterrupt, "cancelled": Cancelled}
    with pytest.raises(kinds[failure]) as caught:
        pipe.generate(WORDS, seed=3, out=out)
    kept = tmp_path / "clip.png.latents.safetensors"
    assert sorted(path.name for path in tmp_path.iterdir()) == [kept.name, "wanted"]
    told = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert f"videogen decode {kept}" in told
    latents, recipe = read_latents(kept)
    assert torch.equal(latents, caught.value.latents[0])  # type: ignore[attr-defined]
    video = pipeline().finish(latents, recipe, out=out)
    assert np.array_equal(video.frames, wanted.frames)
    assert read_recipe(tmp_path / "clip") == read_recipe(tmp_path / "wanted")
    assert (video.seed, video.fps, video.settings) == (wanted.seed, wanted.fps, wanted.settings)


def test_of_several_clips_those_that_are_not_made_are_kept(tmp_path: Path):
    pipe, outs = pipeline(), [tmp_path / f"{n}.mp4" for n in range(3)]
    pipe.vae.decoder.forward = failing(pipe.vae.decoder.forward, 2, error=KeyboardInterrupt())  # one chunk is one clip
    with pytest.raises(KeyboardInterrupt) as caught:
        pipe.generate([WORDS] * 3, seed=[1, 2, 3], out=outs)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["0.mp4", "1.mp4.latents.safetensors", "2.mp4.latents.safetensors"]
    assert [read_latents(tmp_path / name)[1]["seed"] for name in names[1:]] == [2, 3]
    assert len(caught.value.latents) == 2  # type: ignore[attr-defined]


def test_a_picture_that_is_gone_by_then_takes_nothing_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The recipe is of the request as it was asked; and what keeping raises is not what is told."""
    picture, out = tmp_path / "a.png", tmp_path / "clip.mp4"
    Image.new("RGB", (48, 32), "red").save(picture)
    pipe = pipeline(dit=FREE)
    name = Request(WORDS, first_frame=picture).recipe()["first_frame"]

    def gone(event: Event) -> None:
        if event.stage == "denoise":
            picture.unlink(missing_ok=True)
        if event.stage == "decode":
            raise Cancelled

    with pytest.raises(Cancelled):
        pipe.generate(WORDS, first_frame=picture, out=out, on_step=gone)
    assert read_latents(f"{out}.latents.safetensors")[1]["first_frame"] == name
    broken = failing(save_latents, *range(1, 9), error=ValueError("no name"))
    monkeypatch.setattr("videogen.pipeline.save_latents", broken)
    with pytest.raises(Cancelled):
        pipe.generate(WORDS, out=out, on_step=gone)


def test_without_room_beside_the_clip_they_go_to_the_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("videogen.pipeline.gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setattr("videogen.pipeline.save_latents", failing(save_latents, 1, error=FileError("full")))
    pipe = pipeline()
    with pytest.raises(Cancelled) as caught:
        pipe.generate(WORDS, out=tmp_path / "clip.mp4", on_step=interrupted("decode", Cancelled()))
    kept = tmp_path / "tmp" / "clip.mp4.latents.safetensors"
    assert str(kept) in str(caught.value)
    assert kept.exists()
    monkeypatch.setattr("videogen.pipeline.save_latents", failing(save_latents, 1, 2, error=FileError("full")))
    with pytest.raises(Cancelled):
        pipe.generate(WORDS, out=tmp_path / "clip.mp4", on_step=interrupted("decode", Cancelled()))


def test_nothing_is_kept_of_a_clip_that_is_made_unless_it_is_asked_for(tmp_path: Path):
    out = tmp_path / "clip.mp4"
    pipeline().generate(WORDS, out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
    out.unlink()
    video = pipeline().generate(WORDS, out=out, keep_latents=True)
    latents, recipe = read_latents(tmp_path / "clip.mp4.latents.safetensors")
    assert recipe == video.settings
    assert "keep_latents" not in recipe
    assert torch.equal(latents[None], pipeline().generate(WORDS, output="latent"))


def test_a_file_of_latents_is_never_replaced_and_checked_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    latents = torch.randn(3, 4, 4, 6)
    first, second = (save_latents(tmp_path / "clip.mp4", latents, {"fps": 8}) for _ in range(2))
    assert (first.name, second.name) == ("clip.mp4.latents.safetensors", "clip-2.mp4.latents.safetensors")
    assert save_latents(tmp_path / "there" / "%03d.png", latents, {}).name == "there.png.latents.safetensors"
    monkeypatch.chdir(tmp_path)
    assert save_latents("%04d.png", latents, {}).name == f"{tmp_path.name}.png.latents.safetensors"
    assert clip_of("/%04d.png") == Path("/frames.png")
    assert torch.equal(read_latents(second)[0], latents)
    second.write_bytes(second.read_bytes()[:-8])
    with pytest.raises(InvalidRequest, match="holds no latents"):
        read_latents(second)
    with pytest.raises(InvalidRequest, match="not finite"):
        read_latents(save_latents(tmp_path / "nan.mp4", latents * float("nan"), {}))
    save_file({"latents": latents[0]}, tmp_path / "flat", metadata={"videogen": "{}"})
    with pytest.raises(InvalidRequest, match=r"shape \[4, 4, 6\]"):
        read_latents(tmp_path / "flat")


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """Latents of the bundled model, whose clip could not be written, beside the clip of an undisturbed run."""
    monkeypatch.chdir(tmp_path)
    argv = ["text-to-video", WORDS, "--steps", "2", "--seed", "7", "--device", "cpu", "--memory", "balanced"]
    assert main([*argv, "--out", "wanted.png"]) == 0
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr("videogen.data.video._into_place", failing(lambda *_: None, 1, error=full))
        assert main([*argv, "--out", "clip.png"]) == FileError.exit_code
    lines = capsys.readouterr().err.strip().splitlines()[-3:]
    assert [line.split(":")[0].strip() for line in lines] == ["error", "why", "try"]
    assert "videogen decode clip.png.latents.safetensors --model tiny" in lines[2]
    return tmp_path / "clip.png.latents.safetensors"


def test_the_command_finishes_the_clip(kept: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["decode", kept.name, "--json", "--device", "cpu"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["path"], facts["seed"]) == ("clip", 7)
    assert np.array_equal(read_video("clip")[0], read_video("wanted")[0])
    assert read_recipe("clip") == read_recipe("wanted")
    assert main(["decode", kept.name]) == FileError.exit_code  # it is there already
    assert main(["decode", kept.name, "--out", "two.webp", "--quiet", "--no-metadata"]) == 0
    assert read_recipe("two.webp") is None
    assert main(["decode", "gone.safetensors"]) == InvalidRequest.exit_code
    assert main(["decode", kept.name, kept.name, "--out", "one.mp4"]) == InvalidRequest.exit_code
    latents = read_latents(kept)[0]
    for name, recipe in (
        ("model", {"model": ["x"], "fps": 8}),
        ("fps", {"model": "tiny"}),
        ("fps", {"model": "tiny", "fps": "x"}),
    ):
        path = save_latents("bad.mp4", latents, recipe)
        capsys.readouterr()
        assert main(["decode", str(path), "--out", "bad.mp4"]) == InvalidRequest.exit_code
        assert name in capsys.readouterr().err
    half = save_latents("half.mp4", latents, {"model": "tiny", "fps": 8, "dtype": "bfloat16"})
    assert main(["decode", kept.name, str(half), "--out", "both"]) == InvalidRequest.exit_code
    assert "several dtypes" in capsys.readouterr().err
    images = {"sha256:0": {"webp": "AAAA", "pixels": "0"}}
    pictured = save_latents("pictured.mp4", latents, {"model": "tiny", "fps": 8, "images": images})
    assert main(["decode", str(pictured), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["images"] == ["sha256:0"]
    assert main(["decode", kept.name, "--kernel", "sdpa"]) == InvalidRequest.exit_code
    save_latents("other.mp4", torch.zeros(3, 99, 8, 8), {"model": "tiny", "fps": 8})
    assert main(["decode", "other.mp4.latents.safetensors"]) == InvalidRequest.exit_code


def test_a_single_file_is_named_by_its_path(tmp_path: Path):
    card = replace(pipeline().card, file=tmp_path / "model.safetensors")
    assert model_name(card) == str(tmp_path / "model.safetensors")
