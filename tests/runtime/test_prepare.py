"""All optional things together: they change no number, leave no trace, and what is lossy says so in the recipe."""

import copy

import pytest
import torch
from torch import nn

import videogen
from videogen.errors import InvalidRequest
from videogen.models.attention import sdpa
from videogen.runtime.attention8 import Attention8
from videogen.runtime.memory import PLANS
from videogen.runtime.offload import Stages
from videogen.runtime.prepare import prepare, unprepare
from videogen.testing import tiny_pipeline

CPU = torch.device("cpu")
CLIP = {"prompt": "a red circle moves right", "num_inference_steps": 3, "guidance_scale": 4.0, "output": "tensor"}


@pytest.fixture
def pipe():
    return tiny_pipeline(dtype=torch.float64)


@pytest.mark.parametrize("plan", PLANS)
def test_a_prepared_pipeline_makes_the_plain_clip(pipe, plan: str):
    plain = pipe.generate(**CLIP)
    pipe.stages = Stages(PLANS[plan], CPU)
    prepare(pipe.dit, pipe.vae, pipe.stages)
    torch.testing.assert_close(pipe.generate(**CLIP), plain, rtol=0, atol=1e-8)  # guidance's difference is float32


@pytest.mark.parametrize(
    "switches", [{}, {"kernel": "int8", "quantize": "int8"}, {"kernel": "math", "quantize": "fp8"}]
)
def test_unprepare_leaves_the_plain_model(pipe, switches: dict):
    plain, weights = pipe.generate(**CLIP), copy.deepcopy(pipe.dit.state_dict())
    prepare(pipe.dit, pipe.vae, Stages(PLANS["fast"], CPU), **switches)
    assert pipe.dit.state_dict().keys() == weights.keys()
    unprepare(pipe.dit, pipe.vae)
    assert all(torch.equal(weights[name], tensor) for name, tensor in pipe.dit.state_dict().items())
    assert torch.equal(pipe.generate(**CLIP), plain)
    assert all(block.attention.kernel is sdpa for block in pipe.dit.blocks)
    assert not any("rows" in vars(m) or "forward" in vars(m) for m in pipe.dit.modules() if isinstance(m, nn.Module))


def test_preparing_twice_is_preparing_once(pipe):
    stages = Stages(PLANS["fast"], CPU)
    prepare(pipe.dit, pipe.vae, stages, kernel="int8")
    once = pipe.generate(**CLIP)
    prepare(pipe.dit, pipe.vae, stages, kernel="int8")
    assert torch.equal(pipe.generate(**CLIP), once)
    assert not any(
        isinstance(block.attention.kernel, Attention8) and isinstance(block.attention.kernel.plain, Attention8)
        for block in pipe.dit.blocks
    )


def test_all_rows_of_a_clip_are_computed_at_once(pipe, monkeypatch):
    prepare(pipe.dit, pipe.vae, Stages(PLANS["fast"], CPU))
    modulation = pipe.dit.modulation
    added, add = [], modulation.add
    monkeypatch.setattr(modulation, "add", lambda keys, *rest: (added.append(len(keys)), add(keys, *rest)))
    pipe.generate(**CLIP)
    assert added == [3]
    pipe.generate(**CLIP | {"num_inference_steps": 90})  # more than there is room for at first
    assert added == [3, 90]


def test_what_is_lossy_stands_in_the_recipe():
    lossy, plain = videogen.load("tiny", quantize="int8", kernel="int8"), videogen.load("tiny", kernel="math")
    recipe = lossy.generate("a red cross", num_inference_steps=1).settings
    assert (recipe["quantize"], recipe["kernel"]) == ("int8", "int8")
    recipe = plain.generate("a red cross", num_inference_steps=1).settings
    assert not {"quantize", "kernel"} & recipe.keys()


@pytest.mark.parametrize("switches", [{"kernel": "fastest"}, {"quantize": "int3"}])
def test_an_unknown_name_is_refused_with_those_there_are(switches: dict):
    with pytest.raises(InvalidRequest, match="there is no") as error:
        videogen.load("tiny", **switches)
    assert "one of" in str(error.value.hint)
