"""Mistakes that run without an error and give other numbers. Each test shows the right way equal, the wrong one not."""

import math

import pytest
import torch
from dit_variants import VARIANTS, inputs, ours, pipeline_rotary, relative_error, run_theirs, theirs
from einops import rearrange

from videogen.config import DiTConfig, to_dict
from videogen.models import dit as dit_module
from videogen.models.dit import DiT, init_weights
from videogen.models.positions import rotary_positions, rotary_table, sincos_table
from videogen.weights.table import DIT_RULES, to_ours, to_theirs

NATIVE = (4, 8, 12)
SAME, DIFFERENT = 1e-10, 1e-7  # float64: equal but for rounding; measurably something else


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def pair(name: str, size=NATIVE):
    """Our model, diffusers' output and the inputs that made it."""
    config = VARIANTS[name]
    reference = theirs(config, torch.float64)
    given = inputs(config, size, torch.float64)
    return ours(reference, config), run_theirs(reference, *given), given


def full_rotary(config: DiTConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Our half table in diffusers' layout: each value twice."""
    cos, sin = rotary_table(positions, config.attention_head_dim)
    return cos.repeat_interleave(2, dim=1), sin.repeat_interleave(2, dim=1)


def test_trap_01_norm_eps_differs_between_blocks_and_heads():
    model, expected, given = pair("5B")
    assert model.blocks[0].norm1.norm.eps == 1e-5
    assert model.blocks[0].attention.norm_q.eps == model.blocks[0].attention.norm_k.eps == 1e-6
    assert relative_error(model(*given), expected) <= SAME
    for names, wrong in (
        (["norm1.norm", "norm2.norm"], 1e-6),
        (["attention.norm_q", "attention.norm_k"], 1e-5),
    ):
        model, *_ = pair("5B")
        for block in model.blocks:
            for name in names:
                block.get_submodule(name).eps = wrong
        assert relative_error(model(*given), expected) > DIFFERENT, names


def test_trap_06_sincos_table_is_time_then_x_then_y_divided_by_the_scale():
    config = VARIANTS["2B"]
    reference = theirs(config, torch.float64).patch_embed._get_positional_embeddings(8, 12, 13)
    expected = reference[0, config.max_text_seq_length :]
    assert not reference[0, : config.max_text_seq_length].any()  # text has no position
    table = sincos_table(config, *NATIVE)
    assert torch.equal(table, expected)

    t, x, y = table.split([16, 24, 24], dim=1)
    unscaled = sincos_table(DiTConfig(**{**to_dict(config), "spatial_interpolation_scale": 1.0}), *NATIVE)
    for wrong in (torch.cat([t, y, x], 1), torch.cat([x, y, t], 1), unscaled):
        assert (wrong - expected).abs().max() > 0.1


def test_trap_06_sincos_table_is_recomputed_at_another_size():
    config = VARIANTS["2B"]
    expected = theirs(config, torch.float64).patch_embed._get_positional_embeddings(14, 20, 5)
    assert torch.equal(sincos_table(config, 2, 14, 20), expected[0, config.max_text_seq_length :])
    native = sincos_table(config, *NATIVE)
    interpolated = torch.nn.functional.interpolate(  # what VideoX-Fun does instead
        rearrange(native, "(t y x) d -> 1 d t y x", t=4, y=4), size=(2, 7, 10), mode="trilinear"
    )
    wrong = rearrange(interpolated, "1 d t y x -> (t y x) d")
    assert (wrong - expected[0, config.max_text_seq_length :]).abs().max() > 0.1


def published(**changes) -> DiTConfig:
    return DiTConfig(num_layers=1, num_attention_heads=1, use_rotary_positional_embeddings=True, **changes)


@pytest.mark.parametrize(
    "size",
    [
        (13, 60, 90),
        (3, 60, 60),
        (3, 90, 60),
        (2, 96, 170),
        (1, 48, 84),
        (2, 60, 56),
        (2, 58, 90),
        (2, 2, 2),
        (1, 200, 2),
    ],
)
def test_trap_07_rotary_equals_the_pipeline(size):
    config = published()
    cos, sin = full_rotary(config, rotary_positions(config, *size))
    expected_cos, expected_sin = pipeline_rotary(config, size)
    assert torch.equal(cos, expected_cos)
    assert torch.equal(sin, expected_sin)


@pytest.mark.parametrize("sample", [(300, 300), (96, 170)])
@pytest.mark.parametrize("size", [(22, 96, 170), (2, 96, 96), (4, 10, 12)])
def test_trap_07_rotary_of_15_equals_the_pipeline(size, sample):
    config = published(patch_size_t=2, sample_height=sample[0], sample_width=sample[1], sample_frames=81)
    cos, sin = full_rotary(config, rotary_positions(config, *size))
    expected_cos, expected_sin = pipeline_rotary(config, size)
    assert torch.equal(cos, expected_cos)
    assert torch.equal(sin, expected_sin)


def test_trap_07_wrong_rotary_tables_differ():
    config = published()
    size = (3, 90, 60)
    expected, _ = pipeline_rotary(config, size)
    positions = rotary_positions(config, *size)

    swapped, _ = full_rotary(config, positions[:, [1, 0, 2]])  # (y, t, x)
    halves = rotary_table(positions, 64)[0].repeat(1, 2)  # rotate halves instead of neighbours
    even = positions.clone()  # an even crop: the linspace that ends one step before the stop
    even[:, 1] = torch.linspace(0, 30 * 44 / 45, 45).repeat_interleave(30).repeat(3)
    even[:, 2] = (12 + torch.arange(30) * 20 / 30).repeat(3 * 45)
    integers = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in (3, 45, 30)), indexing="ij"), -1)
    for wrong in (swapped, halves, full_rotary(config, even)[0], full_rotary(config, integers.reshape(-1, 3))[0]):
        assert (wrong - expected).abs().max() > 0.1


