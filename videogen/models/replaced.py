"""Giving back a method that was replaced on one object."""

from typing import Any


def give_back(owner: Any, name: str, before: Any) -> None:
    """`owner.name` is what it was `before` it was replaced; of a method of the class nothing stays on the object."""
    delattr(owner, name)
    if getattr(owner, name) != before:
        setattr(owner, name, before)
