"""Numbers from videos: the world's score, PSNR and SSIM. See docs/evaluation.md."""

from videogen.evaluation.evaluate import (
    KINDS,
    SPLITS,
    caption_gaps,
    ceiling,
    evaluate,
    floor,
    held_out_prompts,
    markdown,
    reconstruction,
    score_prompts,
    score_table,
    swap,
    swap_attribute,
)
from videogen.evaluation.metrics import flicker, motion, psnr, ssim, wilson
from videogen.evaluation.score import ATTRIBUTES, Measurement, Seen, attributes, measure, score_clip

__all__ = [
    "ATTRIBUTES",
    "KINDS",
    "SPLITS",
    "Measurement",
    "Seen",
    "attributes",
    "caption_gaps",
    "ceiling",
    "evaluate",
    "flicker",
    "floor",
    "held_out_prompts",
    "markdown",
    "measure",
    "motion",
    "psnr",
    "reconstruction",
    "score_clip",
    "score_prompts",
    "score_table",
    "ssim",
    "swap",
    "swap_attribute",
    "wilson",
]
