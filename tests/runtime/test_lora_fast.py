"""LoRAs and everything optional together: beside the weights or in them, on every memory plan, the same clip."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import videogen
from videogen.config import DiTConfig
from videogen.errors import InvalidRequest
from videogen.models.lora import (
    Update,
    attach,
    detach,
    has_adapters,
    is_merged,
    linear_maps,
    merge,
    set_scales,
    unmerge,
)
from videogen.pipeline import Pipeline
from videogen.request import Request
from videogen.runtime.dit import _joined, _parts, fast_dit
from videogen.runtime.memory import PLANS
from videogen.runtime.offload import Stages
from videogen.runtime.prepare import prepare, unprepare
from videogen.testing import TINY_DIT, tiny_batch, tiny_pipeline
from videogen.weights.lora import save_lora

CPU = torch.device("cpu")
CLIP = {"prompt": "a red circle moves right", "num_inference_steps": 2, "guidance_scale": 4.0, "output": "latent"}


def updates_for(dit: nn.Module, *, seed: int = 0, rank: int = 2, size: float = 0.3) -> dict[str, Update]:
    """For every linear map, those that are cached and parked too."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return size * torch.randn(shape, generator=generator).to(next(dit.parameters()).dtype)

    maps = linear_maps(dit)
    return {p: Update(normal(rank, m.in_features), normal(m.out_features, rank), 1.0) for p, m in maps.items()}


@torch.no_grad()
def dense(pipe: Pipeline, updates: dict[str, Update], scale: float = 1.0) -> Pipeline:
    for path, update in updates.items():
        pipe.dit.get_submodule(path).weight += scale * update.alpha / update.rank * update.B @ update.A
    return pipe


@pytest.fixture
def pipe() -> Pipeline:
    return tiny_pipeline(dtype=torch.float64)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("way", ["beside", "merged"])
