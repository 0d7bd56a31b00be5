"""A whole model in memory with random weights, made in a moment: what tests and notebooks stand on.

Every weight is random, those included that training starts at zero, so that no part can be wrong without a trace.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from videogen.config import DiTConfig, VAEConfig
from videogen.data.world import VOCABULARY
from videogen.models.dit import DiT
from videogen.models.text import TextEncoder, tiny_t5, word_tokenizer
from videogen.models.vae import VAE
from videogen.pipeline import Pipeline
from videogen.types import Conditioning, Latent
from videogen.weights.card import Card
from videogen.weights.models import layout_of

# The architecture of the bundled model (that of CogVideoX-5B-I2V), smaller: 9 frames of 32 x 48 pixels.
TINY_DIT = DiTConfig(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=8,
    out_channels=4,
    time_embed_dim=16,
    text_embed_dim=16,
    sample_height=4,
    sample_width=6,
    sample_frames=9,
    max_text_seq_length=8,
    use_rotary_positional_embeddings=True,
    use_learned_positional_embeddings=True,
)
TINY_VAE = VAEConfig(
    block_out_channels=(4, 4, 8, 8),
    latent_channels=4,
    layers_per_block=1,
    norm_num_groups=2,
    sample_height=32,
    sample_width=48,
    scaling_factor=0.7,
)
SCHEDULER: dict[str, Any] = {
    "_class_name": "CogVideoXDDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
}
CONDITIONS = ("text", "first_frame", "last_frame", "keyframes", "video")


def tiny_pipeline(
    *,
    dit: DiTConfig = TINY_DIT,
    vae: VAEConfig = TINY_VAE,
    scheduler: dict[str, Any] = SCHEDULER,
    conditions: tuple[str, ...] = CONDITIONS,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **facts: Any,
) -> Pipeline:
    """A pipeline of the given kind that makes noise, not clips. `facts` are further fields of its `Card`."""
    card = Card(
        folder=Path("tiny-random"),
        dit=dit,
        vae=vae,
        scheduler=scheduler,
        conditions=conditions,
        size_multiple=vae.spatial_compression * dit.patch_size,
        fixed_size=dit.use_learned_positional_embeddings,
        max_sequence_length=dit.max_text_seq_length,
        **{
            "name": "tiny-random",
            "height": dit.sample_height * vae.spatial_compression,
            "width": dit.sample_width * vae.spatial_compression,
            "num_frames": dit.sample_frames,
            "fps": 8,
            "num_inference_steps": 4,
            "layout": layout_of(dit, vae.latent_channels),
            **facts,
        },
    )
    tokenizer = word_tokenizer(VOCABULARY, dit.max_text_seq_length)
    t5 = tiny_t5(len(tokenizer), d_model=dit.text_embed_dim, num_heads=2, d_ff=32)
    networks = DiT(dit), VAE(vae), TextEncoder(t5, tokenizer, dit.max_text_seq_length)
    for place, network in enumerate(networks):
        randomize(network.to(dtype).eval(), seed=3 * seed + place)
    networks[1].decoder.conv_out.weight.data *= 0.1  # greys, where most would be clamped to black or white
    return Pipeline(card, *networks)


@torch.no_grad()
def randomize(network: nn.Module, *, seed: int = 0) -> nn.Module:
    """Every weight random, of a size that keeps activations near 1. Drawn in float32: the same in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("weight") and value.ndim == 1:
            noise = 1 + 0.3 * noise
        elif name.endswith("weight"):
            noise = noise / value[0].numel() ** 0.5
        else:
            noise = 0.3 * noise
        value.copy_(noise)
    return network


class TinyBatch(NamedTuple):
    """What the DiT is called with, `dit(*batch)`, for two clips."""

    latents: Latent
    t: Tensor
    cond: Conditioning


def tiny_batch(config: DiTConfig = TINY_DIT, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> TinyBatch:
    """Two noisy latents of the native size, two times, random text, and the latents of a first frame."""
    generator = torch.Generator().manual_seed(seed)
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    frames += -frames % (config.patch_size_t or 1)
    extra = config.in_channels - config.out_channels

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator).to(dtype)

    latents = normal(frames, config.out_channels, config.sample_height, config.sample_width)
    channels = normal(frames, extra, config.sample_height, config.sample_width) if extra else None
    if channels is not None:
        channels[:, 1:] = 0
    cond = Conditioning(
        text=normal(config.max_text_seq_length, config.text_embed_dim),
        channels=channels,
        vectors={"ofs": torch.full((1,), 2.0, dtype=dtype)} if config.ofs_embed_dim else {},
    )
    return TinyBatch(latents, torch.tensor([999, 20]), cond)
