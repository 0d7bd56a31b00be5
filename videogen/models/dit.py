"""The CogVideoX diffusion transformer (arXiv:2408.06072), every published variant as data.

Read `DiT.forward` first: embed, run the blocks, project back. A block sees one packed stream, text tokens first, and
treats both modalities with the same weights, except that each has its own rows of the adaptive LayerNorm ("expert").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from videogen.config import DiTConfig
from videogen.errors import InvalidRequest
from videogen.models.attention import Attention, Ops, ops_of
from videogen.models.positions import (
    learned_table_shape,
    resized_table,
    rotary_positions,
    rotary_table,
    sincos_table,
    time_sinusoid,
    trained_latent_frames,
)
from videogen.types import Conditioning, Segments, Tokens

Activation = Callable[[Tensor], Tensor]
MLP_ACTIVATIONS: dict[str, Activation] = {"gelu-approximate": partial(F.gelu, approximate="tanh"), "gelu": F.gelu}
TIME_ACTIVATIONS: dict[str, Activation] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "mish": F.mish}


class PatchEmbed(nn.Module):
    """Latent patches to tokens: a strided convolution per frame (1.0) or a linear map of (c, t, y, x) patches (1.5)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.patch, self.patch_t = config.patch_size, config.patch_size_t
        if self.patch_t is None:
            self.proj = nn.Conv2d(
                config.in_channels, config.width, self.patch, stride=self.patch, bias=config.patch_bias
            )
        else:  # `patch_bias` is false in the 1.5 files and yet their linear map has a bias
            self.proj = nn.Linear(config.in_channels * self.patch**2 * self.patch_t, config.width)

    def forward(self, latents: Float[Tensor, "b f c h w"]) -> Float[Tensor, "b n d"]:
        if self.patch_t is None:
            x = self.proj(rearrange(latents, "b f c h w -> (b f) c h w"))
            return rearrange(x, "(b f) d h w -> b (f h w) d", b=latents.shape[0])
        sizes = {"pt": self.patch_t, "ph": self.patch, "pw": self.patch}
        return self.proj(
            rearrange(latents, "b (f pt) c (h ph) (w pw) -> b (f h w) (c pt ph pw)", **sizes)  # c outermost
        )


class ScalarEmbed(nn.Module):
    """Two linear maps over the sinusoid of a scalar (diffusion time, `ofs`)."""

    def __init__(self, dim_in: int, dim_out: int, activation: str) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim_out)
        self.act = _choose(TIME_ACTIVATIONS, activation, "timestep_activation_fn")
        self.linear_2 = nn.Linear(dim_out, dim_out)

    def forward(self, x: Float[Tensor, "b c"]) -> Float[Tensor, "b e"]:
        return self.linear_2(self.act(self.linear_1(x)))


class AdaptiveNorm(nn.Module):
    """A LayerNorm and the linear map that reads its shift, scale (and gate) rows off the embedded time."""

    def __init__(self, config: DiTConfig, rows: int) -> None:
        super().__init__()
        self.row_count = rows
        self.linear = nn.Linear(config.time_embed_dim, rows * config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps, config.norm_elementwise_affine)

    def rows(self, time: Tensor) -> Float[Tensor, "rows b d"]:
        """`time` is the embedded time [b, e]; where rows were cached (from outside), the row's index [b] or [1]."""
        return rearrange(self.linear(F.silu(time)), "b (rows d) -> rows b d", rows=self.row_count)


