"""Adapters beside weights, and in them: W' = W + s B A exactly, and nothing left behind."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from videogen.errors import InvalidRequest
from videogen.models.dit import DiT
from videogen.models.lora import (
    ALL,
    TARGETS,
    LoRALinear,
    Update,
    adapter_names,
    adapters,
    add_lora,
    attach,
    detach,
    factors,
    has_adapters,
    is_merged,
    linear_maps,
    load_lora_state,
    lora_parameters,
    lora_state,
    merge,
    merged,
    set_scales,
    train_only_lora,
    unmerge,
    updates_of,
)
from videogen.testing import TINY_DIT, tiny_batch, tiny_pipeline
from videogen.training.state import StateWriter, newest_state, tensors_of


def network(dtype: torch.dtype = torch.float64) -> DiT:
    return tiny_pipeline(dtype=dtype).dit


def random_updates(dit: DiT, *, rank: int = 3, alpha: float = 5.0, seed: int = 0, ends: str = "") -> dict[str, Update]:
    generator = torch.Generator().manual_seed(seed)
    found = {path: m for path, m in linear_maps(dit).items() if path.endswith(ends)}

    def normal(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dit.proj_out.weight.dtype)

    return {p: Update(normal(rank, m.in_features), normal(m.out_features, rank), alpha) for p, m in found.items()}


def dense(dit: DiT, *counted: tuple[dict[str, Update], float]) -> DiT:
    """The same network with every W replaced by W + Σ scale · alpha / rank · B A."""
    other = copy.deepcopy(dit)
    with torch.no_grad():
        for updates, scale in counted:
            for path, update in updates.items():
                other.get_submodule(path).weight += scale * update.alpha / update.rank * update.B @ update.A
    return other


@torch.no_grad()
def output(dit: DiT) -> torch.Tensor:
    return dit(*tiny_batch(TINY_DIT, dtype=dit.proj_out.weight.dtype))


def weights(dit: DiT) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in dit.state_dict().items()}


@pytest.fixture
def dit() -> DiT:
    return network()


def test_an_adapter_is_the_dense_update(dit):
    updates = random_updates(dit)
    assert len(updates) > 20, "every linear map of the network"
    expected = output(dense(dit, (updates, 1.0)))
    plain = output(dit)
    attach(dit, updates)
    torch.testing.assert_close(output(dit), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(plain, expected, rtol=1e-3, atol=1e-3)


def test_several_add_up_each_with_its_scale(dit):
    first, second = random_updates(dit), random_updates(dit, rank=2, seed=1, ends="to_q")
    expected = output(dense(dit, (first, 0.5), (second, -2.0)))
    attach(dit, first, name="first", scale=0.5)
    attach(dit, second, name="second", scale=-2.0)
    torch.testing.assert_close(output(dit), expected, rtol=1e-12, atol=1e-12)
    set_scales(dit, {"first": 0.0, "second": 3.0})
    torch.testing.assert_close(output(dit), output(dense(_without(dit), (second, 3.0))), rtol=1e-12, atol=1e-12)
    assert adapter_names(dit) == ["first", "second"]


def _without(dit: DiT) -> DiT:
    plain = copy.deepcopy(dit)
    detach(plain)
    return plain


def test_scale_0_is_the_plain_model_bit_for_bit(dit):
    plain, before = output(dit), weights(dit)
    attach(dit, random_updates(dit))
    set_scales(dit, {"default": 0.0})
    assert torch.equal(output(dit), plain)
    merge(dit)
    assert all(torch.equal(before[name], tensor) for name, tensor in dit.state_dict().items())


def test_merged_is_the_adapter_within_rounding_and_plain_in_kind():
    dit = network(torch.float32)
    before = weights(dit)
    attach(dit, random_updates(dit))
    beside = output(dit)
    merge(dit)
    torch.testing.assert_close(output(dit), beside, rtol=1e-5, atol=1e-5)
    assert dit.state_dict().keys() == before.keys()
    assert all(type(m) is nn.Linear for m in linear_maps(dit).values())
    assert is_merged(dit)
    assert not has_adapters(dit)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unmerge_restores_every_bit(dtype):
    dit = network(dtype)
    before = weights(dit)
    attach(dit, random_updates(dit))
    beside = output(dit)
    merge(dit)
    assert not torch.equal(before["proj_out.weight"], dit.proj_out.weight)
    unmerge(dit)
    unmerge(dit)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dit.state_dict().items() if name in before)
    assert torch.equal(output(dit), beside)
    with merged(dit):
        assert not has_adapters(dit)
    assert torch.equal(output(dit), beside)


def test_scales_of_merged_ones_start_from_the_plain_weights(dit):
    updates = random_updates(dit)
    plain = copy.deepcopy(dit)
    attach(dit, updates)
    merge(dit)
    for scale in (0.3, 7.0, 0.25):
        set_scales(dit, {"default": scale})
    assert is_merged(dit)
    once = network()
    attach(once, updates, scale=0.25)
    merge(once)
    assert torch.equal(once.proj_out.weight, dit.proj_out.weight)
    set_scales(dit, {"default": 0.0})
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in dit.state_dict().items())


def test_detached_it_is_the_model_it_was(dit):
    before, parameters, plain = weights(dit), list(dit.parameters()), output(dit)
    attach(dit, random_updates(dit), name="a")
    attach(dit, random_updates(dit, ends="to_v"), name="b")
    detach(dit, "a")
    assert adapter_names(dit) == ["b"]
    merge(dit)
    detach(dit)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dit.state_dict().items())
    assert dit.state_dict().keys() == before.keys()
    assert all(mine is theirs for mine, theirs in zip(dit.parameters(), parameters, strict=True))
    assert all(type(m) is nn.Linear and "merged" not in vars(m) for m in linear_maps(dit).values())
    assert torch.equal(output(dit), plain)


def test_what_was_attached_to_a_map_stays(dit):
    linear, calls = dit.blocks[0].attention.to_q, []
    linear.register_forward_hook(lambda *_: calls.append(1))
    weight = linear.weight
    attach(dit, random_updates(dit, ends="to_q"))
    output(dit)
    merge(dit)
    output(dit)
    assert dit.blocks[0].attention.to_q is linear
    assert linear.weight is weight
    assert len(calls) == 2


# ---- training -------------------------------------------------------------------------------------------------------


def test_fresh_adapters_change_nothing_and_are_kaiming_and_zero(dit):
    plain = output(dit)
    names = add_lora(dit, rank=4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(output(dit), plain)
    assert len(names) == len(TARGETS) * TINY_DIT.num_layers
    for adapter in adapters(dit).values():
        assert adapter.factor == 1
        assert not adapter.B.any()
        bound = (1 / adapter.A.shape[1]) ** 0.5  # Kaiming uniform with a = √5: variance 1 / (3 fan_in)
        assert adapter.A.abs().max() <= bound
        assert 0.7 < adapter.A.std() * 3**0.5 / bound < 1.3


@pytest.mark.parametrize(("targets", "count"), [(("to_q",), 2), (("mlp.up", "linear_1"), 3), (ALL, 21), (("up",), 2)])
def test_targets_are_ends_of_names(dit, targets, count):
    assert len(add_lora(dit, rank=1, targets=targets)) == count


def test_only_adapters_learn(dit):
    before = weights(dit)
    add_lora(dit, rank=2, alpha=8, dropout=0.1, generator=torch.Generator().manual_seed(0))
    parameters = train_only_lora(dit)
    assert parameters == lora_parameters(dit)
    assert {p for p in dit.parameters() if p.requires_grad} == set(parameters)
    dit.train()
    dit.gradient_checkpointing = True
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    target = torch.zeros(())
    losses = []
    for _ in range(8):
        torch.manual_seed(0)
        loss = (dit(*tiny_batch(TINY_DIT, dtype=torch.float64)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in dit.state_dict().items() if name in before)


def test_a_model_in_half_precision_learns_in_float32():
    dit = network(torch.bfloat16)
    add_lora(dit, rank=2, dtype=torch.float32)
    train_only_lora(dit)
    out = dit(*tiny_batch(TINY_DIT, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lora_parameters(dit))


def test_dropout_only_while_training(dit):
    updates = random_updates(dit)
    attach(dit, updates, dropout=0.5)
    expected = output(dense(_without(dit), (updates, 1.0)))
    torch.testing.assert_close(output(dit), expected, rtol=1e-12, atol=1e-12)
    merge(dit)
    dit.train()
    unmerge(dit)
    assert not torch.allclose(output(dit), expected)


def test_the_state_is_the_adapters_alone_and_comes_back(dit):
    attach(dit, random_updates(dit, ends="to_q"))
    state = {name: tensor.clone() for name, tensor in lora_state(dit).items()}
    assert set(state) == {f"blocks.{i}.attention.to_q.{k}" for i in range(2) for k in "AB"}
    other = network()
    add_lora(other, rank=3, alpha=5, targets=("to_q",))
    load_lora_state(other, state)
    assert torch.equal(output(other), output(dit))
    for wrong in ({}, state | {"more": torch.zeros(1)}, state | {"blocks.0.attention.to_q.A": torch.zeros(2, 32)}):
        with pytest.raises(InvalidRequest, match="are not those of"):
            load_lora_state(other, wrong)


def test_a_run_is_saved_and_resumed_with_the_adapters_alone(tmp_path: Path):
    def start() -> tuple[DiT, nn.ModuleList, torch.optim.Optimizer]:
        dit = network(torch.float32)
        add_lora(dit, rank=2, generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.AdamW(train_only_lora(dit), lr=1e-2)
        return dit, nn.ModuleList(adapters(dit).values()), optimizer

    def steps(dit: DiT, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            dit(*tiny_batch(TINY_DIT)).square().mean().backward()
            optimizer.step()

    whole, _, optimizer = start()
    steps(whole, optimizer, 4)

    first, modules, optimizer = start()
    steps(first, optimizer, 2)
    with StateWriter(tmp_path) as writer:
        writer.save(2, tensors_of({"lora": modules}, [optimizer]), {})
    state = newest_state(tmp_path)
    assert state is not None
    assert (state.folder / "lora.safetensors").stat().st_size < 20_000
    resumed, modules, optimizer = start()
    steps(resumed, optimizer, 1)
    state.read(into=tensors_of({"lora": modules}, [optimizer]))
    steps(resumed, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_what_is_read_off_for_saving_is_what_was_put_in(dit):
    updates = random_updates(dit)
    attach(dit, updates, scale=0.1)
    for state in (lambda: None, lambda: merge(dit)):
        state()
        found = updates_of(dit)
        assert found.keys() == updates.keys()
        assert all(torch.equal(found[p].A, u.A) and found[p].alpha == u.alpha for p, u in updates.items())


def test_any_model_with_linear_maps():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    assert add_lora(model, rank=1, targets=ALL) == ["0", "2"]
    assert isinstance(model[0], LoRALinear)
    assert len(factors(model)) == 2


# ---- refused --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_anything_changes(dit):
    updates = random_updates(dit, ends="to_q")
    path = next(iter(updates))
    good = updates[path]
    for wrong, words in (
        ({"blocks.9.attention.to_q": good}, "no linear map blocks.9"),
        ({path: Update(good.A[:, :-1], good.B, 1.0)}, r"is A \[3, 31\]"),
        ({"patch_embed.proj": good}, "no linear map patch_embed.proj"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            attach(dit, {**updates, **wrong})
        assert not has_adapters(dit)
    for name in ("default", "keys", "a.b", ""):
        attach(dit, updates) if name == "default" else None
        with pytest.raises(InvalidRequest, match="cannot be called"):
            attach(dit, updates, name=name)
    with pytest.raises(InvalidRequest, match="no LoRA 'other'"):
        set_scales(dit, {"other": 1.0})
    with pytest.raises(InvalidRequest, match="scaled by nan"):
        set_scales(dit, {"default": float("nan")})
    merge(dit)
    with pytest.raises(InvalidRequest, match="merged into this model"):
        attach(dit, updates, name="another")


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"rank": 2, "dropout": 1.0}, {"rank": 2, "targets": ("to_w",)}])
def test_settings_are_checked(dit, wrong):
    with pytest.raises(InvalidRequest):
        add_lora(dit, **wrong)
