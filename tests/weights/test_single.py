"""Single files: recognised by names and shapes in either naming under any prefix, opened bit for bit, or refused."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from full_size import FULL, full_shapes
from safetensors.torch import load_file, save_file

import videogen
from videogen.config import VAEConfig
from videogen.errors import InvalidRequest, ModelNotFound
from videogen.models.vae import VAE
from videogen.testing import TINY_DIT, tiny_batch, tiny_pipeline
from videogen.weights.card import read_card
from videogen.weights.convert import stored_table
from videogen.weights.diffusers import load_folder
from videogen.weights.load import shapes_of
from videogen.weights.sat import PREFIX, SAT_DIT_RULES, SAT_VAE_RULES, TABLE
from videogen.weights.single import card_of_file, find_parts, load_parts
from videogen.weights.table import DIT_RULES, VAE_RULES, to_theirs

PLAIN = {"use_rotary_positional_embeddings": False, "use_learned_positional_embeddings": False, "in_channels": 4}
ROTARY = {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": False}
VARIANTS = {
    "2B": replace(TINY_DIT, **PLAIN),
    "5B": replace(TINY_DIT, **ROTARY, in_channels=4),
    "5B-I2V": TINY_DIT,
    "1.5-I2V": replace(TINY_DIT, **ROTARY, patch_size_t=2, patch_bias=False, ofs_embed_dim=16),
    "Fun-InP": replace(TINY_DIT, **ROTARY, in_channels=9),
    "Control": replace(TINY_DIT, **ROTARY, in_channels=8),
}
NAMINGS = {"diffusers": (DIT_RULES, VAE_RULES), "sat": (SAT_DIT_RULES, SAT_VAE_RULES)}
PREFIXES = ["", "model.diffusion_model.", "transformer.", "module.", "diffusion_model.", "dit.", "module.model."]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A pipeline with random weights and the folder of a model alike with other weights, for each variant."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: (
            tiny_pipeline(dit=config, conditions=("text",), seed=1),
            tiny_pipeline(dit=config, conditions=("text",), seed=2).save(root / name),
        )
        for name, config in VARIANTS.items()
    }


def transformer(pipe, naming="diffusers", prefix=""):
    state = to_theirs(pipe.dit.state_dict(), NAMINGS[naming][0])
    if naming == "sat" and not pipe.dit.config.use_rotary_positional_embeddings:
        state[TABLE] = stored_table(pipe.dit)
    return {prefix + name: tensor.contiguous() for name, tensor in state.items()}


def vae(pipe, naming="diffusers", prefix=""):
    return {prefix + n: t.contiguous() for n, t in to_theirs(pipe.vae.state_dict(), NAMINGS[naming][1]).items()}


def write(path: Path, *states) -> Path:
    save_file({name: tensor for state in states for name, tensor in state.items()}, path)
    return path


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(
        ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in ours
    )


# ---- opened ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("naming", NAMINGS)
def test_a_transformer_of_every_kind_opens_bit_for_bit(models, tmp_path, naming, variant):
    pipe, base = models[variant]
    path = write(tmp_path / "model.safetensors", transformer(pipe, naming, "model.diffusion_model."))
    opened = videogen.load(path, base=base, device="cpu", memory="fast", kernel="sdpa")
    assert opened.card.dit == opened.dit.config == pipe.dit.config
    assert same(opened.dit, pipe.dit)
    assert not same(opened.dit, load_folder(base, components=("dit",)).dit)
    assert same(opened.vae, load_folder(base, components=("vae",)).vae)
    assert opened.card.name == "model"
    batch = tiny_batch(pipe.dit.config)
    with torch.no_grad():
        torch.testing.assert_close(opened.dit(*batch), pipe.dit(*batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("naming", NAMINGS)
def test_any_prefix_is_found(models, naming, prefix):
    pipe, _ = models["5B-I2V"]
    shapes = {name: tuple(t.shape) for name, t in transformer(pipe, naming, prefix).items()}
    found = find_parts(shapes, Path("file"), like=pipe.dit.config)
    assert list(found) == ["transformer"]
    assert found["transformer"].shapes == shapes_of(pipe.dit)


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_vae_alone_opens_into_a_base(models, tmp_path, naming):
    pipe, base = models["5B"]
    for prefix in ("", "first_stage_model.", "vae."):
        extra = {prefix + "loss.discriminator.weight": torch.zeros(2)} if naming == "sat" else {}
        path = write(tmp_path / "vae.safetensors", vae(pipe, naming, prefix), extra)
        parts = load_parts(card_of_file(path, base=base))
        assert same(parts.vae, pipe.vae)
        assert parts.vae.config == pipe.vae.config
        assert same(parts.dit, load_folder(base, components=("dit",)).dit)


def test_a_whole_pipeline_needs_only_a_tokenizer(models, tmp_path):
    pipe, base = models["5B-I2V"]
    t5 = {f"text_encoder.{n}": t for n, t in pipe.text_encoder.encoder.state_dict().items() if "embed_tokens" not in n}
    path = write(tmp_path / "all.safetensors", transformer(pipe, prefix="transformer."), vae(pipe, prefix="vae."), t5)
    parts = load_parts(card_of_file(path, base=base))
    assert same(parts.dit, pipe.dit)
    assert same(parts.vae, pipe.vae)
    assert same(parts.text_encoder, pipe.text_encoder)
    assert parts.scheduler_config == read_card(base).scheduler


def test_a_full_fine_tune_of_sat_is_read_without_its_frozen_copies(models, tmp_path):
    pipe, base = models["5B"]
    junk = {
        f"{p}{n}": torch.zeros(2)
        for p in ("", "module.")
        for n in ("conditioner.embedders.0.x", "first_stage_model.encoder.down.0.block.0.conv1.conv.weight")
    }
    tables = {f"{PREFIX}mixins.pos_embed.freqs_{kind}": torch.zeros(9, 3) for kind in ("sin", "cos")}
    path = write(tmp_path / "tuned.safetensors", transformer(pipe, "sat", PREFIX), junk, tables)
    parts = load_parts(card_of_file(path, base=base))
    assert same(parts.dit, pipe.dit)
    assert same(parts.vae, load_folder(base, components=("vae",)).vae)


def test_the_table_that_2b_stores_is_compared_with_the_computed_one(models, tmp_path):
    pipe, base = models["2B"]
    state = transformer(pipe, "sat", PREFIX)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        state[PREFIX + TABLE] = stored_table(pipe.dit).to(dtype)
        path = write(tmp_path / f"{dtype}.safetensors", state)
        assert same(load_parts(card_of_file(path, base=base)).dit, pipe.dit)
    state[PREFIX + TABLE][0, 9, 5] += 0.2
    path = write(tmp_path / "trained.safetensors", state)
    with pytest.raises(ModelNotFound, match="a table that was trained would be lost"):
        load_parts(card_of_file(path, base=base))


def test_averaged_copies_beside_the_weights_are_left_alone(models, tmp_path):
    pipe, base = models["5B"]
    other = {name: tensor + 1 for name, tensor in transformer(pipe, prefix="model_ema.").items()}
    path = write(tmp_path / "both.safetensors", transformer(pipe, prefix="model."), other)
    assert same(load_parts(card_of_file(path, base=base)).dit, pipe.dit)
    path = write(tmp_path / "ema.safetensors", other)
    assert not same(load_parts(card_of_file(path, base=base)).dit, pipe.dit)


def test_weights_of_eight_bits_are_widened(models, tmp_path):
    pipe, base = models["5B"]
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in transformer(pipe).items()}
    opened = load_parts(card_of_file(write(tmp_path / "fp8.safetensors", small), base=base), dtype=torch.float32)
    for name, tensor in to_theirs(opened.dit.state_dict(), DIT_RULES).items():
        assert torch.equal(tensor, small[name].float())


# ---- full size ------------------------------------------------------------------------------------------------------


def sparse(path: Path, shapes) -> Path:
    """A file of the right size with the right header; its gigabytes of zeros take no disk."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("name", FULL)
