"""What a computation costs, counted instead of timed: FLOPs, bytes moved, operations, and the most bytes alive at once.

The numbers are exact and the same on every machine; on the meta device they take a moment and no memory, at full size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
WRITTEN_IN_PYTHON = torch._C.DispatchKey.CompositeImplicitAutograd  # for tracing: says nothing of what the kernel does
NOT_READ = ("copy_", "fill_", "zero_", "normal_", "uniform_")  # what they change is only written


@dataclass
class OpCounts:
    calls: int = 0
    flops: int = 0
    bytes: int = 0


@dataclass
class Counts:
    """`bytes` are inputs read and outputs written, each once per operation, as if nothing stayed in a cache."""

    flops: int = 0
    bytes: int = 0
    ops: int = 0
    peak_bytes: int = 0
    by_op: dict[str, OpCounts] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = sorted(self.by_op.items(), key=lambda row: -row[1].bytes)
        total = (
            f"{self.flops:.4g} FLOP, {self.bytes:.4g} bytes, {self.ops} operations, peak {self.peak_bytes:.4g} bytes"
        )
        return "\n".join([total, *(f"  {name:40}{op.calls:7}{op.flops:12.4g}{op.bytes:12.4g}" for name, op in rows)])


def count(fn: Callable[..., Any], *args: Any, held: Iterable[nn.Module | Tensor] = (), **kwargs: Any) -> Counts:
    """The counts of `fn(*args, **kwargs)`, which runs without gradients, on whatever device its tensors are.

    Views are free. FLOPs are those of matrix products, convolutions and attention (twice the multiplications), by
    `torch.utils.flop_counter`, where a new operation registers its formula. Attention and every custom operation count
    as one, whatever goes on inside: it reads its inputs and writes its outputs. An argument of a custom operation that
    is called `out…` and changed is written and not read.

    `peak_bytes` counts storages made by `fn`; those of `held` modules and tensors count too, for as long as they live
    (given as an iterator, they are not kept alive by being named here).
    """
    counter = _Counter()
    counter.hold(held)
    # In inference mode composite operations arrive whole, so that attention is seen before it falls apart.
    with torch.inference_mode(), counter:
        fn(*args, **kwargs)
    return counter.counts


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.formulas = FlopCounterMode(display=False).flop_registry
        self.alive: dict[int, tuple[int, weakref.ref]] = {}  # storage: its bytes, and who tells of its end
        self.alive_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "aten" and func is not ATTENTION and WRITTEN_IN_PYTHON not in func.py_kernels:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        read, changed = _read_and_changed(func, args, kwargs)
        known = {t.untyped_storage()._cdata for t in [*read, *changed]}
        made = [t for t in _tensors(result) if t.untyped_storage()._cdata not in known]
        for tensor in made:
            self.track(tensor)
        if (made or changed) and "empty" not in func.__name__:  # no view, and more than room for values
            self._add(func, args, kwargs, result, [*read, *made, *changed])
        return result

    def hold(self, items: Iterable[nn.Module | Tensor]) -> None:
        for item in items:
            for tensor in [item] if isinstance(item, Tensor) else [*item.parameters(), *item.buffers()]:
                self.track(tensor)

    def track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.alive[key] = size, weakref.ref(storage, lambda _: self._free(key))
        self.alive_bytes += size
        self.counts.peak_bytes = max(self.counts.peak_bytes, self.alive_bytes)

    def _free(self, key: int) -> None:
        self.alive_bytes -= self.alive.pop(key)[0]

    def _add(self, func, args, kwargs, result, moved: list[Tensor]) -> None:
        flops = 0
        if func is ATTENTION:
            flops = sdpa_flop_count(*(t.shape for t in args[:3]))
        elif func.overloadpacket in self.formulas:
            flops = self.formulas[func.overloadpacket](*args, **kwargs, out_val=result)
        op = self.counts.by_op.setdefault(str(func.overloadpacket), OpCounts())
        for total in (op, self.counts):
            total.flops += flops
            total.bytes += sum(map(_bytes, moved))
        op.calls += 1
        self.counts.ops += 1


def _read_and_changed(func, args, kwargs) -> tuple[list[Tensor], list[Tensor]]:
    read, changed = [], []
    for argument, value in _arguments(func, args, kwargs):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written:
            changed += _tensors(value)
        if not written or not (argument.name.startswith("out") or func._schema.name.endswith(NOT_READ)):
            read += _tensors(value)
    return read, changed


def _arguments(func, args, kwargs) -> Iterator[tuple[Any, Any]]:
    for place, argument in enumerate(func._schema.arguments):
        if place < len(args):
            yield argument, args[place]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Of the values a tensor addresses: an expanded axis is one value."""
    values = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        values *= size if stride or not size else 1
    return values * tensor.element_size()
