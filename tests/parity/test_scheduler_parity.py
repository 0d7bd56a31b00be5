"""Our loop around a diffusers scheduler, and our own samplers, against diffusers' schedulers driven by hand."""

import copy
import math

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from videogen.diffusion.denoiser import dynamic_cfg, guided
from videogen.diffusion.prediction import add_noise, to_x0
from videogen.diffusion.samplers import SAMPLERS, diffusers_sampler, load_scheduler
from videogen.diffusion.schedule import Schedule
from videogen.types import Conditioning

CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "snr_shift_scale": 1.0,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
}
SHAPE = (2, 3, 4, 4, 4)
BOTH = pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])


def config(name, **changes):
    return {"_class_name": name, **CONFIG, **changes}


def network(x, t, text):
    """Stands in for a transformer: any smooth function of all its inputs, in x's dtype."""
    time = (t.to(torch.float32) / 1000).to(x.dtype).view(-1, 1, 1, 1, 1)
    return torch.tanh(x * (1 - time) + 0.3 * x.roll(1, -1) + text.mean((1, 2)).view(-1, 1, 1, 1, 1))


def texts(dtype):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 3, 4, generator=generator).to(dtype), torch.randn(2, 3, 4, generator=generator).to(dtype)


def by_hand(scheduler, x, n, *, text, negative, scale, dynamic, generator):
    """The denoising loop of diffusers' CogVideoX pipelines, told in our words."""
    scheduler.set_timesteps(n)
    steps, old, current = scheduler.timesteps, None, scale
    x = x * scheduler.init_noise_sigma
    for i, t in enumerate(steps):
        doubled = scheduler.scale_model_input(torch.cat([x, x]) if scale > 1 else x, t)
        prompt = torch.cat([negative, text]) if scale > 1 else text
        output = network(doubled, t.expand(len(doubled)), prompt).float()
        if dynamic:
            current = 1 + scale * ((1 - math.cos(math.pi * ((n - t.item()) / n) ** 5.0)) / 2)
        if scale > 1:
            uncond, cond = output.chunk(2)
            output = uncond + current * (cond - uncond)
        if isinstance(scheduler, CogVideoXDPMScheduler):
            back = steps[i - 1] if i > 0 else None
            x, old = scheduler.step(output, old, t, back, x, generator=generator, return_dict=False)
        else:
            x = scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
        x = x.to(text.dtype)
    return x


def ours(scheduler, x, n, *, text, negative, scale, dynamic, generator):
    denoise = guided(
        lambda x, t, cond: network(x, t, cond.text),
        Conditioning(text=text),
        Conditioning(text=negative),
        dynamic_cfg(scale, n) if dynamic and scale > 1 else scale,
        dtype=text.dtype,
    )
    return diffusers_sampler(denoise, x, n, scheduler=scheduler, generator=generator)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["f32", "bf16", "f64"])
@pytest.mark.parametrize(
    ("scale", "dynamic"), [(6.0, False), (6.0, True), (1.0, False)], ids=["cfg", "dynamic", "none"]
)
@pytest.mark.parametrize("n", [10, 7])
def test_adapter_is_bit_equal_to_diffusers_loop(name, dtype, scale, dynamic, n):
    text, negative = texts(dtype)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    results, states = [], []
    for sample in (by_hand, ours):
        generator = torch.Generator().manual_seed(42)
        kwargs = {"text": text, "negative": negative, "scale": scale, "dynamic": dynamic, "generator": generator}
        results.append(sample(load_scheduler(config(name)), x, n, **kwargs))
        states.append(generator.get_state())
    assert results[1].dtype == dtype
    assert torch.isfinite(results[0]).all()
    assert torch.equal(*results)
    assert torch.equal(*states)  # equal draws, and equally many


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
        "LCMScheduler",
        "DDPMScheduler",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_adapter_is_bit_equal_with_other_schedulers(name, dtype):
    text, negative = texts(dtype)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    kwargs = {"text": text, "negative": negative, "scale": 6.0, "dynamic": False}
    results = [
        sample(load_scheduler(config(name)), x, 10, generator=torch.Generator().manual_seed(1), **kwargs)
        for sample in (by_hand, ours)
    ]
    assert torch.equal(*results)


def test_adapter_takes_one_generator_per_sample():
    text, negative = texts(torch.float32)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))

    def sample(rows):
        return ours(
            load_scheduler(config("CogVideoXDPMScheduler")),
            x[rows],
            10,
            text=text[rows],
            negative=negative[rows],
            scale=6.0,
            dynamic=False,
            generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)[rows]],
        )

    both = sample(slice(0, 2))
    torch.testing.assert_close(both[1:], sample(slice(1, 2)))
    assert not torch.allclose(both[0], both[1])


