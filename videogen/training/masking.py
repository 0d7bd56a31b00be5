"""Deferred masking (arXiv:2407.15811): the first blocks see every token, the rest a random part of the video's.

What is dropped has been read before, by the blocks that mix: that is why 75 % may go where dropping patches of the
input would blind the model. The mixer is the DiT's own first blocks, so nothing is added to it, and the model that
comes out is a plain one; its last stretch of training drops nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import cast

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from videogen.config import DiTConfig, MaskingConfig
from videogen.diffusion.denoiser import Model
from videogen.models.dit import Block, DiT
from videogen.models.positions import token_grid
from videogen.types import Conditioning, Latent, Tokens


def draw_kept(
    config: DiTConfig, masking: MaskingConfig, f: int, h: int, w: int, generator: torch.Generator
) -> Int[Tensor, " k"]:
    """The video tokens of an `f h w` latent that stay, in order: one set for the batch, as positions are shared."""
    t, y, x = token_grid(config, f, h, w)
    kept = max(1, round((1 - masking.share) * t * y * x))
    return torch.randperm(t * y * x, generator=generator)[:kept].sort().values


def masked(dit: DiT, kept: Int[Tensor, " k"], mixer_layers: int) -> Model:
    """The DiT with most video tokens dropped behind its first `mixer_layers` blocks.

    What it answers for a dropped token is not computed by all blocks and means nothing: see `shown`. Text always stays.
    """

    def predict(latents: Latent, t: Tensor, cond: Conditioning) -> Latent:
        tokens = run(dit, dit.embed(latents, t, cond), cast("nn.ModuleList", dit.blocks[:mixer_layers]))
        length = tokens.text_length
        rows = torch.cat([torch.arange(length, device=kept.device), length + kept])
        position = None if tokens.position is None else tokens.position[rows]
        part = dataclasses.replace(tokens, x=tokens.x[:, rows], position=position)
        part = run(dit, part, cast("nn.ModuleList", dit.blocks[mixer_layers:]))
        whole = tokens.x.to(part.x.dtype).index_copy(1, rows, part.x)
        return dit.unembed(dataclasses.replace(tokens, x=whole), latents)

    return predict


def run(dit: DiT, tokens: Tokens, blocks: nn.ModuleList) -> Tokens:
    """`run_blocks` over some of the blocks."""
    dit.each_block = lambda: cast("Iterator[Block]", iter(blocks))
    try:
        return dit.run_blocks(tokens)
    finally:
        del dit.each_block


def shown(kept: Int[Tensor, " k"], config: DiTConfig, f: int, h: int, w: int) -> Float[Tensor, "1 f 1 h w"]:
    """1 where the latent belongs to a kept token, 0 elsewhere: where the loss is taken."""
    t, y, x = token_grid(config, f, h, w)
    tokens = torch.zeros(t * y * x, device=kept.device).index_fill(0, kept, 1.0)
    p, pt = config.patch_size, config.patch_size_t or 1
    return repeat(tokens, "(t y x) -> 1 (t pt) 1 (y py) (x px)", t=t, y=y, pt=pt, py=p, px=p)
