"""Checkpoints of every known layout into one: a folder in diffusers' layout, a single file, or SAT's names.

    source                          what is read
    a .safetensors file             the networks in it (videogen.weights.single)
    a pickle (.pt .bin .ckpt .pth)  the same, after a process of its own has taken its tensors out (unpickle.py)
    a SAT folder                    mp_rank_00_model_states.pt, 3d-vae.pt and T5 wherever they lie in it
    a model folder                  its parts, safetensors or .bin

The source is never changed. What is written appears under its name when it is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import videogen
from videogen.config import to_dict
from videogen.data.files import sync
from videogen.errors import FileError, InvalidRequest, ModelNotFound
from videogen.models.dit import DiT
from videogen.models.positions import sincos_table, trained_latent_frames
from videogen.models.vae import VAE
from videogen.weights import sat, unpickle
from videogen.weights.card import Card, read_card
from videogen.weights.diffusers import load_text_encoder, pipeline_class, save_folder
from videogen.weights.guard import check_file, read_json
from videogen.weights.header import read_header
from videogen.weights.hub import PICKLES, find_model
from videogen.weights.load import build
from videogen.weights.single import METADATA, Found, card_of_parts, find_base, find_parts, load_part, own_of, vae_config
from videogen.weights.table import DIT_RULES, VAE_RULES, listed, to_theirs

Say = Callable[[str], None]
TARGETS = ("diffusers", "single", "sat")
DTYPES = ("float32", "bfloat16", "float16")
NO_WEIGHTS = re.compile(r"optim|scheduler|random_states|rng_state|training_args|scaler", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """What was found: networks in files, and a folder with configs or a text encoder where there is one."""

    path: Path
    parts: dict[str, Found]
    folder: Path | None = None  # in diffusers' layout
    text_encoder: Path | None = None  # a folder with text_encoder/ and tokenizer/


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str = "diffusers",
    base: str | Path | None = None,
    variant: str | None = None,
    dtype: str | torch.dtype | None = None,
    offline: bool = False,
    say: Say = lambda text: None,
) -> Path:
    """Read `source` (a path, or a model by name) in whatever layout, write `out` in another; what was written.

    `base` and `variant` are those of `videogen.load`. `dtype`: cast all weights; None keeps every byte. A source with a
    VAE alone becomes a single file or SAT's file of it, or with `base` a whole model. Raises FileError if `out` exists,
    ModelNotFound for what cannot be read, InvalidRequest for what makes no sense.
    """
    out, kind = _check(Path(out).expanduser(), to, dtype)
    path = _located(source, offline)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        found = open_source(path, Path(temporary), say)
        whole = to == "diffusers" or base is not None or variant is not None
        card, found = _card(found, base, variant, offline, whole)
        if card and not found.folder:
            card = replace(card, name=out.stem if to == "single" else out.name)
        partial = Path(temporary, "made", out.name)
        partial.parent.mkdir()  # with the rights that the umask gives; the temporary folder has none for others
        say(f"writing {out}")
        if to == "diffusers":
            assert card is not None
            _write_diffusers(partial, found, card, kind)
        elif to == "single":
            _write_single(partial, found, card, kind)
        else:
            _write_sat(partial, found, card, kind)
        if out.exists():
            raise _exists(out)
        partial.rename(out)
        sync(out.parent)
    return out


# ---- reading --------------------------------------------------------------------------------------------------------


def open_source(path: Path, temporary: Path, say: Say) -> Source:
    """What lies at `path`, every pickle already turned into a safetensors file in `temporary`."""
    if path.is_file():
        return Source(path, _networks([_safe(path, temporary, say)], path, say))
    if (path / "model_index.json").is_file():
        return _diffusers_source(path, temporary, say)
    files = _sat_files(path)
    if not files:
        names = sorted(p.name for p in path.iterdir())
        raise ModelNotFound(
            f"{path} holds no checkpoint of a known layout.",
            why=f"found: {listed(names) or 'nothing'}.",
            hint="a model folder, a SAT folder (transformer/1/mp_rank_00_model_states.pt), or a file of weights.",
        )
    parts = _networks([_safe(file, temporary, say) for file in files], path, say)
    return Source(path, parts, text_encoder=_sat_text_encoder(path, temporary, say))


def _networks(files: list[Path], source: Path, say: Say) -> dict[str, Found]:
    parts: dict[str, Found] = {}
    for file in files:
        header = read_header(file)
        new = find_parts(header.shapes, file, like=own_of(header, file).get("transformer"))
        if twice := [part for part in new if part in parts]:
            raise ModelNotFound(
                f"{source} holds its {twice[0]} twice.", why="in two of its files.", hint="give one of them alone."
            )
        parts |= new
    for part, one in parts.items():
        say(f"{part}: {len(one.names)} tensors in {one.format.naming}'s naming")
    return parts


def _sat_files(folder: Path) -> list[Path]:
    """The transformer's and the VAE's file of a SAT folder, or of one of its two parts."""
    files = []
    for pattern in ("mp_rank_00_model_states", "3d-vae"):
        found = sorted(p for p in folder.rglob(f"{pattern}.*") if p.suffix in (".pt", ".safetensors"))
        if len(found) > 1:
            raise ModelNotFound(
                f"{folder} holds {len(found)} files {pattern}.*.",
                why=listed(str(p.relative_to(folder)) for p in found) + ".",
                hint="give one of the files itself, or the folder around one.",
            )
        files += found
    if rank := next(folder.rglob("mp_rank_01_model_states.pt"), None):
        raise ModelNotFound(
            f"{folder} holds a transformer in several pieces.",
            why=f"{rank.name}: it was split for several GPUs.",
            hint="merge it with SAT first.",
        )
    return files


def _sat_text_encoder(folder: Path, temporary: Path, say: Say) -> Path | None:
    """T5 beside the SAT files, as a folder with text_encoder/ and tokenizer/."""
    configs = (config for config in folder.rglob("config.json") if read_json(config).get("model_type") == "t5")
    t5 = next(configs, None)
    if t5 is None:
        return None
    target = temporary / "t5"
    for part in ("text_encoder", "tokenizer"):
        (target / part).mkdir(parents=True)
    for path in t5.parent.iterdir():
        if path.name == "config.json" or path.suffix in (".safetensors", *PICKLES) or ".index." in path.name:
            _into(path, target / "text_encoder", say)
        elif path.suffix in (".json", ".model"):
            shutil.copyfile(path, target / "tokenizer" / path.name)
    return target


def _diffusers_source(folder: Path, temporary: Path, say: Say) -> Source:
    """The folder itself, or where it has pickles a copy of it with safetensors in their place."""
    weights = [p for part in ("transformer", "vae", "text_encoder") for p in (folder / part).glob("*")]
    if not any(p.suffix in PICKLES for p in weights) or all(_has_safetensors(p.parent) for p in weights):
        return Source(folder, {}, folder, folder)
    copy = temporary / "copy"
    copy.mkdir()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*")]):
        into = copy / path.parent.relative_to(folder)
        into.mkdir(exist_ok=True)
        if path.is_file() and not (path.suffix in PICKLES and _has_safetensors(path.parent)):
            _into(path, into, say)
    return Source(folder, {}, copy, copy)


def _has_safetensors(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _into(path: Path, folder: Path, say: Say) -> None:
    """Copy one file of a folder. Pickles become safetensors under the names that readers expect, indices follow."""
    name = path.name.replace("pytorch_model", "model") if path.name.startswith("pytorch_model") else path.name
    if path.suffix in PICKLES:
        if not NO_WEIGHTS.search(path.name):
            take_tensors(path, folder / (Path(name).stem + ".safetensors"), say)
    elif ".bin.index" in name:
        values = read_json(path)
        renamed = {k: _safe_name(v) for k, v in dict(values.get("weight_map") or {}).items()}
        target = folder / name.replace(".bin.index", ".safetensors.index")
        target.write_text(json.dumps(values | {"weight_map": renamed}), encoding="utf-8")
    elif path.suffix in (".json", ".model", ".safetensors"):
        try:
            os.link(path, folder / name)  # no byte is copied where both lie on one disk
        except OSError:
            shutil.copyfile(path, folder / name)


def _safe_name(name: Any) -> str:
    return re.sub(r"\.bin$", ".safetensors", re.sub("^pytorch_model", "model", str(name)))


def _safe(path: Path, temporary: Path, say: Say) -> Path:
    if path.suffix == ".safetensors":
        return path
    target = temporary / f"{path.stem}.safetensors"
    take_tensors(path, target, say)
    return target


def take_tensors(pickle: Path, target: Path, say: Say = lambda text: None) -> None:
    """The tensors of a pickle as a safetensors file, by a process of its own: see unpickle.py."""
    check_file(pickle)
    size = pickle.stat().st_size
    say(f"reading {pickle.name} ({size / 1e9:.2f} GB, a pickle) in a process of its own")
    command = [sys.executable, "-I", str(unpickle.__file__), str(pickle.absolute()), str(target.absolute())]
    keep = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    with tempfile.TemporaryDirectory() as empty:
        try:
            run = subprocess.run(
                command,
                capture_output=True,
                stdin=subprocess.DEVNULL,
                cwd=empty,
                env=keep | {"OMP_NUM_THREADS": "1", "HOME": empty},
                timeout=600 + size / 5e6,
            )
        except subprocess.TimeoutExpired as error:
            raise _refused(pickle, f"it took longer than {error.timeout:.0f} seconds") from error
    try:
        said = json.loads(run.stdout.splitlines()[-1])
        problem = said.get("error")
    except (ValueError, IndexError, AttributeError):
        said, problem = {}, f"the process ended with code {run.returncode}"
    if problem or run.returncode or not target.is_file():
        raise _refused(pickle, str(problem or f"code {run.returncode}"))
    os.chmod(target, target.parent.stat().st_mode & 0o666)
    if skipped := said.get("skipped"):
        say(f"left behind, as they are no tensors: {listed(skipped)}")


def _refused(pickle: Path, why: str) -> ModelNotFound:
    return ModelNotFound(
        f"{pickle} is not read.",
        why=f"a pickle may hold tensors only: {why}.",
        hint="fetch the model as safetensors, or ask its author for them.",
    )


# ---- what it is -----------------------------------------------------------------------------------------------------


def _card(found: Source, base: Any, variant: str | None, offline: bool, whole: bool) -> tuple[Card | None, Source]:
    """The card of what was found, and that seen in its light; no card of a VAE alone, whose model is not asked for."""
    if found.folder:
        if base or variant:
            raise InvalidRequest(
                f"{found.path.name} is a whole model.", why="base and variant complete a part of one.", param="base"
            )
        card = read_card(found.folder)
        return replace(card, name=card.name if card.folder == found.path else found.path.name), found
    below, first = None, next(iter(found.parts.values()))
    path = found.path.with_name(found.path.name + ".safetensors") if found.path.is_dir() else found.path
    if whole and (found.text_encoder is None or "vae" not in found.parts or "transformer" not in found.parts):
        have = dict(found.parts) | ({"text_encoder": first} if found.text_encoder else {})
        below = read_card(find_base(have, path, base, variant=variant, offline=offline))
    elif base:
        below = read_card(find_model(base, offline=offline, weights=False))
    if "transformer" not in found.parts and below is None:
        return None, found
    if below:  # which knows whether a position table is a weight
        files = {part.file for part in found.parts.values()}
        parts = [find_parts(read_header(file).shapes, file, like=below.dit) for file in files]
        found = replace(found, parts={name: part for one in parts for name, part in one.items()})
    own = own_of(read_header(first.file), first.file) if len(found.parts) == 1 else {}
    return card_of_parts(found.parts, path, below=below, variant=variant, own=own), found


def _dit(found: Source, card: Card, dtype: torch.dtype | None) -> DiT:
    from videogen.weights.diffusers import load_dit

    if "transformer" in found.parts:
        return load_part(card, found.parts["transformer"], dtype=dtype)
    return load_dit(found.folder or card.folder, dtype=dtype)


def _vae(found: Source, card: Card | None, dtype: torch.dtype | None) -> VAE:
    from videogen.weights.diffusers import load_vae

    if "vae" in found.parts:
        part = found.parts["vae"]
        like = own_of(read_header(part.file), part.file).get("vae")
        config = card.vae if card else vae_config(part.shapes, like, where=found.path.name)
        assert part.format.rules is not None
        return build(lambda: VAE(config), [part.file], part.format.rules, names=part.names, dtype=dtype)
    assert card is not None
    return load_vae(found.folder or card.folder, dtype=dtype)


# ---- writing --------------------------------------------------------------------------------------------------------


def _write_diffusers(out: Path, found: Source, card: Card, dtype: torch.dtype | None) -> None:
    folder = found.text_encoder or card.folder
    text: Any = folder
    if "text_encoder" in found.parts:
        text = load_part(card, found.parts["text_encoder"], dtype=dtype)
    elif dtype is not None:
        text = load_text_encoder(folder, dtype=dtype, max_length=card.max_sequence_length)
    naming = sorted({part.format.naming for part in found.parts.values()}) or ["diffusers"]
    history = {"from": found.path.name, "naming": naming, "videogen": videogen.__version__}
    save_folder(
        out,
        dit=_dit(found, card, dtype),
        vae=_vae(found, card, dtype),
        text_encoder=text,
        scheduler_config=card.scheduler,
        model_index_class=pipeline_class(card),
        extra=card.facts | {"provenance": {**card.provenance, "converted": history}},
    )


def _write_single(out: Path, found: Source, card: Card | None, dtype: torch.dtype | None) -> None:
    """The transformer under diffusers' names without a prefix; of a source without one, the VAE."""
    if card is None or ("transformer" not in found.parts and not found.folder):
        vae = _vae(found, card, dtype)
        _write_file(out, to_theirs(vae.state_dict(), VAE_RULES), {"vae": to_dict(vae.config)})
        return
    dit = _dit(found, card, dtype)
    own = {"transformer": to_dict(dit.config), "vae": to_dict(card.vae), "scheduler": card.scheduler}
    _write_file(out, to_theirs(dit.state_dict(), DIT_RULES), own | {"facts": card.facts})


