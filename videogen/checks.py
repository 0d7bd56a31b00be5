"""What a request must satisfy before a model is loaded: its text, size, numbers, conditions and files.

`check` goes through it in the order a reader of the error would look. What a model was made for is data of its `Card`
(docs/requests.md); of a model nobody published only the structure is asked. Imports no torch.
"""

from __future__ import annotations

import difflib
import math
import operator
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from videogen.data.files import check_output, local
from videogen.errors import InvalidRequest, Note, VideogenError
from videogen.weights.card import Card
from videogen.weights.limits import ANY_LENGTH, ANY_SIZE, CHUNK, MOST_FRAMES, MOST_PIXELS
from videogen.weights.models import models_with

if TYPE_CHECKING:
    from videogen.request import Request

SAMPLERS = ("diffusers", "ddim", "dpm", "dpm-ode", "euler", "heun", "lcm")
FITS = ("crop", "pad", "stretch")
OUTPUTS = ("video", "tensor", "latent")
MOST_LETTERS, MOST_PROMPTS = 20_000, 1000
UNCONDS = ("empty", "zeros")
DYNAMIC = (False, True, "diffusers", "sat")
SCALES = (None, "mul", "div", "none")
ABILITIES = {
    "first_frame": "a first frame",
    "last_frame": "a last frame",
    "keyframes": "key frames",
    "video": "a video to start from",
    "control_video": "a control video",
    "mask": "a mask",
}


SIMPLE = """
    last_frame_until strength fit image_latent_scale height width num_frames fps num_inference_steps guidance_scale
    use_dynamic_cfg guidance_until uncond sampler step_cache output keep_latents
    """.split()  # noqa: SIM905


def check_kinds(request: Request) -> None:
    """Numbers and words are some: what comes after may compare them. What they may be is asked there."""
    for name in SIMPLE:
        value = getattr(request, name)
        if not (isinstance(value, bool | int | float | str | None) or is_int(value)):
            raise bad(name, value, "a number or a word", f"leave out {name}.")
    if not isinstance(request.snap, bool | dict):
        raise bad("snap", request.snap, "True or False", "--snap")
    if not isinstance(request.keyframes, dict | None):
        raise bad("keyframes", request.keyframes, "a dictionary of images by frame index", "--keyframe 8=IMAGE")


def check(request: Request, card: Card) -> None:
    """Raises InvalidRequest (FileError where it is a file) if this model cannot carry out the request."""
    check_text(request, card)
    check_size(request, card)
    check_frames(request, card)
    check_numbers(request, card)
    check_conditions(request, card)
    check_batch(request, card)
    check_output_files(request)


def snapped(request: Request, card: Card) -> Request:
    """The request at the nearest size, length and rate this model was made for, with a Note of what was changed.

    `snap` then holds what had been asked for, so that the recipe tells it too.
    """
    new: dict[str, Any] = {}
    if is_int(request.width) and is_int(request.height) and min(request.width, request.height) > 0:
        new["width"], new["height"] = nearest_size(card, int(request.width), int(request.height))
    if is_int(request.num_frames) and request.num_frames > 0:
        new["num_frames"] = nearest_frames(card, int(request.num_frames))
    if is_real(request.fps) and request.fps > 0 and card.rates:
        new["fps"] = min(card.rates, key=lambda rate: abs(rate - (request.fps or 0)))
    asked = {name: getattr(request, name) for name, value in new.items() if getattr(request, name) != value}
    if not asked:
        return request
    changes = ", ".join(f"{name} {short(value)} became {new[name]}" for name, value in asked.items())
    warnings.warn(Note(f"snap: {changes}, as {card.name} was made for"), stacklevel=4)
    before = request.snap if isinstance(request.snap, dict) else {}
    return replace(request, snap={**asked, **before}, **{name: new[name] for name in asked})


def nearest_size(card: Card, width: int, height: int) -> tuple[int, int]:
    """The (width, height) nearest to this one that the model was made for."""
    if card.fixed_size:
        return card.width, card.height
    return card.sizes.nearest(width, height, card.size_multiple)


