"""LoRA files: every format CogVideoX LoRAs come in, read and written through one table of names each.

A header says all that matters before a tensor is read: which linear maps, what ranks, does it fit the model. A file in
which no name is understood is an error, one that is understood in part says what is left out. Only the reading and
writing of tensors imports torch, so that a command line is refused without.
"""

from __future__ import annotations

import json
import logging
import math
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from videogen.config import DiTConfig
from videogen.data.files import sha256_of, written
from videogen.errors import FileError, InvalidRequest, ModelNotFound, VideogenError, visible
from videogen.weights.guard import read_json
from videogen.weights.header import Entry, read_header
from videogen.weights.hub import PICKLES
from videogen.weights.models import PUBLISHED, Published
from videogen.weights.table import DIT_RULES, count, listed

if TYPE_CHECKING:
    import torch
    from torch import nn

    from videogen.models.lora import Update

log = logging.getLogger(__name__)

NAME = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder
PEFT_NAME = "adapter_model.safetensors"  # and peft, with a config beside it
PEFT_CONFIG = "adapter_config.json"
FACTS = "videogen"  # our entry in a file's metadata
DTYPES = ("F16", "BF16", "F32", "F64")
Scale = float | int | str

# ---- formats --------------------------------------------------------------------------------------------------------
# A rule is (ours, theirs) as in table.py; ours is the name of a linear map and .A, .B or .alpha. Of several rules for
# one name of ours, the first is the one that is written.

Rules = list[tuple[str, str]]


def _maps() -> Iterator[tuple[str, str]]:
    """Of the transformer's table all but the norms; `{i}` is a block, and other numbers are written out."""
    for rule in DIT_RULES:
        ours, theirs = (name.removesuffix(".*") for name in rule) if isinstance(rule, tuple) else ("norm", "")
        if not ours.rpartition(".")[2].startswith(("norm", "position_table")):
            inner = [""] if ours.startswith("blocks.") or "{i}" not in ours else ["1", "2"]
            yield from ((ours.replace("{i}", n or "{i}"), theirs.replace("{i}", n or "{i}")) for n in inner)


MAPS: Rules = list(_maps())

ENDS = (
    ("A", "lora_A.weight"),
    ("B", "lora_B.weight"),
    ("A", "lora_A.default.weight"),  # peft's name of an adapter left in
    ("B", "lora_B.default.weight"),
    ("A", "lora_down.weight"),
    ("B", "lora_up.weight"),
    ("A", "lora.down.weight"),  # diffusers before peft
    ("B", "lora.up.weight"),
    ("alpha", "alpha"),
)
KOHYA_ENDS = (("A", "lora_down.weight"), ("B", "lora_up.weight"), ("alpha", "alpha"))


def _rules(prefixes: Sequence[str], ends: Sequence[tuple[str, str]], separator: str = ".") -> Rules:
    return [
        (f"{ours}.{leaf}", f"{prefix}{theirs.replace('.', separator)}.{end}")
        for prefix in prefixes
        for ours, theirs in MAPS
        for leaf, end in ends
    ]