def _write_sat(out: Path, found: Source, card: Card | None, dtype: torch.dtype | None) -> None:
    """SAT's folder and names, as safetensors."""
    if card is not None and ("transformer" in found.parts or found.folder):
        dit = _dit(found, card, dtype)
        state = to_theirs(dit.state_dict(), sat.SAT_DIT_RULES)
        if not dit.config.use_rotary_positional_embeddings:
            state[sat.TABLE] = stored_table(dit)
        _write_file(_sat_path(out, sat.DIT_FILE), {sat.PREFIX + name: t for name, t in state.items()}, {})
        (out / "transformer" / "latest").write_text("1")
    if "vae" in found.parts or found.folder:
        vae = _vae(found, card, dtype)
        _write_file(_sat_path(out, sat.VAE_FILE), to_theirs(vae.state_dict(), sat.SAT_VAE_RULES), {})


def stored_table(dit: DiT) -> Tensor:
    """The sin-cos table [1, text + video tokens, width] as 2B's SAT file stores it."""
    config, weight = dit.config, dit.text_proj.weight
    video = sincos_table(config, trained_latent_frames(config), config.sample_height, config.sample_width)
    return torch.cat([video.new_zeros(config.max_text_seq_length, config.width), video])[None].to(weight.dtype)


def _sat_path(out: Path, file: Path) -> Path:
    path = out / file.with_name(file.name + ".safetensors")
    path.parent.mkdir(parents=True)
    return path


