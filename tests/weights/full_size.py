"""Every published transformer at full size: settings, tensors, shape of the patch embedding, parameters, name.

The numbers are those of the model cards and of diffusers' classes; nothing here holds memory (meta device).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from videogen.config import DiTConfig
from videogen.models.dit import DiT
from videogen.weights.load import shapes_of

BIG = {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True}
NEW = BIG | {"patch_size_t": 2, "sample_height": 96, "sample_width": 170, "sample_frames": 81, "patch_bias": False}
LEARNED = {"in_channels": 32, "use_learned_positional_embeddings": True}


class Full(NamedTuple):
    """`published`: the name of the row that its shape is recognised as."""

    changes: dict
    tensors: int
    patch: tuple[int, ...]
    parameters: int
    published: str


FULL = {
    "2b": Full({}, 736, (1920, 16, 2, 2), 1_693_783_872, "zai-org/CogVideoX-2b"),
    "5b": Full(BIG, 1024, (3072, 16, 2, 2), 5_570_283_072, "zai-org/CogVideoX-5b"),
    "5b-i2v": Full(BIG | LEARNED, 1025, (3072, 32, 2, 2), 5_570_479_680, "zai-org/CogVideoX-5b-I2V"),
    "1.5": Full(NEW, 1024, (3072, 128), 5_570_676_352, "zai-org/CogVideoX1.5-5B"),
    "1.5-i2v": Full(
        NEW | {"in_channels": 32, "ofs_embed_dim": 512}, 1028, (3072, 256), 5_571_594_880, "zai-org/CogVideoX1.5-5B-I2V"
    ),
    "fun-2b-inp": Full(
        {"in_channels": 33}, 736, (1920, 33, 2, 2), 1_693_914_432, "alibaba-pai/CogVideoX-Fun-V1.1-2b-InP"
    ),
    "fun-5b-inp": Full(
        BIG | {"in_channels": 33}, 1024, (3072, 33, 2, 2), 5_570_491_968, "alibaba-pai/CogVideoX-Fun-V1.1-5b-InP"
    ),
    "fun-1.5-inp": Full(
        NEW | {"in_channels": 33}, 1024, (3072, 264), 5_571_094_144, "alibaba-pai/CogVideoX-Fun-V1.5-5b-InP"
    ),
    "fun-5b-control": Full(  # and Pose
        BIG | {"in_channels": 32}, 1024, (3072, 32, 2, 2), 5_570_479_680, "alibaba-pai/CogVideoX-Fun-V1.1-5b-Control"
    ),
    "interpolation": Full(BIG | LEARNED, 1025, (3072, 32, 2, 2), 5_570_479_680, "zai-org/CogVideoX-5b-I2V"),
    "2b-i2v": Full({"in_channels": 32}, 736, (1920, 32, 2, 2), 1_693_906_752, "NimVideo/cogvideox-2b-img2vid"),
}


def full_shapes(name: str) -> tuple[DiTConfig, dict[str, tuple[int, ...]]]:
    config = DiTConfig(**FULL[name].changes)
    with torch.device("meta"):
        return config, shapes_of(DiT(config))
