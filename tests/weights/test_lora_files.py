"""LoRA files in every layout they come in: each is the dense update, converts to others, and is refused if damaged."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from videogen.config import DiTConfig, to_dict
from videogen.errors import FileError, InvalidRequest, ModelNotFound, VideogenError
from videogen.models.dit import DiT
from videogen.models.lora import Update, attach, linear_maps, merge, updates_of
from videogen.testing import TINY_DIT, tiny_batch, tiny_pipeline
from videogen.weights.lora import (
    FORMATS,
    NAME,
    add_loras,
    check_fit,
    fits,
    left_out,
    linear_sizes,
    open_lora,
    open_loras,
    read_updates,
    save_lora,
    split_scale,
)

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]  # our map -> A, B
RANK = 4

# ---- what the world writes: names said here anew, not through the tables under test ---------------------------------

ATTENTION = {"to_q": "attn1.to_q", "to_k": "attn1.to_k", "to_v": "attn1.to_v", "to_out": "attn1.to_out.0"}
OTHERS = {
    "text_proj": "patch_embed.text_proj",
    "time_embed.linear_1": "time_embedding.linear_1",
    "time_embed.linear_2": "time_embedding.linear_2",
    "norm_out.linear": "norm_out.linear",
    "proj_out": "proj_out",
}
IN_BLOCK = {"norm1.linear": "norm1.linear", "norm2.linear": "norm2.linear"}
IN_BLOCK |= {"mlp.up": "ff.net.0.proj", "mlp.down": "ff.net.2"}


def theirs(ours: str) -> str:
    if ours in OTHERS:
        return OTHERS[ours]
    _, i, rest = ours.split(".", 2)
    name = ATTENTION[rest.removeprefix("attention.")] if rest.startswith("attention.") else IN_BLOCK[rest]
    return f"transformer_blocks.{i}.{name}"


def named(pairs: Pairs, prefix: str, down: str, up: str, separator: str = ".") -> dict[str, torch.Tensor]:
    tensors = {}
    for ours, (A, B) in pairs.items():
        name = prefix + theirs(ours).replace(".", separator)
        tensors |= {f"{name}.{down}": A, f"{name}.{up}": B}
    return tensors


def with_alpha(tensors: dict[str, torch.Tensor], alpha: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`alpha` beside every pair, as kohya writes it."""
    names = {name.split(".lora_")[0] for name in tensors}
    return tensors | {f"{name}.alpha": torch.tensor(alpha, dtype=dtype) for name in names}


def metadata(**config: Any) -> dict[str, str]:
    packed = {f"transformer.{key}": value for key, value in config.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(packed, indent=2, sort_keys=True)}


def sat(pairs: Pairs, prefix: str = "model.diffusion_model.") -> dict[str, torch.Tensor]:
    """A whole checkpoint: updates of q, k, v in one module, the weights that were trained on under `original`."""
    tensors = {}
    for ours, (A, B) in pairs.items():
        _, i, _, to = ours.split(".")
        module = f"{prefix}transformer.layers.{i}.attention." + ("dense" if to == "to_out" else "query_key_value")
        piece = {"to_q": 0, "to_k": 1, "to_v": 2, "to_out": 0}[to]
        tensors |= {f"{module}.matrix_A.{piece}": A, f"{module}.matrix_B.{piece}": B}
        tensors |= {f"{module}.original.weight": torch.ones(2, 2), f"{module}.original.bias": torch.ones(2)}
    return tensors | {f"{prefix}mixins.patch_embed.proj.weight": torch.ones(2, 2), "first_stage_model.x": torch.ones(1)}


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    return path


def peft_folder(folder: Path, pairs: Pairs, **config: Any) -> Path:
    write(folder / "adapter_model.safetensors", named(pairs, "base_model.model.", "lora_A.weight", "lora_B.weight"))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def pixels(pairs: Pairs) -> Pairs:
    return {name: (A[..., None, None], B[..., None, None]) for name, (A, B) in pairs.items()}


PEFT = ("transformer.", "lora_A.weight", "lora_B.weight")
KOHYA = ("lora_unet__", "lora_down.weight", "lora_up.weight", "_")
Writer = Callable[[Path, Pairs], Path]

