"""Model settings as frozen dataclasses, with the names of the published config files. Imports no torch.

Variants are data: 2B, 5B, 5B-I2V, 1.5, 1.5-I2V and the 32- and 33-channel derivatives differ only in these fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
    hints = _hints(cls)
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


@lru_cache(maxsize=64)
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


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
class SafetyConfig:
    """What a run does about numbers that are not finite, norms out of their range and processes that hang."""

    skips: int = 0  # steps with a loss or gradient that is not finite that a run may leave out; one more ends it
    clip_sigmas: float = 0.0  # clip where a norm is so many standard deviations above its average, too; 0: no
    timeout: float = 600.0  # seconds for which a process waits for the others; one at a step for twice that is ended


@dataclass(frozen=True, kw_only=True)
class StateConfig:
    """How a run's states are kept (`training.state`)."""

    keep_last: int = 2  # the newest
    keep_best: int = 0  # beside them, those with the lowest scores of the validation
    asynchronous: bool = True  # written while the training goes on; takes host memory of the state's size
    on_error: str = "stop"  # where a state cannot be written; or "go on": try again with the next one


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes of a training share its work (`distributed.training`); both numbers must divide theirs."""

    shard: int = 1  # processes that share weights, gradients and optimiser (FSDP2); 1: each has all, 0: all share them
    sequence: int = 1  # processes that share the tokens of each sample (Ulysses); divides the attention heads, too
    checkpointing: str = "none"  # activations: "selective" keeps those of attention, "full" computes all again


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How parameters are moved, the same for every model. Rates are per optimiser step; the rate ends at 0."""

    steps: int
    optimizer: str = "adamw"  # "adamw8bit": its moments in a byte each; "muon": matrices by Muon, the rest by AdamW
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
    trackers: list[str] = dataclasses.field(default_factory=list)  # beside the log: tensorboard, wandb, ...
    save_every: int = 200
    state: StateConfig = dataclasses.field(default_factory=StateConfig)
    safety: SafetyConfig = dataclasses.field(default_factory=SafetyConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)


@dataclass(frozen=True, kw_only=True)
class ClipStage:
    """A stretch of a VAE's training on clips of one kind; a share of its steps sees single frames instead."""

    steps: int
    num_frames: int
    size: int  # side of the square crop, pixels
    batch_size: int
    image_share: float = 0.25
    micro_batch_size: int = 0  # clips that one process computes at once, and as many frames of images; 0: its share


@dataclass(frozen=True, kw_only=True)
class GANConfig:
    """The adversarial part of a VAE's loss, from a step on. The discriminator learns in the same steps."""

    start: int  # step at which the discriminator begins to learn
    head_start: int = 0  # steps for which it learns alone, before the VAE hears of it
    weight: float = 0.5  # of its gradient at the decoder's last layer, against that of the reconstruction
    rate: float = 1.0  # the discriminator's share of the learning rate
    channels: int = 64
    layers: int = 3


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
    start: str = ""  # a VAE that goes on learning: its folder, or a model's folder or name; "": from nothing
    train_encoder: bool = True  # False: the latents stay those of `start`, and models made for it can use the result
    model: VAEConfig = dataclasses.field(default_factory=VAEConfig)  # of a VAE from nothing
    stages: list[ClipStage]
    fit: FitConfig
    clips: str = ""  # a folder of clips; "": the world's, of this size
    height: int = 64
    width: int = 64
    num_frames: int = 17
    world: WorldConfig = dataclasses.field(default_factory=WorldConfig)
    detail_weight: float = 4.0  # extra weight of pixels on edges and in motion
    square_weight: float = 4.0  # of squared errors, beside their absolute values
    perceptual: str = ""  # a distance of `training.perceptual`: gradients, random, lpips; "": none
    perceptual_weight: float = 1.0
    kl_weight: float = 1e-4
    gan: GANConfig | None = None
    whole_clips: bool = False  # norms see whole clips in training, as with the published VAE, instead of chunks
    time_parallel: int = 1  # processes that share the frames of each clip
    gradient_checkpointing: bool = False
    latents: str = "unit_variance"  # at the end: folded into the weights; or "scaling_factor", measured; or "keep"


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """A small T5 encoder, trained with the DiT."""

    d_model: int = 128
    d_ff: int = 256
    num_layers: int = 2
    num_heads: int = 4


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """What is measured with every saved state, on clips that are never trained on (`training.validation`)."""

    clips: int = 64  # held out, whose loss is taken
    times: int = 10  # fixed noise levels at which it is taken, from clean to noise
    batch_size: int = 16
    samples: int = 4  # prompts whose clips are drawn into a picture, by the averages and the live weights; 0: none
    num_inference_steps: int = 20  # of these clips
    score: int = 0  # held-out prompts of the world whose clips are scored; 0: none


