"""What is compared with what: per stage the variants of diffusers and of ours, all on the same weights and inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.floors import by_kind
from bench.measure import Run
from bench.models import Shape, Weights, card
from videogen.models.dit import DiT
from videogen.models.vae import VAE
from videogen.runtime.counters import count
from videogen.types import Conditioning

TIME = 500  # the timestep at which a guidance step is measured; all cost the same
PROMPT = "a small red circle moves right on a navy background"


@dataclass
class Variant:
    """`run` is timed; `output` gives what is compared with the reference; `modules` hold the weights."""

    run: Run
    output: Callable[[], Tensor]
    modules: tuple[nn.Module, ...] = ()


@dataclass
class Case:
    """The first variant is what the others are held against. A variant is built when its turn comes."""

    name: str
    what: str
    variants: dict[str, Callable[[], Variant]]
    flops: dict[str, float] = field(default_factory=dict)  # by kind, of the plain model
    reference: Callable[[], Tensor] | None = None


# ---- the text encoder -----------------------------------------------------------------------------------------------


def text(shape: Shape, weights: Weights, compiled: str | None) -> Case:
    """A prompt and an empty one. The network is the same one: what differs is how often it is called."""

    def theirs() -> Variant:
        pipe = their_pipeline(shape, weights)
        length = shape.dit.max_text_seq_length

        def run() -> Tensor:
            return torch.cat(pipe.encode_prompt(PROMPT, "", True, max_sequence_length=length, device=weights.device))

        return Variant(run, run, (weights.text_encoder,))

    def ours() -> Variant:
        from videogen.request import Request

        pipe = our_pipeline(shape, weights, fast=False)
        request = Request(PROMPT).checked(pipe.card)

        def run() -> Tensor:
            return torch.cat([c.text for c in pipe.embed(request) if c is not None and c.text is not None])

        return Variant(run, run, (weights.text_encoder,))

    what = f"two prompts of {shape.dit.max_text_seq_length} tokens, {shape.text} T5"
    return Case("text encoder", what, {"diffusers": theirs, "ours": ours})


# ---- one guidance step of the DiT -----------------------------------------------------------------------------------


def dit(shape: Shape, weights: Weights, compiled: str | None) -> Case:
    inputs = weights.dit_inputs(TIME)

    def theirs(wrap: Callable[[Any], Any] = lambda model: model, *, cudnn: bool = False) -> Variant:
        model, rotary = weights.their_dit(), weights.their_rotary()
        called, (latents, t, cond) = wrap(model), inputs
        if cond.channels is not None:
            latents = torch.cat([latents, cond.channels], dim=2)

        def run() -> Tensor:
            with _cudnn() if cudnn else nullcontext():
                return called(latents, cond.text, t, image_rotary_emb=rotary, return_dict=False)[0]

        return Variant(run, run, (model,))

    def ours(*rows: Callable[[DiT], DiT]) -> Variant:
        model = weights.dit()
        for put_in in rows:
            model = put_in(model)
        latents, t, cond = inputs
        t = t.cpu()  # the pipeline keeps times on the host, where nothing waits for them

        def run() -> Tensor:
            return model(latents, t, cond)

        return Variant(run, run, (model,))

    def fast(model: DiT) -> DiT:
        """Passes fused, attention as measured, modulation looked up."""
        from videogen.runtime.dit import fast_dit
        from videogen.runtime.kernels import set_kernel
        from videogen.runtime.modulation import cache_modulation

        config = shape.dit
        size = (2, config.num_attention_heads, shape.tokens(shape.dit_clip), config.attention_head_dim)
        return cache_modulation(set_kernel(fast_dit(model), "auto", shape=size))

    def compile_blocks(model: DiT) -> DiT:
        from videogen.runtime.compile import compile_blocks as compile_each

        return compile_each(model)

    variants: dict[str, Callable[[], Variant]] = {"diffusers": theirs}
    if weights.device.type == "cuda":
        variants["diffusers, cuDNN attention"] = lambda: theirs(cudnn=True)
    if compiled == "plain":
        variants["diffusers, compiled"] = lambda: theirs(compile_their_blocks)
    elif compiled:  # not both in one process: what is compiled does not ask again which kernel is wanted
        variants["diffusers, compiled, cuDNN attention"] = lambda: theirs(compile_their_blocks, cudnn=True)
    variants |= {"ours, plain": ours, "ours, fast": lambda: ours(fast)}
    if compiled:
        variants["ours, compiled"] = lambda: ours(fast, compile_blocks)

    def reference() -> Tensor:
        """The plain network in a wider dtype on the same weights; the tests hold it equal to diffusers'. Half of it."""
        latents, t, cond = inputs
        given = {"text": cond.text, "channels": cond.channels}
        half = Conditioning(**{k: v[:1].to(weights.wider) for k, v in given.items() if v is not None})
        return weights.dit(weights.wider)(latents[:1].to(weights.wider), t[:1], half)

    tokens, layers = shape.tokens(shape.dit_clip), shape.dit.num_layers
    what = f"{tokens} tokens, batch 2 (guidance), {layers} layers of width {shape.dit.width}"
    name = f"DiT guidance step, compiled too ({compiled})" if compiled else "DiT guidance step"
    return Case(name, what, variants, dit_flops(shape), reference)


