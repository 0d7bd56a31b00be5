"""`videogen lora inspect | merge | convert` and `--lora`: results on stdout, refusals in three lines, early."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from videogen.cli import main, parse
from videogen.config import DiTConfig
from videogen.data.video import read_recipe
from videogen.models.lora import Update
from videogen.weights.card import read_card
from videogen.weights.diffusers import load_dit, verify_folder
from videogen.weights.hub import find_model
from videogen.weights.lora import FORMATS, linear_sizes, open_lora, read_updates, save_lora


def lora(path: Path, config: DiTConfig, *, form: str = "peft", maps: str = "attention", alpha: float = 1.0) -> Path:
    generator = torch.Generator().manual_seed(0)
    updates = {
        name: Update(0.2 * torch.randn(2, i, generator=generator), 0.2 * torch.randn(o, 2, generator=generator), alpha)
        for name, (o, i) in linear_sizes(config).items()
        if maps in name
    }
    return save_lora(path, updates, form=form)


@pytest.fixture(scope="module")
def tiny() -> DiTConfig:
    return read_card(find_model("tiny")).dit


@pytest.fixture
def file(tmp_path, monkeypatch, tiny) -> Path:
    monkeypatch.chdir(tmp_path)
    return lora(Path("style.safetensors"), tiny)


@pytest.fixture
def other(tmp_path) -> Path:
    """One of 2B, as small as that goes."""
    return lora(tmp_path / "other.safetensors", DiTConfig(), maps="blocks.29.attention.to_q")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert all(word in err for word in words), err
    assert [line.split(":")[0].strip() for line in err.splitlines()[-3:]] == ["error", "why", "try"]
    return err


def test_inspect_says_what_a_file_holds(file, tiny, capsys):
    assert main(["lora", "inspect", str(file), "--model", "tiny", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["format"], facts["rank"], facts["alpha"], facts["scale"]) == ("peft", 2, 1.0, 0.5)
    assert facts["blocks"] == tiny.num_layers
    assert facts["maps"] == {f"attention.{to}": tiny.num_layers for to in ("to_q", "to_k", "to_v", "to_out")}
    assert facts["model"] == {"name": "tiny", "fits": True}
    assert facts["sha256"] == open_lora(file).sha256
    assert main(["lora", "inspect", str(file)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if len(line.split()) > 1)
    assert lines["format"] == "peft"


def test_inspect_names_the_models_that_fit(other, capsys):
    assert main(["lora", "inspect", str(other), "--model", "tiny", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fits"][0] == "zai-org/CogVideoX-2b"
    assert not facts["model"]["fits"]
    assert "blocks.29.attention.to_q is 1920 to 1920 in the file, not there in the model" in facts["model"]["why"]


def test_inspect_imports_no_torch(file):
    code = f"""
