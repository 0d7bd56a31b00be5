"""A fine-tune starts as its base, learns what it says, goes on exactly, and leaves what the pipeline computes with."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from videogen.conditioning.layouts import LAYOUTS, Shown
from videogen.config import (
    ConditionsConfig,
    DiTConfig,
    FinetuneTraining,
    FitConfig,
    LoraConfig,
    ValidationConfig,
    WorldConfig,
)
from videogen.data.windows import Cut
from videogen.data.world import clip
from videogen.errors import FileError, InvalidRequest
from videogen.models.dit import DiT
from videogen.pipeline import Pipeline, load
from videogen.testing import SCHEDULER, TINY_DIT, TINY_VAE, tiny_batch, tiny_pipeline
from videogen.training import finetune as module
from videogen.training.encode import make_cache
from videogen.training.examples import Example
from videogen.training.finetune import finetune, grown, kinds_of, usual_conditions, widened
from videogen.training.lesson import Lengthened, Lesson, told_frames
from videogen.weights.card import read_card
from videogen.weights.diffusers import load_dit
from videogen.weights.lora import open_lora

CPU = torch.device("cpu")
TEXT_DIT = dataclasses.replace(TINY_DIT, in_channels=4, use_learned_positional_embeddings=False)
V15_DIT = dataclasses.replace(TINY_DIT, patch_size_t=2, ofs_embed_dim=16, use_learned_positional_embeddings=False)
V15_VAE = dataclasses.replace(TINY_VAE, invert_scale_latents=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    facts = {"licence": "some licence", "provenance": {"data": "noise"}}
    return tiny_pipeline(dtype=torch.float16, **facts).save(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def text_base(tmp_path_factory) -> Path:
    pipe = tiny_pipeline(dit=TEXT_DIT, conditions=("text", "video"))
    return pipe.save(tmp_path_factory.mktemp("models") / "text")


def training(model: Path, folder: Path, **changes) -> FinetuneTraining:
    fit = {"steps": 4, "save_every": 2, "log_every": 1, "bfloat16": False, "warmup_steps": 1, "learning_rate": 1e-2}
    fit |= changes.pop("fit", {})
    values = {"clips": 4, "batch_size": 2, "validation": ValidationConfig(clips=2, times=2, samples=0), **changes}
    return FinetuneTraining(folder=str(folder), model=str(model), fit=FitConfig(**fit), **values)


def video(model: Path, **keywords) -> torch.Tensor:
    how = {name: keywords.pop(name) for name in ("lora", "merge_lora") if name in keywords}
    return load(model, **how).generate("a red circle", **{"seed": 1, "output": "tensor", **keywords})


# ---- what leaves ----------------------------------------------------------------------------------------------------


def test_a_run_of_rate_zero_exports_the_video_it_started_from(base, tmp_path):
    still = {"learning_rate": 0.0}
    model = finetune(training(base, tmp_path / "all", fit=still), CPU)
    lora = finetune(training(base, tmp_path / "lora", fit=still, lora=LoraConfig(rank=2)), CPU)
    before = video(base)
    assert torch.equal(video(model), before)
    assert torch.equal(video(base, lora=lora), before)
    weights = "diffusion_pytorch_model.safetensors"
    for part in ("transformer", "vae"):
        assert (model / part / weights).read_bytes() == (base / part / weights).read_bytes()
    words = "text_encoder/model.safetensors"
    assert (model / words).read_bytes() == (base / words).read_bytes()


def test_what_is_exported_is_the_live_average_bit_for_bit(base, tmp_path, monkeypatch):
    live = {}
    fit = module.fit
    monkeypatch.setattr(module, "fit", lambda *args, **keywords: live.update(fit(*args, **keywords)))
    model = finetune(training(base, tmp_path / "wide", dtype="float32"), CPU)
    pipe = load(base)
    with torch.no_grad():
        for name, value in live["dit"].state_dict().items():
            pipe.dit.state_dict()[name].copy_(value)
    of_average = pipe.generate("a red circle", seed=1, output="tensor")
    assert torch.equal(video(model), of_average)
    assert not torch.equal(of_average, video(base)), "it learned nothing"

    narrow = finetune(training(base, tmp_path / "narrow"), CPU)  # as its base: rounded once, to float16
    with torch.no_grad():
        for name, value in live["dit"].state_dict().items():
            pipe.dit.state_dict()[name].copy_(value.half())
    assert torch.equal(video(narrow), pipe.generate("a red circle", seed=1, output="tensor"))


def test_a_lora_that_was_trained_is_what_its_file_holds(base, tmp_path, monkeypatch):
    live, fit = {}, module.fit
    monkeypatch.setattr(module, "fit", lambda *args, **keywords: live.update(fit(*args, **keywords)))
    settings = training(base, tmp_path, lora=LoraConfig(rank=3, alpha=6.0, targets=["to_q", "mlp.up"]))
    folder = finetune(settings, CPU)
    file = open_lora(folder)
    assert {*file.ranks.values()} == {3}
    assert {*file.alphas.values()} == {6.0}
    assert {name.split(".", 2)[2] for name in file.keys} == {"attention.to_q", "mlp.up"}
    assert file.facts["licence"] == "some licence"
    assert file.facts["provenance"]["finetune"]["lora"]["rank"] == 3
    assert file.facts["provenance"]["base"]["name"] == "tiny-random"

    pipe = load(base)
    module.add_lora(pipe.dit, rank=3, alpha=6.0, targets=["to_q", "mlp.up"], dtype=torch.float32)
    module.put(live["lora"], torch.nn.ModuleList(module.adapters(pipe.dit).values()))
    of_average = pipe.generate("a red circle", seed=1, output="tensor")
    beside, merged = (video(base, lora=folder, merge_lora=how) for how in (False, True))
    assert torch.equal(beside, of_average)
    assert (merged - beside).abs().max() < 1e-5
    assert not torch.equal(beside, video(base)), "it learned nothing"


def test_a_model_says_what_it_came_from_and_no_path(base, tmp_path):
    model = finetune(training(base, tmp_path / "style", conditions=ConditionsConfig(shares={"first": 1.0})), CPU)
    card, before = read_card(model), read_card(base)
    assert (card.name, card.licence) == ("style", "some licence")
    assert card.conditions == before.conditions
    same = ("height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale", "scheduler", "layout")
    assert all(getattr(card, name) == getattr(before, name) for name in same)
    made_of = card.provenance["base"]
    assert made_of["provenance"] == {"data": "noise"}
    assert made_of["sha256"] == {n: sha for n, sha in before.sha256.items() if n.startswith("transformer/")}
    assert str(tmp_path) not in (model / "videogen.json").read_text()


# ---- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["all", "lora"])
def test_a_run_that_was_stopped_goes_on_exactly(base, tmp_path, monkeypatch, lora):
    whole = finetune(training(base, tmp_path / "whole" / "x", lora=lora), CPU)

    class Stop(Exception):
        pass

    def broken(batches, step):
        if step == 3:
            raise Stop
        return at(batches, step)

    at = module.Batches.at
    settings = training(base, tmp_path / "stopped" / "x", lora=lora)
    monkeypatch.setattr(module.Batches, "at", broken)
    with pytest.raises(Stop):
        finetune(settings, CPU)
    monkeypatch.setattr(module.Batches, "at", at)
    again = finetune(settings, CPU)
    names = sorted(p.relative_to(whole) for p in whole.rglob("*.safetensors"))
    assert names
    for name in names:
        one, other = load_file(whole / name), load_file(again / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(FileError, match="caption_dropout was"):
        finetune(dataclasses.replace(settings, caption_dropout=0.5), CPU)


# ---- conditions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TEXT_DIT, dataclasses.replace(TEXT_DIT, patch_size_t=2)], ids=["conv", "linear"])
def test_a_widened_model_computes_what_it_did(config: DiTConfig):
    dit = tiny_pipeline(dit=config, dtype=torch.float64).dit
    batch = tiny_batch(config, dtype=torch.float64)
    before = dit(*batch)
    wide = widened(dit, 8)
    anything = torch.randn(batch.latents.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    after = wide(batch.latents, batch.t, batch.cond.replace(channels=anything))
    assert wide.config.in_channels == 8
    assert (after - before).abs().max() < 1e-12


def test_a_text_model_learns_to_be_told_frames(text_base, tmp_path):
    conditions = ConditionsConfig(shares={"first": 0.5, "first+last": 0.5}, dropout=0.05)
    still = finetune(training(text_base, tmp_path / "still", conditions=conditions, fit={"learning_rate": 0.0}), CPU)
    card = read_card(still)
    assert (card.conditions, card.layout) == (("text", "first_frame", "last_frame", "video"), "frames")
    assert json.loads((still / "model_index.json").read_text())["_class_name"] == "CogVideoXImageToVideoPipeline"
    assert (video(still) - video(text_base)).abs().max() < 1e-5

    model = finetune(training(text_base, tmp_path / "told", conditions=conditions), CPU)
    shown = {"first_frame": np.full((32, 48, 3), 200, dtype=np.uint8), "latents": torch.ones(1, 3, 4, 4, 6)}
    unseen = {"latents": shown["latents"]}
    assert torch.equal(video(still, **unseen), video(still, **shown)), "what it is told counts for nothing yet"
    assert not torch.equal(video(model, **unseen), video(model, **shown)), "it learned nothing from what it was told"


def test_what_cannot_be_told_is_refused(base, text_base, tmp_path):
    first = ConditionsConfig(shares={"first": 1.0})
    with pytest.raises(InvalidRequest, match="a LoRA cannot teach"):
        finetune(training(text_base, tmp_path, conditions=first, lora=LoraConfig(rank=2)), CPU)
    card = read_card(base)
    for layout, word in (("control", "a clip to follow"), ("image", "a still image"), ("inp", "masked clips")):
        with pytest.raises(InvalidRequest, match=word):
            grown(dataclasses.replace(card, layout=layout), {"first_frame"}, training(base, tmp_path))


def test_from_scratch_the_base_gives_its_shape_and_no_weights(base, tmp_path):
    card, new = read_card(base), training(base, tmp_path, from_scratch=True)
    dit = module.prepared(load_dit(base), card, new)
    assert dit.config == card.dit
    assert not dit.proj_out.weight.any(), "as training from scratch begins"
    with pytest.raises(InvalidRequest, match="new weights"):
        module.prepared(load_dit(base), card, dataclasses.replace(new, lora=LoraConfig(rank=2)))


def test_a_base_is_told_what_it_was_told_before(base):
    card = read_card(base)
    assert {*kinds_of(usual_conditions(card))} == {"none", "first", "last", "first+last", "keyframes"}
    assert {*kinds_of(ConditionsConfig(preset="open-sora-plan"))} == {
        *("none", "first", "first+last", "prefix", "keyframes", "all")
    }
    only_first = usual_conditions(dataclasses.replace(card, conditions=("text", "first_frame", "video")))
    assert (only_first.shares, only_first.dropout) == ({"first": 1.0}, 0.05)
    assert usual_conditions(dataclasses.replace(card, layout="text")).shares == {"none": 1.0}


def test_frames_are_told_as_sampling_tells_them():
    """CogVideoX1.5-I2V: padding in front, image latents divided by the scale, and `ofs`."""
    pipe = tiny_pipeline(dit=V15_DIT, vae=V15_VAE)
    images = {0: torch.rand(1, 3, 32, 48) * 2 - 1, 8: torch.rand(1, 3, 32, 48) * 2 - 1}
    like = torch.zeros(1, 4, 4, 4, 6)
    sampled = LAYOUTS["frames"](pipe.vae, Shown(like=like, num_frames=9, padding=1, images=images, generators=[None]))

    stills = [torch.zeros(1, 4, 4, 6) if k == 4 else frame_latent(pipe, images[k]) for k in (0, 4, 8)]
    example = Example(torch.randn(3, 4, 4, 6), torch.cat(stills), torch.zeros(8, 16), 8.0)

    class One:
        def __len__(self) -> int:
            return 1

        def name(self, index: int) -> str:
            return "one"

        def shape(self, index: int) -> tuple[int, int, int]:
            return 3, 4, 6

        def read(self, index: int, rng: np.random.Generator) -> Example:
            return example

    rng = np.random.default_rng(0)
    long = Lengthened(One(), 2)
    assert long.shape(0) == (4, 4, 6)
    read = long.read(0, rng)
    assert torch.equal(read.latents[0], read.latents[1])
    told = told_frames(read, ConditionsConfig(shares={"first+last": 1.0}), rng, 0.0)
    cond = Lesson(pipe.card, lambda texts: torch.zeros(1, 8, 16), CPU).condition([told], read.latents[None])
    torch.testing.assert_close(cond.channels, sampled([0, 8]).channels, rtol=1e-6, atol=0)
    assert cond.vectors["ofs"].tolist() == [2.0]


def frame_latent(pipe: Pipeline, image: torch.Tensor) -> torch.Tensor:
    """As a cache of a model with `invert_scale_latents` has it."""
    mean, _ = pipe.vae.moments(image[:, :, None])
    return mean[:, :, 0].detach() / pipe.vae.config.scaling_factor


@pytest.mark.parametrize(
    ("dit", "vae", "scheduler"),
    [
        (V15_DIT, V15_VAE, {}),
        (dataclasses.replace(TEXT_DIT, use_rotary_positional_embeddings=False), TINY_VAE, {"snr_shift_scale": 3.0}),
        (TEXT_DIT, TINY_VAE, {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}),
    ],
    ids=["1.5-i2v", "2b", "epsilon"],
)
def test_any_model_of_the_family_learns_and_opens(dit, vae, scheduler, tmp_path):
    base = tiny_pipeline(dit=dit, vae=vae, scheduler={**SCHEDULER, **scheduler}).save(tmp_path / "base")
    model = finetune(training(base, tmp_path / "run", fit={"steps": 2}), CPU)
    assert json.loads((model / "scheduler/scheduler_config.json").read_text()).items() >= scheduler.items()
    assert torch.isfinite(video(model)).all()
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert all(0 < line["loss"] < 100 for line in lines)


def test_half_precision_rests_under_a_lora_and_learns_beside_it(base, tmp_path, monkeypatch):
    seen: list[DiT] = []
    prepared = module.prepared
    monkeypatch.setattr(module, "prepared", lambda *args: seen.append(prepared(*args)) or seen[0])
    looked_at = ValidationConfig(clips=2, times=2, samples=1, num_inference_steps=2)
    kind = {"lora": LoraConfig(rank=2, targets=["all"]), "fit": {"bfloat16": True}, "validation": looked_at}
    folder = finetune(training(base, tmp_path, **kind), CPU)
    assert (tmp_path / "samples/step_00000004.png").is_file()
    kinds = {p.requires_grad: p.dtype for p in seen[0].parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert torch.isfinite(video(base, lora=folder)).all()


# ---- cached clips ---------------------------------------------------------------------------------------------------


def test_clips_of_a_cache_train_and_those_of_another_model_are_refused(base, text_base, tmp_path):
    lines = []
    for i in range(3):
        _, pixels, _ = clip(i, seed=3, num_frames=9, height=32, width=48)
        np.save(tmp_path / f"{i}.npy", (pixels * 255).round().astype(np.uint8))
        lines.append(json.dumps({"file_name": f"{i}.npy", "text": "a red circle", "fps": 8}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    cut = Cut(lengths=(9,), sizes=((32, 48),), rate=8.0)
    for name, words in (("words", True), ("embedded", False)):
        make_cache(str(tmp_path), read_card(base), tmp_path / name, cut, words=words)
    still = {"fit": {"learning_rate": 0.0}, "held_out": 0.0}
    losses = []
    for name in ("words", "embedded"):
        model = finetune(training(base, tmp_path / f"by_{name}", data=str(tmp_path / name), **still), CPU)
        assert torch.equal(video(model), video(base))
        log = (tmp_path / f"by_{name}" / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    make_cache(str(tmp_path), read_card(text_base), tmp_path / "unseen", cut)
    first = {"data": str(tmp_path / "unseen"), "conditions": ConditionsConfig(shares={"first": 1.0}), **still}
    with pytest.raises(InvalidRequest, match="have no frames") as error:
        finetune(training(text_base, tmp_path / "no", **first), CPU)
    assert "--frame-latents" in error.value.hint
    with pytest.raises(InvalidRequest, match="another VAE"):
        finetune(training(other_vae(tmp_path), tmp_path / "no", data=str(tmp_path / "words")), CPU)


def other_vae(folder: Path) -> Path:
    return tiny_pipeline(seed=7).save(folder / "other")


# ---- several processes ----------------------------------------------------------------------------------------------

PROGRAM = "import sys; from videogen.training.run import main; print(main(sys.argv[1], sys.argv[2:]))"
CONFIG = """
task: finetune
model: {model}
clips: 8
batch_size: 4
validation: {{clips: 2, times: 2, samples: 0}}
fit: {{steps: 4, log_every: 1, save_every: 2, warmup_steps: 1, bfloat16: false, learning_rate: 1.0e-3}}
"""


def run(count: int, config: Path, *overrides: str) -> Path:
    """The folder that a run of `count` processes leaves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        environment = os.environ | {k: str(v) for k, v in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, "-c", PROGRAM, str(config), *overrides]
        workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    said = [worker.communicate(timeout=900)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * count
    return Path(said[0].strip())


@pytest.mark.slow
@pytest.mark.timeout(1800)  # processes that share two cores with others are slow to start
@pytest.mark.parametrize("settings", [[], ["lora.rank=2", "lora.targets=[all]"]], ids=["all", "lora"])
def test_two_processes_learn_what_one_does_whole_or_sharded(base, tmp_path, settings):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(model=base))
    kinds = {"one": (1, 1), "two": (2, 1), "sharded": (2, 0)}
    made, losses = {}, {}
    for kind, (count, shard) in kinds.items():
        made[kind] = run(count, config, *settings, f"folder={tmp_path / kind}", f"fit.parallel.shard={shard}")
        lines = (tmp_path / kind / "log.jsonl").read_text().splitlines()
        losses[kind] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["one"]) == 4
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-5)
    assert losses["sharded"] == pytest.approx(losses["one"], rel=1e-5)
    clips = {kind: video(base, lora=at) if settings else video(at) for kind, at in made.items()}
    assert all((clip - clips["one"]).abs().max() < 1e-3 for clip in clips.values())
    assert not torch.equal(clips["one"], video(base))


# ---- it learns ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_clip_is_learned_by_heart(tmp_path):
    """The bundled model sees one clip of the world and no other, and then makes it from its caption and any noise."""
    fit = {"steps": 300, "optimizer": "muon", "learning_rate": 1e-3, "muon_learning_rate": 3e-3, "ema_decay": 0.98}
    fit |= {"warmup_steps": 20, "decay_fraction": 0.5, "save_every": 300}
    alone = {"clips": 1, "batch_size": 1, "caption_dropout": 0.0, "conditions": ConditionsConfig(shares={"none": 1.0})}
    model = finetune(training(Path("tiny"), tmp_path, fit=fit, **alone), CPU)
    _, pixels, words = clip(0, **vars(WorldConfig()))
    wanted = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    made = load(model).generate(words, seed=5, guidance_scale=1.0, num_inference_steps=25, output="tensor")[0]
    assert psnr(made, wanted) >= 25


def psnr(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(10 * torch.log10(1 / (made - wanted).square().mean()))
