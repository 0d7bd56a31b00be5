"""What a training would take, told before it starts: numbers against formulas and against the networks themselves."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from videogen.config import DiTConfig, LoraConfig, load_training
from videogen.models.dit import DiT
from videogen.testing import TINY_DIT, tiny_batch
from videogen.training.dry_run import GPUS, Work, dit_facts, estimate, flops_per_sample, table

CONFIGS = Path(__file__).parents[2] / "configs" / "train"
GRID = (13, 60, 90)  # 49 frames of 720x480 in latents


def test_flops_are_those_of_the_network():
    """All five blocks at once; on the meta device, since the counter knows no formula for a CPU's fused attention."""
    config = dataclasses.replace(TINY_DIT, num_layers=5)
    batch = tiny_batch(config)
    cond = dataclasses.replace(
        batch.cond, text=batch.cond.text[:1].to("meta"), channels=batch.cond.channels[:1].to("meta")
    )
    with torch.device("meta"):
        dit = DiT(config)
    with FlopCounterMode(display=False) as counter:
        out = dit(batch.latents[:1].to("meta"), batch.t[:1].to("meta"), cond)
        forward = counter.get_total_flops()
        out.sum().backward()
    _, f, _, h, w = batch.latents.shape
    assert flops_per_sample(config, (f, h, w)) == (forward, counter.get_total_flops())


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (DiTConfig(), 1_693_783_872),
        (DiTConfig(num_layers=42, num_attention_heads=48, use_rotary_positional_embeddings=True), 5_570_283_072),
    ],
    ids=["2b", "5b"],
)
def test_flops_of_the_published_sizes_follow_the_formula(config, parameters):
    """Two per weight and token, but for the modulation, which is computed once; and attention's two products."""
    tokens = 226 + 13 * 30 * 45
    modulation = config.num_layers * 2 * 6 * config.width * (config.time_embed_dim + 1)
    formula = 2 * (parameters - modulation) * tokens + config.num_layers * 4 * tokens**2 * config.width
    forward, step = flops_per_sample(config, GRID)
    assert forward == pytest.approx(formula, rel=0.01)
    assert step == pytest.approx(3 * forward, rel=0.01)


def test_a_lora_spares_the_gradients_of_what_rests():
    config = dataclasses.replace(TINY_DIT, num_layers=3)
    _, whole = flops_per_sample(config, (3, 4, 6))
    forward, step = flops_per_sample(config, (3, 4, 6), lora=LoraConfig(rank=1))
    assert 1.9 * forward < step < 0.95 * whole


def work(**changes) -> Work:
    fit = load_training(CONFIGS / "tiny_dit.yaml").fit
    given = {"dit": TINY_DIT, "shapes": [], "samples": 0, "token_budget": 0, "micro_batch_size": 0, "fit": fit}
    return Work(**{**given, "batch_size": 4, **changes})


def test_samples_of_several_shapes_are_counted_by_bucket_and_none_is_dropped():
    shapes = [(3, 4, 6)] * 9 + [(1, 4, 6)] * 4
    facts = dit_facts(work(shapes=shapes, samples=13), processes=2)
    assert facts["data"] | {"epochs": None} == {
        "samples": 13,
        "buckets": {"3x4x6": 9, "1x4x6": 4},
        "steps_per_epoch": 4,
        "epochs": None,
        "dropped": 0,
    }
    long, short = 8 + 3 * 6, 8 + 6
    assert facts["tokens"]["per_step"] == round((9 * long + 4 * short) / 4)
    assert facts["tokens"]["most"] == long
    flops = [flops_per_sample(TINY_DIT, shape)[1] for shape in ((3, 4, 6), (1, 4, 6))]
    assert facts["compute"]["flops_per_step"] == pytest.approx((9 * flops[0] + 4 * flops[1]) / 4)


def test_a_token_budget_decides_how_many_samples_a_step_has():
    facts = dit_facts(work(shapes=[(3, 4, 6)] * 12, samples=12, token_budget=3 * 26 + 5), processes=1)
    assert facts["tokens"]["samples_per_step"] == 3
    assert facts["data"]["steps_per_epoch"] == 4


def test_twice_the_gpus_take_half_the_time_and_a_better_use_of_them_less():
    config = load_training(CONFIGS / "distill-2b.yaml")
    one, two = (estimate(config, processes=n) for n in (64, 128))
    best = estimate(config, processes=64, utilisation=0.6)
    for gpu in GPUS:
        first, second, third = (found["gpus"][gpu.name]["hours"] for found in (one, two, best))
        assert first == pytest.approx(2 * second)
        assert first == pytest.approx(2 * third)
    seconds = one["compute"]["flops_per_step"] / (64 * 989e12 * 0.3)
    assert one["gpus"]["H100 SXM"]["seconds_per_step"] == pytest.approx(seconds)


QUICK = ("tiny_dit", "lora-tiny", "cogvideox-5b", "distill-2b")
EVERY = [
    pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else pytest.mark.slow)
    for path in sorted(CONFIGS.glob("*.yaml"))
]


@pytest.mark.parametrize("path", EVERY)
def test_every_config_has_a_report(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no data, no model, no network
    facts = estimate(load_training(path), processes=8)
    text = table(facts)
    assert f"{facts['steps']} steps" in text
    assert all(gpu.name in text for gpu in GPUS)
    assert facts["compute"]["flops_per_step"] > 0
    if path.stem == "cogvideox-5b":
        assert 10 < facts["memory"]["total"] < 24
        assert facts["gpus"]["H100 SXM"]["fits"]
    assert 0 < facts["parameters"]["learning"] <= facts["parameters"]["all"]


def test_the_report_of_a_cache_counts_what_is_in_it(monkeypatch):
    class Cached:
        def __len__(self):
            return 5

        def shape(self, index):
            return [(5, 8, 8), (3, 8, 8)][index % 2]

    monkeypatch.setattr("videogen.training.cached.cached_examples", lambda *_, **__: Cached())
    config = load_training(CONFIGS / "lora-tiny.yaml", ["data=.", "batch_size=2"])
    facts = estimate(config)
    assert facts["data"]["buckets"] == {"5x8x8": 3, "3x8x8": 2}
    assert facts["data"]["steps_per_epoch"] == 3
    assert not facts["notes"]
