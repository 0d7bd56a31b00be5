"""Attention kernels by name, put into a model from outside. Asked for, one works or says why not.

| name      | what                                                    | by "auto" |
|-----------|---------------------------------------------------------|-----------|
| sdpa      | torch's own choice among its kernels                    | yes       |
| cudnn     | cuDNN's, through torch: CUDA, half precision            | on CUDA   |
| fa3       | FlashAttention 3 (package flash_attn_interface): Hopper | on CUDA   |
| flash     | torch's FlashAttention                                  | on CUDA   |
| efficient | torch's memory-efficient one: CUDA                      | on CUDA   |
| math      | matrix products and a softmax, for comparison           | never     |
| xformers  | its memory_efficient_attention: CUDA                    | never     |
| sage      | SageAttention, 8 bits: lossy                            | never     |
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from videogen.errors import InvalidRequest
from videogen.models.attention import Attention, Kernel, sdpa
from videogen.models.dit import DiT
from videogen.runtime.names import no_kernel

Shape = tuple[int, int, int, int]  # b k s c
MEASURED = ("sdpa", "cudnn", "fa3", "flash", "efficient")
CLEARLY = 0.97  # of the time of one named before it: what is no faster than that is left to chance, and runs repeat
FASTEST: dict[tuple[str, torch.dtype, Shape], str] = {}


def set_kernel(dit: DiT, name: str, *, shape: Shape | None = None) -> DiT:
    """Give every block of `dit` the kernel `name`, after trying it on the model's device and dtype; "sdpa" undoes it.

    "auto" takes the fastest of those that keep the numbers, measured once per device, dtype and `shape` (batch, heads,
    tokens, head dimension), or if there is none given whenever a shape first comes. On a CPU that is sdpa.

    Raises InvalidRequest if there is no such kernel, or it does not work here; the model is then as it was.
    """
    weight = next(dit.parameters())
    if name == "auto":
        kernel = _auto if shape is None else KERNELS[fastest(shape, weight.device, weight.dtype)]()
    elif name in KERNELS:
        kernel = KERNELS[name]()
        if found := problem(kernel, dit.config.attention_head_dim, weight.device, weight.dtype):
            raise InvalidRequest(
                f"the attention kernel {name!r} does not work for {weight.dtype} on {weight.device}.",
                why=found,
                hint="sdpa, torch's own, works everywhere",
            )
    else:
        raise no_kernel(name)
    for module in dit.modules():
        if isinstance(module, Attention):
            module.kernel = kernel
    return dit


def fastest(shape: Shape, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the fastest kernel for this shape that keeps the numbers; measured the first time."""
    if device.type != "cuda":
        return "sdpa"
    key = torch.cuda.get_device_name(device), dtype, shape
    if key not in FASTEST:
        times = measure(shape, device, dtype)
        best = MEASURED[0]
        for name in MEASURED[1:]:
            if times.get(name, float("inf")) < CLEARLY * times.get(best, float("inf")):
                best = name
        FASTEST[key] = best
    return FASTEST[key]


@torch.no_grad()
def measure(shape: Shape, device: torch.device, dtype: torch.dtype, *, repeats: int = 5) -> dict[str, float]:
    """Milliseconds per call of every kernel of `MEASURED` that works here, with q, k and v as a block gives them."""
    b, k, s, c = shape
    qkv = torch.randn(b, s, 3, k, c, device=device, dtype=dtype)
    q, k_, v = rearrange(qkv, "b s three k c -> three b k s c")
    times = {}
    for name in MEASURED:
        try:
            kernel = KERNELS[name]()
            if problem(kernel, c, device, dtype):
                continue
            kernel(q, k_, v)
            times[name] = statistics.median(_milliseconds(kernel, q, k_, v) for _ in range(repeats))
        except (InvalidRequest, RuntimeError):  # not installed; or not for this shape, out of memory among the reasons
            continue
    return times


def _milliseconds(kernel: Kernel, *qkv: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    kernel(*qkv)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _auto(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, heads, s, c = q.shape
    if q.device.type != "cuda":
        return sdpa(q, k, v)
    if torch.compiler.is_compiling():  # no place to measure
        known = FASTEST.get((torch.cuda.get_device_name(q.device), q.dtype, (b, heads, s, c)), "sdpa")
        return KERNELS[known]()(q, k, v)
    return KERNELS[fastest((b, heads, s, c), q.device, q.dtype)]()(q, k, v)


def problem(kernel: Kernel, head_dim: int, device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernel does not work here, or nothing."""
    probe = torch.zeros(1, 1, 8, head_dim, device=device, dtype=dtype)
    try:
        kernel(probe, probe, probe)
    except Exception as error:  # each library raises its own kinds
        return (str(error).strip().splitlines() or [f"it fails without a word ({type(error).__name__})"])[0]
    return ""


# ---- kernels --------------------------------------------------------------------------------------------------------


def _torch(backend: SDPBackend, *, cuda: bool = True) -> Callable[[], Kernel]:
    """One of torch's own kernels and no other."""

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if cuda and q.device.type != "cuda":
            raise RuntimeError("it computes on CUDA only")
        with sdpa_kernel(backend):
            return sdpa(q, k, v)

    return lambda: kernel


def _fa3() -> Kernel:
    """FlashAttention 3: Hopper, half precision."""
    attention = _from("flash_attn_interface", "flash_attn_func", "the wheel flash-attn-3 for this torch and CUDA")

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(*(rearrange(x, "b k s c -> b s k c") for x in (q, k, v)))
        return rearrange(out[0] if isinstance(out, tuple) else out, "b s k c -> b k s c")  # some builds add the sums

    return kernel


def _xformers() -> Kernel:
    """xformers' memory-efficient attention: CUDA, float16 or bfloat16."""
    attention = _from("xformers.ops", "memory_efficient_attention", 'pip install -e ".[xformers]"')

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (rearrange(x, "b k s c -> b s k c") for x in (q, k, v))
        return rearrange(attention(q, k, v), "b s k c -> b k s c")

    return kernel


def _sage() -> Kernel:
    """SageAttention in 8 bits: CUDA, half precision. It has no backward pass: where gradients are wanted, sdpa."""
    attention = _from("sageattention", "sageattn", "pip install sageattention")

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return sdpa(q, k, v)
        return attention(q, k, v, tensor_layout="HND", is_causal=False)

    return kernel


def _from(module: str, name: str, install: str) -> Any:
    """`name` of an optional package."""
    package = module.split(".")[0]
    if find_spec(package) is None:
        raise InvalidRequest(f"{package} is not installed.", why="it is optional.", hint=install)
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except (ImportError, OSError, AttributeError) as error:  # built for another torch or CUDA
        raise InvalidRequest(
            f"{package} is installed and cannot be loaded.",
            why=f"{error}".splitlines()[0],
            hint="a build for this torch and CUDA, or sdpa",
        ) from error


KERNELS: dict[str, Callable[[], Kernel]] = {
    "sdpa": lambda: sdpa,
    "cudnn": _torch(SDPBackend.CUDNN_ATTENTION),
    "fa3": _fa3,
    "flash": _torch(SDPBackend.FLASH_ATTENTION, cuda=False),
    "efficient": _torch(SDPBackend.EFFICIENT_ATTENTION),
    "math": _torch(SDPBackend.MATH, cuda=False),
    "xformers": _xformers,
    "sage": _sage,
}
