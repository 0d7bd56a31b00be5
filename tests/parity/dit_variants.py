"""Every published kind of CogVideoX transformer, small, and the same weights here and in diffusers."""

from __future__ import annotations

import types

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

from videogen.config import DiTConfig, to_dict
from videogen.models.dit import DiT
from videogen.types import Conditioning
from videogen.weights.table import DIT_RULES, to_ours

SMALL = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "time_embed_dim": 24,
    "text_embed_dim": 20,
    "max_text_seq_length": 6,
    "sample_height": 8,
    "sample_width": 12,
    "sample_frames": 13,
}
ROTARY = {"use_rotary_positional_embeddings": True}
LEARNED = {**ROTARY, "use_learned_positional_embeddings": True}
TEMPORAL = {**ROTARY, "patch_size_t": 2, "patch_bias": False, "sample_height": 40, "sample_width": 40}

VARIANTS = {
    "2B": DiTConfig(**SMALL),
    "5B": DiTConfig(**SMALL, **ROTARY),
    "5B-I2V": DiTConfig(**SMALL, **LEARNED, in_channels=32),
    "1.5": DiTConfig(**{**SMALL, **TEMPORAL}),
    "1.5-I2V": DiTConfig(**{**SMALL, **TEMPORAL}, in_channels=32, ofs_embed_dim=24),
    "Fun-2B": DiTConfig(**SMALL, in_channels=33),
    "Fun-5B": DiTConfig(**SMALL, **ROTARY, in_channels=33),
    "Fun-1.5": DiTConfig(**{**SMALL, **TEMPORAL}, in_channels=33),
    "Fun-Control": DiTConfig(**SMALL, **ROTARY, in_channels=32),
}


def theirs(config: DiTConfig, dtype: torch.dtype, seed: int = 0) -> CogVideoXTransformer3DModel:
    """diffusers' model with every weight random: some start as constants, which would hide mistakes."""
    model = CogVideoXTransformer3DModel(**to_dict(config)).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("weight") and value.ndim == 1:
            value.copy_(1 + 0.3 * noise)
        elif name.endswith("weight"):
            value.copy_(noise / value[0].numel() ** 0.5)
        else:
            value.copy_(0.3 * noise)
    return model


def ours(reference: CogVideoXTransformer3DModel, config: DiTConfig) -> DiT:
    model = DiT(config).to(reference.dtype).eval()
    model.load_state_dict(to_ours(reference.state_dict(), DIT_RULES))
    return model


def inputs(config: DiTConfig, size: tuple[int, int, int], dtype: torch.dtype, batch: int = 2, seed: int = 1):
    """latents [b, f, c, h, w], t [b], Conditioning, for a latent `size` of (f, h, w)."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    f, h, w = size
    extra = config.in_channels - config.out_channels
    cond = Conditioning(
        text=randn(batch, config.max_text_seq_length, config.text_embed_dim),
        channels=randn(batch, f, extra, h, w) if extra else None,
        vectors={"ofs": torch.full((1,), 2.0, dtype=dtype)} if config.ofs_embed_dim else {},
    )
    return randn(batch, f, config.out_channels, h, w), torch.tensor([999, 20][:batch]), cond


def pipeline_rotary(config, size: tuple[int, int, int]):
    """(cos, sin) as diffusers' pipelines make them for a latent of `size`; `config` may be theirs or ours."""
    f, h, w = size
    owner = types.SimpleNamespace(vae_scale_factor_spatial=8, transformer=types.SimpleNamespace(config=config))
    return CogVideoXPipeline._prepare_rotary_positional_embeddings(owner, h * 8, w * 8, f, torch.device("cpu"))


@torch.no_grad()
def run_theirs(model: CogVideoXTransformer3DModel, latents, t, cond: Conditioning) -> torch.Tensor:
    x = latents if cond.channels is None else torch.cat([latents, cond.channels], dim=2)
    _, f, _, h, w = latents.shape
    rotary = pipeline_rotary(model.config, (f, h, w)) if model.config.use_rotary_positional_embeddings else None
    ofs = cond.vectors.get("ofs")
    return model(x, cond.text, t, ofs=ofs, image_rotary_emb=rotary, return_dict=False)[0]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())
