"""The parity traps of the sampler, one by one: the right way equals diffusers, and the wrong way is seen to differ."""

import math

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from videogen.diffusion.denoiser import dynamic_cfg, guided
from videogen.diffusion.samplers import SAMPLERS, diffusers_sampler, scheduler_times
from videogen.diffusion.schedule import Schedule, shift_snr, zero_terminal_snr
from videogen.types import Conditioning

CONFIG = {
    "_class_name": "CogVideoXDDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "snr_shift_scale": 3.0,
    "timestep_spacing": "trailing",
}
ARGUMENTS = {key: value for key, value in CONFIG.items() if not key.startswith("_")}
SHAPE = (1, 2, 4, 4, 4)


def ddim():
    return CogVideoXDDIMScheduler(**ARGUMENTS)


def dpm():
    return CogVideoXDPMScheduler(**ARGUMENTS)


def start(dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


def denoise(x, t):
    return torch.tanh(x.float() * (1.5 - t / 1000) + 0.2)


def test_trap_12_shift_comes_before_zero_snr_in_float64():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    plain = torch.cumprod(1 - betas, 0)
    theirs = ddim().alphas_cumprod
    assert torch.equal(zero_terminal_snr(shift_snr(plain, 3.0)), theirs)
    assert torch.equal(Schedule.from_config(CONFIG).alphas_cumprod, theirs)

    other_order = shift_snr(zero_terminal_snr(plain), 3.0)
    assert (other_order - theirs).abs().max() > 1e-3
    float32 = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0).double()
    assert (zero_terminal_snr(shift_snr(float32, 3.0)) - theirs).abs().max() > 1e-8