import sys
from videogen.cli import main
assert main(["lora", "inspect", {str(file)!r}, "--model", "tiny"]) == 0
assert not {{"torch", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_convert_writes_every_format(file, tmp_path, capsys):
    updates = read_updates(open_lora(file))
    for form in FORMATS:
        assert main(["lora", "convert", f"{file}:0.5", "--to", form, "--out", f"{form}.safetensors"]) == 0
        (path,) = capsys.readouterr().out.splitlines()
        found = open_lora(path)
        assert found.format == form
        for name, update in read_updates(found).items():
            torch.testing.assert_close(update.alpha / update.rank * update.B, 0.25 * updates[name].B)
    assert main(["lora", "convert", str(file), "--to", "peft", "--out", "kohya.safetensors"]) == 6
    refused(capsys, "kohya.safetensors exists")
    assert main(["lora", "convert", str(file), "--to", "peft", "--out", "kohya.safetensors", "--overwrite"]) == 0
    assert main(["lora", "convert", str(file), "--to", "lycoris", "--out", "x.safetensors"]) == 2


def test_alpha_is_set_for_what_sat_exported(file, capsys):
    assert main(["lora", "convert", f"{file}:1/r", "--to", "kohya", "--out", "fixed.safetensors"]) == 0
    assert set(open_lora("fixed.safetensors").alphas.values()) == {1.0}


def test_a_pickle_of_sat_is_converted_in_a_process_of_its_own(file, tiny, tmp_path, capsys):
    assert main(["lora", "convert", str(file), "--to", "sat", "--out", "sat.safetensors"]) == 0
    torch.save({"module": load_file("sat.safetensors")}, "mp_rank_00_model_states.pt")
    assert main(["t2v", "a", "--lora", "mp_rank_00_model_states.pt"]) == 3
    assert "videogen lora convert mp_rank_00_model_states.pt" in capsys.readouterr().err
    assert main(["lora", "convert", "mp_rank_00_model_states.pt", "--to", "peft", "--out", "peft.safetensors"]) == 0
    capsys.readouterr()
    ours, back = read_updates(open_lora(file)), read_updates(open_lora("peft.safetensors"))
    for name, update in back.items():
        torch.testing.assert_close(update.alpha / update.rank * update.B @ update.A, 0.5 * ours[name].B @ ours[name].A)
    assert not list(tmp_path.glob(".videogen-*"))
    Path("evil.pt").write_bytes(b"cos\nsystem\n(S'touch marker'\ntR.")
    assert main(["lora", "convert", "evil.pt", "--to", "peft", "--out", "x.safetensors"]) == 3
    refused(capsys, "evil.pt is not read")
    assert not Path("marker").exists()


def test_merge_writes_a_model_with_its_provenance(file, capsys):
    assert main(["lora", "merge", "tiny", f"{file}:0.5", "--out", "mine"]) == 0
    assert capsys.readouterr().out == f"{Path('mine').absolute()}\n"
    verify_folder("mine")
    merged, plain = load_dit("mine"), load_dit(find_model("tiny"))
    updates = read_updates(open_lora(file))
    for name, weight in plain.state_dict().items():
        expected = weight
        if (update := updates.get(name.removesuffix(".weight"))) is not None:
            expected = (weight.float() + 0.25 * update.B @ update.A).to(weight.dtype)
            assert not torch.equal(expected, weight)
        torch.testing.assert_close(merged.state_dict()[name], expected, rtol=1e-3, atol=1e-5)
    card = read_card("mine")
    assert (card.name, card.conditions) == ("mine", read_card(find_model("tiny")).conditions)
    made_of = card.provenance["merged"]
    assert made_of["model"] == "tiny"
    assert made_of["lora"] == [{"file": "style.safetensors", "sha256": open_lora(file).sha256, "scale": 0.5}]
    assert main(["lora", "merge", "tiny", str(file), "--out", "mine"]) == 6
    refused(capsys, "mine exists")


def test_what_is_merged_has_the_settings_of_the_card(file, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("videogen.pipeline.Pipeline.save", lambda pipe, *_, **__: seen.append(pipe))
    assert main(["lora", "merge", "tiny", str(file), "--out", "mine"]) == 0
    assert seen[0].dit.config is seen[0].card.dit
    assert seen[0].vae.config is seen[0].card.vae


@pytest.mark.parametrize("command", [["lora", "merge", "tiny", "{}", "--out", "x"], ["t2v", "a", "--lora", "{}"]])
def test_what_does_not_fit_is_refused_before_torch(command, other, file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("videogen.weights.single.load_parts", lambda *_, **__: 1 / 0)
    assert main([part.format(other) for part in command]) == 2
    refused(capsys, "does not fit tiny", "--model zai-org/CogVideoX-2b")
    assert main([part.format("none.safetensors:0.7") for part in command]) == 2
    refused(capsys, "there is no LoRA file none.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(file.read_bytes()[:100])
    assert main([part.format("damaged.safetensors") for part in command]) == 3
    refused(capsys, "not a readable safetensors file")
    assert not (tmp_path / "x").exists()


def test_a_clip_with_loras_says_so(file, capsys):
    flags = ["--steps=1", "--quiet", "--memory=fast", "--out=clip.mp4", f"--lora={file}:0.5", f"--lora={file}:1/r"]
    assert main(["text-to-video", "a red cross", *flags]) == 0
    capsys.readouterr()
    recipe = read_recipe("clip.mp4")
    assert recipe is not None
    assert [(one["file"], one["scale"]) for one in recipe["lora"]] == [(file.name, 0.5), (file.name, "1.0/r")]
    assert main(["rerun", "clip.mp4", "--out", "again.mp4"]) == 2
    refused(capsys, "the LoRA style.safetensors of this clip is not here")


def test_a_config_file_may_list_them(tmp_path):
    (tmp_path / "clip.yaml").write_text("lora: [a.safetensors, 'b.safetensors:0.7']\n")
    args = parse(["text-to-video", "a", "--config", str(tmp_path / "clip.yaml"), "steps=1"])
    assert args.lora == ["a.safetensors", ("b.safetensors", "0.7")]
