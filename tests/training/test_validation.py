"""Validation compares: the same bits when repeated, worse for worse models, and training does not feel it."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from videogen.config import FitConfig, ValidationConfig
from videogen.diffusion import objective
from videogen.diffusion.schedule import Schedule
from videogen.evaluation import flicker, motion
from videogen.testing import SCHEDULER, tiny_pipeline
from videogen.training import validation
from videogen.training.draws import draw_noise, draws
from videogen.training.examples import Example
from videogen.training.trainer import fit
from videogen.training.validation import Validation, decile_losses, pipeline_clips, save_grid, undisturbed

SCHEDULE = Schedule.from_config(SCHEDULER)
SHAPES = [(2, 4, 4), (1, 4, 4), (2, 4, 4), (3, 2, 4), (2, 4, 4), (1, 4, 4), (2, 4, 4)]


class Gaussians:
    """Latents ~ N(0, 1) of several shapes: there v is predicted best by zero, and any other constant is worse."""

    def __len__(self):
        return len(SHAPES)

    def name(self, index):
        return f"sample {index}"

    def shape(self, index):
        return SHAPES[index]

    def read(self, index, rng):
        f, h, w = SHAPES[index]
        return Example(draw_noise(rng, (f, 4, h, w)), None, "words", 8.0)


def constant(value):
    """The loss of a model that says `value` everywhere."""

    def loss(examples, t, noise):
        latents = torch.stack([one.latents for one in examples])
        kind = {"schedule": SCHEDULE, "prediction": "v_prediction"}
        return objective.loss(lambda x, t: torch.full_like(x, value), latents, noise, t, **kind)

    return loss


def test_repeated_it_gives_the_same_bits_and_a_worse_model_is_ranked_worse():
    first, second = (decile_losses(constant(0.0), Gaussians(), SCHEDULE) for _ in range(2))
    assert first == second
    losses = [decile_losses(constant(value), Gaussians(), SCHEDULE) for value in (0.0, 0.5, 1.0)]
    for name in losses[0]:  # at each time, in each bucket
        assert losses[0][name] < losses[1][name] < losses[2][name], name


def test_figures_are_means_over_samples_of_each_shape_and_time():
    figures = decile_losses(constant(0.0), Gaussians(), SCHEDULE, times=4)
    shapes = {"1x4x4": 2, "2x4x4": 4, "3x2x4": 1}
    names = {f"held_out_loss{shape}{time}" for shape in ["", *(f"_{s}" for s in shapes)] for time in TIMES}
    assert set(figures) == names
    for time in TIMES:
        mean = sum(count * figures[f"held_out_loss_{shape}{time}"] for shape, count in shapes.items()) / 7
        assert figures[f"held_out_loss{time}"] == pytest.approx(mean, rel=1e-12)
    assert figures["held_out_loss"] == pytest.approx(np.mean([figures[f"held_out_loss{t}"] for t in TIMES[1:]]))


TIMES = ["", "_t12", "_t38", "_t62", "_t88"]


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("batch", [1, 16])
def test_ranks_together_measure_what_one_does(world, batch):
    """Without processes: each rank's sums are kept, and their total given to the last one."""
    told, calls = [], []

    def counted(examples, t, noise):
        calls[-1] += 1
        return constant(0.3)(examples, t, noise)

    for rank in range(world):
        calls.append(0)
        figures = decile_losses(
            counted,
            Gaussians(),
            SCHEDULE,
            batch=batch,
            rank=rank,
            world=world,
            total=lambda x: told.append(x) or sum(told),
        )
    alone = decile_losses(constant(0.3), Gaussians(), SCHEDULE, batch=batch)
    assert figures == pytest.approx(alone, rel=1e-12)
    assert len(set(calls)) == 1  # all call the network equally often: sharded weights are gathered together


@dataclass
class Noisy:
    """Training that draws from torch's own generator, and a model with dropout."""

    model: nn.Module

    def losses_at(self, step):
        x = torch.randn(8, 4) + torch.from_numpy(draws(0, step, "", "x").standard_normal((8, 4), dtype=np.float32))
        yield self.model(x).square().mean(), {}, ["a"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))


