"""What a network may predict, and how one prediction turns into another.

With x = alpha · x0 + sigma · eps, a network may be trained to output

    sample        x0
    epsilon       eps
    v_prediction  alpha · eps - sigma · x0     (arXiv:2202.00512; CogVideoX)
    flow          eps - x0                     (rectified flow)

Two of (x, x0, eps, output) fix the others. The formulas hold for any pair (alpha, sigma), floats or tensors that
broadcast against x, not only where alpha² + sigma² = 1 or alpha + sigma = 1.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from videogen.errors import InvalidRequest

Prediction = Literal["v_prediction", "epsilon", "sample", "flow"]
Level = float | Tensor  # an alpha or a sigma
Array = Float[Tensor, "..."]


def prediction_type(config: dict[str, Any]) -> Prediction:
    """What the network of this `scheduler_config.json` predicts."""
    name = config.get("prediction_type", "epsilon")
    if name == "flow_prediction" or config.get("_class_name", "").startswith("FlowMatch"):
        return "flow"
    if name not in get_args(Prediction):
        raise InvalidRequest(
            f"the scheduler's prediction_type {name!r} is not known.",
            why=f"a network here predicts one of: {', '.join(get_args(Prediction))}.",
            param="prediction_type",
        )
    return name


def add_noise(x0: Array, noise: Array, alpha: Level, sigma: Level) -> Array:
    return alpha * x0 + sigma * noise


def target(x0: Array, noise: Array, alpha: Level, sigma: Level, prediction: Prediction) -> Array:
    """The output of a perfect network."""
    match prediction:
        case "sample":
            return x0
        case "epsilon":
            return noise
        case "v_prediction":
            return alpha * noise - sigma * x0
        case "flow":
            return noise - x0


def to_x0(output: Array, x: Array, alpha: Level, sigma: Level, prediction: Prediction) -> Array:
    """The clean latent that a network's output means. An `epsilon` network cannot say it at alpha = 0."""
    match prediction:
        case "sample":
            return output
        case "epsilon":
            return (x - sigma * output) / alpha
        case "v_prediction":
            norm = alpha**2 + sigma**2
            return (alpha / norm) * x - (sigma / norm) * output
        case "flow":
            return (x - sigma * output) / (alpha + sigma)


def to_eps(output: Array, x: Array, alpha: Level, sigma: Level, prediction: Prediction) -> Array:
    """The noise that a network's output means. A `sample` network cannot say it at sigma = 0."""
    match prediction:
        case "sample":
            return (x - alpha * output) / sigma
        case "epsilon":
            return output
        case "v_prediction":
            norm = alpha**2 + sigma**2
            return (alpha / norm) * output + (sigma / norm) * x
        case "flow":
            return (x + alpha * output) / (alpha + sigma)
