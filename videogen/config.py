"""Model settings as frozen dataclasses, with the names of the published config files. Imports no torch.

Variants are data: 2B, 5B, 5B-I2V, 1.5, 1.5-I2V and the 32- and 33-channel derivatives differ only in these fields.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

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

    @property
    def spatial_compression(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


def from_dict(cls: type[T], values: dict[str, Any], *, where: str = "config") -> T:
    """`cls(**values)`, strict: an unknown setting is an error that suggests the nearest name; lists become tuples.

    Keys that start with an underscore (`_class_name`, `_diffusers_version`) are the file's own and ignored.
    """
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    known: dict[str, Any] = {}
    for key, value in values.items():
        if key.startswith("_"):
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
    return cls(**known)


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as JSON-ready values: tuples become lists, the chunk plan is left out where it is usual."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    for name, default in (("frame_batch_size", 8), ("latent_batch_size", 2)):
        if values.get(name) == default:
            del values[name]
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
        values = OmegaConf.to_container(OmegaConf.load(Path(path)))
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


Training = VAETraining | DiTTraining | DistillTraining
TRAININGS: dict[str, type[Training]] = {"vae": VAETraining, "dit": DiTTraining, "distill": DistillTraining}


def load_training(path: str | Path, overrides: Sequence[str] = ()) -> Training:
    """A training file with `key=value` overrides, read by `load_yaml` as the kind of training its `task` names."""
    task = read_yaml(path).get("task")
    if task not in TRAININGS:
        raise InvalidRequest(f"{path} has task {task!r}.", why=f"there are {', '.join(TRAININGS)}.", param="task")
    return load_yaml(path, TRAININGS[task], overrides)