def test_trap_07_halves_round_to_the_even_neighbour():
    config = published()  # 28 of 45 columns: the crop starts at 8.5, which is 8 here and 9 in school
    positions = rotary_positions(config, 1, 60, 56)
    assert math.floor((45 - 28) / 2 + 0.5) == 9
    assert positions[:, 2].min() == 8
    expected, _ = pipeline_rotary(config, (1, 60, 56))
    wrong = positions + torch.tensor([0.0, 0.0, 1.0])
    assert (full_rotary(config, wrong)[0] - expected).abs().max() > 0.1


def test_trap_07_only_video_turns():
    """Turning text tokens too (as if they sat before the video) gives other numbers."""
    model, expected, given = pair("5B")
    assert relative_error(model(*given), expected) <= SAME
    for block in model.blocks:
        right = block.ops.norm_rotate

        def wrong(x, weight, bias, eps, rotary, text_length, right=right):
            all_turned = torch.cat([rotary[:, :text_length], rotary], dim=1)
            return right(x, weight, bias, eps, all_turned, 0)

        block.ops = dit_module.Ops(norm_rotate=wrong)
    assert relative_error(model(*given), expected) > 1e-3


@pytest.mark.parametrize("order", ["(t h w c)", "(c h w t)", "(t c h w)"])
def test_trap_08_patch_vectors_are_channel_time_row_column(order: str):
    model, expected, given = pair("1.5")
    assert relative_error(model(*given), expected) <= SAME
    weight = model.patch_embed.proj.weight
    cube = {"t": 2, "h": 2, "w": 2}
    weight.copy_(rearrange(weight.clone(), f"d {order} -> d (c t h w)", **cube))
    assert relative_error(model(*given), expected) > 1e-3

    model, *_ = pair("1.5")  # and the same on the way out
    weight = model.proj_out.weight
    weight.copy_(rearrange(weight.clone(), f"{order} d -> (c t h w) d", **cube))
    assert relative_error(model(*given), expected) > 1e-3


def test_trap_08_temporal_patches_have_a_bias_whatever_the_config_says():
    model, expected, given = pair("1.5")
    assert model.config.patch_bias is False
    assert model.patch_embed.proj.bias is not None
    model.patch_embed.proj.bias.zero_()
    assert relative_error(model(*given), expected) > 1e-3


@pytest.mark.parametrize("name", ["2B", "1.5"])
def test_trap_08_final_modulation_is_shift_then_scale(name: str):
    model, expected, given = pair(name)
    for value in (model.norm_out.linear.weight, model.norm_out.linear.bias):
        shift, scale = value.clone().chunk(2)
        value.copy_(torch.cat([scale, shift]))
    assert relative_error(model(*given), expected) > 1e-3


def test_trap_11_another_frame_count_replaces_the_learned_table_by_sincos():
    model, expected, given = pair("5B-I2V", size=(3, 8, 12))
    assert relative_error(model(*given), expected) <= SAME

    table = model.position_table
    text, per_frame = model.config.max_text_seq_length, 4 * 6

    def truncated(x, f, h, w, text_length):  # what the original (SAT) code does
        return x + table[:, : text + f * per_frame]

    model._add_absolute = truncated
    assert relative_error(model(*given), expected) > 1e-3


def test_trap_11_at_its_own_frame_count_the_learned_table_counts():
    model, expected, given = pair("5B-I2V")
    assert relative_error(model(*given), expected) <= SAME
    model.position_table.zero_()
    assert relative_error(model(*given), expected) > 1e-3


def test_trap_21_the_position_table_is_in_the_file_of_5b_i2v_only():
    """5B-I2V and Fun-Control share every shape but this tensor: neither opens as the other by accident."""
    i2v, control = VARIANTS["5B-I2V"], VARIANTS["Fun-Control"]
    i2v_state = theirs(i2v, torch.float32).state_dict()
    control_state = theirs(control, torch.float32).state_dict()
    assert set(i2v_state) - set(control_state) == {"patch_embed.pos_embedding"}
    assert {key: v.shape for key, v in control_state.items()} == {key: i2v_state[key].shape for key in control_state}

    with pytest.raises(RuntimeError, match="position_table"):
        DiT(control).load_state_dict(to_ours(i2v_state, DIT_RULES))
    with pytest.raises(RuntimeError, match="position_table"):
        DiT(i2v).load_state_dict(to_ours(control_state, DIT_RULES))
    assert "position_table" not in dict(init_weights(DiT(i2v)).named_parameters())  # a buffer, as in the file
    assert set(to_theirs(DiT(i2v).state_dict(), DIT_RULES)) == set(i2v_state)
    assert set(to_theirs(DiT(VARIANTS["2B"]).state_dict(), DIT_RULES)) == set(control_state)  # 2B's table is not stored
