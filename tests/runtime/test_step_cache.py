"""A step cache leaves out what its budget allows, does not mix branches or clips, and is off exactly."""

import dataclasses
import math
import warnings
from typing import Any

import pytest
import torch

from videogen.errors import InvalidRequest, Note
from videogen.pipeline import Pipeline
from videogen.runtime import step_cache as room
from videogen.runtime.memory import PLANS
from videogen.runtime.offload import Stages
from videogen.runtime.step_cache import Curve, StepCache, curve_of, load_curve, recorded, save_curve
from videogen.testing import tiny_pipeline
from videogen.types import Conditioning, Tokens
from videogen.weights.card import read_card
from videogen.weights.hub import find_model

FLAT = Curve((0.0, 1000.0), (1.0, math.e))  # a change of time by 100 is one of the magnitude by 10 %


def pipeline(*, in_two: bool = False) -> Pipeline:
    pipe = tiny_pipeline(dtype=torch.float64)
    pipe.curve = FLAT
    pipe.stages = Stages(dataclasses.replace(PLANS["fast"], guidance_in_two=in_two), torch.device("cpu"))
    return pipe


def latents(pipe: Pipeline, prompt: str | list[str] = "a red circle", **keywords: Any):
    events = []
    keywords = {"num_inference_steps": 12, "output": "latent", "on_step": events.append, **keywords}
    return pipe.generate(prompt, **keywords), [e.skipped for e in events if e.stage == "denoise"]


def tokens(x: torch.Tensor) -> Tokens:
    return Tokens(x=x, position=None, time=torch.zeros(len(x), 4), text_length=1)


def cache_of(added, budget: float, **keywords) -> tuple[StepCache, list[float]]:
    """A cache around a loop that adds `added(t)` to its tokens, and the times at which the loop ran."""
    ran = []

    def loop(given: Tokens) -> Tokens:
        ran.append(cache.time)
        return dataclasses.replace(given, x=given.x + added(cache.time))

    cache = StepCache(loop, FLAT, budget, **keywords)
    return cache, ran


def call(cache: StepCache, t: float, told: Conditioning, name: str = "alone") -> torch.Tensor:
    cache.announce(t, {name: told})
    with torch.no_grad():
        return cache(tokens(torch.zeros(1, 3, 2))).x


def test_what_is_left_out_is_foretold_by_a_straight_line_and_text_stays():
    cache, ran = cache_of(lambda t: (t / 100) ** 2, budget=0.35)
    told = Conditioning()
    outs = {t: call(cache, t, told) for t in (700.0, 600.0, 500.0, 400.0, 300.0, 200.0)}
    # 1 - exp(-0.1) = 0.095 and 1 - exp(-0.2) = 0.181 are 0.276 together; the third makes 0.535
    assert ran == [700, 600, 300]
    assert (cache.evaluations, cache.skipped) == (6, 3)
    for t, expected in {500.0: 23.0, 400.0: 10.0, 200.0: 0.0}.items():  # of 49, 36 at 700, 600; of 36, 9 at 600, 300
        assert torch.allclose(outs[t][:, 1:], torch.full((1, 2, 2), expected), atol=1e-5)
        assert torch.equal(outs[t][:, :1], torch.zeros(1, 1, 2))

    cache, ran = cache_of(lambda t: 3 + t / 100, budget=0.35, straight=False)
    outs = {t: call(cache, t, told) for t in (700.0, 600.0, 500.0)}
    assert torch.allclose(outs[500.0][:, 1:], torch.full((1, 2, 2), 9.0)), "the last addition, as it was"


def test_the_start_is_computed_and_one_time_asked_twice_is_one_point_of_the_line():
    cache, ran = cache_of(lambda t: t, budget=1.0)
    told = Conditioning()
    for t in (999.0, 999.0, 900.0, 900.0, 801.0):
        call(cache, t, told)
    assert ran == [999, 999, 900, 900, 801]
    assert torch.allclose(call(cache, 700.0, told)[:, 1:], torch.full((1, 2, 2), 700.0))
    assert ran[-1] == 801


def test_branches_have_their_own_memory_and_one_told_something_else_starts_anew():
    here, there = Conditioning(), Conditioning()
    cache, ran = cache_of(lambda t: t, budget=1.0)
    for t in (700.0, 600.0):
        call(cache, t, here, "cond")
    call(cache, 600.0, there, "uncond")
    assert ran == [700, 600, 600], "nothing is known of the other branch"
    call(cache, 500.0, here, "cond")
    assert ran == [700, 600, 600]
    call(cache, 400.0, there, "cond")  # as when the last frame is let go
    assert ran == [700, 600, 600, 400]


