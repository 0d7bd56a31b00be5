"""Deferred masking: the first blocks see all tokens, the others the kept ones, and a plain model comes out."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from videogen.config import MaskingConfig
from videogen.diffusion import objective
from videogen.diffusion.schedule import Schedule
from videogen.models.dit import DiT
from videogen.testing import TINY_DIT, randomize, tiny_batch
from videogen.training.masking import draw_kept, masked, shown
from videogen.types import Conditioning

CONFIG = dataclasses.replace(TINY_DIT, num_layers=3)
GRID = (3, 4, 6)  # latent frames, rows, columns; 3 x 2 x 3 tokens
SCHEDULE = Schedule.from_config({"rescale_betas_zero_snr": True, "snr_shift_scale": 1.0})


def network(**changes) -> DiT:
    dit = DiT(dataclasses.replace(CONFIG, **changes)).eval().double()
    randomize(dit)
    return dit


def kept_tokens(share=0.75, seed=0) -> torch.Tensor:
    return draw_kept(CONFIG, MaskingConfig(share=share), *GRID, torch.Generator().manual_seed(seed))


def changed_in(dit, kept, mixer_layers, token) -> torch.Tensor:
    """Where the answer of the masked model changes when the noisy latent under one token does."""
    batch = tiny_batch(dtype=torch.float64)
    place = torch.zeros(1, 1, 1, 4, 6, dtype=torch.float64)
    place = shown(torch.tensor([token]), CONFIG, *GRID).double() + place
    model = masked(dit, kept, mixer_layers)
    return model(batch.latents + place, batch.t, batch.cond) - model(*batch)


def test_the_tokens_that_stay_are_a_random_part_of_the_video():
    assert len(kept_tokens()) == round(18 / 4)
    assert len(kept_tokens(share=0.0)) == 18
    assert kept_tokens().tolist() == sorted(set(kept_tokens().tolist()))
    assert len({tuple(kept_tokens(seed=seed).tolist()) for seed in range(20)}) > 15
    counts = torch.bincount(torch.cat([kept_tokens(seed=seed) for seed in range(600)]), minlength=18)
    assert counts.min() > 0.7 * counts.float().mean()


@pytest.mark.parametrize("mixer_layers", [0, 1, 3])
@torch.no_grad()
def test_with_nothing_dropped_it_is_the_model_itself(mixer_layers):
    dit, batch = network(), tiny_batch(dtype=torch.float64)
    assert torch.equal(masked(dit, kept_tokens(share=0.0), mixer_layers)(*batch), dit(*batch))
    assert "each_block" not in vars(dit)  # whole again


@torch.no_grad()
def test_dropping_behind_the_last_block_changes_nothing_and_before_it_something():
    dit, batch, kept = network(), tiny_batch(dtype=torch.float64), kept_tokens()
    assert torch.equal(masked(dit, kept, 3)(*batch), dit(*batch))
    assert not torch.allclose(masked(dit, kept, 2)(*batch), dit(*batch))


@torch.no_grad()
def test_kept_tokens_keep_their_positions():
    """Two sets of tokens of one content give different answers: rotary angles and table rows follow the tokens."""
    dit = network()
    flat = torch.ones(2, 3, 4, 4, 6, dtype=torch.float64)
    cond = tiny_batch(dtype=torch.float64).cond
    cond = cond.replace(channels=torch.zeros_like(flat))
    for changes in ({"use_learned_positional_embeddings": True}, {"use_learned_positional_embeddings": False}):
        dit = network(**changes)
        answers = []
        for kept in (torch.tensor([0, 1]), torch.tensor([0, 17])):
            out = masked(dit, kept, 0)(flat, torch.tensor([500, 20]), cond)
            answers.append(out[:, 0, :, :2, :2])  # token 0
        assert not torch.allclose(*answers)


@torch.no_grad()
def test_what_is_dropped_is_read_by_the_mixer_and_by_nothing_else():
    dit, kept = network(), kept_tokens()
    dropped = next(i for i in range(18) if i not in kept.tolist())
    seen = shown(kept, CONFIG, *GRID).double()
    assert (changed_in(dit, kept, 0, dropped) * seen).abs().max() == 0
    assert (changed_in(dit, kept, 1, dropped) * seen).abs().max() > 1e-6
    assert (changed_in(dit, kept, 0, int(kept[0])) * seen).abs().max() > 1e-6


def test_the_loss_is_that_of_the_kept_tokens():
    batch, kept = tiny_batch(dtype=torch.float64), kept_tokens()
    where = shown(kept, CONFIG, *GRID)
    assert where.sum() == len(kept) * CONFIG.patch_size**2
    truth, answer = torch.randn(
        2, *batch.latents.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    kind = {"schedule": SCHEDULE, "prediction": "sample"}
    value = objective.loss(lambda x, t: answer, truth, batch.latents, batch.t, where=where, **kind)
    picked = where.expand_as(truth).bool()
    for row in range(2):
        expected = (answer[row] - truth[row])[picked[row]].square().mean()
        torch.testing.assert_close(value[row], expected)
    everything = objective.loss(
        lambda x, t: answer, truth, batch.latents, batch.t, where=torch.ones_like(where), **kind
    )
    torch.testing.assert_close(everything, objective.loss(lambda x, t: answer, truth, batch.latents, batch.t, **kind))


def test_every_weight_learns_and_the_work_shrinks():
    dit, batch, kept = network().float(), tiny_batch(), kept_tokens()
    where = shown(kept, CONFIG, *GRID)

    def flops(model) -> int:
        dit.zero_grad()
        with FlopCounterMode(display=False) as counter:
            kind = {"schedule": SCHEDULE, "prediction": "v_prediction"}
            noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0))
            t = batch.t

            def predict(x, t, cond: Conditioning = batch.cond):
                return model(x, t, cond)

            objective.loss(predict, batch.latents, noise, t, where=where, **kind).mean().backward()
        return counter.get_total_flops()

    dense, part = flops(dit), flops(masked(dit, kept, 1))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in dit.parameters())
    assert part < 0.75 * dense