def nearest_frames(card: Card, frames: int) -> int:
    """The number of frames nearest to this one that the model can make, in one pass or in windows."""
    if card.fixed_size and frames <= card.num_frames:
        return card.num_frames
    return card.frames.nearest(frames)


def check_text(request: Request, card: Card) -> None:
    """A prompt or its embeddings, of the shape the model reads."""
    if (request.prompt is None) == (request.prompt_embeds is None):
        if request.prompt is None:
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
        value = getattr(request, name)
        if name == "prompt" and value is None:
            continue
        texts = list(value) if isinstance(value, list | tuple) else [value]
        if not texts or not all(isinstance(text, str) and is_unicode(text) for text in texts):
            raise InvalidRequest(
                f"{name} is {short(value)}.",
                why="it is a text or a list of texts.",
                hint='"a red circle"',
                param=name,
            )
        if len(texts) > MOST_PROMPTS or any(len(text) > MOST_LETTERS for text in texts):
            raise InvalidRequest(
                f"{name} is {short(value)}, {len(texts)} texts of up to {max(map(len, texts))} letters.",
                why=f"a text has {MOST_LETTERS} letters at most, and a call {MOST_PROMPTS} texts.",
                hint="several calls; a model reads a few hundred words.",
                param=name,
            )
    _check_uncond(request)
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        embeds = getattr(request, name)
        if embeds is None:
            continue
        shape, expected = shape_of(embeds), (card.max_sequence_length, card.dit.text_embed_dim)
        any_length = card.dit.use_rotary_positional_embeddings and not card.fixed_size
        rows, length, width = shape if shape is not None and len(shape) == 3 else (0, 0, 0)
        if rows < 1 or length < 1 or width != expected[1] or (length != expected[0] and not any_length):
            raise InvalidRequest(
                f"{name} has shape {list(shape)}." if shape is not None else f"{name} is {short(embeds)}.",
                why=f"{card.name} reads [b, {expected[0]}, {expected[1]}].",
                hint="make it with the model's own text encoder.",
                param=name,
            )
    ours, theirs = shape_of(request.prompt_embeds), shape_of(request.negative_prompt_embeds)
    if ours is not None and theirs is not None and ours != theirs:
        raise InvalidRequest(
            f"prompt_embeds {list(ours)} and negative_prompt_embeds {list(theirs)} differ in shape.",
            why="guidance runs them side by side.",
            hint="make both with the same text encoder and length.",
            param="negative_prompt_embeds",
        )


def _check_uncond(request: Request) -> None:
    """What guidance leads away from is said once."""
    if request.negative_prompt_embeds is not None and request.negative_prompt:
        raise InvalidRequest(
            "negative_prompt and negative_prompt_embeds are both given.",
            why="each would be the negative text.",
            hint="give one of them.",
            param="negative_prompt",
        )
    if request.uncond == "zeros":
        for name in ("negative_prompt", "negative_prompt_embeds"):
            if getattr(request, name) is not None and not is_blank(getattr(request, name)):
                raise InvalidRequest(
                    f"uncond is 'zeros' and {name} is given.",
                    why="guidance leads away from one of them.",
                    hint=f"leave out {name}, or uncond.",
                    param=name,
                )


