"""Every published row x sizes x frames x conditions: accepted or refused as the model cards say, before anything loads.

What the model cards say is written here a second time, as rules, so that the table cannot agree with itself only.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from videogen.checks import nearest_frames, nearest_size
from videogen.config import DiTConfig, VAEConfig
from videogen.errors import InvalidRequest
from videogen.request import Request
from videogen.weights.card import Card, card_of
from videogen.weights.models import PUBLISHED, Published

SIZES = [
    *[(720, 480), (480, 720), (1360, 768), (768, 1360), (768, 768), (1024, 768), (1376, 768), (752, 768), (1360, 784)],
    *[(512, 512), (496, 528), (1280, 1280), (1024, 1024), (1296, 1280), (2048, 512), (640, 480), (1920, 1080)],
    *[(722, 480), (720, 479), (256, 256), (16, 16), (0, 480), (720, -480), (10**40, 480)],
]
FRAMES = [0, -7, 1, 5, 9, 17, 33, 41, 48, 49, 50, 57, 77, 81, 85, 97, 161, 177, 10**40]
IMAGE, CLIP = np.zeros((8, 8, 3), np.uint8), np.zeros((177, 8, 8, 3), np.uint8)
CONDITIONS: dict[str, dict[str, Any]] = {
    "text": {},
    "first": {"first_frame": IMAGE},
    "last": {"last_frame": IMAGE},
    "first and last": {"first_frame": IMAGE, "last_frame": IMAGE},
    "key frame 16": {"keyframes": {16: IMAGE}},
    "video": {"video": CLIP},
    "control": {"control_video": CLIP},
    "mask": {"video": CLIP, "mask": IMAGE},
}


def kind_of(row: Published) -> str:
    name = row.name.rpartition("/")[2]
    kinds = {"InP": "inp", "Control": "control", "Pose": "control", "I2V": "first", "img2vid": "image"}
    return next((kind for end, kind in kinds.items() if name.endswith(end)), "ends" if "Interpol" in name else "text")


def size_is_valid(row: Published, width: int, height: int) -> bool:
    if width < 1 or height < 1 or width % 16 or height % 16:
        return False
    if "Fun" in row.name:
        return 512**2 <= width * height <= (1024 if "V1.5" in row.name else 1280) ** 2
    if "1.5" in row.name:
        return min(width, height) == 768 and max(width, height) <= 1360
    return (width, height) == (720, 480)


def frames_are_valid(row: Published, count: int) -> bool:
    """In one pass or, beyond the native length, in windows."""
    if count < 1 or count > 100_000:
        return False
    if "V1.5" in row.name:
        return count == 1 or count % 8 == 5
    if "1.5" in row.name:
        return count % 16 == 1
    return count % 8 == 1 and (count >= 49 or kind_of(row) not in ("first", "ends"))


def condition_is_valid(row: Published, condition: str, count: int) -> bool:
    kind, last = kind_of(row), count - 1
    places = {"first": [0], "last": [last], "first and last": [0, last], "key frame 16": [16]}.get(condition, [])
    if len(set(places)) < len(places) or any(place > last for place in places):
        return False
    able = {"text": "", "first": "F", "ends": "FL", "inp": "FLK", "control": "", "image": "F"}[kind]
    if not {"F" if place == 0 else "L" if place == last else "K" for place in places} <= set(able):
        return False
    if kind == "control":
        return condition == "control"
    if kind == "image":
        return places == [0]
    return {"control": False, "mask": kind == "inp"}.get(condition, True)


def card(row: Published) -> Card:
    width, channels, patch_size_t, learned = row.shape
    dit = DiTConfig(
        num_attention_heads=width // 64,
        in_channels=channels,
        patch_size_t=patch_size_t,
        use_learned_positional_embeddings=learned,
        use_rotary_positional_embeddings=width == 3072,
    )
    return card_of(Path(row.name), dit, VAEConfig(), {}, name=row.name)


def is_accepted(request: Request, card: Card) -> bool:
    try:
        request.checked(card)
    except InvalidRequest as error:
        if not (error.what and error.why and error.hint and error.param):
            raise AssertionError(f"half an error: {error}") from error
        return False
    return True


def check_row(row: Published) -> Counter:
    """The row's part of the matrix: accepted and refused, each as the rules above say."""
    model, counts = card(row), Counter()
    for (width, height), count, (condition, given) in product(SIZES, FRAMES, CONDITIONS.items()):
        expected = (
            size_is_valid(row, width, height)
            and frames_are_valid(row, count)
            and condition_is_valid(row, condition, count)
        )
        request = Request("a", width=width, height=height, num_frames=count, **given)
        if is_accepted(request, model) != expected:
            raise AssertionError(f"{row.name}: {width}x{height}, {count} frames, {condition}: expected {expected}")
        counts[expected] += 1
    return counts


def test_the_matrix() -> None:
    """In a process of its own, where nothing checks the types of every call: 25 times quicker."""
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    counts = [list(map(int, re.findall(r"(?:accepted|refused) +(\d+)", line))) for line in run.stdout.splitlines()]
    assert [sum(row) for row in counts[:-1]] == [len(SIZES) * len(FRAMES) * len(CONDITIONS)] * len(PUBLISHED)
    assert all(accepted > 0 for accepted, _ in counts), "the defaults of every row are in the matrix"


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name.rpartition("/")[2])
def test_the_nearest_is_valid_and_what_is_valid_stays(row: Published) -> None:
    model = card(row)
    for width, height in product((1, 479, 640, 721, 1080, 1920, 10**30), repeat=2):
        near = nearest_size(model, width, height)
        assert size_is_valid(row, *near), (width, height, near)
        assert nearest_size(model, *near) == near
    for count in [*range(1, 60), 161, 162, 10**40]:
        near = nearest_frames(model, count)
        assert frames_are_valid(row, near)
        assert nearest_frames(model, near) == near
    assert Request("a", **CONDITIONS[usual_condition(row)]).checked(model).num_frames == row.num_frames


def usual_condition(row: Published) -> str:
    return {"control": "control", "image": "first"}.get(kind_of(row), "text")


def test_each_row_is_found_by_its_name_and_shape() -> None:
    for row in PUBLISHED:
        model = card(row)
        assert (model.name, model.layout, model.conditions) == (row.name, row.layout, row.conditions)
        assert model.fixed_size == row.shape[3]
    assert len({row.name for row in PUBLISHED}) == len(PUBLISHED)


PAGE = Path(__file__).parents[1] / "docs" / "requests.md"


def table() -> str:
    """The published models as the page shows them."""
    lines = ["| model | sizes | frames | fps | dtype | tokens | told | licence |", "|---" * 8 + "|"]
    for row in PUBLISHED:
        limits = card(row).limits
        cells = [row.name, limits["sizes"], limits["frames"].removesuffix(", longer in windows"), limits["rates"]]
        cells += [limits["dtypes"], limits["text_lengths"], ", ".join(row.conditions).replace("_", " "), row.licence]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_page_shows_the_table() -> None:
    assert table() in PAGE.read_text(encoding="utf-8"), "print it anew: python tests/test_request_matrix.py table"


if __name__ == "__main__" and sys.argv[1:] == ["table"]:
    print(table())
elif __name__ == "__main__":
    totals = {row.name: check_row(row) for row in PUBLISHED}
    totals["all"] = sum(totals.values(), Counter())
    for name, counts in totals.items():
        print(f"{name:<45} accepted {counts[True]:>5}   refused {counts[False]:>5}")
