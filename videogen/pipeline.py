"""One generate(): check the request, condition, sample, decode. Load a model once, then make clips with it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

import videogen
from videogen.conditioning import frames as frame_condition
from videogen.conditioning import text as text_condition
from videogen.config import to_dict
from videogen.data.video import Video, fit_image, read_video, write_video
from videogen.diffusion.denoiser import dynamic_cfg, guided, last_time, switched
from videogen.diffusion.prediction import add_noise, prediction_type
from videogen.diffusion.samplers import SAMPLERS, diffusers_sampler, load_scheduler, scheduler_times
from videogen.diffusion.schedule import Schedule
from videogen.errors import InvalidRequest, NumericalError
from videogen.models.dit import DiT
from videogen.models.text import TextEncoder
from videogen.models.vae import VAE
from videogen.progress import Event
from videogen.request import Request
from videogen.runtime.memory import PLANS, Plan, choose_plan
from videogen.runtime.modulation import expect
from videogen.runtime.offload import Stages, tensors
from videogen.runtime.prepare import LOSSY_KERNELS, prepare
from videogen.runtime.step_cache import Curve, StepCache, load_curve, step_cache
from videogen.types import Conditioning, Latent
from videogen.weights.card import Card, find_model, read_card
from videogen.weights.diffusers import load_folder, save_folder, text_dtype

SMALL = 1024  # the width of a DiT below which, on a CPU, the call of a fused operation costs more than it saves


def load(
    model: str | Path = "tiny",
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    memory: str | Plan = "auto",
    kernel: str = "auto",
    quantize: str | None = None,
    compile: bool = False,
    revision: str | None = None,
    offline: bool = False,
) -> Pipeline:
    """Open a model: "tiny" (bundled), a folder in diffusers' layout, or `org/name[@revision]`.

    device "auto" is CUDA if there is one. dtype "auto" is float32 on a CPU; on CUDA float16 for CogVideoX-2B, which was
    trained in it, and bfloat16 for all others. memory: "fast" keeps all weights on the device, "balanced", "low" and
    "minimal" need less (videogen.runtime.memory.PLANS); "auto" is fast. kernel, quantize and compile are those of
    `videogen.runtime.prepare`; without them the numbers are the plain model's. Raises ModelNotFound, or InvalidRequest
    for an impossible combination.
    """
    plan = choose_plan(memory)
    card = read_card(find_model(model, revision=revision, offline=offline))
    where, kind = choose_device(device), choose_dtype(dtype, choose_device(device), card)
    # Mapped and not read, if a stage that begins casts what it needs.
    parts = load_folder(card.folder) if plan.stages_in_turn else load_folder(card.folder, device=where, dtype=kind)
    dit, vae, text_encoder = parts.dit, parts.vae, parts.text_encoder
    assert dit is not None
    assert vae is not None
    assert text_encoder is not None
    dtypes = {}
    if plan.stages_in_turn:
        dtypes = {x: kind for network in (dit, vae) for x in tensors(network) if x.is_floating_point()}
        dtypes |= {x: text_dtype(name, kind) for name, x in text_encoder.named_parameters()}
    stages = Stages(plan, where, dtypes)
    rows = where.type != "cpu" or card.dit.width >= SMALL
    prepare(dit.eval(), vae.eval(), stages, rows=rows, kernel=kernel, quantize=quantize, compile=compile)
    pipe = Pipeline(card, dit, vae, text_encoder.eval(), stages)
    pipe.lossy = {"quantize": quantize} if quantize else {}
    pipe.lossy |= {"kernel": kernel} if kernel in LOSSY_KERNELS else {}
    return pipe


def generate(prompt: Any = None, *, model: str | Path = "tiny", **keywords: Any) -> Any:
    """`load(model).generate(prompt, **keywords)`, with the model kept for the next call."""
    card = read_card(find_model(model))
    Request(prompt, **keywords).checked(card)  # before gigabytes are read
    return _kept(str(model)).generate(prompt, **keywords)


@lru_cache(maxsize=1)
def _kept(model: str) -> Pipeline:
    return load(model)


class Pipeline:
    """A model's parts and the story of one clip: `generate`. `stages`: which of them is on the device, and when."""

    def __init__(self, card: Card, dit: DiT, vae: VAE, text_encoder: TextEncoder, stages: Stages | None = None) -> None:
        self.card, self.dit, self.vae, self.text_encoder = card, dit, vae, text_encoder
        self.stages = stages or Stages(PLANS["fast"], next(dit.parameters()).device)
        self.lossy: dict[str, str] = {}  # what was put into the model and changes its clips: part of their recipe

    @cached_property
    def schedule(self) -> Schedule:
        """Read when one of our samplers asks for it: diffusers' own know kinds of noise that ours do not."""
        return Schedule.from_config(self.card.scheduler)

    @property
    def capabilities(self) -> Card:
        """What the model can do: conditions, sizes, lengths, defaults."""
        return self.card

    @property
    def config(self) -> dict[str, Any]:
        """The parts' settings, by diffusers' component names."""
        return {
            "transformer": to_dict(self.dit.config),
            "vae": to_dict(self.vae.config),
            "scheduler": self.card.scheduler,
        }

    @property
    def tokenizer(self) -> Any:
        return self.text_encoder.tokenizer

    @property
    def plan(self) -> Plan:
        return self.stages.plan

    @property
    def device(self) -> torch.device:
        """Where is computed; between two clips the weights may lie elsewhere."""
        return self.stages.device if self.plan.stages_in_turn else next(self.dit.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in; between two clips the weights may be as their files have them."""
        weight = next(self.dit.parameters())
        return self.stages.dtypes.get(weight, weight.dtype)

    def at_work(self, network: DiT | VAE | TextEncoder) -> AbstractContextManager[None]:
        """For the time of a `with`, this part is on the device. `generate` does it; you need it to call a part."""
        return self.stages.at_work(network)

    @torch.no_grad()
    def generate(self, prompt: Any = None, **keywords: Any) -> Any:
        """Make a clip, or a list of clips from a list of prompts. The keywords are the fields of `videogen.Request`.

        Returns a `Video`; with output="tensor" floats [b, F, 3, H, W] in [0, 1]; with output="latent" [b, f, c, h, w].
        Raises InvalidRequest before anything is computed, NumericalError if NaN or Inf appears, and whatever `on_step`
        raises (`videogen.errors.Cancelled` is the clean way to stop).
        """
        request = Request(prompt, **keywords).checked(self.card)
        self.step_cache(request)  # a model that has no curve says so now
        draw = Draws(request.seed, request.batch_size, self.dtype, self.device)

        text, negative = self.embed(request)
        frames = self.encode_known_frames(request, draw)
        if request.latents is not None:
            start = request.latents.to(self.device, self.dtype)
        elif request.video is not None:
            start = self.noised_video(request, draw)
        else:
            start = draw(self.card.latent_shape(*_size(request)))
        with self.at_work(self.dit):
            latents = self.denoise(request, start, text, negative, frames, draw)

        if request.output == "latent":
            return latents
        latents = latents[:, self.padding(request) :]
        with self.at_work(self.vae):
            if request.output == "tensor":
                return torch.stack([torch.cat(list(self.decode(one, request))) for one in latents])
            videos = [self.to_video(request, item, one) for item, one in enumerate(latents)]
        return videos if request.is_batch else videos[0]

    def embed(self, request: Request) -> tuple[Conditioning, Conditioning | None]:
        """The text embeddings [b, l, e] of the prompt and, if guidance will ask for them, of the negative prompt."""
        _report(request, "text", 0, 1)

        def embeddings(words: Any, given: Tensor | None) -> Conditioning:
            if given is None:
                given = text_condition.prompt(self.text_encoder, _per_item(words, request.batch_size)).text
            assert given is not None
            return Conditioning(text=given.to(self.device, self.dtype))

        given = [request.prompt_embeds, *([request.negative_prompt_embeds] if _is_guided(request) else [])]
        with self.at_work(self.text_encoder) if any(embeds is None for embeds in given) else nullcontext():
            text, negative = embeddings(request.prompt, request.prompt_embeds), None
            if _is_guided(request):
                negative = embeddings(request.negative_prompt, request.negative_prompt_embeds)
                _require_same_shape(text, negative)
        _report(request, "text", 1, 1)
        return text, negative

    def encode_known_frames(self, request: Request, draw: Draws) -> dict[int, Float[Tensor, "b c h w"]]:
        """Latents of the condition images by pixel index, drawn in ascending order."""
        encoded = {}
        for index, image in request.images.items():
            images = [fit_image(one, *_size(request)[:2], request.fit) for one in _per_item(image, request.batch_size)]
            pixels = torch.from_numpy(np.stack(images)).to(self.device, self.dtype)
            with self.at_work(self.vae):
                encoded[index] = frame_condition.encode_frames(self.vae, pixels, draw.generators)
        return encoded

    def condition(self, request: Request, frames: dict[int, Tensor]) -> Conditioning:
        """Everything but the text: the canvas of known frames and the constants a variant is told."""
        config = self.dit.config
        vectors = {}
        if config.ofs_embed_dim:
            vectors["ofs"] = torch.full((1,), frame_condition.OFS, device=self.device, dtype=self.dtype)
        if config.in_channels == config.out_channels:
            return Conditioning(vectors=vectors)

        frame_count, _, height, width = self.card.latent_shape(*_size(request))
        shape = (request.batch_size, frame_count, config.in_channels - config.out_channels, height, width)
        canvas = torch.zeros(shape, device=self.device, dtype=self.dtype)
        known = torch.zeros(shape[:2], device=self.device, dtype=torch.bool)
        for index, latent in frames.items():
            # The padding of the 1.5 models stands in front; their first frame is told there (and cut off in the end).
            slot = frame_condition.slot(index) + (self.padding(request) if index else 0)
            canvas[:, slot], known[:, slot] = latent, True
        return frame_condition.known_frames(canvas, known) | Conditioning(vectors=vectors)

    def denoise(
        self,
        request: Request,
        x: Latent,
        text: Conditioning,
        negative: Conditioning | None,
        frames: dict[int, Tensor],
        draw: Draws,
    ) -> Latent:
        """From noise, or from a noised clip the rest of the way, to clean latents."""
        steps, first_step = request.num_inference_steps, _first_step(request)
        assert steps is not None
        assert request.guidance_scale is not None
        scheduler = load_scheduler(self.card.scheduler) if request.sampler == "diffusers" else None
        times = []
        if scheduler is not None:
            called = scheduler_times(scheduler, steps)[first_step * scheduler.order :]
        else:
            times = self.schedule.times(steps)[first_step:]
            called = times[:-1]  # the last is the clean end, where no network is asked

        last = _size(request)[2] - 1
        full = self.condition(request, frames)
        without = self.condition(request, {k: v for k, v in frames.items() if k != last})

        def told(words: Conditioning) -> Any:
            if request.last_frame_until < 1 and last in frames:
                return switched(words | full, words | without, times=called, until=float(request.last_frame_until))
            return words | full

        scale: Any = float(request.guidance_scale)
        if request.use_dynamic_cfg and _is_guided(request):
            scale = dynamic_cfg(scale, steps - first_step)
        uncond = None if negative is None else told(negative)
        expect(self.dit, called, full.vectors)
        with self.step_cache(request) as cache:
            denoise = guided(
                self.dit,
                told(text),
                uncond,
                scale,
                dtype=self.dtype,
                in_two=self.plan.guidance_in_two,
                down_to=last_time(called, float(request.guidance_until)),
                announce=cache.announce if cache else None,
            )
            on_step = StepWatch(request, len(called), cache)
            if scheduler is not None:
                x = diffusers_sampler(
                    denoise,
                    x,
                    steps,
                    scheduler=scheduler,
                    generator=draw.source,
                    first_step=first_step,
                    on_step=on_step,
                )
            else:
                assert request.sampler is not None
                x = SAMPLERS[request.sampler](
                    denoise,
                    x,
                    times,
                    schedule=self.schedule,
                    prediction=prediction_type(self.card.scheduler),
                    draw=draw.like,
                    on_step=on_step,
                ).to(self.dtype)
        _require_finite(x, "latents")
        return x

    @cached_property
    def curve(self) -> Curve:
        """What a step cache foretells by: measured on these weights, kept in their folder; yours may be set here."""
        return load_curve(self.card.folder, **{"transformer_sha256": None, **self.card_hash()})

    def step_cache(self, request: Request) -> AbstractContextManager[StepCache | None]:
        """The transformer's block loop for one clip: a step cache if one is asked for, else as it is."""
        if not request.step_cache:
            return nullcontext()
        noisy = request.sampler in ("dpm", "diffusers")  # or may be, as a scheduler of diffusers
        return step_cache(self.dit, self.curve, float(request.step_cache), straight=not noisy)

    def noised_video(self, request: Request, draw: Draws) -> Latent:
        """The latents of `request.video`, noised to where `strength` of the steps remain."""
        steps, (height, width, num_frames) = request.num_inference_steps, _size(request)
        assert steps is not None
        first_step = _first_step(request)
        pictures = _frames_of(request.video, num_frames)
        pixels = torch.from_numpy(np.stack([fit_image(p, height, width, request.fit) for p in pictures]))
        video = rearrange(pixels, "F c H W -> 1 c F H W").to(self.device, self.dtype)
        with self.at_work(self.vae):
            latents = torch.cat([self.vae.encode(video, g) for g in draw.generators])
        latents = rearrange(latents, "b c f h w -> b f c h w")
        latents = torch.cat([latents[:, : self.padding(request)], latents], dim=1)

        noise = draw(latents.shape[1:])
        if request.sampler == "diffusers":
            scheduler = load_scheduler(self.card.scheduler)
            scheduler.set_timesteps(steps, device=self.device)
            start = scheduler.timesteps[first_step * scheduler.order :][:1]
            return scheduler.add_noise(latents, noise, start.expand(len(latents)))
        t = self.schedule.times(steps)[first_step]
        return add_noise(latents, noise, self.schedule.alpha(t), self.schedule.sigma(t))

    def padding(self, request: Request) -> int:
        """Latent frames put in front so that patches in time divide them (the 1.5 models), cut off before decoding."""
        height, width, num_frames = _size(request)
        padded = self.card.latent_shape(height, width, num_frames)[0]
        return padded - self.vae.latent_shape(num_frames, height, width)[1]

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "f c h w"], request: Request | None = None
    ) -> Iterator[Float[Tensor, "_F 3 H W"]]:
        """The frames of one clip in [0, 1], a chunk at a time as they are decoded."""
        total, done, started = len(latents), 0, time.monotonic()
        with self.at_work(self.vae):
            for chunk in self.vae.decode_chunks(rearrange(latents, "f c h w -> 1 c f h w")):
                _require_finite(chunk, "frames")
                done = min(total, done + math.ceil(chunk.shape[2] / self.vae.config.temporal_compression_ratio))
                yield rearrange(chunk[0] / 2 + 0.5, "c F H W -> F c H W").clamp(0, 1)
                del chunk  # or it would live on while the next one is made
                if request is not None:
                    left = (time.monotonic() - started) / done * (total - done)
                    _report(request, "decode", done, total, eta=left)

    def to_video(self, request: Request, item: int, latents: Float[Tensor, "f c h w"]) -> Video:
        """Decode one clip into memory, or into its file as the frames come."""
        seed = request.seed[item] if isinstance(request.seed, list | tuple) else request.seed
        recipe = {"videogen": videogen.__version__, "model": self.card.name, "dtype": str(self.dtype).split(".")[-1]}
        recipe |= self.card_hash() | self.lossy | request.recipe(item)
        chunks = map(to_bytes, self.decode(latents, request))
        assert request.fps is not None
        if request.out is None:
            return Video(np.concatenate(list(chunks)), request.fps, seed, recipe)
        out = request.out[item] if isinstance(request.out, list | tuple) else request.out
        write: Callable[..., Any] = out if callable(out) else partial(write_video, out)
        return Video(write(chunks, request.fps, recipe=recipe), request.fps, seed, recipe)

    def card_hash(self) -> dict[str, str]:
        """The sha256 of the transformer's weights, where the model's `videogen.json` has it."""
        found = self.card.sha256.get("transformer/diffusion_pytorch_model.safetensors")
        return {"transformer_sha256": found} if found else {}

    def save(self, folder: str | Path, **options: Any) -> Path:
        """Write the model in diffusers' layout with a `videogen.json`; options of `weights.diffusers.save_folder`."""
        card = self.card
        facts = {
            name: list(value) if isinstance(value := getattr(card, name), tuple) else value
            for name in ("name", "conditions", "height", "width", "num_frames", "fps", "num_inference_steps")
        } | {name: getattr(card, name) for name in ("guidance_scale", "sampler", "licence", "provenance")}
        kind = "CogVideoXImageToVideoPipeline" if "first_frame" in card.conditions else "CogVideoXPipeline"
        with self.stages.on_host(self.dit, self.vae, self.text_encoder):
            return save_folder(
                folder,
                dit=self.dit,
                vae=self.vae,
                text_encoder=self.text_encoder,
                scheduler_config=card.scheduler,
                **{"model_index_class": kind, "extra": facts, **options},
            )