_SAT_MAPS = {"to_q": "query_key_value.matrix_{}.0", "to_k": "query_key_value.matrix_{}.1"}
_SAT_MAPS |= {"to_v": "query_key_value.matrix_{}.2", "to_out": "dense.matrix_{}.0"}


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to write a LoRA.

    rules    names of ours and theirs
    alpha    where it is written: "metadata" of the file, a "tensor" for each map, or nowhere
    implied  what it is where it is not written; None: the rank, so that the update counts once
    """

    about: str
    rules: Rules
    alpha: str | None
    implied: float | None = None

    @cached_property
    def ours(self) -> dict[str, str]:
        return {theirs: ours for ours, theirs in self.rules}

    @cached_property
    def theirs(self) -> dict[str, str]:
        return {ours: theirs for ours, theirs in reversed(self.rules)}


FORMATS = {
    "peft": Format(
        about="diffusers and PEFT, pytorch_lora_weights.safetensors",
        rules=_rules(["transformer."], ENDS),
        alpha="metadata",
    ),
    "finetrainers": Format(
        about="finetrainers, cogvideox-factory, PEFT's own folders, DiffSynth",
        rules=_rules(["", "base_model.model.", "base_model.model.transformer."], ENDS),
        alpha="metadata",
    ),
    "comfyui": Format(
        about="ComfyUI", rules=_rules(["diffusion_model.", "model.diffusion_model."], ENDS), alpha="tensor"
    ),
    "kohya": Format(
        about="CogVideoX-Fun (its reward LoRAs too) and kohya",
        rules=_rules(["lora_unet__", "lora_unet_"], KOHYA_ENDS, "_"),
        alpha="tensor",
    ),
    "sat": Format(
        about="SAT's checkpoints, with the weights that were trained on",
        rules=[
            (f"blocks.{{i}}.attention.{ours}.{leaf}", f"{prefix}transformer.layers.{{i}}.attention.{tail.format(leaf)}")
            for prefix in ("model.diffusion_model.", "")
            for ours, tail in _SAT_MAPS.items()
            for leaf in "AB"
        ],
        alpha=None,
        implied=1.0,
    ),
}
SAT_UPDATE = re.compile(r"\.matrix_[AB]\.[0-9]+")  # its other tensors are weights, such as those under `.original.`
BLOCK = re.compile(r"(?<=(?:blocks|layers)[._])(0|[1-9][0-9]{0,3})(?=[._])")
TEXT_ENCODER = ("text_encoder", "lora_te")
UNKNOWN_KINDS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "oft_": "OFT",
    "lora_mid": "a LoRA with a core tensor",
    "lora_B.bias": "a LoRA with biases",
    "lora_B.default.bias": "a LoRA with biases",
    "lora_up.bias": "a LoRA with biases",
    ".diff_b": "differences of biases",
}


# ---- headers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """What the header of a LoRA file says. Names of maps are ours: `blocks.0.attention.to_q`."""

    path: Path
    format: str
    keys: dict[str, dict[str, str]]  # map -> A, B and perhaps alpha -> name in the file
    sizes: dict[str, tuple[int, int]]  # map -> (d_out, d_in)
    ranks: dict[str, int]
    alphas: dict[str, float]  # as the file says, in whatever place, or else as its format implies
    dtypes: tuple[str, ...]
    text_encoder: tuple[str, ...] = ()  # names for the text encoder, which are not used
    unused: tuple[str, ...] = ()  # other names that no rule covers
    facts: dict[str, Any] = field(default_factory=dict)  # what a training here wrote: licence, provenance

    @cached_property
    def sha256(self) -> str:
        return sha256_of(self.path)


def open_lora(path: str | Path) -> LoraFile:
    """The header of a LoRA file, or of the one in a folder, in whatever format it is. No tensor is read.

    Raises InvalidRequest if there is no such file, ModelNotFound if it is damaged, holds no LoRA of a CogVideoX
    transformer, half of one, or one of another kind (DoRA, LoHa).
    """
    path = _find(path)
    header = read_header(path)
    shapes = header.shapes
    dtypes = {key: entry.dtype for key, entry in header.tensors.items()}
    for key in shapes:
        if kind := next((kind for mark, kind in UNKNOWN_KINDS.items() if mark in key), None):
            raise ModelNotFound(
                f"{path.name} holds {kind}.",
                why=f"it has {key}, which a LoRA does not, and without it would be another update.",
                hint="export it as a plain LoRA where it was trained.",
            )
    form, names = _recognise(path, list(shapes))
    keys: dict[str, dict[str, str]] = {}
    for key, name in names.items():
        linear, _, leaf = name.rpartition(".")
        if leaf in keys.setdefault(linear, {}):
            raise _damaged(path, f"{keys[linear][leaf]} and {key} are the same tensor")
        keys[linear][leaf] = key
    rest = [key for key in shapes if key not in names and (form != "sat" or SAT_UPDATE.search(key))]
    convolutions = [linear for linear, parts in keys.items() if "A" in parts and _is_convolution(shapes[parts["A"]])]
    rest += [key for linear in convolutions for key in keys.pop(linear).values()]
    sizes, ranks = {}, {}
    for linear, parts in keys.items():
        if not {"A", "B"} <= parts.keys():
            raise _damaged(path, f"{next(iter(parts.values()))} has no partner")
        if unreadable := [key for key in parts.values() if dtypes[key] not in DTYPES]:
            raise _damaged(path, f"{unreadable[0]} is {dtypes[unreadable[0]]}, not one of {', '.join(DTYPES)}")
        if "alpha" in parts and math.prod(shapes[parts["alpha"]]) != 1:
            raise _damaged(path, f"{parts['alpha']} is not one number")
        (rank, d_in), (d_out, of_b) = _matrix_shape(path, parts["A"], shapes), _matrix_shape(path, parts["B"], shapes)
        if rank != of_b or min(rank, d_in, d_out) < 1:
            raise _damaged(path, f"{parts['A']} and {parts['B']} are of ranks {rank} and {of_b}")
        sizes[linear], ranks[linear] = (d_out, d_in), rank
    if not keys:
        raise _nothing_for_the_model(path, list(shapes))
    alphas = {name: float(FORMATS[form].implied or rank) for name, rank in ranks.items()}
    alphas |= _configured(path, _adapter_config(path, header.metadata), ranks)
    alphas |= _numbers(path, {name: header.tensors[parts["alpha"]] for name, parts in keys.items() if "alpha" in parts})
    return LoraFile(
        path=path,
        format=form,
        keys=keys,
        sizes=sizes,
        ranks=ranks,
        alphas=alphas,
        dtypes=tuple(sorted({dtypes[part] for parts in keys.values() for part in parts.values()})),
        text_encoder=tuple(key for key in rest if key.startswith(TEXT_ENCODER)),
        unused=tuple(key for key in rest if not key.startswith(TEXT_ENCODER)),
        facts=_facts(header.metadata),
    )


def _find(path: str | Path) -> Path:
    """The file itself, or the only one of a folder that has a name for it."""
    given, path = path, Path(path).expanduser()
    if path.is_dir():
        path = next((path / name for name in (NAME, PEFT_NAME) if (path / name).is_file()), path / NAME)
    if not path.is_file():
        raise InvalidRequest(
            f"there is no LoRA file {given}.",
            why="LoRAs are files on this machine." if path.name != NAME else f"the folder has no {NAME}.",
            hint="download it and give its path.",
            param="lora",
        )
    if path.suffix in PICKLES:
        raise ModelNotFound(
            f"{path.name} is a pickle.",
            why="a pickle can run any program when it is opened; only safetensors are read.",
            hint=f"videogen lora convert {path.name} --to peft --out {path.stem}.safetensors",
        )
    return path


def _recognise(path: Path, keys: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The format that covers most names, and what those are called here."""
    found = {form: _covered(keys, FORMATS[form].ours) for form in FORMATS}
    form = max(found, key=lambda form: len(found[form]))
    if not any(name.endswith((".A", ".B")) for name in found[form].values()):
        raise _nothing_for_the_model(path, keys)
    return form, found[form]


