"""Whatever is given is carried out or refused in three lines: thousands of bad requests, configs, folders, commands.

Run as a program (`python tests/test_bad_inputs.py`), it counts them. That is also how pytest runs it: in a process of
its own, where nothing but the project itself checks types.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from videogen.errors import InvalidRequest, VideogenError
from videogen.request import Request
from videogen.weights.card import Card, read_card
from videogen.weights.hub import find_model
from videogen.weights.limits import Frames, Sizes

TRIED = Counter()
COUNTS = {"requests": 2000, "configs": 800, "folders": 200, "commands": 100}


def many(name: str) -> Callable[[Callable], Callable]:
    """The same examples on every run; their number is counted under `name`."""
    options = {"deadline": None, "database": None, "derandomize": True, "phases": (Phase.generate, Phase.shrink)}
    return settings(max_examples=COUNTS[name], suppress_health_check=list(HealthCheck), **options)


def refused_kindly(kind: str, function: Callable[[], Any]) -> Any:
    """The answer, or None after an error of ours that says what and why. Anything else is a bug, and is raised."""
    TRIED[kind] += 1
    try:
        return function()
    except VideogenError as error:
        if not ((error.what and str(error).isprintable()) or "\n" in str(error)):
            raise AssertionError(f"an empty error: {error!r}") from error
        TRIED[f"{kind} refused"] += 1


# ---- values ---------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-20, 2000),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30, -(10**400), 480, 720, 49, 1.5, 1e308, 1e-320]),
    st.floats(),
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            *[
                "",
                "\0",
                "\ud800",
                "\x1b[2J",
                "a\r\nb",
                "~who/x",
                "/",
                ".",
                "..",
                "a" * 5000,
                "../" * 50,
                "NaN",
                "None",
            ],
            *[
                "http://a/b",
                "data:,",
                "-1",
                "auto",
                "diffusers",
                "crop",
                "𝔘",
                "\u202e",
                "con.png",
                "{}",
                "${oc.env:HOME}",
            ],
        ]
    ),
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=8
)
UNPRINTABLE = st.sampled_from([5000, 9000]).map(lambda digits: 10**digits)  # Python prints 4300 digits at most


class Odd:
    """Looks like an array, and is none."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape


