"""Clean latents on disk, so that what was denoised is not lost when decoding fails: safetensors with the recipe.

`<clip>.latents.safetensors` beside the clip it was to become holds one tensor, `latents` [f, c, h, w], and in its
metadata the recipe of the clip as JSON. `videogen decode` makes the clip of it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from videogen.data.files import LATENTS, local, written
from videogen.errors import FileError, InvalidRequest


def save_latents(clip: str | Path, latents: Float[Tensor, "f c h w"], recipe: dict[str, Any]) -> Path:
    """Write the latents of the clip that was to be `clip` beside it, under a name that is free, and return that.

    Raises FileError if the disk takes no more.
    """
    clip = clip_of(clip)
    names = (f"{clip.stem}{n}{clip.suffix}{LATENTS}" for n in ("", *(f"-{i}" for i in range(2, 10_000))))
    path = next(clip.parent / name for name in names if not (clip.parent / name).exists())
    data = save({"latents": latents.detach().cpu().contiguous()}, metadata={"videogen": json.dumps(recipe)})
    try:
        with written(path) as part:
            part.write_bytes(data)
    except OSError as error:
        raise FileError(
            f"{path} could not be written.", why=str(error), hint="free some disk space, or choose another --out"
        ) from error
    return path


def clip_of(out: str | Path) -> Path:
    """What a clip is called that is written as `out`: where that is the pattern of a folder's frames, after the folder.

    >>> clip_of("there/%03d.png").as_posix()
    'there.png'
    """
    out = Path(out)
    if "%" not in out.name:
        return out
    folder = out.parent if out.parent.name not in ("", "..") else Path(os.path.abspath(out.parent))
    return folder.parent / ((folder.name or "frames") + out.suffix)


def read_latents(path: str | Path) -> tuple[Float[Tensor, "f c h w"], dict[str, Any]]:
    """The latents of a file by `save_latents`, and the recipe of their clip."""
    path = local(path, param="latents")
    try:
        with safe_open(path, framework="pt") as file:
            latents = file.get_tensor("latents")
            recipe = json.loads((file.metadata() or {})["videogen"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InvalidRequest(
            f"{path} holds no latents of a clip.",
            why=f"it is damaged, or no file that videogen kept ({type(error).__name__}).",
            hint=f"a file whose name ends with {LATENTS}",
            param="latents",
        ) from error
    if latents.ndim != 4 or not latents.is_floating_point() or not isinstance(recipe, dict):
        raise InvalidRequest(
            f"{path} holds a tensor of shape {list(latents.shape)}.",
            why="latents of a clip are floats [f, c, h, w], with a recipe.",
            hint=f"a file whose name ends with {LATENTS}",
            param="latents",
        )
    if not bool(torch.isfinite(latents).all()):
        raise InvalidRequest(f"the latents in {path} are not finite.", hint="make the clip again.", param="latents")
    return latents, recipe