def check_size(request: Request, card: Card) -> None:
    """Whole pixels, multiples of what the network needs, within what the model was trained for."""
    height, width = request.height, request.width
    for name, value in (("height", height), ("width", width)):
        if not is_int(value) or value < 1:
            raise InvalidRequest(
                f"{name} is {short(value)}.",
                why="it is a whole number of pixels.",
                hint=f"--size {card.width}x{card.height}",
                param=name,
            )
    assert height is not None
    assert width is not None
    if card.fixed_size and (height, width) != (card.height, card.width):
        raise InvalidRequest(
            f"{short(width)}x{short(height)} isn't valid for {card.name} (it makes {card.width}x{card.height} only).",
            why="this model has a learned position table of one size.",
            hint=f"--size {card.width}x{card.height}",
            param="height" if height != card.height else "width",
        )
    step = card.size_multiple
    if card.sizes != ANY_SIZE and not (card.sizes.allow(width, height) and height % step == width % step == 0):
        near = "{}x{}".format(*nearest_size(card, width, height))
        raise InvalidRequest(
            f"{short(width)}x{short(height)} isn't valid for {card.name}.",
            why=f"it was trained for {card.sizes}, in multiples of {step}; other sizes come out garbled.",
            hint=f"--size {near}, or --snap",
            param="height" if height != card.height else "width",
        )
    if height % step or width % step or max(height, width) > MOST_PIXELS:
        pairs = zip(near_multiples(width, step), near_multiples(height, step), strict=True)
        sizes = [f"{min(w, MOST_PIXELS)}x{min(h, MOST_PIXELS)}" for w, h in pairs]
        most = f", {MOST_PIXELS} at most" if max(height, width) > MOST_PIXELS else ""
        raise InvalidRequest(
            f"{short(width)}x{short(height)} isn't valid for {card.name}.",
            why=f"width and height must be multiples of {step} (8 by the VAE, times the patch size){most}.",
            hint=" or ".join(f"--size {size}" for size in dict.fromkeys(sizes)),
            param="height" if height % step or height > MOST_PIXELS else "width",
        )


def check_frames(request: Request, card: Card) -> None:
    """As many frames as the model can make, in one pass or in windows, at the rate it was trained for."""
    frames = request.num_frames
    if card.fixed_size and frames != card.num_frames and not (is_int(frames) and frames > card.num_frames):
        raise InvalidRequest(
            f"{short(frames)} frames isn't valid for {card.name} (it was trained for {card.num_frames} only).",
            why="this model has a learned position table of one length.",
            hint=f"--frames {card.num_frames}",
            param="num_frames",
        )
    rule = card.frames
    if not is_int(frames) or not rule.allow(frames):
        near = rule.around(max(frames, 1) if is_int(frames) else 1)
        why = "the VAE works in chunks of 8 frames after the first: 1, 9, 17, 25, …"
        if (rule.step, rule.first) != (ANY_LENGTH.step, ANY_LENGTH.first):
            lengths = sorted({1, *(k * rule.step + rule.first for k in range(4))})[:4]
            why = f"it was trained for {', '.join(map(str, lengths))}, … frames."
        if is_int(frames) and frames > MOST_FRAMES:
            why = f"no clip has more than {MOST_FRAMES}."
        raise InvalidRequest(
            f"{short(frames)} frames isn't valid for {card.name}.",
            why=why,
            hint=" or ".join(f"--frames {n}" for n in near) + f"   (made for {card.num_frames})",
            param="num_frames",
        )
    if frames > card.native_frames:
        patch = card.dit.patch_size_t or 1
        length = card.latent_shape(card.height, card.width, card.native_frames)[0]
        if length <= patch:
            raise InvalidRequest(
                f"{frames} frames isn't valid for {card.name} (it makes {card.native_frames} at once).",
                why="longer clips are made of windows that overlap, and so short ones cannot.",
                hint=f"--frames {card.native_frames}",
                param="num_frames",
            )
    if card.rates and is_real(request.fps) and request.fps not in card.rates:
        raise InvalidRequest(
            f"{short(request.fps)} frames per second isn't valid for {card.name}.",
            why=f"it was trained for {', '.join(map(str, card.rates))}; at another rate things move too fast or slow.",
            hint=f"--fps {card.rates[0]}, or --snap",
            param="fps",
        )


