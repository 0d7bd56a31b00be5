"""The fast rows of the transformer give the plain numbers, for every variant, and can be taken out again."""

import copy
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "parity"))
from dit_variants import VARIANTS, inputs, ours, relative_error, run_theirs, theirs

from videogen import load
from videogen.config import DiTConfig
from videogen.models import attention as plain
from videogen.models.dit import DiT
from videogen.runtime.counters import count
from videogen.runtime.dit import fast_dit, plain_dit
from videogen.testing import TINY_DIT, randomize, tiny_batch, tiny_pipeline
from videogen.types import Conditioning
from videogen.weights.diffusers import load_dit
from videogen.weights.hub import find_model

logging.getLogger("diffusers").setLevel(logging.ERROR)
SIZE = (4, 8, 12)


def network(**changes) -> DiT:
    dit = DiT(replace(TINY_DIT, **changes))
    randomize(dit, seed=0)
    return dit.eval()


def cast(cond: Conditioning, dtype: torch.dtype) -> Conditioning:
    text, channels = (None if x is None else x.to(dtype) for x in (cond.text, cond.channels))
    return Conditioning(text, channels, None, {name: x.to(dtype) for name, x in cond.vectors.items()})


def error(a: torch.Tensor, truth: torch.Tensor) -> float:
    return float((a.double() - truth).norm() / truth.norm())


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_equals_the_plain_rows_and_diffusers(name: str):
    config = VARIANTS[name]
    reference = theirs(config, torch.float64)
    given = inputs(config, SIZE, torch.float64)
    truth, dit = run_theirs(reference, *given), ours(reference, config)
    expected = dit(*given)
    for tokens in (None, 37):
        got = fast_dit(dit, mlp_tokens=tokens)(*given)
        assert relative_error(got, expected) <= 1e-12
        assert relative_error(got, truth) <= 1e-10
    latents, t, cond = given
    one = cond.replace(text=cond.text[:1], channels=None if cond.channels is None else cond.channels[:1])
    assert relative_error(dit(latents[:1], t[:1], one), expected[:1]) <= 1e-12
    assert torch.equal(plain_dit(dit)(*given), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["2B", "5B", "1.5-I2V"])
@torch.no_grad()
def test_error_is_no_larger_than_diffusers(name: str, dtype: torch.dtype):
    """Against float64 with the same (rounded) weights and inputs."""
    config = VARIANTS[name]
    half = theirs(config, dtype)
    exact = theirs(config, torch.float64)
    exact.load_state_dict(half.state_dict())
    mine, them = [], []
    for seed in range(3):
        latents, t, cond = inputs(config, SIZE, torch.float64, seed=seed)
        latents, cond = latents.to(dtype), cast(cond, dtype)
        truth = run_theirs(exact, latents.double(), t, cast(cond, torch.float64))
        them.append(error(run_theirs(half, latents, t, cond), truth))
        mine.append(error(fast_dit(ours(half, config))(latents, t, cond), truth))
    assert sum(mine) <= 1.05 * sum(them)


@torch.no_grad()
def test_error_on_trained_weights_is_no_larger_than_that_of_the_plain_rows():
    """The bundled model; its plain rows are diffusers' numbers (tests/parity)."""
    dit = load_dit(find_model("tiny"))
    batch = tiny_batch(dit.config, dtype=torch.bfloat16)
    half = copy.deepcopy(dit).bfloat16()
    exact = copy.deepcopy(half).double()
    truth = exact(batch.latents.double(), batch.t, cast(batch.cond, torch.float64))
    before = error(half(*batch), truth)
    assert 1e-4 < error(fast_dit(half)(*batch), truth) <= 1.05 * before


@pytest.mark.parametrize("changes", [{"attention_head_dim": 48}, {"norm_elementwise_affine": False},
                                     {"attention_bias": False}, {"activation_fn": "gelu"}], ids=str)  # fmt: skip
