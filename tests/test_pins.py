"""Versions of libraries with holes that a file could use are not allowed by `pyproject.toml`, and are not installed."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

# The first version without: CVE-2026-24747 (unpickler), CVE-2026-44827 (code in a model folder), CVE-2026-4372
# (attention named by a config), CVE-2026-1260 (tokenizer file).
SAFE = {"torch": (2, 10), "diffusers": (0, 38), "transformers": (5, 3), "sentencepiece": (0, 2, 1)}


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.match(r"\d+(?:\.\d+)*", text)[0].split(".")))  # type: ignore[index]


@pytest.mark.parametrize("name", SAFE)
def test_the_least_version_is_a_safe_one(name: str) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = next(line for line in project["dependencies"] if re.match(rf"{name}[<>=]", line))
    least = re.search(r">=([\d.]+)", wanted)
    assert least
    assert numbers(least[1]) >= SAFE[name]
    assert numbers(version(name)) >= SAFE[name]
