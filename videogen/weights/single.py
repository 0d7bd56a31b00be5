"""One safetensors file: a transformer, a VAE or a whole pipeline, recognised by names and shapes alone.

Only the file's header is read to know what it is. What it lacks (a transformer has no VAE, text encoder or tokenizer)
comes from a `base`: a folder, or the published model that the weights are like. Imports no torch before weights are
asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from videogen.config import DiTConfig, VAEConfig, check_bounds, from_dict
from videogen.errors import InvalidRequest, ModelNotFound
from videogen.weights.card import Card, card_of, own_facts, read_card
from videogen.weights.header import Header, Shape, read_header
from videogen.weights.hub import find_model
from videogen.weights.models import PUBLISHED, Published, published
from videogen.weights.sat import SAT_BESIDE, SAT_DIT_DROP, SAT_DIT_RULES, SAT_VAE_DROP, SAT_VAE_RULES
from videogen.weights.table import DIT_RULES, VAE_RULES, Rules, count, listed, to_ours

if TYPE_CHECKING:
    import torch

    from videogen.weights.diffusers import Parts


@dataclass(frozen=True)
class Format:
    """How one network is written. `anchor`: a tensor that every file of this format has, and no other format."""

    part: str
    naming: str
    anchor: str
    rules: Rules | None  # None: names pass as they are
    drop: tuple[str, ...] = ()  # patterns of tensors that are no weights


FORMATS = (
    Format("transformer", "diffusers", "transformer_blocks.0.attn1.to_q.weight", DIT_RULES),
    Format(
        "transformer",
        "sat",
        "transformer.layers.0.attention.query_key_value.weight",
        SAT_DIT_RULES,
        SAT_DIT_DROP,
    ),
    Format("vae", "diffusers", "encoder.down_blocks.0.resnets.0.conv1.conv.weight", VAE_RULES),
    Format("vae", "sat", "encoder.down.0.block.0.conv1.conv.weight", SAT_VAE_RULES, SAT_VAE_DROP),
    Format("text_encoder", "transformers", "encoder.block.0.layer.0.SelfAttention.q.weight", None),
)
EMA = re.compile(r"(^|[._])(model_)?ema[._]")  # prefixes of averaged weights that lie beside the plain ones
METADATA = "videogen"  # our entry in a file's metadata: configs and facts, as JSON


@dataclass(frozen=True)
class Found:
    """One network in a file. `names`: the name that the format's rules know -> the name in the file."""

    file: Path
    format: Format
    names: dict[str, str]
    shapes: dict[str, Shape]  # by our names
    table: str | None = None  # the file's name of a sin-cos table, which is computed here


# ---- what is in a file ----------------------------------------------------------------------------------------------


def find_parts(shapes: Mapping[str, Shape], where: Path, *, like: DiTConfig | None = None) -> dict[str, Found]:
    """The networks among the tensors of a file, by part: transformer, vae, text_encoder.

    Whatever stands before the anchor of a format is its prefix. Every tensor must belong to one of the networks, or be
    known to be no weight.
    """
    sat = any(name.endswith(FORMATS[1].anchor) for name in shapes)
    left = [name for name in shapes if not (sat and _matches(name, SAT_BESIDE, anywhere=True))]
    prefixes: dict[str, Format] = {}
    averaged: set[str] = set()
    for format in FORMATS:
        found = {name.removesuffix(format.anchor) for name in left if name.endswith(format.anchor)}
        found = {prefix for prefix in found if not prefix or prefix.endswith(".")}
        copies = {prefix for prefix in found if EMA.search(prefix)} if len(found) > 1 else set()
        averaged |= copies
        for prefix in found - copies:
            prefixes[prefix + format.anchor] = format
    parts = [format.part for format in prefixes.values()]
    if not parts:
        raise _nothing_known(shapes, where)
    if twice := next((part for part in parts if parts.count(part) > 1), None):
        raise ModelNotFound(
            f"{where} holds several networks that could be its {twice}.",
            why=f"they begin at {listed(sorted(prefixes))}.",
            hint="keep one of them in a file.",
        )
    tensors: dict[str, dict[str, str]] = {anchor: {} for anchor in prefixes}
    heads = sorted(((a.removesuffix(f.anchor), a) for a, f in prefixes.items()), key=lambda h: -len(h[0]))
    strangers = []
    for name in left:
        if any(name.startswith(prefix) for prefix in averaged):
            continue
        for prefix, anchor in heads:
            if name.startswith(prefix):
                tensors[anchor][name.removeprefix(prefix)] = name
                break
        else:
            strangers.append(name)
    if strangers:
        raise ModelNotFound(
            f"{where} holds {count(len(strangers), 'tensor')} that belong to no network: {listed(strangers)}.",
            why="every tensor must be understood; skipping one would load another model than the file holds.",
            hint="check that it is a whole CogVideoX checkpoint, not a LoRA or a quantised file.",
        )
    return {format.part: _found(where, format, tensors[anchor], shapes, like) for anchor, format in prefixes.items()}


