"""What made a clip, as JSON inside it, and the way back from there to a request. Imports no torch.

The recipe holds what equal frames need and no more: the settings, the model by name and fingerprint, the versions, the
kind of device, and the pictures that conditioned it. No paths, no environment.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from videogen.errors import FileError, InvalidRequest
from videogen.request import Request

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


def fingerprint(folder: Path, file: Path | None = None) -> str | None:
    """One hash for the weights of a model folder, and of a single file in their place; None where there are none.

    Of each safetensors file: its size, its head (names and shapes), and 64 blocks spread over it. Gigabytes take
    milliseconds, and weights that were trained on differ everywhere. It is no seal: a sha256 of all bytes is.
    """
    files = [file] if file else []
    for name in COMPONENTS:
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


def unknown_settings(recipe: dict[str, Any]) -> list[str]:
    """Names that this version does not know: a later one made the clip."""
    return sorted(set(recipe) - {f.name for f in fields(Request)} - BESIDE)


def request_of(recipe: dict[str, Any], images: Path | None = None) -> tuple[Request, int | None]:
    """The request that a recipe tells of, unchecked, and of a batch the place of the clip.

    Pictures come from the folder `images`, found by the sha256 of their files, or else out of the recipe. A batch with
    seeds of its own is filled with this clip: the others do not touch its numbers, their count does. Raises
    InvalidRequest for what is neither embedded nor found, or is not what it was.
    """
    values = {f.name: recipe[f.name] for f in fields(Request) if f.name in recipe and f.name != "snap"}  # it was done
    if images is not None and not images.is_dir():
        raise InvalidRequest(
            f"{images} is no folder.", why="pictures are looked for in it.", hint="--images FOLDER", param="images"
        )
    here = {sha256_of(path): path for path in sorted(images.iterdir())} if images else {}

    def found(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [found(name, one) for one in value]
        if isinstance(value, dict):
            return {int(index): found(name, one) for index, one in value.items()}
        if not str(value).startswith("sha256:"):
            return value
        if value.removeprefix("sha256:") in here:
            return here[value.removeprefix("sha256:")]
        if value in (recipe.get("images") or {}):
            return _unpacked(name, recipe["images"][value])
        is_file = name in (*PICTURES, "video", "control_video", "mask")
        raise InvalidRequest(
            f"the {name} of this clip is not here.",
            why=f"the recipe has only its {value[:19]}…" + (f", and {images} does not hold it." if images else "."),
            hint="--images FOLDER, where the original is" if is_file else "give it in Python: it was an array.",
            param=name,
        )

    for name in values:
        if name not in ("prompt", "negative_prompt"):
            values[name] = found(name, values[name])
    item, size = recipe.get("item"), recipe.get("batch_size", 1)
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


def sha256_of(path: Path) -> str:
    """Of a file's bytes, or of a folder's files in order: the name that `Request.recipe` gives to a path."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
