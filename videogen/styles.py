"""Styles and presets: settings by name, from YAML files that anybody can edit. Imports no torch."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videogen.config import from_dict, read_yaml
from videogen.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class Style:
    """Words for a look: `prompt` goes behind a prompt, or around it where it holds {prompt}."""

    prompt: str
    negative_prompt: str = ""

    def applied(self, prompt: str, negative_prompt: str = "") -> tuple[str, str]:
        """Prompt and negative prompt in this style.

        >>> Style(prompt="as a pencil sketch").applied("a red circle.")
        ('a red circle, as a pencil sketch', '')
        """
        text = prompt.strip().rstrip(".,")
        around = self.prompt if "{prompt}" in self.prompt else ", ".join(filter(None, ("{prompt}", self.prompt)))
        avoided = ", ".join(filter(None, (negative_prompt, self.negative_prompt)))
        return around.replace("{prompt}", text).removeprefix(", "), avoided


def find_style(name: str, file: str | Path | None = None) -> Style:
    """The style of that name: of `file`, else of the user's own, else of those that come with the package."""
    styles = read_named("styles", file)
    _require_known("style", name, styles)
    given = {"prompt": styles[name]} if isinstance(styles[name], str) else styles[name]
    if not isinstance(given, dict) or "prompt" not in given or not all(isinstance(v, str) for v in given.values()):
        hint = f'{name}: {{prompt: "in black and white", negative_prompt: "colour"}}'
        raise InvalidRequest(f"the style {name} has no words.", why="a style is text.", hint=hint, param="style")
    return from_dict(Style, given, where=f"the style {name}")


def find_preset(name: str, model: str) -> dict[str, Any]:
    """Settings by the names of keywords and flags: the preset's, then what it has for this model."""
    presets = read_named("presets")
    _require_known("preset", name, presets)
    settings = dict(presets[name] or {})
    return settings | ((settings.pop("models", None) or {}).get(model) or {})


def read_named(kind: str, file: str | Path | None = None) -> dict[str, Any]:
    """What `kind`.yaml of the package, of ~/.config/videogen and `file` say, each winning over those before."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    own = config / "videogen" / f"{kind}.yaml"
    files = [Path(__file__).parent / f"{kind}.yaml", *([own] if own.is_file() else []), *([file] if file else [])]
    return {str(name): value for path in files for name, value in read_yaml(path).items()}


def _require_known(kind: str, name: str, known: dict[str, Any]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        raise InvalidRequest(
            f"there is no {kind} {name!r}.",
            why=f"there are {', '.join(known)}.",
            hint=f"--{kind} {(near or list(known))[0]}",
            param=kind,
        )
