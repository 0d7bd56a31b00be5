"""What a model is and can do, read from its small files only. Imports no torch and opens no weights."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from videogen.config import DiTConfig, VAEConfig, check_bounds, from_dict
from videogen.errors import ModelNotFound
from videogen.weights.guard import check_folder, read_json
from videogen.weights.limits import ANY_LENGTH, ANY_SIZE, EVEN_LENGTH, Frames, Sizes
from videogen.weights.models import CONDITIONS, LAYOUTS, conditions_of, layout_of, published

CLASSES = {
    "transformer": ("CogVideoXTransformer3DModel",),
    "vae": ("AutoencoderKLCogVideoX", "VideogenVAE"),  # ours: another chunk plan, which diffusers cannot express
    "text_encoder": ("T5EncoderModel",),
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """A model before its weights are loaded.

    `conditions` are of `weights.models.CONDITIONS`; `layout` is how the weights are told them
    (`weights.models.Published`). Sizes are pixels; `size_multiple` is what height and width must be multiples of.
    `fixed_size`: a learned position table, so only the native size and length work.
    `sizes`, `frames`, `dtypes`, `text_lengths` and `rates` are what it was trained for: open where that is unknown.
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
    layout: str = "text"
    sizes: Sizes = ANY_SIZE
    frames: Frames = ANY_LENGTH
    dtypes: tuple[str, ...] = ()
    text_lengths: tuple[int, ...] = ()
    rates: tuple[float | int, ...] = ()  # frames per second
    fun: bool = False  # used as CogVideoX-Fun uses its weights (`videogen.weights.models.Published`)
    file: Path | None = None  # the single file whose weights go before those of the folder

    @property
    def native_frames(self) -> int:
        """The longest clip of one pass; a longer one is made of windows of this many frames, and says so."""
        return self.num_frames if self.fixed_size else self.frames.most

    @property
    def trained_dtype(self) -> str:
        """What the weights were trained in: of several the first, bfloat16 where it is unknown."""
        return self.dtypes[0] if self.dtypes else "bfloat16"

    @property
    def transformer_sha256(self) -> str | None:
        """Of the transformer's weights, where the model's `videogen.json` has it."""
        return self.sha256.get("transformer/diffusion_pytorch_model.safetensors")

    @property
    def limits(self) -> dict[str, str]:
        """What the model was trained for, in words: the columns of docs/requests.md."""
        length = f"{self.num_frames} only" if self.fixed_size else str(self.frames)
        return {
            "sizes": f"{self.width}x{self.height} only" if self.fixed_size else str(self.sizes),
            "frames": length + ("" if self.native_frames == ANY_LENGTH.most else ", longer in windows"),
            "rates": ", ".join(map(str, self.rates)) or "any",
            "dtypes": ", ".join(self.dtypes) or "unknown",
            "text_lengths": ", ".join(map(str, self.text_lengths or (self.max_sequence_length,))),
        }

    @property
    def facts(self) -> dict[str, Any]:
        """What `videogen.json` says of a model, JSON-ready. Limits that limit nothing are left out."""
        values = {name: value for name, value in asdict(self).items() if name in OWN_FACTS and name != "sha256"}
        idle = {name for name, value in (("sizes", ANY_SIZE), ("frames", ANY_LENGTH)) if getattr(self, name) == value}
        idle |= {name for name in ("dtypes", "text_lengths", "rates") if not values[name]}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if name not in idle}

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
        """[f, c, h, w] of the noise for a clip.

        Models with patches in time work on an even number of latent frames. Those of CogVideoX1.5 are padded; those of
        CogVideoX-Fun make single frames, and clips that have an even number (`frames`).
        """
        scale = self.vae.spatial_compression
        frames = (num_frames - 1) // int(self.vae.temporal_compression_ratio) + 1
        if self.layout in ("text", "frames"):
            frames += -frames % (self.dit.patch_size_t or 1)
        return frames, self.vae.latent_channels, height // scale, width // scale


def read_card(folder: str | Path, *, base: Path | None = None, variant: str | None = None) -> Card:
    """The card of a model folder in diffusers' layout, or of a safetensors file (`videogen.weights.single`).

    `videogen.json` (ours) says what diffusers' configs cannot; where it is absent, the table of published models does,
    and for a model nobody published the config files and the family's defaults. `base`, of a file: the folder with the
    parts that it lacks; `variant`: the published model that its weights are like, where shapes cannot tell.
    """
    folder = Path(folder)
    if folder.is_file():
        from videogen.weights.single import card_of_file

        return card_of_file(folder, base=base, variant=variant)
    if not (folder / "model_index.json").is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise ModelNotFound(
            f"{folder} is not a model folder.",
            why=f"it has no model_index.json (found: {found or 'nothing'}).",
            hint="give a folder in diffusers' layout, a name such as zai-org/CogVideoX-2b, or tiny.",
        )
    check_folder(folder)
    index = read_json(folder / "model_index.json")
    for part, known in CLASSES.items():
        value = index.get(part)
        name = value[-1] if isinstance(value, list) and value else value
        if name is not None and name not in known:
            raise ModelNotFound(
                f"{folder.name} has a {part} of class {name}.",
                why=f"only {', '.join(known)} can be opened.",
                hint="choose a model of the CogVideoX family.",
            )
    dit = from_dict(DiTConfig, read_json(folder / "transformer" / "config.json"), where="transformer/config.json")
    vae = from_dict(VAEConfig, read_json(folder / "vae" / "config.json"), where="vae/config.json")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    check_bounds(scheduler, where="scheduler/scheduler_config.json")
    path = folder / "videogen.json"
    own = own_facts(read_json(path), where=str(path)) if path.is_file() else {}
    return card_of(folder, dit, vae, scheduler, name=_name(folder), own=own)


