"""Small pipelines of every published kind, and diffusers' pipelines around the very same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
)
from PIL import Image

from videogen.config import to_dict
from videogen.diffusion.samplers import load_scheduler
from videogen.models.dit import DiT
from videogen.models.vae import VAE
from videogen.pipeline import Pipeline
from videogen.testing import SCHEDULER, TINY_DIT, TINY_VAE, tiny_pipeline
from videogen.weights.table import DIT_RULES, VAE_RULES, to_theirs

diffusers.logging.set_verbosity_error()  # about float64

PLAIN = replace(TINY_DIT, in_channels=4, use_learned_positional_embeddings=False)
TEMPORAL = replace(PLAIN, patch_size_t=2, patch_bias=False, sample_height=20, sample_width=20)
DITS = {
    "2B": replace(PLAIN, use_rotary_positional_embeddings=False),
    "5B": PLAIN,
    "5B-I2V": TINY_DIT,
    "1.5": TEMPORAL,
    "1.5-I2V": replace(TEMPORAL, in_channels=8, ofs_embed_dim=16),
}
DDIM = SCHEDULER
DPM = {**SCHEDULER, "_class_name": "CogVideoXDPMScheduler"}
SCHEDULERS = {"2B": {**DDIM, "snr_shift_scale": 3.0}, "5B": DPM, "5B-I2V": DDIM, "1.5": DPM, "1.5-I2V": DPM}


def ours(name: str, dtype: torch.dtype, **changes: Any) -> Pipeline:
    """A pipeline of this kind; the native size is 32 x 48 pixels, 9 frames, for all of them."""
    vae = replace(TINY_VAE, invert_scale_latents=True) if name.startswith("1.5") else TINY_VAE
    settings = {"scheduler": SCHEDULERS[name], "height": 32, "width": 48, "guidance_scale": 3.0, **changes}
    return tiny_pipeline(dit=DITS[name], vae=vae, dtype=dtype, sampler="diffusers", **settings)


def their_vae(vae: VAE) -> AutoencoderKLCogVideoX:
    model = AutoencoderKLCogVideoX(**to_dict(vae.config)).to(next(vae.parameters()).dtype).eval()
    model.load_state_dict(to_theirs(vae.state_dict(), VAE_RULES))
    return model


def their_dit(dit: DiT) -> CogVideoXTransformer3DModel:
    model = CogVideoXTransformer3DModel(**to_dict(dit.config)).to(next(dit.parameters()).dtype).eval()
    model.load_state_dict(to_theirs(dit.state_dict(), DIT_RULES))
    return model


def theirs(pipeline: Pipeline, *, video: bool = False) -> Any:
    """The pipeline of diffusers that takes what this model takes."""
    config = pipeline.dit.config
    image = config.in_channels > config.out_channels
    kind = CogVideoXVideoToVideoPipeline if video else CogVideoXImageToVideoPipeline if image else CogVideoXPipeline
    return built(kind, pipeline)


def built(kind: Any, pipeline: Pipeline) -> Any:
    """A pipeline class of diffusers with the parts of ours."""
    pipe = kind(
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder.encoder,
        vae=their_vae(pipeline.vae),
        transformer=their_dit(pipeline.dit),
        scheduler=load_scheduler(pipeline.card.scheduler),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_ours(pipeline: Pipeline, request: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(frames [b, F, 3, H, W] in [0, 1], latents [b, f, c, h, w] after the last step)."""
    seen: list[torch.Tensor] = []
    frames = pipeline.generate(**request, output="tensor", on_step=lambda e: seen.append(e.latents))
    return frames, [latents for latents in seen if latents is not None][-1]


def run_theirs(pipeline: Pipeline, request: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """diffusers' answer to a request in our keywords, likewise."""
    request = dict(request)
    seed = request.pop("seed", 0)
    generators = [torch.Generator().manual_seed(s) for s in (seed if isinstance(seed, list) else [seed])]
    request["generator"] = generators if isinstance(seed, list) else generators[0]
    batch = len(request["prompt"]) if isinstance(request["prompt"], list) else 1
    if "first_frame" in request:
        request["image"] = [request.pop("first_frame")] * batch if batch > 1 else request.pop("first_frame")
    if "video" in request:
        request["video"] = [request["video"]] * batch if batch > 1 else request["video"]
    elif "num_frames" not in request:
        request["num_frames"] = pipeline.card.num_frames
    request.pop("fit", None)
    defaults = {
        "height": pipeline.card.height,
        "width": pipeline.card.width,
        "num_inference_steps": pipeline.card.num_inference_steps,
        "guidance_scale": pipeline.card.guidance_scale,
        "max_sequence_length": pipeline.card.max_sequence_length,
    }
    seen: list[torch.Tensor] = []

    def on_step(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(values["latents"])
        return values

    pipe = theirs(pipeline, video="video" in request)
    return pipe(**{**defaults, **request}, output_type="pt", callback_on_step_end=on_step).frames, seen[-1]


def picture(seed: int, width: int = 70, height: int = 40) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest, relative to the largest value where that is above 1."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.double() - b.double()).abs().max() / max(1.0, float(b.abs().max())))