def _found(
    file: Path, format: Format, names: dict[str, str], shapes: Mapping[str, Shape], like: DiTConfig | None
) -> Found:
    names = {known: name for known, name in names.items() if not _matches(known, format.drop)}
    theirs = {known: shapes[name] for known, name in names.items()}
    ours = theirs if format.rules is None else to_ours(theirs, format.rules)
    if format.naming == "sat" and "position_table" in ours and not _learned(ours, like):
        known = next(name for name in theirs if "position_table" in to_ours({name: 0}, format.rules or []))
        del ours["position_table"]
        return Found(file, format, {k: name for k, name in names.items() if k != known}, ours, table=names[known])
    return Found(file, format, names, ours)


def _matches(name: str, patterns: Iterable[str], *, anywhere: bool = False) -> bool:
    """`anywhere`: also behind a prefix, as `module.`."""
    return any(fnmatchcase(name, p) or (anywhere and fnmatchcase(name, f"*.{p}")) for p in patterns)


def _learned(shapes: Mapping[str, Shape], like: DiTConfig | None) -> bool:
    """Whether SAT's position table is a weight. It is in 5B-I2V; 2B stores its sin-cos table under the same name."""
    width, channels = shapes["text_proj.weight"][0], shapes["patch_embed.proj.weight"][1]
    if like is not None and (like.width, like.in_channels) == (width, channels):
        return like.use_learned_positional_embeddings
    return any(row.shape == (width, channels, None, True) for row in PUBLISHED)


def _nothing_known(shapes: Mapping[str, Shape], where: Path) -> ModelNotFound:
    if any("lora" in name or ".matrix_A" in name for name in shapes):
        return ModelNotFound(
            f"{where} is a LoRA.",
            why="it changes a model and is none.",
            hint=f"--lora {where.name} beside the --model it was trained on.",
        )
    return ModelNotFound(
        f"{where} holds no network of the CogVideoX family.",
        why=f"no tensor is called …{FORMATS[0].anchor} or like the first of another known format; "
        f"found: {listed(shapes, 3) or 'nothing'}.",
        hint="a transformer, a VAE or a pipeline in diffusers' or SAT's naming.",
    )


# ---- configs from shapes --------------------------------------------------------------------------------------------


