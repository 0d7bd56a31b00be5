"""The transformer equals diffusers' on the same random weights, for every variant."""

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from dit_variants import VARIANTS, inputs, ours, relative_error, run_theirs, theirs

from videogen.config import DiTConfig, to_dict
from videogen.models.dit import DiT
from videogen.weights.table import DIT_RULES, to_theirs

NATIVE = (4, 8, 12)
OTHER = [(2, 8, 12), (6, 12, 8), (4, 4, 6), (2, 14, 20), (8, 10, 6)]
ONE_FRAME = (1, 6, 10)


def sizes(name: str) -> list[tuple[int, int, int]]:
    if name == "5B-I2V":  # one height and width; other frame counts fall back to the sin-cos table
        return [NATIVE, (1, 8, 12), (3, 8, 12), (7, 8, 12)]
    return [NATIVE, *OTHER] + ([] if VARIANTS[name].patch_size_t else [ONE_FRAME, (3, 28, 30)])


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_equals_diffusers(name: str, dtype: torch.dtype, bound: float):
    config = VARIANTS[name]
    reference = theirs(config, dtype)
    model = ours(reference, config)
    for size in sizes(name):
        latents, t, cond = inputs(config, size, dtype)
        expected = run_theirs(reference, latents, t, cond)
        got = model(latents, t, cond)
        assert got.shape == expected.shape
        assert relative_error(got, expected) <= bound, size


@torch.no_grad()
def test_float_timesteps_and_ofs_per_sample():
    config = VARIANTS["1.5-I2V"]
    reference = theirs(config, torch.float64)
    latents, _, cond = inputs(config, NATIVE, torch.float64)
    t = torch.tensor([500.25, 3.5], dtype=torch.float64)
    cond = cond.replace(vectors={"ofs": torch.tensor([2.0, 0.5], dtype=torch.float64)})
    expected = run_theirs(reference, latents, t, cond)
    assert relative_error(ours(reference, config)(latents, t, cond), expected) <= 1e-10


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_elementwise_affine": False, "attention_bias": False, "patch_bias": False},
        {"flip_sin_to_cos": False, "freq_shift": 1, "activation_fn": "gelu", "norm_eps": 1e-3},
        {"patch_size": 4, "spatial_interpolation_scale": 1.0, "temporal_interpolation_scale": 2.0},
        {"timestep_activation_fn": "gelu", "out_channels": 8, "in_channels": 8, "attention_head_dim": 16},
    ],
)
@torch.no_grad()
def test_every_other_setting(changes: dict):
    config = DiTConfig(**{**to_dict(VARIANTS["2B"]), **changes})
    reference = theirs(config, torch.float64)
    latents, t, cond = inputs(config, NATIVE, torch.float64)
    assert relative_error(ours(reference, config)(latents, t, cond), run_theirs(reference, latents, t, cond)) <= 1e-10


BIG = {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True}
TEMPORAL = {"patch_size_t": 2, "patch_bias": False, "sample_height": 96, "sample_width": 170, "sample_frames": 81}
LEARNED = {"use_learned_positional_embeddings": True}
PUBLISHED = {  # parameters, tensors in the file
    "2B": (DiTConfig(), 1_693_783_872, 736),
    "5B": (DiTConfig(**BIG), 5_570_283_072, 1024),
    "5B-I2V": (DiTConfig(**BIG, **LEARNED, in_channels=32), 5_570_479_680, 1025),
    "1.5-5B": (DiTConfig(**BIG, **TEMPORAL), 5_570_676_352, 1024),
    "1.5-5B-I2V": (DiTConfig(**BIG, **TEMPORAL, in_channels=32, ofs_embed_dim=512), 5_571_594_880, 1028),
    "Fun-2B-InP": (DiTConfig(in_channels=33), 1_693_914_432, 736),
    "Fun-5B-InP": (DiTConfig(**BIG, in_channels=33), 5_570_491_968, 1024),
    "Fun-1.5-5B-InP": (DiTConfig(**BIG, **TEMPORAL, in_channels=33), 5_571_094_144, 1024),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_has_the_published_tensors(name: str):
    config, parameters, tensors = PUBLISHED[name]
    with torch.device("meta"):
        model, reference = DiT(config), CogVideoXTransformer3DModel(**to_dict(config))
    state = {key: tuple(value.shape) for key, value in to_theirs(model.state_dict(), DIT_RULES).items()}
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(state) == tensors
    assert state == {key: tuple(value.shape) for key, value in reference.state_dict().items()}
