"""Model folders in diffusers' layout: our native format on disk, and everybody's.

    model_index.json   transformer/   vae/   text_encoder/   tokenizer/   scheduler/   videogen.json (ours)

What is saved here opens in diffusers and the reverse, with every byte of the weights kept.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videogen.config import DiTConfig, VAEConfig, from_dict, to_dict
from videogen.data.files import sha256_of, sync
from videogen.errors import FileError, InvalidRequest, ModelNotFound
from videogen.models.dit import DiT
from videogen.models.text import TextEncoder
from videogen.models.vae import VAE
from videogen.weights.card import CLASSES, Card
from videogen.weights.guard import check_folder, check_tokenizer, read_json, t5_settings
from videogen.weights.hub import select
from videogen.weights.load import build, read_tensors, shapes_of, weight_files, write_json, write_tensors
from videogen.weights.table import DIT_RULES, VAE_RULES, Rules, count, listed, to_theirs

PIPELINES = (
    "CogVideoXPipeline",
    "CogVideoXImageToVideoPipeline",
    "CogVideoXVideoToVideoPipeline",
    "CogVideoXFunControlPipeline",
)
# Derivatives name their own pipelines over the same parts: opened, and saved under diffusers' names.
OPENED = (
    *PIPELINES,
    "CogVideoXFunPipeline",
    "CogVideoXFunInpaintPipeline",
    "CogVideoX_Fun_Pipeline",
    "CogVideoX_Fun_Pipeline_Inpaint",
    "CogVideoX_Fun_Pipeline_Control",
    "CogVideoXInterpolationPipeline",
)
# transformers 5 has one T5 tokenizer and calls the general one TokenizersBackend; older folders use the older names.
TOKENIZERS = {
    "T5Tokenizer": "T5Tokenizer",
    "T5TokenizerFast": "T5Tokenizer",
    "PreTrainedTokenizerFast": "PreTrainedTokenizerFast",
    "TokenizersBackend": "PreTrainedTokenizerFast",
}
PARTS = ("dit", "vae", "text_encoder", "scheduler")
DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"
VERIFIED = 2**30  # bytes of weights below which opening a model compares their hashes
TIED = "encoder.embed_tokens.weight"  # T5: the same tensor as shared.weight


@dataclass(frozen=True)
class Parts:
    """What a folder holds; None for the parts that were not asked for."""

    dit: DiT | None = None
    vae: VAE | None = None
    text_encoder: TextEncoder | None = None
    scheduler_config: dict[str, Any] | None = None


# ---- reading --------------------------------------------------------------------------------------------------------


def load_folder(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    components: Collection[str] = PARTS,
) -> Parts:
    """The asked-for parts of a model folder. Weights keep the files' dtype unless one is given."""
    if unknown := [name for name in components if name not in PARTS]:
        raise InvalidRequest(f"there is no component {unknown[0]!r}.", why=f"there are {', '.join(PARTS)}.")
    folder = Path(folder)
    check_index(folder)
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    return Parts(
        dit=load_dit(folder, **where) if "dit" in components else None,
        vae=load_vae(folder, **where) if "vae" in components else None,
        text_encoder=load_text_encoder(folder, **where) if "text_encoder" in components else None,
        scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json")
        if "scheduler" in components
        else None,
    )


