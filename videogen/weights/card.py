"""What a model is and can do, read from its small files only. Imports no torch and opens no weights."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import videogen
from videogen.config import DiTConfig, VAEConfig, from_dict
from videogen.errors import ModelNotFound
from videogen.weights.models import conditions_of, published

CLASSES = {
    "transformer": ("CogVideoXTransformer3DModel",),
    "vae": ("AutoencoderKLCogVideoX", "VideogenVAE"),  # ours: another chunk plan, which diffusers cannot express
    "text_encoder": ("T5EncoderModel",),
}
WEIGHT_PATTERNS = ["*.json", "*.txt", "*.model", "*.safetensors"]
CARD_PATTERNS = ["model_index.json", "*/config.json", "scheduler/*.json", "videogen.json"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """A model before its weights are loaded.

    `conditions` is a subset of text, first_frame, last_frame, keyframes, video. Sizes are pixels; `size_multiple` is
    what height and width must be multiples of. `fixed_size`: a learned position table, so only the native size and
    length work.
    """

    folder: Path
    name: str
    dit: DiTConfig
    vae: VAEConfig
    scheduler: dict[str, Any]
    conditions: tuple[str, ...]
    height: int
    width: int
    num_frames: int
    fps: float | int
    size_multiple: int
    fixed_size: bool
    max_sequence_length: int
    num_inference_steps: int = 50
    guidance_scale: float | int = 6.0
    sampler: str = "ddim"
    provenance: dict[str, Any] = field(default_factory=dict)
    licence: str = "unknown"
    sha256: dict[str, str] = field(default_factory=dict)  # of the model's files, where its `videogen.json` has them

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
        """[f, c, h, w] of the noise for a clip; models with patches in time work on an even number of latent frames."""
        scale = self.vae.spatial_compression
        frames = (num_frames - 1) // int(self.vae.temporal_compression_ratio) + 1
        frames += -frames % (self.dit.patch_size_t or 1)
        return frames, self.vae.latent_channels, height // scale, width // scale


def read_card(folder: str | Path) -> Card:
    """The card of a model folder in diffusers' layout.

    `videogen.json` (ours) says what diffusers' configs cannot; where it is absent, the table of published models does,
    and for a model nobody published the config files and the family's defaults.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise ModelNotFound(
            f"{folder} is not a model folder.",
            why=f"it has no model_index.json (found: {found or 'nothing'}).",
            hint="give a folder in diffusers' layout, a name such as zai-org/CogVideoX-2b, or tiny.",
        )
    index = read_json(folder / "model_index.json")
    for part, known in CLASSES.items():
        name = (index.get(part) or [None, None])[1]
        if name is not None and name not in known:
            raise ModelNotFound(
                f"{folder.name} has a {part} of class {name}.",
                why=f"only {', '.join(known)} can be opened.",
                hint="choose a model of the CogVideoX family.",
            )
    dit = from_dict(DiTConfig, read_json(folder / "transformer" / "config.json"), where="transformer/config.json")
    vae = from_dict(VAEConfig, read_json(folder / "vae" / "config.json"), where="vae/config.json")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    facts: dict[str, Any] = {
        "name": _name(folder),
        "conditions": conditions_of(dit, vae.latent_channels),
        "height": dit.sample_height * vae.spatial_compression,
        "width": dit.sample_width * vae.spatial_compression,
        "num_frames": dit.sample_frames,
        "fps": 8 if dit.patch_size_t is None else 16,
        "sampler": "dpm" if "DPM" in scheduler.get("_class_name", "") else "ddim",
    }
    if row := published(dit):
        facts |= {
            k: getattr(row, k) for k in ("conditions", "height", "width", "num_frames", "fps", "sampler", "licence")
        }
    if (folder / "videogen.json").is_file():
        facts |= _own_facts(folder / "videogen.json")
    return Card(
        folder=folder,
        dit=dit,
        vae=vae,
        scheduler=scheduler,
        size_multiple=vae.spatial_compression * dit.patch_size,
        fixed_size=dit.use_learned_positional_embeddings,
        max_sequence_length=dit.max_text_seq_length,
        **facts,
    )


OWN_FACTS = {
    "name": str,
    "conditions": list,
    "height": int,
    "width": int,
    "num_frames": int,
    "fps": (int, float),
    "num_inference_steps": int,
    "guidance_scale": (int, float),
    "sampler": str,
    "provenance": dict,
    "licence": str,
    "sha256": dict,
}


def _own_facts(path: Path) -> dict[str, Any]:
    """The fields of `videogen.json` that the card holds; its other entries (hashes, notes) belong to other readers."""
    facts = {k: v for k, v in read_json(path).items() if k in OWN_FACTS}
    for key, value in facts.items():
        if not isinstance(value, OWN_FACTS[key]):
            raise ModelNotFound(
                f"{path} has {key} = {value!r}.", why="the file is damaged.", hint="fetch or save the model again."
            )
    if "conditions" in facts:
        facts["conditions"] = tuple(facts["conditions"])
    return facts


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"{path} cannot be read.",
            why=f"{type(error).__name__}: {error}",
            hint="the model folder is incomplete: fetch or copy it again.",
        ) from error
    if not isinstance(values, dict):
        raise ModelNotFound(f"{path} is not a JSON object.", hint="fetch or copy the model again.")
    return values


def _name(folder: Path) -> str:
    """`org/name` for a folder of the Hub's cache (`models--org--name/snapshots/<commit>`), else the folder's name."""
    for part in folder.resolve().parts:
        if match := re.fullmatch(r"models--(.+?)--(.+)", part):
            return "/".join(match.groups())
    return folder.resolve().name


def find_model(model: str | Path, *, revision: str | None = None, offline: bool = False, weights: bool = True) -> Path:
    """The folder of a model: `tiny` (bundled), a path, or `org/name[@revision]` on the Hub or in its cache.

    With `weights=False` only the small files are fetched: enough for `read_card`, so that a request is checked before
    gigabytes travel.
    """
    if str(model) == "tiny":
        return _bundled("tiny")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelNotFound(
            f"{model} is a single file.",
            why="models are folders in diffusers' layout.",
            hint="give the folder around it.",
        )
    name, _, tag = str(model).partition("@")
    if "://" in name or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ModelNotFound(
            f"there is no model {str(model)!r}.",
            why="it is neither a folder here nor a name of the form org/name.",
            hint="tiny, a path, or for example zai-org/CogVideoX-2b.",
        )
    return _from_hub(name, revision or tag or None, offline, WEIGHT_PATTERNS if weights else CARD_PATTERNS)


def _bundled(name: str) -> Path:
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


def _from_hub(name: str, revision: str | None, offline: bool, patterns: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download

    offline = offline or constants.HF_HUB_OFFLINE
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=offline, allow_patterns=patterns))
    except Exception as error:  # the Hub's client raises a dozen kinds: not found, gated, no network, no disk
        at = f" --revision {revision}" if revision else ""
        raise ModelNotFound(
            f"{name} is not in the local cache." if offline else f"{name} could not be fetched.",
            why=f"looked in {constants.HF_HUB_CACHE}." if offline else f"{type(error).__name__}: {_first_line(error)}",
            hint=f"hf download {name}{at}   on a machine with network (HF_HUB_CACHE moves the cache), or --model tiny",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
