import math

import pytest
import torch

from videogen.diffusion.denoiser import denoiser, dynamic_cfg, guided, last_time, stack, switched
from videogen.testing import TINY_DIT, tiny_batch, tiny_pipeline
from videogen.types import Conditioning


def cond(value: float, batch: int = 2, dtype=torch.float32) -> Conditioning:
    return Conditioning(text=torch.full((batch, 3, 4), value, dtype=dtype))


class Model:
    """Answers x + mean of the text, and remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, cond):
        self.calls.append((x, t, cond))
        return x + cond.text.mean((1, 2)).view(-1, 1, 1, 1, 1).to(x.dtype)


X = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def test_guidance_extrapolates_from_uncond_in_one_call_with_uncond_first():
    model = Model()
    out = guided(model, cond(1.0), cond(-2.0), 6.0)(X, 999.0)
    torch.testing.assert_close(out, X - 2 + 6 * 3)
    ((x, t, both),) = model.calls
    assert torch.equal(x, torch.cat([X, X]))
    assert t.tolist() == [999.0] * 4
    assert both.text[:, 0, 0].tolist() == [-2, -2, 1, 1]


@pytest.mark.parametrize("scale", [1.0, 0.0, -2.0])
def test_guidance_of_one_or_less_asks_only_with_the_condition(scale):
    model = Model()
    out = guided(model, cond(1.0), cond(-2.0), scale)(X, 10.0)
    assert torch.equal(out, denoiser(Model(), cond(1.0))(X, 10.0))
    assert [len(x) for x, _, _ in model.calls] == [2]


def test_output_is_float32_and_the_network_sees_its_own_dtype():
    model = Model()
    out = guided(model, cond(1.0, dtype=torch.bfloat16), cond(0.0, dtype=torch.bfloat16), 3.0, dtype=torch.bfloat16)(
        X, 5.0
    )
    assert out.dtype == torch.float32
    assert model.calls[0][0].dtype == torch.bfloat16


def test_conditions_may_change_over_time():
    denoise = guided(Model(), lambda t: cond(1.0 if t > 500 else 2.0), cond(0.0), lambda t: 2.0 if t > 500 else 0.5)
    torch.testing.assert_close(denoise(X, 999.0), X + 2)
    torch.testing.assert_close(denoise(X, 100.0), X + 1)


def test_guidance_in_two_calls_gives_the_numbers_of_one():
    dit = tiny_pipeline(dtype=torch.float64).dit
    x, _, told = tiny_batch(TINY_DIT, dtype=torch.float64)
    assert told.text is not None
    other = told.replace(text=told.text.flip(1))
    with torch.no_grad():
        one, two = (guided(dit, told, other, 6.0, dtype=torch.float64, in_two=in_two) for in_two in (False, True))
        torch.testing.assert_close(one(x, 500.0), two(x, 500.0), rtol=0, atol=1e-12)

    model = Model()
    guided(model, cond(1.0), cond(-2.0), 6.0, in_two=True)(X, 999.0)
    assert [c.text[:, 0, 0].tolist() for _, _, c in model.calls] == [[-2, -2], [1, 1]]


@pytest.mark.parametrize("in_two", [False, True])
def test_guidance_that_ends_goes_on_in_the_last_direction(in_two):
    model = Model()
    changing = lambda t: cond(1.0 if t > 100 else 4.0)  # noqa: E731
    denoise = guided(model, changing, cond(-2.0), 6.0, in_two=in_two, down_to=500.0)
    torch.testing.assert_close(denoise(X, 500.0), X - 2 + 6 * 3)
    before = len(model.calls)
    torch.testing.assert_close(denoise(X, 400.0), X + 1 + 5 * 3)  # = X - 2 + 6 · 3, as long as nothing changes
    torch.testing.assert_close(denoise(X, 100.0), X + 4 + 5 * 3)
    assert [len(x) for x, _, _ in model.calls[before:]] == [2, 2]
    never = guided(model, cond(1.0), cond(-2.0), 6.0, in_two=in_two, down_to=math.inf)
    torch.testing.assert_close(never(X, 999.0), X + 1)


def test_each_evaluation_is_announced_with_its_branches_in_the_order_of_the_rows():
    heard = []

    def announce(t, told):
        heard.append((t, {name: c.text[0, 0, 0].item() for name, c in told.items()}))

    both = {"down_to": 500.0, "announce": announce}
    for denoise in (
        guided(Model(), cond(1.0), cond(-2.0), 6.0, **both),
        guided(Model(), cond(1.0), cond(-2.0), 6.0, in_two=True, **both),
    ):
        denoise(X, 500.0)
        denoise(X, 499.0)
    guided(Model(), cond(1.0), None, 6.0, announce=announce)(X, 500.0)
    assert list(map(list, [told for _, told in heard[:1]])) == [["uncond", "cond"]]
    assert heard == [
        (500.0, {"uncond": -2, "cond": 1}),
        (499.0, {"alone": 1}),
        (500.0, {"uncond": -2}),
        (500.0, {"cond": 1}),
        (499.0, {"alone": 1}),
        (500.0, {"alone": 1}),
    ]


@pytest.mark.parametrize(
    ("until", "n", "count"),
    [(1.0, 50, 50), (0.0, 50, 0), (0.5, 50, 25), (0.5, 5, 3), (0.07, 100, 7), (0.3, 10, 3), (0.01, 10, 1)],
)
def test_switched_gives_the_first_for_that_share_of_the_steps(until, n, count):
    first, then = cond(1.0), cond(2.0)
    times = [float(1000 - i) for i in range(n)]
    at = switched(first, then, times=times, until=until)
    assert [at(t) is first for t in times] == [True] * count + [False] * (n - count)
    assert [t >= last_time(times, until) for t in times] == [True] * count + [False] * (n - count)
    assert (last_time(times, until) == -math.inf) == (until == 1), "never below the last step's time, or always"


def test_stack_keeps_rows_and_shared_vectors():
    a = Conditioning(torch.zeros(3, 2, 4), torch.zeros(3, 1, 2, 4, 4), None, {"ofs": torch.tensor([2.0])})
    b = Conditioning(torch.ones(3, 2, 4), torch.ones(3, 1, 2, 4, 4), None, {"ofs": torch.tensor([2.0])})
    both = stack(a, b)
    assert both.text is not None
    assert both.channels is not None
    assert both.text[:, 0, 0].tolist() == both.channels[:, 0, 0, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert both.tokens is None
    assert both.vectors["ofs"].tolist() == [2.0]
    other = stack(a, b.replace(vectors={"ofs": torch.tensor([5.0])}))
    assert other.vectors["ofs"].tolist() == [2.0] * 3 + [5.0] * 3


def test_stack_refuses_halves_of_different_kinds():
    with pytest.raises(ValueError, match="zeros"):
        stack(cond(1.0), Conditioning())
    with pytest.raises(ValueError, match="ofs"):
        stack(cond(1.0), cond(1.0).replace(vectors={"ofs": torch.ones(1)}))


def test_dynamic_cfg_stays_between_one_and_one_plus_scale():
    scale = dynamic_cfg(6.0, 50)
    values = [scale(float(t)) for t in range(1000)]
    assert min(values) >= 1
    assert max(values) <= 7
    assert scale(50.0) == 1  # the ramp's own start, where n - t is 0
    assert scale(0.0) == 7  # and its end


def test_the_two_dynamic_guidances():
    """Of 50 steps with guidance 6: a wave that jumps from step to step, and a smooth rise from none to all."""
    times = [float(t) for t in range(999, 0, -20)]
    wave, rise = ([dynamic_cfg(6.0, 50, mode=mode, times=times)(t) for t in times] for mode in ("diffusers", "sat"))
    # diffusers 0.42.1 with use_dynamic_cfg=True
    assert [round(scale, 2) for scale in wave[:7] + wave[-3:]] == [2.29, 2.54, 6.97, 6.42, 2.79, 4.27, 1.04, 1, 1, 1.12]
    assert rise == [1 + 6 * (1 - math.cos(math.pi * (i / 50) ** 5)) / 2 for i in range(50)]
    assert rise[0] == 1
    assert rise == sorted(rise)
    assert 6.5 < rise[-1] < 7
    between = dynamic_cfg(6.0, 50, mode="sat", times=times)(990.0)  # on the way from the first step to the second
    assert between == rise[1]