def test_every_published_transformer_is_recognised_at_full_size(tmp_path, name, naming):
    config, shapes = full_shapes(name)
    theirs = to_theirs(shapes, NAMINGS[naming][0])
    if naming == "sat" and not config.use_rotary_positional_embeddings:
        theirs[TABLE] = (1, 17776, 1920)
    prefix = "model.diffusion_model." if naming == "sat" else ""
    path = sparse(tmp_path / "weights.safetensors", {prefix + n: shape for n, shape in theirs.items()})
    card = card_of_file(path)
    row = read_row(FULL[name].published)
    assert replace(card.dit, resize_positions=False) == config
    assert (card.conditions, card.layout, card.height) == (row.conditions, row.layout, row.height)
    assert card.vae.scaling_factor == (1.15258426 if config.width == 1920 else 0.7)
    assert card.vae.invert_scale_latents == (config.patch_size_t is not None)
    assert card.scheduler["snr_shift_scale"] == (3.0 if config.width == 1920 else 1.0)
    assert card.licence == row.licence


def read_row(name):
    from videogen.weights.models import PUBLISHED

    return next(row for row in PUBLISHED if row.name == name)


def test_the_published_vae_is_recognised_at_full_size(tmp_path):
    with torch.device("meta"):
        shapes = shapes_of(VAE(VAEConfig()))
    for naming, (_, rules) in NAMINGS.items():
        found = find_parts(to_theirs(shapes, rules), tmp_path)
        assert found["vae"].format.naming == naming
        assert found["vae"].shapes == shapes


