"""The loop: a killed run goes on as if nothing had happened, averages are what is returned, bad numbers stop it."""

import json
import math

import pytest
import torch
from torch import nn

from videogen.config import FitConfig
from videogen.errors import FileError, NumericalError
from videogen.models.vae import VAE
from videogen.testing import TINY_VAE
from videogen.training.ema import ema_copy, ema_update
from videogen.training.optim import Muon, build_optimizers, rate_at
from videogen.training.processes import Replicated
from videogen.training.state import saved_states
from videogen.training.step import MicroBatches
from videogen.training.trainer import fit


class Regression(nn.Module):
    """A matrix inside `blocks` (Muon's), a bias outside (AdamW's)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(8, 8, bias=False)])
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return self.blocks[0](x) + self.bias


def problem(model, broken_at=None):
    truth = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))

    def losses_at(step):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x @ truth - 1).square().mean()
        yield (loss * math.nan if step == broken_at else loss), {}, [f"{step}/{i}" for i in range(32)]

    return losses_at


def config(**changes):
    return FitConfig(
        **{
            "steps": 40,
            "learning_rate": 0.05,
            "warmup_steps": 5,
            "save_every": 10,
            "log_every": 5,
            "bfloat16": False,
            **changes,
        }
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, optimizer):
    settings = config(optimizer=optimizer)
    whole = Regression()
    average = fit({"m": whole}, problem(whole), settings, tmp_path / "whole")["m"]

    killed = Regression()
    losses_at = problem(killed)

    def dies(step):
        if step == 27:
            raise KeyboardInterrupt
        return losses_at(step)

    with pytest.raises(KeyboardInterrupt):
        fit({"m": killed}, dies, settings, tmp_path / "killed")
    again = Regression()
    resumed = fit({"m": again}, problem(again), settings, tmp_path / "killed")["m"]
    last = [(tmp_path / name / "log.jsonl").read_text().splitlines()[-1] for name in ("whole", "killed")]
    assert json.loads(last[0])["samples"] == json.loads(last[1])["samples"] == 40 * 32
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(average.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_learns_and_logs(tmp_path):
    model = Regression()
    fit({"m": model}, problem(model), config(steps=300), tmp_path, validate=lambda m, step: {"held_out": 1.5})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.05 * lines[0]["loss"]
    assert lines[-1]["step"] == 300
    assert lines[-1]["samples"] == 300 * 32
    assert lines[-1]["held_out"] == 1.5
    assert "held_out" not in lines[0]


def test_a_finished_run_returns_its_averages_without_training(tmp_path):
    model = Regression()
    first = fit({"m": model}, problem(model), config(), tmp_path)["m"]

    def never(step):
        raise AssertionError("trained again")

    second = fit({"m": Regression()}, never, config(), tmp_path)["m"]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_changed_settings_are_refused_on_resume(tmp_path):
    model = Regression()
    fit({"m": model}, problem(model), config(), tmp_path)
    with pytest.raises(FileError, match="other settings"):
        fit({"m": model}, problem(model), config(seed=7), tmp_path)


def test_nan_stops_before_it_reaches_the_weights(tmp_path):
    model = Regression()
    with pytest.raises(NumericalError, match="step 12"):
        fit({"m": model}, problem(model, broken_at=12), config(), tmp_path)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_only_the_newest_states_are_kept_and_none_is_partial(tmp_path):
    model = Regression()
    fit({"m": model}, problem(model), config(), tmp_path)
    assert [s.name for s in saved_states(tmp_path)] == ["step_00000030", "step_00000040"]
    assert not list(tmp_path.glob(".*.part"))


def test_muon_takes_hidden_matrices_only():
    adamw, muon = build_optimizers({"m": Regression()}, config(optimizer="muon"))
    assert [p.shape for g in muon.param_groups for p in g["params"]] == [(8, 8)]
    assert [p.shape for g in adamw.param_groups for p in g["params"]] == [(8,)]


def test_the_rate_warms_up_stays_and_ends_at_zero():
    settings = config(steps=100, warmup_steps=10, decay_fraction=0.5)
    rates = [rate_at(step, settings) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert set(rates[9:50]) == {1.0}
    assert rates[100] == 0
    assert rates[50:] == sorted(rates[50:], reverse=True)


def test_the_average_forgets_its_start():
    model = Regression()
    average = ema_copy(model)
    with torch.no_grad():
        model.bias += 1
    for step in range(200):
        ema_update(average, model, 0.99, step)
    assert torch.allclose(average.bias, model.bias, atol=0.01)
    assert not average.bias.requires_grad


def test_one_process_leaves_gradients_alone():
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 2.0)
    Replicated().reduce_gradients([parameter])
    assert parameter.grad.tolist() == [2, 2, 2]


def test_muon_turns_the_convolutions_that_look_around():
    vae = VAE(TINY_VAE)
    adamw, muon = build_optimizers({"vae": vae}, config(optimizer="muon"))
    turned = {p.data_ptr() for g in muon.param_groups for p in g["params"]}
    kept = {p.data_ptr() for g in adamw.param_groups for p in g["params"]}
    names = {name for name, p in vae.named_parameters() if p.data_ptr() in turned}
    assert turned | kept == {p.data_ptr() for p in vae.parameters()}
    assert not turned & kept
    assert "decoder.up.0.resnets.0.conv1.weight" in names
    assert "decoder.up.0.upsample.weight" in names
    assert not [n for n in names if "conv_in" in n or "conv_out" in n or "norm" in n or "shortcut" in n]


def test_muon_moves_a_convolution_as_it_moves_the_matrix_of_its_kernel():
    conv, gradient = nn.Conv3d(4, 6, 3), torch.randn(6, 4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    matrix = nn.Parameter(conv.weight.detach().flatten(1).clone())
    ours, plain = Muon([conv.weight], lr=0.1), torch.optim.Muon([matrix], lr=0.1)
    for _ in range(2):
        conv.weight.grad, matrix.grad = gradient.clone(), gradient.flatten(1).clone()
        ours.step()
        plain.step()
    torch.testing.assert_close(conv.weight.flatten(1), matrix, rtol=0, atol=0)
    ours.zero_grad()
    assert conv.weight.grad is None


def test_facts_are_means_over_samples_and_the_engine_is_told_the_last_micro_batch(tmp_path):
    """Micro-batches of 1, 3 and 4 samples; where their number is known, only the third is the last."""
    told = []

    class Told(Replicated):
        def micro_batch(self, last):
            told.append(last)
            return super().micro_batch(last)

    model = Regression()
    parts = [[0], [1, 2, 3], [4, 5, 6, 7]]

    def one(part):
        x = torch.ones(len(part), 8)
        return (model(x) - 1).square().mean(1) / 8, {"size": len(part)}, [f"{i}" for i in part]

    fit({"m": model}, lambda step: MicroBatches(parts, one), config(steps=1), tmp_path, parallel=Told())
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert line["size"] == (1 + 9 + 16) / 8
    assert line["samples"] == 8
    assert told == [False, False, True]
