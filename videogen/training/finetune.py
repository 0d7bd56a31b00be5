"""A model goes on learning: all its weights or a LoRA, from clips of your own or of the world.

    videogen train configs/train/lora-tiny.yaml

Any model of the family that opens here: its noise schedule, what it predicts, its constants and the padding of its
clips come from its card, as in sampling (`lesson.py`). What leaves is what the pipeline loads (`export.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Num
from torch import Tensor, nn

from videogen.conditioning.text import ABSENT
from videogen.config import ConditionsConfig, FinetuneTraining
from videogen.data.files import sha256_of
from videogen.distributed.training import parallelize
from videogen.errors import InvalidRequest
from videogen.models.dit import DiT, init_weights
from videogen.models.lora import ALL, adapters, add_lora, train_only_lora, updates_of
from videogen.models.text import TextEncoder
from videogen.models.vae import VAE
from videogen.training.cached import CachedExamples, cached_examples
from videogen.training.conditions import stages_of
from videogen.training.ema import ema_copy
from videogen.training.encode import encoder_hash
from videogen.training.examples import Example, Examples
from videogen.training.export import finetuned_card, identity, save_adapters, save_model
from videogen.training.latents import HELD_OUT, LatentClips, WorldClips, cached_latents, read_latents
from videogen.training.lesson import Embed, Lesson, lengthened, told_nothing
from videogen.training.step import Batches, losses_of
from videogen.training.trainer import fit, join_process_group
from videogen.training.validation import Generate, Modules, Validation, pipeline_clips
from videogen.types import Latent
from videogen.weights.card import Card
from videogen.weights.hub import find_model
from videogen.weights.single import load_parts, open_card
from videogen.weights.table import widen


def finetune(config: FinetuneTraining, device: torch.device) -> Path:
    """Train, and return the folder of the model or of the LoRA that was made. All processes of a run call it."""
    rank, _ = join_process_group(config.fit.safety.timeout)
    folder, base = Path(config.folder), open_card(find_model(config.model))
    conditions = config.conditions or usual_conditions(base)
    told = conditions_of(kinds_of(conditions))
    card = grown(base, told, config)
    data = material(config, card, device)
    examples = data.examples
    made = finetuned_card(base, card, told, config, native_size(base, examples))

    dit = load_parts(base, components=("dit",)).dit
    assert dit is not None
    dtype = next(dit.parameters()).dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    dit = prepared(dit.to(device), card, config)
    moved: dict[str, nn.Module] = {"lora": nn.ModuleList(adapters(dit).values())} if config.lora else {"dit": dit}
    averages: dict[str, nn.Module] = {} if config.lora else {"dit": ema_copy(dit)}
    placed: dict[str, nn.Module] = {"dit": dit} if config.lora else {"dit": dit, "average": averages["dit"]}
    parallel = parallelize(placed, config.fit.parallel, device, bfloat16=config.fit.bfloat16)
    if config.lora:  # a part of what was put in place, and so it is copied as it lies there
        averages["lora"] = ema_copy(moved["lora"])

    lesson = Lesson(card, data.embed, device, bfloat16=config.fit.bfloat16)
    losses_at = losses_of(
        config,
        Batches(examples, config, card.dit),
        lambda done: examples,
        lesson,
        dit,
        parallel,
        conditions=conditions if card.layout == "frames" else None,
        timesteps=config.timesteps,
    )
    validation = Validation(
        config=config.validation,
        folder=folder,
        schedule=lesson.schedule,
        loss=lambda modules: partial(held_out_loss, lesson, modules["dit"]),
        examples=data.held_out,
        generate=None if data.clips is None else data.clips(made),
        prompts=data.prompts,
        raw={} if config.lora else {"dit": dit},
        rank=parallel.data_rank,
        world=parallel.data_world,
        total=parallel.sum,
    )

    def validate(averages: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        if not config.lora:
            return validation(averages, step)
        with in_place_of(moved["lora"], averages["lora"]):
            return validation({"dit": dit}, step)

    settings = dataclasses.asdict(config) | {"model": identity(base), "data": data.identity}
    for name in ("name", "dtype"):  # of what is made in the end
        del settings[name]
    fit(
        moved, losses_at, config.fit, folder, parallel=parallel, averages=averages, validate=validate, settings=settings
    )

    if config.lora:
        put(averages["lora"], moved["lora"])
    whole = parallel.whole(*(("dit", dit) if config.lora else ("average", averages["dit"])))
    assert isinstance(whole, DiT)
    if rank == 0 and config.lora:
        save_adapters(folder / "lora", updates_of(whole), base, config)
    elif rank == 0:
        save_model(folder / "model", base, made, config, whole, dtype=dtype)
    if dist.is_initialized():
        dist.barrier()
    return folder / ("lora" if config.lora else "model")


def held_out_loss(
    lesson: Lesson, dit: nn.Module, examples: Sequence[Example], t: Num[Tensor, " b"], noise: Latent
) -> Float[Tensor, " b"]:
    """Without frames that are told: so the figures of all models compare."""
    return lesson(dit, [told_nothing(example) for example in examples], t, noise)


# ---- the model ------------------------------------------------------------------------------------------------------


def grown(base: Card, told: Collection[str], config: FinetuneTraining) -> Card:
    """The base's card, or that of the base with room for the frames it is to be `told` in training.

    Raises InvalidRequest where a model or a LoRA cannot learn to be told these.
    """
    if base.layout in ("control", "pose", "image"):
        raise InvalidRequest(
            f"{base.name} cannot be trained here.",
            why=f"it is told {'a still image' if base.layout == 'image' else 'a clip to follow'}; the data have none.",
            hint="choose a text-to-video or image-to-video model.",
            param="model",
        )
    if told and base.layout == "inp":
        raise InvalidRequest(
            f"{base.name} cannot learn to be told {listed(told)} here.",
            why="it is told masked clips, encoded whole; the data have single frames.",
            hint="conditions.shares={none: 1}, or another base.",
            param="conditions",
        )
    if not told or base.layout == "frames":
        return base
    if config.lora:
        raise InvalidRequest(
            f"a LoRA cannot teach {base.name} to be told {listed(told)}.",
            why="the model has no input for frames, and weights that read them are no low-rank update.",
            hint="leave lora out: all weights learn; or a LoRA of an image-to-video model.",
            param="lora",
        )
    channels = base.dit.in_channels + base.vae.latent_channels
    return dataclasses.replace(base, dit=dataclasses.replace(base.dit, in_channels=channels), layout="frames")


def prepared(dit: DiT, card: Card, config: FinetuneTraining) -> DiT:
    """The base's transformer as it starts to learn: with the card's input channels, and adapters if it is a LoRA.

    Weights that learn are float32. Those of a base under a LoRA rest, and in mixed precision do so in bfloat16.
    """
    if config.from_scratch:
        if config.lora is not None:
            raise InvalidRequest(
                "a LoRA cannot learn beside new weights.",
                why="from_scratch makes them at random, and lora lets them rest.",
                hint="leave one of them out.",
                param="from_scratch",
            )
        torch.manual_seed(config.fit.seed)
        dit = init_weights(dit.float())
    if card.dit.in_channels > dit.config.in_channels:
        dit = widened(dit, card.dit.in_channels)
    dit.config = card.dit  # with what the card tells of its use, as `load` does
    dit = dit.to(weights_dtype(config)).train().requires_grad_(True)
    if config.lora is not None:
        targets = ALL if "all" in config.lora.targets else config.lora.targets
        numbers = torch.Generator().manual_seed(config.fit.seed)
        rank, alpha = config.lora.rank, config.lora.alpha
        add_lora(dit, rank=rank, alpha=alpha, targets=targets, dtype=torch.float32, generator=numbers)
        train_only_lora(dit)
    return dit


def weights_dtype(config: FinetuneTraining) -> torch.dtype:
    return torch.bfloat16 if config.lora is not None and config.fit.bfloat16 else torch.float32


@torch.no_grad()
def widened(dit: DiT, in_channels: int) -> DiT:
    """The same transformer with more input channels, whose weights are zeros: what it computes does not change.

    So a text-to-video model becomes one that can learn to be told frames, as CogVideoX-5B-I2V was made of CogVideoX-5B.
    """
    config = dataclasses.replace(dit.config, in_channels=in_channels)
    with torch.device("meta"):
        wide = DiT(config)
    state, name = dit.state_dict(), "patch_embed.proj.weight"
    state[name] = widen(state[name], dit.config.in_channels, in_channels)
    wide.load_state_dict(state, strict=True, assign=True)
    return wide.train(dit.training)


@contextmanager
def in_place_of(module: nn.Module, other: nn.Module) -> Iterator[None]:
    """For the time of a `with`, a module's parameters have the values of another's."""
    kept = [parameter.detach().clone() for parameter in module.parameters()]
    put(other, module)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), kept, strict=True):
                parameter.copy_(value)


@torch.no_grad()
def put(source: nn.Module, target: nn.Module) -> None:
    """The values of one module's parameters into another's, in place."""
    for new, old in zip(source.parameters(), target.parameters(), strict=True):
        old.copy_(new)


# ---- the data -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Material:
    """What a model learns from.

    embed     captions to embeddings
    clips     of a model's card: makes clips from prompts, for validation; None where captions were cached as embeddings
    prompts   of clips to look at
    identity  what a run that goes on must find unchanged
    """

    examples: Examples
    held_out: Examples | None
    embed: Embed
    identity: str
    clips: Callable[[Card], Callable[[Modules], Generate]] | None = None
    prompts: Sequence[str] = ()


def material(config: FinetuneTraining, card: Card, device: torch.device) -> Material:
    """The clips of a cache or of the world: to train on, and held out."""
    return from_cache(config, card, device) if config.data else from_world(config, card, device)


def from_cache(config: FinetuneTraining, card: Card, device: torch.device) -> Material:
    """Clips that `videogen data cache` encoded. Where their captions are embeddings, no text encoder is opened."""
    examples = cached_examples(config.data, held_out=config.held_out)
    check_cache(examples, card)
    try:
        held_out = cached_examples(config.data, held_out=config.held_out, part="held_out")
    except InvalidRequest:  # so few clips that none falls there
        held_out = None
    absent, steps = examples.text(ABSENT), config.validation.num_inference_steps
    words, clips = None, None
    if isinstance(absent, str):
        words, vae = load_words(card, device), load_pixels(card, device, weights_dtype(config))
        clips = partial(pipeline_clips, vae=vae, text_encoder=words, steps=steps)
    return Material(
        lengthened(examples, card),
        None if held_out is None else lengthened(held_out, card),
        embedder(words, absent),
        identity=sha256_of(Path(config.data) / "manifest.jsonl"),
        clips=clips,
        prompts=[row.captions[0].text for row in (held_out or examples).rows[: config.validation.samples]],
    )


def from_world(config: FinetuneTraining, card: Card, device: torch.device) -> Material:
    """Clips of the world at the base's size, or the settings'; encoded once, into the run's folder."""
    sizes = {name: getattr(config, name) or getattr(card, name) for name in ("height", "width", "num_frames")}
    config = dataclasses.replace(config, **sizes)
    vae, words = load_pixels(card, torch.device("cpu"), torch.float32), load_words(card, device)
    rank, world = join_process_group()
    path, judged = Path(config.folder) / "latents", config.validation.clips
    folder = cached_latents(config, vae, path, device, rank=rank, world=world)
    apart = cached_latents(config, vae, path, device, rank=rank, world=world, held_out=judged) if judged else folder
    if world > 1:
        dist.barrier()

    def examples(moments: LatentClips, **which: Any) -> Examples:
        return lengthened(WorldClips(config, as_told(moments, card), float(card.fps), **which), card)

    held_out = read_latents(apart, judged) if judged else None
    vae, steps = vae.to(weights_dtype(config)), config.validation.num_inference_steps
    return Material(
        examples(read_latents(folder, config.clips)),
        None if held_out is None else examples(held_out, first=HELD_OUT, held_out=True),
        embedder(words, ABSENT),
        identity="world",
        clips=partial(pipeline_clips, vae=vae, text_encoder=words, steps=steps),
    )