def test_what_shapes_cannot_tell_a_variant_tells(tmp_path):
    _, shapes = full_shapes("5b-i2v")
    path = sparse(tmp_path / "weights.safetensors", to_theirs(shapes, DIT_RULES))
    assert "last_frame" not in card_of_file(path).conditions
    card = card_of_file(path, variant="CogvideoX-Interpolation")
    assert "last_frame" in card.conditions
    named = path.rename(tmp_path / "CogvideoX-Interpolation.safetensors")  # as is its name
    assert card_of_file(named).conditions == card.conditions
    with pytest.raises(
        InvalidRequest, match=r"not of the shape of zai-org/CogVideoX-2b(.|\n)*alike are .*Interpolation"
    ):
        card_of_file(named, variant="CogVideoX-2b")
    with pytest.raises(InvalidRequest, match="there is no variant"):
        card_of_file(named, variant="CogVideoX-9b")


# ---- refused --------------------------------------------------------------------------------------------------------


def test_a_base_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    _, shapes = full_shapes("2b")
    path = sparse(tmp_path / "mine.safetensors", to_theirs(shapes, DIT_RULES))
    with pytest.raises(ModelNotFound) as error:
        videogen.load(path, offline=True)
    assert "mine.safetensors holds a transformer alone" in error.value.what
    assert "VAE, text encoder and tokenizer come from zai-org/CogVideoX-2b" in error.value.why
    assert "--base FOLDER" in error.value.hint
    assert len(str(error.value).splitlines()) == 3


def test_parts_without_a_model_ask_for_one(models, tmp_path):
    pipe, base = models["5B"]
    with pytest.raises(ModelNotFound, match=r"a VAE and no transformer(.|\n)*--base"):
        videogen.load(write(tmp_path / "vae.safetensors", vae(pipe)), offline=True)
    with pytest.raises(ModelNotFound, match=r"of a shape that no published model has(.|\n)*--base"):
        videogen.load(write(tmp_path / "dit.safetensors", transformer(pipe)), offline=True)
    with pytest.raises(InvalidRequest, match="base was given"):
        videogen.load(base, base=base)
    with pytest.raises(InvalidRequest, match="is a file"):
        videogen.load(tmp_path / "dit.safetensors", base=tmp_path / "vae.safetensors")


def test_a_base_of_another_kind_is_refused(models, tmp_path):
    pipe = tiny_pipeline(dit=replace(TINY_DIT, text_embed_dim=20), seed=1)
    path = write(tmp_path / "wide.safetensors", transformer(pipe))
    with pytest.raises(ModelNotFound, match="takes 20 numbers per text token, there are 16"):
        card_of_file(path, base=models["5B-I2V"][1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"lora.x.lora_A.weight": torch.zeros(1)}, "is a LoRA"),
        (lambda s: {"unet.conv.weight": torch.zeros(1)}, "no network of the CogVideoX family"),
        (lambda s: {}, "found: nothing"),
        (lambda s: {p + n: t.clone() for n, t in s.items() for p in ("a.", "b.")}, "several networks"),
        (lambda s: {"dit." + n: t for n, t in s.items()} | {"x": torch.zeros(1)}, "belong to no network: x"),
        (lambda s: s | {"transformer_blocks.0.attn1.to_q.scale": torch.zeros(1)}, "no rule covers"),
        (lambda s: {n: t for n, t in s.items() if n != "proj_out.weight"}, "proj_out.weight is missing"),
        (lambda s: s | {"proj_out.weight": torch.zeros(7)}, r"proj_out.weight is \[7\]"),
        (lambda s: s | {"patch_embed.proj.weight": torch.zeros(3, 3, 3)}, r"patch_embed.proj.weight is \[3, 3, 3\]"),
        (lambda s: s | {"norm_out.linear.bias": torch.zeros(9)}, r"norm_out.linear.bias is \[9\]"),
        (lambda s: s | {"transformer_blocks.90.norm2.norm.bias": torch.zeros(32)}, r"missing \("),
        (lambda s: s | {"transformer_blocks.99999.norm2.norm.bias": torch.zeros(32)}, "num_layers"),
    ],
)
def test_files_that_are_no_model_say_why(models, tmp_path, change, words):
    pipe, base = models["5B"]
    state = {name: tensor.clone() for name, tensor in transformer(pipe).items()}
    path = write(tmp_path / "file.safetensors", change(state))
    with pytest.raises((ModelNotFound, InvalidRequest), match=words) as error:
        load_parts(card_of_file(path, base=base))
    assert len(str(error.value).splitlines()) <= 3


