"""The prompt: T5 embeddings that join the token sequence. Its absence is the empty prompt, in training and sampling.

SAT, which trained the published models, told zeros instead: `zeros`.
"""

from __future__ import annotations

import warnings
from typing import Any

from videogen.errors import Note
from videogen.models.text import TextEncoder, count_tokens, cut_words
from videogen.types import Conditioning

ABSENT = ""
SHOWN = 400  # characters of what is cut


def prompt(text_encoder: TextEncoder, prompts: list[str]) -> Conditioning:
    """The prompts' embeddings [b, l, e]. A Note names the words of a prompt that the model does not read."""
    say_what_is_cut(text_encoder.tokenizer, prompts, text_encoder.max_length)
    return Conditioning(text=text_encoder(prompts))


def say_what_is_cut(tokenizer: Any, prompts: list[str], max_length: int) -> None:
    """One Note per prompt that has more tokens than the model reads, with the words it will not see."""
    for text in dict.fromkeys(prompts):
        if words := cut_words(tokenizer, text, max_length):
            cut = " ".join(words)
            shown = cut if len(cut) <= SHOWN else f"{cut[:SHOWN]}… ({len(words)} words)"
            count = count_tokens(tokenizer, text)
            message = f"the prompt has {count} tokens, the model reads {max_length}; it does not see: {shown!r}"
            warnings.warn(Note(message), stacklevel=3)


def zeros(told: Conditioning) -> Conditioning:
    """The absence that SAT trained with and guides by (`uncond="zeros"`): embeddings of zeros, as many as are told."""
    assert told.text is not None
    return Conditioning(text=told.text.new_zeros(told.text.shape))


def absent(text_encoder: TextEncoder, batch: int) -> Conditioning:
    return prompt(text_encoder, [ABSENT] * batch)
