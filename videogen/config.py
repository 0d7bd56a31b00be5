"""Model settings as frozen dataclasses, with the names of the published config files. Imports no torch.

Variants are data: 2B, 5B, 5B-I2V, 1.5, 1.5-I2V and the 32- and 33-channel derivatives differ only in these fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from videogen.errors import InvalidRequest

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """`transformer/config.json`. Defaults are CogVideoX-2B (arXiv:2408.06072)."""

    num_layers: int = 30
    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    time_embed_dim: int = 512
    ofs_embed_dim: int | None = None
    text_embed_dim: int = 4096
    dropout: float = 0.0
    attention_bias: bool = True
    sample_width: int = 90
    sample_height: int = 60
    sample_frames: int = 49
    patch_size: int = 2
    patch_size_t: int | None = None
    temporal_compression_ratio: int = 4
    max_text_seq_length: int = 226
    activation_fn: str = "gelu-approximate"
    timestep_activation_fn: str = "silu"
    norm_elementwise_affine: bool = True
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    patch_bias: bool = True
    add_noise_in_inpaint_model: bool = False  # CogVideoX-Fun from V1.1 5B on: known pixels were told with noise
    resize_positions: bool = False  # ours, told by the card: another size stretches the sin-cos table of the native one

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """`vae/config.json`. Defaults are the VAE of every published CogVideoX.

    `frame_batch_size` and `latent_batch_size` are the chunk plan: part of the numbers (GroupNorm runs over a chunk),
    not a memory knob. diffusers has them as constants, so they are written to the file only where they differ.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("CogVideoXDownBlock3D",) * 4
    up_block_types: tuple[str, ...] = ("CogVideoXUpBlock3D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: int = 3
    act_fn: str = "silu"
    norm_eps: float = 1e-6
    norm_num_groups: int = 32
    temporal_compression_ratio: int | float = 4
    sample_height: int = 480
    sample_width: int = 720
    scaling_factor: float = 1.15258426
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    invert_scale_latents: bool = False
    frame_batch_size: int = 8  # ours: pixel frames per encoded chunk
    latent_batch_size: int = 2  # ours: latent frames per decoded chunk
    first_latent_alone: bool = False  # ours, told by the card: 1, 2, 2, … as CogVideoX-Fun decodes, not 3, 2, 2, …

    @property
    def spatial_compression(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


TOLD_BY_CARD = ("resize_positions", "first_latent_alone")  # how the weights are used, which their configs do not say


# Settings of CogVideoX-Fun's class that describe nothing in the network while the first of them is off.
CROSS = ("is_train_cross", "cross_attn_in_channels", "cross_attn_interval", "cross_attn_dim_head")
CROSS += ("cross_attn_num_heads",)


def from_dict(cls: type[T], values: dict[str, Any], *, where: str = "config") -> T:
    """`cls(**values)`, strict: an unknown setting is an error that suggests the nearest name; lists become tuples.

    Types are checked, and numbers against `BOUNDS`, so that nothing is allocated for a damaged or hostile file.

    Keys that start with an underscore (`_class_name`, `_diffusers_version`) are the file's own and ignored.
    """
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    known: dict[str, Any] = {}
    for key, value in values.items():
        if key.startswith("_") or (key in CROSS and not values.get(CROSS[0])):
            continue
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            raise InvalidRequest(
                f"{where} has no setting {key!r}.",
                why=f"{cls.__name__} knows: {', '.join(sorted(names))}.",
                hint=f"did you mean {near[0]!r}?" if near else "remove it.",
                param=key,
            )
        known[key] = tuple(value) if isinstance(value, list) else value
    hints = get_type_hints(cls)
    for key, value in known.items():
        if not _fits(value, hints[key]):
            raise InvalidRequest(
                f"{where} has {key} = {_short(value)}.",
                why=f"{cls.__name__} takes {getattr(hints[key], '__name__', hints[key])} there.",
                hint="correct the file, or fetch it again.",
                param=key,
            )
    check_bounds(known, where=where)
    return cls(**known)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a JSON file is of a field's type; whole numbers are numbers too, truth values are not."""
    if isinstance(hint, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(one, get_args(hint)[0]) for one in value)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, hint)


# What a setting of a model may be, several times beyond all published ones: a file with more is damaged or hostile, and
# is refused before anything of that size is made. Of a list, every number, and 4096 of them at most.
BOUNDS: dict[str, tuple[float, float]] = {
    "num_layers": (1, 128),
    "num_attention_heads": (1, 256),
    "attention_head_dim": (1, 512),
    "in_channels": (1, 1024),
    "out_channels": (1, 1024),
    "time_embed_dim": (1, 16384),
    "ofs_embed_dim": (1, 16384),
    "text_embed_dim": (1, 16384),
    "sample_width": (1, 8192),
    "sample_height": (1, 8192),
    "sample_frames": (1, 4097),
    "patch_size": (1, 16),
    "patch_size_t": (1, 16),
    "temporal_compression_ratio": (1, 64),
    "max_text_seq_length": (1, 4096),
    "freq_shift": (-1000, 1000),
    "dropout": (0, 1),
    "norm_eps": (0, 1),
    "spatial_interpolation_scale": (1e-3, 1e3),
    "temporal_interpolation_scale": (1e-3, 1e3),
    # of a VAE
    "block_out_channels": (1, 4096),
    "latent_channels": (1, 256),
    "layers_per_block": (1, 16),
    "norm_num_groups": (1, 1024),
    "scaling_factor": (1e-6, 1e6),
    "shift_factor": (-1e6, 1e6),
    "latents_mean": (-1e6, 1e6),
    "latents_std": (1e-6, 1e6),
    "frame_batch_size": (1, 1024),
    "latent_batch_size": (1, 1024),
    # of T5
    "d_model": (1, 16384),
    "d_ff": (1, 131072),
    "d_kv": (1, 1024),
    "num_heads": (1, 512),
    "num_decoder_layers": (1, 128),
    "vocab_size": (1, 1_000_000),
    "relative_attention_num_buckets": (2, 1024),
    "relative_attention_max_distance": (2, 65536),
    "layer_norm_epsilon": (0, 1),
    "dropout_rate": (0, 1),
    # of a scheduler
    "num_train_timesteps": (1, 100_000),
    "beta_start": (0, 1),
    "beta_end": (0, 1),
    "snr_shift_scale": (1e-3, 1e3),
    "shift": (1e-3, 1e3),
    "trained_betas": (0, 1),
    # of videogen.json
    "height": (1, 8192),
    "width": (1, 8192),
    "num_frames": (1, 4097),
    "fps": (0.01, 240),
    "num_inference_steps": (1, 1000),
    "guidance_scale": (0, 1000),
}


def check_bounds(values: Mapping[str, Any], *, where: str) -> None:
    """Refuse settings outside `BOUNDS`; what is absent or None passes, and so do names that have no bounds."""
    for key in values.keys() & BOUNDS.keys():
        least, most = BOUNDS[key]
        given = values[key] if isinstance(values[key], list | tuple) else [values[key]]
        for value in [] if given == [None] else given or [None]:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not least <= value <= most or len(given) > 4096:
                raise InvalidRequest(
                    f"{where} has {key} = {_short(values[key])}.",
                    why=f"it is from {least:g} to {most:g}.",
                    hint="correct the file, or fetch it again.",
                    param=key,
                )


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # more digits than Python prints
        text = "a very large number"
    return text if len(text) <= 60 else text[:57] + "..."


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as JSON-ready values: tuples become lists.

    The chunk plan and Fun's noise are left out where they are as usual, what a card tells always: diffusers' classes do
    not know these names, and how a folder is used is written in its `videogen.json`.
    """
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    usual = {"frame_batch_size": 8, "latent_batch_size": 2, "add_noise_in_inpaint_model": False}
    for name in [*(name for name, value in usual.items() if values.get(name) == value), *TOLD_BY_CARD]:
        values.pop(name, None)
    return values


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How parameters are moved, the same for every model. Rates are per optimiser step; the rate ends at 0."""

    steps: int
    optimizer: str = "adamw"  # or "muon": matrices by Muon, everything else by AdamW
    learning_rate: float = 1e-3
    muon_learning_rate: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    warmup_steps: int = 100
    decay_fraction: float = 0.3  # the last part of the run, over which the rate falls linearly to 0
    ema_decay: float = 0.999
    bfloat16: bool = True
    seed: int = 0
    log_every: int = 20
    save_every: int = 200


@dataclass(frozen=True, kw_only=True)
class ClipStage:
    """A stretch of a VAE's training on clips of one kind; a share of its steps sees single frames instead."""

    steps: int
    num_frames: int
    size: int  # side of the square crop, pixels
    batch_size: int
    image_share: float = 0.25


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """How often the clips of a training stream show what (`data.world.draw_scene`). Without settings, one object."""

    checkered: float = 0.1  # share of clips on a checkered ground
    two: float = 0.0  # share with two objects
    camera: float = 0.0  # share of the checkered ones whose camera moves
    style: float = 0.0  # share in black and white, in sepia or sketched


@dataclass(frozen=True, kw_only=True)
class VAETraining:
    """`configs/train/*vae*.yaml`."""

    task: str = "vae"
    folder: str = "runs/vae"  # state, log and result
    model: VAEConfig
    stages: list[ClipStage]
    fit: FitConfig
    height: int = 64
    width: int = 64
    num_frames: int = 17
    world: WorldConfig = dataclasses.field(default_factory=WorldConfig)
    kl_weight: float = 1e-4
    detail_weight: float = 4.0  # extra weight of pixels on edges and in motion


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """A small T5 encoder, trained with the DiT."""

    d_model: int = 128
    d_ff: int = 256
    num_layers: int = 2
    num_heads: int = 4


@dataclass(frozen=True, kw_only=True)
class ClipTraining:
    """What every training on clips of the world has, encoded once beforehand: which clips, and what is told of them."""

    fit: FitConfig
    clips: int = 20_000  # how many clips are encoded once, before training
    batch_size: int = 32
    height: int = 64
    width: int = 64
    num_frames: int = 17
    world: WorldConfig = dataclasses.field(default_factory=WorldConfig)
    caption_dropout: float = 0.1  # share of samples that see the empty prompt
    frame_conditions: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"none": 0.5, "first": 0.2, "last": 0.05, "first+last": 0.15, "keyframes": 0.1}
    )


