"""Samplers on Gaussian data, where the exact network, the exact path and the exact distribution are known."""

import inspect
import math

import pytest
import torch

from videogen.diffusion.prediction import target
from videogen.diffusion.samplers import SAMPLERS, diffusers_sampler, load_scheduler, scheduler_times
from videogen.diffusion.schedule import FlowSchedule, Schedule
from videogen.errors import Cancelled, InvalidRequest

ZERO_SNR = Schedule.from_config({"rescale_betas_zero_snr": True, "snr_shift_scale": 1.0})
SHIFTED = Schedule.from_config({"rescale_betas_zero_snr": True, "snr_shift_scale": 3.0})
PLAIN = Schedule.from_config({"rescale_betas_zero_snr": False, "snr_shift_scale": 1.0})  # has signal at t = 999
FLOW = FlowSchedule()
MEAN, STD = 0.5, 0.4

ODE = ["ddim", "euler", "heun", "dpm-ode"]
# (schedule, what the network predicts): every prediction, and pure noise at the start wherever a prediction allows it
CASES = [
    pytest.param(ZERO_SNR, "v_prediction", id="v"),
    pytest.param(SHIFTED, "v_prediction", id="v-shift3"),
    pytest.param(ZERO_SNR, "sample", id="sample"),
    pytest.param(PLAIN, "epsilon", id="epsilon"),
    pytest.param(FLOW, "flow", id="flow"),
]


def exact_network(schedule, prediction):
    """What a network trained to perfection on N(MEAN, STD²) answers."""

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        return target(x0, (x - alpha * x0) / sigma, alpha, sigma, prediction)

    return denoise


def exact_path(schedule, x, t, t_end):
    """Where the probability flow takes x: the deviation from the mean scales with the spread of the noisy data."""

    def spread(t):
        return math.sqrt((schedule.alpha(t) * STD) ** 2 + schedule.sigma(t) ** 2)

    return schedule.alpha(t_end) * MEAN + spread(t_end) / spread(t) * (x - schedule.alpha(t) * MEAN)


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def no_draw(like):
    raise AssertionError("a sampler without noise must not draw")


def errors(name, schedule, prediction, steps):
    """Largest error against the exact path, from the noisiest time down to a fifth of it.

    Not down to the clean latent: the last step there is of first order in every sampler, its error hides the rest.
    """
    start = schedule.times(1)[0]
    x, end = noise(1, 2, 2, 4, 4), start / 5
    for n in steps:
        times = [start + (end - start) * i / n for i in range(n + 1)]
        out = SAMPLERS[name](
            exact_network(schedule, prediction), x, times, schedule=schedule, prediction=prediction, draw=no_draw
        )
        yield float((out - exact_path(schedule, x, start, end)).abs().max())


@pytest.mark.parametrize(("schedule", "prediction"), CASES)
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpm-ode", 2)])
def test_sampler_has_its_textbook_order(name, order, schedule, prediction):
    coarse, fine = errors(name, schedule, prediction, [40, 80])
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)
    assert fine < (0.02 if order == 1 else 1e-3)


@pytest.mark.parametrize(("schedule", "prediction"), CASES)
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "lcm"])  # lcm: for other networks, see below
def test_samples_have_the_mean_and_spread_of_the_data(name, schedule, prediction):
    generator = torch.Generator().manual_seed(3)
    start = schedule.times(1)[0]
    x = schedule.alpha(start) * (MEAN + STD * noise(8, 2, 4, 8, 8, seed=1))
    x = x + schedule.sigma(start) * noise(8, 2, 4, 8, 8, seed=2)
    out = SAMPLERS[name](
        exact_network(schedule, prediction),
        x,
        schedule.times(100),
        schedule=schedule,
        prediction=prediction,
        draw=lambda like: torch.randn(like.shape, dtype=like.dtype, generator=generator),
    )
    assert float(out.mean()) == pytest.approx(MEAN, abs=0.015)
    assert float(out.std()) == pytest.approx(STD, abs=0.06)  # the last, first-order step makes it a little too small


def test_dpm_forgets_its_start_and_keeps_the_distribution():
    """The stochastic sampler's spread comes from its own draws: from one fixed x it still gives the data's."""
    generator = torch.Generator().manual_seed(0)
    start = torch.zeros(16, 2, 4, 8, 8, dtype=torch.float64)
    kwargs = {"schedule": ZERO_SNR, "prediction": "v_prediction"}
    denoise = exact_network(ZERO_SNR, "v_prediction")

    def draw(like):
        return torch.randn(like.shape, dtype=like.dtype, generator=generator)

    out = SAMPLERS["dpm"](denoise, start, ZERO_SNR.times(200), draw=draw, **kwargs)
    assert float(out.mean()) == pytest.approx(MEAN, abs=0.015)
    assert float(out.std()) == pytest.approx(STD, abs=0.015)
    ode = SAMPLERS["dpm-ode"](denoise, start, ZERO_SNR.times(200), draw=no_draw, **kwargs)
    assert float(ode.std()) < 1e-12


