"""The prompt: T5 embeddings that join the token sequence. Its absence is the empty prompt, in training and sampling."""

from __future__ import annotations

import warnings

from videogen.models.text import TextEncoder
from videogen.types import Conditioning

ABSENT = ""


def prompt(text_encoder: TextEncoder, prompts: list[str]) -> Conditioning:
    """The prompts' embeddings [b, l, e]. Warns where a prompt is longer than the model reads."""
    for text in prompts:
        if (count := text_encoder.count_tokens(text)) > text_encoder.max_length:
            warnings.warn(
                f"the prompt has {count} tokens, the model reads {text_encoder.max_length}; its end is not seen: "
                f"…{text[-40:]!r}",
                stacklevel=2,
            )
    return Conditioning(text=text_encoder(prompts))


def absent(text_encoder: TextEncoder, batch: int) -> Conditioning:
    return prompt(text_encoder, [ABSENT] * batch)
