"""Modulation rows are looked up instead of computed, with the same result whatever comes: times, weights, gradients."""

import copy

import pytest
import torch

from videogen.models.dit import AdaptiveNorm, DiT
from videogen.runtime import modulation
from videogen.runtime.dit import fast_dit
from videogen.runtime.modulation import cache_modulation, plain_modulation
from videogen.testing import TINY_DIT, randomize
from videogen.types import Conditioning

CLOSE = {"atol": 1e-12, "rtol": 1e-12}
TIMES = [999.0, 500.0, 3.0]


def network(**changes) -> DiT:
    dit = DiT(TINY_DIT if not changes else type(TINY_DIT)(**{**TINY_DIT.__dict__, **changes}))
    randomize(dit, seed=0)
    return dit.double().eval()


def call(dit: DiT, t, ofs=None) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    b, config = len(t), dit.config
    frames = 4 if config.patch_size_t else 3
    shape = (b, frames, config.out_channels, config.sample_height, config.sample_width)
    cond = Conditioning(
        text=torch.randn(b, config.max_text_seq_length, config.text_embed_dim, generator=g, dtype=torch.float64),
        channels=torch.randn(shape, generator=g, dtype=torch.float64),
        vectors={} if ofs is None else {"ofs": torch.tensor(ofs, dtype=torch.float64)},
    )
    return dit(torch.randn(shape, generator=g, dtype=torch.float64), torch.as_tensor(t), cond)


def products(monkeypatch) -> list:
    """Every call that multiplies with the weights of a norm adds one."""
    calls = []
    real = modulation._compute
    monkeypatch.setattr(modulation, "_compute", lambda *args: (calls.append(1), real(*args))[1])
    return calls


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@torch.no_grad()
def test_known_times_multiply_nothing_and_new_ones_once(monkeypatch, fast: bool):
    plain, dit = network(), network()
    calls = products(monkeypatch)
    cache_modulation(fast_dit(dit) if fast else dit, TIMES)
    norms = sum(isinstance(m, AdaptiveNorm) for m in dit.modules())
    assert len(calls) == norms == 5  # one product for all times of a norm
    for t in ([999, 999], [3.0], [500, 3], [500.0, 500.0, 999.0]):
        assert torch.allclose(call(dit, t), call(plain, t), **CLOSE), t
    assert len(calls) == norms
    for _ in range(2):
        assert torch.allclose(call(dit, [250.25, 3.0]), call(plain, [250.25, 3.0]), **CLOSE)
    assert len(calls) == 2 * norms


@torch.no_grad()
def test_equal_times_share_a_row_and_the_mixed_have_their_own():
    dit = cache_modulation(network(), TIMES)
    cond = Conditioning()

    def rows(*t):
        return dit.embed_time(torch.tensor(t), cond, torch.device("cpu"), torch.float64)

    assert rows(3.0, 3.0).tolist() == rows(3.0).tolist() == [2]
    assert rows(999.0, 3.0).tolist() == [0, 2]
    assert rows(3.0, 3.0).data_ptr() == rows(3.0).data_ptr()  # nothing is made, so nothing is sent to the device


@torch.no_grad()
def test_the_oldest_rows_make_room(monkeypatch):
    plain, dit = network(), network()
    cache_modulation(dit, TIMES, capacity=4)
    calls = products(monkeypatch)
    for t in ([1.0, 2.0], [3.0, 1.0], [999.0, 2.0]):  # 999 went for 2, and 500 for 999
        assert torch.allclose(call(dit, t), call(plain, t), **CLOSE), t
    assert len(calls) == 5 * 2
    many = [7.0, 8.0, 9.0, 10.0, 11.0]  # more than there is room for: as if nothing were cached
    assert torch.allclose(call(dit, many), call(plain, many), **CLOSE)


@torch.no_grad()
def test_scalars_beside_the_time_are_part_of_the_key(monkeypatch):
    changes = {"patch_size_t": 2, "ofs_embed_dim": 16, "use_learned_positional_embeddings": False}
    plain, dit = network(**changes), network(**changes)
    cache_modulation(dit, TIMES, {"ofs": 2.0})
    calls = products(monkeypatch)
    assert torch.allclose(call(dit, [500, 500], [2.0]), call(plain, [500, 500], [2.0]), **CLOSE)
    assert not calls
    for ofs in ([1.0], [2.0, 0.5]):
        assert torch.allclose(call(dit, [500, 500], ofs), call(plain, [500, 500], ofs), **CLOSE)
    assert len(calls) == 5 * 2


