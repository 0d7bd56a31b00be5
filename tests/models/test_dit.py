"""The transformer by itself: what it promises at birth, through its seams and about its inputs."""

import dataclasses

import pytest
import torch
from torch import nn

from videogen.config import DiTConfig
from videogen.errors import InvalidRequest
from videogen.models import attention
from videogen.models.dit import DiT, init_weights
from videogen.types import Conditioning

SMALL = DiTConfig(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=8,
    out_channels=4,
    time_embed_dim=16,
    text_embed_dim=12,
    max_text_seq_length=5,
    sample_height=4,
    sample_width=6,
    sample_frames=9,
)
KINDS = {
    "2B": {},
    "5B": {"use_rotary_positional_embeddings": True},
    "5B-I2V": {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True},
    "1.5-I2V": {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "ofs_embed_dim": 16},
}


def make(kind: str = "5B", **changes) -> DiT:
    """A model whose weights are all random, so that nothing is hidden by a zero gate."""
    torch.manual_seed(0)
    model = DiT(dataclasses.replace(SMALL, **KINDS[kind], **changes))
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name and p.ndim == 1 and name.endswith("weight")), std=0.3)
    return model


def inputs(model: DiT, f: int = 4, h: int = 4, w: int = 6, b: int = 2):
    g = torch.Generator().manual_seed(1)
    config = model.config
    cond = Conditioning(
        text=torch.randn(b, config.max_text_seq_length, config.text_embed_dim, generator=g),
        channels=torch.randn(b, f, config.in_channels - config.out_channels, h, w, generator=g),
        vectors={"ofs": torch.tensor([2.0])} if config.ofs_embed_dim else {},
    )
    return torch.randn(b, f, config.out_channels, h, w, generator=g), torch.tensor([999, 3])[:b], cond


# ---- birth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_weights_predict_zero_and_keep_tokens(kind: str):
    model = init_weights(make(kind))
    latents, t, cond = inputs(model)
    assert not model(latents, t, cond).any()
    tokens = model.embed(latents, t, cond)
    assert torch.equal(model.run_blocks(tokens).x, tokens.x)  # closed gates: the blocks are the identity


