"""The same random weights in our modules and in diffusers', and what both are given."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from videogen.config import DiTConfig, VAEConfig, to_dict
from videogen.models.dit import DiT
from videogen.models.text import TextEncoder
from videogen.models.vae import VAE
from videogen.testing import SCHEDULER
from videogen.types import Conditioning
from videogen.weights.card import Card
from videogen.weights.models import layout_of
from videogen.weights.table import DIT_RULES, VAE_RULES, to_theirs

FIVE = DiTConfig(num_layers=42, num_attention_heads=48, use_rotary_positional_embeddings=True)
DPM: dict[str, Any] = SCHEDULER | {"_class_name": "CogVideoXDPMScheduler"}


@dataclass(frozen=True)
class Shape:
    """What is measured: networks and clips (frames, height, width). Every text encoder but "xxl" is a small one."""

    dit: DiTConfig
    vae: VAEConfig
    dit_clip: tuple[int, int, int]  # of one guidance step
    clip: tuple[int, int, int]  # of the VAE, and of a whole generate()
    steps: int  # of a whole generate()
    text: str = "small"
    scheduler: dict[str, Any] = field(default_factory=lambda: DPM)
    conditions: tuple[str, ...] = ("text",)
    dtype: torch.dtype = torch.bfloat16  # as the published weights are, or what `load` takes on a CPU
    rounds: int = 3

    def tokens(self, clip: tuple[int, int, int]) -> int:
        f, _, h, w = latent_shape(self, clip)
        return self.dit.max_text_seq_length + f // (self.dit.patch_size_t or 1) * (h // 2) * (w // 2)


NATIVE, NATIVE_15 = (49, 480, 720), (81, 768, 1360)
SHAPES = {
    # The published sizes: for a GPU.
    "2b": Shape(DiTConfig(), VAEConfig(), NATIVE, NATIVE, 50, "xxl", dtype=torch.float16),
    "5b": Shape(FIVE, VAEConfig(scaling_factor=0.7), NATIVE, NATIVE, 50, "xxl"),
    "1.5": Shape(
        replace(FIVE, patch_size_t=2, patch_bias=False, sample_height=96, sample_width=170, sample_frames=81),
        VAEConfig(scaling_factor=0.7, invert_scale_latents=True),
        NATIVE_15,
        NATIVE_15,
        50,
        "xxl",
    ),
    # The full widths, cut to what a CPU can do in minutes: two layers, three latent frames, two rounds.
    "toy": Shape(
        replace(FIVE, num_layers=2),
        VAEConfig(scaling_factor=0.7),
        (9, 256, 384),
        (9, 96, 128),
        2,
        dtype=torch.float32,
        rounds=2,
    ),
    # To see that the program runs.
    "smoke": Shape(
        replace(FIVE, num_layers=2, num_attention_heads=2, text_embed_dim=32, time_embed_dim=16),
        VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1, scaling_factor=0.7),
        (9, 32, 48),
        (9, 32, 48),
        2,
    ),
}


def latent_shape(shape: Shape, clip: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """[f, c, h, w] as the DiT sees it."""
    frames, height, width = clip
    return card(shape).latent_shape(height, width, frames)


def card(shape: Shape) -> Card:
    frames, height, width = shape.clip
    return Card(
        folder=Path("random"),
        name="random",
        dit=shape.dit,
        vae=shape.vae,
        scheduler=shape.scheduler,
        conditions=shape.conditions,
        layout=layout_of(shape.dit, shape.vae.latent_channels),
        height=height,
        width=width,
        num_frames=frames,
        fps=8,
        size_multiple=16,
        fixed_size=shape.dit.use_learned_positional_embeddings,
        max_sequence_length=shape.dit.max_text_seq_length,
        num_inference_steps=shape.steps,
        sampler="dpm",
    )


@torch.no_grad()
def random_state(
    make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, Tensor]:
    """A state dict as training leaves one, in size if not in sense: normal, norms near 1, biases small, never zero."""
    with torch.device("meta"):
        names = make().to(dtype).state_dict()
    if device.type == "meta":
        return names
    generator, state = torch.Generator(device).manual_seed(seed), {}
    for name, meta in names.items():
        value = torch.randn(meta.shape, generator=generator, device=device, dtype=dtype)
        if name.endswith("weight") and meta.ndim == 1:
            value = 1 + 0.1 * value
        elif name.endswith("weight"):
            value *= meta[0].numel() ** -0.5
        else:
            value *= 0.1
        state[name] = value
    return state


class Weights:
    """One set of random weights for a shape, and networks that share it: no network has a copy.

    `wider` is the dtype of references; `first_frame` a picture for a model that takes one.
    """

    first_frame: Any = None

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.shape, self.dtype, self.device, self.seed = shape, dtype, device, seed
        self.wider = torch.float64 if dtype == torch.float32 else torch.float32

    @cached_property
    def dit_state(self) -> dict[str, Tensor]:
        return random_state(lambda: DiT(self.shape.dit), self.dtype, self.device, self.seed)

    @cached_property
    def vae_state(self) -> dict[str, Tensor]:
        return random_state(lambda: VAE(self.shape.vae), self.dtype, self.device, self.seed + 1)

    def dit(self, dtype: torch.dtype | None = None) -> DiT:
        return self._ours(lambda: DiT(self.shape.dit), self.dit_state, dtype)

    def vae(self, dtype: torch.dtype | None = None) -> VAE:
        return self._ours(lambda: VAE(self.shape.vae), self.vae_state, dtype)

    def their_dit(self) -> Any:
        from diffusers import CogVideoXTransformer3DModel

        config = to_dict(self.shape.dit)
        return self._theirs(lambda: CogVideoXTransformer3DModel(**config), to_theirs(self.dit_state, DIT_RULES))

    def their_vae(self) -> Any:
        from diffusers import AutoencoderKLCogVideoX

        config = to_dict(self.shape.vae)
        return self._theirs(lambda: AutoencoderKLCogVideoX(**config), to_theirs(self.vae_state, VAE_RULES))

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """T5-XXL's architecture or a small one of its width, over a made-up vocabulary: both sides run this one."""
        from transformers import T5Config, T5EncoderModel

        from videogen.data.world import VOCABULARY
        from videogen.models.text import word_tokenizer

        width, length = self.shape.dit.text_embed_dim, self.shape.dit.max_text_seq_length
        size = {"num_layers": 2, "num_heads": 2, "d_ff": 2 * width, "vocab_size": 256, "d_kv": 64}
        if self.shape.text == "xxl":
            size = {"num_layers": 24, "num_heads": 64, "d_ff": 10240, "vocab_size": 32128, "d_kv": 64}
        config = T5Config(d_model=width, feed_forward_proj="gated-gelu", dropout_rate=0.0, **size)
        with torch.device("meta"):
            encoder = T5EncoderModel(config)
        state = random_state(lambda: T5EncoderModel(config), self.dtype, self.device, self.seed + 2)
        encoder = encoder.to(self.dtype).to_empty(device=self.device)  # shares one table under two names
        encoder.load_state_dict(state)
        return TextEncoder(encoder.eval(), word_tokenizer(VOCABULARY, length), length)

    def _ours(self, make: Callable[[], Any], state: dict[str, Tensor], dtype: torch.dtype | None) -> Any:
        with torch.device("meta"):
            network = make()
        network.load_state_dict({k: v.to(dtype or self.dtype) for k, v in state.items()}, assign=True)
        return network.eval()

    def _theirs(self, make: Callable[[], Any], state: dict[str, Tensor]) -> Any:
        from accelerate import init_empty_weights

        with init_empty_weights():  # parameters only: some tables are buffers that no file holds
            network = make().to(self.dtype)
        network.load_state_dict(state, assign=True)
        return network.to(self.device).eval()

    def normal(self, *size: int, seed: int) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(size, dtype=self.dtype, device="meta")
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(size, generator=generator).to(self.device, self.dtype)

    def dit_inputs(self, t: int, batch: int = 2) -> tuple[Tensor, Tensor, Conditioning]:
        """What one guidance step gives the DiT: the same latents with and without the prompt."""
        config, (f, c, h, w) = self.shape.dit, latent_shape(self.shape, self.shape.dit_clip)
        latents = self.normal(1, f, c, h, w, seed=10).expand(batch, -1, -1, -1, -1).contiguous()
        text = self.normal(batch, config.max_text_seq_length, config.text_embed_dim, seed=11)
        extra, channels = config.in_channels - config.out_channels, None
        if extra:
            channels = self.normal(1, f, extra, h, w, seed=14).expand(batch, -1, -1, -1, -1).contiguous()
        return latents, torch.full((batch,), t, device=self.device), Conditioning(text=text, channels=channels)

    def their_rotary(self) -> Any:
        """(cos, sin) as diffusers' pipeline makes them, once per clip."""
        from diffusers import CogVideoXPipeline

        config = self.shape.dit
        if not config.use_rotary_positional_embeddings:
            return None
        owner = types.SimpleNamespace(vae_scale_factor_spatial=8, transformer=types.SimpleNamespace(config=config))
        f, _, h, w = latent_shape(self.shape, self.shape.dit_clip)
        return CogVideoXPipeline._prepare_rotary_positional_embeddings(owner, h * 8, w * 8, f, self.device)  # type: ignore[arg-type]

    def latents(self) -> Tensor:
        """[1, c, f, h, w] for the VAE: of the clip's own frames, without padding."""
        frames, height, width = self.shape.clip
        c = self.shape.vae.latent_channels
        f = (frames - 1) // int(self.shape.vae.temporal_compression_ratio) + 1
        return self.normal(1, c, f, height // 8, width // 8, seed=12)

    def pixels(self) -> Tensor:
        """[1, 3, F, H, W] in [-1, 1]."""
        return self.normal(1, 3, *self.shape.clip, seed=13).clamp(-1, 1)


class Bundled(Weights):
    """The trained weights of the bundled model, a clip of its world as the VAE's input, and that clip's first frame."""

    def __init__(self, dtype: torch.dtype, device: torch.device, steps: int = 20) -> None:
        from videogen.data.world import render
        from videogen.demo import example_scene
        from videogen.pipeline import load

        pipe = load("tiny", device=str(device), dtype=dtype)
        c = pipe.card
        size = (c.num_frames, c.height, c.width)
        shape = Shape(c.dit, c.vae, size, size, steps, "the bundled", c.scheduler, c.conditions)
        super().__init__(shape, dtype, device)
        self.dit_state, self.vae_state = pipe.dit.state_dict(), pipe.vae.state_dict()
        self.text_encoder = pipe.text_encoder
        frames = render(example_scene(), *size)
        self.clip = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].to(device, dtype) * 2 - 1
        self.first_frame = Image.fromarray((frames[0] * 255).round().astype("uint8"))

    @torch.no_grad()
    def latents(self) -> Tensor:
        return self.vae().encode(self.clip)

    def pixels(self) -> Tensor:
        return self.clip
