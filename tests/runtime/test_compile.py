"""One block is compiled for all of them, once; it gives the same numbers, and leaves no trace when undone.

In processes of their own, without the import hook of the suite: its checks would be compiled, too.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from videogen.models.dit import DiT
from videogen.runtime.compile import Compiled, compile_blocks, uncompile_blocks
from videogen.runtime.dit import fast_dit, plain_dit
from videogen.testing import TINY_DIT, randomize, tiny_batch

PROGRAM = """
import sys
from dataclasses import replace
import torch
from torch._dynamo.utils import counters
from videogen.models.dit import DiT
from videogen.runtime.compile import compile_blocks, uncompile_blocks
from videogen.runtime.dit import fast_dit, plain_dit
from videogen.runtime.kernels import set_kernel
from videogen.runtime.modulation import cache_modulation, plain_modulation
from videogen.testing import TINY_DIT, randomize, tiny_batch

rows, backend = sys.argv[1:]
torch.set_grad_enabled(False)
dit = randomize(DiT(replace(TINY_DIT, num_layers=3))).eval()
batch = tiny_batch()
times = [torch.full((2,), t) for t in (900.0, 500.0, 20.0, 7.5)]
expected = [dit(batch.latents, t, batch.cond) for t in times]
if rows == "fast":
    set_kernel(fast_dit(dit, mlp_tokens=50), "auto")
    cache_modulation(dit, [900.0, 500.0, 20.0])  # the last time comes as a surprise
compile_blocks(dit, backend=backend)
for again in range(2):
    for t, e in zip(times, expected):
        got = dit(batch.latents, t, batch.cond)
        assert torch.allclose(got, e, atol=1e-5), (t, (got - e).abs().max())
assert counters["stats"]["unique_graphs"] == 1, counters["stats"]
assert not counters["graph_break"], counters["graph_break"]
plain_modulation(plain_dit(uncompile_blocks(dit)))
assert all(torch.equal(dit(batch.latents, t, batch.cond), e) for t, e in zip(times, expected))
assert counters["stats"]["unique_graphs"] == 1
"""


def run(*arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("rows", ["fast", pytest.param("plain", marks=pytest.mark.slow)])
def test_one_graph_for_all_blocks_and_steps(rows: str):
    """Of the compiler only the front, which decides what is compiled and when."""
    run(rows, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler for CPUs needs g++")
@pytest.mark.parametrize("rows", ["plain", "fast"])
def test_the_same_with_code_that_is_generated(rows: str):
    run(rows, "inductor")


def test_gradients_do_not_go_through_compiled_code():
    """Nor does anything have to be compiled here: only calls without gradients would be."""
    dit, batch = DiT(TINY_DIT), tiny_batch()
    randomize(dit)
    dit(*batch).sum().backward()
    expected = [p.grad for p in dit.parameters()]
    dit.zero_grad()
    compile_blocks(fast_dit(dit))(*batch).sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(dit.parameters(), expected, strict=True))


def test_what_was_there_before_is_there_again():
    dit = fast_dit(DiT(TINY_DIT))
    before = [block.forward for block in dit.blocks]
    compile_blocks(compile_blocks(dit))  # twice is once
    assert all(isinstance(block.forward, Compiled) for block in dit.blocks)
    assert [block.forward for block in uncompile_blocks(dit).blocks] == before
    assert all("forward" not in block.__dict__ for block in plain_dit(compile_blocks(dit)).blocks)
    assert all("forward" not in block.__dict__ for block in uncompile_blocks(dit).blocks)
