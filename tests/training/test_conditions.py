"""Which frames a clip is told: the shares that were asked for, at every length, and no kind is ever lost."""

import copy
import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch

from videogen.conditioning.frames import known_frames
from videogen.config import CONDITIONS, USUAL_CONDITIONS, ConditionsConfig, ConditionStage, ImageNoise, load_yaml
from videogen.errors import InvalidRequest
from videogen.training.conditions import (
    CURRICULA,
    KINDS,
    draw_conditions,
    noisy_image,
    possible_kinds,
    stage_at,
    tell_frames,
)

Masks = dict[tuple[int, ...], float]  # the frames that are told -> the probability
SHARES = {
    "none": 0.3,
    "first": 0.2,
    "last": 0.1,
    "first+last": 0.1,
    "prefix": 0.08,
    "suffix": 0.06,
    "every": 0.06,
    "keyframes": 0.06,
    "all": 0.04,
}
LENGTHS = (1, 2, 3, 5, 7)


def by_hand(f: int) -> dict[str, Masks]:
    """The masks of every kind that `f` frames are enough for, written out."""
    frames, last = tuple(range(f)), f - 1
    kinds: dict[str, Masks] = {"none": {(): 1.0}, "all": {frames: 1.0}}
    if f >= 2:
        kinds |= {"first": {(0,): 1.0}, "last": {(last,): 1.0}}
        kinds["keyframes"] = {
            some: 1 / (f - 1) / math.comb(f, n) for n in range(1, f) for some in combinations(frames, n)
        }
    if f >= 3:
        kinds["first+last"] = {(0, last): 1.0}
        kinds["prefix"] = {frames[:n]: 1 / (f - 2) for n in range(2, f)}
        kinds["suffix"] = {frames[-n:]: 1 / (f - 2) for n in range(2, f)}
        steps = [k for k in (2, 3, 4) if k < f]
        kinds["every"] = {frames[::k]: 1 / len(steps) for k in steps}
    return kinds


def expected(f: int, shares: dict[str, float]) -> Masks:
    kinds, found = by_hand(f), Counter()
    whole = sum(share for kind, share in shares.items() if kind in kinds)
    for kind, masks in kinds.items():
        for mask, probability in masks.items():
            found[mask] += probability * shares.get(kind, 0.0) / whole
    return found


def drawn(config: ConditionsConfig, f: int, count: int, done: float = 1.0, seed: int = 0) -> Counter:
    rng = np.random.default_rng((seed, f))
    draws = (draw_conditions(config, f, rng, done) for _ in range(count))
    return Counter(tuple(np.flatnonzero(known).tolist()) for known in draws)


def sigmas(counts: Counter, wanted: Masks, count: int) -> list[float]:
    assert set(counts) <= {mask for mask, probability in wanted.items() if probability}
    return [abs(counts[mask] - count * p) / math.sqrt(count * p * (1 - p)) for mask, p in wanted.items() if 0 < p < 1]


def check_frequencies(count: int) -> None:
    config, each = ConditionsConfig(shares=SHARES), count // len(LENGTHS)
    off = [z for f in LENGTHS for z in sigmas(drawn(config, f, each), expected(f, SHARES), each)]
    assert len(off) > 100
    assert np.mean(np.array(off) <= 2) >= 0.93  # of a normal distribution 95 % are
    assert max(off) < 4
    assert 0.8 < np.mean(np.square(off)) < 1.2


def test_realised_frequencies_are_the_shares_at_every_length():
    check_frequencies(10_000)


@pytest.mark.slow
def test_realised_frequencies_are_the_shares_over_100000_draws():
    check_frequencies(100_000)