def exact_student(schedule, prediction):
    """What a student trained to perfection answers: the clean end of the path through x."""

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x0 = exact_path(schedule, x, t, schedule.clean)
        return target(x0, (x - alpha * x0) / sigma, alpha, sigma, prediction)

    return denoise


@pytest.mark.parametrize(("schedule", "prediction"), [case for case in CASES if case.values[0] is not PLAIN])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_with_a_students_network_few_steps_of_lcm_are_exact(schedule, prediction, steps):
    generator = torch.Generator().manual_seed(5)
    out = SAMPLERS["lcm"](
        exact_student(schedule, prediction),
        noise(16, 2, 4, 8, 8),
        schedule.times(steps),
        schedule=schedule,
        prediction=prediction,
        draw=lambda like: torch.randn(like.shape, dtype=like.dtype, generator=generator),
    )
    assert float(out.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(out.std()) == pytest.approx(STD, abs=0.01)
    if steps == 4:  # a network that knows only the mean of what is behind the noise needs more of them
        blurred = SAMPLERS["lcm"](
            exact_network(schedule, prediction),
            noise(16, 2, 4, 8, 8),
            schedule.times(4),
            schedule=schedule,
            prediction=prediction,
            draw=lambda like: torch.randn(like.shape, dtype=like.dtype, generator=generator),
        )
        assert float(blurred.std()) < 0.75 * STD


def test_lcm_keeps_the_clean_latent_only_and_draws_between_steps_only():
    asked, drawn = [], []
    network = exact_student(SHIFTED, "v_prediction")

    def denoise(x, t):
        asked.append((x, t))
        return network(x, t)

    def draw(like):
        drawn.append(noise(*like.shape, seed=10 + len(drawn)))
        return drawn[-1]

    times = SHIFTED.times(4)
    kind = {"schedule": SHIFTED, "prediction": "v_prediction"}
    SAMPLERS["lcm"](denoise, noise(1, 2, 2, 4, 4), times, draw=draw, **kind)
    assert len(drawn) == 3
    for (x, t), (x_next, t_next), z in zip(asked, asked[1:], drawn, strict=False):
        x0 = exact_path(SHIFTED, x, t, -1.0)
        torch.testing.assert_close(x_next, SHIFTED.alpha(t_next) * x0 + SHIFTED.sigma(t_next) * z)


def test_euler_is_ddim_in_other_words_and_the_flow_ode_on_a_flow():
    x = noise(1, 2, 2, 4, 4)
    for schedule, prediction in [(SHIFTED, "v_prediction"), (FLOW, "flow")]:
        denoise, times = exact_network(schedule, prediction), schedule.times(7)
        kwargs = {"schedule": schedule, "prediction": prediction}
        ddim, euler = (SAMPLERS[name](denoise, x, times, **kwargs) for name in ("ddim", "euler"))
        torch.testing.assert_close(euler, ddim, rtol=1e-12, atol=1e-12)
    by_hand = x
    for i in range(7):
        by_hand = by_hand - denoise(by_hand, times[i]) / 7
    torch.testing.assert_close(euler, by_hand, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_returns_the_networks_x0(name):
    x = noise(1, 2, 2, 4, 4)
    out = SAMPLERS[name](
        exact_network(SHIFTED, "v_prediction"),
        x,
        SHIFTED.times(1),
        schedule=SHIFTED,
        prediction="v_prediction",
        draw=torch.randn_like,
    )
    torch.testing.assert_close(out, torch.full_like(x, MEAN))


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_network_is_asked_about_the_clean_latent_and_every_step_is_reported(name):
    asked, reported = [], []
    denoise = exact_network(SHIFTED, "v_prediction")

    def remember(x, t):
        asked.append(t)
        return denoise(x, t)

    times = SHIFTED.times(5)
    out = SAMPLERS[name](
        remember,
        noise(1, 2, 2, 4, 4),
        times,
        schedule=SHIFTED,
        prediction="v_prediction",
        draw=torch.randn_like,
        on_step=lambda step, x: reported.append((step, x)),
    )
    assert sorted(set(asked), reverse=True) == times[:-1]
    assert len(asked) == (9 if name == "heun" else 5)
    assert [step for step, _ in reported] == [1, 2, 3, 4, 5]
    assert torch.equal(reported[-1][1], out)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("given", "kept"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_latents_are_kept_in_float32_at_least(name, given, kept):
    denoise = exact_network(SHIFTED, "v_prediction")
    x = noise(1, 2, 2, 4, 4).to(given)
    out = SAMPLERS[name](
        lambda x, t: denoise(x, t).float(),
        x,
        SHIFTED.times(4),
        schedule=SHIFTED,
        prediction="v_prediction",
        draw=torch.randn_like,
    )
    assert out.dtype == kept


def test_on_step_may_cancel():
    def stop(step, x):
        if step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        SAMPLERS["ddim"](
            exact_network(SHIFTED, "v_prediction"),
            noise(1, 2, 2, 4, 4),
            SHIFTED.times(5),
            schedule=SHIFTED,
            prediction="v_prediction",
            on_step=stop,
        )


def test_all_samplers_share_one_signature():
    assert {tuple(inspect.signature(sampler).parameters) for sampler in SAMPLERS.values()} == {
        ("denoise", "x", "times", "schedule", "prediction", "draw", "on_step")
    }


def test_a_tail_of_the_times_starts_half_way():
    """Video-to-video: noised data, the last steps only; exact data noise goes back to where it came from."""
    times = SHIFTED.times(50)[25:]
    x0 = MEAN + STD * noise(1, 2, 2, 4, 4)
    x = SHIFTED.alpha(times[0]) * x0 + SHIFTED.sigma(times[0]) * noise(1, 2, 2, 4, 4, seed=9)
    out = SAMPLERS["heun"](
        exact_network(SHIFTED, "v_prediction"), x, times, schedule=SHIFTED, prediction="v_prediction"
    )
    torch.testing.assert_close(out, exact_path(SHIFTED, x, times[0], -1.0), rtol=0.2, atol=0.1)


def test_load_scheduler_only_opens_schedulers_of_diffusers():
    scheduler = load_scheduler(
        {"_class_name": "CogVideoXDPMScheduler", "snr_shift_scale": 1.0, "_diffusers_version": "0.30"}
    )
    assert type(scheduler).__name__ == "CogVideoXDPMScheduler"
    assert scheduler.config.snr_shift_scale == 1.0
    for name in ["CogVideoXDDMIScheduler", "SchedulerMixin", "KarrasDiffusionSchedulers", "os", "__import__", ""]:
        with pytest.raises(InvalidRequest, match="no scheduler"):
            load_scheduler({"_class_name": name})
    with pytest.raises(InvalidRequest) as error:
        load_scheduler({"_class_name": "CogVideoXDDMIScheduler"})
    assert "CogVideoXDDIMScheduler" in error.value.hint


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
    ],
)
def test_adapter_reaches_the_data_with_schedulers_of_diffusers(name):
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "snr_shift_scale": 1.0,
        "clip_sample": False,
        "_class_name": name,
    }
    scheduler = load_scheduler(config)
    out = diffusers_sampler(
        lambda x, t: exact_network(PLAIN, "v_prediction")(x, t).float(),
        noise(8, 2, 4, 8, 8).float(),
        100,
        scheduler=scheduler,
        generator=torch.Generator().manual_seed(0),
    )
    assert float(out.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(out.std()) == pytest.approx(STD, abs=0.04)


def test_adapter_drives_flow_matching():
    scheduler = load_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    out = diffusers_sampler(
        lambda x, t: exact_network(FLOW, "flow")(x, t).float(), noise(8, 2, 4, 8, 8).float(), 100, scheduler=scheduler
    )
    assert float(out.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(out.std()) == pytest.approx(STD, abs=0.03)


def test_adapter_tells_its_times_and_reports_every_step():
    scheduler = load_scheduler({"_class_name": "CogVideoXDDIMScheduler", "timestep_spacing": "trailing"})
    asked, reported = [], []

    def denoise(x, t):
        asked.append(t)
        return x * 0

    x = noise(1, 2, 2, 4, 4).float()
    diffusers_sampler(denoise, x, 8, scheduler=scheduler, on_step=lambda step, x: reported.append(step))
    assert asked == scheduler_times(scheduler, 8) == [999.0, 874.0, 749.0, 624.0, 499.0, 374.0, 249.0, 124.0]
    assert reported == list(range(1, 9))
    asked.clear()
    diffusers_sampler(denoise, x, 8, scheduler=scheduler, first_step=6)
    assert asked == [249.0, 124.0]
