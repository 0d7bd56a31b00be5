"""One generate(): check the request, condition, sample, decode. Load a model once, then make clips with it."""

from __future__ import annotations

import math
import shlex
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any, TypeVar

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

import videogen
from videogen.conditioning import frames as frame_condition
from videogen.conditioning import text as text_condition
from videogen.conditioning.layouts import LAYOUTS, Shown
from videogen.config import to_dict
from videogen.data.latents import clip_of, save_latents
from videogen.data.video import Video, fit_image, read_video, write_video
from videogen.diffusion.denoiser import Model, dynamic_cfg, guided, last_time, switched
from videogen.diffusion.prediction import add_noise, prediction_type
from videogen.diffusion.samplers import SAMPLERS, diffusers_sampler, load_scheduler, scheduler_times
from videogen.diffusion.schedule import Schedule
from videogen.diffusion.windows import Span, padded_behind, spans, windowed
from videogen.errors import InvalidRequest, ModelNotFound, Note, NumericalError, OutOfMemory, VideogenError
from videogen.models.dit import DiT
from videogen.models.lora import merge, merged, set_scales
from videogen.models.text import TextEncoder
from videogen.models.vae import VAE
from videogen.progress import Event
from videogen.recipe import fingerprint, request_facts
from videogen.request import Request, item_of
from videogen.runtime.devices import choose_device, choose_dtype
from videogen.runtime.memory import PLANS, Plan, choose_plan
from videogen.runtime.modulation import expect
from videogen.runtime.names import check_names
from videogen.runtime.offload import Stages, on_device, tensors
from videogen.runtime.plan import (
    SMALL,
    choose_for,
    estimate,
    free_device,
    free_host,
    gib,
    job_of,
    native_job,
    smaller,
    valid_for,
)
from videogen.runtime.prepare import LOSSY_KERNELS, prepare
from videogen.runtime.sparing import Sparing
from videogen.runtime.step_cache import Curve, StepCache, load_curve, step_cache
from videogen.types import Conditioning, Latent
from videogen.weights.card import Card, read_card
from videogen.weights.diffusers import pipeline_class, save_folder, text_dtype, verify_on_load
from videogen.weights.hub import find_model
from videogen.weights.lora import Lora, add_loras, check_fit, open_loras
from videogen.weights.single import file_parts, load_parts, open_card, parts_beside

T = TypeVar("T")


