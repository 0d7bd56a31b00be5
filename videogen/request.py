"""One request for a clip: the keywords of `generate()`, checked before anything is loaded. Imports no torch.

The command line's flags and the recipe inside a clip are made from this dataclass, so they cannot differ from it.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import operator
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeGuard

from videogen.data.files import check_output, local
from videogen.errors import InvalidRequest
from videogen.weights.card import Card
from videogen.weights.models import models_with

Number = int | float
SAMPLERS = ("diffusers", "ddim", "dpm", "dpm-ode", "euler", "heun", "lcm")
FITS = ("crop", "pad", "stretch")
OUTPUTS = ("video", "tensor", "latent")
FILES = ("first_frame", "last_frame", "keyframes", "video")
ABILITIES = {
    "first_frame": "a first frame",
    "last_frame": "a last frame",
    "keyframes": "key frames",
    "video": "a video to start from",
}
CHUNK = 8  # frames per chunk of the VAE: a clip is 1 or 8k + 1 frames


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
    fit: str = "crop"
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: Number | None = None
    num_inference_steps: int | None = None
    guidance_scale: Number | None = None
    use_dynamic_cfg: bool = False
    guidance_until: Number = 1.0
    sampler: str | None = None
    step_cache: Number | None = None
    seed: Any = 0
    latents: Any = None
    on_step: Callable | None = None
    output: str = "video"
    out: Any = None

    @property
    def batch_size(self) -> int:
        """How many clips: the prompts, or the rows of `prompt_embeds`."""
        if self.prompt_embeds is not None:
            return int(self.prompt_embeds.shape[0])
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
        request._check_text(card)
        request._check_size(card)
        request._check_frames(card)
        request._check_numbers()
        request._check_conditions(card)
        request._check_batch(card)
        request._check_output()
        return request

    @property
    def has_conditions(self) -> bool:
        return any(given is not None for given in (self.first_frame, self.last_frame, self.keyframes, self.video))

    def recipe(self, item: int | None = None) -> dict[str, Any]:
        """What made the clip, as JSON-ready values; images and embeddings by the sha256 of their bytes, and no paths.

        `item` is the place in a batch. A seed of its own makes the item a recipe of its own; a shared seed draws the
        noise of all items in turn, so then the whole batch is kept, with the item's place.
        """
        request = self
        own_seed = isinstance(self.seed, list | tuple)
        if item is not None and (own_seed or self.batch_size == 1):
            names = ("prompt", "negative_prompt", "first_frame", "last_frame", "seed")
            request = replace(self, **{name: _item(getattr(self, name), item) for name in names})
            if self.keyframes:
                request = replace(request, keyframes={k: _item(v, item) for k, v in self.keyframes.items()})
        recipe = {
            f.name: _plain(f.name, getattr(request, f.name))
            for f in fields(request)
            if f.name not in ("on_step", "output", "out") and getattr(request, f.name) is not None
        }
        if item is not None and not own_seed and self.batch_size > 1:
            recipe["item"] = item
        return recipe

    # The checks, in the order a reader of the error would look

    def _check_text(self, card: Card) -> None:
        if (self.prompt is None) == (self.prompt_embeds is None):
            if self.prompt is None:
                raise InvalidRequest(
                    "there is no prompt.",
                    why="nothing else says what to show.",
                    hint='"a red circle moves right"',
                    param="prompt",
                )
            raise InvalidRequest(
                "prompt and prompt_embeds are both given.",
                why="each would be the text.",
                hint="give one of them.",
                param="prompt",
            )
        for name in ("prompt", "negative_prompt"):
            value = getattr(self, name)
            texts = list(value) if isinstance(value, list | tuple) else [value]
            if name == "prompt" and value is None:
                continue
            if not texts or not all(isinstance(text, str) for text in texts):
                raise InvalidRequest(
                    f"{name} is {_short(value)}.",
                    why="it is a text or a list of texts.",
                    hint='"a red circle"',
                    param=name,
                )
        if self.negative_prompt_embeds is not None and self.negative_prompt:
            raise InvalidRequest(
                "negative_prompt and negative_prompt_embeds are both given.",
                why="each would be the negative text.",
                hint="give one of them.",
                param="negative_prompt",
            )
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            embeds = getattr(self, name)
            if embeds is None:
                continue
            shape, expected = tuple(embeds.shape), (card.max_sequence_length, card.dit.text_embed_dim)
            any_length = card.dit.use_rotary_positional_embeddings and not card.fixed_size
            if len(shape) != 3 or shape[2] != expected[1] or (shape[1] != expected[0] and not any_length):
                raise InvalidRequest(
                    f"{name} has shape {list(shape)}.",
                    why=f"{card.name} reads [b, {expected[0]}, {expected[1]}].",
                    hint="make it with the model's own text encoder.",
                    param=name,
                )
        ours, theirs = (getattr(e, "shape", None) for e in (self.prompt_embeds, self.negative_prompt_embeds))
        if ours is not None and theirs is not None and tuple(ours) != tuple(theirs):
            raise InvalidRequest(
                f"prompt_embeds {list(ours)} and negative_prompt_embeds {list(theirs)} differ in shape.",
                why="guidance runs them side by side.",
                hint="make both with the same text encoder and length.",
                param="negative_prompt_embeds",
            )

    def _check_size(self, card: Card) -> None:
        height, width = self.height, self.width
        for name, value in (("height", height), ("width", width)):
            if not _is_int(value) or value < 1:
                raise InvalidRequest(
                    f"{name} is {_short(value)}.",
                    why="it is a whole number of pixels.",
                    hint=f"--size {card.width}x{card.height}",
                    param=name,
                )
        if card.fixed_size and (height, width) != (card.height, card.width):
            raise InvalidRequest(
                f"{width}x{height} isn't valid for {card.name} (it makes {card.width}x{card.height} only).",
                why="this model has a learned position table of one size.",
                hint=f"--size {card.width}x{card.height}",
                param="height" if height != card.height else "width",
            )
        _, height, width = self.size
        step = card.size_multiple
        if height % step or width % step:
            sizes = [f"{w}x{h}" for w, h in zip(_near(width, step), _near(height, step), strict=True)]
            raise InvalidRequest(
                f"{width}x{height} isn't valid for {card.name}.",
                why=f"width and height must be multiples of {step} (8 by the VAE, times the patch size).",
                hint=" or ".join(f"--size {size}" for size in dict.fromkeys(sizes)),
                param="height" if height % step else "width",
            )

    def _check_frames(self, card: Card) -> None:
        frames = self.num_frames
        if card.fixed_size and frames != card.num_frames:
            raise InvalidRequest(
                f"{_short(frames)} frames isn't valid for {card.name} (it was trained for {card.num_frames} only).",
                why="this model has a learned position table of one length.",
                hint=f"--frames {card.num_frames}",
                param="num_frames",
            )
        if not _is_int(frames) or frames < 1 or (frames - 1) % CHUNK:
            near = [1, CHUNK + 1]
            if _is_int(frames) and frames > 1:
                below = (frames - 1) // CHUNK * CHUNK + 1
                near = [below, below + CHUNK]
            raise InvalidRequest(
                f"{_short(frames)} frames isn't valid for {card.name}.",
                why="the VAE works in chunks of 8 frames after the first: 1, 9, 17, 25, …",
                hint=" or ".join(f"--frames {n}" for n in near) + f"   (made for {card.num_frames})",
                param="num_frames",
            )

    def _check_numbers(self) -> None:
        steps = self.num_inference_steps
        if not _is_int(steps) or not 1 <= steps <= 1000:
            raise _bad("num_inference_steps", steps, "a whole number from 1 to 1000", "--steps 50")
        if not _is_real(self.guidance_scale) or self.guidance_scale < 0:
            raise _bad("guidance_scale", self.guidance_scale, "a finite number, 0 or more", "--guidance 6")
        if not _is_real(self.fps) or not 0 < self.fps <= 240:
            raise _bad("fps", self.fps, "a number above 0, at most 240", "--fps 8")
        if not _is_real(self.strength) or not 0 < self.strength <= 1:
            raise _bad("strength", self.strength, "a number above 0, at most 1", "--strength 0.8")
        if not _is_real(self.last_frame_until) or not 0 <= self.last_frame_until <= 1:
            raise _bad("last_frame_until", self.last_frame_until, "a number from 0 to 1", "--last-frame-until 0.6")
        if not _is_real(self.guidance_until) or not 0 <= self.guidance_until <= 1:
            raise _bad("guidance_until", self.guidance_until, "a number from 0 to 1", "--guidance-until 0.5")
        if self.step_cache is not None and (not _is_real(self.step_cache) or not 0 <= self.step_cache <= 1):
            raise _bad("step_cache", self.step_cache, "a number from 0 to 1", "--step-cache 0.1")
        if not isinstance(self.use_dynamic_cfg, bool):
            raise _bad("use_dynamic_cfg", self.use_dynamic_cfg, "True or False", "--use-dynamic-cfg")
        for name, allowed in (("fit", FITS), ("sampler", SAMPLERS), ("output", OUTPUTS)):
            if getattr(self, name) not in allowed:
                near = difflib.get_close_matches(str(getattr(self, name)), allowed, n=1, cutoff=0.4) or allowed
                raise _bad(name, getattr(self, name), f"one of {', '.join(allowed)}", f"--{name} {near[0]}")
        if self.on_step is not None and not callable(self.on_step):
            raise _bad("on_step", self.on_step, "a function of one event", "on_step=print")

    def _check_conditions(self, card: Card) -> None:
        last = self.size[0] - 1
        for index in self.keyframes or {}:
            if not _is_int(index) or index < 0 or index > last or index % 4:
                near = sorted({min(max(k, 0), last) for k in _near(index, 4, least=0)}) if _is_int(index) else [0, 4]
                raise InvalidRequest(
                    f"keyframe {index!r} isn't valid for a clip of {self.num_frames} frames.",
                    why="a key frame stands at frame 0 or at a multiple of 4 (one latent frame is 4), within the clip.",
                    hint=" or ".join(f"--keyframe {k}=IMAGE" for k in near),
                    param="keyframes",
                )
        given: dict[int, str] = {}
        named = [("first_frame", 0)] if self.first_frame is not None else []
        named += [("last_frame", last)] if self.last_frame is not None else []
        for name, index in [*named, *((f"keyframe {k}", k) for k in self.keyframes or {})]:
            if index in given:
                raise InvalidRequest(
                    f"{given[index]} and {name} are both frame {index}.",
                    why="one frame takes one image.",
                    hint=f"leave out {name}.",
                    param=name.split()[0].replace("keyframe", "keyframes"),
                )
            given[index] = name
            kind = "first_frame" if index == 0 else "last_frame" if index == last else "keyframes"
            _require(card, kind, param=name if name in ("first_frame", "last_frame") else "keyframes")
        if self.video is not None:
            _require(card, "video", param="video")
            _check_video(self.video, self.size[0])
        elif self.strength != 0.8:
            raise InvalidRequest(
                "strength is given without a video.",
                why="it says how much of a video is made anew.",
                hint="--video CLIP",
                param="strength",
            )
        if self.last_frame_until != 1 and last not in given:
            raise InvalidRequest(
                "last_frame_until is given without a last frame.",
                why="it says how long that is held.",
                hint="--last-frame IMAGE",
                param="last_frame_until",
            )

    def _check_batch(self, card: Card) -> None:
        n = self.batch_size
        frames = {"first_frame": self.first_frame, "last_frame": self.last_frame}
        frames |= {f"keyframes[{k}]": image for k, image in (self.keyframes or {}).items()}
        lists = {"negative_prompt": self.negative_prompt, "seed": self.seed, "out": self.out, **frames}
        for name, value in lists.items():
            if isinstance(value, list | tuple) and len(value) != n:
                raise InvalidRequest(
                    f"{name} has {len(value)} entries for {n} prompt{'s' * (n != 1)}.",
                    why="one serves all prompts, a list gives each its own.",
                    hint=f"give one, or {n}.",
                    param=name.split("[")[0],
                )
        for name, value in frames.items():
            for image in value if isinstance(value, list | tuple) else [value]:
                if image is not None:
                    _check_image(name, image)
        for seed in self.seed if isinstance(self.seed, list | tuple) else [self.seed]:
            if not _is_int(seed) or not 0 <= seed < 2**63:
                raise _bad("seed", seed, "a whole number from 0 to 2^63 - 1", "--seed 7")
        if self.latents is not None:
            frames, height, width = self.size
            expected = [n, *card.latent_shape(height, width, frames)]
            if list(getattr(self.latents, "shape", [])) != expected:
                shape = list(getattr(self.latents, "shape", []))
                raise InvalidRequest(
                    f"latents has shape {shape}.",
                    why=f"{n} x {frames} frames at {width}x{height} start from {expected}.",
                    hint="draw noise of that shape, or leave latents out.",
                    param="latents",
                )

    def _check_output(self) -> None:
        if self.out is None:
            return
        if self.output != "video":
            raise InvalidRequest(
                f"out is given with output={self.output!r}.",
                why="only videos are files.",
                hint='output="video"',
                param="out",
            )
        if self.batch_size > 1 and not isinstance(self.out, list | tuple):
            raise InvalidRequest(
                f"one file is given for {self.batch_size} clips.",
                why="each clip is a file.",
                hint="out=[...], one path for each prompt.",
                param="out",
            )
        paths = list(self.out) if isinstance(self.out, list | tuple) else [self.out]
        if len(set(map(str, paths))) != len(paths):
            raise InvalidRequest(
                "two clips have one name.", why="each clip is a file.", hint="give each its own.", param="out"
            )
        for path in paths:
            if not callable(path):  # the command line's own way of writing
                check_output(path)


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
    "fit": "how images meet the size of the clip: crop, pad or stretch",
    "height": "height in pixels",
    "width": "width in pixels",
    "num_frames": "frames: 1, or a multiple of 8 plus 1",
    "fps": "frames per second of the file",
    "num_inference_steps": "denoising steps",
    "guidance_scale": "weight of the prompt; 1 is none",
    "use_dynamic_cfg": "vary the guidance over the steps, as CogVideoX's authors do",
    "guidance_until": "evaluate the negative prompt for this first part of the steps only (0 to 1; lossy)",
    "sampler": f"one of {', '.join(SAMPLERS)}",
    "step_cache": "leave out steps that can be foretold, within this error budget (0 is none, 0.1 is small; lossy)",
    "seed": "same seed, same clip; a list gives each prompt its own",
    "latents": "initial noise [b, f, c, h, w]",
    "on_step": "called with an event (stage, step, steps, eta, latents)",
    "output": "video, tensor or latent",
    "out": "write the clip here while it is decoded",
}


def _require(card: Card, kind: str, *, param: str) -> None:
    """Refuse a condition the model was not trained for, and say what it can do and who can do it."""
    if kind in card.conditions:
        return
    able = [name for name in models_with(kind) if name != card.name]
    raise InvalidRequest(
        f"{card.name} cannot take {ABILITIES[kind]}.",
        why=f"it takes {', '.join(ABILITIES.get(c, c) for c in card.conditions)}.",
        hint=" or ".join(f"--model {name}" for name in able[:3]),
        param=param,
    )


def _check_image(name: str, image: Any) -> None:
    """A path must be an image file here (its header is read); anything else must look like a picture."""
    param = name.split("[")[0]
    if isinstance(image, str | Path):
        from PIL import Image

        path = local(image, param=param)
        try:
            with Image.open(path):
                return
        except Exception as error:
            raise InvalidRequest(
                f"{name} {path} is not an image.", why=str(error), hint="a PNG, JPEG or WebP file.", param=param
            ) from error
    shape = getattr(image, "shape", None)
    if not (hasattr(image, "convert") or (shape is not None and len(shape) == 3)):
        raise InvalidRequest(
            f"{name} is {_short(image)}.",
            why="an image is a path, a PIL image, an array [H, W, 3] or a tensor [3, H, W].",
            hint="give the path of a PNG or JPEG file.",
            param=param,
        )


def _check_video(video: Any, frames: int) -> None:
    """The clip to start from can be read, and is long enough."""
    if isinstance(video, str | Path):
        from videogen.data.video import read_video

        local(video, param="video")
        video = read_video(video, limit=frames)[0]
    found = len(getattr(video, "frames", video))
    if found < frames:
        raise InvalidRequest(
            f"the video has {found} frames, {frames} are asked for.",
            why="each frame of the new clip starts from one of the old.",
            hint=f"--frames {max(1, (found - 1) // CHUNK * CHUNK + 1)}",
            param="video",
        )


def _bad(param: str, value: Any, expected: str, hint: str) -> InvalidRequest:
    return InvalidRequest(f"{param} is {_short(value)}.", why=f"it is {expected}.", hint=hint, param=param)


def _near(value: Any, step: int, *, least: int | None = None) -> tuple[int, int]:
    """The multiples of `step` around `value`, the nearer first."""
    below = max(value // step * step, step if least is None else least)
    above = max(-(-value // step) * step, step if least is None else least)
    return (below, above) if value - below <= above - value else (above, below)


def _is_int(value: Any) -> TypeGuard[int]:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _is_real(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    text = repr(value) if not hasattr(value, "shape") else f"an array of shape {list(value.shape)}"
    return text if len(text) <= 60 else text[:57] + "..."


def _item(value: Any, item: int) -> Any:
    return value[item] if isinstance(value, list | tuple) else value


def _plain(name: str, value: Any) -> Any:
    """JSON-ready: pictures, clips and tensors become the sha256 of their bytes, so no path and no pixels leave."""
    if isinstance(value, dict):
        return {str(k): _plain(name, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, v) for v in value]
    if value is None or (isinstance(value, bool | int | float | str) and name not in FILES):
        return value
    return int(value) if _is_int(value) else f"sha256:{_sha256(value)}"


def _sha256(value: Any) -> str:
    """Of a file's bytes (a folder: of its files in order), or of an array's shape, type and values."""
    import numpy as np

    digest = hashlib.sha256()
    if isinstance(value, str | Path):
        path = local(value)
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
        return digest.hexdigest()
    value = getattr(value, "frames", value)  # a Video
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() and value.itemsize < 4 else value).numpy()
    array = np.ascontiguousarray(value)
    digest.update(f"{array.dtype}{array.shape}".encode())
    digest.update(array.tobytes())
    return digest.hexdigest()
