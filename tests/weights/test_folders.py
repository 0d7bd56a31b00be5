"""Model folders: diffusers -> ours -> diffusers -> ours keeps every byte; what does not fit is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from videogen.config import VAEConfig
from videogen.errors import FileError, InvalidRequest, ModelNotFound
from videogen.models.text import tiny_t5, word_tokenizer
from videogen.models.vae import VAE
from videogen.types import Conditioning
from videogen.weights.card import read_card
from videogen.weights.diffusers import (
    load_dit,
    load_folder,
    load_text_encoder,
    load_vae,
    save_folder,
    verify_folder,
)
from videogen.weights.hub import weight_names
from videogen.weights.load import weight_files

WORDS = ["a", "red", "blue", "circle", "square", "moves", "right", "on", "black"]
PROMPTS = ["a red circle moves right", "a blue square on black"]


def diffusers_pipeline(*, image: bool):
    """A random pipeline a few hundred kilobytes small: text to video, or the architecture of 5B-I2V."""
    torch.manual_seed(int(image))
    transformer = CogVideoXTransformer3DModel(
        num_layers=2,
        num_attention_heads=1,
        in_channels=8 if image else 4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=16,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=12,
        use_rotary_positional_embeddings=image,
        use_learned_positional_embeddings=image,
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_height=32,
        sample_width=32,
    )
    for parameter in [*transformer.parameters(), *vae.parameters()]:
        torch.nn.init.normal_(parameter, std=0.2)  # no two tensors alike: a swap of names changes the numbers
    pipeline = CogVideoXImageToVideoPipeline if image else CogVideoXPipeline
    return pipeline(
        tokenizer=word_tokenizer(WORDS, 12),
        text_encoder=tiny_t5(len(WORDS) + 3, d_model=16, num_heads=2, d_ff=32),
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One folder for each way diffusers writes a model."""
    root = tmp_path_factory.mktemp("theirs")
    made = {name: root / name for name in ("text", "image", "sharded", "fp16", "fp16-sharded")}
    diffusers_pipeline(image=False).save_pretrained(made["text"])
    image = diffusers_pipeline(image=True)
    image.save_pretrained(made["image"])
    image.save_pretrained(made["sharded"], max_shard_size="100KB")
    half = image.to(dtype=torch.float16)
    half.save_pretrained(made["fp16"], variant="fp16")
    half.save_pretrained(made["fp16-sharded"], variant="fp16", max_shard_size="50KB")
    assert len(list(made["sharded"].glob("*/*-of-*.safetensors"))) > 4
    assert len(list(made["fp16-sharded"].glob("*/*fp16-0*-of-*.safetensors"))) > 4
    return made


@pytest.fixture
def model(folders, tmp_path) -> Path:
    """A private copy of the text-to-video folder, to be damaged."""
    return shutil.copytree(folders["text"], tmp_path / "model")