def check_numbers(request: Request, card: Card) -> None:
    """Numbers in their ranges, names among the known ones."""
    steps = request.num_inference_steps
    if not is_int(steps) or not 1 <= steps <= 1000:
        raise bad("num_inference_steps", steps, "a whole number from 1 to 1000", "--steps 50")
    if not is_real(request.guidance_scale) or request.guidance_scale < 0:
        raise bad("guidance_scale", request.guidance_scale, "a finite number, 0 or more", "--guidance 6")
    if not is_real(request.fps) or not 0.1 <= request.fps <= 240:
        raise bad("fps", request.fps, "a number from 0.1 to 240", "--fps 8")
    if not is_real(request.strength) or not 0 < request.strength <= 1:
        raise bad("strength", request.strength, "a number above 0, at most 1", "--strength 0.8")
    for name, example in (("last_frame_until", 0.6), ("guidance_until", 0.5), ("step_cache", 0.1)):
        value, flag = getattr(request, name), name.replace("_", "-")
        if (value is not None or name != "step_cache") and (not is_real(value) or not 0 <= value <= 1):
            raise bad(name, value, "a number from 0 to 1", f"--{flag} {example}")
    for name, allowed in (
        ("fit", FITS),
        ("sampler", SAMPLERS),
        ("output", OUTPUTS),
        ("uncond", UNCONDS),
        ("use_dynamic_cfg", DYNAMIC),
        ("image_latent_scale", SCALES),
    ):
        value = getattr(request, name)
        if not (isinstance(value, str | bool | None) and any(value is a or value == a for a in allowed)):
            names = [str(a) for a in allowed if isinstance(a, str)]
            near = difflib.get_close_matches(short(value).strip("'"), names, n=1, cutoff=0.4) or names
            expected = "one of " + ", ".join(map(str, allowed))
            raise bad(name, value, expected, f"--{name.replace('_', '-')} {near[0]}")
    if request.on_step is not None and not callable(request.on_step):
        raise bad("on_step", request.on_step, "a function of one event", "on_step=print")


def check_conditions(request: Request, card: Card) -> None:
    """Frames and clips that this model takes, each at a place of its own; nothing that would be ignored."""
    last = request.size[0] - 1
    for index in request.keyframes or {}:
        if not is_int(index) or index < 0 or index > last or index % 4:
            near = [0, 4]
            if is_int(index):
                near = sorted({min(max(k, 0), last) for k in near_multiples(index, 4, least=0)})
            raise InvalidRequest(
                f"keyframe {short(index)} isn't valid for a clip of {request.num_frames} frames.",
                why="a key frame stands at frame 0 or at a multiple of 4 (one latent frame is 4), within the clip.",
                hint=" or ".join(f"--keyframe {k}=IMAGE" for k in near),
                param="keyframes",
            )
    given: dict[int, str] = {}
    named = [("first_frame", 0)] if request.first_frame is not None else []
    named += [("last_frame", last)] if request.last_frame is not None else []
    for name, index in [*named, *((f"keyframe {k}", k) for k in request.keyframes or {})]:
        if index in given:
            raise InvalidRequest(
                f"{given[index]} and {name} are both frame {index}.",
                why="one frame takes one image.",
                hint=f"leave out {name}.",
                param=name.split()[0].replace("keyframe", "keyframes"),
            )
        given[index] = name
        kind = "first_frame" if index == 0 else "last_frame" if index == last else "keyframes"
        require(card, kind, param=name if name in ("first_frame", "last_frame") else "keyframes")
    for name in ("video", "control_video"):
        if getattr(request, name) is not None:
            require(card, name, param=name)
            check_video(name, getattr(request, name), request.size[0])
    if request.mask is not None:
        require(card, "mask", param="mask")
        check_mask(request.mask, request.size[0])
    _check_needed(request, card)
    _check_idle(request, given)


def _check_needed(request: Request, card: Card) -> None:
    """A model that was never trained without a condition has it; a choice that its layout has not is not made."""
    if request.image_latent_scale is not None and card.layout != "frames":
        raise InvalidRequest(
            f"image_latent_scale is given, and {card.name} has no latents of single images.",
            why="it is about models that are told frames on a canvas, such as CogVideoX1.5-5B-I2V.",
            hint="leave it out.",
            param="image_latent_scale",
        )
    needed = {"control": "control_video", "pose": "control_video", "image": "first_frame"}.get(card.layout)
    if needed and 0 not in request.images and getattr(request, needed) is None:
        flag = {"control_video": "--control-video CLIP", "first_frame": "--first-frame IMAGE"}[needed]
        raise InvalidRequest(
            f"{card.name} needs {ABILITIES[needed]}.",
            why="it was trained with one on every clip, and never without.",
            hint=f"{flag}, or --model {models_with('text')[1]}",
            param=needed,
        )