def test_fresh_weights_learn():
    """Gates open after a step or two, and then gradients reach every weight."""
    model = init_weights(make("5B"))
    latents, t, cond = inputs(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        loss = (model(latents, t, cond) - latents).pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_init_weights_leaves_nothing_behind():
    model = init_weights(make("1.5-I2V"))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.ndim == 1:
            assert bool((p == 1).all()), name
        elif "norm" not in name and name != "proj_out.weight":
            bound = (6 / (p.shape[0] + p[0].numel())) ** 0.5  # Xavier, uniform
            assert 0.8 * bound < p.abs().max() <= bound, name


def test_init_weights_repeats_with_the_seed():
    def fresh() -> dict:
        torch.manual_seed(7)
        return init_weights(DiT(SMALL)).state_dict()

    first, second = fresh(), fresh()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_learned_table_starts_as_sincos_and_is_not_trained():
    with_table, without = init_weights(make("5B-I2V")), init_weights(make("2B"))
    assert "position_table" not in dict(with_table.named_parameters())
    tokens = torch.zeros(1, 5 + 3 * 2 * 3, 32)
    assert torch.equal(with_table._add_absolute(tokens, 3, 4, 6, 5), without._add_absolute(tokens, 3, 4, 6, 5))
    assert with_table._add_absolute(tokens, 3, 4, 6, 5).any()


# ---- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_samples_of_a_batch_do_not_touch_each_other(kind: str):
    model = make(kind).double()
    latents, t, cond = inputs(model)
    both = model(latents.double(), t, to_double(cond))
    for i in range(2):
        one = cond.replace(text=cond.text[i : i + 1], channels=cond.channels[i : i + 1])
        assert torch.allclose(model(latents[i : i + 1].double(), t[i : i + 1], to_double(one))[0], both[i], atol=1e-6)


def to_double(cond: Conditioning) -> Conditioning:
    return cond.replace(text=cond.text.double(), channels=cond.channels.double())


@torch.no_grad()
def test_every_input_matters():
    model = make("1.5-I2V")
    latents, t, cond = inputs(model)
    base = model(latents, t, cond)
    changed = {
        "latents": (latents + 0.1, t, cond),
        "t": (latents, t - 1, cond),
        "text": (latents, t, cond.replace(text=cond.text + 0.1)),
        "channels": (latents, t, cond.replace(channels=cond.channels + 0.1)),
        "ofs": (latents, t, cond.replace(vectors={"ofs": torch.tensor([1.0])})),
    }
    for name, given in changed.items():
        assert not torch.allclose(model(*given), base, atol=1e-5), name


@torch.no_grad()
def test_condition_channels_follow_the_latents():
    model = make("5B")
    latents, t, cond = inputs(model)
    joined = torch.cat([latents, cond.channels], dim=2)
    same = model(joined[:, :, :4], t, cond.replace(channels=joined[:, :, 4:]))
    assert torch.equal(model(latents, t, cond), same)
    weight = model.patch_embed.proj.weight
    weight[:, 4:] = 0  # the last channels are the conditions': without their weights they are not seen
    assert torch.equal(model(latents, t, cond), model(latents, t, cond.replace(channels=cond.channels + 1)))


@torch.no_grad()
def test_text_has_no_position():
    """Text tokens are a set to a model with rotary positions only: their order does not matter."""
    model = make("5B").double()
    latents, t, cond = inputs(model)
    cond = to_double(cond)
    shuffled = cond.replace(text=cond.text[:, [3, 1, 4, 0, 2]])
    assert torch.allclose(model(latents.double(), t, shuffled), model(latents.double(), t, cond), atol=1e-6)


@torch.no_grad()
def test_video_tokens_have_positions():
    """Shuffling frames does not merely shuffle the output."""
    for kind in ("2B", "5B"):
        model = make(kind)
        latents, t, cond = inputs(model)
        order = [2, 0, 3, 1]
        moved = model(latents[:, order], t, cond.replace(channels=cond.channels[:, order]))
        assert not torch.allclose(moved, model(latents, t, cond)[:, order], atol=1e-3), kind


# ---- seams ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_kernel_slot():
    model = make()
    given = inputs(model)
    expected = model(*given)

    def by_hand(q, k, v):
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v

    for block in model.blocks:
        block.attention.kernel = by_hand
    assert torch.allclose(model(*given), expected, atol=1e-5)
    for block in model.blocks:
        block.attention.kernel = lambda q, k, v: torch.zeros_like(q)
    assert not torch.allclose(model(*given), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["norm_modulate", "gate_add", "norm_rotate"])
@torch.no_grad()
def test_ops_are_replaceable(name: str):
    model = make()
    given = inputs(model)
    expected = model(*given)
    calls = []

    def counted(*args):
        calls.append(name)
        return getattr(attention, name)(*args)

    for block in model.blocks:
        block.ops = dataclasses.replace(block.ops, **{name: counted})
    assert torch.equal(model(*given), expected)
    assert len(calls) == 2 * len(model.blocks)


@torch.no_grad()
def test_block_loop_is_replaceable():
    model = make()
    latents, t, cond = inputs(model)
    expected = model(latents, t, cond)
    tokens = model.embed(latents, t, cond)
    assert tokens.x.shape == (2, 5 + 4 * 2 * 3, 32)
    assert tokens.position.shape == (5 + 4 * 2 * 3, 3)
    assert torch.equal(model.unembed(model.run_blocks(tokens), latents), expected)
    model.run_blocks = lambda tokens: tokens
    assert not torch.allclose(model(latents, t, cond), expected)


def test_a_token_carries_its_position():
    """Reordering video tokens together with their positions reorders the result: shards need no global index."""
    model = make().double()
    latents, t, cond = inputs(model)
    tokens = model.embed(latents.double(), t, to_double(cond))
    order = torch.cat([torch.arange(5), 5 + torch.randperm(24, generator=torch.Generator().manual_seed(0))])
    shuffled = dataclasses.replace(tokens, x=tokens.x[:, order], position=tokens.position[order])
    assert torch.allclose(model.run_blocks(shuffled).x, model.run_blocks(tokens).x[:, order], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients(kind: str):
    model = make(kind)
    given = inputs(model)
    calls = []
    for block in model.blocks:
        block.attention.kernel = lambda q, k, v: (calls.append(1), attention.sdpa(q, k, v))[1]
    grads, counts = [], []
    for model.gradient_checkpointing in (False, True):
        calls.clear()
        model.zero_grad()
        model(*given).pow(2).mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
        counts.append(len(calls))
    assert counts == [2, 4]  # every block runs again in the backward pass
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    with torch.no_grad():
        calls.clear()
        model(*given)
    assert len(calls) == 2  # and not when no gradient is asked for


def test_dropout_is_for_training_only():
    model = make(dropout=0.5)
    given = inputs(model)
    assert not torch.equal(model(*given), model(*given))
    model.eval()
    assert torch.equal(model(*given), model(*given))
    tokens = model.train().embed(*given)
    assert 0.3 < (tokens.x == 0).float().mean() < 0.7
    calls = []  # in the MLP before and after the last map, as diffusers' feed-forward
    model.blocks[0].mlp.dropout.register_forward_hook(lambda *_: calls.append(1))
    hidden = model.blocks[0].mlp(torch.ones(1, 50, 32))
    assert len(calls) == 2
    assert 0.3 < (hidden == 0).float().mean() < 0.7


def test_half_precision_stays_half():
    model = make("1.5-I2V").bfloat16()
    latents, t, cond = inputs(model)
    cond = cond.replace(text=cond.text.bfloat16())
    out = model(latents.bfloat16(), t, cond)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


# ---- inputs that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "size", "change", "param"),
    [
        ("5B", {}, {"text": None}, "prompt"),
        ("5B", {}, {"channels": None}, "channels"),
        ("5B", {}, {"tokens": torch.zeros(2, 1, 32)}, "tokens"),
        ("5B", {}, {"vectors": {"ofs": torch.ones(1)}}, "vectors"),
        ("1.5-I2V", {}, {"vectors": {}}, "vectors"),
        ("1.5-I2V", {"f": 3}, {}, "latents"),
        ("2B", {"w": 5}, {}, "latents"),
        ("5B-I2V", {"h": 8}, {}, "height"),
        ("5B-I2V", {"w": 8}, {}, "width"),
        ("5B-I2V", {}, {"text": torch.zeros(2, 6, 12)}, "prompt_embeds"),
    ],
)
def test_inputs_that_do_not_fit_are_named(kind: str, size: dict, change: dict, param: str):
    model = make(kind)
    latents, t, cond = inputs(model, **size)
    with pytest.raises(InvalidRequest) as error:
        model(latents, t, cond.replace(**change))
    assert error.value.param == param


@pytest.mark.parametrize(
    "changes",
    [
        {"use_learned_positional_embeddings": True},
        {**KINDS["5B-I2V"], "patch_size_t": 2},
        {"activation_fn": "geglu"},
        {"timestep_activation_fn": "tanh"},
    ],
)
def test_settings_of_no_checkpoint_are_refused(changes: dict):
    with pytest.raises(InvalidRequest):
        DiT(dataclasses.replace(SMALL, **changes))