def raw(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Every tensor below a folder as bytes, by part and name, whatever files they lie in."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        for name, t in load_file(path).items():
            data = t.contiguous().view(torch.uint8).numpy().tobytes()
            found[f"{path.parent.name}/{name}"] = (t.dtype, tuple(t.shape), data)
    return found


def save(folder: Path, parts, **options) -> Path:
    scheduler = parts.scheduler_config
    return save_folder(
        folder, dit=parts.dit, vae=parts.vae, text_encoder=parts.text_encoder, scheduler_config=scheduler, **options
    )


# ---- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "image", "sharded", "fp16", "fp16-sharded"])
def test_round_trip_keeps_every_byte(folders, tmp_path, kind):
    """diffusers -> ours -> diffusers -> ours."""
    theirs = folders[kind]
    pipeline = CogVideoXPipeline if kind == "text" else CogVideoXImageToVideoPipeline
    ours = save(tmp_path / "ours", load_folder(theirs), model_index_class=pipeline.__name__)
    assert raw(ours) == raw(theirs)

    half = "fp16" in kind
    opened = pipeline.from_pretrained(ours, **({"torch_dtype": torch.float16} if half else {}))
    opened.save_pretrained(tmp_path / "back")
    # T5's `wo` runs in float32 and transformers writes it so: the same values in other bytes, which stay as they come
    upcast = {name for name in raw(theirs) if half and name.endswith(".wo.weight")}
    assert without(upcast, raw(tmp_path / "back")) == without(upcast, raw(theirs))

    again = save(tmp_path / "again", load_folder(tmp_path / "back"), model_index_class=pipeline.__name__)
    assert raw(again) == raw(theirs)


def without(names: set[str], tensors: dict) -> dict:
    return {name: value for name, value in tensors.items() if name not in names}


def test_saved_configs_say_what_theirs_said(folders, tmp_path):
    ours = save(tmp_path / "ours", load_folder(folders["image"]), model_index_class="CogVideoXImageToVideoPipeline")
    for name in ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        mine, theirs = (json.loads((folder / name).read_text()) for folder in (ours, folders["image"]))
        if name == "model_index.json":  # transformers 4 knows this tokenizer by the older name
            assert mine.pop("tokenizer") == ["transformers", "PreTrainedTokenizerFast"]
            theirs.pop("tokenizer")
        mine.pop("_name_or_path", None), theirs.pop("_name_or_path", None)
        assert mine == {k: v for k, v in theirs.items() if k in mine}
        assert {k for k in theirs if k not in mine} <= {"_use_default_values"}


@pytest.mark.parametrize("limit", ["60KB", 200_000])
def test_saved_shards_open_in_diffusers_and_here(folders, tmp_path, limit):
    parts = load_folder(folders["image"])
    ours = save(tmp_path / "ours", parts, max_shard_size=limit, model_index_class="CogVideoXImageToVideoPipeline")
    shards = sorted((ours / "transformer").glob("*.safetensors"))
    assert len(shards) > 1
    assert (ours / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    bytes_of = lambda path: sum(t.nbytes for t in load_file(path).values())  # noqa: E731
    largest = max(t.nbytes for t in parts.dit.state_dict().values())
    assert all(bytes_of(path) <= max(largest, 60_000 if limit == "60KB" else limit) for path in shards)
    assert raw(ours) == raw(folders["image"])
    load_folder(ours)
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(ours)
    pipeline.save_pretrained(tmp_path / "back")
    assert raw(tmp_path / "back") == raw(folders["image"])


def test_loaded_text_encoder_equals_transformers_own(folders):
    for kind, dtype in (("text", torch.float32), ("fp16", torch.float16)):
        ours = load_text_encoder(folders[kind])
        variant = "fp16" if kind == "fp16" else None
        theirs = T5EncoderModel.from_pretrained(folders[kind] / "text_encoder", variant=variant, dtype=dtype).eval()
        assert {n: t.dtype for n, t in ours.encoder.state_dict().items()} == {
            n: t.dtype for n, t in theirs.state_dict().items()
        }
        ids = ours.tokenizer(PROMPTS, padding="max_length", max_length=12, return_tensors="pt").input_ids
        with torch.no_grad():
            assert torch.equal(ours(PROMPTS), theirs(ids).last_hidden_state)
        assert ours.encoder.encoder.embed_tokens.weight is ours.encoder.shared.weight
        assert ours.max_length == 12


# ---- what is loaded -------------------------------------------------------------------------------------------------


def test_dtype_of_the_files_is_kept_unless_another_is_asked_for(folders):
    parts = load_folder(folders["fp16"])
    assert {t.dtype for t in [*parts.dit.state_dict().values(), *parts.vae.state_dict().values()]} == {torch.float16}
    parts = load_folder(folders["fp16"], dtype=torch.float64, components=("dit", "text_encoder"))
    modules = (parts.dit, parts.text_encoder.encoder)
    assert {t.dtype for m in modules for t in m.state_dict().values()} == {torch.float64}
    assert parts.vae is None
    assert parts.scheduler_config is None


@pytest.mark.parametrize("kind", ["text", "image"])
@torch.no_grad()
def test_loaded_models_compute_what_theirs_compute(folders, kind):
    parts = load_folder(folders[kind], components=("dit", "vae"), dtype=torch.float64)
    transformer = CogVideoXTransformer3DModel.from_pretrained(folders[kind] / "transformer").double().eval()
    vae = AutoencoderKLCogVideoX.from_pretrained(folders[kind] / "vae").double().eval()
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731

    x, text, t = draw(1, 2, parts.dit.config.in_channels, 4, 4), draw(1, 12, 16), torch.tensor([500])
    rotary = None
    if kind == "image":
        rotary = get_3d_rotary_pos_embed(64, ((0, 0), (2, 2)), (2, 2), 2)
    theirs = transformer(x, text, t, image_rotary_emb=rotary).sample
    torch.testing.assert_close(parts.dit(x, t, Conditioning(text=text)), theirs, rtol=1e-5, atol=1e-6)

    pixels, latents = draw(1, 3, 5, 32, 32), draw(1, 4, 2, 4, 4)
    moments = torch.cat(parts.vae.moments(pixels), dim=1)
    torch.testing.assert_close(moments, vae.encode(pixels).latent_dist.parameters)
    scale = vae.config.scaling_factor
    torch.testing.assert_close(parts.vae.decode(latents), vae.decode(latents / scale).sample)


def test_modules_come_ready_to_run_and_to_train(folders):
    parts = load_folder(folders["image"])
    for module in (parts.dit, parts.vae, parts.text_encoder.encoder):
        assert not module.training
        assert all(p.requires_grad for p in module.parameters())
        assert not any(t.is_meta for t in [*module.parameters(), *module.buffers()])
    assert parts.dit.position_table.shape == (1, 12 + 8, 64)
    assert parts.scheduler_config["_class_name"] == "CogVideoXDDIMScheduler"


def test_a_part_may_be_given_by_its_own_folder(folders):
    folder = folders["sharded"]
    assert same(load_dit(folder / "transformer"), load_dit(folder))
    assert same(load_vae(folder / "vae"), load_vae(folder))
    assert same(load_text_encoder(folder / "text_encoder"), load_text_encoder(folder))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_plain_files_win_over_a_variant(folders, tmp_path):
    folder = shutil.copytree(folders["text"] / "vae", tmp_path / "vae")
    shutil.copy(folders["fp16"] / "vae" / "diffusion_pytorch_model.fp16.safetensors", folder)
    assert weight_files(folder, "diffusion_pytorch_model") == [folder / "diffusion_pytorch_model.safetensors"]


def test_index_of_a_variant_is_found_under_both_names(folders, tmp_path):
    folder = shutil.copytree(folders["fp16-sharded"] / "transformer", tmp_path / "transformer")
    first = load_dit(folder)
    index = folder / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.rename(folder / "diffusion_pytorch_model.fp16.safetensors.index.json")
    assert same(load_dit(folder), first)
    shutil.copytree(folders["sharded"] / "transformer", folder, dirs_exist_ok=True)
    assert not any("fp16" in path.name for path in weight_files(folder, "diffusion_pytorch_model"))


def test_what_is_fetched_is_what_is_opened(tmp_path):
    names = ["model.fp16.safetensors", "model-00001-of-00002.safetensors", "model.safetensors"]
    for count in (1, 2, 3):  # one variant; beside it shards without an index, which cannot be opened; the plain file
        (tmp_path / names[count - 1]).touch()
        opened = [path.name for path in weight_files(tmp_path, "model")]
        assert opened == weight_names(names[:count], "model")[0] == [names[2 if count == 3 else 0]]


@pytest.mark.gpu
def test_weights_go_straight_to_the_device(folders):
    parts = load_folder(folders["image"], device="cuda")
    modules = (parts.dit, parts.vae, parts.text_encoder)
    assert {t.device.type for module in modules for t in module.state_dict().values()} == {"cuda"}


def test_spiece_model_is_kept_for_older_readers(folders, tmp_path):
    parts = load_folder(folders["text"])
    (tmp_path / "spiece.model").write_bytes(b"vocabulary")
    parts.text_encoder.tokenizer.vocab_file = str(tmp_path / "spiece.model")
    ours = save(tmp_path / "ours", parts)
    assert (ours / "tokenizer" / "spiece.model").read_bytes() == b"vocabulary"


# ---- what is written ------------------------------------------------------------------------------------------------


def test_card_reads_the_facts_that_were_saved(folders, tmp_path):
    facts = {"name": "small", "conditions": ["text"], "height": 32, "width": 32, "num_frames": 5, "fps": 8}
    card = read_card(save(tmp_path / "ours", load_folder(folders["text"]), extra=facts))
    assert (card.name, card.conditions, card.height, card.num_frames) == ("small", ("text",), 32, 5)


def test_files_follow_the_umask_and_nothing_temporary_stays(folders, tmp_path):
    before = os.umask(0o022)
    try:
        ours = save(tmp_path / "ours", load_folder(folders["text"]))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in ours.rglob("*") if p.is_file()} == {0o644}
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_nothing_is_overwritten_unasked(folders, tmp_path):
    parts = load_folder(folders["text"])
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "README.md").write_text("mine")
    with pytest.raises(FileError, match="exists"):
        save(tmp_path / "ours", parts)
    assert [p.name for p in (tmp_path / "ours").iterdir()] == ["README.md"]