CONDITIONS = ("none", "first", "last", "first+last", "prefix", "suffix", "every", "keyframes", "all")
USUAL_CONDITIONS = {"none": 0.5, "first": 0.2, "last": 0.05, "first+last": 0.15, "keyframes": 0.1}


@dataclass(frozen=True, kw_only=True)
class ConditionStage:
    """A stretch of a training with shares of its own for the kinds of conditions."""

    share: float  # of the run's steps
    shares: dict[str, float]  # of `CONDITIONS`
    least: float = 0.0  # share of its frames that prefix, suffix and keyframes tell a clip at least

    def __post_init__(self) -> None:
        check_shares(self.shares)
        _check_ranges({"share": (self.share, 0, 1), "least": (self.least, 0, 1)}, where="conditions.curriculum")


@dataclass(frozen=True, kw_only=True)
class ImageNoise:
    """Noise on told frames: the logarithm of each sample's standard deviation is normal (CogVideoX-I2V's numbers)."""

    mean: float = -3.0
    std: float = 0.5


@dataclass(frozen=True, kw_only=True)
class ConditionsConfig:
    """Which latent frames of a clip the model is told in training (`training.conditions`)."""

    shares: dict[str, float] = dataclasses.field(default_factory=dict)  # by kind; none given: `USUAL_CONDITIONS`
    curriculum: list[ConditionStage] = dataclasses.field(default_factory=list)  # before that, one after the other
    preset: str = ""  # or a published curriculum, whole: "open-sora-plan"
    every: tuple[int, ...] = (2, 3, 4)  # "every": each k-th frame from the first on, with one of these k
    last_among: int = 1  # the picture told as the last frame is one of the last so many (PixelDance: 3)
    last_dropout: float = 0.0  # share of told last frames that are left out (PixelDance's eta)
    dropout: float = 0.0  # share of samples whose frames are all left out (CogVideoX-I2V: 0.05)
    noise: ImageNoise | None = None  # on the told frames

    def __post_init__(self) -> None:
        if not self.shares:  # no default of the field: a file's shares would be added to it, not stand for it
            object.__setattr__(self, "shares", dict(USUAL_CONDITIONS))
        check_shares(self.shares)
        ranges = {"last_among": (self.last_among, 1, 1000), "every": (min(self.every, default=0), 2, 1000)}
        ranges |= {"last_dropout": (self.last_dropout, 0, 1), "dropout": (self.dropout, 0, 1)}
        _check_ranges(ranges, where="conditions")


def check_shares(shares: Mapping[str, float]) -> None:
    """Raises InvalidRequest where a kind of condition does not exist, or shares are no shares."""
    for kind, share in shares.items():
        if kind not in CONDITIONS:
            near = difflib.get_close_matches(kind, CONDITIONS, n=1)
            raise InvalidRequest(
                f"no kind of condition {kind!r}.",
                why=f"there are {', '.join(CONDITIONS)}.",
                hint=f"did you mean {near[0]!r}?" if near else "remove it.",
                param="conditions.shares",
            )
        _check_ranges({kind: (share, 0, 1e9)}, where="conditions.shares")
    if not sum(shares.values()):
        raise InvalidRequest("no kind of condition has a share.", hint="none: 1.0", param="conditions.shares")


def _check_ranges(values: Mapping[str, tuple[float | int, float | int, float | int]], *, where: str) -> None:
    """Raises InvalidRequest for a value that is not between its least and its most."""
    for name, (value, least, most) in values.items():
        if not least <= value <= most:
            raise InvalidRequest(
                f"{where} has {name} = {value}.",
                why=f"it is from {least:g} to {most:g}.",
                hint="correct the file.",
                param=f"{where}.{name}",
            )


