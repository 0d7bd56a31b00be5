"""On what a model computes, and in what numbers: chosen by the weights' training and by what the device can do."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from videogen.errors import InvalidRequest, Note
from videogen.runtime.names import check_device, check_dtype

if TYPE_CHECKING:
    from videogen.weights.card import Card


def choose_device(device: str | torch.device) -> torch.device:
    """A CPU or a CUDA GPU that is there; "auto" is CUDA if torch finds one. Raises InvalidRequest for any other."""
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidRequest(
            f"there is no device {device!r}.", why="torch does not know it.", hint="cpu, cuda or cuda:1", param="device"
        ) from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise InvalidRequest(
            f"device {str(device)!r} was asked for and torch finds no such CUDA GPU.",
            why=f"torch {torch.__version__} sees {count} GPUs.",
            hint="--device cpu, or videogen doctor",
            param="device",
        )
    return chosen


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself. CUDA does from compute capability 8.0 (Ampere) on; before, torch
    imitates it, slower than float32."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def choose_dtype(
    dtype: str | torch.dtype, device: torch.device, card: Card, *, bfloat16: bool | None = None
) -> torch.dtype:
    """The dtype to compute in: one of `runtime.names.DTYPES`, by name or as torch has it, or "auto".

    "auto" is float32 on a CPU, and elsewhere what the weights were trained in (`card.dtypes`, bfloat16 if unknown): 2B
    in float16, all others in bfloat16. Where there is no bfloat16 (`bfloat16`, by default what the device says), such
    weights are computed in float32, not in float16, in which they overflow (zai-org/CogVideo issues 637, 593). float16
    may still be asked for: a Note warns, and no clip is written of what is not finite. Raises InvalidRequest for an
    unknown dtype, and for bfloat16 on a device without it.
    """
    has_bfloat16 = computes_bfloat16(device) if bfloat16 is None else bfloat16
    check_dtype(dtype)
    trained = card.trained_dtype
    if isinstance(dtype, str) and dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        if trained == "bfloat16" and not has_bfloat16:
            note = f"{card.name} is computed in float32, with twice the memory: the GPU has no bfloat16"
            warnings.warn(Note(note), stacklevel=2)
            return torch.float32
        return getattr(torch, trained)
    chosen = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if chosen == torch.bfloat16 and not has_bfloat16:
        raise InvalidRequest(
            "bfloat16 was asked for on a GPU without it.",
            why="its compute capability is below 8.0.",
            hint="--dtype float16" if trained == "float16" else "--dtype float32",
            param="dtype",
        )
    if chosen == torch.float16 and card.dtypes and "float16" not in card.dtypes:
        safe = trained if has_bfloat16 else "float32"
        note = f"{card.name} was trained in {trained} and may overflow in float16; --dtype {safe} does not"
        warnings.warn(Note(note), stacklevel=2)
    return chosen