def dit_config(shapes: Mapping[str, Shape], like: DiTConfig | None = None, *, where: str = "the file") -> DiTConfig:
    """The transformer's settings from the shapes of its tensors, by our names.

    What shapes cannot tell (native size and length, sin-cos or rotary positions) is that of `like`, where it is as wide
    and patches time alike, else what published models of this width have.
    """
    size = _Sizes(shapes, where)
    width, text_dim = size("text_proj.weight", 2)
    patch = size("patch_embed.proj.weight")
    if len(patch) not in (2, 4):
        raise _incomplete(where, f"patch_embed.proj.weight is {list(patch)}")
    head, out_rows = size("blocks.0.attention.norm_q.weight", 1)[0], size("proj_out.weight", 2)[0]
    patch_size, patch_size_t = (patch[2], None) if len(patch) == 4 else (2, 2)  # those of all published models
    volume = patch_size**2 * (patch_size_t or 1)
    if not head or width % head or out_rows % volume or patch[1] % (1 if len(patch) == 4 else volume):
        raise _incomplete(where, f"width {width}, heads of {head} and patches of {volume} do not fit together")
    told: dict[str, Any] = {
        "num_layers": 1 + max(int(n.split(".")[1]) for n in shapes if re.match(r"blocks\.\d{1,6}\.", n)),
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "in_channels": patch[1] if len(patch) == 4 else patch[1] // volume,
        "out_channels": out_rows // volume,
        "patch_size": patch_size,
        "patch_size_t": patch_size_t,
        "text_embed_dim": text_dim,
        "time_embed_dim": size("time_embed.linear_1.weight", 2)[0],
        "ofs_embed_dim": size("ofs_embed.linear_1.weight", 2)[0] if "ofs_embed.linear_1.weight" in shapes else None,
        "attention_bias": "blocks.0.attention.to_q.bias" in shapes,
        "norm_elementwise_affine": "blocks.0.norm1.norm.weight" in shapes,
        "use_learned_positional_embeddings": "position_table" in shapes,
    }
    alike = like is not None and (like.width, like.patch_size_t) == (width, patch_size_t)
    rest = asdict(like) if like is not None and alike else asdict(family_dit(width, patch_size_t))
    if "position_table" in shapes:
        told["use_rotary_positional_embeddings"] = True
    if patch_size_t is None:
        told["patch_bias"] = "patch_embed.proj.bias" in shapes
    return from_dict(DiTConfig, rest | told, where=where)


def vae_config(shapes: Mapping[str, Shape], like: VAEConfig | None = None, *, where: str = "the file") -> VAEConfig:
    """The VAE's settings from the shapes of its tensors, by our names; the rest as in `like`."""
    size = _Sizes(shapes, where)
    blocks = 1 + max((int(n.split(".")[2]) for n in shapes if re.match(r"encoder\.down\.\d{1,3}\.", n)), default=0)
    outs = tuple(size(f"encoder.down.{i}.resnets.0.conv1.weight", 5)[0] for i in range(blocks))
    told = {
        "in_channels": size("encoder.conv_in.weight", 5)[1],
        "out_channels": size("decoder.conv_out.weight", 5)[0],
        "latent_channels": size("decoder.conv_in.weight", 5)[1],
        "block_out_channels": outs,
        "layers_per_block": len(
            [n for n in shapes if re.fullmatch(r"encoder\.down\.0\.resnets\.\d+\.conv1\.weight", n)]
        ),
        "down_block_types": ("CogVideoXDownBlock3D",) * blocks,
        "up_block_types": ("CogVideoXUpBlock3D",) * blocks,
    }
    config = from_dict(VAEConfig, asdict(like or VAEConfig()) | told, where=where)
    if any(channels % config.norm_num_groups for channels in outs):
        raise ModelNotFound(
            f"{where} holds a VAE of {', '.join(map(str, outs))} channels.",
            why=f"shapes do not tell its groups per norm, and {config.norm_num_groups} do not divide these.",
            hint="--base MODEL with a VAE of this kind.",
        )
    return config


class _Sizes:
    """Shapes by name; one that is missing or of another rank is an error that names it."""

    def __init__(self, shapes: Mapping[str, Shape], where: str) -> None:
        self.shapes, self.where = shapes, where

    def __call__(self, name: str, rank: int | None = None) -> Shape:
        shape = self.shapes.get(name)
        if shape is None or (rank is not None and len(shape) != rank):
            raise _incomplete(self.where, f"{name} is {'missing' if shape is None else list(shape)}")
        return shape


def _incomplete(where: str, why: str) -> ModelNotFound:
    return ModelNotFound(
        f"{where} is no whole network of the CogVideoX family.",
        why=f"{why} (by our names).",
        hint="fetch or copy the file again.",
    )


# ---- what all models of a kind share (their published configs) ------------------------------------------------------