@dataclass(frozen=True, kw_only=True)
class ClipTraining:
    """What every training on clips of the world has, encoded once beforehand: which clips, and what is told of them."""

    fit: FitConfig
    clips: int = 20_000  # how many clips are encoded once, before training
    batch_size: int = 32  # samples of a step, over all processes
    token_budget: int = 0  # instead: tokens of a step at most, of samples of any shapes; 0: as batch_size says
    micro_batch_size: int = 0  # samples that one process computes at once; 0: its whole share of a step
    packed_tokens: int = 0  # instead: tokens of a stream of samples of any shapes (`training.packing`); 0: one shape
    height: int = 64
    width: int = 64
    num_frames: int = 17
    world: WorldConfig = dataclasses.field(default_factory=WorldConfig)
    caption_dropout: float = 0.1  # share of samples that see the empty prompt
    conditions: ConditionsConfig | None = None  # frames that are told; None: the usual mixture
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)


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
class LoraConfig:
    """Low-rank updates that learn in place of a model's own weights (arXiv:2106.09685)."""

    rank: int = 128
    alpha: float | None = None  # an update counts alpha / rank; None: the rank
    targets: list[str] = dataclasses.field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out"])  # or ["all"]


@dataclass(frozen=True, kw_only=True)
class FinetuneTraining(ClipTraining):
    """`configs/train/finetune*.yaml`, `lora*.yaml`, `image-to-video*.yaml`: a model goes on learning.

    What frames it is told in training, the model that is made can be told. One that had no room for them grows.
    """

    task: str = "finetune"
    folder: str = "runs/finetune"  # state, log and result
    name: str = ""  # of the model that is made; "": the folder's
    model: str = "tiny"  # the base: a model folder or name, as for `--model`
    from_scratch: bool = False  # the base gives shape, VAE and text encoder; its transformer's weights are made anew
    data: str = ""  # a folder made by `videogen data cache`; "": clips of the world
    held_out: float = 0.02  # share of that folder's clips that is kept for validation
    height: int = 0  # of the world's clips; 0: the base's own
    width: int = 0
    num_frames: int = 0
    lora: LoraConfig | None = None  # None: all weights of the transformer learn
    timesteps: str = "uniform"  # or "informative"
    dtype: str = "auto"  # of the model that is made: the base's, or float32, bfloat16, float16


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
        merged = schema
        for values, depth in [(read_yaml(path), 0), *map(_override, overrides)]:
            merged = OmegaConf.merge(merged, values)
            for name, mapping in _mappings(cls, values, depth):  # given whole, not to be added to what was there
                around = name.rpartition(".")[0]
                OmegaConf.set_readonly(OmegaConf.select(merged, around) if around else merged, False)
                OmegaConf.update(merged, name, mapping, merge=False)
        return cast(T, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        at = getattr(error, "full_key", None)
        raise InvalidRequest(
            f"{path}: {str(error).splitlines()[0]}",
            why=f"at {at}, checked against {cls.__name__}." if at else "",
            hint="correct the file or the key=value.",
            param=at,
        ) from error


def _override(setting: str) -> tuple[dict[str, Any], int]:
    """`a.b=value` as a nested dict, and how many of its levels are the name's."""
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(OmegaConf.from_dotlist([setting]))
    return cast(dict[str, Any], values), setting.partition("=")[0].count(".") + 1


def _mappings(
    cls: type, values: Mapping[str, Any], depth: int = 0, path: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Dotted paths of the fields of type `dict` that get a mapping at `depth` levels or more, and that mapping."""
    hints = _hints(cls)
    for key, value in values.items():
        kinds = (get_args(hints[key]) or (hints[key],)) if key in hints and isinstance(value, dict) else ()
        if kinds and get_origin(hints[key]) is dict:
            if path.count(".") + 1 >= depth:
                yield f"{path}{key}", value
            continue
        for kind in kinds:
            if dataclasses.is_dataclass(kind):
                yield from _mappings(cast(type, kind), value, depth, f"{path}{key}.")


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


Training = VAETraining | DiTTraining | FinetuneTraining | DistillTraining
TRAININGS: dict[str, type[Training]] = {
    "vae": VAETraining,
    "dit": DiTTraining,
    "finetune": FinetuneTraining,
    "distill": DistillTraining,
}


def load_training(path: str | Path, overrides: Sequence[str] = ()) -> Training:
    """A training file with `key=value` overrides, read by `load_yaml` as the kind of training its `task` names."""
    task = read_yaml(path).get("task")
    if task not in TRAININGS:
        raise InvalidRequest(f"{path} has task {task!r}.", why=f"there are {', '.join(TRAININGS)}.", param="task")
    return load_yaml(path, TRAININGS[task], overrides)