# layout -> (format it is, how it is written, how much B A counts, scale given by the user, which maps)
LAYOUTS: dict[str, tuple[str, Writer, float, Any, str]] = {
    "diffusers, no metadata": ("peft", lambda f, p: write(f / NAME, named(p, *PEFT)), 1.0, None, "all"),
    "diffusers, metadata": (
        "peft",
        lambda f, p: write(f / NAME, named(p, *PEFT), metadata(r=RANK, lora_alpha=6, target_modules=["to_q"])),
        6 / RANK,
        None,
        "all",
    ),
    "diffusers, root of the rank": (
        "peft",
        lambda f, p: write(f / NAME, named(p, *PEFT), metadata(r=RANK, lora_alpha=6, use_rslora=True)),
        6 / RANK**0.5,
        None,
        "all",
    ),
    "diffusers before peft": (
        "peft",
        lambda f, p: write(f / "a.safetensors", named(p, "transformer.", "lora.down.weight", "lora.up.weight")),
        1.0,
        0.5,
        "attention",
    ),
    "cogvideox-factory": (
        "finetrainers",
        lambda f, p: write(f / "a.safetensors", named(p, "", *PEFT[1:])),
        1.0,
        None,
        "attention",
    ),
    "finetrainers": (
        "finetrainers",
        lambda f, p: write(
            f / "a.safetensors", named(p, "", *PEFT[1:]), {"lora_config": json.dumps({"r": RANK, "lora_alpha": 2})}
        ),
        2 / RANK,
        None,
        "all",
    ),
    "peft": ("finetrainers", lambda f, p: peft_folder(f, p, r=RANK, lora_alpha=8), 8 / RANK, None, "all"),
    "DiffSynth": (
        "finetrainers",
        lambda f, p: write(f / "a.safetensors", named(p, "", "lora_A.default.weight", "lora_B.default.weight")),
        1.0,
        None,
        "attention",
    ),
    "SAT": ("sat", lambda f, p: write(f / "a.safetensors", sat(p)), 1 / RANK, None, "attention"),
    "SAT, another prefix": ("sat", lambda f, p: write(f / "a.safetensors", sat(p, "")), 1 / RANK, 2.0, "attention"),
    "SAT exported": ("peft", lambda f, p: write(f / NAME, named(p, *PEFT)), 1 / RANK, "1/r", "attention"),
    "SAT exported, as a fraction": (
        "peft",
        lambda f, p: write(f / NAME, named(p, *PEFT)),
        1 / RANK,
        f"1/{RANK}",
        "attention",
    ),
    "Fun": (
        "kohya",
        lambda f, p: write(f / "a.safetensors", with_alpha(named(p, *KOHYA), 1.0, torch.float16)),
        1 / RANK,
        0.55,
        "all",
    ),
    "kohya": (
        "kohya",
        lambda f, p: write(
            f / "a.safetensors",
            with_alpha(named(pixels(p), "lora_unet_", *KOHYA[1:]), 2.0, torch.bfloat16),
        ),
        2 / RANK,
        None,
        "all",
    ),
    "kohya without alpha": (
        "kohya",
        lambda f, p: write(f / "a.safetensors", named(p, *KOHYA)),
        1.0,
        None,
        "attention",
    ),
    "ComfyUI": (
        "comfyui",
        lambda f, p: write(
            f / "a.safetensors", with_alpha(named(p, "diffusion_model.", *PEFT[1:]), 3.0, torch.float32)
        ),
        3 / RANK,
        -1.5,
        "all",
    ),
    "ComfyUI, down and up": (
        "comfyui",
        lambda f, p: write(
            f / "a.safetensors",
            with_alpha(named(p, "model.diffusion_model.", "lora_down.weight", "lora_up.weight"), 3.0, torch.float64),
        ),
        3 / RANK,
        None,
        "all",
    ),
}


def network(dtype: torch.dtype = torch.float64) -> DiT:
    return tiny_pipeline(dtype=dtype).dit