def family_dit(width: int, patch_size_t: int | None) -> DiTConfig:
    """What shapes do not tell of a transformer: 2B adds a sin-cos table, all others turn by position."""
    if patch_size_t:
        return DiTConfig(
            use_rotary_positional_embeddings=True,
            patch_bias=False,
            sample_height=96,
            sample_width=170,
            sample_frames=81,
        )
    return DiTConfig(use_rotary_positional_embeddings=width != 1920)


def family_vae(dit: DiTConfig, like: VAEConfig) -> VAEConfig:
    """One set of weights serves all models; scale and its direction are each model's own."""
    return replace(
        like,
        scaling_factor=1.15258426 if dit.width == 1920 else 0.7,
        invert_scale_latents=dit.patch_size_t is not None,
    )


def family_scheduler(dit: DiTConfig, sampler: str) -> dict[str, Any]:
    """`scheduler_config.json` of the published models."""
    return {
        "_class_name": "CogVideoXDPMScheduler" if sampler == "dpm" else "CogVideoXDDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "sample_max_value": 1.0,
        "set_alpha_to_one": True,
        "snr_shift_scale": 3.0 if dit.width == 1920 else 1.0,
        "steps_offset": 0,
        "timestep_spacing": "trailing",
    }


# ---- a card, and the parts ------------------------------------------------------------------------------------------


def card_of_file(path: Path, *, base: Path | None = None, variant: str | None = None) -> Card:
    """What the model in a file is and can do, from its header.

    `base` is a model folder: the settings of its parts, where it is of the same kind. `variant` names the published
    model whose use this one has, for weights of one shape and several uses. Raises ModelNotFound, or InvalidRequest for
    a variant of another shape.
    """
    below = read_card(base) if base else None
    header = read_header(path)
    own = own_of(header, path)
    parts = find_parts(header.shapes, path, like=own.get("transformer") or (below.dit if below else None))
    return card_of_parts(parts, path, below=below, variant=variant, own=own)


def card_of_parts(
    parts: Mapping[str, Found],
    path: Path,
    *,
    below: Card | None = None,
    variant: str | None = None,
    own: dict[str, Any] | None = None,
) -> Card:
    """The card of a model whose networks are `parts`, called after `path`, and else that of its base, `below`."""
    own, row = own or {}, _variant(variant)
    like = own.get("transformer") or (below.dit if below else None)
    if "transformer" in parts:
        dit = dit_config(parts["transformer"].shapes, like, where=path.name)
    elif below:
        dit = below.dit
    else:
        raise ModelNotFound(
            f"{path} holds {_a(parts)} and no transformer.",
            why="it is one part of a model, and does not say of which.",
            hint="--base MODEL: the model that it replaces a part of.",
        )
    if row and row.shape != _shape(dit):
        raise InvalidRequest(
            f"{path.name} is not of the shape of {row.name}.",
            why=f"width, input channels, patch in time, stored table: {_shape(dit)}, there {row.shape}.",
            hint=f"alike are {', '.join(r.name for r in PUBLISHED if r.shape == _shape(dit)) or 'none'}.",
            param="variant",
        )
    known = row or published(dit, path.stem)
    alike = below is not None and (below.dit.width, below.dit.patch_size_t) == (dit.width, dit.patch_size_t)
    like_vae = own.get("vae") or (below.vae if below else None)
    vae = vae_config(parts["vae"].shapes, like_vae, where=path.name) if "vae" in parts else like_vae or VAEConfig()
    if known and not alike and "vae" not in own:
        vae = family_vae(dit, vae)
    if below or "vae" in parts:
        _check_base(path, dit, vae, below)
    scheduler = own.get("scheduler") or (
        below.scheduler if below and alike else family_scheduler(dit, known.sampler if known else "ddim")
    )
    facts = own.get("facts", {})
    if not row and not facts and below and _shape(below.dit) == _shape(dit):
        facts = {name: getattr(below, name) for name in FROM_BASE}
    folder = below.folder if below else path
    card = card_of(folder, dit, vae, scheduler, name=row.name if row else path.stem, own=facts, file=path)
    return replace(card, name=str(facts.get("name", path.stem)), sha256={})


