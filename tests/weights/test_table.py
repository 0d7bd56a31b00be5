"""Tables of names: every published model at full size on the meta device, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from full_size import FULL, full_shapes

from videogen.config import DiTConfig, VAEConfig, to_dict
from videogen.errors import ModelNotFound
from videogen.models.dit import DiT
from videogen.models.vae import VAE
from videogen.types import Conditioning
from videogen.weights.table import DIT_RULES, VAE_RULES, to_ours, to_theirs, widen


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}


@pytest.mark.parametrize("name", FULL)
def test_published_transformer_has_their_names_and_shapes(name):
    full, (config, ours) = FULL[name], full_shapes(name)
    with torch.device("meta"):
        theirs = CogVideoXTransformer3DModel(**to_dict(config))
    assert to_theirs(ours, DIT_RULES) == shapes(theirs)
    assert to_ours(shapes(theirs), DIT_RULES) == ours
    assert len(ours) == full.tensors
    assert ours["patch_embed.proj.weight"] == full.patch
    assert sum(parameter.numel() for parameter in theirs.parameters()) == full.parameters
    if config.use_learned_positional_embeddings:
        assert ours["position_table"] == (1, 17776, 3072)


def test_published_vae_has_their_names_and_shapes():
    with torch.device("meta"):
        ours, theirs = shapes(VAE(VAEConfig())), shapes(AutoencoderKLCogVideoX(**to_dict(VAEConfig())))
    assert to_theirs(ours, VAE_RULES) == theirs
    assert to_ours(theirs, VAE_RULES) == ours
    assert len(ours) == 436


@pytest.mark.parametrize("rules", [DIT_RULES, VAE_RULES], ids=["dit", "vae"])
def test_every_rule_is_its_own_inverse_and_the_only_one_for_its_names(rules):
    for ours, theirs in rules:
        name = ours.replace("{i}", "3").replace("{j}", "10").replace("*", "bias")
        foreign = theirs.replace("{i}", "3").replace("{j}", "10").replace("*", "bias")
        for others in ([rule for rule in rules if rule != (ours, theirs)],):
            with pytest.raises(ModelNotFound):
                to_theirs({name: 0}, others)
            with pytest.raises(ModelNotFound):
                to_ours({foreign: 0}, others)
        assert to_theirs({name: 0}, rules) == {foreign: 0}
        assert to_ours({foreign: 0}, rules) == {name: 0}


def test_values_are_passed_on_untouched():
    tensor = torch.randn(3)
    assert to_ours({"patch_embed.text_proj.bias": tensor}, DIT_RULES)["text_proj.bias"] is tensor


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.3.attn2.to_q.weight",
        "transformer_blocks.3.attn1.to_q.lora_A.weight",  # not silently the weight of something else
        "transformer_blocks.x.attn1.to_q.weight",
        "transformer_blocks.3.attn1.to_q.weight_scale",
        "prefix.norm_final.weight",
    ],
)
def test_uncovered_tensor_is_named(name):
    with pytest.raises(ModelNotFound) as error:
        to_ours({"norm_final.weight": 0, name: 0}, DIT_RULES)
    assert name in str(error.value)
    assert "1 tensor " in str(error.value)


def test_uncovered_tensor_comes_with_its_neighbours():
    with pytest.raises(ModelNotFound, match=r"transformer_blocks\.\{i\}\.attn1\.to_q"):
        to_ours({"transformer_blocks.3.attn2.to_q.weight": 0}, DIT_RULES)


@pytest.mark.parametrize("patch_t", [None, 2])
def test_widened_model_computes_what_it_did_whatever_the_new_channels_hold(patch_t):
    torch.manual_seed(0)
    small = {
        "num_layers": 1,
        "num_attention_heads": 1,
        "text_embed_dim": 8,
        "time_embed_dim": 8,
        "patch_size_t": patch_t,
    }
    small |= {"in_channels": 4, "out_channels": 4, "use_rotary_positional_embeddings": True}
    narrow = DiT(DiTConfig(**small)).eval()
    wide = DiT(DiTConfig(**small | {"in_channels": 9})).eval()
    state = narrow.state_dict()
    state["patch_embed.proj.weight"] = widen(state["patch_embed.proj.weight"], 4, 9)
    wide.load_state_dict(state)

    x, t, cond = torch.randn(1, 2, 4, 4, 4), torch.tensor([5]), Conditioning(text=torch.randn(1, 3, 8))
    with torch.no_grad():
        before = narrow(x, t, cond)
        after = wide(x, t, cond.replace(channels=torch.randn(1, 2, 5, 4, 4)))
    torch.testing.assert_close(after, before)


def test_widen_refuses_to_shrink():
    with pytest.raises(ValueError, match="cannot widen"):
        widen(torch.zeros(2, 16, 2, 2), 16, 8)


def test_table_imports_no_torch():
    code = "import sys, videogen.weights.table; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
