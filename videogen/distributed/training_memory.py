"""What a training step of a DiT needs of each process's memory, before anything is loaded.

What lasts (weights, averages, the optimiser's numbers) is counted from shapes. What comes and goes is counted by
running the step itself, forward and backward, on tensors without values, with two blocks and with three: all blocks
need the same. So checkpointing, autocast's copies and attention's own are in the figure as the real step has them.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from videogen.config import DiTConfig, FitConfig
from videogen.distributed.checkpointing import set_checkpointing
from videogen.distributed.mesh import part_sizes
from videogen.distributed.sequence import take_part
from videogen.distributed.training import MESSAGE
from videogen.models.dit import DiT
from videogen.types import Conditioning, Tokens

Network = Callable[[int], DiT]  # with so many blocks, on the meta device; what learns requires gradients


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process at the fullest moment of a step.

    weights      the network's, in the optimiser's precision
    averages     their moving averages
    optimizer    moments
    gradients    of all that learns
    gathered     of a sharded network: the blocks that are whole for a moment, and their gradients
    activations  what the backward pass needs, the work in it included; or a message of gradients, if that is more
    """

    weights: int
    averages: int
    optimizer: int
    gradients: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def step_memory(
    network: Network,
    config: DiTConfig,
    shape: tuple[int, int, int],
    fit: FitConfig,
    *,
    samples: int = 1,
    micro_batches: int = 1,
    processes: int = 1,
    averaged: bool = True,
) -> StepMemory:
    """The memory of a step on each of `processes`: of `micro_batches`, each of `samples` latents of `shape` (f, h, w).

    network   what is trained, by its number of blocks, such as `lambda layers: DiT(replace(config, num_layers=layers))`
              on the meta device. What is frozen in half precision is counted as such
    averaged  a moving average is kept of all that learns
    Python, torch and its libraries, the frozen text encoder and the VAE are not in it.
    """
    shard = fit.parallel.shard or processes
    whole = network(config.num_layers)
    lasting = {"weights": 0, "averages": 0, "optimizer": 0, "gradients": 0}
    for name, value in [*whole.named_parameters(), *whole.named_buffers()]:
        own = value.itemsize * own_part(value, shard)
        lasting["weights"] += own
        if value.requires_grad:
            lasting["averages"] += own * averaged
            lasting["gradients"] += own
            lasting["optimizer"] += own_part(value, shard) * moments(name, value, fit.optimizer)

    grows = micro_batches == 1  # while gradients come, activations go; after the first micro-batch, they are there
    two, three = (_passing(network(layers), config, shape, fit, samples, processes, grows) for layers in (2, 3))
    activations = two + (config.num_layers - 2) * (three - two) - grows * lasting["gradients"]
    learning = [p for p in whole.parameters() if p.requires_grad]
    message = 0
    if shard == 1 and processes > 1:
        message = 4 * min(sum(p.numel() for p in learning), max(MESSAGE, *(p.numel() for p in learning)))
    return StepMemory(**lasting, gathered=gathered(whole, fit, shard), activations=max(activations, message))


def moments(name: str, parameter: Tensor, optimizer: str) -> int:
    """Bytes per value that the optimiser keeps: two numbers of AdamW, one of Muon, as wide as the weight. In 8 bits two
    codes of a byte; their scales, a 64th more, are left out."""
    is_hidden = parameter.ndim == 2 and "block" in name
    if optimizer == "adamw8bit" and parameter.numel() >= 4096:
        return 2
    return parameter.itemsize * (1 if optimizer == "muon" and is_hidden else 2)


