"""Attention kernels by name, put into a model from outside. Asked for, one works or says why not; none is automatic."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from einops import rearrange
from torch import Tensor

from videogen.errors import InvalidRequest
from videogen.models.attention import Attention, Kernel, sdpa
from videogen.models.dit import DiT


def set_kernel(dit: DiT, name: str) -> DiT:
    """Give every block of `dit` the kernel `name`, after trying it on the model's device and dtype.

    Raises InvalidRequest if there is no such kernel, or it does not work here; the model is then as it was.
    """
    if name not in KERNELS:
        raise InvalidRequest(f"there is no attention kernel {name!r}.", hint=f"one of {', '.join(KERNELS)}")
    kernel = KERNELS[name]()
    weight = next(dit.parameters())
    probe = torch.zeros(1, 1, 8, dit.config.attention_head_dim, device=weight.device, dtype=weight.dtype)
    try:
        kernel(probe, probe, probe)
    except Exception as error:  # each library raises its own kinds
        raise InvalidRequest(
            f"the attention kernel {name!r} does not work for {weight.dtype} on {weight.device}.",
            why=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}",
            hint="sdpa, torch's own, works everywhere",
        ) from error
    for module in dit.modules():
        if isinstance(module, Attention):
            module.kernel = kernel
    return dit


def _xformers() -> Kernel:
    """xformers' memory-efficient attention: CUDA, float16 or bfloat16."""
    if find_spec("xformers") is None:
        raise InvalidRequest(
            "xformers is not installed.", why="it is an optional extra.", hint='pip install "videogen[xformers]"'
        )
    try:
        from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]
    except (ImportError, OSError) as error:  # built for another torch or CUDA
        raise InvalidRequest(
            "xformers is installed and cannot be loaded.",
            why=f"{error}".splitlines()[0],
            hint="a build for this torch and CUDA, or sdpa",
        ) from error

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (rearrange(x, "b k s c -> b s k c") for x in (q, k, v))
        return rearrange(memory_efficient_attention(q, k, v), "b s k c -> b k s c")

    return kernel


KERNELS: dict[str, Callable[[], Kernel]] = {"sdpa": lambda: sdpa, "xformers": _xformers}