def card_of(
    folder: Path,
    dit: DiTConfig,
    vae: VAEConfig,
    scheduler: dict[str, Any],
    *,
    name: str,
    own: dict[str, Any] | None = None,
    file: Path | None = None,
) -> Card:
    """The card of a model with these settings: `own` facts first, then those of the published model it is like."""
    facts: dict[str, Any] = {
        "name": name,
        "conditions": conditions_of(dit, vae.latent_channels),
        "layout": layout_of(dit, vae.latent_channels),
        "height": dit.sample_height * vae.spatial_compression,
        "width": dit.sample_width * vae.spatial_compression,
        "num_frames": dit.sample_frames,
        "fps": 8 if dit.patch_size_t is None else 16,
        "sampler": "dpm" if "DPM" in str(scheduler.get("_class_name")) else "ddim",
    }
    if facts["layout"] == "inp" and dit.patch_size_t is not None:
        facts["frames"] = EVEN_LENGTH
    if row := published(dit, facts["name"]):
        facts |= row.facts
    if own:
        facts = _opened(facts | own) | own
    if facts.get("fun"):
        dit = replace(dit, resize_positions=not dit.use_rotary_positional_embeddings)
        vae = replace(vae, first_latent_alone=True)
    return Card(
        folder=folder,
        file=file,
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
    "layout": str,
    "fun": bool,
    "sizes": dict,
    "frames": dict,
    "dtypes": list,
    "text_lengths": list,
    "rates": list,
}
LIMITS = {"sizes": Sizes, "frames": Frames}
ENTRIES = {"conditions": str, "dtypes": str, "text_lengths": int, "rates": (int, float)}  # of the lists


def own_facts(values: dict[str, Any], *, where: str) -> dict[str, Any]:
    """The fields of `videogen.json` that the card holds; its other entries (hashes, notes) belong to other readers."""
    facts = {k: v for k, v in values.items() if k in OWN_FACTS}
    for key, value in facts.items():
        if not isinstance(value, OWN_FACTS[key]):
            raise ModelNotFound(
                f"{where} has {key} = {value!r}.", why="the file is damaged.", hint="fetch or save the model again."
            )
    for key, kind in ENTRIES.items():
        facts |= {key: tuple(facts[key])} if key in facts else {}
        if not all(isinstance(value, kind) for value in facts.get(key, ())):
            raise ModelNotFound(
                f"{where} has {key} = {facts[key]!r}.",
                why="the file is damaged.",
                hint="fetch or save the model again.",
            )
    for key, known in (("conditions", CONDITIONS), ("layout", LAYOUTS)):
        said = facts.get(key, ())
        for value in (said,) if isinstance(said, str) else said:
            if value not in known:
                raise ModelNotFound(
                    f"{where} has {key} = {value!r}.",
                    why=f"this version knows {', '.join(known)}.",
                    hint="correct the file, or a newer videogen.",
                )
    check_bounds(facts, where=where)
    check_bounds({"fps": facts.get("rates")}, where=where)
    return facts | {key: from_dict(cls, facts[key], where=where) for key, cls in LIMITS.items() if key in facts}


def _opened(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts, without limits of the table that a model's own defaults are beyond: so it was trained on."""
    limits: dict[str, Any] = {}
    if "sizes" in facts and not facts["sizes"].allow(facts["width"], facts["height"]):
        limits["sizes"] = ANY_SIZE
    if "frames" in facts and not facts["frames"].allow(facts["num_frames"]):
        limits["frames"] = ANY_LENGTH
    if "rates" in facts and facts["fps"] not in facts["rates"]:
        limits["rates"] = ()
    return facts | limits


def _name(folder: Path) -> str:
    """`org/name` for a folder of the Hub's cache (`models--org--name/snapshots/<commit>`), else the folder's name."""
    for part in folder.resolve().parts:
        if match := re.fullmatch(r"models--(.+?)--(.+)", part):
            return "/".join(match.groups())
    return folder.resolve().name