def load(
    model: str | Path = "tiny",
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    memory: str | Plan = "auto",
    kernel: str = "auto",
    quantize: str | None = None,
    compile: bool = False,
    lora: Any = None,
    lora_scale: Any = None,
    merge_lora: bool | None = None,
    revision: str | None = None,
    offline: bool = False,
    verify: bool | None = None,
    base: str | Path | None = None,
    variant: str | None = None,
) -> Pipeline:
    """Open a model: "tiny" (bundled), a folder in diffusers' layout, a safetensors file, or `org/name[@revision]`.

    device "auto" is CUDA if there is one. dtype "auto" is float32 on a CPU; on CUDA float16 for CogVideoX-2B, which was
    trained in it, and bfloat16 for all others. memory: "fast" keeps all weights on the device, "balanced", "low" and
    "minimal" need less (videogen.runtime.memory.PLANS); "auto" is the fastest of them that has room for a clip of the
    model's own size and length. kernel, quantize and compile are those of `videogen.runtime.prepare`; without them the
    numbers are the plain model's.
    verify: compare the files with the hashes saved with them; None: if the model is small
    (videogen.weights.diffusers.verify_on_load). Raises ModelNotFound, or InvalidRequest for an impossible combination.

    lora: a file, a (file, scale), or a list of these, in any format of docs/lora.md; lora_scale for those without one.
    They are merged into the weights, or stay beside them where these come from the host in turn; merge_lora decides.

    base: of a single file, the model that its other parts come from; else the published one that it is like. variant:
    the published model whose use its weights have, where shapes cannot tell (docs/formats.md).
    """
    check_names(device=device, dtype=dtype, memory=memory, kernel=kernel, quantize=quantize)
    plan, loras, where = choose_plan(memory), open_loras(lora, lora_scale), choose_device(device)
    path = find_model(model, revision=revision, offline=offline)
    card = open_card(path, base=base, variant=variant, offline=offline)
    for one in loras:
        check_fit(one.file, card.dit, card.name)
    _verify(card, verify)
    kind = choose_dtype(dtype, where, card)
    note = ""
    if plan is None:
        plan, note = plan_for(card, where, kind)
    # Mapped and not read, if a stage that begins casts what it needs.
    parts = load_parts(card) if plan.stages_in_turn else load_parts(card, device=where, dtype=kind)
    dit, vae, text_encoder = parts.dit, parts.vae, parts.text_encoder
    assert dit is not None
    assert vae is not None
    assert text_encoder is not None
    dit.config, vae.config = card.dit, card.vae  # with what the card tells of their use, and their own files do not
    merging = bool(merge_lora if merge_lora is not None else quantize or not plan.stages_in_turn)
    if loras and merging:
        dit.to(kind)  # sums are rounded once, to what is computed in
    add_loras(dit, loras, dtype=kind if merging or not plan.stages_in_turn else None)
    if merging:
        merge(dit)
    dtypes = {}
    if plan.stages_in_turn:
        dtypes = {x: kind for network in (dit, vae) for x in tensors(network) if x.is_floating_point()}
        dtypes |= {x: text_dtype(name, kind) for name, x in text_encoder.named_parameters()}
    stages = Stages(plan, where, dtypes)
    rows = where.type != "cpu" or card.dit.width >= SMALL
    prepare(dit.eval(), vae.eval(), stages, rows=rows, kernel=kernel, quantize=quantize, compile=compile)
    pipe = Pipeline(card, dit, vae, text_encoder.eval(), stages)
    pipe.loras, pipe.memory_note = loras, note
    pipe.lossy = {"quantize": quantize} if quantize else {}
    pipe.lossy |= {"kernel": kernel} if kernel in LOSSY_KERNELS else {}
    pipe.options = {"kernel": "sdpa" if kernel == "auto" and where.type == "cpu" else kernel, "compile": compile}
    pipe.options |= {"merge_lora": merging} if loras else {}
    return pipe


def plan_for(
    card: Card, device: torch.device, dtype: torch.dtype, requests: Iterable[Request] = ()
) -> tuple[Plan, str]:
    """The fastest plan with room for all these checked requests, and a line that says so.

    Without requests: for a clip of the model's own size and length.
    """
    told = {"dtype": _name(dtype), "device": device.type}
    jobs = [job_of(card, request, **told) for request in requests] or [native_job(card, **told)]
    free, host = free_device(str(device)), free_host()
    job, found = choose_for(jobs, device=free, host=host)
    need, there = (found.host, host) if device.type == "cpu" else (found.device, free)
    beside = f" of {gib(there)} free" if there is not None else ""
    note = f"memory plan {found.plan.name}: {gib(need)}{beside} on {device} for {job.num_frames} frames of "
    return found.plan, f"{note}{job.width}x{job.height} ({found.widest} needs most)"


def _verify(card: Card, verify: bool | None) -> None:
    """`verify_on_load` for what is read of a model's folder. A single file has no hashes to be compared with."""
    if card.file is None:
        verify_on_load(card.folder, verify=verify)
        return
    if verify:
        raise ModelNotFound(
            f"{card.file} carries no hashes.",
            why="those of a model lie in its folder, and this is a single file.",
            hint="leave --verify out, or videogen convert FILE --out FOLDER, which writes them",
        )
    verify_on_load(card.folder, replaced=file_parts(card))