def test_metadata_is_not_believed_about_the_weights(models, tmp_path):
    pipe, base = models["5B"]
    for text, words in (
        ("[", "metadata that cannot be read"),
        ('{"transformer": 3}', "metadata that cannot be read"),
        ('{"transformer": {"num_layers": 1000000}}', "num_layers"),
        ('{"facts": {"height": "x"}}', "height"),
    ):
        path = tmp_path / "file.safetensors"
        save_file(transformer(pipe), path, metadata={"videogen": text})
        with pytest.raises((ModelNotFound, InvalidRequest), match=words):
            card_of_file(path, base=base)
    save_file(transformer(pipe), path, metadata={"videogen": '{"transformer": {"num_layers": 9, "sample_height": 4}}'})
    assert card_of_file(path, base=base).dit.num_layers == pipe.dit.config.num_layers


def test_weights_of_nan_open_like_others(models, tmp_path):
    """They are numbers; a clip of them is refused when it is made."""
    pipe, base = models["5B"]
    state = {name: torch.full_like(tensor, torch.nan) for name, tensor in transformer(pipe).items()}
    assert load_parts(card_of_file(write(tmp_path / "nan.safetensors", state), base=base)).dit is not None


def test_a_card_needs_no_torch(models, tmp_path):
    pipe, base = models["5B"]
    path = write(tmp_path / "file.safetensors", transformer(pipe))
    code = f"from videogen.weights.card import read_card; from pathlib import Path; import sys; \
        print(read_card({str(path)!r}, base=Path({str(base)!r})).name, 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["file", "False"]


def test_diffusers_own_weights_come_back_byte_for_byte(models, tmp_path):
    """diffusers' folder, a single file of ours in each naming, a folder of ours: the same bytes."""
    from videogen.weights.convert import convert

    _, base = models["5B-I2V"]
    name = "transformer/diffusion_pytorch_model.safetensors"
    first = convert(base, tmp_path / "one.safetensors", to="single")
    assert load_file(first).keys() == load_file(base / name).keys()
    again = convert(first, tmp_path / "again", base=base)
    assert (again / name).read_bytes() == (base / name).read_bytes()
    assert read_card(again).conditions == read_card(base).conditions
    sat = convert(base, tmp_path / "sat", to="sat")
    back = convert(sat, tmp_path / "back", base=base)
    for file in (name, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (back / file).read_bytes() == (base / file).read_bytes()


def test_the_command_line_says_what_a_file_is(models, tmp_path, capsys):
    from videogen import cli

    pipe, base = models["5B"]
    path = write(tmp_path / "file.safetensors", transformer(pipe))
    assert cli.main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["file"] == str(path)
    assert facts["transformer"]["num_layers"] == pipe.dit.config.num_layers
    flags = ["--base", str(base), "--frames", "50", "--out", str(tmp_path / "clip.mp4")]
    assert cli.main(["text-to-video", "a", "--model", str(path), *flags]) == 2  # refused before weights are read
    assert "50" in capsys.readouterr().err
    assert cli.main(["text-to-video", "a", "--model", str(base), "--base", str(base)]) == 2
    assert "is a whole model" in capsys.readouterr().err


def test_of_a_base_only_what_is_read_is_compared(models, tmp_path):
    """Fetched in part, it lacks the weights that the file has; a file itself carries no hashes."""
    from videogen import load

    pipe, whole = models["5B"]
    base = Path(shutil.copytree(whole, tmp_path / "base"))
    for weights in (base / "transformer").glob("*.safetensors"):
        weights.unlink()
    path = write(tmp_path / "file.safetensors", transformer(pipe))
    opened = load(path, base=base, dtype="float32")
    assert same(opened.dit, pipe.dit)
    with pytest.raises(ModelNotFound, match="carries no hashes"):
        load(path, base=base, verify=True)
    with pytest.raises(InvalidRequest, match="not calibrated") as caught:
        opened.generate("a", step_cache=0.1)
    assert "convert" in caught.value.hint
    with (base / "vae" / "diffusion_pytorch_model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ModelNotFound, match="differ"):
        load(path, base=base)