@BOTH
@pytest.mark.parametrize("first_step", [2, 5])
def test_adapter_starts_half_way_like_video_to_video(name, first_step):
    text, _ = texts(torch.float32)
    x0, noise = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    scheduler = load_scheduler(config(name))
    scheduler.set_timesteps(10)
    x = scheduler.add_noise(x0, noise, scheduler.timesteps[first_step : first_step + 1].repeat(2))
    expected, old, tail = x, None, scheduler.timesteps[first_step:]
    generator = torch.Generator().manual_seed(3)
    for i, t in enumerate(tail):
        output = network(expected, t.expand(2), text)
        if name == "CogVideoXDPMScheduler":
            back = tail[i - 1] if i > 0 else None
            expected, old = scheduler.step(output, old, t, back, expected, generator=generator, return_dict=False)
        else:
            expected = scheduler.step(output, t, expected, return_dict=False)[0]

    denoise = guided(lambda x, t, cond: network(x, t, cond.text), Conditioning(text=text), None, 1.0)
    out = diffusers_sampler(
        denoise, x, 10, scheduler=scheduler, generator=torch.Generator().manual_seed(3), first_step=first_step
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("rescale", [True, False])
@BOTH
def test_our_table_is_diffusers_table_bit_for_bit(name, shift, rescale):
    changes = {"snr_shift_scale": shift, "rescale_betas_zero_snr": rescale}
    theirs = load_scheduler(config(name, **changes)).alphas_cumprod
    table = Schedule.from_config(config(name, **changes)).alphas_cumprod
    assert theirs.dtype == table.dtype == torch.float64
    assert torch.equal(table, theirs)


def test_our_times_are_diffusers_trailing_timesteps():
    scheduler, schedule = CogVideoXDDIMScheduler(**CONFIG), Schedule.from_config(CONFIG)
    too_long = []
    for n in range(1, 1001):
        scheduler.set_timesteps(n)
        theirs = scheduler.timesteps.tolist()
        if len(theirs) == n:
            assert schedule.times(n) == [*theirs, -1], n
        else:  # a slip of rounding in diffusers: one step more, at time -1
            assert schedule.times(n) == theirs, n
            too_long.append(n)
    assert len(too_long) == 62
    assert too_long[:6] == [61, 103, 121, 122, 201, 206]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("n", [1, 2, 10, 50, 125])
def test_our_ddim_equals_diffusers_where_n_divides_1000(shift, prediction, n):
    changes = {"snr_shift_scale": shift, "prediction_type": prediction}
    schedule = Schedule.from_config(config("CogVideoXDDIMScheduler", **changes))
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    denoise = guided(lambda x, t, c: network(x, t, c.text), Conditioning(text=texts(x.dtype)[0]), None, 1.0)
    theirs = diffusers_sampler(denoise, x, n, scheduler=load_scheduler(config("CogVideoXDDIMScheduler", **changes)))
    out = SAMPLERS["ddim"](denoise, x, schedule.times(n), schedule=schedule, prediction=prediction)
    torch.testing.assert_close(out, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("n", [1, 2, 10, 50])
def test_our_dpm_equals_diffusers_given_its_second_draws(shift, n):
    """diffusers draws twice per second-order step and throws the first away; given the second, ours is the same."""
    schedule = Schedule.from_config(config("CogVideoXDPMScheduler", snr_shift_scale=shift))
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    denoise = guided(lambda x, t, c: network(x, t, c.text), Conditioning(text=texts(x.dtype)[0]), None, 1.0)
    theirs = diffusers_sampler(
        denoise,
        x,
        n,
        scheduler=load_scheduler(config("CogVideoXDPMScheduler", snr_shift_scale=shift)),
        generator=torch.Generator().manual_seed(4),
    )
    generator, step = torch.Generator().manual_seed(4), 0

    def draw(like):
        nonlocal step
        step += 1
        if 1 < step < n:
            torch.randn(like.shape, generator=generator)
        return torch.randn(like.shape, generator=generator)

    out = SAMPLERS["dpm"](denoise, x, schedule.times(n), schedule=schedule, prediction="v_prediction", draw=draw)
    torch.testing.assert_close(out, theirs, rtol=0, atol=5e-6)


def test_noising_and_x0_agree_with_diffusers_training_helpers():
    scheduler = CogVideoXDPMScheduler(**CONFIG)
    schedule = Schedule.from_config(CONFIG)
    x0, noise, output = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    for t in (0, 19, 500, 999):
        alpha, sigma, step = schedule.alpha(t), schedule.sigma(t), torch.tensor([t, t])
        noisy = scheduler.add_noise(x0, noise, step)
        torch.testing.assert_close(add_noise(x0, noise, alpha, sigma), noisy, rtol=0, atol=3e-6)
        # diffusers' training script reads x0 out of the velocity formula
        theirs = scheduler.get_velocity(output, noisy, step)
        torch.testing.assert_close(to_x0(output, noisy, alpha, sigma, "v_prediction"), theirs, rtol=0, atol=3e-6)


def test_a_scheduler_object_can_be_used_again():
    scheduler = load_scheduler(config("DPMSolverMultistepScheduler"))
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    fresh = copy.deepcopy(scheduler)
    first, second, other = (
        diffusers_sampler(lambda x, t: torch.tanh(x), x, 6, scheduler=s) for s in (scheduler, scheduler, fresh)
    )
    assert torch.equal(first, second)
    assert torch.equal(first, other)