@torch.no_grad()
def test_every_other_setting(changes: dict):
    dit = network(**changes, use_learned_positional_embeddings=False).double()
    batch = tiny_batch(dit.config, dtype=torch.float64)
    expected = dit(*batch)
    assert relative_error(fast_dit(dit)(*batch), expected) <= 1e-12


@torch.no_grad()
def test_gates_and_the_turn_are_bit_equal_in_float64():
    r = torch.randn
    x, y, gate = r(2, 9, 32).double(), r(2, 9, 32).double(), r(2, 1, 32).double()
    expected = plain.gate_add(x, y, gate, 4)
    torch.ops.videogen.gate_add_(x, y, gate, 4)
    assert relative_error(y, expected) < 1e-15
    q, rotary, weight, bias = r(2, 3, 9, 32).double(), r(2, 5, 16), r(32).double(), r(32).double()
    expected = plain.norm_rotate(q, weight, bias, 1e-6, rotary, 4)
    torch.ops.videogen.norm_rotate_(q, weight, bias, 1e-6, rotary, 4)
    assert torch.equal(q, expected)


@torch.no_grad()
def test_pieces_cover_every_token():
    """Longer than one piece, on both sides of the border between text and video."""
    torch.manual_seed(0)
    x, rows = torch.randn(2, 300, 32).double(), torch.randn(2, 2, 2, 32).double()
    expected = plain.norm_modulate(x, None, None, 1e-5, rows[0], rows[1], 70)
    got = torch.ops.videogen.norm_modulate(x, None, None, 1e-5, rows[0], rows[1], 70)
    assert relative_error(got, expected) < 1e-14
    q, rotary, one = torch.randn(1, 2, 300, 16), torch.randn(2, 230, 8), torch.ones(16)
    expected = plain.norm_rotate(q, one, one, 1e-6, rotary, 70)
    torch.ops.videogen.norm_rotate_(q, one, one, 1e-6, rotary, 70)
    assert torch.equal(q, expected)


# ---- what must stay as it was ---------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_plain_rows():
    dit, batch = network(), tiny_batch()
    dit(*batch).pow(2).mean().backward()
    expected = [p.grad for p in dit.parameters()]
    dit.zero_grad()
    fast_dit(dit)(*batch).pow(2).mean().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(dit.parameters(), expected, strict=True))


@torch.no_grad()
def test_the_stream_that_goes_in_is_not_written_to():
    """Step caches keep it."""
    dit = fast_dit(network())
    tokens = dit.embed(*tiny_batch())
    before = tokens.x.clone()
    for block in dit.each_block():
        block(tokens.x, tokens.time, dit.rotary(tokens.position, tokens.text_length), tokens.text_length)
        assert torch.equal(tokens.x, before)


@torch.no_grad()
def test_weights_are_the_same_parameters_in_one_storage():
    dit = network()
    before, parameters = copy.deepcopy(dit.state_dict()), [id(p) for p in dit.parameters()]
    fast_dit(fast_dit(dit, join=True), join=True)  # twice is once
    attention = dit.blocks[0].attention
    maps = attention.to_q, attention.to_k, attention.to_v
    assert len({to.weight.untyped_storage().data_ptr() for to in maps}) == 1
    assert attention.to_q.weight.untyped_storage().nbytes() == 3 * attention.to_q.weight.nbytes  # and no copy
    for undo in (lambda d: d, plain_dit):
        after = undo(dit).state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [id(p) for p in dit.parameters()] == parameters
    assert attention.to_q.weight.untyped_storage().nbytes() == attention.to_q.weight.nbytes
    assert not {"forward", "mlp_tokens"} & dit.blocks[0].__dict__.keys()
    assert not {"positions", "rotary"} & dit.__dict__.keys()
    where = [p.data_ptr() for p in dit.parameters()]
    assert [p.data_ptr() for p in fast_dit(dit).parameters()] == where


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_one_product_for_q_k_and_v(bias: bool):
    """Of weights that lie together, and of weights that do not or no longer."""
    dit = network(attention_bias=bias).double()
    attention, x = dit.blocks[0].attention, torch.randn(2, 7, 32, dtype=torch.float64)
    maps = attention.to_q, attention.to_k, attention.to_v

    def product() -> torch.Tensor:
        return torch.ops.videogen.qkv(x, *(to.weight for to in maps), *(to.bias for to in maps))

    expected = torch.cat([to(x) for to in maps], dim=-1)
    assert relative_error(product(), expected) <= 1e-14
    fast_dit(dit, join=True)
    assert relative_error(product(), expected) <= 1e-14
    maps[1].weight *= 2
    assert relative_error(product(), torch.cat([to(x) for to in maps], dim=-1)) <= 1e-14
    maps[2].weight.data = maps[2].weight * 3
    assert relative_error(product(), torch.cat([to(x) for to in maps], dim=-1)) <= 1e-14


