"""Clips of several sizes in one stream learn what they would learn one by one."""

import dataclasses
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy

from videogen.config import ConditionsConfig, DiTConfig, MaskingConfig
from videogen.diffusion.objective import loss as plain_loss
from videogen.diffusion.schedule import Schedule
from videogen.errors import InvalidRequest
from videogen.models.attention import each_segment, sdpa
from videogen.models.dit import DiT
from videogen.runtime.dit import fast_dit
from videogen.testing import SCHEDULER, TINY_DIT, randomize, tiny_pipeline
from videogen.training.examples import Example
from videogen.training.lesson import Lesson, told_frames
from videogen.training.packing import PACKED, Clips, lesson_packed, packed_loss, predict_packed, set_packed_kernel
from videogen.training.processes import Replicated
from videogen.training.step import Batches, losses_of
from videogen.types import Conditioning

ROTARY = dataclasses.replace(TINY_DIT, use_learned_positional_embeddings=False)  # as 5B
KINDS: dict[str, DiTConfig] = {
    "rotary": ROTARY,
    "sin-cos": dataclasses.replace(ROTARY, use_rotary_positional_embeddings=False),  # as 2B
    "stretched sin-cos": dataclasses.replace(ROTARY, use_rotary_positional_embeddings=False, resize_positions=True),
    "learned": TINY_DIT,  # as 5B-I2V: of one height and width
    "patches in time": dataclasses.replace(ROTARY, patch_size_t=2, ofs_embed_dim=16),  # as 1.5-I2V
}
SCHEDULE = Schedule.from_config(SCHEDULER)
CPU = torch.device("cpu")


def model(config: DiTConfig, dtype: torch.dtype = torch.float32) -> DiT:
    dit = DiT(config)
    randomize(dit)
    return dit.to(dtype)


def parts(config: DiTConfig, dtype: torch.dtype = torch.float32) -> list[Clips]:
    """A clip, two images and a longer clip, each with its own time, and text of its own length where that is free."""
    generator = torch.Generator().manual_seed(1)
    fixed, image = config.use_learned_positional_embeddings, config.patch_size_t or 1
    sizes = [(1, 3, 4, 6), (2, 1, 4, 6), (1, 4, 4, 6)] if fixed else [(1, 2, 4, 6), (2, image, 2, 2), (1, 4, 6, 4)]
    found = []
    for place, (b, f, h, w) in enumerate(sizes):
        length = config.max_text_seq_length - (0 if fixed else place)

        def normal(*shape: int, b: int = b) -> torch.Tensor:
            return torch.randn(b, *shape, generator=generator).to(dtype)

        cond = Conditioning(
            text=normal(length, config.text_embed_dim),
            channels=normal(f, config.in_channels - config.out_channels, h, w),
            vectors={"ofs": torch.full((1,), 2.0, dtype=dtype)} if config.ofs_embed_dim else {},
        )
        t = torch.randint(1000, (b,), generator=generator)
        found.append(Clips(normal(f, config.out_channels, h, w), t, cond))
    return found


def noises(clips: list[Clips]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(part.latents.shape, generator=generator).to(part.latents) for part in clips]