def test_a_prepared_pipeline_makes_the_clip_of_the_dense_weights(pipe, plan: str, way: str):
    plain, updates = pipe.generate(**CLIP), updates_for(pipe.dit)
    expected = dense(tiny_pipeline(dtype=torch.float64), updates).generate(**CLIP)
    assert not torch.allclose(plain, expected, atol=1e-2)
    attach(pipe.dit, updates)
    if way == "merged":
        merge(pipe.dit)
    pipe.stages = Stages(PLANS[plan], CPU)
    prepare(pipe.dit, pipe.vae, pipe.stages)
    torch.testing.assert_close(pipe.generate(**CLIP), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("way", ["beside", "merged"])
def test_another_scale_is_seen_by_all_that_is_kept(pipe, plan: str, way: str):
    """Modulation is computed once per time, blocks stream: neither may show an older scale."""
    plain, updates = pipe.generate(**CLIP), updates_for(pipe.dit)
    attach(pipe.dit, updates)
    if way == "merged":
        merge(pipe.dit)
    pipe.stages = Stages(PLANS[plan], CPU)
    prepare(pipe.dit, pipe.vae, pipe.stages)
    pipe.generate(**CLIP)
    for scale in (0.5, 0.0):
        set_scales(pipe.dit, {"default": scale})
        expected = dense(tiny_pipeline(dtype=torch.float64), updates, scale).generate(**CLIP)
        torch.testing.assert_close(pipe.generate(**CLIP), expected, rtol=0, atol=1e-8)
    unprepare(pipe.dit, pipe.vae)
    detach(pipe.dit)
    pipe.stages = Stages(PLANS["fast"], CPU)
    assert torch.equal(pipe.generate(**CLIP), plain)


def test_merged_weights_stay_one_storage_for_the_product_of_q_k_v(pipe):
    updates = updates_for(pipe.dit)
    fast_dit(pipe.dit, join=True)
    attach(pipe.dit, updates)
    merge(pipe.dit)
    expected = dense(tiny_pipeline(dtype=torch.float64), updates)
    for block, other in zip(pipe.dit.blocks, expected.dit.blocks, strict=True):
        weights, _ = _parts(block.attention)
        joined = _joined(weights)
        assert joined is not None
        to_q, to_k, to_v = (getattr(other.attention, name).weight for name in ("to_q", "to_k", "to_v"))
        torch.testing.assert_close(joined, torch.cat([to_q, to_k, to_v]))


def test_8_bits_are_made_of_merged_weights_or_refused():
    deep = {"dit": dataclasses.replace(TINY_DIT, num_layers=3), "dtype": torch.float64}  # the ends stay as they are
    pipe, expected = tiny_pipeline(**deep), tiny_pipeline(**deep)
    updates = updates_for(pipe.dit)
    attach(pipe.dit, updates)
    with pytest.raises(InvalidRequest, match="cannot be quantised"):
        prepare(pipe.dit, pipe.vae, pipe.stages, quantize="int8")
    merge(pipe.dit)
    with torch.no_grad():
        for path, linear in linear_maps(expected.dit).items():
            linear.weight.copy_(pipe.dit.get_submodule(path).weight)
    for one in (pipe, expected):
        prepare(one.dit, one.vae, one.stages, quantize="int8")
    assert torch.equal(pipe.generate(**CLIP), expected.generate(**CLIP))
    for change in (
        lambda: set_scales(pipe.dit, {"default": 0.5}),
        lambda: unmerge(pipe.dit),
        lambda: detach(pipe.dit),
    ):
        with pytest.raises(InvalidRequest, match="quantised"):
            change()


COMPILED = """
from dataclasses import replace
import torch
from videogen.models.lora import add_lora, adapters, merge, set_scales
from videogen.runtime.compile import compile_blocks
from videogen.runtime.dit import fast_dit
from videogen.testing import TINY_DIT, tiny_batch, tiny_pipeline

torch.set_grad_enabled(False)
one = {"dit": replace(TINY_DIT, num_layers=1)}
plain, dit = tiny_pipeline(**one).dit, fast_dit(tiny_pipeline(**one).dit)
for model in (plain, dit):
    add_lora(model, rank=2, generator=torch.Generator().manual_seed(0))
    for adapter in adapters(model).values():
        adapter.B.normal_(generator=torch.Generator().manual_seed(1))
compile_blocks(dit, backend="eager")
seen = []
for change in (lambda m: None, lambda m: set_scales(m, {"default": 2}), merge):
    for model in (plain, dit):
        change(model)
    seen.append(dit(*tiny_batch()))
    assert torch.allclose(seen[-1], plain(*tiny_batch()), atol=1e-5)
assert not torch.allclose(seen[0], seen[1], atol=1e-3)
assert torch.allclose(seen[1], seen[2], atol=1e-5)
"""


@pytest.mark.slow
def test_compiled_blocks_see_adapters_scales_and_merging():
    """In a process of its own, as in test_compile.py."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


def test_gradients_take_the_plain_way_through_adapters(pipe):
    updates = updates_for(pipe.dit)
    other = tiny_pipeline(dtype=torch.float64)
    for one in (pipe, other):
        attach(one.dit, updates)
    prepare(pipe.dit, pipe.vae, pipe.stages)
    for one in (pipe, other):
        one.dit(*tiny_batch(TINY_DIT, dtype=torch.float64)).square().mean().backward()
    for mine, theirs in zip(pipe.dit.parameters(), other.dit.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)


# ---- load -----------------------------------------------------------------------------------------------------------

TINY_CLIP: dict[str, Any] = {"prompt": "a red cross", "num_inference_steps": 1, "output": "latent"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("loras")
    dit = videogen.load("tiny").dit
    dit.requires_grad_(False)
    found = []
    for seed, form in enumerate(("peft", "kohya")):
        updates = updates_for(dit, seed=seed, size=0.15)
        found.append(save_lora(folder / f"{form}.safetensors", updates, form=form))
    return found


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    pipe = videogen.load("tiny")
    assert "merge_lora" not in pipe.made_with()
    return pipe.generate(**TINY_CLIP)


def test_loaded_loras_are_one_clip_on_every_plan_and_either_way(files, plain):
    clips = {}
    for plan, way in (("fast", None), ("fast", False), ("balanced", None), ("low", True)):
        pipe = videogen.load("tiny", memory=plan, lora=[(files[0], 0.5), files[1]], merge_lora=way)
        chosen = not PLANS[plan].stages_in_turn if way is None else way
        assert (is_merged(pipe.dit), has_adapters(pipe.dit)) == (chosen, not chosen)
        assert pipe.made_with()["merge_lora"] is chosen
        clips[plan, way] = pipe.generate(**TINY_CLIP)
    first = clips["fast", False]
    assert not torch.allclose(first, plain, atol=0.02)
    for clip in clips.values():
        # Merged by request where weights come from their file, they are in the dtype of the run all the same.
        torch.testing.assert_close(clip, first, rtol=0, atol=1e-3)


def test_scales_at_run_time(files, plain):
    for merged in (True, False):
        pipe = videogen.load("tiny", lora=[*files], lora_scale=[0.0, 0.0], merge_lora=merged)
        assert torch.equal(pipe.generate(**TINY_CLIP), plain)
        pipe.set_lora_scale(0.5, 1)
        again = videogen.load("tiny", lora=[(files[0], 0.5), files[1]], merge_lora=merged)
        assert torch.equal(pipe.generate(**TINY_CLIP), again.generate(**TINY_CLIP))
        pipe.set_lora_scale(0, 0)
        assert torch.equal(pipe.generate(**TINY_CLIP), plain)
        with pytest.raises(InvalidRequest, match="1 scales are given for 2"):
            pipe.set_lora_scale(1)
        with pytest.raises(InvalidRequest, match="finite"):
            pipe.set_lora_scale(1, float("inf"))


def test_the_recipe_names_each_file_and_scale(files):
    pipe = videogen.load("tiny", lora=[files[0], (files[1], "1/r")], lora_scale=0.25)
    pipe.set_lora_scale(0.75, 1)
    request = Request("a red cross").checked(pipe.card)
    recipe = pipe.recipe(request, 0)
    assert [(one["file"], one["scale"]) for one in recipe["lora"]] == [
        ("peft.safetensors", 0.75),
        ("kohya.safetensors", "1.0/r"),
    ]
    assert all(len(one["sha256"]) == 64 for one in recipe["lora"])
    json.dumps(recipe)
    pipe.loras = []
    assert "lora" not in pipe.recipe(request, 0)


def test_quantised_models_have_them_merged(files):
    pipe = videogen.load("tiny", memory="low", lora=files[0], quantize="int8")
    assert is_merged(pipe.dit)
    with pytest.raises(InvalidRequest, match="quantised"):
        pipe.set_lora_scale(0.5)


def test_a_saved_model_has_them_inside(files, tmp_path):
    pipe = videogen.load("tiny", dtype="float32", lora=(files[0], 0.5), merge_lora=False)
    before = copy.deepcopy(pipe.dit.state_dict())
    pipe.save(tmp_path / "mine")
    assert pipe.dit.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.dit.state_dict().items())
    saved = videogen.load(tmp_path / "mine")
    assert saved.card.name == "mine"
    assert saved.card.provenance["merged"]["lora"] == [pipe.loras[0].recipe]
    assert saved.card.provenance["merged"]["model"] == "tiny"
    torch.testing.assert_close(saved.generate(**TINY_CLIP), pipe.generate(**TINY_CLIP), rtol=0, atol=1e-4)


def test_another_models_lora_is_refused_before_weights_are_read(files, tmp_path, monkeypatch):
    with torch.device("meta"):
        big = videogen.models.dit.DiT(DiTConfig(num_layers=1))
    zeros = {
        p: Update(torch.zeros(1, m.in_features), torch.zeros(m.out_features, 1), 1.0)
        for p, m in linear_maps(big).items()
        if "attention" in p
    }
    path = save_lora(tmp_path, zeros)
    monkeypatch.setattr("videogen.pipeline.load_parts", lambda *_, **__: 1 / 0)
    with pytest.raises(InvalidRequest, match="does not fit tiny") as error:
        videogen.load("tiny", lora=[files[0], path])
    assert "zai-org/CogVideoX-2b" in error.value.hint