class MLP(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.act = _choose(MLP_ACTIVATIONS, config.activation_fn, "activation_fn")
        self.down = nn.Linear(4 * config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        return self.dropout(self.down(self.dropout(self.act(self.up(x)))))


class Block(nn.Module):
    """Attention and MLP, each between an expert adaptive LayerNorm and a gated residual."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = AdaptiveNorm(config, rows=6)
        self.attention = Attention(config.num_attention_heads, config.attention_head_dim, bias=config.attention_bias)
        self.norm2 = AdaptiveNorm(config, rows=6)
        self.mlp = MLP(config)
        self.ops = Ops()

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        time: Shaped[Tensor, "_b *e"],
        rotary: Float[Tensor, "2 n c"] | None,
        text_length: int,
        segments: Segments | None = None,
    ) -> Float[Tensor, "b s d"]:
        ops = self.ops if segments is None else ops_of(segments)
        y, gate = self.modulate(self.norm1, x, time, text_length, ops)
        x = ops.gate_add(x, self.attention(y, rotary, text_length, ops, segments), gate, text_length)
        y, gate = self.modulate(self.norm2, x, time, text_length, ops)
        return ops.gate_add(x, self.mlp(y), gate, text_length)

    def modulate(
        self, ada: AdaptiveNorm, x: Tensor, time: Tensor, text_length: int, ops: Ops | None = None
    ) -> tuple[Tensor, Tensor]:
        """The normed and modulated stream [b, s, d] and the gates [2, b, d] (or [2, 1, d]) for what it becomes."""
        # In the weights: shift, scale, gate of video, then shift, scale, gate of text.
        shift, scale, gate = rearrange(ada.rows(time), "(modality row) b d -> row modality b d", row=3)
        norm = ada.norm
        modulated = (ops or self.ops).norm_modulate(x, norm.weight, norm.bias, norm.eps, shift, scale, text_length)
        return modulated, gate


class DiT(nn.Module):
    """Predicts (v, ε or velocity: the schedule knows) for noisy latents, given text, aligned channels and scalars.

    `gradient_checkpointing = True` recomputes each block in the backward pass; a `context_fn` of torch's `checkpoint`
    says what of it is kept.
    """

    position_table: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.gradient_checkpointing: bool | Callable = False

        self.patch_embed = PatchEmbed(config)
        self.text_proj = nn.Linear(config.text_embed_dim, config.width)
        self.dropout = nn.Dropout(config.dropout)
        if config.use_learned_positional_embeddings:
            # A buffer, as in the published files: fine-tuning leaves it alone, parameter counts do not include it.
            table = torch.zeros(learned_table_shape(config))
            table[:, config.max_text_seq_length :] = _trained_sincos(config)
            self.register_buffer("position_table", table)

        self.time_embed = ScalarEmbed(config.width, config.time_embed_dim, config.timestep_activation_fn)
        self.ofs_embed = None
        if config.ofs_embed_dim:
            self.ofs_embed = ScalarEmbed(config.ofs_embed_dim, config.ofs_embed_dim, config.timestep_activation_fn)

        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))

        self.norm_final = nn.LayerNorm(config.width, config.norm_eps, config.norm_elementwise_affine)
        self.norm_out = AdaptiveNorm(config, rows=2)
        patch_volume = config.patch_size**2 * (config.patch_size_t or 1)
        self.proj_out = nn.Linear(config.width, patch_volume * config.out_channels)

    def forward(
        self, latents: Float[Tensor, "b f c h w"], t: Shaped[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b f out h w"]:
        """One evaluation. `t` is the timestep value (0 … 999), integer or float."""
        return self.unembed(self.run_blocks(self.embed(latents, t, cond)), latents)

    def embed(self, latents: Float[Tensor, "b f c h w"], t: Shaped[Tensor, " b"], cond: Conditioning) -> Tokens:
        """Latents, text and scalars to the packed stream [text, video], with positions and the embedded time."""
        _, f, _, h, w = latents.shape
        x = latents if cond.channels is None else torch.cat([latents, cond.channels.to(latents.dtype)], dim=2)
        self._check_inputs(x, cond)
        assert cond.text is not None  # _check_inputs

        text = self.text_proj(cond.text)
        length = text.shape[1]
        tokens = torch.cat([text, self.patch_embed(x)], dim=1)
        tokens = self.dropout(self._add_absolute(tokens, f, h, w, length))

        position = self.positions(f, h, w, length, latents.device)
        time = self.embed_time(t, cond, latents.device, latents.dtype)
        return Tokens(x=tokens, position=position, time=time, text_length=length)

    def run_blocks(self, tokens: Tokens) -> Tokens:
        """The block loop, replaceable. What a block needs travels with the tokens: a part of them may run elsewhere."""
        x, position, time, text_length = tokens.x, tokens.position, tokens.time, tokens.text_length
        several = () if tokens.segments is None else (tokens.segments,)
        del tokens  # so that what was embedded is freed as soon as the first block is through with it
        rotary = self.rotary(position, text_length)
        recomputed = self.gradient_checkpointing
        kept: dict[str, Any] = {"context_fn": recomputed} if callable(recomputed) else {}
        for block in self.each_block():
            if recomputed and torch.is_grad_enabled():
                x = checkpoint(block, x, time, rotary, text_length, *several, use_reentrant=False, **kept)
            else:
                x = block(x, time, rotary, text_length, *several)
        return Tokens(x, position, time, text_length, *several)

    def each_block(self) -> Iterator[Block]:
        """What `run_blocks` iterates over, replaceable: weights may arrive while the block before computes."""
        yield from cast("Iterator[Block]", self.blocks)

    def positions(self, f: int, h: int, w: int, text_length: int, device: torch.device) -> Float[Tensor, "s 3"] | None:
        """(t, y, x) of every token; text sits at (0, 0, 0) and is not turned. None without rotary positions."""
        if not self.config.use_rotary_positional_embeddings:
            return None
        return F.pad(rotary_positions(self.config, f, h, w, device), (0, 0, text_length, 0))

    def rotary(self, position: Tensor | None, text_length: int) -> Float[Tensor, "2 n c"] | None:
        """Cosines and sines of the video tokens among `position` [s, 3]."""
        if position is None:
            return None
        return rotary_table(position[text_length:].float(), self.config.attention_head_dim)

    def unembed(self, tokens: Tokens, latents: Float[Tensor, "b f c h w"]) -> Float[Tensor, "b f out h w"]:
        """Video tokens back to the latent grid, which has the size of `latents`."""
        _, f, _, h, w = latents.shape
        x = self.norm_final(tokens.x[:, tokens.text_length :])
        shift, scale = self.norm_out.rows(tokens.time)  # shift first
        x = self.proj_out(self.norm_out.norm(x) * (1 + scale[:, None]) + shift[:, None])
        p, pt = self.config.patch_size, self.config.patch_size_t or 1
        return rearrange(
            x, "b (f h w) (c pt ph pw) -> b (f pt) c (h ph) (w pw)", f=f // pt, h=h // p, w=w // p, pt=pt, ph=p, pw=p
        )

    def embed_time(
        self, t: Shaped[Tensor, " b"], cond: Conditioning, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """The embedded time [b, e] of the timesteps and of the scalars that join them. `t` may lie on the host."""

        def sinusoid(value: Tensor, dim: int) -> Tensor:
            flip, shift = self.config.flip_sin_to_cos, self.config.freq_shift
            value = value.to(device, non_blocking=True)
            return time_sinusoid(value, dim, flip_sin_to_cos=flip, freq_shift=shift).to(dtype)

        time = self.time_embed(sinusoid(t, self.config.width))
        if self.ofs_embed is None or self.config.ofs_embed_dim is None:
            return time
        return time + self.ofs_embed(sinusoid(cond.vectors["ofs"], self.config.ofs_embed_dim))

    def _add_absolute(self, x: Float[Tensor, "b s d"], f: int, h: int, w: int, text_length: int) -> Tensor:
        """Adds the absolute table of the variants that have one.

        A stored table holds one size. Another number of frames falls back to the sin-cos table, as diffusers does
        (without a word); another height or width is refused, as there.
        """
        config = self.config
        if config.use_learned_positional_embeddings:
            if (f - 1) * config.temporal_compression_ratio + 1 == config.sample_frames:
                return x + self.position_table.to(x.dtype)
        elif config.use_rotary_positional_embeddings:
            return x
        table = (resized_table if config.resize_positions else sincos_table)(config, f, h, w, x.device, x.dtype)
        return torch.cat([x[:, :text_length], x[:, text_length:] + table], dim=1)

    def _check_inputs(self, x: Float[Tensor, "b f c h w"], cond: Conditioning) -> None:
        """Says which input does not fit; the tensors' own errors would name a matrix product."""
        config = self.config
        _, f, c, h, w = x.shape
        if cond.text is None:
            raise InvalidRequest(
                "the transformer needs text embeddings.", hint="encode an empty prompt.", param="prompt"
            )
        if cond.tokens is not None:
            raise InvalidRequest("this transformer takes no extra tokens.", param="tokens")
        if c != config.in_channels:
            raise InvalidRequest(
                f"the transformer reads {config.in_channels} channels per latent pixel, got {c}.",
                why="noisy latents and the channels of all conditions together must fill its input.",
                hint="give each condition the model was trained with, or its absence (zeros).",
                param="channels",
            )
        wanted, given = {"ofs"} if self.ofs_embed is not None else set(), set(cond.vectors)
        if wanted != given:
            raise InvalidRequest(
                f"the transformer takes the scalars {sorted(wanted)}, got {sorted(given)}.", param="vectors"
            )
        if h % config.patch_size or w % config.patch_size or f % (config.patch_size_t or 1):
            raise InvalidRequest(
                f"latents of {f} frames, {h} x {w} do not divide into patches.",
                why=f"a patch is {config.patch_size_t or 1} frames, {config.patch_size} x {config.patch_size}.",
                hint="pad the frames and choose a size the patch divides.",
                param="latents",
            )
        if not config.use_learned_positional_embeddings:
            return
        if (h, w) != (config.sample_height, config.sample_width):
            raise InvalidRequest(
                f"this model makes videos of one size; latents are {h} x {w}.",
                why=f"its positions are a stored table for latents of {config.sample_height} x {config.sample_width}.",
                hint=f"use {config.sample_height} x {config.sample_width} latents, "
                f"with the usual VAE {config.sample_width * 8}x{config.sample_height * 8} pixels.",
                param="height" if h != config.sample_height else "width",
            )
        if cond.text.shape[1] != config.max_text_seq_length:
            raise InvalidRequest(
                f"this model reads exactly {config.max_text_seq_length} text tokens, got {cond.text.shape[1]}.",
                why="its stored position table has a row for each.",
                hint=f"pad prompts to {config.max_text_seq_length} tokens.",
                param="prompt_embeds",
            )


def init_weights(dit: DiT) -> DiT:
    """Weights for training from scratch, in place; draws from torch's global generator.

    | what                                        | weight         | bias | why                             |
    |---------------------------------------------|----------------|------|---------------------------------|
    | `norm1.linear`, `norm2.linear` of a block   | 0              | 0    | gate 0: it begins as identity   |
    | `norm_out.linear`, `proj_out`               | 0              | 0    | the first prediction is 0       |
    | other linear maps and the patch convolution | Xavier uniform | 0    | unit variance through the stack |
    | LayerNorms                                  | 1              | 0    |                                 |
    | `position_table`                            | sin-cos        |      | text rows 0                     |
    """
    for module in dit.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))  # a patch is one vector
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in dit.modules():
        if isinstance(module, AdaptiveNorm):
            nn.init.zeros_(module.linear.weight)
    nn.init.zeros_(dit.proj_out.weight)
    if dit.config.use_learned_positional_embeddings:
        dit.position_table.zero_()
        dit.position_table[:, dit.config.max_text_seq_length :] = _trained_sincos(dit.config)
    return dit


def _trained_sincos(config: DiTConfig) -> Tensor:
    return sincos_table(config, trained_latent_frames(config), config.sample_height, config.sample_width)


def _choose(table: dict[str, Activation], name: str, param: str) -> Activation:
    if name not in table:
        raise InvalidRequest(f"no activation {name!r}.", hint=f"one of {', '.join(table)}.", param=param)
    return table[name]


def _check(config: DiTConfig) -> None:
    """A stored table exists only beside rotary positions and without patches in time, in every checkpoint."""
    learned = config.use_learned_positional_embeddings
    if learned and not config.use_rotary_positional_embeddings:
        raise InvalidRequest(
            "a learned position table without rotary positions is not a CogVideoX variant.",
            hint="set use_rotary_positional_embeddings too.",
            param="use_learned_positional_embeddings",
        )
    if learned and config.patch_size_t is not None:
        raise InvalidRequest(
            "a learned position table with patches in time is not a CogVideoX variant.", param="patch_size_t"
        )
