"""The memory that each plan needs on a GPU, counted: `python scripts/memory_peaks.py [2b 5b 1.5]`.

Every stage of a clip of the model's native size runs on the meta device, through the code that a GPU runs: weights come
and go as the plan says, and the most bytes of tensors alive at once are counted (GiB). That is what
`torch.cuda.max_memory_allocated` would say without the workspaces of cuDNN and cuBLAS.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from videogen.config import DiTConfig, VAEConfig
from videogen.models.causal import Memory
from videogen.models.dit import DiT
from videogen.models.text import TextEncoder
from videogen.models.vae import VAE
from videogen.runtime.counters import count
from videogen.runtime.dit import fast_dit
from videogen.runtime.memory import PLANS, Plan
from videogen.runtime.modulation import cache_modulation
from videogen.runtime.offload import Stages
from videogen.runtime.vae import fast_vae
from videogen.types import Conditioning

ROTARY = {"use_rotary_positional_embeddings": True}
FIVE = {"num_attention_heads": 48, "num_layers": 42, **ROTARY}
MODELS = {  # the DiT, and the clip: frames, height, width
    "2b": (DiTConfig(), (49, 480, 720)),
    "5b": (DiTConfig(**FIVE), (49, 480, 720)),
    "1.5": (DiTConfig(**FIVE, patch_size_t=2, sample_height=96, sample_width=170), (81, 768, 1360)),
}
XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
}


class Away(Memory):
    """Frames kept for the next chunk leave no trace here: as if they waited on the host, and came when asked for."""

    def keep(self, module: nn.Module, frames: Tensor) -> None:
        self.future[module] = frames.shape, frames.dtype  # type: ignore[assignment]

    def take(self, module: nn.Module) -> Tensor | None:
        kept = self.past.pop(module, None)
        if kept is None:
            return None
        shape, dtype = kept
        return torch.empty(shape, dtype=dtype, device="meta")  # type: ignore[call-overload]


@dataclass
class Peaks:
    text: int
    dit: int
    decode: int


def peaks(config: DiTConfig, clip: tuple[int, int, int], plan: Plan) -> Peaks:
    with torch.device("meta"):
        dit = cache_modulation(fast_dit(DiT(config).bfloat16().eval()), capacity=50)
        vae = fast_vae(VAE(VAEConfig()).bfloat16().eval(), strips=plan.vae_strips)
        encoder = T5EncoderModel(T5Config(**XXL, feed_forward_proj="gated-gelu", use_cache=False)).bfloat16().eval()
        text_encoder = TextEncoder(encoder, None, config.max_text_seq_length)  # type: ignore[arg-type]
        ids = torch.zeros(1, config.max_text_seq_length, dtype=torch.long)
        channels, frames, height, width = vae.latent_shape(*clip)
        padded = frames + -frames % (config.patch_size_t or 1)
        batch = 1 if plan.guidance_in_two else 2
        latents = torch.zeros(1, channels, frames, height, width, dtype=torch.bfloat16)
        x = torch.zeros(batch, padded, channels, height, width, dtype=torch.bfloat16)
        text = torch.zeros(batch, config.max_text_seq_length, config.text_embed_dim, dtype=torch.bfloat16)
    if plan.caches_on_host:
        vae.new_memory = Away
    stages = Stages(plan, torch.device("meta"))
    resident = [] if plan.stages_in_turn else [dit, vae, text_encoder]

    def encode() -> None:
        with stages.at_work(text_encoder):
            text_encoder.encoder(ids)

    def step() -> None:
        with stages.at_work(dit):
            dit(x, torch.full((batch,), 500, device="cpu"), Conditioning(text=text))

    def decode() -> None:
        with stages.at_work(vae):
            for chunk in vae.decode_chunks(latents):
                del chunk

    text_peak, dit_peak = (count(stage, held=[*resident, latents]).peak_bytes for stage in (encode, step))
    tables = [module.table for module in dit.modules() if "table" in vars(module)]  # modulation by time: it stays
    return Peaks(text_peak, dit_peak, count(decode, held=[*resident, *tables, latents]).peak_bytes)


def main() -> None:
    print("| model | plan | text encoder | DiT step | VAE decode | peak |")
    print("|---|---|---|---|---|---|")
    for name in sys.argv[1:] or MODELS:
        for plan in PLANS.values():
            found = peaks(*MODELS[name], plan)
            stages = [found.text, found.dit, found.decode]
            cells = [f"{value / 2**30:.2f}" for value in [*stages, max(stages)]]
            print(f"| {name} | {plan.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