def test_gradients_go_through_the_plain_loop():
    cache, ran = cache_of(lambda t: t, budget=1.0)
    for t in (700.0, 600.0, 500.0):
        cache.announce(t, {"alone": Conditioning()})
        cache(tokens(torch.zeros(1, 3, 2)))
    assert ran == [700, 600, 500]
    assert cache.evaluations == 0


@pytest.mark.parametrize("sampler", ["ddim", "dpm", "heun"])
def test_budget_nought_is_off_bit_for_bit_and_the_loop_is_given_back(sampler):
    pipe = pipeline()
    plain, skipped = latents(pipe, sampler=sampler)
    assert not any(skipped)
    saved, skipped = latents(pipe, sampler=sampler, step_cache=0.2)
    assert skipped[-1] > 3
    assert skipped == sorted(skipped)
    assert not torch.equal(saved, plain)
    assert "run_blocks" not in pipe.dit.__dict__
    for off in (0, None):
        assert torch.equal(latents(pipe, sampler=sampler, step_cache=off)[0], plain)
    with room.step_cache(pipe.dit, FLAT, 0.0) as cache:  # not even a second question at one time is left out
        assert torch.equal(latents(pipe, sampler=sampler)[0], plain)
    assert cache.skipped == 0


@pytest.mark.parametrize("until", [1.0, 0.6])
def test_guidance_in_two_calls_and_the_company_in_a_batch_change_nothing(until):
    keywords = {"step_cache": 0.2, "guidance_until": until}
    one, skipped = latents(pipeline(), **keywords)
    two, skipped_in_two = latents(pipeline(in_two=True), **keywords)
    torch.testing.assert_close(two, one, rtol=0, atol=1e-6)  # outputs are float32
    assert 0 < skipped[-1] <= skipped_in_two[-1]
    both, _ = latents(pipeline(), ["a red circle", "a blue square moves up"], seed=[0, 1], **keywords)
    torch.testing.assert_close(both[:1], one, rtol=0, atol=1e-6)
    again, _ = latents(pipeline(), **keywords)
    assert torch.equal(again, one), "each clip begins with an empty memory"


def test_a_curve_is_measured_kept_beside_the_weights_and_refused_for_others(tmp_path):
    pipe = pipeline()
    plain, _ = latents(pipe)
    with recorded(pipe.dit) as seen:
        assert torch.equal(latents(pipe)[0], plain)
    assert "run_blocks" not in pipe.dit.__dict__
    curve = curve_of(seen)
    assert curve.times == tuple(sorted(pipe.schedule.times(12)[:-1]))
    with pytest.raises(InvalidRequest, match="not calibrated"):
        load_curve(tmp_path, transformer_sha256="a")
    save_curve(tmp_path, curve, transformer_sha256="a")
    assert load_curve(tmp_path, transformer_sha256="a") == curve
    with pytest.raises(InvalidRequest, match="other weights"):
        load_curve(tmp_path, transformer_sha256="b")


def test_a_model_without_a_curve_refuses_before_anything_is_computed():
    events = []
    with pytest.raises(InvalidRequest, match="not calibrated"):
        tiny_pipeline().generate("a red circle", step_cache=0.1, on_step=events.append)
    assert not events


def test_a_curve_was_measured_without_loras_and_a_note_says_so(tmp_path):
    pipe = tiny_pipeline()
    pipe.card = dataclasses.replace(pipe.card, folder=tmp_path)
    save_curve(tmp_path, FLAT, transformer_sha256=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipe.curve == FLAT
    del pipe.curve
    pipe.loras = [object()]  # type: ignore[list-item]  # whichever
    with pytest.warns(Note, match="without the LoRA"):
        assert pipe.curve == FLAT


def test_a_curve_is_straight_in_its_logarithm_and_stays_outside():
    assert [FLAT.at(t) for t in (-1.0, 0.0, 500.0, 1000.0, 2000.0)] == pytest.approx(
        [1, 1, math.e**0.5, math.e, math.e]
    )


def test_the_bundled_models_curve_was_measured_on_its_weights():
    """Trained anew, it is calibrated anew: `python scripts/price.py calibrate checkpoints/tiny`."""
    card = read_card(find_model("tiny"))
    sha256 = card.sha256["transformer/diffusion_pytorch_model.safetensors"]
    assert len(load_curve(card.folder, transformer_sha256=sha256).times) == card.num_inference_steps
