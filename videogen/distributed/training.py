"""Many processes for one training: `parallelize` puts networks in place, `Parallel` is what the loop asks.

    every process holds all weights       shard=1       their gradients are summed in messages         (DDP)
    weights are spread over all           shard=0       gathered block by block, gone after it         (FSDP2, ZeRO-3)
    over groups, groups alike             shard=4 of 8  spread within, summed between                  (HSDP)
    each sample over several processes    sequence=2    Ulysses, in any of these                       (`sequence.py`)

Losses are divided by the number of samples of the global batch, so gradients are *summed*, over all processes: those
that share a sample have a part of its gradient each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from videogen.config import ParallelConfig
from videogen.distributed.checkpointing import set_checkpointing
from videogen.distributed.sequence import shard_sequence
from videogen.errors import InvalidRequest
from videogen.models.dit import DiT
from videogen.models.text import TextEncoder

MESSAGE = 2**24  # values of gradients in one message: 64 MiB in float32


@dataclass(frozen=True)
class Parallel:
    """Which processes do what. Without other processes everything here is as plain as it can be."""

    config: ParallelConfig
    device: torch.device
    grid: DeviceMesh | None = None  # named dimensions "data" and "sequence"; None: one process
    sharded: list[FSDPModule] = field(default_factory=list)  # the roots
    skeletons: dict[str, nn.Module] = field(default_factory=dict)  # what modules were, without values

    @property
    def data_rank(self) -> int:
        """Processes of one data rank share its samples."""
        return self.grid.get_local_rank("data") if self.grid else 0

    @property
    def data_world(self) -> int:
        return self.grid.size(0) if self.grid else 1

    @property
    def is_collective(self) -> bool:
        """Whether a network's forward waits for the other processes: then all call it equally often, or all hang."""
        return self.grid is not None and (bool(self.sharded) or self.config.sequence > 1)

    def rounds(self, micro_batches: int) -> int:
        """How many micro-batches every process must compute in this step, `micro_batches` being those of this one.

        Where `is_collective`, the most that any has; a process with fewer fills up with samples whose loss counts 0.
        """
        if not self.is_collective:
            return micro_batches
        most = torch.tensor(micro_batches, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch; groups of HSDP meet with the `last` of a step only."""
        for root in self.sharded:
            root.set_is_last_backward(last)
            root.set_requires_all_reduce(last)
        yield

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """After the last micro-batch: sums over the processes, of the gradients that FSDP has not summed already."""
        if self.grid is not None:
            sum_gradients([p for p in parameters if not isinstance(p, DTensor)])

    @torch.no_grad()
    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Scale gradients to a norm of at most `max_norm`; the norm before, the same on all processes."""
        parameters = [p for p in parameters if p.grad is not None]
        parts = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
        if not parts:
            return float(nn.utils.clip_grad_norm_(parameters, max_norm))
        plain = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
        square = nn.utils.get_total_norm([x for x in parts if x.numel()]).to(self.device) ** 2
        mesh = next(p.grad for p in parameters if isinstance(p.grad, DTensor)).device_mesh
        dist.all_reduce(square, group=mesh.get_group("shard"))
        norm = float((square + nn.utils.get_total_norm(plain).to(self.device) ** 2).sqrt())
        if not norm <= max_norm:
            torch._foreach_mul_([*parts, *plain], min(1.0, max_norm / (norm + 1e-6)))
        return norm

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every data rank's `tensor`."""
        if self.grid is None:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total, group=self.grid.get_group("data"))
        return total.to(tensor.device)

    @torch.no_grad()
    def whole(self, name: str, module: nn.Module) -> nn.Module:
        """`module`, put in place under `name`, as one process has it: all weights, on the CPU, a copy where spread.

        All processes must call it, and all get it. Without other processes it is the module itself.
        """
        if self.grid is None:
            return module
        plain = self.skeletons[name]
        values = {
            key: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
            for key, value in [*module.named_parameters(), *module.named_buffers()]
        }
        made: dict[int, nn.Parameter] = {}  # tied weights have several names and stay one
        for path, part in plain.named_modules():
            prefix = f"{path}." if path else ""
            for key, empty in list(part.named_parameters(recurse=False)):
                if id(empty) not in made:
                    made[id(empty)] = nn.Parameter(values[prefix + key], requires_grad=empty.requires_grad)
                setattr(part, key, made[id(empty)])
            for key, _ in list(part.named_buffers(recurse=False)):
                setattr(part, key, values[prefix + key])
        return plain.train(module.training)


