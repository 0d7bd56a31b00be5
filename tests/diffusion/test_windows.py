"""One clip from overlapping windows: they cover it, agree where they overlap, and one window is no window."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from videogen.diffusion.windows import padded_behind, spans, weights, windowed
from videogen.testing import TINY_DIT, tiny_batch, tiny_pipeline
from videogen.types import Conditioning

LENGTHS = [
    (5, 5, None, 1),
    (9, 5, None, 1),
    (10, 5, 1, 1),
    (23, 13, None, 1),
    (7, 2, 1, 1),
    (8, 4, None, 2),
    (3, 2, None, 1),
    (44, 22, None, 2),
]


@pytest.mark.parametrize(("total", "length", "overlap", "multiple"), LENGTHS)
def test_windows_cover_the_clip_and_count_one_together(total: int, length: int, overlap: int | None, multiple: int):
    windows = spans(total, length, overlap, multiple=multiple)
    assert windows[0][0] == 0
    assert windows[-1][1] == total
    assert all(stop - start == length and start % multiple == 0 for start, stop in windows)
    assert all(before[0] < after[0] < before[1] for before, after in pairwise(windows))
    count = torch.zeros(total, dtype=torch.float64)
    for (start, stop), weight in zip(windows, weights(windows), strict=True):
        assert (weight >= 0).all()
        count[start:stop] += weight
    torch.testing.assert_close(count, torch.ones_like(count))


def test_the_first_frame_of_a_later_window_counts_nothing():
    """The network takes it for the first of a clip."""
    first, *later = weights(spans(12, 5))
    assert first[0] == 1
    assert later
    assert all(weight[0] == 0 for weight in later)


def test_windows_that_cannot_be():
    for overlap in (0, 5, 7):
        with pytest.raises(ValueError, match="cannot share"):
            spans(9, 5, overlap)


def told(frames: int, **changes) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    _, t, cond = tiny_batch(replace(TINY_DIT, sample_frames=4 * frames - 3))
    x = torch.randn(2, frames, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    return x, t, cond.replace(**changes)


@torch.no_grad()
def test_a_clip_of_native_length_is_bit_equal_to_the_plain_path():
    dit = tiny_pipeline().dit
    x, t, cond = told(3)
    assert windowed(dit, spans(3, 3)) is dit
    # the averaging itself, of one window, changes no bit either
    share = weights([(0, 3)])[0]
    assert torch.equal(dit(x, t, cond) * share.float()[:, None, None, None], dit(x, t, cond))


@torch.no_grad()
def test_each_window_is_a_clip_of_its_own_with_the_conditions_that_fall_into_it():
    dit = tiny_pipeline().dit
    x, t, cond = told(5)
    assert cond.channels is not None
    seen = []

    def watched(x, t, cond):
        seen.append((x, cond.channels))
        return dit(x, t, cond)

    windows = spans(5, 3, 2)
    whole = windowed(watched, windows)(x, t, cond)
    assert whole.shape == x.shape
    expected = torch.zeros_like(x)
    for (start, stop), share, (part, channels) in zip(windows, weights(windows), seen, strict=True):
        assert torch.equal(part, x[:, start:stop])
        assert torch.equal(channels, cond.channels[:, start:stop])
        expected[:, start:stop] += dit(part, t, cond.replace(channels=channels)) * share.float()[:, None, None, None]
    torch.testing.assert_close(whole, expected)


@torch.no_grad()
def test_windows_that_say_the_same_agree_where_they_overlap():
    """A model that looks at each frame alone: its windows are one clip, to rounding."""
    x, t, cond = told(9)

    def alone(x, t, cond):
        return 2 * x + cond.channels

    torch.testing.assert_close(windowed(alone, spans(9, 4))(x, t, cond), alone(x, t, cond))


@torch.no_grad()
def test_too_few_frames_for_a_patch_are_padded_behind():
    dit = tiny_pipeline(dit=replace(TINY_DIT, use_learned_positional_embeddings=False, patch_size_t=2)).dit
    x, t, cond = told(1)
    zeros = torch.zeros_like(x)
    assert cond.channels is not None
    both = cond.replace(channels=torch.cat([cond.channels, torch.zeros_like(cond.channels)], dim=1))
    expected = dit(torch.cat([x, zeros], dim=1), t, both)[:, :1]
    assert torch.equal(padded_behind(dit, 2)(x, t, cond), expected)


def test_a_pipeline_makes_long_clips_in_windows_and_says_so():
    pipeline = tiny_pipeline(num_frames=9)  # a table of one length: 9 frames at once
    calls = []
    hook = pipeline.dit.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    words = {"num_inference_steps": 2, "seed": 1}
    long = pipeline.generate("a red circle", num_frames=25, **words)
    hook.remove()
    assert long.frames.shape[0] == 25
    assert set(calls) == {3}  # memory is that of one window
    assert long.settings["windows"] == {"frames": 9, "count": 5}
    assert "windows" not in pipeline.generate("a red circle", **words).settings


def test_a_step_cache_is_refused_for_windows():
    from videogen.errors import InvalidRequest

    with pytest.raises(InvalidRequest, match="windows") as caught:
        tiny_pipeline(num_frames=9).generate("a red circle", num_frames=25, step_cache=0.1)
    assert caught.value.param == "step_cache"