def test_overwriting_leaves_no_old_shards_and_no_foreign_harm(folders, tmp_path):
    image = load_folder(folders["image"])
    ours = save(tmp_path / "ours", image, max_shard_size="60KB")
    (ours / "README.md").write_text("mine")
    save(ours, load_folder(folders["text"]), overwrite=True)
    assert raw(ours) == raw(folders["text"])
    assert (ours / "README.md").read_text() == "mine"
    verify_folder(ours)
    parts = load_folder(ours)  # its weights are mapped from the files that are now replaced
    save(ours, parts, overwrite=True)
    assert raw(ours) == raw(folders["text"])
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_failed_save_leaves_nothing(folders, tmp_path, monkeypatch):
    parts = load_folder(folders["text"])
    monkeypatch.setattr(parts.text_encoder.tokenizer, "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(tmp_path / "ours", parts)
    assert not list(tmp_path.iterdir())


def test_views_of_one_buffer_are_saved_as_themselves(folders, tmp_path):
    """Flat optimisers and EMA keep all parameters in one buffer."""
    parts = load_folder(folders["text"])
    flat = torch.nn.utils.parameters_to_vector(parts.dit.parameters()).detach()
    torch.nn.utils.vector_to_parameters(flat, parts.dit.parameters())
    assert raw(save(tmp_path / "ours", parts)) == raw(folders["text"])


def test_verify_names_damaged_and_missing_files(folders, tmp_path):
    ours = save(tmp_path / "ours", load_folder(folders["text"]))
    verify_folder(ours)
    recorded = json.loads((ours / "videogen.json").read_text())["sha256"]
    files = {p.relative_to(ours).as_posix() for p in ours.rglob("*") if p.is_file()}
    assert set(recorded) == files - {"videogen.json"}

    weights = ours / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (ours / "transformer" / "config.json").unlink()
    with pytest.raises(ModelNotFound) as error:
        verify_folder(ours)
    assert "missing: transformer/config.json; damaged: vae/diffusion_pytorch_model.safetensors" in str(error.value)


def test_verify_without_hashes_is_an_error(model):
    (model / "videogen.json").write_text("{}")
    with pytest.raises(ModelNotFound, match="carries no hashes"):
        verify_folder(model)


def test_another_chunk_plan_is_refused_by_diffusers(folders, tmp_path):
    parts = load_folder(folders["text"])
    vae = VAE(VAEConfig(**vars(parts.vae.config) | {"frame_batch_size": 4}))
    vae.load_state_dict(parts.vae.state_dict())
    ours = save_folder(
        tmp_path / "ours",
        dit=parts.dit,
        vae=vae,
        text_encoder=parts.text_encoder,
        scheduler_config=parts.scheduler_config,
    )
    assert load_vae(ours).config.frame_batch_size == 4
    assert read_card(ours).vae.frame_batch_size == 4
    with pytest.raises((AttributeError, ValueError), match="VideogenVAE"):
        CogVideoXPipeline.from_pretrained(ours)


# ---- what is refused ------------------------------------------------------------------------------------------------

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def rewrite(path: Path, change) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), "no rule covers: extra.weight"),
        (
            lambda s: s.update({"ofs_embedding.linear_1.bias": torch.zeros(1)}),
            r"unknown \(1\): ofs_embedding.linear_1.bias",
        ),
        (lambda s: s.pop("norm_final.bias"), r"missing \(1\): norm_final.bias"),
        (lambda s: s.update({"norm_final.bias": torch.zeros(3)}), r"norm_final.bias is \[3\], should be \[64\]"),
    ],
    ids=["uncovered", "unknown", "missing", "shape"],
)
def test_tensors_that_do_not_fit_are_named(model, change, words):
    rewrite(model / WEIGHTS, change)
    with pytest.raises(ModelNotFound, match=words):
        load_dit(model)