def own_part(value: Tensor, shard: int) -> int:
    """Values of a parameter on the process that has most of it: FSDP deals out rows. Buffers are everywhere."""
    if shard == 1 or not isinstance(value, nn.Parameter):
        return value.numel()
    return -(-len(value) // shard) * (value.numel() // len(value))


def gathered(dit: DiT, fit: FitConfig, shard: int) -> int:
    """What FSDP holds whole at the fullest moment: all outside the blocks, a block, the next one, and a gradient."""
    if shard == 1:
        return 0

    def size(parameters: list[nn.Parameter], item: int) -> int:
        return sum(p.numel() * (min(item, p.itemsize)) for p in parameters)

    item = 2 if fit.bfloat16 else 8
    block = list(dit.blocks[0].parameters())
    inside = {id(p) for p in dit.blocks.parameters()}
    outside = [p for p in dit.parameters() if id(p) not in inside]
    learning = [p for p in block if p.requires_grad]
    return size(outside, item) + 2 * size(block, item) + size(learning, item) + size(learning, 4)


def _passing(
    dit: DiT, config: DiTConfig, shape: tuple[int, int, int], fit: FitConfig, samples: int, processes: int, grows: bool
) -> int:
    """The most bytes alive in forward and backward beside what lasts; with the gradients that come, if it `grows`."""
    shard = fit.parallel.shard or processes
    set_checkpointing(dit, fit.parallel.checkpointing)
    f, h, w = shape
    f += -f % (config.patch_size_t or 1)
    with FakeTensorMode(), _Alive() as alive:
        for part in dit.modules():
            for name, value in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                dtype = torch.bfloat16 if shard > 1 and fit.bfloat16 and value.is_floating_point() else value.dtype
                empty = torch.empty(value.shape, dtype=dtype)
                if isinstance(value, nn.Parameter):
                    own = own_part(value, shard) * value.itemsize * grows
                    empty = nn.Parameter(empty, requires_grad=value.requires_grad)
                    if value.requires_grad:
                        empty.register_post_accumulate_grad_hook(_keeps(alive, own))
                setattr(part, name, empty)
        extra = config.in_channels - config.out_channels
        latents = torch.empty(samples, f, config.out_channels, h, w)
        cond = Conditioning(
            text=torch.empty(samples, config.max_text_seq_length, config.text_embed_dim),
            channels=torch.empty(samples, f, extra, h, w) if extra else None,
            vectors={"ofs": torch.empty(1)} if config.ofs_embed_dim else {},
        )
        before = alive.now
        if fit.parallel.sequence > 1:
            dit.run_blocks = _Part(dit.run_blocks, fit.parallel.sequence)
        with torch.autocast("cpu", torch.bfloat16, enabled=fit.bfloat16):
            loss = (dit(latents, torch.empty(samples), cond) - latents).square().mean()
        loss.backward()
    return alive.peak - before


@dataclass
class _Part:
    """The block loop over the largest part of a stream, which comes back as long as the whole."""

    run_blocks: Any
    sequence: int

    def __call__(self, tokens: Tokens) -> Tokens:
        length = tokens.x.shape[1]
        own = self.run_blocks(take_part(tokens, part_sizes(length, self.sequence), 0)).x
        rest = own.new_zeros(len(own), length - own.shape[1], own.shape[2])
        return dataclasses.replace(tokens, x=torch.cat([own, rest], dim=1))


def _keeps(alive: _Alive, own: int) -> Callable[[Tensor], None]:
    """A gradient that has come is kept, as much of it as belongs to this process."""

    def hook(parameter: Tensor) -> None:
        parameter.grad = None
        alive.add(own)

    return hook


class _Alive(TorchDispatchMode):
    """Bytes of the storages that are alive, of those made inside the `with`."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, weakref.ref] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.track(tensor)
        return result

    def track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = weakref.ref(storage, lambda _: self.forget(key, size))
            self.add(size)

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def forget(self, key: int, size: int) -> None:
        del self.known[key]
        self.now -= size


@contextmanager
def bytes_alive() -> Iterator[_Alive]:
    """Watch what real tensors take: `.peak` bytes at most were alive of those made inside."""
    with _Alive() as alive:
        yield alive