def parallelize(
    modules: dict[str, nn.Module], config: ParallelConfig, device: torch.device, *, bfloat16: bool = False
) -> Parallel:
    """Put networks in place on this process's `device`, as `config` says; all processes have joined and all call this.

    modules   name -> network, moving averages and frozen ones included, with the same layout on all processes; the
              values are those of the first. Of a model with LoRA the whole model: what learns inside goes along
    bfloat16  sharded weights travel, and are computed with, in bfloat16, under the step's autocast; those of the
              optimiser and the sums of gradients stay as they are

    DiTs and text encoders are what is sharded. Optimisers are made afterwards, of parameters as they are then.
    Raises InvalidRequest for numbers of processes that do not fit.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    check(config, modules, world)
    dits = [part for module in modules.values() for part in module.modules() if isinstance(part, DiT)]
    for dit in dits:
        set_checkpointing(dit, config.checkpointing)
    for module in modules.values():
        module.to(device)
    if world == 1:
        return Parallel(config, device)

    shape = world // config.sequence, config.sequence
    grid = init_device_mesh(device.type, shape, mesh_dim_names=("data", "sequence"))
    skeletons = {name: skeleton(module) for name, module in modules.items()}
    for module in modules.values():
        for value in [*module.parameters(), *module.buffers()]:
            dist.broadcast(value.detach(), src=0)
    if config.sequence > 1:
        for dit in dits:
            shard_sequence(dit, grid.get_group("sequence"), trains=True)
    shard = config.shard or world
    sharded = shard_weights(modules, world // shard, shard, device, bfloat16=bfloat16) if shard > 1 else []
    return Parallel(config, device, grid, sharded, skeletons)


def check(config: ParallelConfig, modules: dict[str, nn.Module], world: int) -> None:
    """Raises InvalidRequest for what cannot be put in place."""
    for name, degree in (("shard", config.shard or world), ("sequence", config.sequence)):
        if degree < 1 or world % degree:
            raise InvalidRequest(
                f"parallel.{name}={degree} does not divide {world} processes.",
                why="the processes are groups of that size.",
                hint=f"one of {', '.join(str(n) for n in range(1, world + 1) if world % n == 0)}",
                param=f"parallel.{name}",
            )
    if config.sequence > 1:
        alone = [
            name
            for name, module in modules.items()
            if not any(isinstance(part, DiT | TextEncoder) for part in module.modules())
        ]
        if alone:
            raise InvalidRequest(
                f"parallel.sequence={config.sequence} does not fit {', '.join(alone)}.",
                why="only a DiT's tokens are shared; the gradient of anything else would count several times.",
                hint="parallel.sequence=1",
                param="parallel.sequence",
            )


def shard_weights(
    modules: dict[str, nn.Module], replicate: int, shard: int, device: torch.device, *, bfloat16: bool = False
) -> list[FSDPModule]:
    """FSDP2 over groups of `shard` neighbouring processes, a DiT block by block; the roots. Gradients are summed."""
    shape, names = ((replicate, shard), ("replicate", "shard")) if replicate > 1 else ((shard,), ("shard",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    # The step's autocast casts what is computed with: times and positions must keep their digits.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if bfloat16:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    roots = []
    for module in modules.values():
        for part in module.modules():
            if isinstance(part, DiT):
                units, doors = [*part.blocks, part], ("embed", "unembed")
            elif isinstance(part, TextEncoder):
                units, doors = [part.encoder], ()
            else:
                continue
            root = units[-1]
            for unit in units:
                fully_shard(unit, mesh=mesh, mp_policy=policy)
                assert isinstance(unit, FSDPModule)
                unit.set_gradient_divide_factor(1.0)
                unit.set_force_sum_reduction_for_comms(True)
            for door in doors:
                setattr(root, door, with_weights(root, getattr(root, door)))
            roots.append(root)
    return roots


def with_weights(root: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a sharded module that may be called by itself, as where tokens are dropped in between."""
    if not hasattr(root, "gathered"):
        object.__setattr__(root, "gathered", lambda call: call())
        register_fsdp_forward_method(root, "gathered")
    # FSDP sees no tensors go in, so it sums the gradients of the module's own weights once, at the end.
    return lambda *args: cast("Any", root).gathered(partial(method, *args))


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sums over all processes, which give the same `parameters`, in messages of `MESSAGE` values.

    What no process has a gradient of keeps none, what some have gets one on all.
    """
    if not parameters:
        return
    reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(reached)
    learning = [p for p, count in zip(parameters, reached.tolist(), strict=True) if count]
    for some in _messages(learning):
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in some]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for parameter, total in zip(some, flat.split([p.numel() for p in some]), strict=True):
            parameter.grad = total.view_as(parameter).clone()


def skeleton(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are on the meta device: a layout that takes no memory."""
    values = [*module.parameters(), *module.buffers()]
    meta = {id(value): torch.empty_like(value, device="meta", requires_grad=value.requires_grad) for value in values}
    empty = {i: nn.Parameter(v, v.requires_grad) for i, v in meta.items()}
    is_buffer = {id(value) for value in module.buffers()}
    return copy.deepcopy(module, {i: meta[i] if i in is_buffer else empty[i] for i in meta})


def _messages(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype, as many as fit into a message; a large one is a message of its own."""
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for same in by_dtype.values():
        some: list[nn.Parameter] = []
        for parameter in same:
            if some and sum(p.numel() for p in some) + parameter.numel() > MESSAGE:
                yield some
                some = []
            some.append(parameter)
        yield some