def random_pairs(dit: DiT, which: str, *, rank: int = RANK, seed: int = 0) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    dtype = dit.proj_out.weight.dtype

    def normal(*shape: int) -> torch.Tensor:
        return (0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    maps = {name: m for name, m in linear_maps(dit).items() if which == "all" or ".attention." in name}
    return {name: (normal(rank, m.in_features), normal(m.out_features, rank)) for name, m in maps.items()}


@torch.no_grad()
def dense(dit: DiT, pairs: Pairs, factor: float) -> DiT:
    for name, (A, B) in pairs.items():
        dit.get_submodule(name).weight += factor * B @ A
    return dit


@torch.no_grad()
def output(dit: DiT) -> torch.Tensor:
    return dit(*tiny_batch(TINY_DIT, dtype=dit.proj_out.weight.dtype))


def number(scale: Any) -> float:
    return 1.0 if scale is None or isinstance(scale, str) else scale


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_the_dense_update(tmp_path, layout):
    form, writer, factor, scale, which = LAYOUTS[layout]
    dit = network()
    pairs = random_pairs(dit, which)
    path = writer(tmp_path, pairs)
    loras = open_loras([(path, scale)] if scale is not None else path)
    assert loras[0].file.format == form
    assert loras[0].file.keys.keys() == pairs.keys()
    assert not left_out(loras[0].file)
    check_fit(loras[0].file, TINY_DIT, "tiny")
    add_loras(dit, loras)
    expected = output(dense(network(), pairs, factor * number(scale)))
    torch.testing.assert_close(output(dit), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_merged_is_itself_beside(tmp_path, layout):
    _, writer, _, scale, which = LAYOUTS[layout]
    dit = network(torch.float32)
    add_loras(dit, open_loras((writer(tmp_path, random_pairs(dit, which)), 1.0 if scale is None else scale)))
    beside = output(dit)
    merge(dit)
    torch.testing.assert_close(output(dit), beside, rtol=1e-5, atol=1e-5)


def test_ranks_and_alphas_of_their_own(tmp_path):
    """peft's patterns: by the end of a name."""
    dit = network()
    pairs = random_pairs(dit, "attention") | {
        name: pair for name, pair in random_pairs(dit, "attention", rank=2, seed=1).items() if name.endswith("to_v")
    }
    patterns = {"rank_pattern": {"attn1.to_v": 2}, "alpha_pattern": {"attn1.to_v": 5, "1.attn1.to_out.0": 0.5}}
    path = write(tmp_path / NAME, named(pairs, *PEFT), metadata(r=RANK, lora_alpha=1, **patterns))
    file = open_lora(tmp_path)
    assert file.path == path
    factors = {name: alpha / file.ranks[name] for name, alpha in file.alphas.items()}
    assert factors["blocks.0.attention.to_q"] == 1 / RANK
    assert factors["blocks.1.attention.to_v"] == 5 / 2
    assert (factors["blocks.0.attention.to_out"], factors["blocks.1.attention.to_out"]) == (1 / RANK, 0.5 / RANK)
    add_loras(dit, open_loras(path))
    expected = network()
    for name, pair in pairs.items():
        dense(expected, {name: pair}, factors[name])
    torch.testing.assert_close(output(dit), output(expected), rtol=1e-12, atol=1e-12)


def test_several_at_once_with_scales(tmp_path):
    dit = network()
    first, second = random_pairs(dit, "all"), random_pairs(dit, "attention", seed=1)
    files = [write(tmp_path / "a" / NAME, named(first, *PEFT)), write(tmp_path / "b" / NAME, sat(second))]
    loras = open_loras([files[0], (files[1], "0.5")], 0.7)
    assert len({lora.name for lora in loras}) == 2
    add_loras(dit, loras)
    expected = dense(dense(network(), first, 0.7), second, 0.5 / RANK)
    torch.testing.assert_close(output(dit), output(expected), rtol=1e-12, atol=1e-12)
    assert [lora.scale for lora in open_loras(files, [1, 2])] == [1, 2]
    assert [(lora.scale, lora.alpha) for lora in open_loras((files[0], "0.5/r"))] == [(1.0, 0.5)]


def test_scale_0_is_the_plain_model_bit_for_bit(tmp_path):
    dit = network(torch.float32)
    plain = output(dit)
    add_loras(dit, open_loras((write(tmp_path / NAME, named(random_pairs(dit, "all"), *PEFT)), 0)))
    assert torch.equal(output(dit), plain)


def test_what_a_clip_says_finds_it_again(tmp_path):
    pairs = random_pairs(network(), "attention")
    path = write(tmp_path / "orbit.left.safetensors", named(pairs, *PEFT))
    for scale, said in ((None, 1.0), (0.5, 0.5), ("1/8", 0.125), ("1/r", "1.0/r")):
        (lora,) = open_loras(path, scale)
        recipe = json.loads(json.dumps(lora.recipe))
        assert recipe == {"file": "orbit.left.safetensors", "sha256": lora.file.sha256, "scale": said}
        (again,) = open_loras([(path, recipe["scale"])])
        assert again == lora


# ---- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("layout", ["diffusers, metadata", "finetrainers", "SAT", "Fun", "ComfyUI"])
def test_formats_convert_into_each_other_and_back(tmp_path, layout, to):
    form, writer, factor, *_ = LAYOUTS[layout]
    pairs = random_pairs(network(), "attention")
    there = save_lora(tmp_path / "there", read_updates(open_lora(writer(tmp_path / "here", pairs))), form=to)
    assert there == tmp_path / "there" / NAME
    assert open_lora(there).format == to
    back = open_lora(save_lora(tmp_path / "back.safetensors", read_updates(open_lora(there)), form=form))
    assert back.format == form
    for file in (open_lora(there), back):
        for name, update in read_updates(file).items():
            A, B = pairs[name]
            assert torch.equal(update.A, A)
            torch.testing.assert_close(update.alpha / update.rank * update.B, factor * B, rtol=1e-14, atol=0)


def test_all_maps_survive_in_every_format_that_has_names_for_them(tmp_path):
    pairs = random_pairs(network(), "all")
    updates = {name: Update(A, B, 2.0) for name, (A, B) in pairs.items()}
    for form in FORMATS:
        if form == "sat":
            with pytest.raises(InvalidRequest, match="sat has no name for"):
                save_lora(tmp_path / form, updates, form=form)
            continue
        found = read_updates(open_lora(save_lora(tmp_path / form, updates, form=form)))
        assert found.keys() == updates.keys()
        assert all(torch.equal(found[n].B, u.B) and found[n].alpha == u.alpha for n, u in updates.items())


def test_nothing_is_overwritten_unasked_and_nothing_left_behind(tmp_path, monkeypatch):
    updates = {name: Update(A, B, 2.0) for name, (A, B) in random_pairs(network(), "attention").items()}
    path = save_lora(tmp_path, updates)
    before = path.read_bytes()
    with pytest.raises(FileError, match="exists"):
        save_lora(tmp_path, updates)
    with pytest.raises(InvalidRequest, match="no LoRA format"):
        save_lora(tmp_path / "other", updates, form="lycoris")
    with pytest.raises(InvalidRequest, match="no LoRA to save"):
        save_lora(tmp_path / "other", {})
    monkeypatch.setattr("videogen.data.files.sync", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_lora(tmp_path, updates, overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# ---- diffusers ------------------------------------------------------------------------------------------------------


def diffusers_twin(dit: DiT) -> CogVideoXTransformer3DModel:
    from videogen.weights.table import DIT_RULES, to_theirs

    model = CogVideoXTransformer3DModel(**to_dict(dit.config)).to(dit.proj_out.weight.dtype).eval()
    model.load_state_dict(to_theirs(dit.state_dict(), DIT_RULES))
    return model


def their_output(model: CogVideoXTransformer3DModel) -> torch.Tensor:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    config = TINY_DIT
    batch = tiny_batch(config, dtype=model.dtype)
    frames, height, width = 3, config.sample_height // 2, config.sample_width // 2
    crops = ((0, 0), (height, width))
    rotary = get_3d_rotary_pos_embed(config.attention_head_dim, crops, (height, width), frames)
    with torch.no_grad():
        x = torch.cat([batch.latents, batch.cond.channels], 2)
        return model(x, batch.cond.text, batch.t, image_rotary_emb=rotary, return_dict=False)[0]


def test_saved_files_have_diffusers_names_shapes_and_metadata(tmp_path):
    """What `CogVideoXLoraLoaderMixin` looks at; it opens the file itself in the next test, where there is peft."""
    dit = network(torch.float32)
    updates = {n: Update(A, B, 2.0) for n, (A, B) in random_pairs(dit, "all").items()}
    path = save_lora(tmp_path, updates)
    modules = dict(diffusers_twin(dit).named_modules())
    with safe_open(path, "pt") as file:
        packed = json.loads(file.metadata()["lora_adapter_metadata"])
        names = list(file.keys())
        for name in names:
            module, _, leaf = name.removeprefix("transformer.").rpartition(".lora_")
            d_out, d_in = modules[module].weight.shape
            shape = file.get_slice(name).get_shape()
            assert shape == ([RANK, d_in] if leaf == "A.weight" else [d_out, RANK])
    assert len(names) == 2 * len(updates)
    config = {key.removeprefix("transformer."): value for key, value in packed.items()}
    assert (config["r"], config["lora_alpha"]) == (RANK, 2.0)
    assert {f"transformer.{name}.lora_A.weight" for name in config["target_modules"]} <= set(names)


def test_diffusers_opens_what_is_saved_and_computes_the_same(tmp_path):
    pytest.importorskip("peft")
    from diffusers.loaders import CogVideoXLoraLoaderMixin as Mixin

    dit = network()
    theirs = diffusers_twin(dit)
    torch.testing.assert_close(their_output(theirs), output(dit), rtol=1e-5, atol=1e-5)
    updates = {n: Update(A, B, 2.0) for n, (A, B) in random_pairs(dit, "all").items()}
    odd = "blocks.1.attention.to_q"
    updates[odd] = Update(updates[odd].A[:1].clone(), updates[odd].B[:, :1].clone(), 9.0)
    path = save_lora(tmp_path, updates)
    state, packed = Mixin.lora_state_dict(path, return_lora_metadata=True)
    Mixin.load_lora_into_transformer(state, theirs, adapter_name="ours", metadata=packed)
    plain = output(dit)
    attach(dit, updates)
    torch.testing.assert_close(their_output(theirs), output(dit), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output(dit), plain, atol=1e-3)


def test_what_diffusers_saves_opens_and_computes_the_same(tmp_path):
    peft = pytest.importorskip("peft")
    from diffusers import CogVideoXPipeline

    dit = network()
    theirs = diffusers_twin(dit)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False
    )
    theirs.add_adapter(config)
    layers = peft.get_peft_model_state_dict(theirs)
    for described in (None, config.to_dict()):
        folder = tmp_path / str(described is None)
        CogVideoXPipeline.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=described)
        mine = network()
        add_loras(mine, open_loras((folder, 1.0 if described else 5 / 3)))
        torch.testing.assert_close(output(mine), their_output(theirs), rtol=1e-5, atol=1e-5)


# ---- does it fit ----------------------------------------------------------------------------------------------------

ROTARY = {"use_rotary_positional_embeddings": True}
NEW = ROTARY | {"patch_size_t": 2}


@pytest.mark.parametrize("changes", [{}, ROTARY, NEW, NEW | {"in_channels": 32, "ofs_embed_dim": 512}])
def test_sizes_are_those_of_the_network(changes):
    config = DiTConfig(num_layers=2, **changes)
    with torch.device("meta"):
        built = {name: (m.out_features, m.in_features) for name, m in linear_maps(DiT(config)).items()}
    assert linear_sizes(config) == built


@pytest.mark.parametrize(
    ("blocks", "width", "maps", "keys", "named_model"),
    [
        (30, 1920, ("attention",), 240, "zai-org/CogVideoX-2b"),
        (42, 3072, ("attention",), 336, "zai-org/CogVideoX-5b"),
        (42, 3072, ("attention", "patch_embed.proj"), 338, "zai-org/CogVideoX1.5-5B"),
        (42, 3072, ("attention", "ofs_embed.linear_1"), 338, "zai-org/CogVideoX1.5-5B-I2V"),
    ],
)
def test_full_size_files_name_the_published_models_they_fit(tmp_path, blocks, width, maps, keys, named_model):
    """Every name and shape of a whole LoRA of a published model, at rank 1."""
    config = DiTConfig(
        num_layers=blocks,
        num_attention_heads=width // 64,
        patch_size_t=2 if "5B" in named_model and "1.5" in named_model else None,
        ofs_embed_dim=512 if "I2V" in named_model else None,
    )
    sizes = {name: size for name, size in linear_sizes(config).items() if any(part in name for part in maps)}
    zeros = {n: Update(torch.zeros(1, i).half(), torch.zeros(o, 1).half(), 1.0) for n, (o, i) in sizes.items()}
    file = open_lora(save_lora(tmp_path, zeros))
    with safe_open(file.path, "pt") as saved:
        assert len(saved.keys()) == keys
    assert fits(file)[0] == named_model
    assert file.sizes == sizes
    check_fit(file, config, "it")
    other = DiTConfig() if width == 3072 else DiTConfig(num_layers=42, num_attention_heads=48)
    with pytest.raises(InvalidRequest, match="does not fit other") as error:
        check_fit(file, other, "other")
    assert error.value.param == "lora"
    assert named_model in error.value.hint
    assert f"is {width} to {width} in the file" in error.value.why or "not there" in error.value.why


def test_a_file_that_fits_nothing_published_says_so(tmp_path):
    file = open_lora(write(tmp_path / NAME, named(random_pairs(network(), "attention"), *PEFT)))
    assert fits(file) == []
    check_fit(file, TINY_DIT, "tiny")
    for config in (
        dataclasses.replace(TINY_DIT, num_layers=1),
        dataclasses.replace(TINY_DIT, num_attention_heads=4),
    ):
        with pytest.raises(InvalidRequest, match="does not fit") as error:
            check_fit(file, config, "another")
        assert "no published model" in error.value.hint


# ---- what is left out, what is refused ------------------------------------------------------------------------------


def test_unmatched_names_are_counted_and_named(tmp_path, caplog):
    dit = network(torch.float32)
    tensors = named(random_pairs(dit, "attention"), *KOHYA)
    tensors |= {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 2)}
    tensors |= {"lora_unet__transformer_blocks_0_attn2_to_q.lora_down.weight": torch.zeros(2, 2), "what": torch.ones(1)}
    loras = open_loras(write(tmp_path / "a.safetensors", tensors))
    with caplog.at_level("WARNING"):
        add_loras(dit, loras)
    words = [record.getMessage() for record in caplog.records]
    assert words == left_out(loras[0].file)
    assert "1 tensor for a text encoder, not used: lora_te_text_model" in words[0]
    assert "2 tensors of unknown name, not used: lora_unet__transformer_blocks_0_attn2_to_q" in words[1]


def test_a_convolution_of_patches_is_left_out_by_name(tmp_path):
    tensors = named(random_pairs(network(torch.float32), "attention"), *PEFT)
    tensors |= {"transformer.patch_embed.proj.lora_A.weight": torch.zeros(4, 8, 2, 2)}
    tensors |= {"transformer.patch_embed.proj.lora_B.weight": torch.zeros(32, 4, 1, 1)}
    file = open_lora(write(tmp_path / NAME, tensors))
    assert set(file.unused) == {f"transformer.patch_embed.proj.lora_{x}.weight" for x in "AB"}


Q = "transformer.transformer_blocks.0.attn1.to_q"
A, B = torch.ones(2, 32), torch.ones(32, 2)
GOOD = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}
KOHYA_Q = "lora_unet__transformer_blocks_0_attn1_to_q"