def _check_base(path: Path, dit: DiTConfig, vae: VAEConfig, below: Card | None) -> None:
    """Parts of different models must at least speak the same latents and text embeddings."""
    pairs = {"latent channels": (dit.out_channels, vae.latent_channels)}
    if below:
        pairs["numbers per text token"] = (dit.text_embed_dim, below.dit.text_embed_dim)
    for what, (needed, there) in pairs.items():
        if needed != there:
            raise ModelNotFound(
                f"{path.name} does not fit {below.name if below else 'its VAE'}.",
                why=f"its transformer takes {needed} {what}, there are {there}.",
                hint="--base MODEL of the same kind.",
            )


FROM_BASE = ("conditions", "layout", "height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale")
FROM_BASE += ("sampler", "licence", "sizes", "frames", "dtypes", "text_lengths", "rates")


def find_base(
    parts: Mapping[str, Found],
    path: Path,
    base: str | Path | None = None,
    *,
    variant: str | None = None,
    offline: bool = False,
    weights: bool = True,
) -> Path:
    """The folder with what `parts` of the file at `path` lack: `base`, or the published model they are like.

    Looked for in the cache, then on the network; without `weights` for its small files only. Raises ModelNotFound that
    says what is missing and where it was looked for.
    """
    name = base
    if name is None:
        row = _variant(variant) or published(card_of_parts(parts, path).dit, path.stem)
        if row is None:
            raise ModelNotFound(
                f"{path.name} holds {_a(parts)} alone, of a shape that no published model has.",
                why=f"its {_lacking(parts)} must come from a model folder.",
                hint="--base FOLDER",
            )
        name = row.name
    try:
        needed = [part for part in WORDS if part not in parts] if weights else False
        folder = find_model(name, offline=offline, weights=needed)
    except ModelNotFound as error:
        raise ModelNotFound(
            f"{path.name} holds {_a(parts)} alone.",
            why=f"its {_lacking(parts)} come from {name}: {error.what} {error.why}",
            hint=f"--base FOLDER|NAME, or {error.hint}",
        ) from error
    if folder.is_file():
        raise InvalidRequest(
            f"the base {folder} is a file.",
            why=f"the {_lacking(parts)} come from it.",
            hint="--base FOLDER",
            param="base",
        )
    return folder


def open_card(
    path: Path,
    *,
    base: str | Path | None = None,
    variant: str | None = None,
    offline: bool = False,
    weights: bool = True,
) -> Card:
    """The card of what `find_model` found, and of a single file with its base: whole, or without `weights` its card."""
    if not path.is_file():
        if base or variant:
            name = "base" if base else "variant"
            raise InvalidRequest(
                f"{name} was given, and {path} is a whole model.",
                why="base and variant complete a single file of weights.",
                hint=f"leave --{name} out.",
                param=name,
            )
        return read_card(path)
    header = read_header(path)
    parts = find_parts(header.shapes, path, like=own_of(header, path).get("transformer"))
    folder = find_base(parts, path, base, variant=variant, offline=offline, weights=weights)
    return read_card(path, base=folder, variant=variant)


def parts_beside(card: Card) -> list[str]:
    """The networks that come from the card's folder: all, or those that its file lacks."""
    there = file_parts(card)
    return [part for part in WORDS if part not in there]


def load_parts(
    card: Card,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    components: Collection[str] | None = None,
) -> Parts:
    """The model of a card: the parts that its file holds, and the others from its folder."""
    from videogen.weights import diffusers

    where: dict[str, Any] = {"device": device, "dtype": dtype}
    components = diffusers.PARTS if components is None else components
    if card.file is None:
        return diffusers.load_folder(card.folder, components=components, **where)
    found = {OURS[part]: one for part, one in file_parts(card).items() if OURS[part] in components}
    rest = [name for name in components if name not in found and name != "scheduler"]
    parts = diffusers.load_folder(card.folder, components=rest, **where) if rest else diffusers.Parts()
    scheduler = card.scheduler if "scheduler" in components else None
    new: dict[str, Any] = {name: load_part(card, one, **where) for name, one in found.items()}
    return replace(parts, scheduler_config=scheduler, **new)


