"""What this machine can do at best: products, attention, convolutions, copies. Rates that times are held against.

Values are random: a GPU draws less power on zeros, and runs faster than it would on a model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import first_line, seconds

ATTENTION_SHAPES = {  # (batch, heads, tokens) at head dimension 64
    "cuda": [(1, 48, 17776), (2, 48, 17776), (1, 30, 17776), (2, 30, 17776), (1, 48, 45106)],
    "cpu": [(2, 48, 1378)],
}
CONVOLUTIONS = {  # (channels, frames, height, width), of the VAE decoder's last two levels
    "cuda": [(128, 10, 480, 720), (256, 10, 240, 360)],
    "cpu": [(128, 5, 64, 96), (256, 5, 32, 48)],
}
DTYPE = torch.bfloat16
GEMMS = {"cuda": [(8192, 8192, 8192), (35552, 3072, 12288), (35552, 12288, 3072)], "cpu": [(2756, 3072, 3072)]}


def rate(run: Callable[[], Any], work: float, device: torch.device, repeats: int = 5) -> float:
    """Work per second, by the median of a few runs after two that warm up."""
    for _ in range(2):
        run()
    times = [seconds(run, device) for _ in range(repeats)]
    return work / statistics.median(t.wall if device.type == "cuda" else t.cpu / torch.get_num_threads() for t in times)


def normal(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=DTYPE)


@torch.no_grad()
def products(device: torch.device, small: bool = False) -> Iterator[dict[str, Any]]:
    for m, k, n in [(64, 64, 64)] if small else GEMMS[device.type]:
        x, w = normal(m, k, device=device), normal(n, k, device=device)
        yield {"what": f"product {m} x {k} x {n}", "tflops": rate(lambda: F.linear(x, w), 2 * m * k * n, device) / 1e12}  # noqa: B023

        if device.type == "cuda":
            yield {"what": f"float8 product {m} x {k} x {n}, scaled by rows"} | float8_rate(x, w)


def float8_rate(x: Tensor, w: Tensor) -> dict[str, Any]:
    """Of the product alone; its inputs are quantised before."""
    (m, k), n = x.shape, w.shape[0]
    eight = [(v / v.abs().amax(1, keepdim=True) * 448).to(torch.float8_e4m3fn) for v in (x, w)]
    ones = torch.ones(m, 1, device=x.device), torch.ones(1, n, device=x.device)

    def run() -> Tensor:
        return torch._scaled_mm(eight[0], eight[1].T, *ones, out_dtype=torch.bfloat16)

    try:
        return {"tflops": rate(run, 2 * m * k * n, x.device) / 1e12}
    except Exception as problem:
        return {"note": first_line(problem)}


def attention_kernels(device: torch.device) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def by(backend: SDPBackend | None):
        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend) if backend is not None else nullcontext():
                return F.scaled_dot_product_attention(q, k, v)

        return kernel

    kernels = {"sdpa, torch's choice": by(None)}
    if device.type == "cuda":
        kernels["flash"] = by(SDPBackend.FLASH_ATTENTION)
        kernels["cudnn"] = by(SDPBackend.CUDNN_ATTENTION)
        kernels["efficient"] = by(SDPBackend.EFFICIENT_ATTENTION)
        for module in ("flash_attn_interface", "flash_attn_3.flash_attn_interface"):
            if _can_find(module):
                kernels["fa3"] = _fa3(module)
                break
    return kernels


def _can_find(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _fa3(module: str):
    from importlib import import_module

    flash_attn_func = import_module(module).flash_attn_func

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return kernel


@torch.no_grad()
def attention(device: torch.device, small: bool = False) -> Iterator[dict[str, Any]]:
    """The table of kernels at head dimension 64: TFLOP/s, and the error to float32 where that is affordable."""
    for b, h, s in [(1, 2, 32)] if small else ATTENTION_SHAPES[device.type]:
        q, k, v = (normal(b, h, s, 64, device=device) for _ in range(3))
        few = [x[:1, :1].float() for x in (q[:, :, :256], k, v)]  # of one head, 256 queries
        reference = F.scaled_dot_product_attention(*few)
        for name, kernel in attention_kernels(device).items():
            row: dict[str, Any] = {"what": f"attention {b} x {h} x {s} x 64", "kernel": name}
            try:
                row["tflops"] = rate(lambda: kernel(q, k, v), 4 * b * h * s * s * 64, device) / 1e12  # noqa: B023
                off = kernel(q, k, v)[:1, :1, :256].float() - reference
                row["error"] = float(off.square().mean().sqrt() / reference.square().mean().sqrt())
            except Exception as problem:
                row["note"] = first_line(problem)
            yield row


@torch.no_grad()
def convolutions(device: torch.device, small: bool = False) -> Iterator[dict[str, Any]]:
    """3x3x3 in both memory layouts, with and without bias."""
    for c, f, h, w in [(8, 3, 8, 8)] if small else CONVOLUTIONS[device.type]:
        weight, bias = normal(c, c, 3, 3, 3, device=device), normal(c, device=device)
        x = normal(1, c, f, h, w, device=device)
        work = 2 * c * c * 27 * (f - 2) * h * w
        for layout, memory_format in (("NCDHW", torch.contiguous_format), ("NDHWC", torch.channels_last_3d)):
            weight, x = weight.to(memory_format=memory_format), x.to(memory_format=memory_format)
            for term in (None, bias):
                row: dict[str, Any] = {
                    "what": f"convolution {c} channels, {f} x {h} x {w}",
                    "layout": layout,
                    "bias": term is not None,
                }
                try:
                    run = lambda: F.conv3d(x, weight, term, padding=(0, 1, 1))  # noqa: E731, B023
                    row["tflops"] = rate(run, work, device) / 1e12
                except Exception as problem:
                    row["note"] = first_line(problem)
                yield row


@torch.no_grad()
def copies(device: torch.device, small: bool = False) -> Iterator[dict[str, Any]]:
    """GB/s, counting what is read and what is written; between host and device what crosses."""
    size = 2**20 if small else 2**31 if device.type == "cuda" else 2**28
    a = torch.empty(size, dtype=torch.uint8, device=device).random_()
    b = torch.empty_like(a)
    yield {"what": "copy", "gbps": rate(lambda: b.copy_(a), 2 * size, device) / 1e9}
    if device.type != "cuda":
        return
    del b
    for pinned in (True, False):
        host = torch.empty(size // 2, dtype=torch.uint8, pin_memory=pinned)
        there, kind = a[: size // 2], "pinned" if pinned else "pageable"
        yield {
            "what": f"host to device, {kind}",
            "gbps": rate(lambda: there.copy_(host, non_blocking=True), size / 2, device) / 1e9,  # noqa: B023
        }
        yield {
            "what": f"device to host, {kind}",
            "gbps": rate(lambda: host.copy_(there, non_blocking=True), size / 2, device) / 1e9,  # noqa: B023
        }


KINDS = {"products": products, "attention": attention, "convolutions": convolutions, "copies": copies}


def best(rows: list[dict[str, Any]], kind: str) -> float:
    """FLOP/s of the fastest row of a kind: the rate that `floor_seconds` divides by."""
    rates = [row["tflops"] for row in rows if row["what"].startswith(kind) and "tflops" in row]
    return 1e12 * max(rates)


def floor_seconds(flops: dict[str, float], rows: list[dict[str, Any]]) -> float:
    """The least time for this work at the best rates measured here; everything else counts as free."""
    return sum(work / best(rows, kind) for kind, work in flops.items() if work)


def by_kind(counts: Any) -> dict[str, float]:
    """FLOPs of `Counts` as products, attention and convolutions."""
    kinds = {"product": 0.0, "attention": 0.0, "convolution": 0.0}
    for name, op in counts.by_op.items():
        kind = "attention" if "attention" in name else "convolution" if "conv" in name else "product"
        kinds[kind] += op.flops
    return kinds