def compile_their_blocks(model: Any) -> Any:
    """Block by block, so that one is compiled for all of them (their own `compile_repeated_blocks` refuses)."""
    for block in model.transformer_blocks:
        block.compile()
    return model


def dit_flops(shape: Shape) -> dict[str, float]:
    with torch.device("meta"):
        model = DiT(shape.dit)
        inputs = Weights(shape, torch.bfloat16, torch.device("meta")).dit_inputs(TIME)
    return by_kind(count(model.to(torch.bfloat16), *inputs))


def _cudnn():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION])


# ---- the VAE --------------------------------------------------------------------------------------------------------


def decode(shape: Shape, weights: Weights, compiled: str | None) -> Case:
    latents = weights.latents()
    unscaled = latents / shape.vae.scaling_factor

    def theirs(*, tiled: bool = False) -> Variant:
        model = weights.their_vae()
        if tiled:
            model.enable_tiling()
        return Variant(lambda: model.decode(unscaled), lambda: model.decode(unscaled).sample, (model.decoder,))

    def ours(put_in: Callable[[VAE], VAE] = lambda model: model) -> Variant:
        model = put_in(weights.vae())

        def run() -> None:
            for chunk in model.decode_chunks(latents):
                del chunk  # as in a pipeline: it leaves before the next is made

        return Variant(run, lambda: model.decode(latents), (model.decoder,))

    variants: dict[str, Callable[[], Variant]] = {"diffusers": theirs}
    if weights.device.type == "cuda":
        variants["diffusers, tiled (another result)"] = lambda: theirs(tiled=True)
    variants |= {"ours, plain": ours, "ours, fast": lambda: ours(fast_vae)}

    def reference() -> Tensor:
        return exact_vae(weights).decode(latents.to(weights.wider))

    flops = vae_flops(shape, lambda vae, clip: list(vae.decode_chunks(clip.latents())))
    return Case("VAE decode", _size(shape), variants, flops, reference)


def encode(shape: Shape, weights: Weights, compiled: str | None) -> Case:
    pixels = weights.pixels()

    def theirs() -> Variant:
        model = weights.their_vae()

        def run() -> Tensor:
            return model.encode(pixels).latent_dist.mode() * shape.vae.scaling_factor

        return Variant(run, run, (model.encoder,))

    def ours(put_in: Callable[[VAE], VAE] = lambda model: model) -> Variant:
        model = put_in(weights.vae())

        def run() -> Tensor:
            return model.encode(pixels)

        return Variant(run, run, (model.encoder,))

    variants = {"diffusers": theirs, "ours, plain": ours, "ours, fast": lambda: ours(fast_vae)}

    def reference() -> Tensor:
        return exact_vae(weights).encode(pixels.to(weights.wider))

    flops = vae_flops(shape, lambda vae, clip: vae.encode(clip.pixels()))
    return Case("VAE encode", _size(shape), variants, flops, reference)


def fast_vae(model: VAE) -> VAE:
    from videogen.runtime.vae import fast_vae as rows

    return rows(model)


