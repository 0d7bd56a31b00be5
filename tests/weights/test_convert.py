"""`videogen convert`: SAT's pickles and others, read in a process of their own, become models bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from videogen import cli
from videogen.errors import FileError, InvalidRequest, ModelNotFound
from videogen.testing import tiny_pipeline
from videogen.weights import convert as room
from videogen.weights import unpickle
from videogen.weights.card import read_card
from videogen.weights.convert import convert, stored_table
from videogen.weights.diffusers import load_folder, verify_folder
from videogen.weights.sat import PREFIX, SAT_DIT_RULES, SAT_VAE_RULES, TABLE
from videogen.weights.table import DIT_RULES, to_theirs

DIT, VAE = "transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(conditions=("text", "first_frame"), seed=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model alike with other weights."""
    return tiny_pipeline(conditions=("text", "first_frame"), seed=2).save(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def in_process(monkeypatch):
    """The child's work without a process for each: what it collects and refuses is the same."""

    def take(pickle, target, say=lambda text: None):
        loaded = torch.load(pickle, map_location="cpu", weights_only=True)
        tensors, _ = unpickle.collect(loaded, 2 * pickle.stat().st_size + 2**20)
        save_file(tensors, target)

    monkeypatch.setattr(room, "take_tensors", take)


def sat_folder(root: Path, pipe, *, nested=("module",), extra=None) -> Path:
    """What CogVideo publishes: pickles, a nested payload, tables and losses beside the weights."""
    state = {PREFIX + n: t for n, t in to_theirs(pipe.dit.state_dict(), SAT_DIT_RULES).items()}
    if not pipe.dit.config.use_rotary_positional_embeddings:
        state[PREFIX + TABLE] = stored_table(pipe.dit)
    state |= {PREFIX + "mixins.pos_embed.freqs_cos": torch.zeros(5, 4), **(extra or {})}
    payload: dict = state
    for key in reversed(nested):
        payload = {key: payload, "global_steps": 3, "ds_version": "0"}
    for folder in ("transformer/1000", "vae"):
        (root / folder).mkdir(parents=True)
    (root / "transformer" / "latest").write_text("1000")
    torch.save(payload, root / "transformer/1000/mp_rank_00_model_states.pt")
    losses = {"loss.logvar": torch.zeros(()), "loss.perceptual_loss.lin0.weight": torch.zeros(3)}
    state = to_theirs(pipe.vae.state_dict(), SAT_VAE_RULES) | losses
    # Before torch 1.6 a pickle was no archive.
    torch.save({"state_dict": state}, root / "vae/3d-vae.pt", _use_new_zipfile_serialization=False)
    return root


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- the story ------------------------------------------------------------------------------------------------------


def test_the_command_makes_a_model_of_sats_pickles(pipe, base, tmp_path, capsys):
    """With its child processes: a folder that opens, the source untouched, progress and path apart."""
    source = sat_folder(tmp_path / "sat", pipe)
    before, out = snapshot(source), tmp_path / "made"
    assert cli.main(["convert", str(source), "--out", str(out), "--base", str(base)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    assert "mp_rank_00_model_states.pt" in said.err
    assert "in sat's naming" in said.err
    parts = load_folder(out)
    assert same(parts.dit, pipe.dit)
    assert same(parts.vae, pipe.vae)
    assert same(parts.text_encoder, load_folder(base, components=("text_encoder",)).text_encoder)
    verify_folder(out)
    card = read_card(out)
    assert (card.name, card.conditions) == ("made", ("text", "first_frame"))
    assert card.provenance["converted"]["naming"] == ["sat"]
    assert str(tmp_path) not in (out / "videogen.json").read_text()
    assert snapshot(source) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "sat"]

    assert cli.main(["convert", str(source), "--out", str(out), "--base", str(base)]) == 6
    assert "exists" in capsys.readouterr().err


class Evil:
    """Unpickled by anything that calls what a pickle names, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_malicious_pickle_does_nothing(base, tmp_path, capsys):
    marker, source = tmp_path / "marker", tmp_path / "model.pt"
    torch.save({"module": {"a": torch.zeros(2), "evil": Evil(marker)}}, source)
    assert cli.main(["convert", str(source), "--out", str(tmp_path / "out"), "--base", str(base), "--quiet"]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 3
    assert "posix.system" in said.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt"]


# ---- what the child takes, and does not ------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [(), ("module",), ("state_dict",), ("module", "model"), ("model", "state_dict")])
def test_nested_payloads(pipe, base, tmp_path, in_process, nested):
    frozen = {f"{name}.x": torch.zeros(2) for name in ("conditioner", "first_stage_model")}
    out = convert(sat_folder(tmp_path / "sat", pipe, nested=nested, extra=frozen), tmp_path / "out", base=base)
    assert same(load_folder(out, components=("dit",)).dit, pipe.dit)


def test_tensors_are_taken_alone_and_each_once():
    shared = torch.arange(6.0)
    loaded = {"state_dict": {"a": shared, "b": shared, "c": shared[2:], "d": shared.reshape(2, 3).T, "n": 3, 4: shared}}
    tensors, skipped = unpickle.collect(loaded, 2**20)
    assert skipped == ["n", "4"]
    assert torch.equal(tensors["d"], shared.reshape(2, 3).T)
    assert len({t.untyped_storage().data_ptr() for t in tensors.values()}) == 4
    assert all(t.is_contiguous() for t in tensors.values())


@pytest.mark.parametrize(
    ("loaded", "words"),
    [
        ([torch.zeros(1)], "list, no tensors by name"),
        ({"epoch": 3}, "no tensors"),
        ({"a": torch.zeros(1).expand(10**9)}, "larger than the file"),
        ({"a": torch.zeros(3).to_sparse()}, "no plain tensor"),
    ],
)
def test_what_is_no_state_dict_is_refused(loaded, words):
    with pytest.raises(ValueError, match=words):
        unpickle.collect(loaded, 2**20)


@pytest.mark.parametrize(
    "attack",
    [
        "import os; os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
        "open('marker', 'w')",
        "import pathlib; pathlib.Path('there').rename('gone')",
        "import os; os.remove('there')",
        "import os; os.fork()",
    ],
)
def test_the_child_ends_at_what_reading_never_does(tmp_path, attack):
    """The second wall: had torch's reader a hole, this is where code in a pickle would stand."""
    (tmp_path / "there").write_text("x")
    code = f"import runpy, sys; room = runpy.run_path({unpickle.__file__!r}); sys.addaudithook(room['guard']); {attack}"
    run = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 3
    assert "it tried" in json.loads(run.stdout)["error"]
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_a_refusal_does_not_repeat_torchs_advice(tmp_path):
    """Its message says how to open the file without protection."""
    torch.save({"evil": Evil(tmp_path / "marker")}, tmp_path / "evil.pt")
    (tmp_path / "junk.pt").write_bytes(b"\x80\x02junk" * 50)
    for name, words in (("evil.pt", "it asks for posix.system"), ("junk.pt", "")):
        with pytest.raises(Exception) as error:  # noqa: PT011
            torch.load(tmp_path / name, weights_only=True)
        said = unpickle.reason(error.value)
        assert words in said
        assert "weights_only" not in said


# ---- layouts --------------------------------------------------------------------------------------------------------


def test_a_file_of_the_transformer_alone(pipe, base, tmp_path, in_process):
    """Any ending, either naming: the rest is the base's."""
    torch.save(to_theirs(pipe.dit.state_dict(), DIT_RULES), tmp_path / "tuned.bin")
    out = convert(tmp_path / "tuned.bin", tmp_path / "out", base=base)
    assert same(load_folder(out, components=("dit",)).dit, pipe.dit)
    assert (out / VAE).read_bytes() == (base / VAE).read_bytes()
    for name in ("text_encoder/model.safetensors", "tokenizer/tokenizer.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()


def test_a_vae_alone_becomes_a_file_or_part_of_a_model(pipe, base, tmp_path, in_process):
    source = sat_folder(tmp_path / "sat", pipe) / "vae" / "3d-vae.pt"
    with pytest.raises(ModelNotFound, match="do not tell its groups"):
        convert(source, tmp_path / "vae.safetensors", to="single")
    single = convert(source, tmp_path / "vae.safetensors", to="single", base=base)
    assert len(load_file(single)) == len(pipe.vae.state_dict())
    out = convert(single, tmp_path / "out", base=base)
    assert same(load_folder(out, components=("vae",)).vae, pipe.vae)
    assert (out / DIT).read_bytes() == (base / DIT).read_bytes()
    sat = convert(single, tmp_path / "again", to="sat")
    assert [p.name for p in sat.rglob("*.safetensors")] == ["3d-vae.safetensors"]
    with pytest.raises(ModelNotFound, match="a VAE and no transformer"):
        convert(single, tmp_path / "whole", offline=True)


def test_a_model_folder_with_pickles(pipe, base, tmp_path, in_process):
    """Old folders of diffusers: .bin, some of them in shards with an index, an optimizer beside them."""
    old = shutil.copytree(base, tmp_path / "old")
    (old / "videogen.json").unlink()
    for name in (DIT, VAE):
        torch.save(load_file(old / name), (old / name).with_suffix(".bin"))
        (old / name).unlink()
    state = load_file(old / "text_encoder" / "model.safetensors")
    (old / "text_encoder" / "model.safetensors").unlink()
    halves = list(state)[::2], list(state)[1::2]
    names = [f"pytorch_model-0000{k}-of-00002.bin" for k in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        torch.save({n: state[n] for n in half}, old / "text_encoder" / name)
    index = {"metadata": {}, "weight_map": {n: name for name, half in zip(names, halves, strict=True) for n in half}}
    (old / "text_encoder" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save({"x": torch.zeros(1)}, old / "transformer" / "optimizer.bin")
    out = convert(old, tmp_path / "new")
    before, after = load_folder(base), load_folder(out)
    for part in ("dit", "vae", "text_encoder"):
        assert same(getattr(after, part), getattr(before, part))
    assert not list(out.rglob("*.bin"))


def test_t5_beside_sats_files_is_used(pipe, base, tmp_path, in_process):
    source = sat_folder(tmp_path / "sat", pipe)
    shutil.copytree(base / "text_encoder", source / "t5-v1_1-xxl")
    for path in (base / "tokenizer").iterdir():
        shutil.copy(path, source / "t5-v1_1-xxl")
    out = convert(source, tmp_path / "out", variant=None, base=base)
    found = load_folder(out, components=("text_encoder",)).text_encoder
    assert same(found, load_folder(base, components=("text_encoder",)).text_encoder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_casts_every_network(base, tmp_path, dtype):
    out = convert(base, tmp_path / "half", dtype=dtype)
    for path in out.rglob("*.safetensors"):
        kinds = {t.dtype for t in load_file(path).values()}
        assert kinds == {getattr(torch, dtype)} or (path.parent.name == "text_encoder" and dtype == "float16")


def test_exports_are_read_again(base, tmp_path):
    """A single file carries its facts; SAT's names carry none and need a base."""
    single = convert(base, tmp_path / "one.safetensors", to="single")
    assert read_card(single).conditions == read_card(base).conditions
    assert read_card(single).dit == read_card(base).dit
    sat = convert(base, tmp_path / "sat", to="sat")
    state = load_file(sat / "transformer/1/mp_rank_00_model_states.safetensors")
    assert all(name.startswith(PREFIX) for name in state)
    assert (sat / "transformer" / "latest").read_text() == "1"
    back = convert(sat, tmp_path / "back", base=base)
    assert (back / DIT).read_bytes() == (base / DIT).read_bytes()
    assert (back / VAE).read_bytes() == (base / VAE).read_bytes()


def test_nothing_else_is_written_and_the_umask_holds(base, tmp_path):
    before = os.umask(0o022)
    try:
        convert(base, tmp_path / "one.safetensors", to="single")
        convert(base, tmp_path / "sat", to="sat")
        convert(base, tmp_path / "folder")
    finally:
        os.umask(before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "one.safetensors", "sat"]
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*") if p.is_file()} == {0o644}


def test_a_failure_leaves_nothing(base, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "save_folder", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(base, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"to": "gguf"}, InvalidRequest, "no layout"),
        ({"dtype": "int8"}, InvalidRequest, "no dtype"),
        ({"to": "single", "out": "folder"}, InvalidRequest, "no name for a single file"),
        ({"out": "x.safetensors"}, InvalidRequest, "no name for a folder"),
        ({"source": "nowhere"}, ModelNotFound, "there is no model"),
        ({"source": "note.txt"}, ModelNotFound, "is no checkpoint"),
        ({"source": "empty"}, ModelNotFound, "no checkpoint of a known layout"),
        ({"source": "twice"}, ModelNotFound, "holds 2 files mp_rank_00"),
        ({"source": "ranks"}, ModelNotFound, "in several pieces"),
        ({"base": "somewhere"}, InvalidRequest, "is a whole model"),
        ({"out": "note.txt"}, FileError, "exists"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_read(base, tmp_path, change, kind, words):
    (tmp_path / "note.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("twice/1/mp_rank_00", "twice/2/mp_rank_00", "ranks/1/mp_rank_00", "ranks/1/mp_rank_01"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}_model_states.pt").touch()
    names = {"source": str(base), "out": "out", **change}
    source, out = (tmp_path / names.pop("source"), tmp_path / names.pop("out"))
    before = snapshot(tmp_path)
    with pytest.raises(kind, match=words):
        convert(source, out, offline=True, **names)
    assert snapshot(tmp_path) == before
