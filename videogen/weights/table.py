"""Names of tensors here and elsewhere, as data: one table of rules per network and format.

A rule is a pair of templates `(ours, theirs)`. `{i}`, `{j}` stand for block numbers and a trailing `*` for `weight` or
`bias`; the same holes appear on both sides. Where one of their tensors is several of ours, the rule is a `Fused`.
Import reads a table from right to left entry by entry, export from left to right, so a table cannot be right in one
direction only. A tensor that no rule covers is an error, never skipped. Values are passed on untouched (no cast, and no
copy unless pieces are joined), hence round trips keep every byte. Shapes (tuples) pass through the same tables.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from videogen.errors import ModelNotFound

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Fused:
    """One of their tensors that is several of ours, side by side on axis 0.

    Theirs is cut into `len(order)` equal pieces; in this order they make up ours, equally many pieces each.
    """

    ours: tuple[str, ...]
    theirs: str
    order: tuple[int, ...]


Rules = list[tuple[str, str] | Fused]

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

PLAIN_NORM = [(".*", ".*")]
LATENT_NORM = [(".norm.*", ".norm_layer.*"), (".scale.*", ".conv_y.conv.*"), (".shift.*", ".conv_b.conv.*")]


def resnet(ours: str, theirs: str, norm: list[tuple[str, str]], shortcut: str = "conv_shortcut") -> Rules:
    return [
        *[(f"{ours}.{n}{a}", f"{theirs}.{n}{b}") for n in ("norm1", "norm2") for a, b in norm],
        (f"{ours}.conv1.*", f"{theirs}.conv1.conv.*"),
        (f"{ours}.conv2.*", f"{theirs}.conv2.conv.*"),
        (f"{ours}.conv_shortcut.*", f"{theirs}.{shortcut}.*"),
    ]


VAE_RULES: Rules = [
    ("encoder.conv_in.*", "encoder.conv_in.conv.*"),
    *resnet("encoder.down.{i}.resnets.{j}", "encoder.down_blocks.{i}.resnets.{j}", PLAIN_NORM),
    ("encoder.down.{i}.downsample.*", "encoder.down_blocks.{i}.downsamplers.0.conv.*"),
    *resnet("encoder.mid.{j}", "encoder.mid_block.resnets.{j}", PLAIN_NORM),
    ("encoder.norm_out.*", "encoder.norm_out.*"),
    ("encoder.conv_out.*", "encoder.conv_out.conv.*"),
    ("decoder.conv_in.*", "decoder.conv_in.conv.*"),
    *resnet("decoder.mid.{j}", "decoder.mid_block.resnets.{j}", LATENT_NORM),
    *resnet("decoder.up.{i}.resnets.{j}", "decoder.up_blocks.{i}.resnets.{j}", LATENT_NORM),
    ("decoder.up.{i}.upsample.*", "decoder.up_blocks.{i}.upsamplers.0.conv.*"),
    *[(f"decoder.norm_out{a}", f"decoder.norm_out{b}") for a, b in LATENT_NORM],
    ("decoder.conv_out.*", "decoder.conv_out.conv.*"),
]


# ---- reading a table ------------------------------------------------------------------------------------------------


def to_ours(state: Mapping[str, T], rules: Rules) -> dict[str, T]:
    """A foreign state dict under our names. Values may be anything: tensors, shapes, file names."""
    compiled = [(re.compile(_pattern(rule.theirs)), rule) for rule in map(_fused, rules)]
    renamed: dict[str, T] = {}
    uncovered: list[str] = []
    for name, value in state.items():
        for pattern, rule in compiled:
            if found := pattern.fullmatch(name):
                names = [_filled(template, found) for template in rule.ours]
                _add(renamed, dict(zip(names, _cut(value, rule, name), strict=True)))
                break
        else:
            uncovered.append(name)
    _require_covered(uncovered, [rule.theirs for _, rule in compiled])
    return renamed


def to_theirs(state: Mapping[str, T], rules: Rules) -> dict[str, T]:
    """Our state dict under foreign names."""
    compiled = [
        (re.compile(_pattern(template)), rule, place)
        for rule in map(_fused, rules)
        for place, template in enumerate(rule.ours)
    ]
    pieces: dict[str, tuple[Fused, dict[int, T]]] = {}  # by their name
    uncovered: list[str] = []
    for name, value in state.items():
        for pattern, rule, place in compiled:
            if found := pattern.fullmatch(name):
                _add(pieces.setdefault(_filled(rule.theirs, found), (rule, {}))[1], {place: value})
                break
        else:
            uncovered.append(name)
    _require_covered(uncovered, [template for _, rule, _ in compiled for template in rule.ours])
    if partial := [theirs for theirs, (rule, found) in pieces.items() if len(found) < len(rule.ours)]:
        raise ModelNotFound(
            f"{count(len(partial), 'tensor')} cannot be joined, as parts are missing: {listed(partial)}.",
            why="there, they are one tensor that is several here.",
            hint="fetch or copy the model again.",
        )
    return {
        theirs: _joined([found[k] for k in range(len(rule.ours))], rule) for theirs, (rule, found) in pieces.items()
    }


def _fused(rule: tuple[str, str] | Fused) -> Fused:
    return rule if isinstance(rule, Fused) else Fused((rule[0],), rule[1], (0,))


def _add(known: dict[Any, T], new: Mapping[Any, T]) -> None:
    if twice := [str(name) for name in new if name in known]:
        raise ModelNotFound(
            f"these weights hold {listed(twice)} twice, under two names.", hint="fetch or copy the model again."
        )
    known.update(new)


def _require_covered(uncovered: list[str], templates: list[str]) -> None:
    if uncovered:
        near = nearest(re.sub(r"\.\d+\.", ".{i}.", uncovered[0]), templates)
        raise ModelNotFound(
            f"these weights hold {count(len(uncovered), 'tensor')} that no rule covers: {listed(uncovered)}.",
            why="every tensor must be understood; skipping one would load another model than the file holds."
            + (f" Nearest covered names: {listed(near)}." if near else ""),
            hint="check that it is a whole CogVideoX checkpoint, not a LoRA or a quantised file.",
        )


def _cut(value: Any, rule: Fused, name: str) -> list[Any]:
    """Their tensor or shape as ours; anything else stands for the whole."""
    pieces, each = len(rule.order), len(rule.order) // len(rule.ours)
    if pieces == 1 or (not hasattr(value, "shape") and not isinstance(value, tuple)):
        return [value] * len(rule.ours)
    shape = tuple(value) if isinstance(value, tuple) else tuple(value.shape)
    if not shape or shape[0] % pieces:
        raise ModelNotFound(
            f"{name} is {list(shape)}.",
            why=f"it should be {pieces} tensors side by side on its first axis.",
            hint="check that it is a CogVideoX checkpoint.",
        )
    if isinstance(value, tuple):
        return [(shape[0] // pieces * each, *shape[1:])] * len(rule.ours)
    import torch

    cut = value.chunk(pieces)
    ours = [[cut[i] for i in rule.order[k : k + each]] for k in range(0, pieces, each)]
    return [parts[0] if each == 1 else torch.cat(parts) for parts in ours]


def _joined(values: list[Any], rule: Fused) -> Any:
    """The inverse of `_cut`."""
    each = len(rule.order) // len(rule.ours)
    if len(rule.order) == 1 or (not hasattr(values[0], "shape") and not isinstance(values[0], tuple)):
        return values[0]
    if isinstance(values[0], tuple):
        return (sum(shape[0] for shape in values), *values[0][1:])
    import torch

    pieces = dict(zip(rule.order, (piece for value in values for piece in value.chunk(each)), strict=True))
    return torch.cat([pieces[i] for i in range(len(rule.order))])


def _pattern(template: str) -> str:
    escaped = re.escape(template)
    escaped = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", escaped)
    return escaped.replace(r"\*", "(?P<leaf>weight|bias)")


def _filled(template: str, found: re.Match[str]) -> str:
    for hole, value in found.groupdict().items():
        template = template.replace("*" if hole == "leaf" else f"{{{hole}}}", value)
    return template


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