def gradients(dit: DiT, losses: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.cat(losses).mean().backward()
    found = {name: p.grad.clone() for name, p in dit.named_parameters() if p.grad is not None}
    dit.zero_grad()
    return found


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of any weight's gradient, relative to it, or to 1 % of the largest: that of the keys' bias is a rounding around 0
    where positions are not rotary."""
    least = 0.01 * max(float(gradient.norm()) for gradient in expected.values())
    return max(float((found[name] - g).norm()) / max(float(g.norm()), least) for name, g in expected.items())


def one_by_one(dit: DiT, clips: list[Clips]) -> list[torch.Tensor]:
    def one(part: Clips, noise: torch.Tensor, i: int) -> torch.Tensor:
        row = slice(i, i + 1)
        cond = part.cond.replace(text=part.cond.text[row], channels=part.cond.channels[row])
        kind = {"schedule": SCHEDULE, "prediction": "v_prediction"}
        return plain_loss(lambda x, t: dit(x, t, cond), part.latents[row], noise[row], part.t[row], **kind)

    return [
        torch.cat([one(part, noise, i) for i in range(len(noise))])
        for part, noise in zip(clips, noises(clips), strict=True)
    ]


def packed(dit: DiT, clips: list[Clips]) -> list[torch.Tensor]:
    return packed_loss(dit, clips, noises(clips), schedule=SCHEDULE, prediction="v_prediction")


@pytest.mark.parametrize(("kind", "checkpointing"), [*((kind, False) for kind in KINDS), ("rotary", True)])
def test_a_packed_stream_has_the_losses_and_gradients_of_its_clips(kind, checkpointing):
    dit, clips = model(KINDS[kind]), parts(KINDS[kind])
    wanted = one_by_one(dit, clips)
    expected = gradients(dit, wanted)
    dit.gradient_checkpointing = checkpointing
    got = packed(dit, clips)
    for one, other in zip(wanted, got, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    found = gradients(dit, got)
    assert found.keys() == expected.keys() == dict(dit.named_parameters()).keys()
    assert largest_error(found, expected) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_in_double_precision_only_rounding_is_left(kind):
    dit, clips = model(KINDS[kind], torch.float64), parts(KINDS[kind], torch.float64)
    wanted, got = gradients(dit, one_by_one(dit, clips)), gradients(dit, packed(dit, clips))
    assert largest_error(got, wanted) <= 1e-12


@torch.no_grad()
def test_clips_of_one_stream_do_not_see_each_other():
    dit, clips = model(ROTARY), parts(ROTARY)
    before = predict_packed(dit, clips)
    changed = dataclasses.replace(clips[1], latents=clips[1].latents + 1.0, t=clips[1].t // 2)
    after = predict_packed(dit, [clips[0], changed, clips[2]])
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[2], before[2])
    assert not torch.equal(after[1], before[1])


@torch.no_grad()
def test_a_stream_of_one_clip_is_the_clip_and_the_fast_rows_step_aside():
    dit, clips = model(TINY_DIT).eval(), parts(TINY_DIT)[:1]
    plain = dit(clips[0].latents, clips[0].t, clips[0].cond)
    torch.testing.assert_close(predict_packed(dit, clips)[0], plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(predict_packed(fast_dit(dit), clips)[0], plain, rtol=1e-5, atol=1e-5)


def test_what_attends_over_all_clips_is_found_out():
    """The check of the checks: without the borders between clips the numbers differ plainly."""
    dit, clips = model(ROTARY), parts(ROTARY)
    wanted = torch.cat(one_by_one(dit, clips))
    for block in dit.blocks:
        block.attention.packed = lambda kernel, q, k, v, lengths: kernel(q, k, v)
    assert (torch.cat(packed(dit, clips)) - wanted).abs().max() > 1e-3


@torch.no_grad()
def test_a_lesson_about_samples_of_many_shapes_is_the_lesson_of_each():
    pipe = tiny_pipeline()
    lesson = Lesson(pipe.card, lambda words: torch.stack([w for w in words if not isinstance(w, str)]), CPU)
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    config, samples, noise = ConditionsConfig(shares={"first": 0.5, "keyframes": 0.5}), [], []
    for f in (3, 1, 2, 3, 1):
        latents, frames, drawn = (torch.randn(f, 4, 4, 6, generator=generator) for _ in range(3))
        words = torch.randn(8, 16, generator=generator)
        samples.append(told_frames(Example(latents, frames, words, 8.0), config, rng, 1.0))
        noise.append(drawn)
    t = torch.tensor([10.0, 900.0, 500.0, 300.0, 700.0])
    each = [
        lesson(pipe.dit, [one], t[i : i + 1], drawn[None])
        for i, (one, drawn) in enumerate(zip(samples, noise, strict=True))
    ]
    assert any(one.known.any() for one in samples)
    torch.testing.assert_close(lesson_packed(lesson, pipe.dit, samples, t, noise), torch.cat(each))


# ---- kernels --------------------------------------------------------------------------------------------------------

LENGTHS = (5, 1, 12)


def qkv(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, sum(LENGTHS), 16, generator=generator).to(dtype) for _ in range(3)]


def by_a_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    clip = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=clip[:, None] == clip)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["sdpa", "flex"])
def test_kernels_for_packed_clips_agree_with_a_mask(name):
    torch.testing.assert_close(PACKED[name]()(sdpa, *qkv(), LENGTHS), by_a_mask(*qkv()), rtol=1e-5, atol=1e-6)


def test_varlen_is_called_with_what_it_documents(monkeypatch):
    """There is no CPU kernel: a stand-in of the documented signature computes from rows and borders."""
    from torch.nn.attention import varlen

    def stand_in(q, k, v, ends_q, ends_k, max_q, max_k):
        assert ends_q is ends_k
        assert ends_q.dtype == torch.int32
        assert max_q == max_k == max(LENGTHS)
        parts = zip(*(x.tensor_split(ends_q[1:-1].long()) for x in (q, k, v)), strict=True)
        return torch.cat([sdpa(*(x.transpose(0, 1)[None] for x in part))[0].transpose(0, 1) for part in parts])

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    torch.testing.assert_close(PACKED["varlen"]()(sdpa, *qkv(), LENGTHS), by_a_mask(*qkv()), rtol=1e-5, atol=1e-6)


def test_xformers_is_called_with_what_it_documents_or_named_as_missing(monkeypatch):
    dit = model(ROTARY)
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InvalidRequest, match="xformers is not installed"):
        set_packed_kernel(dit, "xformers")
    assert all(block.attention.packed is each_segment for block in dit.blocks)

    class Mask(SimpleNamespace):
        @classmethod
        def from_seqlens(cls, lengths: list[int], *, device: torch.device):
            return cls(lengths=lengths, device=device)

    def stand_in(q, k, v, attn_bias):
        assert attn_bias.lengths == list(LENGTHS)
        assert attn_bias.device == q.device
        return by_a_mask(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    fakes = {name: ModuleType(name) for name in ("xformers", "xformers.ops", "xformers.ops.fmha")}
    fakes["xformers.ops.fmha.attn_bias"] = bias = ModuleType("xformers.ops.fmha.attn_bias")
    bias.BlockDiagonalMask, fakes["xformers.ops"].memory_efficient_attention = Mask, stand_in
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)
    torch.testing.assert_close(PACKED["xformers"]()(sdpa, *qkv(), LENGTHS), by_a_mask(*qkv()), rtol=1e-5, atol=1e-6)


def test_kernels_are_put_in_by_name_and_taken_out():
    dit = model(ROTARY)
    set_packed_kernel(dit, "flex")
    assert all(block.attention.packed is not each_segment for block in dit.blocks)
    set_packed_kernel(dit, "sdpa")
    assert all(block.attention.packed is each_segment for block in dit.blocks)
    with pytest.raises(InvalidRequest, match="no kernel 'flx'"):
        set_packed_kernel(dit, "flx")


# ---- in the loop ----------------------------------------------------------------------------------------------------


def test_a_packed_training_is_the_unpacked_one(tmp_path):
    """Images and clips, on one process: streams of all sizes and tensors of one shape end in the same weights."""
    config = toy.settings(batch_size=6, steps=2)
    plain = toy.train(tmp_path / "plain", config)
    packed_ = toy.train(tmp_path / "packed", dataclasses.replace(config, packed_tokens=60))
    assert toy.losses(tmp_path / "packed") == pytest.approx(toy.losses(tmp_path / "plain"), abs=1e-5)
    torch.testing.assert_close(toy.weights(packed_), toy.weights(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_packed_streams_of_two_processes_learn_what_one_learns(tmp_path):
    """Whole weights on both, and halves (FSDP), where both must make equally many streams."""
    config = toy.settings(batch_size=5, steps=4)
    packed_ = dataclasses.replace(config, packed_tokens=30)
    toy.train(tmp_path / "one", config)

    def both(rank):
        toy.train(tmp_path / "two", packed_)
        toy.train(tmp_path / "halves", packed_, shard=2)

    assert toy.Processes(2, both, tmp_path / "out").wait() == [0, 0]
    for name in ("two", "halves"):
        assert toy.losses(tmp_path / name) == pytest.approx(toy.losses(tmp_path / "one"), abs=1e-5)


def test_masking_and_packing_exclude_each_other():
    config, pipe, clips = dataclasses.replace(toy.settings(), packed_tokens=60), tiny_pipeline(), toy.Clips()
    lesson = Lesson(pipe.card, lambda words: torch.zeros(len(words), *toy.WORDS), CPU)
    batches = Batches(clips, config, pipe.dit.config)
    with pytest.raises(InvalidRequest, match="do not go together"):
        losses_of(config, batches, lambda done: clips, lesson, pipe.dit, Replicated(0, 1), masking=MaskingConfig())
