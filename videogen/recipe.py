"""What made a clip, as JSON inside it, and the way back from there to a request. Imports no torch.

The recipe holds what equal frames need and no more: the settings, the model by name and fingerprint, the versions, the
kind of device, and the pictures that conditioned it. No paths, no environment.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeGuard

from videogen.checks import MOST_PROMPTS, is_int, is_real, short
from videogen.data.files import sha256_of
from videogen.errors import FileError, InvalidRequest
from videogen.request import FILES, Request

LARGEST = 2 << 20  # bytes of a picture inside a clip; a larger one is found by its sha256
SAMPLES, BLOCK = 64, 4096  # how much of each file of weights the fingerprint looks at
COMPONENTS = ("transformer", "vae", "text_encoder")
VARIANT = re.compile(r"\.(fp16|bf16|fp32|non_ema|ema)\b")
PICTURES = ("first_frame", "last_frame", "keyframes")


# Into the recipe


def request_facts(request: Request, item: int) -> dict[str, Any]:
    """`Request.recipe(item)` with the pictures, and of a clip from a batch its size and the place.

    A clip of a batch is equal only in a batch of the same shape, also where it has a seed of its own.
    """
    facts = request.recipe(item)
    if request.batch_size > 1:
        facts |= {"batch_size": request.batch_size, "item": item}
    if images := embedded(request, facts, item):
        facts["images"] = images
    return facts


def embedded(request: Request, recipe: dict[str, Any], item: int) -> dict[str, dict[str, str]]:
    """The known frames as they were conditioned on, at the clip's size, by the sha256 that `recipe` knows them by.

    Lossless WebP: a JPEG is another picture, which makes another clip. One that bytes cannot hold (floats that were not
    rounded) or that is too large is left out. `pixels` is the sha256 of the uint8 values [H, W, 3].
    """
    from videogen.data.video import fit_image, to_uint8

    _, height, width = request.size
    found: dict[str, dict[str, str]] = {}
    for name, image in _conditions(request, recipe, item):
        if name in found:
            continue
        wanted = fit_image(image, height, width, request.fit)
        picture = to_uint8((wanted.transpose(1, 2, 0) + 1) / 2)
        data = _webp(picture)
        if len(data) <= LARGEST and (fit_image(picture, height, width) == wanted).all():
            found[name] = {"pixels": _sha256(picture.tobytes()), "webp": base64.b64encode(data).decode()}
    return found


def _conditions(request: Request, recipe: dict[str, Any], item: int) -> Iterator[tuple[str, Any]]:
    """(sha256:… of the recipe, image) of every known frame that the recipe names."""
    for name in ("first_frame", "last_frame"):
        yield from _pairs(recipe.get(name), getattr(request, name), item)
    for index, image in (request.keyframes or {}).items():
        yield from _pairs(recipe["keyframes"][str(index)], image, item)


def _pairs(said: Any, given: Any, item: int) -> Iterator[tuple[str, Any]]:
    if said is None:
        return
    if isinstance(said, list):  # a whole batch
        for one, image in zip(said, given, strict=True):
            yield from _pairs(one, image, item)
    else:
        yield said, given[item] if isinstance(given, list | tuple) else given


def _webp(picture: Any) -> bytes:
    """uint8 [H, W, 3], lossless."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(picture).save(data, "WEBP", lossless=True)
    return data.getvalue()