def test_text_encoder_is_as_strict(model):
    rewrite(
        model / "text_encoder" / "model.safetensors", lambda s: s.update({"lm_head.weight": s.pop("shared.weight")})
    )
    with pytest.raises(ModelNotFound, match=r"missing \(1\): shared.weight; unknown \(1\): lm_head.weight"):
        load_text_encoder(model)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_unknown_class_in_the_index_lists_the_supported_ones(model, part):
    edit(model / "model_index.json", **{part: ["diffusers", "WanThing"]})
    with pytest.raises(ModelNotFound, match=r"class WanThing(.|\n)*supported: \w+"):
        load_folder(model)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "EvilTokenizer"}, "supported: T5Tokenizer"),
        ("transformer/config.json", {"_class_name": "Wan3DModel"}, "supported: CogVideoXTransformer3DModel"),
        ("vae/config.json", {"_class_name": None}, "supported: AutoencoderKLCogVideoX"),
        ("text_encoder/config.json", {"architectures": ["T5Model"]}, "supported: T5EncoderModel"),
        ("model_index.json", {"image_encoder": ["transformers", "CLIPVisionModel"]}, "part 'image_encoder'"),
        ("model_index.json", {"_class_name": "WanPipeline"}, "supported: CogVideoXPipeline"),
    ],
    ids=["tokenizer", "transformer", "vae", "text_encoder", "part", "pipeline"],
)
def test_unknown_class_in_the_files_lists_the_supported_ones(model, file, changes, words):
    edit(model / file, **changes)
    with pytest.raises(ModelNotFound, match=words):
        load_folder(model)


