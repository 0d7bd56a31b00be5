"""The prompt: T5 embeddings that join the token sequence. Its absence is the empty prompt, in training and sampling."""

from __future__ import annotations

from videogen.models.text import TextEncoder
from videogen.types import Conditioning

ABSENT = ""


def prompt(text_encoder: TextEncoder, prompts: list[str]) -> Conditioning:
    return Conditioning(text=text_encoder(prompts))


def absent(text_encoder: TextEncoder, batch: int) -> Conditioning:
    return prompt(text_encoder, [ABSENT] * batch)