def load_dit(folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> DiT:
    """The DiT of a model folder, or of a `transformer` folder itself."""
    folder, values = _component(Path(folder), "transformer")
    config = from_dict(DiTConfig, values, where="transformer/config.json")
    return build(lambda: DiT(config), weight_files(folder, DIFFUSERS_STEM), DIT_RULES, device=device, dtype=dtype)


def load_vae(folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> VAE:
    """The VAE of a model folder, or of a `vae` folder itself."""
    folder, values = _component(Path(folder), "vae")
    config = from_dict(VAEConfig, values, where="vae/config.json")
    return build(lambda: VAE(config), weight_files(folder, DIFFUSERS_STEM), VAE_RULES, device=device, dtype=dtype)


def load_text_encoder(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    file: Path | None = None,
    names: Mapping[str, str] | None = None,
) -> TextEncoder:
    """T5 and its tokenizer of a model folder, or of a `text_encoder` folder. `max_length=None`: the transformer's.

    `file` holds the weights in place of the folder's, under `names` (see `videogen.weights.load.build`).
    """
    from transformers import T5Config, T5EncoderModel

    folder, values = _component(Path(folder), "text_encoder")
    settings = t5_settings(values, where="text_encoder/config.json")
    try:
        with torch.device("meta"):
            encoder = T5EncoderModel(T5Config.from_dict(settings))
    except Exception as error:  # transformers' own checks raise their own kinds
        raise ModelNotFound(
            f"{folder / 'config.json'} describes no T5 encoder.",
            why=(str(error).strip().splitlines() or [type(error).__name__])[0],
            hint="fetch or copy the model again.",
        ) from error
    files = [file] if file else weight_files(folder, TRANSFORMERS_STEM)
    state = read_tensors(files, shapes_of(encoder), optional={TIED}, device=device, dtype=dtype, names=names)
    state[TIED] = state["shared.weight"]
    encoder.config.dtype = state["shared.weight"].dtype
    state = {name: tensor.to(text_dtype(name, tensor.dtype)) for name, tensor in state.items()}
    encoder.load_state_dict(state, strict=True, assign=True)
    encoder.tie_weights()
    beside = folder.parent / "transformer" / "config.json"
    length = read_json(beside).get("max_text_seq_length", 226) if beside.is_file() else 226
    return TextEncoder(encoder.eval(), _load_tokenizer(folder), max_length or length)


def text_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a weight of T5 is used in, as in transformers: the second linear layer overflows in float16, so float32."""
    return torch.float32 if dtype == torch.float16 and name.endswith(".wo.weight") else dtype


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model folder, without its weights: enough to count a prompt's tokens."""
    return _load_tokenizer(Path(folder) / "text_encoder")


def _load_tokenizer(text_encoder: Path) -> Any:
    """The tokenizer in the same folder or in the one beside it, by a known class; code in a model folder never runs."""
    import transformers

    beside = text_encoder.parent / "tokenizer"
    folder = text_encoder if (text_encoder / "tokenizer_config.json").is_file() else beside
    name = check_tokenizer(folder).get("tokenizer_class")
    if not isinstance(name, str) or name not in TOKENIZERS:
        raise _unsupported(folder, "tokenizer", name, TOKENIZERS)
    try:
        return getattr(transformers, TOKENIZERS[name]).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and its parsers raise their own kinds
        raise ModelNotFound(
            f"{folder} holds no readable tokenizer.",
            why=(str(error).strip().splitlines() or [type(error).__name__])[0],
            hint="fetch or copy the model again.",
        ) from error


def check_index(folder: Path) -> None:
    """Refuse a `model_index.json` that names a pipeline, a part or a class we do not know."""
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") not in OPENED:
        raise _unsupported(folder, "pipeline", index.get("_class_name"), OPENED)
    known = {**CLASSES, "tokenizer": tuple(TOKENIZERS), "scheduler": None}
    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, list) or not value or value[-1] is None:
            continue  # the file's own, a plain setting, or a part that is absent on purpose
        if part not in known:
            raise ModelNotFound(
                f"{folder} has a part {part!r} ({value[-1]}).",
                why=f"models here are made of {', '.join(known)}.",
                hint="choose a model of the CogVideoX family.",
            )
        if (classes := known[part]) and value[-1] not in classes:
            raise _unsupported(folder, part, value[-1], classes)


def _component(folder: Path, part: str) -> tuple[Path, dict[str, Any]]:
    """The folder of one part and its config: `folder/part`, or `folder` where it is that part itself."""
    check_folder(folder)
    inner = folder / part
    if not (inner / "config.json").is_file():
        if not (folder / "config.json").is_file():
            raise ModelNotFound(
                f"there is no {part} in {folder}.",
                why=f"neither {part}/config.json nor config.json is there.",
                hint=f"give a model folder in diffusers' layout or a {part} folder.",
            )
        inner = folder
    config = read_json(inner / "config.json")
    others = config.get("architectures")
    name = config.get("_class_name") or (others[0] if isinstance(others, list) and others else None)
    if name not in CLASSES[part]:
        raise _unsupported(inner, part, name, CLASSES[part])
    return inner, config


def _unsupported(folder: Path, part: str, name: Any, known: Collection[str]) -> ModelNotFound:
    return ModelNotFound(
        f"{folder} has a {part} of class {name}.",
        why=f"supported: {', '.join(known)}.",
        hint="choose a model of the CogVideoX family.",
    )


# ---- writing --------------------------------------------------------------------------------------------------------


def pipeline_class(card: Card) -> str:
    """The pipeline of diffusers that a model is opened with there."""
    if card.layout in ("control", "pose"):
        return "CogVideoXFunControlPipeline"
    return "CogVideoXImageToVideoPipeline" if "first_frame" in card.conditions else "CogVideoXPipeline"


def save_folder(
    folder: str | Path,
    *,
    dit: DiT,
    vae: VAE,
    text_encoder: TextEncoder | Path,
    scheduler_config: dict[str, Any],
    model_index_class: str = "CogVideoXPipeline",
    extra: dict[str, Any] | None = None,
    max_shard_size: int | str = "10GB",
    overwrite: bool = False,
) -> Path:
    """Write a model folder, whole or not at all. `extra` are the facts of `videogen.json` (videogen.weights.card).

    The text encoder may be a model folder: then its files, and those of its tokenizer, are copied as they are.
    Everything is written beside the folder and renamed into place; with `overwrite` other files in it are left alone.
    """
    folder = Path(folder).absolute()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not overwrite):
        raise FileError(
            f"{folder} exists.", why="nothing is overwritten unasked.", hint="overwrite=True, or another name."
        )
    if model_index_class not in PIPELINES:
        raise InvalidRequest(f"there is no pipeline {model_index_class!r}.", hint=f"one of {', '.join(PIPELINES)}.")

    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    staging.mkdir()
    try:
        _write_network(staging / "transformer", dit.state_dict(), DIT_RULES, _config(dit), max_shard_size)
        _write_network(staging / "vae", vae.state_dict(), VAE_RULES, _config(vae), max_shard_size)
        _write_text(staging, text_encoder, max_shard_size)
        (staging / "scheduler").mkdir()
        write_json(staging / "scheduler" / "scheduler_config.json", scheduler_config)
        write_json(
            staging / "model_index.json",
            {
                "_class_name": model_index_class,
                "_diffusers_version": version("diffusers"),
                "scheduler": ["diffusers", scheduler_config["_class_name"]],
                "text_encoder": ["transformers", "T5EncoderModel"],
                "tokenizer": ["transformers", _tokenizer_class(text_encoder)],
                "transformer": ["diffusers", _config(dit)["_class_name"]],
                "vae": ["diffusers", _config(vae)["_class_name"]],
            },
        )
        write_json(staging / "videogen.json", {**(extra or {}), "bytes": sizes(staging), "sha256": hashes(staging)})
        _move(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def save_vae(folder: str | Path, vae: VAE) -> Path:
    """Write a VAE alone, as the `vae` folder of a model. A folder that exists is replaced."""
    folder = Path(folder).absolute()
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    staging.parent.mkdir(parents=True, exist_ok=True)
    _write_network(staging, vae.state_dict(), VAE_RULES, _config(vae), "10GB")
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file below `folder`."""
    return {name: sha256_of(folder / name) for name in _below(folder)}


def sizes(folder: Path) -> dict[str, int]:
    """Relative path -> bytes of every file below `folder`."""
    return {name: (folder / name).stat().st_size for name in _below(folder)}


def _below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def verify_on_load(folder: str | Path, *, verify: bool | None = None, replaced: Collection[str] = ()) -> None:
    """What opening a model checks, where its `videogen.json` has hashes: `verify_folder`, else the sizes alone.

    None: hashes of a model below 1 GiB (a second or two), the sizes of a larger one. A model of others is not checked:
    nothing is recorded of it. `replaced`: the parts whose weights come from a single file, and need not be in the
    folder.
    """
    folder = Path(folder)
    path = folder / "videogen.json"
    recorded = read_json(path).get("sha256") if path.is_file() else None
    if not recorded:
        if verify:
            verify_folder(folder)  # says that there is nothing to compare with
        return
    if verify is None:
        verify = sum(p.stat().st_size for p in folder.glob("*/*.safetensors")) < VERIFIED
    verify_folder(folder, contents=verify, replaced=replaced)


def verify_folder(folder: str | Path, *, contents: bool = True, replaced: Collection[str] = ()) -> None:
    """Compare files with `videogen.json`: size, and with `contents` sha256; of `replaced` parts no weights.

    Raises ModelNotFound that names the damaged and missing files, or if there are no hashes.
    """
    folder = Path(folder)
    facts = read_json(folder / "videogen.json")
    recorded, lengths = (dict(v) if isinstance(v := facts.get(key), dict) else {} for key in ("sha256", "bytes"))
    if strange := [name for name in {**recorded, **lengths} if not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", name)]:
        raise ModelNotFound(
            f"{folder / 'videogen.json'} has a hash of {strange[0]!r}.",
            why="a model's files lie in its folder and in those of its parts.",
            hint="fetch or copy the model again.",
        )
    here = [n for n in recorded if not (".safetensors" in n and n.partition("/")[0] in replaced)]
    missing = [name for name in here if not (folder / name).is_file()]
    there = [name for name in here if name not in missing]
    damaged = [name for name in there if lengths.get(name, size := (folder / name).stat().st_size) != size]
    if contents:
        damaged += [n for n in there if n not in damaged and sha256_of(folder / n) != recorded[n]]
    if not recorded or missing or damaged:
        problems = {"missing": missing, "damaged": damaged}
        why = "; ".join(f"{kind}: {listed(names)}" for kind, names in problems.items() if names)
        raise ModelNotFound(
            f"{folder}: {count(len(missing) + len(damaged), 'file')} differ from those that were saved."
            if recorded
            else f"{folder} carries no hashes.",
            why=why or "videogen.json has no sha256 entries.",
            hint="fetch or copy the model again; or take their entries out of videogen.json, if the change is yours.",
        )


def _config(module: DiT | VAE) -> dict[str, Any]:
    """`config.json`. What diffusers' classes cannot express gets a class name of ours, which diffusers refuses."""
    values = to_dict(module.config)
    published, *ours = CLASSES["transformer" if isinstance(module, DiT) else "vae"]
    name = ours[0] if {"frame_batch_size", "latent_batch_size"} & values.keys() else published
    return {"_class_name": name, "_diffusers_version": version("diffusers")} | values


def _write_network(
    folder: Path, state: dict[str, Tensor], rules: Rules, config: dict[str, Any], max_shard_size: int | str
) -> None:
    folder.mkdir()
    write_json(folder / "config.json", config)
    write_tensors(folder, DIFFUSERS_STEM, to_theirs(state, rules), max_shard_size=max_shard_size)


def _write_text(staging: Path, text: TextEncoder | Path, max_shard_size: int | str) -> None:
    """`text_encoder/` and `tokenizer/` as transformers writes them."""
    if isinstance(text, Path):
        weights = weight_files(text / "text_encoder", TRANSFORMERS_STEM)
        names = [f"text_encoder/{name}" for name in ("config.json", *(path.name for path in weights))]
        names += [path.relative_to(text).as_posix() for path in (text / "text_encoder").glob("*.index*.json")]
        names += [path.relative_to(text).as_posix() for path in (text / "tokenizer").iterdir()]
        for part in ("text_encoder", "tokenizer"):
            (staging / part).mkdir()
        for name in [name for name in names if name in select(names)[0]]:
            shutil.copyfile(text / name, staging / name)
            sync(staging / name)
        return
    folder = staging / "text_encoder"
    folder.mkdir()
    encoder, tokenizer = text.encoder, text.tokenizer
    dtype = encoder.shared.weight.dtype
    config = {k: v for k, v in encoder.config.to_diff_dict().items() if not k.startswith("_")}
    dtype_name = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", config | {"architectures": ["T5EncoderModel"], "dtype": dtype_name})
    state = {name: _narrowed(tensor, dtype) for name, tensor in encoder.state_dict().items() if name != TIED}
    write_tensors(folder, TRANSFORMERS_STEM, state, max_shard_size=max_shard_size)

    tokenizer.save_pretrained(staging / "tokenizer")
    vocabulary = getattr(tokenizer, "vocab_file", None)  # transformers 5 leaves it out, transformers 4 needs it
    if vocabulary and Path(vocabulary).name == "spiece.model" and Path(vocabulary).is_file():
        shutil.copyfile(vocabulary, staging / "tokenizer" / "spiece.model")
    for path in (staging / "tokenizer").iterdir():
        sync(path)


def _narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Back in the encoder's dtype if nothing is lost: float32 there is how float16 runs, not what the file held."""
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def _tokenizer_class(text: TextEncoder | Path) -> str:
    folder = isinstance(text, Path)
    name = check_tokenizer(text / "tokenizer").get("tokenizer_class") if folder else type(text.tokenizer).__name__
    if name not in TOKENIZERS:
        raise InvalidRequest(
            f"a tokenizer of class {name} cannot be saved.", why=f"supported: {', '.join(TOKENIZERS)}."
        )
    return TOKENIZERS[name]


def _move(staging: Path, folder: Path) -> None:
    """Rename into place: the whole folder where there is none, else entry by entry, with `videogen.json` last.

    Its hashes tell a folder that was replaced only in part.
    """
    for path in [*staging.iterdir(), staging]:
        if path.is_dir():
            sync(path)
    if not folder.exists():
        staging.rename(folder)
    else:
        replaced = staging.with_suffix(".replaced")
        replaced.mkdir()
        for entry in sorted(staging.iterdir(), key=lambda p: p.name == "videogen.json"):
            if (folder / entry.name).exists():
                (folder / entry.name).rename(replaced / entry.name)
            entry.rename(folder / entry.name)
        shutil.rmtree(replaced)
        sync(folder)
    sync(folder.parent)