def as_told(moments: LatentClips, card: Card) -> LatentClips:
    """Frames scaled as this model is told them: CogVideoX1.5-5B-I2V divides by the VAE's factor."""
    if not card.vae.invert_scale_latents:
        return moments
    square = card.vae.scaling_factor**2
    return dataclasses.replace(
        moments,
        frame_mean=moments.frame_mean / square,
        frame_logvar=moments.frame_logvar - 2 * math.log(square),
    )


def load_pixels(card: Card, device: torch.device, dtype: torch.dtype) -> VAE:
    """The base's VAE, which rests."""
    vae = load_parts(card, device=device, dtype=dtype, components=("vae",)).vae
    assert vae is not None
    vae.config = card.vae  # with what the card tells of its use
    return vae.eval().requires_grad_(False)


def load_words(card: Card, device: torch.device) -> TextEncoder:
    """The base's text encoder, which rests; in float32 on a CPU, as in sampling."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    text = load_parts(card, device=device, dtype=dtype, components=("text_encoder",)).text_encoder
    assert text is not None
    return text.eval().requires_grad_(False)


def embedder(words: TextEncoder | None, absent: str | Tensor) -> Embed:
    """Captions to embeddings [b, l, e]: words by the text encoder, others as they come from a cache."""

    def embed(texts: list[str | Tensor]) -> Tensor:
        if words is not None:
            return words([str(text) for text in texts])
        known = [absent if isinstance(text, str) else text for text in texts]
        return torch.stack([one for one in known if isinstance(one, Tensor)]).float()

    return embed


def check_cache(examples: CachedExamples, card: Card) -> None:
    """Refuse latents of another VAE and embeddings of another width: they would be noise to this model."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if examples.facts.vae not in {encoder_hash(card, "vae", dtype) for dtype in dtypes}:
        raise InvalidRequest(
            f"{examples.folder} holds latents of another VAE than {card.name}'s.",
            why=f"it was made with {examples.facts.model}.",
            hint=f"videogen data cache CLIPS --model {card.name} --out FOLDER",
            param="data",
        )
    if card.layout == "frames" and (lacking := sum(not row.frame_latents for row in examples.rows)):
        raise InvalidRequest(
            f"{lacking} of {len(examples)} clips in {examples.folder} have no frames that {card.name} could be told.",
            why="each must have been encoded by itself, as a picture is.",
            hint=f"videogen data cache CLIPS --model {card.name} --frame-latents --out FOLDER",
            param="data",
        )
    absent, width = examples.text(ABSENT), card.dit.text_embed_dim
    if isinstance(absent, Tensor) and absent.shape != (card.max_sequence_length, width):
        raise InvalidRequest(
            f"{examples.folder} holds text embeddings of {list(absent.shape)}.",
            why=f"{card.name} reads {[card.max_sequence_length, width]}: they are of another text encoder.",
            hint=f"videogen data cache CLIPS --model {card.name} --out FOLDER",
            param="data",
        )