REFUSED: dict[str, tuple[dict[str, torch.Tensor], dict[str, str] | None, str]] = {
    "nothing of ours": ({"unet.up_blocks.0.to_q.lora_A.weight": A}, None, "holds no LoRA of a CogVideoX"),
    "empty": ({}, None, "holds no LoRA of a CogVideoX"),
    "a whole model": ({"transformer_blocks.0.attn1.to_q.weight": A}, None, "holds no LoRA of a CogVideoX"),
    "text encoder only": ({"text_encoder.x.lora_A.weight": A}, None, "1 are for a text encoder"),
    "alphas only": ({f"{KOHYA_Q}.alpha": torch.ones(())}, None, "holds no LoRA of a CogVideoX"),
    "DoRA": (GOOD | {f"{Q}.lora_magnitude_vector": torch.ones(32)}, None, "holds DoRA"),
    "DoRA, kohya": (GOOD | {f"{KOHYA_Q}.dora_scale": torch.ones(32)}, None, "holds DoRA"),
    "DoRA by metadata": (GOOD, metadata(use_dora=True), "holds DoRA"),
    "LoHa": ({f"{KOHYA_Q}.hada_w1_a": A}, None, "holds LoHa"),
    "LoKr": ({f"{KOHYA_Q}.lokr_w1": A}, None, "holds LoKr"),
    "with biases": (GOOD | {f"{Q}.lora_B.bias": torch.ones(32)}, None, "LoRA with biases"),
    "half": ({f"{Q}.lora_A.weight": A}, None, "has no partner"),
    "twice": (GOOD | {f"{Q}.lora_down.weight": A + 1}, None, "are the same tensor"),
    "other ranks": (GOOD | {f"{Q}.lora_B.weight": torch.ones(32, 3)}, None, "of ranks 2 and 3"),
    "a vector": (GOOD | {f"{Q}.lora_A.weight": torch.ones(32)}, None, r"has shape \[32\]"),
    "rank 0": ({f"{Q}.lora_A.weight": A[:0], f"{Q}.lora_B.weight": B[:, :0].contiguous()}, None, "of ranks 0"),
    "integers": (GOOD | {f"{Q}.lora_A.weight": A.int()}, None, "is I32"),
    "eight bits": (GOOD | {f"{Q}.lora_A.weight": A.to(torch.float8_e4m3fn)}, None, "is F8_E4M3"),
    "alphas": (GOOD | {f"{Q}.alpha": torch.ones(2)}, None, "is not one number"),
    "alpha nan": (GOOD | {f"{Q}.alpha": torch.tensor(math.nan)}, None, "is nan"),
    "not finite": (GOOD | {f"{Q}.lora_A.weight": A / 0}, None, "is not finite"),
    "metadata": (GOOD, {"lora_adapter_metadata": "{"}, "metadata is not that of a LoRA"),
    "metadata list": (GOOD, {"lora_adapter_metadata": "[1]"}, "metadata is not that of a LoRA"),
    "metadata alpha": (GOOD, metadata(lora_alpha="many"), "has alpha 'many'"),
    "metadata infinite": (GOOD, {"lora_config": '{"lora_alpha": Infinity}'}, "has alpha inf"),
    "metadata huge": (GOOD, {"lora_config": '{"lora_alpha": 1' + "0" * 400 + "}"}, "metadata is not that of a LoRA"),
    "a pattern": (GOOD, metadata(lora_alpha=1, alpha_pattern={"to_[qk]": 2}), "names none of its maps"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_whole_lora_is_refused_in_three_lines(tmp_path, kind):
    tensors, described, words = REFUSED[kind]
    path = write(tmp_path / "a.safetensors", tensors, described)
    with pytest.raises(ModelNotFound, match=r"(?s).*" + words) as error:
        read_updates(open_lora(path))
    what, why, hint = str(error.value).splitlines()
    assert what.startswith("error: a.safetensors ")
    assert why.startswith("  why: ")
    assert hint.startswith("  try: ")


def test_what_is_no_file_here_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "pointer.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    for path, kind, words in (
        ("https://example.com/a.safetensors", InvalidRequest, "no LoRA file"),
        (tmp_path / "none.safetensors", InvalidRequest, "no LoRA file"),
        (tmp_path / "folder", InvalidRequest, "the folder has no pytorch_lora_weights"),
        (tmp_path / "old.bin", ModelNotFound, "pickle"),
        (tmp_path / "pointer.safetensors", ModelNotFound, "Git LFS"),
    ):
        with pytest.raises(kind, match=r"(?s).*" + words):
            open_lora(path)


@pytest.mark.parametrize(
    ("lora", "scale", "words"),
    [
        ([], 0.5, "without a lora"),
        (3, None, "is given as 3"),
        ([("a", 1, 2)], None, "is given as"),
        (["a.safetensors"], [1, 2], "2 entries for 1 LoRA"),
        (("a.safetensors", "half"), None, "scale is 'half'"),
        (("a.safetensors", "1/0"), None, "scale is '1/0'"),
        (("a.safetensors", math.inf), None, "scale is inf"),
        (("a.safetensors", True), None, "scale is True"),
        (("a.safetensors", [1]), None, "scale is"),
    ],
)
def test_scales_and_lists_are_checked_before_files(lora, scale, words):
    with pytest.raises(InvalidRequest, match=r"(?s).*" + words):
        open_loras(lora, scale)


def test_the_scale_behind_a_path():
    assert split_scale("a.safetensors:-1e-3") == ("a.safetensors", "-1e-3")
    assert split_scale("a.safetensors:1/r") == ("a.safetensors", "1/r")
    for whole in ("a.safetensors", "C:\\a.safetensors", "a:b.safetensors", "a:", ":"):
        assert split_scale(whole) == whole


@pytest.fixture(scope="module")
def good_bytes(tmp_path_factory) -> bytes:
    pairs = random_pairs(network(torch.float32), "attention")
    described = metadata(r=RANK, lora_alpha=2.0, alpha_pattern={"attn1.to_q": 3})
    tensors = with_alpha(named(pairs, *PEFT), 1.0, torch.float32)
    return write(tmp_path_factory.mktemp("good") / NAME, tensors, described).read_bytes()


TRIES = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def opens_or_says_why(folder: Path, data: bytes) -> None:
    path = folder / "damaged.safetensors"
    path.write_bytes(data)
    try:
        updates = read_updates(open_lora(path))
        assert all(torch.isfinite(u.A).all() and math.isfinite(u.alpha) for u in updates.values())
        attach(network(torch.float32), updates)
    except VideogenError as error:
        if error.exit_code not in (2, 3) or str(error).count("\n") != 2:
            raise AssertionError(str(error)) from error


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(flips=st.lists(st.tuples(st.integers(0, 2**16), st.integers(1, 255)), max_size=6), cut=st.integers(0, 2**16))
def test_damaged_bytes_open_or_say_why(tmp_path, good_bytes, flips, cut):
    data = bytearray(good_bytes)
    header = 8 + int.from_bytes(data[:8], "little")
    for place, value in flips:
        data[place % header] ^= value  # the header, in which all is decided; values are numbers whatever they are
    opens_or_says_why(tmp_path, bytes(data[: -(cut % 64)] if cut % 2 else data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["r", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "transformer.lora_alpha"])
SHAPES = st.lists(st.integers(0, 33), max_size=5)
ENDS = ["lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "alpha", "lora_B.bias", "dora_scale"]
PREFIXES = ["transformer.transformer_blocks.", "transformer_blocks.", "lora_unet__transformer_blocks_", "text_encoder."]
MODULES = [".attn1.to_q.", "_attn1_to_q.", ".attn1.to_out.0.", ".ff.net.2.", ".norm1.linear.", "."]
NAMES = st.builds("{}{}{}{}".format, st.sampled_from(PREFIXES), st.integers(0, 3), st.sampled_from(MODULES),
                  st.sampled_from(ENDS))  # fmt: skip
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    tensors=st.dictionaries(NAMES, st.tuples(SHAPES, DTYPES), max_size=5),
    config=st.dictionaries(KEYS, JSON, max_size=4),
    text=st.none() | st.text(max_size=20),
)
def test_any_names_shapes_and_metadata_open_or_say_why(tmp_path, tensors, config, text):
    made = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    path = write(tmp_path / "any.safetensors", made, {"lora_adapter_metadata": text or json.dumps(config)})
    opens_or_says_why(tmp_path, path.read_bytes())


def test_headers_are_read_without_torch(tmp_path):
    path = write(tmp_path / NAME, named(random_pairs(network(), "attention"), *PEFT))
    code = f"""
import sys
from videogen.config import DiTConfig
from videogen.weights.lora import open_loras, check_fit, fits
(lora,) = open_loras({str(path)!r})
assert fits(lora.file) == [] and len(lora.file.keys) == 8 and lora.recipe
assert not {{"torch", "numpy", "safetensors"}} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_gives_back_what_was_read(tmp_path):
    dit = network(torch.float32)
    pairs = random_pairs(dit, "all")
    (lora,) = open_loras(write(tmp_path / "in" / NAME, named(pairs, *PEFT), metadata(r=RANK, lora_alpha=2)))
    add_loras(dit, [lora])
    again = read_updates(open_lora(save_lora(tmp_path / "out", updates_of(dit, lora.name))))
    assert all(torch.equal(again[n].A, A) and torch.equal(again[n].B, B) for n, (A, B) in pairs.items())
    assert {u.alpha for u in again.values()} == {2.0}