def _write_file(path: Path, state: Mapping[str, Tensor], own: dict[str, Any]) -> None:
    metadata = {"format": "pt"} | ({METADATA: json.dumps(own)} if own else {})
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata=metadata)
    os.chmod(path, path.parent.stat().st_mode & 0o666)
    sync(path)


# ---- checks ---------------------------------------------------------------------------------------------------------


def _located(source: str | Path, offline: bool) -> Path:
    """A path, else a model by name."""
    path = Path(source).expanduser()
    if not path.exists():
        return find_model(source, offline=offline)
    if path.is_file() and path.suffix not in (".safetensors", *PICKLES):
        raise ModelNotFound(
            f"{path} is no checkpoint.",
            why=f"files of weights end in .safetensors or {', '.join(PICKLES)}.",
            hint="a file of weights, a SAT folder or a model folder.",
        )
    return path


def _check(out: Path, to: str, dtype: str | torch.dtype | None) -> tuple[Path, torch.dtype | None]:
    """Everything that can be refused before anything is read."""
    if to not in TARGETS:
        raise InvalidRequest(f"there is no layout {to!r}.", hint=f"one of {', '.join(TARGETS)}.", param="to")
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in DTYPES:
        raise InvalidRequest(f"{dtype!r} is no dtype for weights.", hint=f"one of {', '.join(DTYPES)}.", param="dtype")
    if to == "single" and out.suffix != ".safetensors":
        raise InvalidRequest(
            f"{out} is no name for a single file.",
            why="it is a safetensors file.",
            hint=f"{out}.safetensors",
            param="out",
        )
    if to != "single" and out.suffix == ".safetensors":
        raise InvalidRequest(
            f"{out} is no name for a folder.",
            why=f"{to} is a layout of several files.",
            hint="--to single",
            param="out",
        )
    if out.exists():
        raise _exists(out)
    return out.absolute(), getattr(torch, name) if dtype is not None else None


def _exists(out: Path) -> FileError:
    return FileError(f"{out} exists.", why="nothing is overwritten.", hint="another name for --out.", param="out")