@pytest.mark.parametrize("what", ["q in place", "k another tensor", "v wrapped", "v hooked", "moved", "dtype"])
@torch.no_grad()
def test_what_happens_to_a_weight_is_seen(what: str):
    """LoRA merged or beside the weight, 8-bit maps, weights that travel: the plain model and the fast one agree."""
    dits, batch = [network().double(), fast_dit(network().double(), join=True)], tiny_batch(dtype=torch.float64)
    before = dits[0](*batch)
    for dit in dits:
        attention = dit.blocks[1].attention
        match what:
            case "q in place":
                attention.to_q.weight += torch.linspace(-1, 1, 32).double()[:, None]
            case "k another tensor":
                attention.to_k.weight.data = attention.to_k.weight * 1.1
            case "v wrapped":
                attention.to_v = nn.Sequential(attention.to_v, nn.Tanh())
            case "v hooked":
                attention.to_v.register_forward_hook(lambda module, args, output: output * 2)
            case "moved":
                dit._apply(lambda t: t.clone() * 1.1)
            case "dtype":
                dit.float().double().proj_out.weight *= 1.1
    expected = dits[0](*batch)
    assert relative_error(expected, before) > 1e-3
    assert relative_error(dits[1](*batch), expected) <= 1e-12


@torch.no_grad()
def test_saving_keeps_every_byte(tmp_path: Path):
    pipe = tiny_pipeline()
    expected = copy.deepcopy(pipe.dit.state_dict())
    fast_dit(pipe.dit, join=True)
    pipe.save(tmp_path / "model")
    opened = load(tmp_path / "model", dtype="float32").dit.state_dict()
    assert opened.keys() == expected.keys()
    assert all(torch.equal(opened[name], value) for name, value in expected.items())


@torch.no_grad()
def test_positions_are_made_once_per_size(monkeypatch):
    from videogen.models import dit as module

    calls, real = [], module.rotary_table
    monkeypatch.setattr(module, "rotary_table", lambda *args: (calls.append(1), real(*args))[1])
    dit, batch = fast_dit(network()), tiny_batch()
    dit(*batch)
    dit(*batch)
    assert len(calls) == 1
    tokens = dit.embed(*batch)  # a part of the tokens, as a rank has it, is another table
    part = replace(tokens, x=tokens.x[:, :14], position=tokens.position[:14])
    assert torch.allclose(dit.run_blocks(part).x, plain_dit(dit).run_blocks(part).x, atol=1e-5)


# ---- what it costs --------------------------------------------------------------------------------------------------


