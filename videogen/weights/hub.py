"""Where a model's files are: bundled, a path, the Hub's cache, and only then the network. Imports no torch.

A model in the cache is used as it is, without a question to the network; `videogen models pull NAME` renews it. What is
fetched are the files of one variant and no others: configs, the tokenizer, and of each network the plain safetensors,
or else its only variant. Their number and size, the licence and the free disk are said before a download.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import videogen
from videogen.data.files import written
from videogen.errors import FileError, ModelNotFound
from videogen.weights.models import PUBLISHED

STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
CONFIGS = ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
SMALL = re.compile(
    r"(model_index|videogen|step_cache)\.json|(transformer|vae|text_encoder|scheduler)/(scheduler_)?config\.json"
    r"|tokenizer/(spiece\.model|(tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json)"
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
ALIASES = {row.name.partition("/")[2].lower(): row.name for row in PUBLISHED}
FORMER = {"zai-org": "THUDM"}  # an organisation that was renamed: its older name in caches
MARGIN = 2**28  # bytes that stay free on the disk


def find_model(
    model: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    weights: bool | Collection[str] = True,
) -> Path:
    """The folder of a model: `tiny` (bundled), a path, or a name on the Hub, in its cache or fetched.

    A name is `org/name`, `hf://org/name`, or for the published models `CogVideoX-2b` and the like; `@revision` may
    follow. A file of safetensors is given back as it is (videogen.weights.single opens it). With `weights=False` only
    the small files are fetched: enough for `read_card`, so that a request is checked before gigabytes travel; or the
    weights of some of transformer, vae and text_encoder.

    Raises ModelNotFound if it is not there and cannot be fetched, FileError if the disk is too small for it.
    """
    if str(model) == "tiny":
        return bundled("tiny")
    if not isinstance(model, str | Path):
        raise ModelNotFound(f"{str(model)[:60]} is no model.", why="a model is a path or a name.", hint=HINT)
    if path := _local(model):
        return path
    name, tag = parse_name(str(model))
    revision = revision or tag
    found = in_cache(name, revision)
    missing = select(names(found), weights=weights)[1] if found else []
    if found and not missing:
        return found
    if offline or is_offline():
        raise _not_cached(name, revision, missing)
    return fetch(name, revision, weights=weights)


def bundled(name: str) -> Path:
    """Package data in an installed wheel; beside the package in a checkout."""
    package = Path(videogen.__file__).parent
    for folder in (package / "_checkpoints" / name, package.parent / "checkpoints" / name):
        if (folder / "model_index.json").is_file():
            return folder
    raise ModelNotFound(
        f"the bundled model {name!r} is missing.",
        why="this installation does not carry its files.",
        hint="install the package again, or give --model a folder.",
    )


def _local(model: str | Path) -> Path | None:
    """The folder or the safetensors file that `model` is the path of."""
    try:
        path = Path(model).expanduser()
        if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
            return path
        is_file, is_missing = path.exists(), path.suffix == ".safetensors" and not path.exists()
    except (OSError, ValueError, RuntimeError):  # too long a name, a zero byte in it, `~` and nobody's name
        return None
    if is_missing:
        raise ModelNotFound(
            f"{path} does not exist.", why="no such file.", hint="check the path of the model.", param="model"
        )
    if is_file and path.suffix in PICKLES:
        raise ModelNotFound(
            f"{path} is a pickle.",
            why="a pickle can run any program when it is opened; only safetensors are read.",
            hint=f"videogen convert {path} --out FOLDER   (reads it in a process of its own, weights only)",
        )
    if is_file:
        raise ModelNotFound(
            f"{path} is no model.",
            why="a model is a folder in diffusers' layout or a .safetensors file.",
            hint="tiny, a path, or for example zai-org/CogVideoX-2b.",
        )
    return None


# ---- names ----------------------------------------------------------------------------------------------------------


def parse_name(text: str) -> tuple[str, str | None]:
    """`org/name` and the revision, if one is given.

    >>> parse_name("hf://zai-org/CogVideoX-5b@v1.0")
    ('zai-org/CogVideoX-5b', 'v1.0')
    >>> parse_name("cogvideox-2b")
    ('zai-org/CogVideoX-2b', None)
    """
    name, at, revision = text.removeprefix("hf://").partition("@")
    name = ALIASES.get(name.lower(), name)
    is_name = re.fullmatch(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", name, re.ASCII) and ".." not in name
    if is_name and (not at or re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", revision, re.ASCII)):
        return name, revision or None
    shown = text if len(text) <= 100 else text[:97] + "..."
    address = re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w-][\w.-]*/[\w-][\w.-]*)", text)
    near = difflib.get_close_matches(name.lower(), ALIASES, n=1)
    raise ModelNotFound(
        f"there is no model {shown!r}.",
        why="it is neither a folder here nor a name of the form org/name.",
        hint=address[1] if address else f"did you mean {ALIASES[near[0]]}?" if near else HINT,
    )


HINT = "tiny, a path, or for example zai-org/CogVideoX-2b."


# ---- which files ----------------------------------------------------------------------------------------------------


def select(names: Collection[str], *, weights: bool | Collection[str] = True) -> tuple[list[str], list[str]]:
    """Of all names in a model folder, those that are read, and those that must be there and are not.

    Never a pickle or code, and each network once: plain safetensors, or else the only variant.
    """
    files = [name for name in names if SMALL.fullmatch(name)]
    missing = [name for name in CONFIGS if name not in names]
    wanted = tuple(STEMS) if weights is True else () if weights is False else weights
    if weights:
        for part, stem in ((part, stem) for part, stem in STEMS.items() if part in wanted):
            inside = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
            found, lacking = weight_names(inside, stem, where=part)
            files += [f"{part}/{name}" for name in found]
            missing += [f"{part}/{name}" for name in lacking]
        if not {"tokenizer/tokenizer.json", "tokenizer/spiece.model"} & set(names):
            missing.append("tokenizer/spiece.model")
    return sorted(files), missing


def weight_names(names: Iterable[str], stem: str, *, where: str | Path = "a part") -> tuple[list[str], list[str]]:
    """Of the names in one network's folder, the weights of one variant with their index, and what these lack.

    Variants (`fp16`) are written `{stem}.fp16.safetensors`, and in shards with an index called
    `{stem}.safetensors.index.fp16.json` by diffusers and `{stem}.fp16.safetensors.index.json` by some others. Plain
    ones go before them, and before shards without an index whatever can be opened.

    >>> weight_names(["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], "model")
    (['model.safetensors'], [])
    >>> weight_names(["model-00001-of-00002.safetensors", "model.safetensors.index.json"], "model")[1]
    ['model-00002-of-00002.safetensors']
    """
    single, index, shard = (re.compile(re.escape(stem) + pattern) for pattern in (
        r"(?:\.(\w+))?\.safetensors",
        r"(?:\.(\w+))?\.safetensors\.index(?:\.(\w+))?\.json",
        r"(?:\.(\w+))?-\d{5}-of-(\d{5})\.safetensors",
    ))  # fmt: skip
    variants: dict[str | None, dict[str, list[str]]] = {}
    for name in sorted(names):
        for kind, pattern in (("single", single), ("index", index), ("shards", shard)):
            if found := pattern.fullmatch(name):
                variant = found[1] or (found[2] if kind == "index" else None)
                variants.setdefault(variant, {}).setdefault(kind, []).append(name)
    if not variants:
        return [], [f"{stem}.safetensors"]
    whole = {variant: kinds for variant, kinds in variants.items() if kinds.keys() & {"single", "index"}}
    variants = whole or variants
    if None not in variants and len(variants) > 1:
        raise ModelNotFound(
            f"{where} holds several variants: {', '.join(sorted(map(str, variants)))}.",
            why="none of them is the plain one, so none is meant more than another.",
            hint="keep the files of one variant in the folder.",
        )
    chosen = variants[None if None in variants else next(iter(variants))]
    if "single" in chosen:
        return chosen["single"][:1], []
    shards = chosen.get("shards", [])
    lacking = [] if "index" in chosen else [f"{stem}.safetensors.index.json"]
    if shards:
        count = shards[0][-len("00000.safetensors") :].partition(".")[0]
        expected = [re.sub(r"\d{5}-of", f"{i:05}-of", shards[0]) for i in range(1, min(int(count), 9999) + 1)]
        lacking += [name for name in expected if name not in shards]
    else:
        lacking.append(f"{stem}-00001-of-?????.safetensors")
    return [*chosen.get("index", [])[:1], *shards], lacking


def names(folder: Path) -> list[str]:
    """Files of a model folder and of its parts, as `part/name`."""
    inside = [path for path in folder.iterdir() if path.is_dir()]
    return [path.relative_to(folder).as_posix() for f in (folder, *inside) for path in f.iterdir() if path.is_file()]


# ---- the cache ------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """`HF_HUB_CACHE`, or `hub` in `HF_HOME`."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids the network. huggingface_hub itself reads it once, when it is imported."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def in_cache(name: str, revision: str | None = None) -> Path | None:
    """The snapshot of `org/name` in the Hub's cache, complete or not; also under the organisation's former name."""
    organisation, _, rest = name.partition("/")
    for owner in filter(None, (organisation, FORMER.get(organisation))):
        root = _root(f"{owner}/{rest}")
        ref = root / "refs" / (revision or "main")
        commit = ref.read_text().strip() if ref.is_file() else revision
        if commit and re.fullmatch(r"\w{1,64}", commit) and (root / "snapshots" / commit).is_dir():
            return root / "snapshots" / commit
    return None


def _root(name: str) -> Path:
    return cache_folder() / f"models--{name.replace('/', '--')}"


# ---- the network ----------------------------------------------------------------------------------------------------


def fetch(name: str, revision: str | None = None, *, weights: bool | Collection[str] = True) -> Path:
    """Ask the Hub for `org/name` and bring what is not in the cache yet; the snapshot's folder.

    The list of files and the files are of one commit, whatever happens to the repository meanwhile.
    """
    if is_offline():
        raise _not_cached(name, revision, [])
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=30)
    except Exception as error:  # the Hub's client raises a dozen kinds: not found, gated, no network
        raise _not_fetched(name, revision, error) from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    files, missing = select(sizes, weights=weights)
    if missing:
        pickles = [n for n in sizes if n.startswith(tuple(STEMS)) and n.endswith(PICKLES)]
        only = weights and pickles and all(n.endswith(".safetensors") for n in missing)
        raise ModelNotFound(
            f"{name} has its weights only as pickles." if only else f"{name} is no model that can be opened.",
            why="a pickle can run any program when it is opened; only safetensors are read."
            if only
            else f"it lacks {', '.join(missing[:4])}{', …' if len(missing) > 4 else ''}.",
            hint="a model of the CogVideoX family in diffusers' layout, with safetensors.",
        )
    commit = str(info.sha)
    folder = _root(name) / "snapshots" / commit
    todo = {file: sizes[file] for file in files if not (folder / file).is_file()}
    if weights and todo:
        _announce(name, todo, licence_of(name, info))
    if todo:
        try:
            snapshot_download(name, revision=commit, allow_patterns=list(todo))
        except Exception as error:
            raise _not_fetched(name, revision, error) from error
    if revision != commit:
        _write_ref(_root(name) / "refs" / (revision or "main"), commit)
    return folder


def _announce(name: str, files: Mapping[str, int], licence: str) -> None:
    """Say what will be fetched, or refuse because the disk is too small for it."""
    cache, need = cache_folder(), sum(files.values())
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if need + MARGIN > free:
        raise FileError(
            f"{name} needs {gigabytes(need)}, and {cache} has {gigabytes(free)} free.",
            why=f"{len(files)} files are not in the cache yet.",
            hint="free some disk space, or HF_HUB_CACHE=/a/larger/disk moves the cache.",
        )
    print(
        f"fetching {name}: {len(files)} files, {gigabytes(need)}, into {cache} ({gigabytes(free)} free)\n"
        f"licence: {licence}   https://huggingface.co/{name}",
        file=sys.stderr,
        flush=True,
    )


def licence_of(name: str, info: Any = None) -> str:
    """Of the weights: from the table of published models, or what the model's page declares."""
    if row := next((row for row in PUBLISHED if row.name == name), None):
        return row.licence
    card = getattr(info, "card_data", None)
    found = getattr(card, "license_name", None) or getattr(card, "license", None)
    return re.sub(r"[^\w .+()/-]", "?", str(found))[:80] if found else "unknown: read the model's page"


def gigabytes(size: int) -> str:
    """As the Hub counts: 10⁹ bytes."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _write_ref(ref: Path, commit: str) -> None:
    """What the branch was when it was fetched, where huggingface_hub looks for it too."""
    with written(ref) as part:
        part.write_text(commit)


# ---- what went wrong ------------------------------------------------------------------------------------------------


def download_line(name: str, revision: str | None = None) -> str:
    """The command that fetches the model on another machine."""
    at = f" --revision {revision}" if revision else ""
    return f"hf download {name}{at} " + " ".join(f"--include '{p}'" for p in ("*.json", "*.model", "*.safetensors"))


def _not_cached(name: str, revision: str | None, missing: list[str]) -> ModelNotFound:
    partly = f" (lacks {len(missing)} files: {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''})"
    return ModelNotFound(
        f"{name} is not in the local cache{partly if missing else ''}.",
        why=f"looked for {_root(name)} and may not use the network (--offline or HF_HUB_OFFLINE).",
        hint=f"{download_line(name, revision)}   with network, then copy that folder (HF_HUB_CACHE=DIR moves the "
        "cache), or --model tiny",
    )


def _not_fetched(name: str, revision: str | None, error: Exception) -> ModelNotFound:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        hint = f"accept its licence on https://huggingface.co/{name}, then hf auth login"
    elif {"RepositoryNotFoundError", "RevisionNotFoundError"} & kinds:
        hint = f"check the name and the revision on https://huggingface.co/{name}; a private model needs hf auth login"
    else:
        hint = f"{download_line(name, revision)}   with network (HF_HUB_CACHE moves the cache), or --model tiny"
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return ModelNotFound(f"{name} could not be fetched.", why=f"{type(error).__name__}: {first}", hint=hint)
