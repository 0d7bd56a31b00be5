"""States that two processes write and read together: run by `processes.py` for `test_state_sharded.py`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from videogen.config import FitConfig, ParallelConfig
from videogen.distributed.mesh import start
from videogen.distributed.training import parallelize
from videogen.errors import FileError
from videogen.models.text import TextEncoder, tiny_t5, word_tokenizer
from videogen.training import state as states
from videogen.training.ema import ema_copy
from videogen.training.optim import build_optimizers
from videogen.training.state import StateWriter, newest_state, saved_states, tensors_of
from videogen.training.trainer import fit

FOLDER = Path(os.environ.get("STATE_FOLDER", "."))


class Net(nn.Module):
    """Five rows for two processes, and one row, of which the second process has nothing."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 5)])
        self.last = nn.Linear(5, 1)
        self.register_buffer("seen", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return self.last(x)


def training(optimizer: str, seed: int = 0, *, sharded: bool) -> tuple[Net, list[Optimizer]]:
    net = Net(seed)
    if sharded:
        for block in net.blocks:
            fully_shard(block)
        fully_shard(net)
    config = FitConfig(steps=9, optimizer=optimizer, learning_rate=0.1, weight_decay=0.1)
    return net, build_optimizers({"net": net}, config)


def steps(net: Net, optimizers: list[Optimizer], first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        net(x).square().mean().backward()
        net.seen += 1
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def locals_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: (t.to_local() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()}


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


def some(step: int) -> dict[str, Tensor]:
    """Split by rows, by columns, and not at all."""
    mesh = init_device_mesh("cpu", (2,))
    numbers = torch.arange(15.0).reshape(3, 5) + step
    split = {name: distribute_tensor(numbers, mesh, [at]) for name, at in (("a/r", Shard(0)), ("a/c", Shard(1)))}
    return {**split, "b/copy": distribute_tensor(numbers, mesh, [Replicate()]), "b/plain": numbers.clone()}


@torch.enable_grad()
def check_a_sharded_training_goes_on_bit_for_bit() -> None:
    """Saved while the training's own messages are under way."""
    for optimizer in ("adamw", "muon"):
        net, optimizers = training(optimizer, sharded=True)
        steps(net, optimizers, 0, 2)
        tensors = tensors_of({"net": net}, optimizers)
        assert any(isinstance(tensor, DTensor) for name, tensor in tensors.items() if name.startswith("optimizer"))
        with StateWriter(FOLDER / optimizer) as writer:
            writer.save(2, tensors, {"samples": 8})
            now = whole(tensors)
            steps(net, optimizers, 2, 5)
        if dist.get_rank() == 0:
            states.write_tensors(FOLDER / f"{optimizer}.safetensors", now, {})
        again, others = training(optimizer, seed=1, sharded=True)
        with StateWriter(FOLDER / optimizer) as writer:
            state = writer.newest()
            assert state is not None
            assert state.facts == {"samples": 8}
            state.read(into=tensors_of({"net": again}, others))
        same(whole(tensors_of({"net": again}, others)), now)
        steps(again, others, 2, 5)
        same(locals_of(tensors_of({"net": again}, others)), locals_of(tensors))


@torch.enable_grad()
def check_two_processes_read_what_one_wrote() -> None:
    net, optimizers = training("adamw", seed=1, sharded=True)
    tensors = tensors_of({"net": net}, optimizers)
    state = newest_state(FOLDER / "one")
    assert state is not None
    state.read(into=tensors)
    plain, others = training("adamw", seed=2, sharded=False)
    state.read(into=tensors_of({"net": plain}, others))
    same(whole(tensors), tensors_of({"net": plain}, others))


def check_what_all_have_is_written_once() -> None:
    with StateWriter(FOLDER / "once") as writer:
        writer.save(1, some(1), {})
        writer.save(2, some(2), {})
        writer.wait()
        names = sorted(path.name for path in (FOLDER / "once" / "step_00000002").iterdir())
        shards = ["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"]
        assert names == [*shards, "b-00001-of-00002.safetensors", "manifest.json"], names
        found = some(0)
        state = writer.newest()
        assert state is not None
        state.read(into=found)
        same(locals_of(found), locals_of(some(2)))
        turned = {"a/r": found["a/c"].clone().zero_(), "a/c": found["a/r"].clone().zero_()}
        state.read(into=turned, some=True)
        same(whole(turned), {"a/r": whole(some(2))["a/r"], "a/c": whole(some(2))["a/c"]})


def check_what_fails_on_one_fails_on_all() -> None:
    write, rank = states.write_tensors, dist.get_rank()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "a")

    def fails(step: int) -> str:
        try:
            with StateWriter(FOLDER / "fails") as writer:
                writer.save(step, some(step), {})
        except FileError as error:
            return str(error)
        return ""

    assert not fails(1)
    states.write_tensors = full if rank == 1 else write
    try:
        assert "No space left" in fails(2)
    finally:
        states.write_tensors = write
    assert "processes are at steps" in fails(3 + rank)
    assert [state.name for state in saved_states(FOLDER / "fails")] == ["step_00000001"]


def check_all_pass_over_a_damaged_state() -> None:
    with StateWriter(FOLDER / "damaged") as writer:
        for step in (1, 2):
            writer.save(step, some(step), {})
        writer.wait()
        if dist.get_rank() == 0:
            path = FOLDER / "damaged" / "step_00000002" / "a-00002-of-00002.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"\0")
        dist.barrier()
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            state = writer.newest()
        assert state is not None
        assert state.step == 1
        assert len(notes) == 1 - dist.get_rank(), "said once"


@torch.enable_grad()
def check_replicas_and_peers_write_once() -> None:
    """HSDP, and shards on one dimension of a mesh whose other dimension knows nothing of them (sequence peers)."""
    grids = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for name, mesh in (("hybrid", grids), ("peers", grids["shard"])):
        net, again = Net(0), Net(1)
        for module in (net, again):
            fully_shard(module, mesh=mesh)
        with StateWriter(FOLDER / name) as writer:
            writer.save(1, tensors_of({"net": net}), {})
            writer.wait()
            files = sorted(path.name for path in (FOLDER / name / "step_00000001").iterdir())
            assert files == ["manifest.json", *(f"net-{n:05d}-of-00004.safetensors" for n in (1, 2))], files
            state = writer.newest()
            assert state is not None
            state.read(into=tensors_of({"net": again}))
        same(whole(tensors_of({"net": again})), tensors_of({"net": Net(0)}))


@torch.enable_grad()
def check_averages_stay_spread_where_validation_computes_with_them() -> None:
    """A forward without a backward pass leaves the weights of a root gathered."""
    found = []
    for validates in (False, True):
        torch.manual_seed(0)
        words = ("red", "blue", "circle")
        text = TextEncoder(tiny_t5(len(words) + 3, d_model=8, num_heads=2, d_ff=16), word_tokenizer(words, 4), 4)
        average = ema_copy(text)
        parallel = parallelize({"text": text, "average": average}, ParallelConfig(shard=0), torch.device("cpu"))

        def loss(model: nn.Module) -> Tensor:
            assert isinstance(model, TextEncoder)
            return model.encoder(model.token_ids(["red circle"])).last_hidden_state.square().mean()

        def losses_at(step: int, text: TextEncoder = text) -> list:
            return [(loss(text) / 2, {}, [f"{step}"])]

        def validate(averages: Mapping[str, nn.Module], step: int) -> dict[str, float]:
            with torch.no_grad():
                return {"of_average": float(loss(averages["text"]))}

        config = FitConfig(steps=4, learning_rate=0.01, warmup_steps=0, save_every=2, bfloat16=False)
        kind = {"parallel": parallel, "averages": {"text": average}, "validate": validate if validates else None}
        fit({"text": text}, losses_at, config, FOLDER / f"validates {validates}", **kind)
        assert all(isinstance(p, DTensor) for p in average.parameters())
        state = newest_state(FOLDER / f"validates {validates}")
        assert state is not None
        tensors = tensors_of({"text_ema": average})
        found.append(whole(tensors))
        state.read(into=tensors, some=True)
        found.append(whole(tensors))
    for other in found[1:]:
        same(found[0], other)


CHECKS = {
    2: [
        check_a_sharded_training_goes_on_bit_for_bit,
        check_two_processes_read_what_one_wrote,
        check_what_all_have_is_written_once,
        check_what_fails_on_one_fails_on_all,
        check_all_pass_over_a_damaged_state,
        check_averages_stay_spread_where_validation_computes_with_them,
    ],
    4: [check_replicas_and_peers_write_once],
}


def main() -> None:
    checks = CHECKS[int(os.environ["WORLD_SIZE"])]
    for check in checks:
        print("todo", check.__name__, flush=True)
    start("cpu")
    torch.set_num_threads(1)
    for check in checks:
        with torch.no_grad():
            check()
        dist.barrier()
        print("done", check.__name__, flush=True)
    dist.destroy_process_group()