def file_parts(card: Card) -> dict[str, Found]:
    """The networks that the card's single file holds, by diffusers' names; none of a folder."""
    return {} if card.file is None else find_parts(read_header(card.file).shapes, card.file, like=card.dit)


OURS = {"transformer": "dit", "vae": "vae", "text_encoder": "text_encoder"}  # the parts' names in diffusers and here


def load_part(card: Card, found: Found, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> Any:
    """One network that was found in a file; its settings, and those of its tokenizer, are the card's."""
    from videogen.models.dit import DiT
    from videogen.models.vae import VAE
    from videogen.weights.diffusers import load_text_encoder
    from videogen.weights.load import build

    where: dict[str, Any] = {"device": device, "dtype": dtype}
    if found.format.rules is None:
        length = card.max_sequence_length
        return load_text_encoder(card.folder, max_length=length, file=found.file, names=found.names, **where)
    if found.table:
        check_table(found.file, found.table, card.dit)
    make = (lambda: VAE(card.vae)) if found.format.part == "vae" else (lambda: DiT(card.dit))
    return build(make, [found.file], found.format.rules, names=found.names, **where)


def check_table(path: Path, name: str, config: DiTConfig) -> None:
    """That the position table 2B stores is the sin-cos table which is computed here; else it would be a weight."""
    import torch

    from videogen.models.positions import sincos_table, trained_latent_frames
    from videogen.weights.load import tensor_of

    stored = tensor_of(path, name)
    video = sincos_table(config, trained_latent_frames(config), config.sample_height, config.sample_width)
    table = torch.cat([video.new_zeros(config.max_text_seq_length, config.width), video])[None]
    close = stored.shape == table.shape and bool(
        ((stored.double() - table).abs() <= 8 * torch.finfo(stored.dtype).eps + 1e-6).all()
    )
    if not close:
        raise ModelNotFound(
            f"{path} stores a position table {list(stored.shape)} that is not the sin-cos table of its size.",
            why="a table that was trained would be lost.",
            hint="--base FOLDER or --variant NAME of a model with a learned table, if it is one.",
        )


# ---- small helpers --------------------------------------------------------------------------------------------------


def own_of(header: Header, path: Path) -> dict[str, Any]:
    """Configs and facts that a file of ours carries in its metadata; absent in others."""
    text = header.metadata.get(METADATA)
    if text is None:
        return {}
    try:
        values = json.loads(text)
        known: dict[str, Any] = {}
        for part, kind in (("transformer", DiTConfig), ("vae", VAEConfig)):
            if part in values:
                known[part] = from_dict(kind, values[part], where=f"{path.name}'s metadata")
        if "scheduler" in values:
            check_bounds(values["scheduler"], where=f"{path.name}'s metadata")
            known["scheduler"] = dict(values["scheduler"])
        if "facts" in values:
            known["facts"] = own_facts(values["facts"], where=f"{path.name}'s metadata")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise ModelNotFound(
            f"{path.name} carries metadata that cannot be read.",
            why=f"{type(error).__name__} in its entry {METADATA!r}.",
            hint="fetch or copy the file again.",
        ) from error
    return known


def _variant(name: str | None) -> Published | None:
    if name is None:
        return None
    short = name.lower().rpartition("/")[2]
    row = next((row for row in PUBLISHED if row.name.lower().rpartition("/")[2] == short), None)
    if row is None:
        raise InvalidRequest(
            f"there is no variant {name!r}.",
            why=f"known are {', '.join(row.name for row in PUBLISHED)}.",
            hint="the published model that the weights were trained like.",
            param="variant",
        )
    return row


def _shape(dit: DiTConfig) -> tuple[int, int, int | None, bool]:
    return dit.width, dit.in_channels, dit.patch_size_t, dit.use_learned_positional_embeddings


WORDS = {"transformer": "transformer", "vae": "VAE", "text_encoder": "text encoder"}


def _lacking(parts: Mapping[str, Found]) -> str:
    names = [word for part, word in WORDS.items() if part not in parts]
    return ", ".join(names) + " and tokenizer" if names else "tokenizer"


def _a(parts: Iterable[str]) -> str:
    return "a " + " and a ".join(WORDS[part] for part in parts)