def test_a_run_with_validation_equals_one_without(tmp_path):
    settings = FitConfig(steps=6, save_every=2, log_every=2, warmup_steps=1, bfloat16=False)
    models = {name: network() for name in ("with", "without")}
    modes = []

    def loss(modules):
        def one(examples, t, noise):
            modes.append(modules["m"][1].training)
            torch.randn(3), np.random.rand()  # as careless as can be
            assert not modules["m"](torch.ones(1, 4)).requires_grad
            return constant(0.0)(examples, t, noise)

        return one

    judge = Validation(
        config=ValidationConfig(samples=0), folder=tmp_path, schedule=SCHEDULE, loss=loss, examples=Gaussians()
    )
    fit({"m": models["with"]}, Noisy(models["with"]).losses_at, settings, tmp_path / "with", validate=judge)
    fit({"m": models["without"]}, Noisy(models["without"]).losses_at, settings, tmp_path / "without")
    for a, b in zip(models["with"].parameters(), models["without"].parameters(), strict=True):
        assert torch.equal(a, b)
    assert not any(modes)
    assert models["with"].training
    lines = [json.loads(line) for line in (tmp_path / "with" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "held_out_loss_2x4x4_t95" in line] == [2, 4, 6]


def test_modes_and_random_numbers_are_put_back_after_an_error():
    model = network()
    model[1].eval()
    before = torch.get_rng_state()

    def fails():
        with undisturbed([model, model]):
            assert not model.training
            torch.rand(5)
            return 1 / 0

    with pytest.raises(ZeroDivisionError):
        fails()
    assert [part.training for part in model.modules()] == [True, True, False]
    assert torch.equal(before, torch.get_rng_state())


def test_clips_of_both_weights_stand_in_one_picture(tmp_path):
    pipe = tiny_pipeline(seed=1)
    generate = pipeline_clips(pipe.card, pipe.vae, pipe.text_encoder, steps=2)
    judge = Validation(
        config=ValidationConfig(samples=2),
        folder=tmp_path,
        schedule=SCHEDULE,
        generate=generate,
        prompts=["a red circle", "a blue square", "left out"],
        raw={"dit": tiny_pipeline(seed=2).dit},
    )
    figures, again = judge({"dit": pipe.dit}, 40), judge({"dit": pipe.dit}, 60)
    assert figures == again
    assert figures["sample_motion"] > 0
    assert figures["sample_flicker"] > 0
    picture = np.asarray(Image.open(tmp_path / "samples" / "step_00000040.png"))
    assert picture.shape == (2 * 2 * 32, 5 * 48, 3)  # two prompts, two sets of weights; five frames
    clip = pipe.generate("a blue square", seed=1, num_inference_steps=2).frames
    for column, frame in enumerate((0, 2, 4, 6, 8)):  # what the public pipeline makes
        np.testing.assert_array_equal(picture[64:96, 48 * column : 48 * (column + 1)], clip[frame])
    assert not np.array_equal(picture[64:96], picture[96:])
    assert (tmp_path / "samples" / "prompts.txt").read_text() == "a red circle\na blue square\n"


@pytest.mark.parametrize("process", [0, 1])
def test_of_processes_that_share_samples_one_writes_the_pictures(tmp_path, monkeypatch, process):
    """Those of a sequence group are all of data rank 0."""
    monkeypatch.setattr(validation.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(validation.dist, "get_rank", lambda: process)
    judge = Validation(
        config=ValidationConfig(samples=1),
        folder=tmp_path,
        schedule=SCHEDULE,
        generate=lambda modules: lambda prompts, scenes, seeds: [np.zeros((9, 4, 4, 3))],
        rank=0,
    )
    judge({}, 1)
    assert (tmp_path / "samples").exists() == (process == 0)


def test_the_world_scores_while_it_trains(tmp_path):
    from videogen.data.world import render

    judge = Validation(
        config=ValidationConfig(samples=0, score=4),
        folder=tmp_path,
        schedule=SCHEDULE,
        generate=lambda modules: lambda prompts, scenes, seeds: [render(scene, 17) for scene in scenes],
    )
    figures = judge({}, 1)
    assert figures["score_all"] == figures["score_motion"] == 1.0


def test_motion_and_flicker_tell_smooth_from_restless():
    t = np.linspace(0, 1, 17)[:, None, None, None]
    x = np.arange(32)[None, None, :, None] / 32
    moving = np.broadcast_to(1 / (1 + np.exp(-40 * (x - t))), (17, 8, 32, 3))
    noise = np.random.default_rng(0).random((17, 8, 32, 3))
    blinking = np.broadcast_to(np.arange(17)[:, None, None, None] % 2, (17, 8, 32, 3)).astype(float)
    assert motion(np.full((17, 8, 32, 3), 0.3)) == flicker(np.full((17, 8, 32, 3), 0.3)) == 0
    assert motion(moving) > 0.03
    assert flicker(moving) < 0.01 * motion(moving)
    assert flicker(moving + 0.02 * noise) > 3 * flicker(moving)
    assert flicker(noise) > 0.3 * motion(noise)
    assert motion(blinking) == flicker(blinking) == 1
    assert motion(moving[:1]) == flicker(moving[:2]) == 0


def test_a_picture_takes_clips_of_any_length(tmp_path):
    clips = [np.zeros((1, 4, 4, 3), np.uint8), np.ones((2, 4, 4, 3))]
    save_grid(tmp_path / "a.png", [clips], columns=3)
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.shape == (8, 12, 3)
    assert (pixels[:4] == 0).all()
    assert (pixels[4:] == 255).all()