def test_a_block_of_5b_keeps_five_streams_and_moves_a_third():
    """49 x 480 x 720, both halves of guidance; the plain block moves what diffusers' does (tests/test_budgets.py)."""
    config = DiTConfig(num_layers=1, num_attention_heads=48, use_rotary_positional_embeddings=True)
    video, text = 13 * 30 * 45, 226
    with torch.device("meta"):
        dit = DiT(config).bfloat16().eval()
        x, time = torch.empty(2, text + video, 3072).bfloat16(), torch.empty(2, 512).bfloat16()
        rotary = torch.empty(2, video, 32)
    before = count(dit.blocks[0], x, time, rotary, text)
    after = count(fast_dit(dit).blocks[0], x, time, rotary, text)
    assert after.flops == before.flops
    assert before.ops >= 60
    assert after.ops <= 32
    assert after.bytes <= 0.37 * before.bytes
    assert after.peak_bytes <= 4.1 * x.nbytes  # beside `x` itself; diffusers 11.9


# ---- Triton ---------------------------------------------------------------------------------------------------------

UNDER_THE_INTERPRETER = """
import torch
from videogen.models import attention as plain
from videogen.runtime import dit, triton_dit

torch.manual_seed(0)
# The interpreter cuts a float32 to a bfloat16 where the hardware rounds: one unit in the last place instead of half.
SLACK = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}

def check(got, exact, dtype):
    difference = (got.double() - exact).abs()
    assert bool((difference <= SLACK[dtype] * (1 + exact.abs())).all()), (dtype, difference.max())

def wide(*tensors):
    return [None if t is None else t.double() for t in tensors]

CASES = (2, 4, 3, 12, 2, 2, True), (1, 3, 5, 16, 1, 1, True), (2, 2, 1, 48, 0, 1, False)
for dtype in SLACK:
    for b, s, k, c, text, batch_of_rows, affine in CASES:
        d = k * c
        new = lambda *shape: torch.randn(shape).to(dtype)
        x, y, weight, bias = new(b, s, d), new(b, s, d), new(d), new(d)
        shift, scale, gate = new(batch_of_rows, 6 * d).view(-1, 2, 3, d).permute(2, 1, 0, 3)
        w, z = (weight, bias) if affine else (None, None)
        exact = plain.norm_modulate(*wide(x, w, z), 1e-5, *wide(shift, scale), text)
        check(triton_dit.norm_modulate(x, w, z, 1e-5, shift, scale, text), exact, dtype)
        into = y.clone()
        triton_dit.gate_add_(x, into, gate, text)
        check(into, plain.gate_add(*wide(x, y, gate), text), dtype)
        qkv, rotary = new(b, s, 3, k, c), torch.randn(2, s - text, c // 2) if affine else None
        before, q = qkv.clone(), qkv[:, :, 1].transpose(1, 2)
        exact = plain.norm_rotate(*wide(q, weight[:c], bias[:c]), 1e-6, rotary, text)
        triton_dit.norm_rotate_(q, weight[:c], bias[:c], 1e-6, rotary, text)
        check(q, exact, dtype)
        assert torch.equal(qkv[:, :, 0], before[:, :, 0]) and torch.equal(qkv[:, :, 2], before[:, :, 2])
"""


def test_triton_kernels_give_the_plain_rows():
    """In a process of its own: the interpreter must be asked for before Triton is imported."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", UNDER_THE_INTERPRETER], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_on_a_gpu_the_fast_rows_are_as_near_as_the_plain_ones(dtype: torch.dtype):
    config = replace(VARIANTS["5B"], attention_head_dim=64, num_attention_heads=5)
    half = ours(theirs(config, torch.float64), config).to("cuda", dtype)
    exact = copy.deepcopy(half).double()
    latents, t, cond = inputs(config, SIZE, torch.float64)
    latents, t = latents.to("cuda", dtype), t.cuda()
    cond = Conditioning(text=cond.text.to("cuda", dtype))
    truth = exact(latents.double(), t, cast(cond, torch.float64))
    before = error(half(latents, t, cond), truth)
    after = error(fast_dit(half, mlp_tokens=64)(latents, t, cond), truth)
    assert after <= max(1.05 * before, 1e-11)  # in float64 a kernel is given eps as a float32
