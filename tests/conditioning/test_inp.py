"""A clip known in part: mask and masked latents behind the noise. Compared with the models' rules in tests/parity."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from videogen.conditioning import control, inp
from videogen.diffusion.objective import loss
from videogen.diffusion.schedule import Schedule
from videogen.models.dit import DiT
from videogen.models.vae import VAE
from videogen.testing import SCHEDULER, TINY_DIT, TINY_VAE, randomize
from videogen.types import Conditioning


@pytest.fixture(scope="module")
def vae() -> VAE:
    return randomize(VAE(replace(TINY_VAE, first_latent_alone=True)).double().eval())  # type: ignore[return-value]


def clip(frames: int = 9, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, frames, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def mask(frames: int = 9, known: tuple[int, ...] = ()) -> Tensor:
    made = torch.ones(1, 1, frames, 16, 24, dtype=torch.float64)
    made[:, :, list(known)] = 0
    return made


@torch.no_grad()
def test_mask_then_latents_each_scaled(vae: VAE):
    told = inp.inpainted(vae, clip(), mask(known=(0,))).channels
    assert told is not None
    assert told.shape == (1, 3, 1 + 4, 2, 3)
    assert (told[:, 0, 0] == vae.config.scaling_factor).all()
    assert not told[:, 1:, 0].any()
    black = clip()
    black[:, :, 1:] = -1
    assert torch.equal(told[:, :, 1:], vae.encode(black).transpose(1, 2))  # the mode: no generator


@torch.no_grad()
def test_unknown_pixels_are_not_seen(vae: VAE):
    """Whatever stands where something is to be made."""
    known = mask(known=(0, 8))
    known[:, :, 4, :8] = 0
    a, b = clip(seed=1), clip(seed=2)
    b = torch.where(known > 0, b, a)
    assert torch.equal(inp.inpainted(vae, a, known).channels, inp.inpainted(vae, b, known).channels)  # type: ignore


@torch.no_grad()
def test_nothing_known_is_the_absence(vae: VAE):
    told = inp.inpainted(vae, clip(), mask()).channels
    absent = inp.absent(torch.ones(1, 3, 4, 2, 3, dtype=torch.float64)).channels
    assert told is not None
    assert absent is not None
    assert torch.equal(told, absent)
    assert not told.any()


def test_the_mask_looks_at_two_frames_of_four():
    """Where a single frame is known, and how much of its latent frame that is."""
    share = {k: inp.known_share(mask(17, known=(k,)), 5, 2, 3)[0, :, 0, 0, 0].tolist() for k in (0, 1, 2, 3, 4, 16)}
    assert share[0] == [1, 0, 0, 0, 0]
    assert share[2] == share[3] == [0, 0.5, 0, 0, 0]
    assert share[1] == share[4] == share[16] == [0, 0, 0, 0, 0]  # a last frame too: it is told by its latent alone


@torch.no_grad()
def test_noise_goes_on_known_pixels_that_are_not_black(vae: VAE):
    seen = []
    encode = vae.encode

    def watched(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return encode(pixels)

    x = clip()
    x[:, :, 0, :8] = -1
    noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    vae.encode = watched  # type: ignore[assignment]
    try:
        inp.inpainted(vae, x, mask(known=(0,)), noise)
    finally:
        del vae.encode
    (pixels,) = seen
    assert (pixels[:, :, 1:] == -1).all()
    assert (pixels[:, :, 0, :8] == -1).all()
    torch.testing.assert_close(pixels[:, :, 0, 8:], x[:, :, 0, 8:] + 0.0563 * noise[:, :, 0, 8:])


def test_pixels_known_by_index():
    image = clip(1)[:, :, 0]
    pixels, unknown = inp.known_pixels({4: image}, (1, 9, 16, 24), image)
    assert torch.equal(pixels[:, :, 4], image)
    assert unknown.mean() == 8 / 9
    assert (pixels[:, :, [0, 1, 8]] == -1).all()


@torch.no_grad()
def test_a_control_clip_is_encoded_as_it_is(vae: VAE):
    both = torch.cat([clip(seed=1), clip(seed=2)])
    told = control.controlled(vae, both).channels
    assert told is not None
    torch.testing.assert_close(told, vae.encode(both).transpose(1, 2))
    absent = control.absent(told).channels
    assert absent is not None
    assert absent.shape == told.shape
    assert not absent.any()


def test_the_same_channels_condition_a_training_step(vae: VAE):
    """Objective and network take what sampling takes; the weights of every channel learn from it."""
    config = replace(TINY_DIT, in_channels=9, use_learned_positional_embeddings=False)
    dit = randomize(DiT(config).double())
    with torch.no_grad():
        larger, unknown = clip().repeat(1, 1, 1, 2, 2), mask(known=(0,)).repeat(1, 1, 1, 2, 2)
        latents = vae.encode(larger).transpose(1, 2)
        told = inp.inpainted(vae, larger, unknown)
    cond = Conditioning(text=torch.randn(1, 8, 16, dtype=torch.float64)) | told
    schedule = Schedule.from_config(SCHEDULER)
    noise, t = torch.randn_like(latents), torch.tensor([500])
    kind = {"schedule": schedule, "prediction": "v_prediction"}
    loss(lambda x, t: dit(x, t, cond), latents, noise, t, **kind).mean().backward()  # type: ignore[operator]
    learned = dit.get_parameter("patch_embed.proj.weight").grad
    assert learned is not None
    assert learned.abs().amax(dim=(0, 2, 3)).gt(0).all()