class Draws:
    """The run's only source of randomness: CPU generators, one for the batch or one per item.

    Noise is drawn in float32 and cast (in float64 for float64), so it does not depend on the device.
    """

    def __init__(self, seed: Any, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        shared = not isinstance(seed, list | tuple)
        own = [torch.Generator().manual_seed(int(s)) for s in ([seed] if shared else seed)]
        self.source: torch.Generator | list[torch.Generator] = own[0] if shared else own
        self.generators = own * batch if shared else own
        self.batch, self.dtype, self.device, self.shared = batch, dtype, device, shared

    def __call__(self, shape: Any) -> Tensor:
        """N(0, 1) of [batch, *shape] in the pipeline's dtype, on its device."""
        wide = torch.promote_types(self.dtype, torch.float32)
        if self.shared:
            noise = torch.randn((self.batch, *shape), generator=self.generators[0], dtype=wide)
        else:
            noise = torch.cat([torch.randn((1, *shape), generator=g, dtype=wide) for g in self.generators])
        return noise.to(self.device, self.dtype)

    def like(self, x: Tensor) -> Tensor:
        return self(x.shape[1:]).to(x.dtype)


class StepWatch:
    """Called after each denoising step: reports it with the time left, and stops at the first NaN or Inf."""

    def __init__(self, request: Request, steps: int, cache: StepCache | None = None) -> None:
        self.request, self.steps, self.started, self.cache = request, steps, time.monotonic(), cache

    def __call__(self, step: int, latents: Tensor) -> None:
        if step % 10 == 0:
            _require_finite(latents, "latents")
        left = (time.monotonic() - self.started) / step * (self.steps - step)
        skipped = self.cache.skipped if self.cache else 0
        _report(self.request, "denoise", step, self.steps, eta=left, latents=latents, skipped=skipped)


def to_bytes(frames: Float[Tensor, "F 3 H W"]) -> UInt8[np.ndarray, "F H W 3"]:
    """Frames in [0, 1] rounded to 0..255 where they were made, so that a quarter of float32's bytes crosses over."""
    rounded = (frames.float() * 255).round().to(torch.uint8)
    return rearrange(rounded, "F c H W -> F H W c").contiguous().cpu().numpy()


def choose_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InvalidRequest(f"there is no device {device!r}.", hint="cpu, cuda or cuda:1", param="device") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest(
            f"device {device!r} was asked for and torch finds no CUDA GPU.",
            why=f"torch {torch.__version__} sees {torch.cuda.device_count()} GPUs.",
            hint="--device cpu, or videogen doctor",
            param="device",
        )
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device, card: Card) -> torch.dtype:
    """A torch dtype, its name, or "auto"."""
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.float16 if card.dit.width == 1920 else torch.bfloat16  # 2B was trained in float16, 5B in bfloat16
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise InvalidRequest(
            f"{dtype!r} is not a dtype a model can run in.",
            hint="float32, bfloat16, float16 or float64",
            param="dtype",
        )
    return chosen


