"""The planner against the networks: weights to the byte, peaks as counted on the meta device and as measured here."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import videogen
from videogen.cli import main
from videogen.config import DiTConfig, VAEConfig
from videogen.errors import InvalidRequest, OutOfMemory, as_known, is_out_of_memory
from videogen.models.dit import AdaptiveNorm, DiT
from videogen.models.vae import VAE, chunk_plan, decode_plan
from videogen.runtime import plan as planner
from videogen.runtime import vae as fast
from videogen.runtime import winograd
from videogen.runtime.counters import count
from videogen.runtime.memory import PLANS, next_plan
from videogen.runtime.plan import (
    GIB,
    Job,
    TextShape,
    choose,
    choose_for,
    dit_weights,
    estimate,
    estimates,
    smaller,
    text_activations,
    text_weights,
    vae_weights,
)
from videogen.testing import TINY_DIT, TINY_VAE

ROTARY: dict[str, Any] = {"use_rotary_positional_embeddings": True}
FIVE = DiTConfig(num_attention_heads=48, num_layers=42, **ROTARY)
DITS = [
    DiTConfig(num_layers=2),
    replace(FIVE, num_layers=2),
    replace(FIVE, num_layers=2, patch_size_t=2, sample_height=96, sample_width=170, ofs_embed_dim=512, in_channels=32),
    DiTConfig(num_layers=2, in_channels=32, use_learned_positional_embeddings=True, **ROTARY),
    TINY_DIT,
    replace(TINY_DIT, attention_bias=False, norm_elementwise_affine=False, patch_bias=False, num_layers=3),
]
VAES = [VAEConfig(), replace(VAEConfig(), block_out_channels=(32, 64, 64, 128), layers_per_block=2), TINY_VAE]
ROOT = Path(__file__).parents[2]
CLOSE = 0.03  # of what is counted
NEAR = 0.1  # of what is measured


def nbytes(network: nn.Module) -> int:
    return sum(x.nbytes for x in [*network.parameters(), *network.buffers()])


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", DITS)
def test_weights_of_the_transformer(config: DiTConfig):
    with torch.device("meta"):
        dit = DiT(config)
    parked = sum(nbytes(norm.linear) for norm in dit.modules() if isinstance(norm, AdaptiveNorm))
    found = dit_weights(Job(dit=config, vae=TINY_VAE, dtype="float32"))
    assert (found.total + found.parked, found.parked) == (nbytes(dit), parked)
    streamed = found.there(PLANS["low"])
    assert found.total - streamed == (config.num_layers - 2) * found.block


@pytest.mark.parametrize("config", VAES)
def test_weights_of_the_vae(config: VAEConfig):
    with torch.device("meta"):
        assert vae_weights(Job(dit=TINY_DIT, vae=config, dtype="bfloat16")).total == nbytes(VAE(config).bfloat16())


def t5(shape: TextShape) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    values = {name: getattr(shape, name) for name in shape.__dataclass_fields__}
    with torch.device("meta"):
        return T5EncoderModel(T5Config(**values, feed_forward_proj="gated-gelu", use_cache=False)).eval()


@pytest.mark.parametrize("shape", [TextShape(num_layers=2), TextShape(vocab_size=99, d_model=256, d_kv=64, d_ff=1024,
                                                                     num_layers=4, num_heads=4)])  # fmt: skip
@pytest.mark.parametrize("batch", [1, 3])
def test_the_text_encoder(shape: TextShape, batch: int):
    encoder = t5(shape)
    job = Job(dit=replace(TINY_DIT, max_text_seq_length=226), vae=TINY_VAE, text=shape, batch=batch, dtype="float32")
    assert text_weights(job).total == nbytes(encoder)
    ids = torch.zeros(batch, 226, dtype=torch.long, device="meta")
    assert text_activations(job) == pytest.approx(count(encoder, ids).peak_bytes, rel=CLOSE)


def test_the_text_encoder_is_read_from_its_config(tmp_path: Path):
    assert TextShape.of(tmp_path) == TextShape()
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text('{"d_model": 8, "num_layers": "many", "dropout_rate": 0.1}')
    assert TextShape.of(tmp_path) == TextShape(d_model=8)


# ---- peaks, counted -------------------------------------------------------------------------------------------------


def found(*argv: str) -> list[dict[str, Any]]:
    """The rows of a script in a process of its own: here every call is checked, which keeps its arguments alive."""
    command = [sys.executable, str(ROOT / "scripts" / "memory_plan.py"), *argv, "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def check(rows: list[dict[str, Any]], within: float) -> None:
    off = {row["what"]: row["estimate"] / row["found"] - 1 for row in rows}
    assert {what: error for what, error in off.items() if abs(error) > within} == {}


def test_peaks_counted_on_the_meta_device():
    check(found("counted"), CLOSE)


@pytest.mark.slow
def test_peaks_counted_at_many_sizes():
    check(found("counted", "--full"), CLOSE)


def test_peaks_measured_on_this_machine():
    rows = found("measured")
    assert {row["what"].split(", ")[1] for row in rows} == set(PLANS)
    check(rows, NEAR)


@pytest.mark.slow
def test_peaks_measured_with_a_wider_model():
    check(found("measured", "--full"), NEAR)


def test_what_is_said_twice_is_the_same():
    """The planner imports no torch, so it has these numbers of its own."""
    assert planner.STRIP == fast.BUFFER
    assert (planner.WIDE, planner.BLOCK) == (fast.WIDE, winograd.BLOCK)
    for config in (VAEConfig(), replace(VAEConfig(), first_latent_alone=True)):
        for frames in range(1, 30):
            for encode, sizes in ((True, chunk_plan(frames, 8)), (False, decode_plan(config, frames))):
                assert planner._chunks(config, frames, encode=encode) == [stop - start for start, stop in sizes]


# ---- choosing -------------------------------------------------------------------------------------------------------


def test_each_plan_needs_less_than_the_one_before_and_the_published_figures_stand():
    found = estimates(Job(dit=FIVE, vae=VAEConfig()))
    sizes = [one.device / GIB for one in found]
    assert sizes == sorted(sizes, reverse=True)
    assert [one.widest for one in found] == ["decode", "denoise", "decode", "decode"]
    assert sizes == pytest.approx([23.1, 9.7, 5.3, 3.6], rel=0.03)


def test_the_fastest_that_fits_is_chosen():
    found = estimates(Job(dit=FIVE, vae=VAEConfig()))
    names = [choose(found, device=int(size * GIB)) for size in (80, 16, 8, 4, 2)]
    assert [one and one.plan.name for one in names] == ["fast", "balanced", "low", "minimal", None]
    assert choose(found, device=8 * GIB, host=8 * GIB) is None  # streaming wants weights in pinned memory
    assert planner.choose_or_least(Job(dit=FIVE, vae=VAEConfig()), device=GIB, host=None).plan.name == "minimal"


def test_of_several_clips_the_one_that_needs_most_decides():
    clip = Job(dit=FIVE, vae=VAEConfig())
    single = replace(clip, num_frames=1)
    assert choose_for([single], device=24 * GIB, host=None)[1].plan.name == "fast"
    for jobs in ([clip], [single, clip, clip], [clip, single]):
        job, found = choose_for(jobs, device=24 * GIB, host=None)
        assert (job, found.plan.name) == (clip, "balanced")
    on_a_cpu = replace(clip, device="cpu", dtype="float32")
    assert choose_for([on_a_cpu], device=None, host=GIB)[1].plan.name == "minimal", "too little for any: the least"


def test_a_request_is_only_checked_at_sizes_that_would_fit():
    """To check one may decode a video."""
    job, asked = Job(dit=FIVE, vae=VAEConfig()), []

    def valid(*size: int) -> bool:
        asked.append(size)
        return True

    flags = smaller(job, PLANS["low"], stage="decode", free=4 * GIB, multiple=16, valid=valid)
    assert [flag.split()[0] for flag in flags] == ["--memory", "--frames", "--size"]
    assert len(asked) == 2


def test_flags_that_would_fit_do_fit():
    job = Job(dit=FIVE, vae=VAEConfig())
    flags = smaller(job, PLANS["low"], stage="decode", free=4 * GIB, multiple=16, valid=lambda *_: True)
    assert next(iter(flags)) == "--memory minimal"
    assert [flag.split()[0] for flag in flags] == ["--memory", "--frames", "--size"]
    width, height = map(int, list(flags)[2].split()[1].split("x"))
    need = estimate(replace(job, width=width, height=height), PLANS["low"]).device
    assert flags[f"--size {width}x{height}"] == need <= 4 * GIB
    only = smaller(job, PLANS["minimal"], stage="decode", free=3 * GIB, multiple=16, valid=lambda *_: False)
    assert list(only) == ["--device cpu"]


def test_a_lower_plan_is_one_that_helps_that_stage():
    assert [getattr(next_plan(PLANS["fast"], stage), "name", None) for stage in ("text", "decode")] == ["balanced"] * 2
    assert next_plan(PLANS["low"], "denoise") is None
    assert next_plan(PLANS["minimal"], "decode") is None
    assert next_plan(replace(PLANS["fast"], name="mine"), "denoise") is PLANS["minimal"]


def test_out_of_memory_has_several_names():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    for error in (MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        assert as_known(error).exit_code == OutOfMemory.exit_code


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def five(tmp_path: Path) -> str:
    """CoqVideoX-5B's small files."""
    files = {
        "model_index.json": {"_class_name": "CogVideoXPipeline"},
        "transformer/config.json": {"num_attention_heads": 48, "num_layers": 42, **ROTARY},
        "vae/config.json": {},
        "scheduler/scheduler_config.json": {"_class_name": "CogVideoXDPMScheduler"},
    }
    for name, values in files.items():
        path = tmp_path / "five" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    return str(tmp_path / "five")


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_plans_for_another_machine(five: str, capsys: pytest.CaptureFixture[str]):
    facts = planned(capsys, "plan", "text-to-video", "a cat", "--model", five, "--device-memory", "16")
    assert (facts["chosen"], facts["device"], facts["dtype"]) == ("balanced", "cuda", "bfloat16")
    assert (facts["latents"], facts["tokens"]) == ([13, 16, 60, 90], {"text": 226, "video": 17550})
    assert [plan["fits"] for plan in facts["plans"].values()] == [False, True, True, True]
    assert set(facts["plans"]["low"]["stages"]) == {"text", "denoise", "decode"}
    assert "fast wants 24." in facts["why"]
    facts = planned(capsys, "plan", "--model", five, "--device-memory", "2", "--dtype", "float32")
    assert facts["chosen"] is None
    assert "--dtype bfloat16" in facts["would_fit"]
    assert planned(capsys, "plan", "--model", five, "--device-memory", "2", "--memory", "low")["why"] == "asked for"


