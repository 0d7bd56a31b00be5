"""The causal convolution alone, where causality is exact per frame."""

import pytest
import torch
import torch.nn.functional as F

from videogen.models.causal import CausalConv3d, Memory


def conv(kernel: int = 3, seed: int = 0) -> CausalConv3d:
    torch.manual_seed(seed)
    return CausalConv3d(2, 3, kernel).double()


def clip(frames: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(1, 2, frames, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_no_frame_sees_a_later_one_and_each_sees_the_two_before():
    layer, x = conv(), clip(6)
    before = layer(x, Memory())
    for k in range(6):
        y = x.clone()
        y[:, :, k] += 1
        changed = (layer(y, Memory()) != before).flatten(3).any(-1).any(1)[0]
        # frame 0 also stands in front of the clip, twice
        expected = [k <= t <= k + 2 for t in range(6)]
        assert changed.tolist() == expected


@torch.no_grad()
def test_is_a_convolution_of_the_clip_with_its_first_frame_repeated_in_front():
    layer, x = conv(), clip(4)
    padded = F.pad(torch.cat([x[:, :, :1], x[:, :, :1], x], 2), (1, 1, 1, 1))  # zeros in space
    expected = F.conv3d(padded, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x, Memory()), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("chunks", [[7], [3, 2, 2], [1, 1, 5], [1] * 7])
@torch.no_grad()
def test_chunks_with_memory_equal_the_whole(chunks: list[int]):
    layer, x, memory, parts = conv(), clip(7), Memory(), []
    for part in x.split(chunks, dim=2):
        parts.append(layer(part, memory))
        memory = memory.next_chunk()
    torch.testing.assert_close(torch.cat(parts, 2), layer(x, Memory()), rtol=0, atol=1e-14)


def test_a_chunk_run_twice_gives_the_same():
    """As activation checkpointing does: what the chunk reads is not what it writes."""
    layer, x, memory = conv(), clip(6), Memory()
    layer(x[:, :, :3], memory)
    memory = memory.next_chunk()
    once = layer(x[:, :, 3:], memory)
    assert torch.equal(layer(x[:, :, 3:], memory), once)


def test_memory_keeps_two_frames_not_the_chunk():
    layer, x, memory = conv(), clip(6), Memory()
    layer(x, memory)
    kept = memory.future[layer]
    assert torch.equal(kept, x[:, :, -2:])
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_without_gradients_the_past_is_let_go_as_it_is_read():
    layer, x, memory = conv(), clip(6), Memory()
    layer(x, memory)
    memory = memory.next_chunk()
    with torch.no_grad():
        layer(x, memory)
    assert not memory.past


def test_a_pointwise_kernel_remembers_nothing():
    layer, memory = conv(kernel=1), Memory()
    layer(clip(3), memory)
    assert not memory.future