def exact_vae(weights: Weights) -> VAE:
    """The plain VAE; in float64, where tests hold the fast rows equal to 1e-12, those: plain ones take 12 GB more."""
    model = weights.vae(weights.wider)
    return fast_vae(model) if weights.wider == torch.float64 else model


def vae_flops(shape: Shape, run: Callable[[VAE, Weights], Any]) -> dict[str, float]:
    with torch.device("meta"):
        model = VAE(shape.vae).to(torch.bfloat16)
    return by_kind(count(run, model, Weights(shape, torch.bfloat16, torch.device("meta"))))


def _size(shape: Shape) -> str:
    return "{} frames of {} x {}".format(*shape.clip)


# ---- a whole clip ---------------------------------------------------------------------------------------------------


def clip(shape: Shape, weights: Weights, compiled: str | None) -> Case:
    """Prompt (and first frame, if the model takes one) to frames in memory: text encoder, all steps, VAE, uint8."""
    settings: dict[str, Any] = {"num_inference_steps": shape.steps, "guidance_scale": 6.0}

    def theirs() -> Variant:
        pipe = their_pipeline(shape, weights)
        frames, height, width = shape.clip
        size: dict[str, Any] = {"num_frames": frames, "height": height, "width": width}
        size |= {"max_sequence_length": shape.dit.max_text_seq_length}
        if weights.first_frame is not None:
            size["image"] = weights.first_frame

        def run() -> Tensor:
            made = pipe(prompt=PROMPT, generator=torch.Generator().manual_seed(0), **settings, **size).frames[0]
            return torch.from_numpy(np.stack([np.asarray(picture) for picture in made]))

        return Variant(run, run, (pipe.transformer, pipe.vae, pipe.text_encoder))

    def ours(*, fast: bool) -> Variant:
        pipe = our_pipeline(shape, weights, fast=fast)

        def run() -> Tensor:
            made = pipe.generate(PROMPT, seed=0, sampler="diffusers", first_frame=weights.first_frame, **settings)
            return torch.from_numpy(np.array(made.frames))

        return Variant(run, run, (pipe.dit, pipe.vae, pipe.text_encoder))

    def reference() -> Tensor:
        pipe = our_pipeline(shape, weights, fast=False, dtype=weights.wider)
        made = pipe.generate(PROMPT, seed=0, sampler="diffusers", first_frame=weights.first_frame, **settings)
        return torch.from_numpy(np.array(made.frames))

    what = f"{_size(shape)}, {shape.steps} steps, guidance 6"
    variants = {"diffusers": theirs, "ours, plain": lambda: ours(fast=False), "ours, fast": lambda: ours(fast=True)}
    # Noise is drawn in float32 for every narrower dtype, so those clips have a reference; a GPU could not afford it.
    comparable = weights.wider == torch.float32 and weights.device.type == "cpu"
    return Case("whole clip", what, variants, reference=reference if comparable else None)


def our_pipeline(shape: Shape, weights: Weights, *, fast: bool, dtype: torch.dtype | None = None) -> Any:
    from videogen.pipeline import Pipeline
    from videogen.runtime.memory import PLANS
    from videogen.runtime.offload import Stages
    from videogen.runtime.prepare import prepare

    model, vae, text_encoder = weights.dit(dtype), weights.vae(dtype), weights.text_encoder
    if dtype is not None:
        text_encoder = copy.deepcopy(text_encoder).to(dtype)
    if fast:
        prepare(model, vae, Stages(PLANS["fast"], next(model.parameters()).device))  # as `videogen.load` does
    return Pipeline(card(shape), model, vae, text_encoder)


def their_pipeline(shape: Shape, weights: Weights) -> Any:
    import diffusers

    from videogen.diffusion.samplers import load_scheduler

    kind = "CogVideoXPipeline" if weights.first_frame is None else "CogVideoXImageToVideoPipeline"
    pipe = getattr(diffusers, kind)(
        tokenizer=weights.text_encoder.tokenizer,
        text_encoder=weights.text_encoder.encoder,
        vae=weights.their_vae(),
        transformer=weights.their_dit(),
        scheduler=load_scheduler(card(shape).scheduler),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