def _size(request: Request) -> tuple[int, int, int]:
    """(height, width, frames) of a checked request."""
    frames, height, width = request.size
    return height, width, frames


def _is_guided(request: Request) -> bool:
    assert request.guidance_scale is not None
    return request.guidance_scale > 1


def _first_step(request: Request) -> int:
    """Of `num_inference_steps`, the first that is made: 0, or where `strength` of them (one at least) remain."""
    if request.video is None:
        return 0
    assert request.num_inference_steps is not None
    return request.num_inference_steps - max(1, int(request.num_inference_steps * request.strength))


def _require_same_shape(text: Conditioning, negative: Conditioning) -> None:
    ours, theirs = (list(c.text.shape) for c in (text, negative) if c.text is not None)
    if ours != theirs:
        raise InvalidRequest(
            f"the text embeddings are {ours} and the negative ones {theirs}.",
            why="guidance runs them side by side.",
            hint="give both as embeddings of one shape.",
            param="negative_prompt_embeds",
        )


def _per_item(value: Any, batch: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * batch


def _frames_of(video: Any, count: int) -> Any:
    """The first `count` pictures of a path, a `Video`, an array or a list; that they are enough was checked."""
    frames = video.frames if isinstance(video, Video) else video
    if isinstance(frames, str | Path):
        frames = read_video(frames, limit=count)[0]
    return frames[:count]


def _require_finite(x: Tensor, what: str) -> None:
    if not bool(torch.isfinite(x).all()):
        raise NumericalError(
            f"the {what} are not finite; no video was made.",
            why=f"{str(x.dtype).split('.')[-1]} overflowed, or the weights are damaged.",
            hint="--dtype bfloat16 or --dtype float32",
        )


def _report(
    request: Request,
    stage: str,
    step: int,
    steps: int,
    *,
    eta: float | None = None,
    latents: Tensor | None = None,
    skipped: int = 0,
) -> None:
    watch: Callable[[Event], Any] | None = request.on_step
    if watch is not None:
        watch(Event(stage, step, steps, eta, latents, skipped))
