"""What a training on several processes must agree on with one: run by `processes.py`, once per process.

Each check computes a step of the whole batch in this process, then its part of it together with the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from checks import VARIANTS, batch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from videogen.config import FitConfig, ParallelConfig
from videogen.distributed.mesh import start
from videogen.distributed.training import Parallel, parallelize
from videogen.models.dit import DiT
from videogen.models.lora import adapters, add_lora, train_only_lora
from videogen.models.text import TextEncoder, tiny_t5, word_tokenizer
from videogen.testing import randomize
from videogen.training.ema import ema_copy, ema_update
from videogen.training.masking import masked
from videogen.training.optim import build_optimizers
from videogen.training.packing import Clips, predict_packed
from videogen.types import Conditioning

CHECKS: dict[int, list[Callable[[], None]]] = {2: [], 4: []}
WORDS = ("a", "red", "blue", "circle", "moves", "left")
SAMPLES = 3  # of a step, which no two processes can share evenly
Modules = dict[str, nn.Module]


def on(*counts: int):
    """This check is for so many processes."""

    def add(check: Callable[[], None]) -> Callable[[], None]:
        for count in counts:
            CHECKS[count].append(check)
        return check

    return add


def networks(name: str = "5B", dtype: torch.dtype = torch.float32) -> Modules:
    """A DiT of four heads and a text encoder whose embedding is tied, on which it depends."""
    config = VARIANTS[name]
    dit = DiT(config)
    t5 = tiny_t5(len(WORDS) + 3, d_model=config.text_embed_dim, num_heads=2, d_ff=24)
    text = TextEncoder(t5, word_tokenizer(WORDS, 6), 6)
    randomize(dit, seed=1)
    torch.manual_seed(2)
    for parameter in text.parameters():
        nn.init.normal_(parameter, std=0.3)
    return {"dit": dit.to(dtype), "text": text.to(dtype)}


def sample_loss(modules: Modules, index: int) -> Tensor:
    """Of sample `index`: clips of two lengths, each with words of its own."""
    dit, text = modules["dit"], modules["text"]
    assert isinstance(dit, DiT)
    assert isinstance(text, TextEncoder)
    dtype = dit.proj_out.weight.dtype
    latents, t, cond = batch(dit.config, 1, 6, frames=2 + index % 2)
    words = text.encoder(text.token_ids([" ".join(WORDS[: index + 1])])).last_hidden_state
    channels = None if cond.channels is None else cond.channels.to(dtype)
    vectors = {name: value.to(dtype) for name, value in cond.vectors.items()}
    out = dit(latents.to(dtype), t + index, Conditioning(text=words, channels=channels, vectors=vectors))
    return (out - torch.tanh(latents.to(dtype))).square().mean() / SAMPLES


def whole_step(modules: Modules, loss: Callable[[Modules, int], Tensor] = sample_loss) -> dict[str, Tensor]:
    """Every gradient of all samples, computed in one process."""
    for index in range(SAMPLES):
        loss(modules, index).backward()
    return gradients(modules)


def shared_step(modules: Modules, parallel: Parallel, loss: Callable[[Modules, int], Tensor] = sample_loss) -> None:
    """The same with the others: each data rank has every n-th sample, and fills up where it has fewer."""
    own = list(range(SAMPLES))[parallel.data_rank :: parallel.data_world]
    count = parallel.rounds(len(own))
    for place in range(count):
        with parallel.micro_batch(place == count - 1):
            (loss(modules, own[place]) if place < len(own) else loss(modules, 0) * 0).backward()
    parallel.reduce_gradients([p for module in modules.values() for p in module.parameters() if p.requires_grad])


def gradients(modules: Modules) -> dict[str, Tensor]:
    found = {}
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            if parameter.grad is not None:
                found[f"{name}.{key}"] = full(parameter.grad)
    return found


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_close(ours: dict[str, Tensor], whole: dict[str, Tensor], tolerance: float) -> float:
    """Each tensor within `tolerance` of the largest value of the whole one; the worst."""
    assert ours.keys() == whole.keys(), ours.keys() ^ whole.keys()
    errors = {k: float((ours[k] - v).abs().max() / v.abs().max().clamp(min=1e-30)) for k, v in whole.items()}
    worst = max(errors, key=lambda key: errors[key])
    assert errors[worst] <= tolerance, f"{worst}: {errors[worst]:.1e}"
    return errors[worst]


def placed(modules: Modules, **settings) -> Parallel:
    return parallelize(modules, ParallelConfig(**settings), torch.device("cpu"))


MODES = [
    ("5B", {"shard": 1}),
    ("2B", {"shard": 0}),
    ("5B", {"sequence": 2}),
    ("5B-I2V", {"shard": 2, "sequence": 2, "checkpointing": "full"}),
    ("1.5-I2V", {"shard": 0, "checkpointing": "selective"}),
    ("1.5-I2V", {"sequence": 2, "checkpointing": "selective"}),
]


@on(2)
def gradients_equal_one_process() -> None:
    for name, settings in MODES:
        whole = whole_step(networks(name))
        modules = networks(name)
        parallel = placed(modules, **settings)
        shared_step(modules, parallel)
        worst = assert_close(gradients(modules), whole, 1e-6)
        print(f"{name} {settings}: {worst:.1e}", flush=True)
        norm = float(nn.utils.get_total_norm(list(whole.values())))
        ours = parallel.clip([p for m in modules.values() for p in m.parameters()], norm / 2)
        assert abs(ours / norm - 1) < 1e-6
        assert_close(gradients(modules), {k: g / 2 for k, g in whole.items()}, 2e-6)


@on(4)
def gradients_equal_one_process_in_groups() -> None:
    """HSDP, HSDP with Ulysses, FSDP with Ulysses; groups meet with the last micro-batch only."""
    for settings in ({"shard": 2}, {"shard": 2, "sequence": 2}, {"shard": 0, "sequence": 2}, {"sequence": 4}):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            whole = whole_step(networks("5B", dtype))
            modules = networks("5B", dtype)
            parallel = placed(modules, checkpointing="full", **settings)
            assert parallel.data_world == 4 // settings.get("sequence", 1)
            shared_step(modules, parallel)
            worst = assert_close(gradients(modules), whole, tolerance)
            print(f"{settings} {dtype}: {worst:.1e}", flush=True)


@on(2)
def optimisers_learn_the_same() -> None:
    """AdamW, and Muon beside it, whose matrices are turned whole, over clipped steps with a moving average."""
    for optimizer, settings in (("adamw", {"shard": 0}), ("muon", {"shard": 0}), ("muon", {"sequence": 2})):
        config = FitConfig(steps=3, optimizer=optimizer, weight_decay=0.01)
        found = []
        for alone in (True, False):
            modules = networks("5B", torch.float64)
            averages = {f"{name}_ema": ema_copy(module) for name, module in modules.items()}
            parallel = Parallel(ParallelConfig(), torch.device("cpu"))
            if not alone:
                parallel = placed(modules | averages, **settings)
            optimizers = build_optimizers(modules, config)
            for step in range(config.steps):
                if alone:
                    whole_step(modules)
                else:
                    shared_step(modules, parallel)
                parallel.clip([p for m in modules.values() for p in m.parameters()], 0.5)
                for one in optimizers:
                    one.step()
                    one.zero_grad()
                for name, average in averages.items():
                    ema_update(average, modules[name.removesuffix("_ema")], 0.9, step)
            wholes = [parallel.whole(name, module) for name, module in (modules | averages).items()]
            found.append({f"{i}.{k}": v.detach() for i, m in enumerate(wholes) for k, v in m.named_parameters()})
        assert_close(found[1], found[0], 1e-10)


@on(2)
def bfloat16_computes_from_float32_masters() -> None:
    modules = networks("5B")
    with torch.autocast("cpu", torch.bfloat16):
        whole = whole_step(modules)
    modules = networks("5B")
    parallel = parallelize(modules, ParallelConfig(shard=0), torch.device("cpu"), bfloat16=True)
    kinds = set()
    dit = modules["dit"]
    assert isinstance(dit, DiT)
    dit.blocks[0].register_forward_pre_hook(lambda module, _: kinds.add(module.mlp.up.weight.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        shared_step(modules, parallel)
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in dit.parameters()} == {p.grad.dtype for p in dit.parameters()} == {torch.float32}
    worst = max(
        float((g - whole[k]).norm() / whole[k].norm()) for k, g in gradients(modules).items() if k.endswith("weight")
    )
    print(f"bfloat16: {worst:.1e}", flush=True)
    assert worst < 0.05


def dropping(modules: Modules, index: int) -> Tensor:
    """Behind the first block only some tokens of the video are left."""
    dit = modules["dit"]
    assert isinstance(dit, DiT)
    x, t, cond = batch(dit.config, 1, 6, frames=2)
    kept = torch.arange(index % 2, 30, 3)
    return masked(dit, kept, 1)(x, t, cond).square().mean() / SAMPLES


def packing(modules: Modules, index: int) -> Tensor:
    """Two clips of other sizes in one stream."""
    dit = modules["dit"]
    assert isinstance(dit, DiT)
    parts = [Clips(*batch(dit.config, 1 + index % 2, 6, frames=frames)) for frames in (1, 2)]
    return torch.stack([out.square().mean() for out in predict_packed(dit, parts)]).sum() / SAMPLES


@on(2)
def streams_with_holes_and_streams_of_several_clips_too() -> None:
    for loss in (dropping, packing):
        for settings in ({"shard": 0}, {"sequence": 2}, {"shard": 0, "sequence": 2, "checkpointing": "full"}):
            whole = whole_step({"dit": networks("5B", torch.float64)["dit"]}, loss)
            modules = {"dit": networks("5B", torch.float64)["dit"]}
            shared_step(modules, placed(modules, **settings), loss)
            assert_close(gradients(modules), whole, 1e-12)


@on(2)
def adapters_learn_beside_a_sharded_model() -> None:
    """LoRA in float32 beside weights in bfloat16; its average is made of what lies here."""

    def adapted() -> DiT:
        dit = networks("5B")["dit"].to(torch.bfloat16)
        assert isinstance(dit, DiT)
        add_lora(dit, rank=2, dtype=torch.float32, generator=torch.Generator().manual_seed(3))
        train_only_lora(dit)
        for adapter in adapters(dit).values():
            nn.init.normal_(adapter.B, std=0.1, generator=torch.Generator().manual_seed(4))
        return dit

    def loss(modules: Modules, index: int) -> Tensor:
        dit = modules["dit"]
        assert isinstance(dit, DiT)
        x, t, cond = batch(dit.config, 1, 6, frames=2)
        with torch.autocast("cpu", torch.bfloat16):
            assert cond.text is not None
            return dit(x.float(), t + index, replace(cond, text=cond.text.float())).float().square().mean() / SAMPLES

    whole = whole_step({"dit": adapted()}, loss)
    assert len(whole) == 16
    for settings in ({"shard": 0}, {"sequence": 2}):
        dit = adapted()
        parallel = placed({"dit": dit}, **settings)
        learned = nn.ModuleList(adapters(dit).values())
        average = ema_copy(learned)
        shared_step({"dit": dit}, parallel, loss)
        for key, g in gradients({"dit": dit}).items():
            error = float((g - whole[key]).norm() / whole[key].norm())
            assert error < 0.03, f"{settings} {key}: {error:.1e}"
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in learned.parameters())
        for parameter in learned.parameters():
            parameter.data.zero_()
        ema_update(average, learned, 0.5, 100)
        before = adapters(adapted()).values()
        for kept, was in zip(average.parameters(), nn.ModuleList(before).parameters(), strict=True):
            assert torch.allclose(full(kept), was / 2)


@on(2)
def a_whole_model_comes_out_as_it_went_in() -> None:
    """All weights, bit for bit, tied ones tied; what was put in place is left in place."""
    for settings in ({"shard": 1}, {"shard": 0}, {"shard": 0, "sequence": 2}):
        plain, modules = networks("5B-I2V"), networks("5B-I2V")
        if dist.get_rank():
            for parameter in modules["dit"].parameters():
                nn.init.zeros_(parameter)  # the first process says what weights are
        parallel = placed(modules, **settings)
        for name, module in modules.items():
            for _ in range(2):
                whole = parallel.whole(name, module)
                assert type(whole) is type(plain[name])
                assert whole.state_dict().keys() == plain[name].state_dict().keys()
                for key, value in whole.state_dict().items():
                    assert torch.equal(value, plain[name].state_dict()[key]), key
        text = parallel.whole("text", modules["text"])
        assert isinstance(text, TextEncoder)
        assert text.encoder.shared.weight is text.encoder.encoder.embed_tokens.weight
        dit = parallel.whole("dit", modules["dit"])
        assert isinstance(dit, DiT)
        given = [
            x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in batch(dit.config, 1, 6)[:2]
        ]
        cond = batch(dit.config, 1, 6)[2]
        cond = replace(cond, text=cond.text.float(), channels=cond.channels.float())
        assert torch.equal(dit(*given, cond), plain["dit"](*given, cond))
        assert torch.allclose(modules["dit"](*given, cond), dit(*given, cond), rtol=1e-5, atol=1e-5)


@on(2)
def each_process_computes_and_keeps_only_its_part() -> None:
    modules = {"dit": networks("5B")["dit"]}
    count = sum(p.numel() for p in modules["dit"].parameters())
    placed(modules, shard=0, sequence=2)
    dit, seen = modules["dit"], []
    assert isinstance(dit, DiT)
    dit.blocks[1].register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[1]))
    x, t, cond = batch(dit.config, 1, 6)
    assert cond.text is not None
    dit(x.float(), t, replace(cond, text=cond.text.float())).sum().backward()
    assert seen == [26, 25][dist.get_rank() : dist.get_rank() + 1]  # of 6 + 45
    own = sum(p.to_local().numel() for p in dit.parameters() if isinstance(p, DTensor))
    assert abs(own / count - 0.5) < 0.02
    assert all(
        not isinstance(p.grad, DTensor) or p.grad.to_local().shape == p.to_local().shape for p in dit.parameters()
    )


@on(2)
def what_nobody_reaches_rests() -> None:
    """A weight without a gradient anywhere keeps none; one that some processes reach gets the sum on all."""
    modules: Modules = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
    parallel = placed(modules)
    assert parallel.rounds(3) == 3  # no forward waits for another process here
    assert not parallel.is_collective
    if dist.get_rank():
        modules["a"](torch.ones(1, 2)).sum().backward()
    everything = [p for module in modules.values() for p in module.parameters()]
    parallel.reduce_gradients(everything)
    assert [p.grad is None for p in everything] == [False, False, True, True]
    assert torch.equal(modules["a"].weight.grad, torch.ones(2, 2))
    assert parallel.clip(everything, 1e9) == float(torch.tensor(6.0).sqrt())
    total = parallel.sum(torch.tensor([1.0, float(parallel.data_rank)]))
    assert total.tolist() == [2.0, 1.0]


@on(2)
def peers_share_a_sample_and_count_once() -> None:
    parallel = placed({"dit": networks("5B")["dit"]}, sequence=2)
    assert (parallel.data_rank, parallel.data_world) == (0, 1)
    assert parallel.rounds(1 + dist.get_rank()) == 2
    assert float(parallel.sum(torch.ones(()))) == 1


def main() -> None:
    count = int(os.environ["WORLD_SIZE"])
    for check in CHECKS[count]:
        print("todo", check.__name__, flush=True)
    start("cpu")
    torch.set_num_threads(1)
    for check in CHECKS[count]:
        check()
        print("done", check.__name__, flush=True)
    dist.destroy_process_group()