def test_the_clip_is_made_under_the_plan_that_was_said(
    five: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """For what is asked, not for the size of the model."""
    monkeypatch.chdir(five)
    loaded: list[Any] = []

    def load(model: str, **options: Any) -> None:
        loaded.append(options["memory"])
        raise KeyboardInterrupt

    monkeypatch.setitem(vars(videogen), "load", load)
    for room in ("videogen.cli.plan", "videogen.pipeline"):
        monkeypatch.setattr(f"{room}.free_host", lambda: 44 * GIB)
    for frames in ("1", "49"):
        flags = ["t2v", "a", "--model", five, "--device", "cpu", "--frames", frames]
        planned_name = planned(capsys, *flags, "--dry-run")["chosen"]
        assert main(flags) == 130
        assert f"memory plan {planned_name}: " in capsys.readouterr().err
        assert loaded.pop().name == planned_name


def test_the_table_and_the_dry_run_are_the_same(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "text-to-video", "a", "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert main(["text-to-video", "a", "--device", "cpu", "--dry-run"]) == 0
    again = capsys.readouterr().out
    assert [line for line in table.splitlines() if not line.startswith("free")] == [
        line for line in again.splitlines() if not line.startswith("free")
    ]
    assert "17 frames of 64x64" in table
    assert any(line.startswith("fast") and line.endswith("<-") for line in table.splitlines())


@pytest.mark.parametrize(
    "flags",
    [
        ["--frames", "50"],
        ["--memory", "tight"],
        ["--device-memory", "0"],
        ["--device-memory", "nan"],
        ["--host-memory", "inf"],
        ["--device-memory", "9", "--device", "cpu"],
    ],
)
def test_the_command_refuses_what_cannot_be(flags: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *flags]) == InvalidRequest.exit_code
    assert capsys.readouterr().err.startswith("error: ")


def test_the_command_imports_no_torch_for_another_machine(five: str):
    code = "import sys; from videogen.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    argv = ["plan", "a cat", "--model", five, "--device-memory", "24"]
    run = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False"