def without_images(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe for people: the pictures inside it by name only."""
    if not isinstance(recipe.get("images"), dict):
        return recipe
    return recipe | {"images": list(recipe["images"])}


def fingerprint(folder: Path, file: Path | None = None, components: Collection[str] = COMPONENTS) -> str | None:
    """One hash for the weights of a model folder, and of a single file with the `components` that it lacks; None where
    there are none.

    Of each safetensors file: its size, its head (names and shapes), and 64 blocks spread over it. Gigabytes take
    milliseconds, and weights that were trained on differ everywhere. It is no seal: a sha256 of all bytes is.
    """
    files = [file] if file else []
    for name in (name for name in COMPONENTS if name in components):
        found = sorted((folder / name).glob("*.safetensors"))
        files += [path for path in found if not VARIANT.search(path.name)] or found
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{'' if path == file else path.parent.name}/{size}\n".encode())
        with path.open("rb") as data:
            for k in range(SAMPLES):
                data.seek((size - min(size, BLOCK)) * k // (SAMPLES - 1))
                digest.update(data.read(BLOCK))
    return digest.hexdigest() if files else None


# Back to a request

BESIDE = {  # what is in a recipe and no field of Request
    *("videogen", "model", "revision", "dtype", "quantize", "kernel", "transformer_sha256", "weights", "made_with"),
    *("images", "item", "batch_size", "windows", "extends", "decode_dtype", "lora", "post"),
    *("row", "request_sha256"),
    *("original_prompt", "enhanced_prompt", "enhanced_by", "style"),
}

Kind = tuple[str, Callable[[Any], bool]]  # what a value is, in words and as a question


def _many(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: all(map(is_one, value)) if isinstance(value, list) else is_one(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and value.startswith("sha256:")


def _are_entries(value: Any, **kinds: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(is_kind(value.get(name)) for name, is_kind in kinds.items())


def _are_images(value: Any) -> bool:
    return isinstance(value, dict) and all(_are_entries(one, webp=_is_text, pixels=_is_text) for one in value.values())


def _are_frames(value: Any) -> bool:
    places = isinstance(value, dict) and all(re.fullmatch(r"[0-9]{1,9}", index) for index in value)
    return places and all(map(_many(_is_name), value.values()))


def _is_lora(value: Any) -> bool:
    return _are_entries(value, file=_is_text, sha256=_is_text, scale=lambda x: is_real(x) or _is_text(x))


def _up_to(most: int, least: int = 0) -> Callable[[Any], bool]:
    return lambda value: is_int(value) and least <= value <= most


KINDS: dict[str, Kind] = {
    **dict.fromkeys(("prompt", "negative_prompt"), ("a text, or a list of texts", _many(_is_text))),
    **dict.fromkeys(("original_prompt", "enhanced_prompt", "enhanced_by", "style"), ("a text", _is_text)),
    **dict.fromkeys(("model", "revision", "weights", "transformer_sha256"), ("a text", _is_text)),
    **dict.fromkeys(("dtype", "quantize", "kernel", "memory", "device"), ("a text", _is_text)),
    **dict.fromkeys(FILES, ("the sha256:… of a file", _many(_is_name))),
    "keyframes": ("the sha256:… of images by frame index", _are_frames),
    "images": ("a table of pictures", _are_images),
    "lora": ("a list of files", lambda value: isinstance(value, list) and all(map(_is_lora, value))),
    "made_with": ("a table", lambda value: isinstance(value, dict)),
    **dict.fromkeys(("compile", "merge_lora"), ("true or false", lambda value: isinstance(value, bool))),
    "threads": ("a number from 1 to 1024", _up_to(1024, 1)),
    "fps": ("a number from 0.1 to 240", lambda value: is_real(value) and 0.1 <= value <= 240),
    "seed": ("a whole number, or a list of them", _many(_up_to(2**63 - 1))),
    **dict.fromkeys(("height", "width", "num_frames", "num_inference_steps"), ("a whole number", is_int)),
    **dict.fromkeys(("strength", "last_frame_until", "guidance_until", "guidance_scale"), ("a number", is_real)),
    "step_cache": ("a number", is_real),
    **dict.fromkeys(("fit", "sampler", "uncond", "image_latent_scale"), ("a text", _is_text)),
    "use_dynamic_cfg": ("a text, true or false", lambda value: isinstance(value, bool | str)),
    "batch_size": (f"a number from 1 to {MOST_PROMPTS}", _up_to(MOST_PROMPTS, 1)),
    "item": ("a place in a batch", _up_to(MOST_PROMPTS)),
}


def checked(recipe: dict[str, Any], names: Collection[str] | None = None) -> dict[str, Any]:
    """The recipe as it may be used: anybody may have written it. `names`: only these are asked about.

    Each value is of its kind, files are named by their sha256 and never by a path, and nothing is there that only a
    caller may say. Raises InvalidRequest.
    """
    made_with = recipe.get("made_with")
    for values in (recipe, made_with if isinstance(made_with, dict) else {}):
        for name, value in values.items():
            words, is_kind = KINDS.get(name, ("", bool))
            if words and value is not None and (names is None or name in names) and not is_kind(value):
                raise _not_of_kind(name, value, words)
    if names is None:
        if told := sorted(UNTOLD & {*recipe}):
            raise _not_of_kind(told[0], recipe[told[0]], "the caller's to say, and in no recipe")
        _check_batch(recipe)
    return recipe


UNTOLD = {"on_step", "output", "out", "keep_latents"}  # of a request, and of no recipe


def _check_batch(recipe: dict[str, Any]) -> None:
    """A clip of a batch says which one it is; lists are as long as the batch."""
    prompt, size, item = recipe.get("prompt"), recipe.get("batch_size") or 1, recipe.get("item")
    count = len(prompt) if isinstance(prompt, list) else size
    if (item is None) != (count == 1) or (item or 0) >= count or (isinstance(prompt, list) and size not in (1, count)):
        raise _not_of_kind("item", item, f"a place in a batch of {count}" if count > 1 else "for a batch of several")
    for name in ("negative_prompt", "seed"):
        if isinstance(value := recipe.get(name), list) and len(value) != count:
            raise _not_of_kind(name, value, f"one, or a list of {count}")


def _not_of_kind(name: str, value: Any, words: str) -> InvalidRequest:
    return InvalidRequest(
        f"the {name} in this recipe is {short(value)}.",
        why=f"it is {words}: the recipe was changed, or another program wrote it.",
        hint="videogen info CLIP, which shows it; then text-to-video",
        param=name,
    )


def unknown_settings(recipe: dict[str, Any]) -> list[str]:
    """Names that this version does not know: a later one made the clip."""
    return sorted(set(recipe) - {f.name for f in fields(Request)} - BESIDE)


def request_of(recipe: dict[str, Any], images: Path | None = None) -> tuple[Request, int | None]:
    """The request that a `checked` recipe tells of, itself unchecked, and of a batch the place of the clip.

    Pictures come from the folder `images`, found by the sha256 of their files, or else out of the recipe. A batch with
    seeds of its own is filled with this clip: the others do not touch its numbers, their count does. Raises
    InvalidRequest for what is neither embedded nor found, or is not what it was.
    """
    recipe = checked(recipe)
    values = {f.name: recipe[f.name] for f in fields(Request) if f.name in recipe and f.name != "snap"}  # it was done
    if images is not None and not images.is_dir():
        raise InvalidRequest(
            f"{images} is no folder.", why="pictures are looked for in it.", hint="--images FOLDER", param="images"
        )
    here = {sha256_of(path): path for path in sorted(images.iterdir())} if images else {}

    def found(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [found(name, one) for one in value]
        if isinstance(value, dict) and name == "keyframes":
            return {int(index): found(name, one) for index, one in value.items()}
        if not _is_name(value):
            return value
        if value.removeprefix("sha256:") in here:
            return here[value.removeprefix("sha256:")]
        if value in (recipe.get("images") or {}):
            return _unpacked(name, recipe["images"][value])
        raise InvalidRequest(
            f"the {name} of this clip is not here.",
            why=f"the recipe has only its {value[:19]}…" + (f", and {images} does not hold it." if images else "."),
            hint="--images FOLDER, where the original is" if name in FILES else "give it in Python: it was an array.",
            param=name,
        )

    for name in (*FILES, "prompt_embeds", "negative_prompt_embeds", "latents"):
        if name in values:
            values[name] = found(name, values[name])
    item, size = recipe.get("item"), recipe.get("batch_size") or 1
    if size > 1 and not isinstance(values.get("prompt"), list) and values.get("prompt_embeds") is None:
        values |= {"prompt": [values.get("prompt", "")] * size, "seed": [values.get("seed", 0)] * size}
    return Request(values.pop("prompt", None), **values), item


def _unpacked(name: str, entry: dict[str, str]) -> Any:
    """The picture inside a recipe as uint8 [H, W, 3], if it is still the one that was put there."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(base64.b64decode(entry["webp"], validate=True)), formats=["WEBP"]) as file:
            picture = np.asarray(file.convert("RGB"))
    except Exception as error:
        raise FileError(
            f"the {name} inside this clip cannot be read.", why=str(error), hint="--images FOLDER, with the original"
        ) from error
    if _sha256(picture.tobytes()) != entry.get("pixels"):
        raise InvalidRequest(
            f"the {name} inside this clip is not the one that made it.",
            why="its sha256 differs: the recipe was changed.",
            hint="--images FOLDER, with the original",
            param=name,
        )
    return picture


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
