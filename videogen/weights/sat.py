"""The names of the original SAT checkpoints, as tables: `mp_rank_00_model_states.pt` and `3d-vae.pt`. Imports no torch.

    transformer/1/mp_rank_00_model_states.pt     {"module": {"model.diffusion_model.…": …}}
    vae/3d-vae.pt                                {"state_dict": {"encoder.…": …, "decoder.…": …, "loss.…": …}}
    t5-v1_1-xxl/                                 T5 in Hugging Face's format

These files are pickles: only `videogen convert` reads them, in a process of its own. It writes SAT's names too, as
safetensors.
"""

from __future__ import annotations

from pathlib import Path

from videogen.weights.table import LATENT_NORM, PLAIN_NORM, Fused, Rules, resnet

PREFIX = "model.diffusion_model."
DIT_FILE = Path("transformer", "1", "mp_rank_00_model_states")  # and its ending
VAE_FILE = Path("vae", "3d-vae")
TABLE = "mixins.pos_embed.pos_embedding"

_LAYER = "transformer.layers.{i}"
_ADALN = "mixins.adaln_layer"

SAT_DIT_RULES: Rules = [
    ("patch_embed.proj.*", "mixins.patch_embed.proj.*"),
    ("text_proj.*", "mixins.patch_embed.text_proj.*"),
    ("position_table", TABLE),  # 5B-I2V and its derivatives; 2B stores its sin-cos table here, which is computed here
    ("time_embed.linear_1.*", "time_embed.0.*"),
    ("time_embed.linear_2.*", "time_embed.2.*"),
    ("ofs_embed.linear_1.*", "ofs_embed.0.*"),
    ("ofs_embed.linear_2.*", "ofs_embed.2.*"),
    # Theirs: shift, scale, gate of the attention, then of the MLP; then the same six for text.
    Fused(
        ("blocks.{i}.norm1.linear.*", "blocks.{i}.norm2.linear.*"),
        f"{_ADALN}.adaLN_modulations.{{i}}.1.*",
        (0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11),
    ),
    Fused(
        ("blocks.{i}.attention.to_q.*", "blocks.{i}.attention.to_k.*", "blocks.{i}.attention.to_v.*"),
        f"{_LAYER}.attention.query_key_value.*",
        (0, 1, 2),
    ),
    ("blocks.{i}.norm1.norm.*", f"{_LAYER}.input_layernorm.*"),
    ("blocks.{i}.norm2.norm.*", f"{_LAYER}.post_attention_layernorm.*"),
    ("blocks.{i}.attention.norm_q.*", f"{_ADALN}.query_layernorm_list.{{i}}.*"),
    ("blocks.{i}.attention.norm_k.*", f"{_ADALN}.key_layernorm_list.{{i}}.*"),
    ("blocks.{i}.attention.to_out.*", f"{_LAYER}.attention.dense.*"),
    ("blocks.{i}.mlp.up.*", f"{_LAYER}.mlp.dense_h_to_4h.*"),
    ("blocks.{i}.mlp.down.*", f"{_LAYER}.mlp.dense_4h_to_h.*"),
    ("norm_final.*", "transformer.final_layernorm.*"),
    ("norm_out.norm.*", "mixins.final_layer.norm_final.*"),
    ("norm_out.linear.*", "mixins.final_layer.adaLN_modulation.1.*"),
    ("proj_out.*", "mixins.final_layer.linear.*"),
]
# What a transformer's file holds that is not a weight: tables that are computed here.
SAT_DIT_DROP = ("*embed_tokens*", "*freqs_sin", "*freqs_cos", "*position_embedding*")
# Full fine-tunes keep a copy of the frozen text encoder and VAE beside the transformer.
SAT_BESIDE = ("conditioner.*", "first_stage_model.*")

UP_BLOCKS = 4  # counted from the output in SAT


def _mid(side: str, norm: list[tuple[str, str]]) -> Rules:
    rules = (resnet(f"{side}.mid.{j}", f"{side}.mid.block_{j + 1}", norm, "nin_shortcut") for j in range(2))
    return [rule for mid in rules for rule in mid]


def _up(i: int) -> Rules:
    theirs = f"decoder.up.{UP_BLOCKS - 1 - i}"
    return [
        *resnet(f"decoder.up.{i}.resnets.{{j}}", f"{theirs}.block.{{j}}", LATENT_NORM, "nin_shortcut"),
        (f"decoder.up.{i}.upsample.*", f"{theirs}.upsample.conv.*"),
    ]


SAT_VAE_RULES: Rules = [
    ("encoder.conv_in.*", "encoder.conv_in.conv.*"),
    *resnet("encoder.down.{i}.resnets.{j}", "encoder.down.{i}.block.{j}", PLAIN_NORM, "nin_shortcut"),
    ("encoder.down.{i}.downsample.*", "encoder.down.{i}.downsample.conv.*"),
    *_mid("encoder", PLAIN_NORM),
    ("encoder.norm_out.*", "encoder.norm_out.*"),
    ("encoder.conv_out.*", "encoder.conv_out.conv.*"),
    ("decoder.conv_in.*", "decoder.conv_in.conv.*"),
    *_mid("decoder", LATENT_NORM),
    *[rule for i in range(UP_BLOCKS) for rule in _up(i)],
    *[(f"decoder.norm_out{a}", f"decoder.norm_out{b}") for a, b in LATENT_NORM],
    ("decoder.conv_out.*", "decoder.conv_out.conv.*"),
]
SAT_VAE_DROP = ("loss.*",)  # the discriminator and the perceptual loss it was trained with
