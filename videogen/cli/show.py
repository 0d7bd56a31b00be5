"""Facts on stdout: JSON, or a line for each."""

from __future__ import annotations

import json
from typing import Any

from videogen.errors import visible


def show(facts: dict[str, Any], as_json: bool) -> None:
    """JSON, or one fact a line with nested ones indented; what is unknown is left out."""
    print(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else "\n".join(lines(facts)))


def lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    found: list[str] = []
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            found += [f"{indent}{visible(str(name))}", *lines(value, indent + "  ")]
        elif value not in (None, {}, []):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            found.append(f"{indent}{visible(str(name)):<20} {visible(text)}")
    return found
