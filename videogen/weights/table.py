"""Names of tensors here and elsewhere, as data: one table of rules per network and format.

A rule is a pair of templates `(ours, theirs)`. `{i}`, `{j}` stand for block numbers and a trailing `*` for `weight` or
`bias`; the same holes appear on both sides. Import reads a table from right to left entry by entry, export from left to
right, so a table cannot be right in one direction only. A tensor that no rule covers is an error, never skipped.
Values are passed on untouched (no copy, no cast), hence round trips keep every byte.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from videogen.errors import ModelNotFound

if TYPE_CHECKING:
    from torch import Tensor

Rules = list[tuple[str, str]]
T = TypeVar("T")

# ---- CogVideoXTransformer3DModel ------------------------------------------------------------------------------------

DIT_RULES: Rules = [
    ("patch_embed.proj.*", "patch_embed.proj.*"),
    ("text_proj.*", "patch_embed.text_proj.*"),
    ("position_table", "patch_embed.pos_embedding"),  # 5B-I2V and its derivatives only
    ("time_embed.linear_{i}.*", "time_embedding.linear_{i}.*"),
    ("ofs_embed.linear_{i}.*", "ofs_embedding.linear_{i}.*"),  # 1.5-5B-I2V only
    ("blocks.{i}.norm1.linear.*", "transformer_blocks.{i}.norm1.linear.*"),
    ("blocks.{i}.norm1.norm.*", "transformer_blocks.{i}.norm1.norm.*"),
    ("blocks.{i}.attention.norm_q.*", "transformer_blocks.{i}.attn1.norm_q.*"),
    ("blocks.{i}.attention.norm_k.*", "transformer_blocks.{i}.attn1.norm_k.*"),
    ("blocks.{i}.attention.to_q.*", "transformer_blocks.{i}.attn1.to_q.*"),
    ("blocks.{i}.attention.to_k.*", "transformer_blocks.{i}.attn1.to_k.*"),
    ("blocks.{i}.attention.to_v.*", "transformer_blocks.{i}.attn1.to_v.*"),
    ("blocks.{i}.attention.to_out.*", "transformer_blocks.{i}.attn1.to_out.0.*"),
    ("blocks.{i}.norm2.linear.*", "transformer_blocks.{i}.norm2.linear.*"),
    ("blocks.{i}.norm2.norm.*", "transformer_blocks.{i}.norm2.norm.*"),
    ("blocks.{i}.mlp.up.*", "transformer_blocks.{i}.ff.net.0.proj.*"),
    ("blocks.{i}.mlp.down.*", "transformer_blocks.{i}.ff.net.2.*"),
    ("norm_final.*", "norm_final.*"),
    ("norm_out.linear.*", "norm_out.linear.*"),
    ("norm_out.norm.*", "norm_out.norm.*"),
    ("proj_out.*", "proj_out.*"),
]

# ---- AutoencoderKLCogVideoX -----------------------------------------------------------------------------------------
# Their causal convolution holds an inner `conv`; ours is one. The decoder's norms are scaled and shifted by the latent.

_PLAIN_NORM: Rules = [(".*", ".*")]
_LATENT_NORM: Rules = [(".norm.*", ".norm_layer.*"), (".scale.*", ".conv_y.conv.*"), (".shift.*", ".conv_b.conv.*")]


def _resnet(ours: str, theirs: str, norm: Rules) -> Rules:
    return [
        *[(f"{ours}.{n}{a}", f"{theirs}.{n}{b}") for n in ("norm1", "norm2") for a, b in norm],
        (f"{ours}.conv1.*", f"{theirs}.conv1.conv.*"),
        (f"{ours}.conv2.*", f"{theirs}.conv2.conv.*"),
        (f"{ours}.conv_shortcut.*", f"{theirs}.conv_shortcut.*"),
    ]


VAE_RULES: Rules = [
    ("encoder.conv_in.*", "encoder.conv_in.conv.*"),
    *_resnet("encoder.down.{i}.resnets.{j}", "encoder.down_blocks.{i}.resnets.{j}", _PLAIN_NORM),
    ("encoder.down.{i}.downsample.*", "encoder.down_blocks.{i}.downsamplers.0.conv.*"),
    *_resnet("encoder.mid.{j}", "encoder.mid_block.resnets.{j}", _PLAIN_NORM),
    ("encoder.norm_out.*", "encoder.norm_out.*"),
    ("encoder.conv_out.*", "encoder.conv_out.conv.*"),
    ("decoder.conv_in.*", "decoder.conv_in.conv.*"),
    *_resnet("decoder.mid.{j}", "decoder.mid_block.resnets.{j}", _LATENT_NORM),
    *_resnet("decoder.up.{i}.resnets.{j}", "decoder.up_blocks.{i}.resnets.{j}", _LATENT_NORM),
    ("decoder.up.{i}.upsample.*", "decoder.up_blocks.{i}.upsamplers.0.conv.*"),
    *[(f"decoder.norm_out{a}", f"decoder.norm_out{b}") for a, b in _LATENT_NORM],
    ("decoder.conv_out.*", "decoder.conv_out.conv.*"),
]


# ---- reading a table ------------------------------------------------------------------------------------------------


def to_ours(state: Mapping[str, T], rules: Rules) -> dict[str, T]:
    """A foreign state dict under our names. Values may be anything: tensors, shapes, file names."""
    return _rename(state, [(theirs, ours) for ours, theirs in rules])


def to_theirs(state: Mapping[str, T], rules: Rules) -> dict[str, T]:
    """Our state dict under foreign names."""
    return _rename(state, rules)


def _rename(state: Mapping[str, T], pairs: Rules) -> dict[str, T]:
    compiled = [(re.compile(_pattern(source)), _replacement(target)) for source, target in pairs]
    renamed: dict[str, T] = {}
    uncovered: list[str] = []
    for name, value in state.items():
        for pattern, replacement in compiled:
            if found := pattern.fullmatch(name):
                renamed[found.expand(replacement)] = value
                break
        else:
            uncovered.append(name)
    if uncovered:
        near = nearest(re.sub(r"\.\d+\.", ".{i}.", uncovered[0]), [source for source, _ in pairs])
        raise ModelNotFound(
            f"these weights hold {count(len(uncovered), 'tensor')} that no rule covers: {listed(uncovered)}.",
            why="every tensor must be understood; skipping one would load another model than the file holds."
            + (f" Nearest covered names: {listed(near)}." if near else ""),
            hint="check that it is a whole CogVideoX checkpoint in diffusers' naming, not a LoRA or a quantised file.",
        )
    return renamed


def _pattern(template: str) -> str:
    escaped = re.escape(template)
    escaped = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", escaped)
    return escaped.replace(r"\*", "(?P<leaf>weight|bias)")


def _replacement(template: str) -> str:
    return re.sub(r"\{(\w)\}", r"\\g<\1>", template).replace("*", r"\g<leaf>")


# ---- changing a model on the way ------------------------------------------------------------------------------------


def widen(weight: Tensor, old_channels: int, new_channels: int) -> Tensor:
    """Grow `patch_embed.proj.weight` by input channels, zeros for the new ones: the model still computes what it did.

    [d, c, p, p] or, with temporal patches, [d, c*8] where the channel varies slowest: both grow at the end of axis 1.
    """
    import torch

    per_channel, rest = divmod(weight.shape[1], old_channels)
    if rest or new_channels < old_channels:
        raise ValueError(f"cannot widen {tuple(weight.shape)} from {old_channels} to {new_channels} input channels")
    grown = ((new_channels - old_channels) * per_channel, *weight.shape[2:])
    return torch.cat([weight, weight.new_zeros(weight.shape[0], *grown)], dim=1)


# ---- words for errors -----------------------------------------------------------------------------------------------


def nearest(name: str, names: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)


def listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