def generate(prompt: Any = None, *, model: str | Path = "tiny", **keywords: Any) -> Any:
    """`load(model).generate(prompt, **keywords)`, with the model kept for the next call."""
    card = read_card(find_model(model, weights=False))
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
        self.options: dict[str, Any] = {}  # what was put into it and may change the last bits: part of it, too
        self.loras: list[Lora] = []  # the files that were put into the DiT, and how much each counts
        self.sparing = self.spare(None)
        self.memory_note = ""  # why this memory plan, if it was chosen by itself

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
        # Now, when the pictures of the request are where they are: they may be gone when all steps are done.
        recipes = [self.recipe(request, k) for k in range(request.batch_size)] if request.output == "video" else []

        self.sparing = self.spare(request)
        text, negative = self.sparing.run("text", partial(self.embed, request))
        for words in (text, negative):
            if words is not None and words.text is not None:
                self.require_finite(words.text, "text embeddings")
        told = self.sparing.run("encode", partial(self.condition, request, draw), draw.rewind())
        if request.latents is not None:
            start = request.latents.to(self.device, self.dtype)
        elif request.video is not None:
            start = self.sparing.run("encode", partial(self.noised_video, request, draw), draw.rewind())
        else:
            start = draw(self.card.latent_shape(*_size(request)))

        def denoise() -> Latent:
            with self.at_work(self.dit):
                return self.denoise(request, start, text, negative, told, draw)

        latents = self.sparing.run("denoise", denoise, draw.rewind())

        if request.output == "latent":
            return latents
        latents = latents[:, self.padding(request) :]
        # As of now: a memory plan that is changed while frames are decoded leaves them as they are.
        recipes = [recipe | {"made_with": self.made_with()} for recipe in recipes]
        kept = self.keep(request, latents, recipes) if request.keep_latents else []
        made: list[Any] = []
        try:
            with ExitStack() as stack:
                self.sparing.run("decode", lambda: stack.enter_context(self.at_work(self.vae)))
                for item, one in enumerate(latents):
                    if request.output == "tensor":
                        made.append(self.decoded(one, {}, lambda chunks, _: torch.cat(list(chunks)), request))
                    else:
                        out = item_of(request.out, item)
                        made.append(self.finish(one, recipes[item], out=out, on_step=request.on_step))
        except BaseException as error:  # interrupts too: hours of denoising may be in these few megabytes
            setattr(error, "latents", latents[len(made) :])  # noqa: B010  (for Python; any kind of error)
            self.tell_kept(error, kept or self.keep(request, latents, recipes, without=len(made)))
            raise
        if request.output == "tensor":
            return torch.stack(made)
        return made if request.is_batch else made[0]

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
            if _is_guided(request) and request.uncond == "zeros":
                negative = text_condition.zeros(text)
            elif _is_guided(request):
                negative = embeddings(request.negative_prompt, request.negative_prompt_embeds)
                _require_same_shape(text, negative)
        _report(request, "text", 1, 1)
        return text, negative

    def condition(self, request: Request, draw: Draws) -> tuple[Conditioning, Conditioning]:
        """Everything but the text: the channels behind the noise, by the card's layout, and a variant's constants.

        First with all that the request shows; then without the last frame, for `last_frame_until`.
        """
        shown, last = self.shown(request, draw), request.size[0] - 1
        vectors = {}
        if self.dit.config.ofs_embed_dim:
            vectors["ofs"] = torch.full((1,), frame_condition.OFS, device=self.device, dtype=self.dtype)
        with nullcontext() if shown.empty else self.at_work(self.vae):
            told = LAYOUTS[self.card.layout](self.vae, shown)
            full = without = told(shown.images) | Conditioning(vectors=vectors)
            if last in shown.images and request.last_frame_until < 1:
                without = told(shown.images.keys() - {last}) | Conditioning(vectors=vectors)
        return full, without

    def shown(self, request: Request, draw: Draws) -> Shown:
        """The pictures and clips of a request as pixels, and how they are to be encoded."""
        height, width, num_frames = _size(request)
        clip = request.control_video if request.mask is None else request.video
        return Shown(
            like=draw.zeros(self.card.latent_shape(height, width, num_frames)),
            num_frames=num_frames,
            padding=self.padding(request),
            images={k: self.pixels(request, _per_item(x, request.batch_size)) for k, x in request.images.items()},
            video=None if clip is None else self.clip_pixels(request, clip),
            mask=None if request.mask is None else (self.clip_pixels(request, request.mask)[:, :1] > 0).to(self.dtype),
            generators=draw.generators,
            draw=draw,
            noisy=self.dit.config.add_noise_in_inpaint_model,
            scale=request.image_latent_scale,
        )

    def pixels(self, request: Request, pictures: Any) -> Float[Tensor, "n 3 H W"]:
        """Pictures at the size of the clip, in [-1, 1]."""
        height, width, _ = _size(request)
        fitted = np.stack([fit_image(picture, height, width, request.fit) for picture in pictures])
        return torch.from_numpy(fitted).to(self.device, self.dtype)

    def clip_pixels(self, request: Request, clip: Any) -> Float[Tensor, "b 3 F H W"]:
        """The first frames of a clip, as many as are asked for, the same for each prompt; a picture stands still."""
        frames = self.pixels(request, _frames_of(clip, request.size[0]))
        frames = frames.expand(request.size[0], -1, -1, -1)
        return rearrange(frames, "F c H W -> 1 c F H W").expand(request.batch_size, -1, -1, -1, -1)

    def denoise(
        self,
        request: Request,
        x: Latent,
        text: Conditioning,
        negative: Conditioning | None,
        told: tuple[Conditioning, Conditioning],
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

        full, without = told

        def with_words(words: Conditioning) -> Any:
            if without is not full:
                return switched(words | full, words | without, times=called, until=float(request.last_frame_until))
            return words | full

        scale: Any = float(request.guidance_scale)
        if request.use_dynamic_cfg and _is_guided(request):
            mode = "sat" if request.use_dynamic_cfg == "sat" else "diffusers"
            scale = dynamic_cfg(scale, steps - first_step, mode=mode, times=called)
        uncond = None if negative is None else with_words(negative)
        expect(self.dit, called, full.vectors)
        with self.step_cache(request) as cache:
            denoise = guided(
                self.of_any_length(request),
                with_words(text),
                uncond,
                scale,
                dtype=self.dtype,
                in_two=lambda: self.plan.guidance_in_two,  # asked each time: the plan may change on the way
                down_to=last_time(called, float(request.guidance_until)),
                announce=cache.announce if cache else None,
            )
            if cache is None:  # whose notes of a half-made step would be wrong: with one, all steps are made again
                evaluate = denoise
                denoise = lambda x, t: self.sparing.run("denoise", partial(evaluate, x, t))  # noqa: E731

            on_step = StepWatch(request, len(called), self.dtype, cache)
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
        self.require_finite(x, "latents")
        return x

    @cached_property
    def curve(self) -> Curve:
        """What a step cache foretells by: measured on these weights, kept in their folder; yours may be set here."""
        if self.card.file is not None:
            raise InvalidRequest(
                f"{self.card.file.name} is not calibrated for a step cache.",
                why="a curve lies in the folder of the weights it was measured on, and this is a single file.",
                hint="videogen convert FILE --out FOLDER, then python scripts/price.py calibrate FOLDER",
                param="step_cache",
            )
        curve = load_curve(self.card.folder, transformer_sha256=self.card.transformer_sha256)
        if self.loras:
            note = "the step cache was measured without the LoRA: it may leave out more than its budget says"
            warnings.warn(Note(note), stacklevel=2)
        return curve

    def step_cache(self, request: Request) -> AbstractContextManager[StepCache | None]:
        """The transformer's block loop for one clip: a step cache if one is asked for, else as it is."""
        if not request.step_cache:
            return nullcontext()
        if len(self.windows(request)) > 1:
            raise InvalidRequest(
                f"a step cache cannot serve the windows of a clip of {request.num_frames} frames.",
                why="it foretells what one evaluation adds from the one before, and here several take turns.",
                hint=f"--frames {self.card.native_frames}, or leave out the step cache.",
                param="step_cache",
            )
        noisy = request.sampler in ("dpm", "diffusers")  # or may be, as a scheduler of diffusers
        return step_cache(self.dit, self.curve, float(request.step_cache), straight=not noisy)

    def noised_video(self, request: Request, draw: Draws) -> Latent:
        """The latents of `request.video`, noised to where `strength` of the steps remain."""
        steps = request.num_inference_steps
        assert steps is not None
        first_step = _first_step(request)
        video = self.clip_pixels(request, request.video)
        with self.at_work(self.vae):
            latents = torch.cat([self.vae.encode(video[:1], g) for g in draw.generators])
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

    def windows(self, request: Request) -> list[Span]:
        """The latent frames that the transformer sees at once: all, or beyond the native length a window at a time."""
        height, width, num_frames = _size(request)
        total = self.card.latent_shape(height, width, num_frames)[0]
        length = self.card.latent_shape(height, width, min(self.card.native_frames, num_frames))[0]
        return spans(total, length, multiple=self.dit.config.patch_size_t or 1) if total > length else [(0, total)]

    def of_any_length(self, request: Request) -> Model:
        """The transformer for the length of this clip."""
        total, patch = self.windows(request)[-1][1], self.dit.config.patch_size_t or 1
        if total % patch:
            return padded_behind(self.dit, patch)
        return windowed(self.dit, self.windows(request))

    def padding(self, request: Request) -> int:
        """Latent frames put in front so that patches in time divide them (the 1.5 models), cut off before decoding."""
        height, width, num_frames = _size(request)
        padded = self.card.latent_shape(height, width, num_frames)[0]
        return padded - self.vae.latent_shape(num_frames, height, width)[1]

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "f c h w"], request: Request | None = None, *, dtype: torch.dtype | None = None
    ) -> Iterator[Float[Tensor, "_F 3 H W"]]:
        """The frames of one clip in [0, 1], a chunk at a time as they are decoded; in `dtype` if one is given."""
        total, done, started = len(latents), 0, time.monotonic()
        for chunk in self.chunks(rearrange(latents, "f c h w -> 1 c f h w"), dtype):
            self.require_finite(chunk, "frames", dtype)
            done = min(total, done + math.ceil(chunk.shape[2] / self.vae.config.temporal_compression_ratio))
            yield rearrange(chunk[0] / 2 + 0.5, "c F H W -> F c H W").clamp(0, 1)
            del chunk  # or it would live on while the next one is made
            if request is not None:
                left = (time.monotonic() - started) / done * (total - done)
                _report(request, "decode", done, total, eta=left)

    def chunks(
        self, latents: Float[Tensor, "1 c f h w"], dtype: torch.dtype | None = None
    ) -> Iterator[Float[Tensor, "1 3 _F H W"]]:
        """`vae.decode_chunks`. If memory runs out, it begins again under the next plan, after what was given already:
        those frames are the same under every plan."""
        given = 0
        while True:
            try:
                with self.at_work(self.vae), ExitStack() as stack:
                    if dtype is not None and dtype != self.dtype:
                        stack.enter_context(on_device(self.vae, self.device, dict.fromkeys(tensors(self.vae), dtype)))
                    for place, chunk in enumerate(self.vae.decode_chunks(latents.to(dtype or latents.dtype))):
                        if place >= given:
                            given += 1
                            yield chunk
                        del chunk
                return
            except (RuntimeError, MemoryError) as error:
                self.sparing.step_down("decode", error)

    def decoded(
        self,
        latents: Float[Tensor, "f c h w"],
        recipe: dict[str, Any],
        make: Callable[[Iterator[Tensor], dict[str, Any]], T],
        request: Request | None = None,
    ) -> T:
        """What `make` makes of the frames and the recipe. Where 16 bits overflow, once more from frames in float32."""
        try:
            return make(self.decode(latents, request), recipe)
        except NumericalError:
            if self.dtype not in (torch.float16, torch.bfloat16):
                raise
        note = f"the frames are not finite in {_name(self.dtype)}: they are decoded once more in float32"
        warnings.warn(Note(note), stacklevel=2)
        return make(self.decode(latents, request, dtype=torch.float32), {**recipe, "decode_dtype": "float32"})

    def finish(
        self,
        latents: Float[Tensor, "f c h w"],
        recipe: dict[str, Any],
        *,
        out: Any = None,
        on_step: Callable[[Event], Any] | None = None,
    ) -> Video:
        """The clip of clean latents, without padding, and of the recipe that made them: as `data.latents` keeps them.

        `out` and `on_step` are those of `generate`. Raises NumericalError if the frames are not finite in float32
        either, OutOfMemory, and whatever `out` raises.
        """
        fps, seed = recipe["fps"], recipe.get("seed")
        write: Callable[..., Any] = out if callable(out) else partial(write_video, out)

        def make(chunks: Iterator[Tensor], recipe: dict[str, Any]) -> Video:
            pictures = map(to_bytes, chunks)
            frames = np.concatenate(list(pictures)) if out is None else write(pictures, fps, recipe=recipe)
            return Video(frames, fps, seed, recipe)

        return self.decoded(latents.to(self.device, self.dtype), recipe, make, Request(on_step=on_step))

    def recipe(self, request: Request, item: int) -> dict[str, Any]:
        """What made a clip, as JSON-ready values: the model, and the request."""
        recipe: dict[str, Any] = {"videogen": videogen.__version__, "model": self.card.name, "dtype": _name(self.dtype)}
        recipe |= self.card_hash() | self.lossy | request_facts(request, item)
        if len(windows := self.windows(request)) > 1:  # not of one pass: it says so
            recipe["windows"] = {"frames": self.card.native_frames, "count": len(windows)}
        if self.loras:
            recipe["lora"] = [lora.recipe for lora in self.loras]
        return recipe | self.origin | {"made_with": self.made_with()}

    @cached_property
    def origin(self) -> dict[str, str]:
        """The fingerprint of the files that the model came from, and their commit in the Hub's cache."""
        folder = self.card.folder
        weights = fingerprint(folder, self.card.file, parts_beside(self.card))
        revision = {"revision": folder.name} if folder.parent.name == "snapshots" else {}
        return revision | ({"weights": weights} if weights else {})

    def made_with(self) -> dict[str, Any]:
        """What equal numbers depend on beside the settings: versions, kind of device, threads, ways of computing."""
        device, plan = self.device, self.plan
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            kind = {"capability": f"{major}.{minor}"}
        else:
            kind = {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
        facts = {"torch": torch.__version__, "device": device.type} | kind | self.options
        return facts | {"memory": plan.name, "guidance_in_two": plan.guidance_in_two}

    def keep(
        self,
        request: Request,
        latents: Float[Tensor, "b f c h w"],
        recipes: list[dict[str, Any]],
        *,
        without: int = 0,
    ) -> list[Path]:
        """Writes the latents of all clips but the first ones beside the clips, or where there is no room among the
        temporary files; returns the files. None for a clip that was to be no file, or if there is no room anywhere."""
        kept: list[Path] = []
        for item in range(without, len(recipes)):
            out = item_of(request.out, item)
            path = getattr(out, "path", None) if callable(out) else out
            recipe = recipes[item] | getattr(out, "notes", {})
            for place in [] if path is None else [Path(path), Path(gettempdir()) / clip_of(path).name]:
                try:
                    kept.append(save_latents(place, latents[item], recipe))
                    break
                except Exception:  # the best that can be done: what went wrong before is what is told
                    continue
        return kept

    def tell_kept(self, error: BaseException, kept: list[Path]) -> None:
        """The error also says where the latents are and how to finish the clip."""
        if not kept:
            return
        how = f"videogen decode {shlex.join(map(str, kept))} --model {shlex.quote(model_name(self.card))}"
        if isinstance(error, VideogenError):
            error.why = f"{error.why.rstrip('.')}. All steps are done and kept in {kept[0]}.".lstrip(". ")
            error.hint = f"{how}   ({error.hint})" if error.hint else how
        else:
            error.add_note(f"{how}   (all steps are done)")

    def require_finite(self, x: Tensor, what: str, dtype: torch.dtype | None = None) -> None:
        """Raise NumericalError if there is NaN or Inf; `dtype`: what it was computed in, if not the pipeline's."""
        if not bool(torch.isfinite(x).all()):
            raise not_finite(what, dtype or self.dtype)

    def spare(self, request: Request | None) -> Sparing:
        """What steps down to the next memory plan if one is too much, at most once for a clip."""
        explain = partial(self.out_of_memory, request)
        return Sparing(self.stages, explain, self.dit, self.vae, self.text_encoder)

    def out_of_memory(self, request: Request | None, stage: str) -> OutOfMemory:
        """The error for a stage that does not fit, with flags of which each alone would make it fit, by the planner."""
        what, plan = f"out of memory in the stage {stage}, under the memory plan {self.plan.name}.", self.plan
        if request is None:
            return OutOfMemory(what, why=f"{self.device} has no more.", hint="--memory minimal")

        job = job_of(self.card, request, dtype=_name(self.dtype), device=self.device.type)
        stages = estimate(job, plan).stages
        free = free_host() if self.device.type == "cpu" else free_device(str(self.device))
        there = "" if free is None else f", and {gib(free)} are free"
        why = f"it needs about {gib(stages[stage].total)} on {self.device}{there}." if stage in stages else ""
        flags: dict[str, int] = {}
        if stage in stages:
            multiple, valid = self.card.size_multiple, valid_for(self.card, request)
            flags = smaller(job, plan, stage=stage, free=free, multiple=multiple, valid=valid)
        hints = [f"{flag} ({gib(need)})" for flag, need in flags.items()]
        return OutOfMemory(what, why=why, hint=" or ".join(hints) or "end other programs that use this memory.")

    def card_hash(self) -> dict[str, str]:
        """The sha256 of the transformer's weights, where the model's `videogen.json` has it."""
        found = self.card.transformer_sha256
        return {"transformer_sha256": found} if found else {}

    def set_lora_scale(self, *scales: float | int) -> None:
        """How much each LoRA counts in the next clips: a scale for each, in the order of `load`, 0 for not at all.

        Merged ones are taken out and merged again. Raises InvalidRequest for another number of scales than LoRAs, and
        for a model in 8 bits.
        """
        if len(scales) != len(self.loras):
            raise InvalidRequest(
                f"{len(scales)} scales are given for {len(self.loras)} LoRAs.",
                why="each has its own.",
                hint="set_lora_scale(0.7)   for one",
                param="lora_scale",
            )
        changed = [replace(lora, scale=float(scale)) for lora, scale in zip(self.loras, scales, strict=True)]
        set_scales(self.dit, {lora.name: lora.scale for lora in changed})
        self.loras = changed

    def save(self, folder: str | Path, **options: Any) -> Path:
        """Write the model in diffusers' layout with a `videogen.json`; options of `weights.diffusers.save_folder`.

        LoRAs are merged into what is written, which then bears the folder's name and names them.
        """
        card = self.card
        if self.loras:
            made_of = {"model": card.name, **self.card_hash(), "lora": [lora.recipe for lora in self.loras]}
            card = replace(card, name=Path(folder).absolute().name, provenance=card.provenance | {"merged": made_of})
        with self.stages.on_host(self.dit, self.vae, self.text_encoder), merged(self.dit):
            return save_folder(
                folder,
                dit=self.dit,
                vae=self.vae,
                text_encoder=self.text_encoder,
                scheduler_config=card.scheduler,
                **{"model_index_class": pipeline_class(card), "extra": card.facts, **options},
            )


def model_name(card: Card) -> str:
    """What opens the model of a card again: its file if it is one, its name if that finds it, else its folder."""
    if card.file:
        return str(card.file)
    try:
        return card.name if find_model(card.name, offline=True, weights=False) == card.folder else str(card.folder)
    except VideogenError:
        return str(card.folder)


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

    def zeros(self, shape: Any) -> Tensor:
        return torch.zeros((self.batch, *shape), device=self.device, dtype=self.dtype)

    def like(self, x: Tensor) -> Tensor:
        return self(x.shape[1:]).to(x.dtype)

    def rewind(self) -> Callable[[], None]:
        """What brings the generators back to where they are now."""
        states = [(generator, generator.get_state()) for generator in self.generators]

        def back() -> None:
            for generator, state in states:
                generator.set_state(state)

        return back


class StepWatch:
    """Called after each denoising step: reports it with the time left, and stops at NaN or Inf, naming the step.

    What each step found is read from the device only every ten steps, so that none waits for it.
    """

    def __init__(self, request: Request, steps: int, dtype: torch.dtype, cache: StepCache | None = None) -> None:
        self.request, self.steps, self.dtype, self.cache = request, steps, dtype, cache
        self.started, self.finite = time.monotonic(), []

    def __call__(self, step: int, latents: Tensor) -> None:
        self.finite.append(torch.isfinite(latents).all())
        if step % 10 == 0 or step == self.steps:
            found, self.finite = torch.stack(self.finite).tolist(), []
            if not all(found):
                bad = step - len(found) + found.index(False) + 1
                raise not_finite(f"latents after step {bad} of {self.steps}", self.dtype)
        left = (time.monotonic() - self.started) / step * (self.steps - step)
        skipped = self.cache.skipped if self.cache else 0
        _report(self.request, "denoise", step, self.steps, eta=left, latents=latents, skipped=skipped)


def to_bytes(frames: Float[Tensor, "F 3 H W"]) -> UInt8[np.ndarray, "F H W 3"]:
    """Frames in [0, 1] rounded to 0..255 where they were made, so that a quarter of float32's bytes crosses over."""
    rounded = (frames.float() * 255).round().to(torch.uint8)
    return rearrange(rounded, "F c H W -> F H W c").contiguous().cpu().numpy()


def _size(request: Request) -> tuple[int, int, int]:
    """(height, width, frames) of a checked request."""
    frames, height, width = request.size
    return height, width, frames


def _name(dtype: torch.dtype) -> str:
    return str(dtype).split(".")[-1]


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
    """The first `count` pictures of a path, a `Video`, an array or a list; that they are enough was checked.

    Of a mask also a single picture, and arrays without colours: [H, W] or [F, H, W], numbers in [0, 1] or truths.
    """
    frames = video.frames if isinstance(video, Video) else video
    if isinstance(frames, str | Path):
        frames = read_video(frames, limit=count)[0]
    if hasattr(frames, "convert"):
        return [frames]
    if isinstance(frames, Tensor):
        frames = frames.cpu().numpy()
    if isinstance(frames, np.ndarray) and frames.shape[-1] != 3:
        planes = frames if frames.dtype == np.uint8 else frames.astype(np.float32)
        frames = np.repeat(planes.reshape(-1, *planes.shape[-2:])[..., None], 3, axis=-1)
    if isinstance(frames, np.ndarray) and frames.ndim == 3:
        frames = frames[None]
    return frames[:count]


def not_finite(what: str, dtype: torch.dtype) -> NumericalError:
    """The error for NaN or Inf in what a model computed in `dtype`."""
    why = {
        torch.float16: "float16 ends at 65504, and a value went beyond.",
        torch.bfloat16: "bfloat16 has 8 bits for each value, and errors of rounding grew.",
    }
    hint = {torch.float16: "--dtype bfloat16 or --dtype float32", torch.bfloat16: "--dtype float32"}
    damaged = "nothing overflows in this dtype by itself: the weights, a LoRA's scale or an input are damaged."
    return NumericalError(
        f"the {what} are not finite; no video was made.",
        why=why.get(dtype, damaged),
        hint=hint.get(dtype, "videogen doctor, or fetch the model again."),
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
