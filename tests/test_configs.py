"""Every file in configs/ can be used as it stands, says how, and a typo in it would be found."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from videogen.config import DistillTraining, DiTTraining, FinetuneTraining, VAETraining, load_training
from videogen.errors import InvalidRequest
from videogen.models.dit import DiT
from videogen.models.vae import VAE

ROOT = Path(__file__).parents[1]
TRAIN = sorted((ROOT / "configs" / "train").glob("*.yaml"))


def test_every_config_is_known_here() -> None:
    assert TRAIN
    assert sorted((ROOT / "configs").rglob("*.y*ml")) == TRAIN


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.stem)
def test_a_training_file_loads_strictly_and_describes_networks(path: Path) -> None:
    config = load_training(path)
    if isinstance(config, DistillTraining):  # the networks are its teacher's
        assert config.teacher
        assert not config.prompts or config.consistency.steps == 0
        return
    if isinstance(config, FinetuneTraining):  # the network is its base's
        assert config.model == "tiny" or config.data  # nobody trains CogVideoX on the world
        assert not config.from_scratch or config.lora is None
        return
    with torch.device("meta"):
        network = DiT(config.model) if isinstance(config, DiTTraining) else VAE(config.model)
    assert sum(p.numel() for p in network.parameters()) > 0
    if isinstance(config, VAETraining):
        assert sum(stage.steps for stage in config.stages) == config.fit.steps
    else:
        space = 8 * config.model.patch_size
        assert (config.height % space, config.width % space, (config.num_frames - 1) % 8) == (0, 0, 0)


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.stem)
def test_its_first_lines_say_command_hardware_time_and_result(path: Path) -> None:
    header = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    assert header, "open with a comment"
    assert re.search(rf"(videogen train|torchrun .* scripts/train.py) configs/train/{path.name}\b", header[0])
    for word in ("Hardware:", "Time:", "Result:"):
        assert f"# {word} " in header[0]


def test_a_mapping_that_is_given_whole_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("task: finetune\nfit: {steps: 3}\nconditions:\n  shares: {first: 1.0}\n  dropout: 0.5\n")

    def conditions(*settings: str):
        found = load_training(path, settings)
        assert isinstance(found, FinetuneTraining)
        assert found.conditions is not None
        assert found.conditions.dropout == 0.5
        return found.conditions.shares

    assert conditions() == {"first": 1}  # and none of the defaults
    assert conditions("conditions.shares={last: 1}") == {"last": 1}
    assert conditions("conditions.shares.last=2") == {"first": 1, "last": 2}
    with pytest.raises(InvalidRequest):
        conditions("conditions.shares={last: many}")


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.stem)
@pytest.mark.parametrize("setting", ["fit.stpes=10", "model.widht=3", "fit.steps=many", "colour=red"])
def test_a_wrong_setting_is_refused(path: Path, setting: str) -> None:
    with pytest.raises(InvalidRequest):
        load_training(path, [setting])


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.stem)
def test_an_override_reaches_its_field_and_no_other(path: Path) -> None:
    plain, changed = load_training(path), load_training(path, ["fit.steps=7", "folder=elsewhere"])
    assert (changed.fit.steps, changed.folder) == (7, "elsewhere")
    assert changed.fit.learning_rate == plain.fit.learning_rate
    assert replace(changed, fit=plain.fit, folder=plain.folder) == plain
