"""Numbers from videos: the world's score, PSNR and SSIM. See docs/evaluation.md."""

from videogen.evaluation.evaluate import (
    ceiling,
    evaluate,
    floor,
    held_out_prompts,
    markdown,
    reconstruction,
    score_table,
    swap_attribute,
    swap_rate,
)
from videogen.evaluation.metrics import psnr, ssim, wilson
from videogen.evaluation.score import ATTRIBUTES, Measurement, attributes, measure, score_clip

__all__ = [
    "ATTRIBUTES",
    "Measurement",
    "attributes",
    "ceiling",
    "evaluate",
    "floor",
    "held_out_prompts",
    "markdown",
    "measure",
    "psnr",
    "reconstruction",
    "score_clip",
    "score_table",
    "ssim",
    "swap_attribute",
    "swap_rate",
    "wilson",
]
