"""Weights on the device only while they are needed: a network for its stage, or a block for its turn.

The host keeps every weight where it was: mapped from its file, or pinned once blocks are streamed on CUDA. The copy on
the device is dropped by pointing the parameters back; nothing is ever copied back. With the CPU as the device, weights
are read from their files when a stage begins (and cast, if the file has another dtype), and let go when it ends.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from videogen.models.dit import DiT
from videogen.models.text import TextEncoder
from videogen.runtime.memory import Plan

Dtypes = Mapping[Tensor, torch.dtype]  # what a weight is cast to on its way to the device; others stay as they are
Network = nn.Module
ALIGNED = 256  # bytes: where a tensor may begin in a buffer, as CUDA's own allocations
PAGE = mmap.PAGESIZE
PAGEOUT = 21  # MADV_PAGEOUT of Linux: these pages will not be needed soon


@dataclass
class Stages:
    """Which network is on the device: all of them, or each for the time of `with stages.at_work(network)`."""

    plan: Plan
    device: torch.device
    dtypes: Dtypes = field(default_factory=dict)
    _working: dict[Network, tuple[int, ExitStack]] = field(default_factory=dict)

    @contextmanager
    def on_host(self, *networks: Network) -> Iterator[None]:
        """All weights, those parked too, on the host and in the dtypes they are used in: for saving."""
        with ExitStack() as stack:
            if self.plan.stages_in_turn:
                for network in networks:
                    stack.enter_context(on_device(network, "cpu", self.dtypes, parked=True))
            yield

    @contextmanager
    def at_work(self, network: Network) -> Iterator[None]:
        """May be nested; the network leaves the device with the outermost."""
        depth, stack = self._working.get(network) or (0, self._bring(network))
        self._working[network] = depth + 1, stack
        try:
            yield
        finally:
            depth, stack = self._working[network]
            self._working[network] = depth - 1, stack
            if depth == 1:
                del self._working[network]
                stack.close()

    def _bring(self, network: Network) -> ExitStack:
        """What takes the network off the device again, once it is there."""
        stack = ExitStack()
        if self.plan.stages_in_turn:
            stack.enter_context(on_device(network, self.device, self.dtypes, stream=self.plan.stream_blocks))
        return stack

    def change(self, plan: Plan, *networks: Network) -> None:
        """Go over to `plan`, in the middle of a stage too: who is at work goes on working under the new one.

        `networks` are all there are. Where they were always on the device, from now on they wait on the host.
        """
        for _, stack in self._working.values():
            stack.close()
        if plan.stages_in_turn and not self.plan.stages_in_turn:
            for network in networks:
                to_host(network)
        self.plan = plan
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        for network, (depth, _) in list(self._working.items()):
            self._working[network] = depth, self._bring(network)


@contextmanager
def on_device(
    network: Network,
    device: torch.device | str,
    dtypes: Dtypes | None = None,
    *,
    stream: bool = False,
    parked: bool = False,
) -> Iterator[None]:
    """The weights of `network` on `device` and in their dtypes; with `stream` its blocks one after the other.

    Weights that are parked on the host stay there, unless `parked`.
    """
    device, dtypes = torch.device(device), dtypes or {}
    blocks = blocks_of(network) if stream else []
    resident = spans(network, dtypes, without=blocks, parked=parked)
    try:
        with torch.inference_mode(mode=False):
            for span in resident:
                # What needs no cast is used where it lies if that is the device already.
                there = span.flat.to(device, span.dtype, copy=device.type != "cpu")
                span.point_to(there)
                if device.type == "cpu" and there is not span.flat:
                    release_pages([span.flat])
        if blocks:
            stream_blocks(network, device, dtypes)
        yield
    finally:
        if blocks:
            unstream(network)
        for span in resident:
            span.point_home()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the next stage wants its memory in other pieces
        elif device.type == "cpu":
            release_pages(list(tensors(network)))


@torch.inference_mode(mode=False)
def to_host(network: Network) -> None:
    """All weights to the host, for good; those that lie side by side still do."""
    for span in spans(network, {}):
        if span.flat.device.type != "cpu":
            span.point_to(span.flat.to("cpu"))


# ---- blocks in a stream ---------------------------------------------------------------------------------------------


def blocks_of(network: Network) -> Sequence[nn.Module]:
    """What of a network can be streamed: the layers that it calls one after the other."""
    if isinstance(network, DiT):
        return list(network.blocks)
    return list(network.encoder.encoder.block) if isinstance(network, TextEncoder) else []


@torch.inference_mode(mode=False)  # a weight is an ordinary tensor, whatever mode it is first used in
def stream_blocks(network: Network, device: torch.device | str, dtypes: Dtypes | None = None) -> Network:
    """From now on a block's weights are on `device` only while it runs; what is outside blocks stays where it is."""
    unstream(network)
    blocks = blocks_of(network)
    stream = Stream(blocks, torch.device(device), dtypes or {})
    if isinstance(network, DiT):
        network.each_block = stream.each  # type: ignore[assignment]
    else:
        for i, block in enumerate(blocks):
            stream.hooks += [
                block.register_forward_pre_hook(lambda *_, i=i: stream.take(i)),
                block.register_forward_hook(lambda *_, i=i: stream.leave(i)),
            ]
    network.stream = stream  # type: ignore[assignment]
    return network


