import math

import pytest
import torch

from videogen.diffusion.prediction import add_noise, prediction_type, target, to_eps, to_x0
from videogen.errors import InvalidRequest

KINDS = ["v_prediction", "epsilon", "sample", "flow"]
LEVELS = [
    (0.6, 0.8),
    (math.cos(0.1), math.sin(0.1)),
    (0.3, 0.7),
    (0.9, 0.9),
]  # the last is no schedule's: algebra holds


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return torch.randn(2, 3, 4, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_perfect_output_gives_back_both(pair, kind, level):
    x0, noise = pair
    x = add_noise(x0, noise, *level)
    output = target(x0, noise, *level, kind)
    torch.testing.assert_close(to_x0(output, x, *level, kind), x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(to_eps(output, x, *level, kind), noise, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
def test_any_output_is_consistent_with_x(pair, kind, level):
    """Not only a perfect one: x0 and eps read from any output add up to x, and their target is that output."""
    output, x = pair
    x0, eps = to_x0(output, x, *level, kind), to_eps(output, x, *level, kind)
    torch.testing.assert_close(add_noise(x0, eps, *level), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(target(x0, eps, *level, kind), output, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["v_prediction", "sample", "flow"])
def test_pure_noise_is_no_special_case(pair, kind):
    x0, noise = pair
    output = target(x0, noise, 0.0, 1.0, kind)
    torch.testing.assert_close(to_x0(output, noise, 0.0, 1.0, kind), x0, rtol=1e-12, atol=1e-12)


def test_levels_may_differ_per_sample(pair):
    x0, noise = pair
    alpha = torch.tensor([0.0, 0.6], dtype=torch.float64).view(2, 1, 1, 1, 1)
    sigma = torch.tensor([1.0, 0.8], dtype=torch.float64).view(2, 1, 1, 1, 1)
    x = add_noise(x0, noise, alpha, sigma)
    output = target(x0, noise, alpha, sigma, "v_prediction")
    torch.testing.assert_close(to_x0(output, x, alpha, sigma, "v_prediction"), x0, rtol=1e-12, atol=1e-12)


def test_prediction_type_of_a_scheduler_config():
    assert prediction_type({"prediction_type": "v_prediction"}) == "v_prediction"
    assert prediction_type({"_class_name": "FlowMatchEulerDiscreteScheduler"}) == "flow"
    assert prediction_type({"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}) == "flow"
    assert prediction_type({}) == "epsilon"
    with pytest.raises(InvalidRequest, match="trigflow"):
        prediction_type({"prediction_type": "trigflow"})
