"""One request for a clip: the keywords of `generate()`, checked before anything is loaded. Imports no torch.

The command line's flags and the recipe inside a clip are made from this dataclass, so they cannot differ from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Any

from videogen.checks import SAMPLERS, check, check_kinds, is_int, shape_of, snapped
from videogen.data.files import sha256_of
from videogen.weights.card import Card

Number = int | float
FILES = ("first_frame", "last_frame", "keyframes", "video", "control_video", "mask")


@dataclass(frozen=True)
class Request:
    """The keywords of `Pipeline.generate`. None means: what the model was made for."""

    prompt: Any = None
    _: KW_ONLY
    negative_prompt: Any = ""
    prompt_embeds: Any = None
    negative_prompt_embeds: Any = None
    first_frame: Any = None
    last_frame: Any = None
    keyframes: dict[int, Any] | None = None
    last_frame_until: Number = 1.0
    video: Any = None
    strength: Number = 0.8
    control_video: Any = None
    mask: Any = None
    fit: str = "crop"
    image_latent_scale: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: Number | None = None
    snap: bool | dict[str, Any] = False
    num_inference_steps: int | None = None
    guidance_scale: Number | None = None
    use_dynamic_cfg: bool | str = False
    guidance_until: Number = 1.0
    uncond: str = "empty"
    sampler: str | None = None
    step_cache: Number | None = None
    seed: Any = 0
    latents: Any = None
    on_step: Callable | None = None
    output: str = "video"
    out: Any = None
    keep_latents: bool = False

    @property
    def batch_size(self) -> int:
        """How many clips: the prompts, or the rows of `prompt_embeds`."""
        if shape := shape_of(self.prompt_embeds):
            return shape[0]
        return len(self.prompt) if isinstance(self.prompt, list | tuple) else 1

    @property
    def is_batch(self) -> bool:
        """Whether the answer is a list: a list of prompts, even of one, gives a list of clips."""
        return isinstance(self.prompt, list | tuple) or (self.prompt_embeds is not None and self.batch_size > 1)

    @property
    def size(self) -> tuple[int, int, int]:
        """(frames, height, width) of a checked request."""
        assert self.num_frames is not None
        assert self.height is not None
        assert self.width is not None
        return self.num_frames, self.height, self.width

    @property
    def images(self) -> dict[int, Any]:
        """The known frames of a checked request by pixel index, ascending."""
        images = dict(self.keyframes or {})
        if self.first_frame is not None:
            images[0] = self.first_frame
        if self.last_frame is not None:
            images[self.size[0] - 1] = self.last_frame
        return dict(sorted(images.items()))

    def checked(self, card: Card) -> Request:
        """The request with every None filled in from the card, or an InvalidRequest that says what would be valid."""
        check_kinds(self)
        request = replace(
            self,
            **{
                name: getattr(card, name)
                for name in ("height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale", "sampler")
                if getattr(self, name) is None
            },
        )
        if request.prompt is None and request.prompt_embeds is None and request.has_conditions:
            request = replace(request, prompt="")
        if request.snap:
            request = snapped(request, card)
        check(request, card)
        return request

    @property
    def has_conditions(self) -> bool:
        return any(getattr(self, name) is not None for name in FILES)

    def recipe(self, item: int | None = None) -> dict[str, Any]:
        """What made the clip, as JSON-ready values; images and embeddings by the sha256 of their bytes, and no paths.

        `item` is the place in a batch. A seed of its own makes the item a recipe of its own; a shared seed draws the
        noise of all items in turn, so then the whole batch is kept, with the item's place.
        """
        request = self
        own_seed = isinstance(self.seed, list | tuple)
        if item is not None and (own_seed or self.batch_size == 1):
            names = ("prompt", "negative_prompt", "first_frame", "last_frame", "seed")
            request = replace(self, **{name: item_of(getattr(self, name), item) for name in names})
            if self.keyframes:
                request = replace(request, keyframes={k: item_of(v, item) for k, v in self.keyframes.items()})
        recipe = {
            f.name: _plain(f.name, getattr(request, f.name))
            for f in fields(request)
            if f.name not in ("on_step", "output", "out", "keep_latents") and getattr(request, f.name) is not None
        }
        if item is not None and not own_seed and self.batch_size > 1:
            recipe["item"] = item
        return recipe


HELP = {
    "prompt": "what the clip shows; a list makes a list of clips",
    "negative_prompt": "what it should not show",
    "prompt_embeds": "text embeddings [b, l, e] in place of the prompt",
    "negative_prompt_embeds": "text embeddings [b, l, e] in place of the negative prompt",
    "first_frame": "image the clip starts with",
    "last_frame": "image the clip ends with",
    "keyframes": "images by frame index (0 or a multiple of 4)",
    "last_frame_until": "give the last frame for this first part of the steps only (0 to 1)",
    "video": "clip to start from (video to video)",
    "strength": "how much of that clip is made anew (0 to 1)",
    "control_video": "clip whose structure is followed (control and pose models)",
    "mask": "where that clip is made anew: white, or keep: black (inpainting models)",
    "fit": "how images meet the size of the clip: crop, pad or stretch",
    "image_latent_scale": "how condition images' latents are scaled: mul, div or none (docs/conditioning.md)",
    "height": "height in pixels",
    "width": "width in pixels",
    "num_frames": "frames: 1, or a multiple of 8 plus 1",
    "fps": "frames per second of the file",
    "snap": "round size, frames and fps to the nearest the model was made for, and say so",
    "num_inference_steps": "denoising steps",
    "guidance_scale": "weight of the prompt; 1 is none",
    "use_dynamic_cfg": "vary the guidance over the steps: diffusers (the default, as CogVideoX's authors do) or sat",
    "guidance_until": "evaluate the negative prompt for this first part of the steps only (0 to 1; lossy)",
    "uncond": "what guidance leads away from without a negative prompt: empty (the empty prompt) or zeros",
    "sampler": f"one of {', '.join(SAMPLERS)}",
    "step_cache": "leave out steps that can be foretold, within this error budget (0 is none, 0.1 is small; lossy)",
    "seed": "same seed, same clip; a list gives each prompt its own",
    "latents": "initial noise [b, f, c, h, w]",
    "on_step": "called with an event (stage, step, steps, eta, latents)",
    "output": "video, tensor or latent",
    "out": "write the clip here while it is decoded",
    "keep_latents": "also write the latents it is decoded from, beside the clip and before it",
}


def item_of(value: Any, item: int) -> Any:
    """Of a value for each clip, or one for all: that of clip `item`."""
    return value[item] if isinstance(value, list | tuple) else value


def _plain(name: str, value: Any) -> Any:
    """JSON-ready: pictures, clips and tensors become the sha256 of their bytes, so no path and no pixels leave."""
    if isinstance(value, dict):
        return {str(k): _plain(name, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, v) for v in value]
    if value is None or (isinstance(value, bool | int | float | str) and name not in FILES):
        return value
    return int(value) if is_int(value) else f"sha256:{_sha256(value)}"


def _sha256(value: Any) -> str:
    """Of a file or folder (`sha256_of`), or of an array's shape, type and values."""
    import numpy as np

    if isinstance(value, str | Path):
        return sha256_of(value)
    value = getattr(value, "frames", value)  # a Video
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() and value.itemsize < 4 else value).numpy()
    array = np.ascontiguousarray(value)
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