def test_unknown_component_is_a_bad_request(model):
    with pytest.raises(InvalidRequest, match="no component 'unet'"):
        load_folder(model, components=("unet",))


def test_unknown_setting_is_named(model):
    edit(model / "transformer" / "config.json", patch_siez=2)
    with pytest.raises(InvalidRequest, match="did you mean 'patch_size"):
        load_dit(model)


def test_pickles_are_refused_and_never_opened(model):
    weights = model / WEIGHTS
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(ModelNotFound, match=r"only as pickles: diffusion_pytorch_model\.bin") as error:
        load_dit(model)
    assert "safetensors" in error.value.hint


def test_incomplete_and_damaged_files_are_named(folders, model, tmp_path):
    weights = model / WEIGHTS
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelNotFound, match="damaged or cut short"):
        load_dit(model)
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(ModelNotFound, match="git lfs pull"):
        load_dit(model)
    weights.unlink()
    with pytest.raises(ModelNotFound, match=r"has no diffusion_pytorch_model\.safetensors"):
        load_dit(model)

    sharded = shutil.copytree(folders["sharded"] / "transformer", tmp_path / "transformer")
    shard = next(sharded.glob("*-00002-of-*"))
    shard.unlink()
    with pytest.raises(ModelNotFound, match=f"lacks 1 of .*{shard.name}"):
        load_dit(sharded)
    (sharded / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(ModelNotFound, match=r"shards but no diffusion_pytorch_model\.safetensors\.index\.json"):
        load_dit(sharded)


def test_index_may_not_point_outside_its_folder(folders, tmp_path):
    sharded = shutil.copytree(folders["sharded"] / "transformer", tmp_path / "transformer")
    index = sharded / "diffusion_pytorch_model.safetensors.index.json"
    edit(index, weight_map={"norm_final.weight": "../secret.safetensors"})
    with pytest.raises(ModelNotFound, match="points outside"):
        load_dit(sharded)
    index.write_text("{}")
    with pytest.raises(ModelNotFound, match="not an index"):
        load_dit(sharded)


def test_two_variants_and_no_plain_file_is_a_question(folders, tmp_path):
    folder = shutil.copytree(folders["fp16"] / "vae", tmp_path / "vae")
    name = "diffusion_pytorch_model.{}.safetensors"
    shutil.copy(folder / name.format("fp16"), folder / name.format("bf16"))
    with pytest.raises(ModelNotFound, match="several variants: bf16, fp16"):
        load_vae(folder)


def test_missing_part_is_named(model):
    shutil.rmtree(model / "vae")
    with pytest.raises(ModelNotFound, match="no vae in"):
        load_folder(model)


def test_shard_size_must_be_a_size(folders, tmp_path):
    with pytest.raises(InvalidRequest, match="no size"):
        save(tmp_path / "ours", load_folder(folders["text"]), max_shard_size="ten")


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors",
        "/etc/passwd",
        "a/../../b.safetensors",
        "C:\\b.safetensors",
        "b\0.safetensors",
        "b.bin",
        "..",
        "",
        "-rf.safetensors",
        3,
        None,
        ["x"],
    ],
)
def test_an_index_names_safetensors_beside_it_or_is_refused(folders, tmp_path, name):
    folder = shutil.copytree(folders["sharded"] / "transformer", tmp_path / "transformer")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"][next(iter(values["weight_map"]))] = name
    index.write_text(json.dumps(values))
    with pytest.raises(ModelNotFound, match=r"outside its folder|not an index"):
        load_dit(folder)


