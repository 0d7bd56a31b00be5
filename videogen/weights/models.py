"""The published checkpoints, as data: what their config files do not say. Imports no torch.

Their `config.json` files give architecture, not use: native size and rate, sampler and licence are written in the model
cards. A row is recognised by shape, so a renamed folder keeps its facts.
"""

from __future__ import annotations

from dataclasses import dataclass

from videogen.config import DiTConfig

COGVIDEOX_LICENCE = "CogVideoX License"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published model. `shape` is (DiT width, in_channels, patch_size_t, learned position table)."""

    name: str
    shape: tuple[int, int, int | None, bool]
    conditions: tuple[str, ...]
    height: int = 480
    width: int = 720
    num_frames: int = 49
    fps: int = 8
    sampler: str = "dpm"
    licence: str = COGVIDEOX_LICENCE


TEXT = ("text", "video")
FIRST = ("text", "first_frame")

PUBLISHED = (
    Published(
        name="zai-org/CogVideoX-2b",
        shape=(1920, 16, None, False),
        conditions=TEXT,
        sampler="ddim",
        licence="Apache-2.0",
    ),
    Published(name="zai-org/CogVideoX-5b", shape=(3072, 16, None, False), conditions=TEXT),
    Published(name="zai-org/CogVideoX-5b-I2V", shape=(3072, 32, None, True), conditions=FIRST),
    Published(
        name="zai-org/CogVideoX1.5-5B",
        shape=(3072, 16, 2, False),
        conditions=TEXT,
        height=768,
        width=1360,
        num_frames=81,
        fps=16,
    ),
    Published(
        name="zai-org/CogVideoX1.5-5B-I2V",
        shape=(3072, 32, 2, False),
        conditions=FIRST,
        height=768,
        width=1360,
        num_frames=81,
        fps=16,
    ),
    # Known by shape, but their layouts (a mask and frames, a control video, one image on all frames) are not written
    # here yet: with zeros for these channels they make clips from text.
    Published(
        name="alibaba-pai/CogVideoX-Fun-V1.1-2b-InP",
        shape=(1920, 33, None, False),
        conditions=("text",),
        sampler="ddim",
        licence="Apache-2.0",
    ),
    Published(name="alibaba-pai/CogVideoX-Fun-V1.1-5b-InP", shape=(3072, 33, None, False), conditions=("text",)),
    Published(
        name="alibaba-pai/CogVideoX-Fun-V1.5-5b-InP", shape=(3072, 33, 2, False), conditions=("text",), num_frames=81
    ),
    Published(name="alibaba-pai/CogVideoX-Fun-V1.1-5b-Control", shape=(3072, 32, None, False), conditions=("text",)),
    Published(
        name="NimVideo/cogvideox-2b-img2vid",
        shape=(1920, 32, None, False),
        conditions=("text",),
        sampler="ddim",
        licence="Apache-2.0",
    ),
)


def published(dit: DiTConfig) -> Published | None:
    """The row with this shape, if there is one."""
    shape = (dit.width, dit.in_channels, dit.patch_size_t, dit.use_learned_positional_embeddings)
    return next((row for row in PUBLISHED if row.shape == shape), None)


def conditions_of(dit: DiTConfig, latent_channels: int) -> tuple[str, ...]:
    """What the input channels of an unknown model leave room for: noise alone, or noise and a frame."""
    return {latent_channels: TEXT, 2 * latent_channels: FIRST}.get(dit.in_channels, ("text",))


def models_with(condition: str) -> list[str]:
    """The models that take this condition, the bundled one first: for hints."""
    return ["tiny", *(row.name for row in PUBLISHED if condition in row.conditions)]
