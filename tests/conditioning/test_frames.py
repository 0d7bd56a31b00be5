"""Known frames become channels beside the noisy latents; words become tokens."""

import pytest
import torch

from videogen.conditioning import frames, text
from videogen.models.vae import VAE
from videogen.testing import TINY_VAE, randomize, tiny_pipeline


def latents(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 5, 4, 2, 3, generator=torch.Generator().manual_seed(0))


def test_known_frames_stand_in_their_place_and_zeros_elsewhere():
    x = latents()
    known = torch.tensor([[True, False, False, False, True], [False, False, True, False, False]])
    channels = frames.known_frames(x, known).channels
    assert channels is not None
    for item in range(2):
        for k in range(5):
            assert torch.equal(channels[item, k], x[item, k] if known[item, k] else torch.zeros(4, 2, 3))


def test_absence_is_nothing_known():
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    absent = frames.absent(latents()).channels
    assert absent is not None
    assert torch.equal(absent, frames.known_frames(latents(), nothing).channels)  # type: ignore[arg-type]
    assert not absent.any()


def test_channels_come_behind_the_noise():
    """The layout of the weights: a DiT concatenates what it is told behind what it denoises."""
    told = frames.known_frames(latents(), torch.ones(2, 5, dtype=torch.bool))
    both = told | frames.absent(latents())
    assert both.channels is not None
    assert torch.equal(both.channels[:, :, :4], latents())
    assert both.channels.shape[2] == 8


@pytest.mark.parametrize(("index", "expected"), [(0, 0), (4, 1), (8, 2), (16, 4), (80, 20)])
def test_a_pixel_frame_is_the_last_of_its_latent_frame(index: int, expected: int):
    """Latent frame k > 0 holds pixel frames 4k-3 … 4k."""
    assert frames.slot(index) == expected


def test_other_frames_have_no_slot():
    for index in (1, 2, 3, 5, 7):
        with pytest.raises(ValueError, match=f"frame {index} "):
            frames.slot(index)


@pytest.mark.parametrize("inverted", [False, True])
@torch.no_grad()
def test_images_are_encoded_alone_and_scaled(inverted: bool):
    from dataclasses import replace

    vae = randomize(VAE(replace(TINY_VAE, invert_scale_latents=inverted)).double().eval())
    images = torch.rand(2, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    got = frames.encode_frames(vae, images, [None, None])  # type: ignore[arg-type]
    for image, latent in zip(images, got, strict=True):
        raw = vae.moments(image[None, :, None])[0][0, :, 0]  # type: ignore[operator]
        expected = raw / 0.7 if inverted else raw * 0.7
        torch.testing.assert_close(latent, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_each_image_draws_from_its_own_generator():
    vae = randomize(VAE(TINY_VAE).eval())
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))

    def seeded(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(s) for s in seeds]

    both = frames.encode_frames(vae, images, seeded(5, 6))  # type: ignore[arg-type]
    second = frames.encode_frames(vae, images[1:], seeded(6))  # type: ignore[arg-type]
    torch.testing.assert_close(both[1:], second)
    assert not torch.allclose(both[1:], frames.encode_frames(vae, images[1:], [None]), atol=0.01)  # type: ignore
    shared = seeded(5) * 2  # one for all is drawn from in turn
    in_turn = frames.encode_frames(vae, images[[0, 0]], shared)  # type: ignore[arg-type]
    assert not torch.allclose(in_turn[0], in_turn[1], atol=0.01)


def test_words_and_their_absence():
    encoder = tiny_pipeline().text_encoder
    told = text.prompt(encoder, ["a red circle", "a blue square"]).text
    assert told is not None
    assert told.shape == (2, 8, 16)
    absent = text.absent(encoder, 2).text
    assert absent is not None
    assert torch.equal(absent, encoder(["", ""]))
    assert absent.any()  # the empty prompt has an embedding: it is no zeros