def test_an_index_of_a_hundred_thousand_entries_is_answered_at_once(folders, tmp_path):
    folder = shutil.copytree(folders["sharded"] / "transformer", tmp_path / "transformer")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    values = {"weight_map": {f"t{i}": f"s{i}.safetensors" for i in range(100_000)}}
    index.write_text(json.dumps(values))
    started = time.process_time()
    with pytest.raises(ModelNotFound):
        load_dit(folder)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "name", ["CogVideoX_Fun_Pipeline_Inpaint", "CogVideoXFunPipeline", "CogVideoXInterpolationPipeline"]
)
def test_folders_of_derivatives_open(model, tmp_path, name):
    """Their own pipeline names, and settings of the transformer that the others do not have."""
    edit(model / "model_index.json", _class_name=name)
    edit(model / "transformer" / "config.json", add_noise_in_inpaint_model=True, is_train_cross=False)
    edit(model / "transformer" / "config.json", cross_attn_in_channels=16, cross_attn_num_heads=16)
    parts = load_folder(model)
    assert parts.dit.config.add_noise_in_inpaint_model
    saved = json.loads((save(tmp_path / "ours", parts) / "transformer" / "config.json").read_text())
    assert saved["add_noise_in_inpaint_model"] is True
    assert "is_train_cross" not in saved
    edit(model / "transformer" / "config.json", is_train_cross=True)  # a network of other modules
    with pytest.raises(InvalidRequest, match="is_train_cross"):
        load_dit(model)