@dataclass(frozen=True, kw_only=True)
class FrameStage:
    """A stretch of a DiT's training on the first frames of each clip only; 1 is a single frame from anywhere in it."""

    share: float  # of the run's steps
    latent_frames: int


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Deferred masking: most steps compute a part of the video tokens only (arXiv:2407.15811)."""

    share: float = 0.75  # of the unknown video tokens that are dropped, behind the mixer
    mixer_layers: int = 1  # light blocks over all tokens, in training only
    finish: float = 0.2  # the last part of the run, which drops nothing


@dataclass(frozen=True, kw_only=True)
class DiTTraining(ClipTraining):
    """`configs/train/*dit*.yaml`."""

    task: str = "dit"
    folder: str = "runs/dit"  # state, latents, log and result
    name: str = "tiny"  # of the model that is made
    model: DiTConfig
    text_encoder: TextEncoderConfig
    vae: str = ""  # folder of the trained VAE
    scheduler: dict[str, Any] = dataclasses.field(default_factory=dict)
    fps: int = 8
    num_inference_steps: int = 50  # defaults of the model that is made
    guidance_scale: float = 6.0
    timesteps: str = "informative"  # or "uniform"
    curriculum: list[FrameStage] = dataclasses.field(default_factory=list)  # before the whole clips: shorter ones
    masking: MaskingConfig | None = None


@dataclass(frozen=True, kw_only=True)
class DistillTraining(ClipTraining):
    """`configs/train/distill*.yaml`: a student of few steps, without guidance, from a teacher of many.

    `fit` is the loop of the second phase, in which student and critic learn in turn; `consistency` that of the first.
    """

    task: str = "distill"
    folder: str = "runs/distill"  # state, latents, log and result
    name: str = "tiny-4step"  # of the model that is made
    teacher: str = "tiny"  # a model folder or name, as for `--model`
    consistency: FitConfig  # 0 steps: the student starts as its teacher
    prompts: str = ""  # a file with a prompt per line, instead of the world's clips; then there are no latents
    guidance_scale: float = 6.0  # of the teacher: the student has it built in
    num_inference_steps: int = 4  # the student's
    path_steps: int = 16  # of the teacher's path in the consistency phase
    path_jumps: int = 16  # of those, made by the teacher before the student looks again; all: to the path's end
    critic_steps: int = 5  # steps of the critic before each of the student
    critic_rate: float = 1.0  # the critic's share of the learning rate
    caption_dropout: float = 0.02  # no guidance needs the empty prompt: it stays a prompt that users may give
    gradient_checkpointing: bool = False


def load_yaml(path: str | Path, cls: type[T], overrides: Sequence[str] = ()) -> T:
    """A YAML file and `key=value` overrides (dotted) as a dataclass: types are checked, unknown settings refused."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        schema = OmegaConf.structured(cls)
        OmegaConf.set_readonly(schema, False)  # frozen dataclasses come read-only
        merged = OmegaConf.merge(schema, read_yaml(path), OmegaConf.from_dotlist(list(overrides)))
        return cast(T, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        at = getattr(error, "full_key", None)
        raise InvalidRequest(
            f"{path}: {str(error).splitlines()[0]}",
            why=f"at {at}, checked against {cls.__name__}." if at else "",
            hint="correct the file or the key=value.",
            param=at,
        ) from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, as it stands."""
    import yaml
    from omegaconf import OmegaConf

    try:
        values = OmegaConf.to_container(OmegaConf.load(io.StringIO(_plain_yaml(Path(path)))))
    except FileNotFoundError as error:
        raise InvalidRequest(f"{path} does not exist.", why="no such file.", hint="check the path.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidRequest(
            f"{path} is not a YAML file.", why=str(error).replace("\n", " "), hint="check it."
        ) from error
    if not isinstance(values, dict):
        raise InvalidRequest(
            f"{path} holds no settings.", why="it is a list or empty.", hint="name: value, one per line."
        )
    return cast(dict[str, Any], values)


YAML_LIMIT = 2**18  # bytes


def _plain_yaml(path: Path) -> str:
    """The text of a YAML file that says what it says: a few aliases can stand for millions of values, and OmegaConf's
    interpolations can read the environment. Tags that would make other objects are refused by the reader itself.
    """
    import yaml

    if path.exists() and not path.is_file():
        raise OSError("it is no plain file")
    if path.stat().st_size > YAML_LIMIT:
        raise OSError(f"it has more than {YAML_LIMIT // 1024} KiB")
    text, depth = path.read_text(encoding="utf-8"), 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > 32:
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: no aliases (*name), and 32 levels at most")
        if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: no interpolations (${{...}})")
    return text


Training = VAETraining | DiTTraining | DistillTraining
TRAININGS: dict[str, type[Training]] = {"vae": VAETraining, "dit": DiTTraining, "distill": DistillTraining}


def load_training(path: str | Path, overrides: Sequence[str] = ()) -> Training:
    """A training file with `key=value` overrides, read by `load_yaml` as the kind of training its `task` names."""
    task = read_yaml(path).get("task")
    if task not in TRAININGS:
        raise InvalidRequest(f"{path} has task {task!r}.", why=f"there are {', '.join(TRAININGS)}.", param="task")
    return load_yaml(path, TRAININGS[task], overrides)