@pytest.mark.parametrize("part", ["blocks.1.norm2.linear", "time_embed.linear_2", "norm_out.linear"])
@torch.no_grad()
def test_changed_weights_are_seen(part: str):
    """As a LoRA is merged and unmerged: in place, or with another tensor in the parameter."""
    plain, dit = network(), network()
    cache_modulation(dit, TIMES)
    before = call(dit, [500])
    for model in (plain, dit):
        model.get_submodule(part).weight.mul_(1.5)
    assert torch.allclose(call(dit, [500]), call(plain, [500]), **CLOSE)
    for model in (plain, dit):
        weight = model.get_submodule(part).weight
        weight.data = weight.data / 1.5
    assert torch.allclose(call(dit, [500]), before, **CLOSE)


def test_gradients_are_those_of_the_weights():
    plain, dit = network(), network()
    cache_modulation(dit, TIMES)
    for model in (plain, dit):
        call(model, [500.0, 3.0]).pow(2).mean().backward()
    for (name, p), q in zip(plain.named_parameters(), dit.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


@torch.no_grad()
def test_weights_stay_in_the_state_dict_and_come_back():
    plain, dit = network(), network()
    cache_modulation(dit, TIMES)
    parked = {name for name, module in dit.named_modules() if getattr(module, "parked", False)}
    assert parked == {name for name, _ in dit.named_modules() if name.endswith(("norm1.linear", "norm2.linear"))} | {
        "norm_out.linear"
    }
    state = dit.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    assert state.keys() == plain.state_dict().keys()
    assert torch.allclose(call(copy.deepcopy(dit), [3.0, 3.0]), call(plain, [3.0, 3.0]), **CLOSE)
    plain_modulation(dit)
    assert torch.equal(call(dit, [3.0, 999.0]), call(plain, [3.0, 999.0]))
    assert not any(hasattr(m, "parked") or "table" in m.__dict__ or "rows" in m.__dict__ for m in dit.modules())


def test_rows_filled_in_inference_mode_serve_outside_of_it():
    plain, dit = network(), network()
    with torch.inference_mode():
        cache_modulation(dit, TIMES[:1])
        call(dit, [3.0])
    with torch.no_grad():
        assert torch.allclose(call(dit, [250.0, 3.0]), call(plain, [250.0, 3.0]), **CLOSE)


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_weights_are_parked_and_nothing_waits():
    plain, dit = network().cuda(), network().cuda()
    cache_modulation(dit, TIMES)
    assert dit.blocks[0].norm1.linear.weight.device.type == "cpu"
    t, cond = torch.tensor([3.0, 3.0]), Conditioning()
    torch.cuda.set_sync_debug_mode("error")
    try:
        index = dit.embed_time(t, cond, torch.device("cuda", 0), torch.float64)
        rows = dit.norm_out.rows(index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    time = plain.embed_time(t, cond, torch.device("cuda", 0), torch.float64)
    assert torch.allclose(rows.expand(-1, 2, -1), plain.norm_out.rows(time), **CLOSE)
    plain_modulation(dit)
    assert dit.blocks[0].norm1.linear.weight.device.type == "cuda"


@torch.no_grad()
def test_rows_depend_on_the_times_expected_and_on_nothing_before_them():
    """Bit for bit: the last bits of a product depend on how many rows it has."""
    fresh, used = (cache_modulation(network().float()) for _ in range(2))
    for times in ([999.0], [3.0, 999.0, 500.0, 7.0, 8.0, 9.0, 10.0]):
        modulation.expect(used, times, {})
    for dit in (fresh, used):
        modulation.expect(dit, TIMES, {})
    for one, other in zip(fresh.modulation.norms, used.modulation.norms, strict=True):  # type: ignore[union-attr]
        for k in TIMES:
            places = [dit.modulation.places[(k,)] for dit in (fresh, used)]  # type: ignore[union-attr]
            assert torch.equal(one.table[places[0]], other.table[places[1]])  # type: ignore[index]
