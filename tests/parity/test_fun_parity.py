"""CogVideoX-Fun and the other derivatives on random weights.

Fun-Control is compared with diffusers' pipeline. For InP, NimVideo's 2B and Interpolation diffusers has none: they are
compared with their rules written down once more, step by step, around diffusers' networks and scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import CogVideoXFunControlPipeline
from diffusers.models.upsampling import CogVideoXUpsample3D
from pipeline_pairs import DITS, built, difference, picture, run_ours, their_dit, their_vae, theirs
from torch import Tensor

from videogen.conditioning import inp
from videogen.diffusion.samplers import load_scheduler
from videogen.pipeline import Pipeline
from videogen.testing import TINY_VAE, tiny_pipeline
from videogen.weights.models import FOLLOW, PARTS

WORDS = "a red circle moves right"
HEIGHT, WIDTH, SCALE, SEED, STEPS, GUIDANCE = 32, 48, 0.7, 5, 3, 3.0
BASE = {"prompt": WORDS, "num_inference_steps": STEPS, "seed": SEED, "fit": "stretch"}
FUN_VAE = replace(TINY_VAE, first_latent_alone=True)
FIRST, MIDDLE, LAST = picture(0, WIDTH, HEIGHT), picture(1, WIDTH, HEIGHT), picture(2, WIDTH, HEIGHT)


def derivative(name: str, channels: int, conditions: tuple[str, ...], vae: Any = FUN_VAE, **facts: Any) -> Pipeline:
    """Random weights of this kind with so many input channels."""
    dit = replace(DITS[name], in_channels=channels, resize_positions=name == "2B")
    size = {"height": HEIGHT, "width": WIDTH, "guidance_scale": GUIDANCE}
    settings = {"sampler": "diffusers", "conditions": conditions, **size, **facts}
    return tiny_pipeline(dit=dit, vae=vae, dtype=torch.float64, **settings)


def pixels(image: Any) -> Tensor:
    """[3, H, W] in [-1, 1], in float32 as every image is."""
    return torch.from_numpy(2 * (np.asarray(image).astype(np.float32) / 255) - 1).double().permute(2, 0, 1)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- the rules, step by step ----------------------------------------------------------------------------------------


def sampled(pipeline: Pipeline, channels: Tensor, noise: Tensor, drop: int | None = None) -> Tensor:
    """Latents [1, f, c, h, w] from noise, by diffusers' transformer and scheduler."""
    transformer, scheduler = their_dit(pipeline.dit), load_scheduler(pipeline.card.scheduler)
    scheduler.set_timesteps(STEPS)
    text = torch.cat([pipeline.text_encoder([""]), pipeline.text_encoder([WORDS])]).double()
    _, frames, _, h, w = noise.shape
    rotary = None
    if pipeline.dit.config.use_rotary_positional_embeddings:
        pipe = theirs(pipeline)
        rotary = pipe._prepare_rotary_positional_embeddings(8 * h, 8 * w, frames + frames % 2 * bool(drop), "cpu")
    if pipeline.dit.config.resize_positions:  # the table of 4 x 6 latents, stretched
        stored: Any = transformer.patch_embed.pos_embedding
        table = stored[:, 8:].reshape(1, 3, 2, 3, -1).permute(0, 4, 1, 2, 3)
        table = F.interpolate(table, size=(3, h // 2, w // 2), mode="trilinear", align_corners=False)
        table = table.permute(0, 2, 3, 4, 1).reshape(1, -1, table.shape[1])[:, : frames * h * w // 4]
        stretched = torch.cat([torch.zeros(1, 8, table.shape[2]), table], dim=1)
        transformer.patch_embed._get_positional_embeddings = lambda *args, **kwargs: stretched
    x = noise
    for t in scheduler.timesteps:
        told = torch.cat([x, channels], dim=2)
        if drop:
            told = torch.cat([told, torch.zeros_like(told)], dim=1)
        output = transformer(
            hidden_states=torch.cat([told, told]),
            encoder_hidden_states=text,
            timestep=t.expand(2),
            image_rotary_emb=rotary,
            return_dict=False,
        )[0].float()
        without, with_ = output[:, :-drop].chunk(2) if drop else output.chunk(2)
        x = scheduler.step(without + GUIDANCE * (with_ - without), t, x, return_dict=False)[0].double()
    return x


def encoded(vae: Any, clip: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """[3, F, H, W] -> [1, f, c, h, w], the mode or a sample, times the scale."""
    posterior = vae.encode(clip[None]).latent_dist
    latents = posterior.mode() if generator is None else posterior.sample(generator)
    return latents.permute(0, 2, 1, 3, 4) * SCALE


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Frames [F, 3, H, W] in [0, 1], decoded in chunks of 1, 2, 2, … latent frames; only the first stands alone."""

    def every_frame_twice(self: CogVideoXUpsample3D, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=(2.0 if self.compress_time else 1.0, 2.0, 2.0))
        b, c, t, h, w = x.shape
        x = self.conv(x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w))
        return x.reshape(b, t, *x.shape[1:]).permute(0, 2, 1, 3, 4)

    z = latents.permute(0, 2, 1, 3, 4) / SCALE
    first, cache = vae.decoder(z[:, :, :1])
    frames = [first]
    for module in vae.decoder.modules():
        if isinstance(module, CogVideoXUpsample3D):
            module.forward = MethodType(every_frame_twice, module)
    for start in range(1, z.shape[2], 2):
        chunk, cache = vae.decoder(z[:, :, start : start + 2], conv_cache=cache)
        frames.append(chunk)
    return (torch.cat(frames, dim=2)[0].permute(1, 0, 2, 3) / 2 + 0.5).clamp(0, 1)


def inpaint_channels(vae: Any, video: Tensor, mask: Tensor, noise: Tensor | None = None) -> Tensor:
    """video [3, F, H, W], mask [F, H, W] of 0 and 1 (to be made): the 1 + c channels behind the noise."""
    black = video.clone()
    black[:, mask > 0.5] = -1
    if noise is not None:
        black = torch.where(black == -1, black, black + 0.0563 * noise)
    latents = encoded(vae, black)
    _, f, _, h, w = latents.shape
    if (mask > 0.5).all():
        return torch.zeros(1, f, 1 + latents.shape[2], h, w, dtype=torch.float64)
    known = (1 - mask.double())[None, None]
    small = F.interpolate(known[:, :, :1], size=(1, h, w), mode="trilinear", align_corners=False)
    if f > 1:
        rest = F.interpolate(known[:, :, 1:], size=(f - 1, h, w), mode="trilinear", align_corners=False)
        small = torch.cat([small, rest], dim=2)
    return torch.cat([small[0].permute(1, 0, 2, 3)[None] * SCALE, latents], dim=2)


def frames_known(
    images: dict[int, Any], frames: int, height: int = HEIGHT, width: int = WIDTH
) -> tuple[Tensor, Tensor]:
    video, mask = torch.zeros(3, frames, height, width, dtype=torch.float64), torch.ones(frames, height, width)
    for index, image in images.items():
        video[:, index], mask[index] = pixels(image), 0
    return video, mask


def check(pipeline: Pipeline, request: dict, channels: Tensor, generator: torch.Generator, **options: Any) -> None:
    """Frames and latents are those that the channels make, with noise that the generator draws next."""
    frames, latents = run_ours(pipeline, {**BASE, **request})
    shape = [1, channels.shape[1], 4, *channels.shape[3:]]
    expected = sampled(pipeline, channels, torch.randn(shape, generator=generator, dtype=torch.float64), **options)
    theirs_ = decoded(their_vae(pipeline.vae), expected)
    errors = difference(latents, expected), difference(frames[0], theirs_)
    print(f"latents {errors[0]:.1e}, frames {errors[1]:.1e}")
    assert max(errors) <= 1e-8
    assert ((frames > 0) & (frames < 1)).double().mean() > 0.5


# ---- InP ------------------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[str, int, dict[int, Any], dict[str, Any]]] = {  # model, frames, known, request
    "text": ("5B", 9, {}, {}),
    "first": ("5B", 9, {0: FIRST}, {"first_frame": FIRST}),
    "first and last": ("5B", 9, {0: FIRST, 8: LAST}, {"first_frame": FIRST, "last_frame": LAST}),
    "key frames": ("5B", 17, {4: MIDDLE, 16: LAST}, {"keyframes": {4: MIDDLE, 16: LAST}}),
    "2B": ("2B", 9, {0: FIRST, 8: LAST}, {"first_frame": FIRST, "last_frame": LAST}),
    "1.5": ("1.5", 13, {0: FIRST, 12: LAST}, {"first_frame": FIRST, "last_frame": LAST}),  # 4 latents: 1, 2, 1
    "1.5 short": ("1.5", 5, {0: FIRST}, {"first_frame": FIRST}),
    "1.5, one frame": ("1.5", 1, {0: FIRST}, {"first_frame": FIRST}),
}


@pytest.mark.parametrize("case", CASES)
def test_inpainting_models_follow_their_rules(case: str):
    name, frames, known, request = CASES[case]
    pipeline = fun(name, frames)
    channels = inpaint_channels(their_vae(pipeline.vae), *frames_known(known, frames))
    drop = 1 if case == "1.5, one frame" else None
    check(pipeline, {"num_frames": frames, **request}, channels, torch.Generator().manual_seed(SEED), drop=drop)


def fun(name: str, frames: int = 9) -> Pipeline:
    from videogen.weights.limits import EVEN_LENGTH

    limits = {"frames": EVEN_LENGTH} if name == "1.5" else {}
    return derivative(name, 9, PARTS, num_frames=frames, **limits)


def test_another_size_stretches_the_table_of_2b():
    pipeline = fun("2B")
    first = picture(3, 64, 48)
    channels = inpaint_channels(their_vae(pipeline.vae), *frames_known({0: first}, 9, 48, 64))
    request = {"height": 48, "width": 64, "first_frame": first}
    check(pipeline, request, channels, torch.Generator().manual_seed(SEED))
    stretched = pipeline.generate(**BASE, **request, output="latent")
    pipeline.dit.config = replace(pipeline.dit.config, resize_positions=False)
    assert difference(stretched, pipeline.generate(**BASE, **request, output="latent")) > 1e-3


def test_part_of_a_video_is_made_anew():
    pipeline = fun("5B")
    video = [picture(k, WIDTH, HEIGHT) for k in range(9)]
    mask = np.zeros((9, HEIGHT, WIDTH), np.uint8)
    mask[:, 8:24, 12:30], mask[5] = 255, 255
    clip = torch.stack([pixels(image) for image in video], dim=1)
    channels = inpaint_channels(their_vae(pipeline.vae), clip, torch.from_numpy(mask) / 255.0)
    request = {"video": video, "mask": mask, "strength": 1.0}
    generator = torch.Generator().manual_seed(SEED)
    torch.randn(1, 4, 3, 4, 6, generator=generator, dtype=torch.float64)  # the start: drawn, and of no weight at 1
    check(pipeline, request, channels, generator)
    one = {**request, "mask": mask[0], "seed": 1}
    assert torch.equal(
        pipeline.generate(**{**BASE, **one, "output": "latent"}),
        pipeline.generate(**{**BASE, **one, "mask": np.repeat(mask[:1], 9, 0), "output": "latent"}),
    )


def test_known_pixels_get_noise_where_the_model_was_trained_with_it():
    pipeline = fun("5B")
    video, mask = frames_known({0: FIRST}, 9)
    video[:, 0, :8], first = -1, pixels(FIRST)
    first[:, :8] = -1  # black stays black
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(1, 3, 9, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)[0]
    channels = inpaint_channels(their_vae(pipeline.vae), video, mask, noise)
    image = (first.permute(1, 2, 0).numpy() + 1) / 2

    expected = sampled(pipeline, channels, torch.randn(1, 3, 4, 4, 6, generator=generator, dtype=torch.float64))
    pipeline.dit.config = replace(pipeline.dit.config, add_noise_in_inpaint_model=True)
    latents = pipeline.generate(**BASE, first_frame=image, output="latent")
    assert difference(latents, expected) <= 1e-7  # the image passes through float32
    plain = pipeline.generate(**{**BASE, "seed": SEED + 1}, first_frame=image, output="latent")
    assert difference(latents, plain) > 1e-3


TRAPS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the mask is scaled": lambda patch: patch.setattr(inp, "known_share", unscaled),
    "mask, then latents": lambda patch: patch.setattr(inp.torch, "cat", swapped),
    "1 is known": lambda patch: patch.setattr(inp, "known_share", lambda mask, *size: SHARE(1 - mask, *size)),
}
SHARE, CAT = inp.known_share, torch.cat


def unscaled(mask: Tensor, *size: int) -> Tensor:
    return SHARE(mask, *size) / SCALE


def swapped(parts: Any, dim: int = 0) -> Tensor:
    return CAT(
        parts[::-1] if dim == 2 and len(parts) == 2 and parts[0].shape[2] == 1 < parts[1].shape[2] else parts, dim
    )


@pytest.mark.parametrize("trap", TRAPS)
def test_trap_18_of_the_mask(trap: str, monkeypatch: pytest.MonkeyPatch):
    pipeline = fun("5B")
    channels = inpaint_channels(their_vae(pipeline.vae), *frames_known({0: FIRST}, 9))
    told = pipeline.condition(checked(pipeline), draws())[0].channels
    assert told is not None
    assert difference(told, channels) < 1e-12
    TRAPS[trap](monkeypatch)
    wrong = pipeline.condition(checked(pipeline), draws())[0].channels
    monkeypatch.undo()
    assert wrong is not None
    assert difference(wrong, channels) > 1e-2


def test_trap_18_of_the_chunks():
    """22 latents are 85 frames, not 88, and even an odd number of latents is decoded otherwise."""
    pipeline = fun("5B")
    latents = torch.randn(1, 4, 22, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert pipeline.vae.decode(latents).shape[2] == 85
        alone = pipeline.vae.decode(latents[:, :, :5])
        pipeline.vae.config = TINY_VAE
        assert pipeline.vae.decode(latents).shape[2] == 88
        assert difference(alone, pipeline.vae.decode(latents[:, :, :5])) > 1e-3


def checked(pipeline: Pipeline) -> Any:
    from videogen.request import Request

    return Request(WORDS, first_frame=FIRST, fit="stretch").checked(pipeline.card)


def draws() -> Any:
    from videogen.pipeline import Draws

    return Draws(SEED, 1, torch.float64, torch.device("cpu"))


# ---- the others -----------------------------------------------------------------------------------------------------


def test_interpolation_has_both_ends_on_one_canvas():
    pipeline = derivative("5B-I2V", 8, ("text", "first_frame", "last_frame"))
    vae, generator = their_vae(pipeline.vae), torch.Generator().manual_seed(SEED)
    first, last = (encoded(vae, pixels(image)[:, None], generator) for image in (FIRST, LAST))
    channels = torch.cat([first, torch.zeros_like(first), last], dim=1)
    check(pipeline, {"first_frame": FIRST, "last_frame": LAST}, channels, generator)


def test_the_2b_derivative_is_told_a_still_clip():
    pipeline = derivative("2B", 8, ("first_frame",), layout="image")
    generator = torch.Generator().manual_seed(SEED)
    channels = encoded(their_vae(pipeline.vae), pixels(FIRST)[:, None].repeat(1, 9, 1, 1), generator)
    check(pipeline, {"first_frame": FIRST}, channels, generator)


@pytest.mark.parametrize("name", ["5B", "2B"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_control_equals_diffusers(name: str, dynamic: bool):
    pipeline = derivative(name, 8, FOLLOW, vae=TINY_VAE, layout="control")
    pipeline.dit.config = replace(pipeline.dit.config, resize_positions=False)
    video = [picture(k, WIDTH, HEIGHT) for k in range(9)]
    request = {**BASE, "control_video": video, "use_dynamic_cfg": dynamic}
    frames, latents = run_ours(pipeline, request)

    pipe = built(CogVideoXFunControlPipeline, pipeline)
    settings = {"height": HEIGHT, "width": WIDTH, "guidance_scale": GUIDANCE, "max_sequence_length": 8}
    settings |= {"num_inference_steps": STEPS, "use_dynamic_cfg": dynamic}
    generator = torch.Generator().manual_seed(SEED)
    shown = {"prompt": WORDS, "control_video": video, "generator": generator}
    their_latents = pipe(**shown, **settings, output_type="latent").frames
    their_frames = pipe(**{**shown, "generator": generator.manual_seed(SEED)}, **settings, output_type="pt").frames
    errors = difference(latents, their_latents), difference(frames, their_frames)
    print(f"{name}: latents {errors[0]:.1e}, frames {errors[1]:.1e}")
    assert max(errors) <= 1e-8
