"""The published checkpoints, as data: what their config files do not say. Imports no torch.

Their `config.json` files give architecture, not use: sizes, lengths, rate, precision, sampler and licence are written
in the model cards. A row is recognised by its name, else by shape, so a renamed folder keeps its facts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from videogen.config import DiTConfig
from videogen.weights.limits import Frames, Sizes

COGVIDEOX_LICENCE = "CogVideoX License"
NATIVE_SIZE = Sizes(short=(480, 480), long=(720, 720), portrait=False)
NATIVE_LENGTH = Frames(8, 49)
CONDITIONS = ("text", "first_frame", "last_frame", "keyframes", "video", "control_video", "mask")
LAYOUTS = ("text", "frames", "inp", "control", "pose", "image")  # as `Published` tells of them


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published model, a row of docs/requests.md.

    `shape` is (DiT width, in_channels, patch_size_t, learned position table); `layout` what the input channels behind
    the noise hold:

        text     nothing
        frames   latents of the known frames, zeros where none is known (16)
        inp      a mask (1) and the latents of a masked clip (16)
        control  the latents of a control clip (16); `pose` is the same, made of poses
        image    the latents of a clip in which one image stands still (16)
    """

    name: str
    shape: tuple[int, int, int | None, bool]
    conditions: tuple[str, ...]
    layout: str = "text"
    height: int = 480
    width: int = 720
    num_frames: int = 49
    fps: int = 8
    sizes: Sizes = NATIVE_SIZE
    frames: Frames = NATIVE_LENGTH
    dtypes: tuple[str, ...] = ("bfloat16",)  # what the weights were trained in
    text_lengths: tuple[int, ...] = (226,)  # tokens of the prompt, the usual number first
    sampler: str = "dpm"
    licence: str = COGVIDEOX_LICENCE
    fun: bool = False  # as CogVideoX-Fun uses its weights: `DiTConfig.resize_positions`, `VAEConfig.first_latent_alone`

    @property
    def facts(self) -> dict:
        """The columns a `Card` holds as well."""
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("name", "shape")}
        return facts | {"rates": (self.fps,)}


TEXT = ("text", "video")
FIRST = ("text", "first_frame", "video")
ENDS = ("text", "first_frame", "last_frame", "video")
PARTS = ("text", "first_frame", "last_frame", "keyframes", "video", "mask")
FOLLOW = ("control_video", "video")  # never trained without a clip to follow
# Of the 1.5 models any orientation: the short side is 768, and positions are known up to 1360 (CogVideo's README).
V15 = {
    "height": 768,
    "width": 1360,
    "num_frames": 81,
    "fps": 16,
    "sizes": Sizes(short=(768, 768), long=(768, 1360)),
    "frames": Frames(16, 161),
    "text_lengths": (226, 224),
}
V2B = {"dtypes": ("float16",), "sampler": "ddim", "licence": "Apache-2.0"}
FUN = {"sizes": Sizes(side=(512, 1280)), "fun": True}  # buckets of equal area, of any aspect
INP = {**FUN, "layout": "inp", "conditions": PARTS}
CONTROL = {**FUN, "layout": "control", "conditions": FOLLOW}
POSE = {**FUN, "layout": "pose", "conditions": FOLLOW}

PUBLISHED = (
    Published(name="zai-org/CogVideoX-2b", shape=(1920, 16, None, False), conditions=TEXT, **V2B),
    Published(name="zai-org/CogVideoX-5b", shape=(3072, 16, None, False), conditions=TEXT),
    Published(name="zai-org/CogVideoX-5b-I2V", shape=(3072, 32, None, True), conditions=FIRST, layout="frames"),
    Published(name="zai-org/CogVideoX1.5-5B", shape=(3072, 16, 2, False), conditions=TEXT, **V15),
    Published(name="zai-org/CogVideoX1.5-5B-I2V", shape=(3072, 32, 2, False), conditions=FIRST, layout="frames", **V15),
    # The same shape and configs as 5B-I2V: known by its name alone, or by `conditions` in a `videogen.json`.
    Published(
        name="feizhengcong/CogvideoX-Interpolation",
        shape=(3072, 32, None, True),
        conditions=ENDS,
        layout="frames",
        licence="unknown",
    ),
    # Before the 2B model of Fun with the same shape, which is known by its name.
    Published(
        name="NimVideo/cogvideox-2b-img2vid",
        shape=(1920, 32, None, False),
        conditions=("first_frame", "video"),
        layout="image",
        **V2B,
    ),
    Published(name="alibaba-pai/CogVideoX-Fun-V1.1-2b-InP", shape=(1920, 33, None, False), **INP, **V2B),
    Published(name="alibaba-pai/CogVideoX-Fun-V1.1-5b-InP", shape=(3072, 33, None, False), **INP),
    Published(
        name="alibaba-pai/CogVideoX-Fun-V1.5-5b-InP",
        shape=(3072, 33, 2, False),
        **{**INP, "num_frames": 85, "sizes": Sizes(side=(512, 1024)), "frames": Frames(8, 85, first=5)},
    ),
    Published(name="alibaba-pai/CogVideoX-Fun-V1.1-5b-Control", shape=(3072, 32, None, False), **CONTROL),
    Published(name="alibaba-pai/CogVideoX-Fun-V1.1-5b-Pose", shape=(3072, 32, None, False), **POSE),
    Published(name="alibaba-pai/CogVideoX-Fun-V1.1-2b-Pose", shape=(1920, 32, None, False), **POSE, **V2B),
)


def published(dit: DiTConfig, name: str = "") -> Published | None:
    """The row with this shape; of several, the one called `name` (with its organisation or without), else the first."""
    shape = (dit.width, dit.in_channels, dit.patch_size_t, dit.use_learned_positional_embeddings)
    rows = [row for row in PUBLISHED if row.shape == shape]
    called = [row for row in rows if row.name.lower().rpartition("/")[2] == name.lower().rpartition("/")[2]]
    return next(iter(called + rows), None)


def layout_of(dit: DiTConfig, latent_channels: int) -> str:
    """What the input channels of an unknown model leave room for."""
    return {latent_channels: "text", 2 * latent_channels: "frames", 2 * latent_channels + 1: "inp"}.get(
        dit.in_channels, "text"
    )


def conditions_of(dit: DiTConfig, latent_channels: int) -> tuple[str, ...]:
    """What the input channels of an unknown model leave room for: noise alone, with a frame, with a mask and a clip."""
    room = {latent_channels: TEXT, 2 * latent_channels: FIRST, 2 * latent_channels + 1: PARTS}
    return room.get(dit.in_channels, ("text",))


def models_with(condition: str) -> list[str]:
    """The models that take this condition, the bundled one first: for hints."""
    bundled = {"tiny": ("text", "first_frame", "last_frame", "keyframes", "video")}
    rows = bundled | {row.name: row.conditions for row in PUBLISHED}
    return [name for name, conditions in rows.items() if condition in conditions]