def native_size(base: Card, examples: Examples) -> tuple[int, int, int]:
    """(frames, height, width) that the model makes unasked: the base's own, if it was trained on it, else the usual."""
    shapes = Counter(examples.shape(index) for index in range(len(examples)))
    f, _, h, w = base.latent_shape(base.height, base.width, base.num_frames)
    if (f, h, w) in shapes:
        return base.num_frames, base.height, base.width
    (f, h, w), _ = shapes.most_common(1)[0]
    scale, ratio = base.vae.spatial_compression, int(base.vae.temporal_compression_ratio)
    padding = f % 2 == 0 and base.dit.patch_size_t is not None and base.layout in ("text", "frames")
    return (f - padding - 1) * ratio + 1, h * scale, w * scale


# ---- what it is told ------------------------------------------------------------------------------------------------

TOLD = {"none": (), "first": ("first_frame",), "last": ("last_frame",), "first+last": ("first_frame", "last_frame")}
ANY = ("first_frame", "last_frame", "keyframes")  # what prefix, suffix, every and keyframes tell


def kinds_of(config: ConditionsConfig) -> list[str]:
    """The kinds of conditions that have a share at some time of the run."""
    return sorted({kind for stage in stages_of(config) for kind, share in stage.shares.items() if share})


def conditions_of(kinds: Collection[str]) -> set[str]:
    """What a request may tell a model that learned with these kinds."""
    return {condition for kind in kinds for condition in TOLD.get(kind, ANY)}


def usual_conditions(card: Card) -> ConditionsConfig:
    """What a model is told in training where the settings do not say: what it was told before."""
    if card.layout != "frames":
        return ConditionsConfig(shares={"none": 1.0})
    if {"last_frame", "keyframes"} & {*card.conditions}:
        return ConditionsConfig()
    return ConditionsConfig(shares={"first": 1.0}, dropout=0.05)  # as CogVideoX-I2V was trained


def listed(names: Collection[str]) -> str:
    return ", ".join(name.replace("_", " ") + "s" for name in sorted(names))