def _check_idle(request: Request, given: dict[int, str]) -> None:
    """What only means something beside another keyword is refused without it."""
    clip = "a video", "--video CLIP"
    idle = {
        "mask": (request.mask is not None and request.video is None, *clip, "it says what of a video is made anew."),
        "strength": (
            request.strength != 0.8 and request.video is None,
            *clip,
            "it says how much of a video is made anew.",
        ),
        "last_frame_until": (
            request.last_frame_until != 1 and request.size[0] - 1 not in given,
            "a last frame",
            "--last-frame IMAGE",
            "it says how long that is held.",
        ),
        "image_latent_scale": (
            request.image_latent_scale is not None and not given,
            "an image",
            "--first-frame IMAGE",
            "it says how its latents are scaled.",
        ),
    }
    for name, (is_idle, lacks, hint, why) in idle.items():
        if is_idle:
            raise InvalidRequest(f"{name} is given without {lacks}.", why=why, hint=hint, param=name)


def check_batch(request: Request, card: Card) -> None:
    """Lists as long as the prompts; images and seeds that are some; initial noise of the clip's shape."""
    n = request.batch_size
    frames = {"first_frame": request.first_frame, "last_frame": request.last_frame}
    frames |= {f"keyframes[{k}]": image for k, image in (request.keyframes or {}).items()}
    lists = {"negative_prompt": request.negative_prompt, "seed": request.seed, "out": request.out, **frames}
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
            if image is not None or isinstance(value, list | tuple) or name.startswith("keyframes"):
                check_image(name, image)
    for seed in request.seed if isinstance(request.seed, list | tuple) else [request.seed]:
        if not is_int(seed) or not 0 <= seed < 2**63:
            raise bad("seed", seed, "a whole number from 0 to 2^63 - 1", "--seed 7")
    if request.latents is not None:
        frame_count, height, width = request.size
        expected, found = [n, *card.latent_shape(height, width, frame_count)], shape_of(request.latents)
        if found is None or list(found) != expected:
            raise InvalidRequest(
                f"latents has shape {list(found)}." if found is not None else f"latents is {short(request.latents)}.",
                why=f"{n} x {frame_count} frames at {width}x{height} start from {expected}.",
                hint="draw noise of that shape, or leave latents out.",
                param="latents",
            )


def check_output_files(request: Request) -> None:
    """A path for each clip that may be written."""
    if request.out is None:
        return
    if request.output != "video":
        raise InvalidRequest(
            f"out is given with output={request.output!r}.",
            why="only videos are files.",
            hint='output="video"',
            param="out",
        )
    if request.batch_size > 1 and not isinstance(request.out, list | tuple):
        raise InvalidRequest(
            f"one file is given for {request.batch_size} clips.",
            why="each clip is a file.",
            hint="out=[...], one path for each prompt.",
            param="out",
        )
    paths = list(request.out) if isinstance(request.out, list | tuple) else [request.out]
    for path in paths:
        if not (callable(path) or isinstance(path, str | Path)):  # a function: the command line's own way of writing
            raise bad("out", path, "a path", "out='clip.mp4'")
    if len(set(map(str, paths))) != len(paths):
        raise InvalidRequest(
            "two clips have one name.", why="each clip is a file.", hint="give each its own.", param="out"
        )
    for path in paths:
        if not callable(path):
            check_output(path)


def require(card: Card, kind: str, *, param: str) -> None:
    """Refuse a condition the model was not trained for, and say what it can do and who can do it."""
    if kind in card.conditions:
        return
    able = [name for name in models_with(kind) if name != card.name]
    raise InvalidRequest(
        f"{card.name} cannot take {ABILITIES[kind]}.",
        why=f"it takes {', '.join(ABILITIES.get(c, c) for c in card.conditions)}.",
        hint=" or ".join(f"--model {name}" for name in able[:3]) or f"leave out {param}.",
        param=param,
    )


