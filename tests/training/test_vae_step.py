"""What a VAE learns and from what: losses equal their formulas, the judge keeps to its part, latents get a unit."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from videogen.config import ClipStage, FitConfig, GANConfig, VAEConfig, VAETraining
from videogen.data.video import write_video
from videogen.errors import InvalidRequest
from videogen.models.vae import VAE
from videogen.testing import TINY_VAE, randomize
from videogen.training import perceptual as distances
from videogen.training import vae as vae_training
from videogen.training.discriminator import Discriminator, hinge, verdict
from videogen.training.perceptual import perceptual
from videogen.training.processes import Replicated
from videogen.training.vae import (
    WorldClips,
    batch_at,
    check,
    first_vae,
    losses_at,
    settle_latents,
    train_vae,
    training_clips,
    validate,
)
from videogen.training.vae_step import (
    WholeClips,
    adaptive_weight,
    detail,
    init_vae,
    latent_statistics,
    scaling_factor,
    vae_losses,
)
from videogen.weights.diffusers import load_vae, save_vae

CPU = torch.device("cpu")
SIZES = dataclasses.replace(TINY_VAE, sample_height=32, sample_width=32, scaling_factor=1.0)


def training(folder="unused", **changes) -> VAETraining:
    settings = {
        "folder": str(folder),
        "model": SIZES,
        "stages": [
            ClipStage(steps=2, num_frames=9, size=16, batch_size=2, image_share=0.5),
            ClipStage(steps=2, num_frames=17, size=32, batch_size=1, image_share=0.0),
        ],
        "fit": FitConfig(steps=4, save_every=2, log_every=1, bfloat16=False),
        "height": 32,
        "width": 32,
    }
    return VAETraining(**{**settings, **changes})


def random_vae(config=SIZES, dtype=torch.float32) -> VAE:
    return randomize(VAE(config), seed=1).to(dtype)


def clips(count=2, frames=9, size=16, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(count, 3, frames, size, size, generator=g) * 2 - 1).to(dtype)


def noise_for(vae, pixels, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(len(pixels), *vae.latent_shape(*pixels.shape[2:]), generator=g).to(pixels)


# ---- batches --------------------------------------------------------------------------------------------------------


def test_batches_follow_the_stages_and_leave_no_sample_out():
    config = training()
    found = [batch_at(config, step) for step in range(6)]
    assert [(b.count, b.num_frames, b.size) for b in found] == [(2, 9, 16), (8, 1, 16)] + [(1, 17, 32)] * 4
    assert [b.first for b in found] == [0, 2, 10, 11, 12, 13]


def test_a_step_is_the_same_in_one_go_in_micro_batches_and_on_two_processes():
    """Losses and gradients add up; clips and noise belong to the sample, not to the process."""
    config = training(stages=[ClipStage(steps=1, num_frames=9, size=16, batch_size=3, image_share=0.0)])
    vae = random_vae(dtype=torch.float32)

    def gradient(micro, world):
        stage = dataclasses.replace(config.stages[0], micro_batch_size=micro)
        vae.zero_grad()
        total, names = 0.0, []
        for rank in range(world):
            kind = {"parallel": Replicated(rank, world), "times": {}, "device": CPU}
            settings = dataclasses.replace(config, stages=[stage])
            for loss, _, some in losses_at(settings, {"vae": vae}, WorldClips(config), 0, **kind):
                loss.sum().backward()
                total, names = total + float(loss.detach().sum()), [*names, *some]
        return total, torch.cat([p.grad.flatten() for p in vae.parameters()]), sorted(names)

    whole = gradient(0, 1)
    assert whole[2] == ["world/0", "world/1", "world/2"]
    for other in (gradient(1, 1), gradient(2, 1), gradient(0, 2)):
        assert other[2] == whole[2]
        assert other[0] == pytest.approx(whole[0], rel=1e-6)
        assert (other[1] - whole[1]).norm() < 1e-5 * whole[1].norm()


def test_a_folder_of_clips_is_read_whole_in_each_epoch(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        frames = rng.integers(0, 255, (10 + number, 24, 40, 3), dtype=np.uint8)
        write_video(tmp_path / f"{number}.gif", frames, fps=8)
    config = training(clips=str(tmp_path))
    stream = training_clips(config)
    for epoch in range(3):
        names = {stream.name(3 * epoch + i) for i in range(3)}
        assert names == {f"{i}.gif/{epoch}" for i in range(3)}
    batch = dataclasses.replace(batch_at(config, 0), num_frames=9, size=16)
    crop = stream.crop(4, batch, np.random.default_rng(1))
    assert crop.shape == (9, 16, 16, 3)
    assert crop.dtype == np.float32
    assert 0 <= crop.min() < crop.max() <= 1
    with pytest.raises(InvalidRequest, match=r"gif has 1\d frames"):
        stream.crop(4, dataclasses.replace(batch, num_frames=17), rng)
    with pytest.raises(InvalidRequest, match="holds no clips"):
        training_clips(training(clips=str(tmp_path / "none")))


def test_clips_of_one_name_in_two_folders_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.gif").touch()
    stream = training_clips(training(clips=str(tmp_path)))
    assert {stream.name(number) for number in range(2)} == {"a/1.gif/0", "b/1.gif/0"}


def test_a_stage_of_single_frames_is_no_clip_to_share(tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    shared = []
    group = type("Group", (), {"group": None, "data_rank": 0, "data_world": 1})
    monkeypatch.setattr(vae_training, "time_parallel", lambda degree: group())
    monkeypatch.setattr(vae_training, "share_time", lambda vae, frames, group: shared.append(frames) or WholeClips())
    monkeypatch.setattr(vae_training, "fit", lambda *_, **__: (_ for _ in ()).throw(Stop()))
    stages = [ClipStage(steps=1, num_frames=n, size=16, batch_size=2, image_share=0.0) for n in (1, 9)]
    with pytest.raises(Stop):
        train_vae(training(stages=stages, time_parallel=2), tmp_path, CPU)
    assert shared == [9]


# ---- the loss -------------------------------------------------------------------------------------------------------


def test_a_perfect_narrow_vae_has_the_divergence_as_its_only_loss():
    class Perfect(VAE):
        def moments(self, pixels):
            zeros = torch.zeros(len(pixels), 4, 2, 1, 1)
            return zeros + 2.0, zeros

        def decode(self, latents):
            return torch.zeros(1, 3, 5, 8, 8)

    pixels = torch.zeros(1, 3, 5, 8, 8)
    losses, facts = vae_losses(Perfect(SIZES), pixels, torch.zeros(1, 4, 2, 1, 1), training(kl_weight=0.5))
    assert facts["kl"] == pytest.approx(2.0)  # (2² + 1 - 1 - 0) / 2
    assert losses.tolist() == pytest.approx([1.0])


def test_each_clip_has_a_loss_of_its_own():
    vae, pixels = random_vae(dtype=torch.float64), clips(3, dtype=torch.float64)
    noise, config = noise_for(vae, pixels), training(perceptual_weight=0.5, square_weight=2.0)
    kind = {"distance": perceptual("gradients")}
    together, facts = vae_losses(vae, pixels, noise, config, **kind)
    alone = [vae_losses(vae, pixels[i : i + 1], noise[i : i + 1], config, **kind) for i in range(3)]
    assert torch.allclose(together, torch.cat([losses for losses, _ in alone]), rtol=1e-12)
    for name in ("l1", "psnr", "kl", "perceptual"):
        assert facts[name] == pytest.approx(np.mean([told[name] for _, told in alone]))


def test_detail_marks_edges_and_motion_only():
    pixels = torch.full((1, 3, 3, 16, 16), -1.0)
    pixels[:, :, 2, 8, 8] = 1.0
    mask = detail(pixels)
    assert mask[0, 0, 2, 8, 8] == 1
    assert mask[0, 0, 1, 8, 8] == 1  # about to move
    assert mask[0, 0, 0].sum() == 0
    assert mask[0, 0, 2, :4].sum() == 0


# ---- looks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gradients", "random"])
def test_distances_see_blur_where_pixel_errors_see_a_change_of_light(name):
    picture = clips(1, frames=2, size=32)[0].permute(1, 0, 2, 3)
    distance = perceptual(name)
    blurred = torch.nn.functional.avg_pool2d(picture, 3, stride=1, padding=1)
    lighter = picture + (picture - blurred).abs().mean()
    assert distance(picture, picture).tolist() == [0.0, 0.0]
    assert (distance(blurred, picture) > 2 * distance(lighter, picture)).all()
    assert torch.equal(distance(blurred, picture), perceptual(name)(blurred, picture))  # the same network each time
    (gradient,) = torch.autograd.grad(distance(blurred.requires_grad_(), picture).sum(), blurred)
    assert gradient.abs().sum() > 0


def test_making_a_distance_leaves_the_random_numbers_alone():
    before = torch.random.get_rng_state()
    perceptual("random")
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_distance_that_is_not_there_is_said(monkeypatch):
    with pytest.raises(InvalidRequest, match="no perceptual distance 'vgg'"):
        perceptual("vgg")
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    with pytest.raises(InvalidRequest, match="needs the library lpips"):
        perceptual("lpips")
    assert distances.DISTANCES.keys() == {"gradients", "random", "lpips"}


# ---- the adversary --------------------------------------------------------------------------------------------------


def discriminator(seed=0, dtype=torch.float32) -> Discriminator:
    torch.manual_seed(seed)
    return Discriminator(channels=4, layers=2).to(dtype)


def test_verdicts_are_on_patches_of_space_and_time_and_of_each_clip_alone():
    judge = discriminator()
    pixels = clips(3, frames=9, size=32)
    assert judge(pixels).ndim == 4
    assert judge(pixels[:, :, :1]).shape[1] == 1  # a single frame
    assert torch.allclose(judge(pixels)[1:2], judge(pixels[1:2]), atol=1e-6)
    changed = pixels.clone()
    changed[:, :, -1] = 0
    assert not torch.allclose(judge(changed), judge(pixels), atol=1e-4)


def test_the_hinge_is_met_beyond_one_and_teaches_the_judge_alone():
    class Sure(torch.nn.Module):
        def forward(self, clip):
            return clip[:, 0] * 2

    one = torch.ones(2, 3, 1, 4, 4)
    assert hinge(Sure(), one, -one).tolist() == [0, 0]
    assert hinge(Sure(), -one, one).tolist() == [3, 3]
    judge, made = discriminator(), clips(1).requires_grad_()
    hinge(judge, clips(1, seed=1), made).sum().backward()
    assert made.grad is None
    assert all(p.grad is not None for p in judge.parameters())
    judge.zero_grad()
    verdict(judge, made).sum().backward()
    assert made.grad is not None
    assert all(p.grad is None for p in judge.parameters())


def test_the_weight_makes_two_gradients_equally_long_at_the_last_layer():
    """Eq. 7 of arXiv:2012.09841, for each clip as if it were alone."""
    vae, judge = random_vae(dtype=torch.float64), discriminator(dtype=torch.float64)
    pixels, last = clips(2, dtype=torch.float64), vae.decoder.conv_out.weight

    def weight_of(some):
        made = vae.decode(vae.encode(some))
        error, wish = (made - some).abs().mean(dim=(1, 2, 3, 4)), -verdict(judge, made)
        return error, wish, adaptive_weight(error, wish, made, last, WholeClips())

    _, _, both = weight_of(pixels)
    for i in range(2):
        error, wish, alone = weight_of(pixels[i : i + 1])
        assert float(alone) == pytest.approx(float(both[i]), rel=1e-9)
        (of_error,) = torch.autograd.grad(error, last, retain_graph=True)
        (of_wish,) = torch.autograd.grad(alone * wish, last)
        assert float(of_wish.norm()) == pytest.approx(float(of_error.norm()), rel=1e-3)


def test_before_it_is_judged_the_vae_learns_as_without_a_judge():
    vae, judge, pixels = random_vae(), discriminator(), clips()
    noise, config = noise_for(vae, pixels), training(gan=GANConfig(start=0, weight=0.5))

    def gradients(**kind):
        vae.zero_grad()
        judge.zero_grad()
        losses, facts = vae_losses(vae, pixels, noise, config, **kind)
        losses.sum().backward()
        return [p.grad.clone() for p in vae.parameters()], [p.grad for p in judge.parameters()], facts

    plain, untouched, _ = gradients()
    alone, taught, facts = gradients(discriminator=judge, is_judged=False)
    judged, again, told = gradients(discriminator=judge)
    assert all(grad is None for grad in untouched)
    assert all(torch.equal(a, b) for a, b in zip(plain, alone, strict=True))
    assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(plain, judged, strict=True))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(taught, again, strict=True))
    assert told.keys() - facts.keys() == {"generator", "balance"}


# ---- the latents ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_latents_get_a_unit_and_the_function_stays():
    pixels = clips(2, frames=9, size=16, dtype=torch.float64)
    for how in ("unit_variance", "scaling_factor", "keep"):
        vae = random_vae(dtype=torch.float64)
        init_vae(vae)
        before, (mean, std) = vae.decode(vae.encode(pixels)), latent_statistics(vae, pixels)
        facts = settle_latents(vae, pixels, how)
        json.dumps(facts)
        assert torch.allclose(vae.decode(vae.encode(pixels)), before, atol=1e-10)
        assert torch.allclose(torch.tensor(facts["std"]).double(), std)
        measured = vae.encode(pixels, torch.Generator().manual_seed(0))
        if how == "unit_variance":
            assert vae.config.scaling_factor == 1.0
            after = latent_statistics(vae, pixels)[1]
            assert torch.allclose(after, torch.ones_like(after), atol=1e-6)
        elif how == "scaling_factor":
            assert vae.config.scaling_factor == scaling_factor(mean, std)
            assert float(measured.std()) == pytest.approx(1, abs=0.1)
        else:
            assert vae.config == SIZES


# ---- whole runs -----------------------------------------------------------------------------------------------------


def test_a_run_with_all_parts_ends_in_a_vae_whose_decoder_can_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(vae_training, "JUDGED", 1)
    monkeypatch.setattr(vae_training, "MEASURED", 4)
    gan = GANConfig(start=1, head_start=1, channels=4, layers=2)
    config = training(tmp_path / "run", gan=gan, perceptual="random", latents="scaling_factor", whole_clips=True)
    vae = train_vae(config, tmp_path / "run", CPU)
    assert vae.config == dataclasses.replace(SIZES, scaling_factor=vae.config.scaling_factor)  # with its own chunks
    facts = json.loads((tmp_path / "run/latents.json").read_text())
    assert facts["scaling_factor"] == vae.config.scaling_factor != 1.0
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert {"psnr", "kl", "perceptual", "discriminator", "generator", "balance"} <= {k for line in log for k in line}
    assert any("held_out_psnr" in line for line in log)

    save_vae(tmp_path / "vae", vae)
    stages = [ClipStage(steps=2, num_frames=9, size=16, batch_size=2, image_share=0.0)]
    frozen = {"start": str(tmp_path / "vae"), "train_encoder": False, "latents": "keep", "model": VAEConfig()}
    more = training(**frozen, stages=stages, fit=FitConfig(steps=2))
    tuned, before = train_vae(more, tmp_path / "more", CPU), load_vae(tmp_path / "vae")
    assert tuned.config == before.config
    pairs = [zip(part(tuned).parameters(), part(before).parameters(), strict=True) for part in (encoder, decoder)]
    assert all(torch.equal(a, b) for a, b in pairs[0])
    assert not any(torch.equal(a, b) for a, b in pairs[1])


def encoder(vae):
    return vae.encoder


def decoder(vae):
    return vae.decoder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_encoder": False, "latents": "keep"}, "without a start"),
        (
            {"start": "tiny", "train_encoder": False, "model": VAEConfig()},
            "latents=unit_variance with train_encoder=false",
        ),
        ({"start": "tiny"}, "another VAE than start"),
        ({"latents": "std"}, "latents is 'std'"),
        ({"stages": [ClipStage(steps=1, num_frames=16, size=32, batch_size=1)]}, "clips of 16 frames"),
        ({"stages": [ClipStage(steps=1, num_frames=17, size=20, batch_size=1)]}, "of 20 pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused_before_it_begins(changes, message):
    config = training(**changes)
    known = VAEConfig(block_out_channels=(16, 32, 64, 64)) if config.start else SIZES
    with pytest.raises(InvalidRequest, match=message):
        check(config, known)


@pytest.mark.slow
def test_on_the_world_a_short_run_gains_six_decibels_and_the_judge_costs_none_to_speak_of(tmp_path):
    """A narrow VAE, minutes on one core. The judge comes at two thirds; the figures are held-out PSNR."""
    start = 240
    config = training(
        tmp_path,
        model=VAEConfig(
            block_out_channels=(16, 32, 32, 32),
            layers_per_block=1,
            norm_num_groups=2,
            sample_height=32,
            sample_width=32,
            scaling_factor=1.0,
        ),
        stages=[ClipStage(steps=360, num_frames=9, size=32, batch_size=2, image_share=0.5)],
        fit=FitConfig(steps=360, learning_rate=2.5e-3, warmup_steps=20, save_every=60, log_every=20, ema_decay=0.9),
        gan=GANConfig(start=start, head_start=20, weight=0.1, channels=16),
        num_frames=17,
    )
    torch.manual_seed(config.fit.seed)
    untrained = validate(first_vae(config), WorldClips(config).held_out(8), CPU)["held_out_psnr"]
    train_vae(config, tmp_path, CPU)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    psnr = {line["step"]: line["held_out_psnr"] for line in log if "held_out_psnr" in line}
    print(f"untrained {untrained}, {psnr}")
    assert psnr[start] >= untrained + 6
    assert min(psnr[step] for step in psnr if step > start) >= psnr[start] - 1
    assert all(np.isfinite(value) for line in log for value in line.values() if isinstance(value, float))
