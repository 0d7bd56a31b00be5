import pytest
import torch

from videogen.diffusion.objective import banded, loss, noised, stratified, uniform
from videogen.diffusion.prediction import target, to_x0
from videogen.diffusion.schedule import FlowSchedule, Schedule

SCHEDULE = Schedule.from_config({"rescale_betas_zero_snr": True, "snr_shift_scale": 1.0})
KINDS = ["v_prediction", "epsilon", "sample", "flow"]


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = (torch.randn(4, 2, 3, 4, 4, dtype=dtype, generator=generator) for _ in range(3))
    return x0, noise, output, torch.tensor([0, 19, 500, 999])


def test_v_loss_is_the_weighted_x0_error_of_the_paper():
    x0, noise, output, t = batch()
    alpha, sigma = (level(t).view(-1, 1, 1, 1, 1) for level in (SCHEDULE.alpha, SCHEDULE.sigma))
    x0_error = to_x0(output, noised(x0, noise, t, SCHEDULE), alpha, sigma, "v_prediction") - x0
    weighted = (x0_error**2 / (1 - alpha**2)).mean((1, 2, 3, 4))
    ours = loss(lambda x, t: output, x0, noise, t, schedule=SCHEDULE, prediction="v_prediction")
    torch.testing.assert_close(ours, weighted, rtol=1e-9, atol=0)
    torch.testing.assert_close(ours, ((output - (alpha * noise - sigma * x0)) ** 2).mean((1, 2, 3, 4)))


@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("schedule", [SCHEDULE, FlowSchedule()], ids=["table", "flow"])
def test_a_perfect_network_has_no_loss(prediction, schedule):
    x0, noise, _, t = batch()

    def perfect(x, t):
        alpha, sigma = (level(t).view(-1, 1, 1, 1, 1) for level in (schedule.alpha, schedule.sigma))
        torch.testing.assert_close(x, alpha * x0 + sigma * noise)
        return target(x0, noise, alpha, sigma, prediction)

    values = loss(perfect, x0, noise, t, schedule=schedule, prediction=prediction)
    assert values.shape == (4,)
    assert values.max() < 1e-28


def test_loss_is_taken_in_float32_when_the_network_answers_in_bfloat16():
    x0, noise, output, t = batch(torch.float32)
    value = loss(lambda x, t: output.bfloat16(), x0, noise, t, schedule=SCHEDULE, prediction="v_prediction")
    assert value.dtype == torch.float32


def test_gradient_reaches_the_network_only_through_its_output():
    x0, noise, output, t = batch()
    output.requires_grad_()
    loss(lambda x, t: output, x0, noise, t, schedule=SCHEDULE, prediction="v_prediction").sum().backward()
    assert output.grad is not None
    assert output.grad.abs().min() > 0


@pytest.mark.parametrize("draw", [uniform, stratified, banded])
def test_draws_cover_the_schedule_and_repeat_with_the_seed(draw):
    t = draw(4000, SCHEDULE, torch.Generator().manual_seed(1))
    assert t.dtype == torch.int64
    assert 0 <= t.min() < 20
    assert 980 <= t.max() <= 999
    assert torch.equal(t, draw(4000, SCHEDULE, torch.Generator().manual_seed(1)))
    assert not torch.equal(t, draw(4000, SCHEDULE, torch.Generator().manual_seed(2)))


def test_uniform_is_uniform():
    t = uniform(20000, SCHEDULE, torch.Generator().manual_seed(0))
    share = torch.histc(t.double(), bins=10, min=0, max=1000) / len(t)
    assert share.sub(0.1).abs().max() < 0.01


def test_stratified_puts_one_sample_in_each_range():
    for seed in range(20):
        t = stratified(8, SCHEDULE, torch.Generator().manual_seed(seed))
        assert sorted((t // 125).tolist()) == list(range(8))
    many = torch.cat([stratified(8, SCHEDULE, torch.Generator().manual_seed(seed)) for seed in range(500)])
    first = many.view(500, 8)[:, 0]  # the place in the batch tells nothing about the time
    assert first.double().mean().sub(499.5).abs() < 40


@pytest.mark.parametrize("share", [0.0, 0.75, 1.0])
def test_banded_draws_most_where_signal_and_noise_are_comparable(share):
    t = banded(8000, SCHEDULE, torch.Generator().manual_seed(0), share=share)
    snr = SCHEDULE.snr(torch.arange(1000))
    band = ((snr >= 0.03) & (snr <= 10)).double().mean()
    inside = ((SCHEDULE.snr(t) >= 0.03) & (SCHEDULE.snr(t) <= 10)).double().mean()
    assert inside.sub(share + (1 - share) * band).abs() < 0.02
    assert 0.5 < band < 0.9


def test_flow_draws_are_continuous_and_shifted_towards_noise():
    t = uniform(4000, FlowSchedule(shift=3.0), torch.Generator().manual_seed(0))
    assert t.is_floating_point()
    assert t.median() == pytest.approx(750, abs=20)
