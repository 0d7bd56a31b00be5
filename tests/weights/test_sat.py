"""SAT's names: both ways at full size, fused tensors cut and joined as CogVideo's own converter cuts them."""

from __future__ import annotations

import pytest
import torch
from full_size import FULL, full_shapes

from videogen.config import VAEConfig
from videogen.errors import ModelNotFound
from videogen.models.vae import VAE
from videogen.weights.load import shapes_of
from videogen.weights.sat import SAT_DIT_RULES, SAT_VAE_RULES, TABLE
from videogen.weights.table import DIT_RULES, Fused, to_ours, to_theirs

ADALN = "mixins.adaln_layer.adaLN_modulations.3.1.weight"
QKV = "transformer.layers.3.attention.query_key_value.weight"


@pytest.mark.parametrize("name", FULL)
def test_every_transformer_goes_into_sats_names_and_back(name):
    config, ours = full_shapes(name)
    theirs = to_theirs(ours, SAT_DIT_RULES)
    assert to_ours(theirs, SAT_DIT_RULES) == ours
    width = config.width
    assert len(theirs) == len(ours) - 6 * config.num_layers  # q, k, v are one, the two modulations are one
    assert theirs[QKV] == (3 * width, width)
    assert theirs[ADALN] == (12 * width, 512)
    assert theirs["mixins.patch_embed.proj.weight"] == FULL[name].patch
    assert (TABLE in theirs) == config.use_learned_positional_embeddings


def test_the_vae_goes_into_sats_names_and_back():
    with torch.device("meta"):
        ours = shapes_of(VAE(VAEConfig()))
    theirs = to_theirs(ours, SAT_VAE_RULES)
    assert to_ours(theirs, SAT_VAE_RULES) == ours
    assert len(theirs) == 436
    # SAT counts the decoder's stages from the output: 512 channels stand last, and nothing is enlarged after stage 0.
    assert theirs["decoder.up.3.block.0.conv1.conv.weight"] == (512, 512, 3, 3, 3)
    assert theirs["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1, 1)
    assert not [name for name in theirs if name.startswith("decoder.up.0.upsample")]
    assert "encoder.mid.block_1.norm1.weight" in theirs
    assert "decoder.mid.block_2.norm1.conv_y.conv.weight" in theirs


def test_modulations_are_cut_as_cogvideos_own_converter_cuts_them():
    """Twelve pieces: shift, scale, gate of the attention, of the MLP, then of the same for text."""
    state = {ADALN: torch.arange(24.0).reshape(24, 1)}
    state |= {QKV: torch.arange(6.0).reshape(6, 1)}
    pieces = state[ADALN].chunk(12, dim=0)
    ours = to_ours(state, SAT_DIT_RULES)
    theirs = to_theirs(ours, DIT_RULES)
    first, second = (theirs[f"transformer_blocks.3.norm{k}.linear.weight"] for k in (1, 2))
    assert torch.equal(first, torch.cat([pieces[i] for i in (0, 1, 2, 6, 7, 8)]))
    assert torch.equal(second, torch.cat([pieces[i] for i in (3, 4, 5, 9, 10, 11)]))
    for k, name in enumerate(("to_q", "to_k", "to_v")):
        assert torch.equal(theirs[f"transformer_blocks.3.attn1.{name}.weight"], state[QKV].chunk(3, dim=0)[k])
    back = to_theirs(ours, SAT_DIT_RULES)
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("rules", [SAT_DIT_RULES, SAT_VAE_RULES], ids=["dit", "vae"])
def test_each_name_has_one_rule(rules):
    written = [name for rule in rules for name in (rule.ours if isinstance(rule, Fused) else rule[:1])]
    theirs = [rule.theirs if isinstance(rule, Fused) else rule[1] for rule in rules]
    assert len(set(written)) == len(written)
    assert len(set(theirs)) == len(theirs)


def test_a_tensor_that_cannot_be_cut_is_named():
    with pytest.raises(ModelNotFound, match=r"query_key_value\.weight is \[7, 2\]"):
        to_ours({QKV: (7, 2)}, SAT_DIT_RULES)


def test_parts_of_a_fused_tensor_belong_together():
    ours = to_ours({QKV: (6, 2)}, SAT_DIT_RULES)
    del ours["blocks.3.attention.to_k.weight"]
    with pytest.raises(ModelNotFound, match=r"parts are missing: transformer\.layers\.3\.attention"):
        to_theirs(ours, SAT_DIT_RULES)