def unstream(network: Network) -> Network:
    """The opposite of `stream_blocks`: blocks are plain again, with their weights on the host. Twice is once."""
    stream = network.__dict__.pop("stream", None)
    if stream is not None:
        stream.close()
        network.__dict__.pop("each_block", None)
    return network


class Stream:
    """Weights of blocks on their way through two buffers: block i computes in buffer i % 2 while i + 1 arrives."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, dtypes: Dtypes) -> None:
        self.blocks, self.device = blocks, device
        self.spans = [spans(block, dtypes) for block in blocks]
        if device.type == "cuda":
            self.spans = [pinned(block) for block in self.spans]
        size = max(layout(block)[1] for block in self.spans)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.holds: list[int | None] = [None, None]  # the block whose weights each buffer has
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.closed = False
        self.copies = None
        if device.type == "cuda":
            self.copies = torch.cuda.Stream(device)
            self.arrived = [torch.cuda.Event() for _ in range(2)]
            self.free = [torch.cuda.Event() for _ in range(2)]
            for event in self.free:
                event.record(torch.cuda.current_stream(device))

    def each(self) -> Iterator[nn.Module]:
        """The blocks in turn, each with its weights on the device while the caller has it."""
        for i, block in enumerate(self.blocks):
            self.take(i)
            try:
                yield block
            finally:
                self.leave(i)

    @torch.inference_mode(mode=False)
    def take(self, i: int) -> None:
        """Point block i to its buffer, and let the one after it come; after the last that is the first again."""
        self.bring(i)
        if self.copies is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived[i % 2])
        for span, piece in self.pieces(i):
            span.point_to(piece)
        after = (i + 1) % len(self.blocks)
        if after % 2 != i % 2:
            self.bring(after)

    def leave(self, i: int) -> None:
        """Point block i back to the host; what is asked of its buffer from now on waits for what was asked before."""
        if self.closed:
            return
        for span in self.spans[i]:
            span.point_home()
        if self.copies is not None:
            self.free[i % 2].record(torch.cuda.current_stream(self.device))

    def bring(self, i: int) -> None:
        if self.holds[i % 2] == i:
            return
        if self.copies is not None:
            self.copies.wait_event(self.free[i % 2])
        with torch.cuda.stream(self.copies) if self.copies is not None else nullcontext():
            for span, piece in self.pieces(i):
                piece.copy_(span.flat, non_blocking=True)
        if self.copies is not None:
            self.arrived[i % 2].record(self.copies)
        self.holds[i % 2] = i

    def pieces(self, i: int) -> Iterator[tuple[Span, Tensor]]:
        yield from cut(self.buffers[i % 2], self.spans[i])

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for block in self.spans:
            for span in block:
                span.point_home()
        if self.copies is not None:  # their memory may be given away as soon as the buffers are gone
            torch.cuda.current_stream(self.device).wait_stream(self.copies)
        self.closed, self.buffers = True, []


# ---- what travels ---------------------------------------------------------------------------------------------------


@dataclass
class Span:
    """A piece of a storage and the tensors that look at it, nearly always one. It travels whole, they keep their views.

    So weights that were packed side by side to be one matrix product arrive side by side.
    """

    tensors: list[Tensor]
    home: list[Tensor]  # what each of them pointed to
    flat: Tensor  # [n], all that they look at
    dtype: torch.dtype  # on the device

    @property
    def nbytes(self) -> int:
        return self.flat.numel() * self.dtype.itemsize

    def point_to(self, flat: Tensor) -> None:
        """`flat` is a copy of `self.flat`, elsewhere and in `dtype`."""
        shift = flat.storage_offset() - self.flat.storage_offset()
        for tensor, home in zip(self.tensors, self.home, strict=True):
            tensor.data = flat.as_strided(home.shape, home.stride(), home.storage_offset() + shift)

    def point_home(self) -> None:
        for tensor, home in zip(self.tensors, self.home, strict=True):
            tensor.data = home


def spans(network: nn.Module, dtypes: Dtypes, *, without: Iterable[nn.Module] = (), parked: bool = False) -> list[Span]:
    """All `tensors` of `network` but those below `without`."""
    left_out = {id(tensor) for module in without for tensor in tensors(module)}
    together: dict[tuple, list[Tensor]] = {}
    for tensor in tensors(network, parked=parked):
        if id(tensor) not in left_out and tensor.numel():
            dtype = dtypes.get(tensor, tensor.dtype)
            together.setdefault((tensor.untyped_storage()._cdata, tensor.dtype, dtype), []).append(tensor)
    found = []
    for (_, _, dtype), group in together.items():
        home = [tensor.data for tensor in group]
        start = min(t.storage_offset() for t in home)
        stop = max(t.storage_offset() + _extent(t) for t in home)
        found.append(Span(group, home, home[0].as_strided((stop - start,), (1,), start), dtype))
    return found


def tensors(network: nn.Module, *, parked: bool = False) -> Iterator[Tensor]:
    """Parameters and buffers, each once; those of modules marked `parked`, which stay on the host, only if asked."""
    seen = set()
    for module in network.modules():
        if getattr(module, "parked", False) and not parked:
            continue
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def layout(block: list[Span]) -> tuple[list[int], int]:
    """Where in a buffer each span of a block begins, and the bytes of all."""
    starts, end = [], 0
    for span in block:
        starts.append(end)
        end += -(-span.nbytes // ALIGNED) * ALIGNED
    return starts, end


def cut(buffer: Tensor, block: list[Span]) -> Iterator[tuple[Span, Tensor]]:
    """Each span of a block with its piece of a buffer of bytes."""
    for span, start in zip(block, layout(block)[0], strict=True):
        yield span, buffer[start : start + span.nbytes].view(span.dtype)


def pinned(block: list[Span], *, pin_memory: bool = True) -> list[Span]:
    """A block's weights packed into page-locked memory, from where copies run beside computation; once is enough."""
    if all(span.flat.is_pinned() for span in block):
        return block
    block = sorted(block, key=lambda span: str(span.dtype))  # the next time each dtype is one span
    buffer = torch.empty(layout(block)[1], dtype=torch.uint8, pin_memory=pin_memory)
    for span, piece in cut(buffer, block):
        piece.copy_(span.flat)
        span.point_to(piece)
        span.home, span.flat = [tensor.data for tensor in span.tensors], piece
    return block


def _extent(tensor: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


# ---- pages ----------------------------------------------------------------------------------------------------------


def release_pages(weights: Sequence[Tensor]) -> None:
    """Tell the kernel that the pages of weights mapped from files are not needed for now. Linux; elsewhere nothing.

    They are read again when they are touched. Pages that were written to are no longer the file's, and stay.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    lines = [line.split()[0].split("-") for line in maps.read_text().splitlines() if ".safetensors" in line]
    files = [(int(low, 16), int(high, 16)) for low, high in lines]
    for weight in weights:
        start, stop = weight.data_ptr(), weight.data_ptr() + weight.nbytes
        if any(low <= start and stop <= high for low, high in files):
            start = start // PAGE * PAGE
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), PAGEOUT)