def test_trap_12_the_adapter_goes_to_t_minus_1000_div_n_not_to_the_next_timestep():
    n = 30  # 1000 // 30 = 33, while the timesteps are 33 or 34 apart
    table, x, wrong = ddim().alphas_cumprod, start(), start()
    times = scheduler_times(ddim(), n)
    for i, t in enumerate(times):
        last = times[i + 1] if i + 1 < n else -1

        def step(x, t_next, t=t):
            a = float(table[int(t)])
            b = float(table[int(t_next)]) if t_next >= 0 else 1.0
            x0 = a**0.5 * x - (1 - a) ** 0.5 * denoise(x, t)
            ratio = ((1 - b) / (1 - a)) ** 0.5
            return ratio * x + (b**0.5 - a**0.5 * ratio) * x0

        x, wrong = step(x, t - 1000 // n), step(wrong, last)

    out = diffusers_sampler(denoise, start(), n, scheduler=ddim())
    torch.testing.assert_close(out, x, rtol=0, atol=1e-5)
    assert (out - wrong).abs().max() > 1e-3
    # our own sampler takes the next entry on purpose: no noise level is skipped or visited twice
    schedule = Schedule.from_config(CONFIG)
    own = SAMPLERS["ddim"](denoise, start(), schedule.times(n), schedule=schedule, prediction="v_prediction")
    torch.testing.assert_close(own, wrong, rtol=0, atol=1e-5)


def after_draws(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(42)
    for _ in range(count):
        torch.randn(SHAPE, generator=generator, dtype=dtype)
    return generator.get_state()


@pytest.mark.parametrize("n", [1, 2, 3, 10, 50])
def test_trap_13_dpm_draws_twice_in_every_second_order_step(n):
    generator = torch.Generator().manual_seed(42)
    diffusers_sampler(denoise, start(), n, scheduler=dpm(), generator=generator)
    draws = n if n <= 2 else 1 + 2 * (n - 2) + 1  # one in the first and in the last step
    assert torch.equal(generator.get_state(), after_draws(draws))
    if n > 2:
        assert not torch.equal(generator.get_state(), after_draws(n))


def test_trap_13_noise_is_drawn_in_the_dtype_of_the_latents():
    generator = torch.Generator().manual_seed(42)
    out = diffusers_sampler(denoise, start(torch.bfloat16), 10, scheduler=dpm(), generator=generator)
    assert out.dtype == torch.bfloat16
    assert torch.equal(generator.get_state(), after_draws(18, torch.bfloat16))

    right = torch.randn(SHAPE, generator=torch.Generator().manual_seed(42), dtype=torch.bfloat16)
    wrong = torch.randn(SHAPE, generator=torch.Generator().manual_seed(42), dtype=torch.float64).bfloat16()
    assert not torch.equal(right, wrong)


def test_trap_14_dynamic_guidance_is_fed_the_time_not_the_step():
    n, scale = 50, dynamic_cfg(6.0, 50)
    values = [scale(t) for t in scheduler_times(ddim(), n)]
    assert values[:7] == pytest.approx([2.29, 2.54, 6.97, 6.42, 2.79, 4.27, 1.04], abs=5e-3)
    assert values[-3:] == pytest.approx([1.0, 1.0, 1.12], abs=5e-3)

    by_step = [1 + 6.0 * (1 - math.cos(math.pi * (i / n) ** 5)) / 2 for i in range(n)]
    assert by_step == sorted(by_step)  # the ramp that was meant
    assert max(abs(a - b) for a, b in zip(values, by_step, strict=True)) > 5


def test_trap_17_guidance_is_computed_in_float32():
    outputs = torch.randn(2, *SHAPE[1:], generator=torch.Generator().manual_seed(1)).bfloat16()  # [uncond, cond]
    cond = Conditioning(text=torch.zeros(1, 1, 1, dtype=torch.bfloat16))
    out = guided(lambda x, t, c: outputs, cond, cond, 6.0, dtype=torch.bfloat16)(start(torch.bfloat16), 500.0)
    uncond, text = outputs.chunk(2)
    assert torch.equal(out, uncond.float() + 6.0 * (text.float() - uncond.float()))
    assert not torch.equal(out, (uncond + 6.0 * (text - uncond)).float())


@pytest.mark.parametrize("scheduler", [ddim, dpm])
def test_trap_17_latents_return_to_the_prompts_dtype_after_every_step(scheduler):
    seen = []

    def remember(x, t):
        seen.append(x)
        return denoise(x, t)

    def sample(x):
        return diffusers_sampler(remember, x, 10, scheduler=scheduler(), generator=torch.Generator().manual_seed(0))

    rounded = sample(start(torch.bfloat16))
    assert {x.dtype for x in seen} == {torch.bfloat16}
    assert rounded.dtype == torch.bfloat16
    if scheduler is ddim:  # without noise: the same start, kept in float32, ends elsewhere
        assert not torch.equal(rounded, sample(start(torch.bfloat16).float()).bfloat16())


@pytest.mark.parametrize("n", [12, 30, 45, 75])
def test_trap_20_levels_are_off_by_one_where_n_does_not_divide_1000(n):
    """diffusers arrives at one level and goes on from another; ours goes on from where it arrived."""
    times = scheduler_times(ddim(), n)
    arrived = [t - 1000 // n for t in times[:-1]]
    assert arrived != times[1:]
    assert max(abs(a - b) for a, b in zip(arrived, times[1:], strict=True)) == 1


@pytest.mark.parametrize("n", [6, 15, 28, 35, 60])
def test_trap_20_diffusers_leaves_a_rest_of_noise_for_some_n_and_ours_does_not(n):
    last = scheduler_times(ddim(), n)[-1]
    assert last - 1000 // n == 0  # arrives at time 0, where sigma is not 0
    schedule = Schedule.from_config(CONFIG)
    assert schedule.sigma(0) > 0.05
    x0 = []

    def remember(x, t):
        output = denoise(x, t)
        x0.append(schedule.alpha(t) * x - schedule.sigma(t) * output)
        return output

    theirs = diffusers_sampler(remember, start(), n, scheduler=ddim())
    assert (theirs - x0[-1]).abs().max() > 1e-3
    own = SAMPLERS["ddim"](remember, start(), schedule.times(n), schedule=schedule, prediction="v_prediction")
    torch.testing.assert_close(own, x0[-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [61, 103, 121, 122, 201])
def test_trap_20_diffusers_makes_one_step_too_many_for_some_n_and_ours_does_not(n):
    times = scheduler_times(ddim(), n)
    assert len(times) == n + 1
    assert times[-1] == -1
    assert Schedule.from_config(CONFIG).times(n) == times  # for ours, -1 is where the n steps end