def _covered(keys: Sequence[str], ours: Mapping[str, str]) -> dict[str, str]:
    covered = {}
    for key in keys:
        block = BLOCK.search(key)
        template = key if block is None else f"{key[: block.start()]}{{i}}{key[block.end() :]}"
        if template in ours:
            covered[key] = ours[template].replace("{i}", block[1] if block else "")
    return covered


def _theirs(name: str) -> str:
    """diffusers' name of a linear map."""
    block = BLOCK.search(name)
    template = name if block is None else f"{name[: block.start()]}{{i}}{name[block.end() :]}"
    return dict(MAPS)[template].replace("{i}", block[1] if block else "")


def _facts(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Our entry; nothing depends on it, so one that is damaged is none."""
    try:
        facts = json.loads(metadata.get(FACTS, "{}"))
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _adapter_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What was written about alpha: by diffusers, by finetrainers, or by peft in a file beside it."""
    text = metadata.get("lora_adapter_metadata") or metadata.get("lora_config")
    beside = path.with_name(PEFT_CONFIG)
    try:
        values = json.loads(text) if text else read_json(beside) if path.name == PEFT_NAME and beside.exists() else {}
        config = {key.removeprefix("transformer."): value for key, value in values.items() if value is not None}
        numbers = [config.get("lora_alpha", 1), *config.get("alpha_pattern", {}).values()]
        good = all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
    except (ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise _damaged(path, "its metadata is not that of a LoRA") from error
    if not good:
        raise _damaged(path, f"its metadata has alpha {listed(map(repr, numbers))}")
    if config.get("use_dora"):
        raise ModelNotFound(f"{path.name} holds DoRA.", why="its metadata says so.", hint="export a plain LoRA.")
    return {k: config[k] for k in ("lora_alpha", "alpha_pattern", "use_rslora") if k in config}


def _configured(path: Path, config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """alpha of each map by peft's settings: `alpha_pattern` has exceptions, by the end of diffusers' name of a map."""
    alphas = dict.fromkeys(ranks, float(config["lora_alpha"])) if "lora_alpha" in config else {}
    for ending, value in config.get("alpha_pattern", {}).items():
        meant = [name for name in ranks if f".{_theirs(name)}".endswith(f".{ending}")]
        if not meant:  # peft would read it as a regular expression
            raise _damaged(path, f"its metadata has an alpha for {ending[:80]!r}, which names none of its maps")
        alphas |= dict.fromkeys(meant, float(value))
    root = config.get("use_rslora", False)  # alpha / √rank in place of alpha / rank
    return {name: alpha * math.sqrt(ranks[name]) if root else alpha for name, alpha in alphas.items()}


def _numbers(path: Path, entries: Mapping[str, Entry]) -> dict[str, float]:
    """The values of tensors of one number: a few bytes each, read without a library."""
    numbers = {}
    with path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        for name, entry in entries.items():
            file.seek(begin + entry.start)
            data = file.read(entry.end - entry.start)
            data, dtype = (b"\0\0" + data, "F32") if entry.dtype == "BF16" else (data, entry.dtype)
            (numbers[name],) = struct.unpack({"F16": "<e", "F32": "<f", "F64": "<d"}[dtype], data)
            if not math.isfinite(numbers[name]):
                raise _damaged(path, f"alpha of {name} is {numbers[name]}")
    return numbers


def _is_convolution(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[2:] != (1, 1)


def _matrix_shape(path: Path, key: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Of a matrix, or of a convolution of one pixel, which is one."""
    shape = shapes[key]
    if len(shape) != 2 and not (len(shape) == 4 and shape[2:] == (1, 1)):
        raise _damaged(path, f"{key} has shape {list(shape)}")
    return shape[0], shape[1]


def _damaged(path: Path, why: str) -> ModelNotFound:
    return ModelNotFound(
        f"{path.name} is no whole LoRA.", why=f"{why}.", hint="fetch or copy the file again, or export it anew."
    )


def _nothing_for_the_model(path: Path, keys: Sequence[str]) -> VideogenError:
    text = [key for key in keys if key.startswith(TEXT_ENCODER)]
    return ModelNotFound(
        f"{path.name} holds no LoRA of a CogVideoX transformer.",
        why=f"none of its {count(len(keys), 'tensor')} is called as in {', '.join(FORMATS)}"
        + (f"; {len(text)} are for a text encoder" if text else f": {listed(map(repr, keys), 3)}")
        + ".",
        hint="is it a LoRA, and of this family? docs/lora.md shows the names of each format.",
    )


# ---- does it fit? ---------------------------------------------------------------------------------------------------


def linear_sizes(config: DiTConfig) -> dict[str, tuple[int, int]]:
    """Map -> (d_out, d_in) of every linear map of a DiT, counted and not built."""
    d, e, patch = config.width, config.time_embed_dim, config.patch_size**2 * (config.patch_size_t or 1)
    sizes = {"text_proj": (d, config.text_embed_dim)}
    if config.patch_size_t is not None:
        sizes["patch_embed.proj"] = (d, config.in_channels * patch)
    sizes |= {"time_embed.linear_1": (e, d), "time_embed.linear_2": (e, e)}
    if (o := config.ofs_embed_dim) is not None and o:
        sizes |= {"ofs_embed.linear_1": (o, o), "ofs_embed.linear_2": (o, o)}
    for i in range(config.num_layers):
        sizes |= {f"blocks.{i}.{norm}.linear": (6 * d, e) for norm in ("norm1", "norm2")}
        sizes |= {f"blocks.{i}.attention.{to}": (d, d) for to in ("to_q", "to_k", "to_v", "to_out")}
        sizes |= {f"blocks.{i}.mlp.up": (4 * d, d), f"blocks.{i}.mlp.down": (d, 4 * d)}
    return sizes | {"norm_out.linear": (2 * d, e), "proj_out": (patch * config.out_channels, d)}


def check_fit(file: LoraFile, config: DiTConfig, model: str) -> None:
    """Refuse a LoRA of another model: one that has a map this one lacks, or of another size."""
    if not (wrong := _misfits(file, config)):
        return
    sizes = linear_sizes(config)
    name, (d_out, d_in) = wrong[0], file.sizes[wrong[0]]
    here = f"{sizes[name][1]} to {sizes[name][0]}" if name in sizes else "not there"
    able = fits(file)
    raise InvalidRequest(
        f"{file.path.name} does not fit {model}.",
        why=f"of its {count(len(file.keys), 'map')} {len(wrong)} are others: {name} is {d_in} to {d_out} in the file, "
        f"{here} in the model.",
        hint=" or ".join(f"--model {name}" for name in able[:3]) + "   (it fits these)"
        if able
        else "it fits no published model: give the one it was trained on.",
        param="lora",
    )


def fits(file: LoraFile) -> list[str]:
    """The published models that have all its maps, by widths and layers: it was made for one of them, or the like."""
    return [row.name for row in PUBLISHED if not _misfits(file, row_config(row))]


def _misfits(file: LoraFile, config: DiTConfig) -> list[str]:
    sizes = linear_sizes(config)
    return [name for name, size in file.sizes.items() if sizes.get(name) != size]


def row_config(row: Published) -> DiTConfig:
    """The transformer's settings, as far as linear maps and the limits of a request go."""
    width, channels, patch_t, learned = row.shape
    return DiTConfig(
        num_layers=30 if width == 1920 else 42,
        num_attention_heads=width // 64,
        in_channels=channels,
        patch_size_t=patch_t,
        ofs_embed_dim=512 if row.name.endswith("1.5-5B-I2V") else None,
        use_rotary_positional_embeddings=width != 1920,
        use_learned_positional_embeddings=learned,
    )


# ---- several at once ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A file to be used, and how: under `name`, `scale` times what it says; `alpha` in place of the file's own."""

    file: LoraFile
    name: str
    scale: float = 1.0
    alpha: float | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """What a clip says of it: enough to find and use the same again."""
        scale = self.scale if self.alpha is None else f"{self.scale * self.alpha!r}/r"
        return {"file": self.file.path.name, "sha256": self.file.sha256, "scale": scale}


def open_loras(lora: Any, lora_scale: Any = None) -> list[Lora]:
    """The headers of `load`'s `lora`: a path, a (path, scale), or a list of these.

    A scale is a number, "1/256", or "a/r": alpha is a, whatever the file says ("1/r" for what SAT exported). lora_scale
    is for those without one (default 1), or a list with one for each. Raises InvalidRequest, and what `open_lora` does.
    """
    entries = [] if lora is None else lora if isinstance(lora, list) else [lora]
    if isinstance(lora_scale, list | tuple) and len(lora_scale) != len(entries):
        raise InvalidRequest(
            f"lora_scale has {len(lora_scale)} entries for {count(len(entries), 'LoRA')}.",
            why="one serves all, a list gives each its own.",
            hint=f"give one, or {len(entries)}.",
            param="lora_scale",
        )
    if not entries and lora_scale is not None:
        raise InvalidRequest(
            "lora_scale is given without a lora.", why="it says how much one counts.", hint="lora=", param="lora_scale"
        )
    loras: list[Lora] = []
    for place, entry in enumerate(entries):
        path, scale = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, None)
        if not isinstance(path, str | Path):
            raise InvalidRequest(
                f"a LoRA is given as {entry!r:.60}.",
                why="it is a path, or a pair of path and scale; several are a list.",
                hint='lora=["a.safetensors", ("b.safetensors", 0.7)]',
                param="lora",
            )
        if scale is None:
            scale = lora_scale[place] if isinstance(lora_scale, list | tuple) else lora_scale
        factor, alpha = _parse_scale(1.0 if scale is None else scale)
        file = open_lora(path)
        loras.append(Lora(file=file, name=_word(file, {one.name for one in loras}), scale=factor, alpha=alpha))
    return loras


def split_scale(text: str) -> str | tuple[str, str]:
    """The command line's `PATH[:SCALE]`.

    >>> split_scale("a.safetensors"), split_scale("a.safetensors:0.7"), split_scale("a.safetensors:1/r")
    ('a.safetensors', ('a.safetensors', '0.7'), ('a.safetensors', '1/r'))
    """
    path, colon, scale = text.rpartition(":")
    return (path, scale) if colon and re.fullmatch(r"[-+.\deE]+(/(r|[.\deE]+))?", scale) else text


def _parse_scale(scale: Any) -> tuple[float, float | None]:
    """The factor and, for "a/r", the alpha."""
    number, slash, divisor = str(scale).partition("/")
    try:
        value = float(number) / (float(divisor) if slash and divisor != "r" else 1.0)
        if isinstance(scale, bool) or not math.isfinite(value):
            raise ValueError
    except (ValueError, ZeroDivisionError) as error:
        raise InvalidRequest(
            f"a LoRA's scale is {scale!r}.",
            why="it is a finite number, a fraction such as 1/256, or a/r, which sets alpha.",
            hint="0.7",
            param="lora_scale",
        ) from error
    return (1.0, value) if divisor == "r" else (value, None)


def _word(file: LoraFile, taken: set[str]) -> str:
    """A plain word for a file: adapters are called by it."""
    word = "lora_" + (re.sub(r"\W+", "_", file.path.stem, flags=re.ASCII).strip("_") or "file")
    return next(name for n in range(1, len(taken) + 2) if (name := word if n == 1 else f"{word}_{n}") not in taken)


def add_loras(dit: nn.Module, loras: Sequence[Lora], *, dtype: torch.dtype | None = None) -> None:
    """Put them all beside the weights of a DiT (`videogen.models.lora.attach`), and say what of the files is not used.

    dtype  of the adapters; None: as in the files, for what is cast later
    """
    from videogen.models.lora import attach

    for lora in loras:
        updates = read_updates(lora.file, alpha=lora.alpha)
        if dtype is not None:
            updates = {name: replace(u, A=u.A.to(dtype), B=u.B.to(dtype)) for name, u in updates.items()}
        attach(dit, updates, name=lora.name, scale=lora.scale)
        for word in left_out(lora.file):
            log.warning(word)


def left_out(file: LoraFile) -> list[str]:
    """A line for each kind of tensors in the file that nothing uses."""
    kinds = ((file.text_encoder, "for a text encoder"), (file.unused, "of unknown name"))
    lines = (f"{file.path.name}: {count(len(k), 'tensor')} {why}, not used: {listed(k)}" for k, why in kinds if k)
    return [visible(line) for line in lines]


# ---- tensors --------------------------------------------------------------------------------------------------------


def read_updates(file: LoraFile, *, alpha: float | None = None) -> dict[str, Update]:
    """Map -> its update, in the file's dtype. `alpha` in place of the file's own.

    Raises ModelNotFound if a number is not finite.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    from videogen.models.lora import Update

    updates = {}
    try:
        with safe_open(file.path, framework="pt") as tensors:
            for name, keys in file.keys.items():
                A, B = (tensors.get_tensor(keys[leaf]).flatten(1) for leaf in "AB")
                if not (bool(torch.isfinite(A).all()) and bool(torch.isfinite(B).all())):
                    raise _damaged(file.path, f"the update of {name} is not finite")
                updates[name] = Update(A, B, file.alphas[name] if alpha is None else alpha)
    except SafetensorError as error:  # what the header could not show, or another file by now
        raise _damaged(file.path, str(error)) from error
    return updates


def save_lora(
    path: str | Path,
    updates: Mapping[str, Update],
    *,
    form: str = "peft",
    facts: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a LoRA (`videogen.models.lora.updates_of`) in one of FORMATS; a folder gets diffusers' name for it.

    "peft" opens in diffusers (`load_lora_weights`), its metadata with alpha included. A format that cannot say alpha
    gets B times what is missing. `facts` go into the metadata as JSON: what a training knows of it (`LoraFile.facts`).
    Written beside its place, synced and renamed. Raises FileError if there is a file.
    """
    import torch
    from safetensors.torch import save_file

    if form not in FORMATS:
        raise InvalidRequest(f"there is no LoRA format {form!r}.", hint=f"one of {', '.join(FORMATS)}.", param="to")
    if not updates:
        raise InvalidRequest(
            "there is no LoRA to save.", why="no map has an update.", hint="add_lora, or another name."
        )
    path = Path(path)
    path = path if path.suffix == ".safetensors" else path / NAME
    if path.exists() and not overwrite:
        raise FileError(f"{path} exists.", why="nothing is overwritten unasked.", hint="--overwrite, or another name.")
    how, tensors = FORMATS[form], {}
    for name, update in updates.items():
        A, B = update.A.detach().cpu(), update.B.detach().cpu()
        if how.alpha is None:
            B = (B.double() * (update.alpha / update.rank) / ((how.implied or update.rank) / update.rank)).to(B.dtype)
        tensors |= {f"{name}.A": A.contiguous(), f"{name}.B": B.contiguous()}
        if how.alpha == "tensor":
            tensors[f"{name}.alpha"] = torch.tensor(update.alpha, dtype=torch.float32)
    names = {ours: theirs for theirs, ours in _covered(list(tensors), how.theirs).items()}
    if missing := [name for name in tensors if name not in names.values()]:
        raise InvalidRequest(
            f"{form} has no name for {listed(missing, 3)}.",
            why="its files hold updates of q, k, v and the attention's output only.",
            hint="--to peft",
            param="to",
        )
    renamed = {theirs: tensors[ours] for theirs, ours in names.items()}
    with written(path) as part:
        own = {FACTS: json.dumps(facts, ensure_ascii=False)} if facts else {}
        save_file(renamed, part, metadata={"format": "pt"} | _metadata(form, updates) | own)
    return path


def _metadata(form: str, updates: Mapping[str, Update]) -> dict[str, str]:
    """peft's LoraConfig as far as it is known: the usual rank and alpha, and where they are others."""
    if FORMATS[form].alpha != "metadata":
        return {}
    ranks = {_theirs(name): update.rank for name, update in updates.items()}
    alphas = {_theirs(name): update.alpha for name, update in updates.items()}
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    (alpha, _), *_ = Counter(alphas.values()).most_common(1)
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
    }
    if form == "peft":
        config = {f"transformer.{key}": value for key, value in config.items()}
    return {"lora_adapter_metadata" if form == "peft" else "lora_config": json.dumps(config, indent=2, sort_keys=True)}