def arrays(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.zeros(shape, dtype)


ARRAYS = st.one_of(
    st.builds(
        arrays,
        st.sampled_from(
            [(), (0,), (3,), (8, 8), (8, 8, 3), (3, 8, 8), (8, 8, 4), (17, 8, 8, 3), (1, 6, 16), (0, 6, 16)]
        ),
        st.sampled_from(["uint8", "float32", "float64", "int64", "bool", "complex64", "object", "U1"]),
    ),
    st.sampled_from([Image.new(mode, (2, 3)) for mode in ("RGB", "L", "P", "CMYK", "I;16", "F", "RGBA", "1")]),
    st.builds(Odd, JSON),
    st.sampled_from([object(), print, b"bytes", {1, 2}, range(3), Path(), Path("gone.png"), int, ..., 3j]),
)
ANYTHING = st.one_of(
    JSON,
    ARRAYS,
    UNPRINTABLE,
    st.lists(UNPRINTABLE, max_size=1),
    st.lists(ARRAYS, max_size=3),
    st.dictionaries(NUMBERS | TEXTS, ARRAYS, max_size=3),
)


# ---- requests -------------------------------------------------------------------------------------------------------


def cards() -> list[Card]:
    tiny = read_card(find_model("tiny"))
    every = ("text", "first_frame", "last_frame", "keyframes", "video", "control_video", "mask")
    free = replace(tiny, fixed_size=False, conditions=every, name="free")
    limited = replace(free, sizes=Sizes((32, 64), (32, 96)), frames=Frames(16, 33), rates=(8,), name="limited")
    return [tiny, free, limited, replace(limited, conditions=("control_video",), layout="control", name="control")]


CARDS = cards()
NAMES = [f.name for f in fields(Request)]


CLIP, PICTURE = np.zeros((17, 8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
USUAL: dict[str, list[Any]] = {  # what is right for one of the cards at least, so that the later checks are reached
    "prompt": ["a", ["a", "b"], None],
    "negative_prompt": ["", "b", ["a", "b"]],
    "prompt_embeds": [None, np.zeros((1, 48, 128)), np.zeros((2, 48, 128))],
    "first_frame": [None, PICTURE, [PICTURE, PICTURE]],
    "last_frame": [None, PICTURE],
    "keyframes": [None, {}, {8: PICTURE}, {0: [PICTURE, PICTURE], 16: PICTURE}],
    "video": [None, CLIP, [PICTURE] * 17],
    "control_video": [None, CLIP],
    "mask": [None, PICTURE, CLIP],
    "height": [None, 64, 48],
    "width": [None, 64, 96],
    "num_frames": [None, 17, 1, 25],
    "snap": [True, {"width": 3}],
    "seed": [0, [1, 2]],
    "latents": [None, np.zeros((1, 5, 16, 8, 8))],
    "use_dynamic_cfg": [True, "sat"],
    "uncond": ["zeros"],
    "out": [None, "new.mp4", ["a.mp4", "b.mp4"]],
}
SETTINGS = st.dictionaries(st.sampled_from(NAMES), st.tuples(st.integers(0, 4), ANYTHING), min_size=1, max_size=6)


@many("requests")
@given(SETTINGS, st.sampled_from(range(4)), st.booleans())
def requests(drawn: dict[str, tuple[int, Any]], place: int, with_prompt: bool) -> None:
    """Each field as drawn, or (four of five times, where there are some) a usual value."""
    card = CARDS[place]
    values = {
        name: USUAL[name][choice % len(USUAL[name])] if choice and name in USUAL else wild
        for name, (choice, wild) in drawn.items()
    }
    request = Request(**({"prompt": "a"} if with_prompt else {}) | values)
    checked = refused_kindly("requests", lambda: request.checked(card))
    if checked is not None:
        checked.checked(card)
        refused_kindly("recipes", lambda: json.dumps(checked.recipe()))


# ---- configs and folders --------------------------------------------------------------------------------------------

TINY = find_model("tiny")
FILES = {
    name: json.loads((TINY / name).read_text())
    for name in ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
}
FILES["videogen.json"] = {
    **{k: v for k, v in json.loads((TINY / "videogen.json").read_text()).items() if k != "provenance"},
    "layout": "frames",
    "sizes": {"short": [8, 64], "long": [8, 64], "side": [8, 64], "portrait": True},
    "frames": {"step": 8, "most": 17},
    "dtypes": ["bfloat16"],
    "rates": [8],
    "text_lengths": [48],
}
PLACES = [(name, key) for name, values in FILES.items() for key in values]
NEW = st.tuples(st.sampled_from(sorted(FILES)), TEXTS)


def written(folder: Path, files: dict[str, Any]) -> Path:
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


def opened(folder: Path) -> Any:
    card = read_card(find_model(folder, offline=True))
    repr(card)
    json.dumps(card.facts)
    return Request("a").checked(card)


@many("configs")
@given(
    st.dictionaries(
        st.sampled_from(PLACES) | st.tuples(st.sampled_from(sorted(FILES)), TEXTS), JSON, min_size=1, max_size=3
    )
)
def configs(changes: dict[tuple[str, str], Any]) -> None:
    files = copy.deepcopy(FILES)
    for (name, key), value in changes.items():
        files[name][key] = value
    with tempfile.TemporaryDirectory() as folder:
        written(Path(folder), files)
        refused_kindly("configs", lambda: opened(Path(folder)))


LONG = b'{"num_layers": ' + b"9" * 5000 + b"}"
BYTES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [b"", b"{", b"[]", b"null", b"NaN", b"[" * 20_000, b"\xff\xfe{}", b'{"a":' * 3000, b'{"a": 1e999}']
    ),
    JSON.map(lambda value: json.dumps(value).encode()),
)
DAMAGE = st.one_of(st.sampled_from(["gone", "folder", "loop", "outside"]), BYTES)


@many("folders")
@given(st.dictionaries(st.sampled_from(sorted(FILES)), DAMAGE, min_size=1, max_size=3))
def folders(damage: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = written(Path(name), FILES)
        for file, how in damage.items():
            (folder / file).unlink()
            if how == "folder":
                (folder / file).mkdir()
            elif how == "loop":
                (folder / file).symlink_to(folder / file)
            elif how == "outside":
                (folder / file).symlink_to("/etc/hostname")
            elif how != "gone":
                (folder / file).write_bytes(how)
        refused_kindly("folders", lambda: opened(folder))


# ---- commands -------------------------------------------------------------------------------------------------------

FLAGS = """
    --frames --size --fps --steps --guidance --negative --seed --sampler --strength --fit --out --crf --snap --height
    --width --video --uncond --step-cache --guidance-until --first-frame --last-frame --keyframe --use-dynamic-cfg
    --image-latent-scale --mask --control-video --model --config --json --nonsense -n --style --preset
    """.split()  # noqa: SIM905
NUMERALS = NUMBERS.map(lambda n: str(n) if abs(n) < 10**400 else "9" * 5000)
WORDS = st.one_of(NUMERALS, TEXTS, st.sampled_from(["8=gone.png", "1x1", "720x480", "99999999999x16"]))


@many("commands")
@given(
    st.sampled_from(["text-to-video", "image-to-video", "t2v", "i2v", "info", "nonsense"]),
    st.lists(st.one_of(WORDS, st.tuples(st.sampled_from(FLAGS), WORDS).map(list)), max_size=4),
)
def commands(command: str, words: list[Any]) -> None:
    from videogen.cli import main

    arguments = [command, *(x for word in words for x in (word if isinstance(word, list) else [word]))]
    if "-" in arguments or "-h" in arguments:  # reads stdin; prints help
        return
    TRIED["commands"] += 1
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main([*arguments, "--offline"])
    if code == 1 or "Traceback" in said.getvalue():
        raise AssertionError(f"{arguments}: {said.getvalue()}")
    TRIED["commands refused"] += code != 0


def test_bad_inputs_are_carried_out_or_refused_in_three_lines(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_CACHE": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, __file__], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    tried = {name: int(count) for name, count in re.findall(r"^(\w+) +tried +(\d+)", run.stdout, re.MULTILINE)}
    assert tried.keys() >= COUNTS.keys()
    assert sum(tried[name] for name in COUNTS) >= 3000


def main() -> None:
    import videogen

    def stop(*_: Any, **__: Any) -> None:
        raise InvalidRequest("valid: nothing is loaded here.")

    videogen.load = stop  # type: ignore[assignment]
    warnings.simplefilter("ignore")
    for function in (requests, configs, folders, commands):
        function()
    for name in [*COUNTS, "recipes"]:
        print(f"{name:<10} tried {TRIED[name]:>5}   refused {TRIED[name + ' refused']:>5}")


if __name__ == "__main__":
    main()
