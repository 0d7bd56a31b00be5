import math
from itertools import pairwise

import pytest
import torch

from videogen.diffusion.schedule import FlowSchedule, Schedule
from videogen.errors import InvalidRequest

CONFIG = {
    "_class_name": "CogVideoXDDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}


@pytest.mark.parametrize(
    ("shift", "t", "alpha_cumprod"),
    [
        (1.0, 0, 0.99915),
        (1.0, 19, 0.98101),
        (1.0, 499, 0.24236),
        (1.0, 979, 8.579e-5),
        (1.0, 999, 0.0),
        (3.0, 0, 0.997454),
        (3.0, 19, 0.946573),
        (3.0, 499, 0.0959696),
        (3.0, 999, 0.0),
    ],
)
def test_table_has_the_published_values(shift, t, alpha_cumprod):
    schedule = Schedule.from_config({**CONFIG, "snr_shift_scale": shift})
    assert float(schedule.alphas_cumprod[t]) == pytest.approx(alpha_cumprod, rel=6e-5, abs=1e-30)
    assert schedule.alpha(t) == pytest.approx(math.sqrt(alpha_cumprod), rel=6e-5, abs=1e-30)


def test_a_missing_shift_means_three_as_in_diffusers():
    assert torch.equal(
        Schedule.from_config(CONFIG).alphas_cumprod,
        Schedule.from_config({**CONFIG, "snr_shift_scale": 3.0}).alphas_cumprod,
    )


def test_variance_is_preserved_and_time_minus_one_is_clean():
    schedule = Schedule.from_config(CONFIG)
    t = torch.arange(-1, 1000)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert alpha.dtype == sigma.dtype == torch.float64
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1001, dtype=torch.float64), rtol=0, atol=1e-15)
    assert (schedule.alpha(-1), schedule.sigma(-1)) == (1.0, 0.0)
    assert (schedule.alpha(-7.5), schedule.sigma(-7.5)) == (1.0, 0.0)
    assert (schedule.alpha(999), schedule.sigma(999)) == (0.0, 1.0)
    assert (alpha.diff() < 0).all()


def test_time_between_entries_is_interpolated_and_numbers_agree_with_tensors():
    schedule = Schedule.from_config(CONFIG)
    assert schedule.alpha(300.25) == float(schedule.alpha(torch.tensor(300.25)))
    middle = (schedule.alpha(300) ** 2 + schedule.alpha(301) ** 2) / 2
    assert schedule.alpha(300.5) ** 2 == pytest.approx(middle, rel=1e-12)


def test_times_are_trailing_and_end_clean():
    times = Schedule.from_config(CONFIG).times(50)
    assert times == [*range(999, 0, -20), -1]


@pytest.mark.parametrize("n", [*range(1, 61), 62, 125, 200, 999, 1000])
def test_times_have_n_distinct_entries_also_where_n_does_not_divide_1000(n):
    times = Schedule.from_config(CONFIG).times(n)
    assert len(times) == n + 1
    assert (times[0], times[-1]) == (999, -1)
    assert all(a > b for a, b in pairwise(times))


@pytest.mark.parametrize("n", [0, -3, 1001])
def test_impossible_step_counts_are_refused(n):
    for schedule in (Schedule.from_config(CONFIG), FlowSchedule()):
        with pytest.raises(InvalidRequest, match="num_inference_steps"):
            schedule.times(n)


def test_snr():
    schedule = Schedule.from_config({**CONFIG, "snr_shift_scale": 1.0})
    assert schedule.snr(-1) == math.inf
    assert schedule.snr(999) == 0
    assert schedule.snr(499) == pytest.approx(0.24236 / (1 - 0.24236), rel=1e-4)
    assert (schedule.snr(torch.arange(1000)).diff() < 0).all()


def test_shift_divides_the_snr_before_the_rescale():
    plain = Schedule.from_config({**CONFIG, "snr_shift_scale": 1.0, "rescale_betas_zero_snr": False})
    shifted = Schedule.from_config({**CONFIG, "snr_shift_scale": 3.0, "rescale_betas_zero_snr": False})
    t = torch.arange(1000)
    torch.testing.assert_close(plain.snr(t) / 3, shifted.snr(t), rtol=1e-10, atol=0)


def test_flow():
    schedule = Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert isinstance(schedule, FlowSchedule)
    assert (schedule.alpha(1000), schedule.sigma(1000)) == (0.0, 1.0)
    assert (schedule.alpha(schedule.clean), schedule.sigma(schedule.clean)) == (1.0, 0.0)
    assert schedule.alpha(250.0) == 0.75
    assert FlowSchedule().times(4) == [1000, 750, 500, 250, 0]
    assert schedule.times(4) == pytest.approx([1000, 900, 750, 500, 0])
    assert schedule.snr(torch.tensor([500.0])) == 1


def test_unknown_beta_schedule_says_what_to_do():
    with pytest.raises(InvalidRequest, match="squaredcos"):
        Schedule.from_config({**CONFIG, "beta_schedule": "squaredcos_cap_v2"})