def check_image(name: str, image: Any) -> None:
    """A path must be an image file here (its header is read); anything else must look like a picture."""
    param = name.split("[")[0]
    if isinstance(image, str | Path):
        from videogen.data.video import open_picture

        path = local(image, param=param)
        try:
            with open_picture(path):
                return
        except VideogenError:
            raise
        except Exception as error:
            raise InvalidRequest(
                f"{name} {path} is not an image.", why=str(error), hint="a PNG, JPEG or WebP file.", param=param
            ) from error
    shape = shape_of(image)
    if not (hasattr(image, "convert") or (shape is not None and len(shape) == 3 and 3 in (shape[0], shape[2]))):
        raise InvalidRequest(
            f"{name} is {short(image)}.",
            why="an image is a path, a PIL image, an array [H, W, 3] or a tensor [3, H, W].",
            hint="give the path of a PNG or JPEG file.",
            param=param,
        )


def check_video(name: str, video: Any, frames: int) -> None:
    """A clip that is given can be read, and is long enough."""
    if isinstance(video, str | Path):
        from videogen.data.video import read_video

        local(video, param=name)
        video = read_video(video, limit=frames)[0]
    pictures = getattr(video, "frames", video)
    shape = shape_of(pictures)
    if not (isinstance(pictures, list | tuple) or (shape is not None and len(shape) == 4 and shape[3] == 3)):
        raise bad(
            name, video, "a path, a Video, a list of pictures or an array [F, H, W, 3]", "give the path of an mp4."
        )
    found = len(pictures)
    if found < frames:
        raise InvalidRequest(
            f"the {name.replace('_', ' ')} has {found} frames, {frames} are asked for.",
            why="each frame of the new clip starts from one of the old.",
            hint=f"--frames {max(1, (found - 1) // CHUNK * CHUNK + 1)}",
            param=name,
        )
    for picture in pictures if isinstance(pictures, list | tuple) else []:
        check_image(name, picture)


def check_mask(mask: Any, frames: int) -> None:
    """A picture, or a clip at least as long as the video; arrays may have no colours."""
    if isinstance(mask, str | Path):
        from videogen.data.video import read_video

        local(mask, param="mask")
        mask = read_video(mask, limit=frames)[0]
        if len(mask) == 1:
            return
    shape = shape_of(mask)
    if shape is not None and len(shape) in (2, 3) and 3 not in (shape[0], shape[-1]):
        if len(shape) == 2 or shape[0] >= frames:
            return
        raise bad("mask", mask, f"a picture or at least {frames} of them", "mask=array of [H, W] or [F, H, W]")
    if hasattr(mask, "convert") or (shape is not None and len(shape) == 3):
        return
    check_video("mask", mask, frames)


def bad(param: str, value: Any, expected: str, hint: str) -> InvalidRequest:
    """An InvalidRequest about one value: what it is, what it should be, and an example."""
    return InvalidRequest(f"{param} is {short(value)}.", why=f"it is {expected}.", hint=hint, param=param)


def near_multiples(value: int, step: int, *, least: int | None = None) -> tuple[int, int]:
    """The multiples of `step` around `value`, the nearer first."""
    below = max(value // step * step, step if least is None else least)
    above = max(-(-value // step) * step, step if least is None else least)
    return (below, above) if value - below <= above - value else (above, below)


def is_int(value: Any) -> TypeGuard[int]:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def is_real(value: Any) -> TypeGuard[float]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def is_unicode(text: str) -> bool:
    """Whether it can be written down: half of a surrogate pair cannot, and no tokenizer takes it."""
    try:
        text.encode("utf-8")
        return True
    except UnicodeEncodeError:
        return False


def is_blank(value: Any) -> bool:
    return isinstance(value, str | list | tuple) and not any(value)


def shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of an array or tensor, None of anything else."""
    shape = getattr(value, "shape", None)
    try:
        return None if shape is None else tuple(int(n) for n in shape)
    except (TypeError, ValueError):
        return None


def short(value: Any) -> str:
    """A value in an error message: at most 60 characters, on one line."""
    shape = shape_of(value)
    if shape is not None:
        return f"an array of shape {list(shape)}"
    try:
        text = repr(value)
    except Exception:  # more digits than Python prints, or a stranger's own
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