def test_a_clip_too_short_for_a_kind_takes_nothing_from_the_others():
    """One process's draws of long clips are the same whatever was drawn between them, and the settings stay."""
    config = ConditionsConfig(shares=SHARES)
    before = copy.deepcopy(config)

    def long_ones(between: int) -> list[list[bool]]:
        found = []
        for i in range(300):
            for short in range(between):
                draw_conditions(config, 1 + short, np.random.default_rng((1, i, short)))
            found.append(draw_conditions(config, 5, np.random.default_rng((2, i))).tolist())
        return found

    assert long_ones(0) == long_ones(2)
    assert config == before
    for f in LENGTHS:
        kinds = possible_kinds(config, f)
        assert set(kinds) == set(by_hand(f))
        assert sum(kinds.values()) == pytest.approx(1)
    assert set(possible_kinds(config, 3)) == set(KINDS) == set(CONDITIONS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("f", LENGTHS)
def test_a_single_kind_draws_what_it_says_and_too_short_a_clip_is_told_nothing(kind, f):
    counts = drawn(ConditionsConfig(shares={kind: 1.0}), f, 40)
    assert set(counts) <= set(by_hand(f).get(kind, {(): 1.0}))


def test_a_model_of_first_frames_learns_from_images_without_any():
    config = ConditionsConfig(shares={"first": 1.0})
    assert not draw_conditions(config, 1, np.random.default_rng(0)).any()
    assert draw_conditions(config, 2, np.random.default_rng(0)).tolist() == [True, False]


def test_last_frames_and_whole_samples_are_left_out_by_their_shares():
    config = ConditionsConfig(
        shares={"none": 0.1, "last": 0.2, "first+last": 0.4, "suffix": 0.3}, last_dropout=0.25, dropout=0.1
    )
    # Left out with the last frame: of the kinds about it only. Then whole samples, of those that are told.
    told = {(4,): 0.2 * 0.75, (0, 4): 0.4 * 0.75, (0,): 0.4 * 0.25}
    told |= {(3, 4): 0.1, (2, 3, 4): 0.1, (1, 2, 3, 4): 0.1}
    wanted = {mask: 0.9 * p for mask, p in told.items()}
    wanted[()] = 1 - sum(wanted.values())
    off = sigmas(drawn(config, 5, 5_000), wanted, 5_000)
    assert max(off) < 3
    assert np.mean(np.square(off)) < 2


def test_the_curriculum_changes_the_shares_on_the_way():
    stages = [
        ConditionStage(share=0.3, shares={"none": 1.0}),
        ConditionStage(share=0.2, shares={"prefix": 1.0}, least=0.5),
    ]
    config = ConditionsConfig(shares={"first": 1.0}, curriculum=stages)
    assert set(drawn(config, 6, 50, done=0.0)) == set(drawn(config, 6, 50, done=0.29)) == {()}
    assert set(drawn(config, 6, 200, done=0.3)) == {tuple(range(n)) for n in (3, 4, 5)}
    assert set(drawn(config, 6, 50, done=0.5)) == set(drawn(config, 6, 50, done=1.0)) == {(0,)}


def test_the_published_curriculum_ends_with_first_and_last_frames():
    config = ConditionsConfig(preset="open-sora-plan")
    stages = CURRICULA["open-sora-plan"]
    assert len(stages) == 7
    assert sum(stage.share for stage in stages) == pytest.approx(1)
    assert all(sum(stage.shares.values()) == pytest.approx(1) for stage in stages)
    assert [stage_at(config, done).least for done in (0.0, 0.1, 0.17, 0.3, 0.5)] == [0.5, 0.25, 0.125, 0.125, 0.0]
    assert stage_at(config, 1.0) is stages[-1]
    assert stage_at(config, 1.0).shares["first+last"] == 0.4
    counts = drawn(config, 8, 300, done=0.0)
    assert min(len(mask) for mask in counts if mask) == 4  # half of the frames, at least
    with pytest.raises(InvalidRequest, match="no curriculum 'open-sora'"):
        stage_at(ConditionsConfig(preset="open-sora"), 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("shares={frist: 1}", r"no kind of condition 'frist'[\s\S]*did you mean 'first'"),
        ("shares={first: -0.1}", "first = -0.1"),
        ("shares={first: .nan}", "first = nan"),
        ("shares={first: 0}", "no kind of condition has a share"),
        ("curriculum=[{share: 0.5, shares: {prefx: 1.0}}]", "no kind of condition 'prefx'"),
        ("curriculum=[{share: 1.5, shares: {prefix: 1.0}}]", "share = 1.5"),
        ("every=[1, 2]", "every = 1"),
        ("last_among=0", "last_among = 0"),
        ("dropout=1.5", "dropout = 1.5"),
        ("drop=0.5", "drop"),
    ],
)
def test_settings_that_mean_nothing_are_refused_before_anything_starts(tmp_path, settings, message):
    (tmp_path / "conditions.yaml").write_text("shares: {first: 0.5}\n")
    (tmp_path / "empty.yaml").write_text("{}\n")
    config = load_yaml(tmp_path / "conditions.yaml", ConditionsConfig, ["last_among=3", "noise={}"])
    assert config.shares == {"first": 0.5}  # and nothing beside it
    assert ConditionsConfig().shares == USUAL_CONDITIONS
    assert config.last_among == 3
    assert config.noise == ImageNoise()
    with pytest.raises(InvalidRequest, match=message):
        load_yaml(tmp_path / "empty.yaml", ConditionsConfig, [settings])


# ---- what is told ---------------------------------------------------------------------------------------------------


def numbered(f: int) -> torch.Tensor:
    return torch.arange(1.0, f + 1).reshape(f, 1, 1, 1).expand(f, 2, 2, 2).clone()


def test_what_is_told_is_the_condition_that_sampling_builds():
    told, known = tell_frames(ConditionsConfig(shares={"first+last": 1.0}), numbered(5), np.random.default_rng(0))
    channels = known_frames(told[None], known[None]).channels
    assert channels is not None
    assert channels[0, :, 0, 0, 0].tolist() == [1, 0, 0, 0, 5]


def test_the_picture_in_the_last_place_is_one_of_the_last_three_where_asked_for():
    config = ConditionsConfig(shares={"last": 0.5, "suffix": 0.5}, last_among=3)
    rng, pictures = np.random.default_rng(0), Counter()
    for _ in range(600):
        told, known = tell_frames(config, numbered(5), rng)
        assert told[:-1].equal(numbered(5)[:-1])
        if known.sum() == 1:
            pictures[float(told[-1, 0, 0, 0])] += 1
        else:
            assert told.equal(numbered(5))  # a stretch of the clip is told as it is
    assert set(pictures) == {3.0, 4.0, 5.0}
    assert min(pictures.values()) > sum(pictures.values()) / 4
    shown = {float(tell_frames(config, numbered(2), rng)[0][-1, 0, 0, 0]) for _ in range(20)}
    assert shown == {2.0}  # of two frames never the first


def test_noise_on_told_frames_has_the_published_strength_for_each_sample_by_itself():
    config, rng = ConditionsConfig(noise=ImageNoise()), np.random.default_rng(0)
    image = torch.zeros(3, 16, 16)
    sigma = np.log([float(noisy_image(config, image, rng).std()) for _ in range(2000)])
    assert np.mean(sigma) == pytest.approx(-3.0, abs=4 * 0.5 / 2000**0.5)
    assert np.std(sigma) == pytest.approx(0.5, rel=0.06)
    told = [tell_frames(config, numbered(5), np.random.default_rng(i))[0] - numbered(5) for i in (0, 0, 1)]
    assert torch.equal(told[0], told[1])
    assert not torch.equal(told[0], told[2])
    assert not told[0][0].equal(told[0][1])  # each picture has noise of its own
