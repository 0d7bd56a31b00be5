"""The one place that says in which order optional things enter a model: rows, 8 bits, kernel, modulation, compiler."""

from __future__ import annotations

from videogen.models.dit import DiT
from videogen.models.vae import VAE
from videogen.runtime.attention8 import restore_attention, set_attention8
from videogen.runtime.compile import compile_blocks, uncompile_blocks
from videogen.runtime.dit import fast_dit, plain_dit
from videogen.runtime.kernels import set_kernel
from videogen.runtime.modulation import cache_modulation, plain_modulation
from videogen.runtime.offload import Stages
from videogen.runtime.quantize import quantize as quantize_maps
from videogen.runtime.quantize import restore
from videogen.runtime.vae import fast_vae, plain_vae

LOSSY_KERNELS = ("int8", "sage")


def prepare(
    dit: DiT,
    vae: VAE,
    stages: Stages,
    *,
    rows: bool = True,
    kernel: str = "auto",
    quantize: str | None = None,
    compile: bool = False,
) -> None:
    """Make both networks fast for inference, in place. Gradients still take the plain way.

    stages    the device and memory plan they will work with
    rows      the fast rows of both; without them a small network is faster on a CPU (docs/benchmarks), and larger
    kernel    a row of `runtime.kernels`, or the lossy "int8" (`runtime.attention8`)
    quantize  None, or the linear maps of the blocks in "fp8" or "int8" (lossy, `runtime.quantize`)
    compile   `torch.compile` for the blocks, when they are first called

    What comes later wraps what is there: rows, 8-bit maps, kernel, modulation, compiler. LoRAs (`models.lora`) come
    before; a step cache and many devices (`distributed.parallel`) come after, weights that stream (`runtime.offload`)
    when a clip begins.
    """
    unprepare(dit, vae)
    plan = stages.plan
    if rows:
        fast_vae(vae, strips=plan.vae_strips, caches_on_host=plan.caches_on_host)
        fast_dit(dit)
    with stages.at_work(dit.patch_embed):  # a kernel is tried where its first weight is: on the device
        if quantize is not None:
            quantize_maps(dit, quantize)
        set_kernel(dit, "auto" if kernel == "int8" else kernel)
        if kernel == "int8":
            set_attention8(dit)
    cache_modulation(dit)
    if compile:
        compile_blocks(dit)


def unprepare(dit: DiT, vae: VAE) -> None:
    """Undo `prepare`: the plain model of `videogen.models`, bit for bit."""
    uncompile_blocks(dit)
    plain_modulation(dit)
    restore_attention(dit)
    set_kernel(dit, "sdpa")
    restore(dit)
    plain_dit(dit)
    plain_vae(vae)
