"""Prompts to embeddings: the T5 encoder of the published models, and how to make a small one over a closed vocabulary.

The transformer was trained with the padding in its sequence, and T5 ran over the padded tokens without a mask; so here.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, T5EncoderModel

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


class TextEncoder(nn.Module):
    """T5 and its tokenizer as one function of prompts, each padded or cut to `max_length` tokens."""

    def __init__(self, encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.max_length = max_length

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> Float[Tensor, "b l e"]:
        return self.encoder(self.token_ids(prompts)).last_hidden_state

    def token_ids(self, prompts: list[str]) -> Int[Tensor, "b l"]:
        """Padded or cut to `max_length`, on the encoder's device."""
        batch = self.tokenizer(
            prompts, padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        )
        return batch["input_ids"].to(self.encoder.device)

    def count_tokens(self, prompt: str) -> int:
        """Tokens of the whole prompt, its end mark included; beyond `max_length` the rest is not read."""
        return count_tokens(self.tokenizer, prompt)


def count_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """Tokens of the whole prompt, its end mark included."""
    return len(tokenizer(prompt, truncation=False, verbose=False)["input_ids"])


def cut_words(tokenizer: PreTrainedTokenizerBase, prompt: str, max_length: int) -> list[str]:
    """The words of a prompt that a model of `max_length` tokens does not read, or not to their end: none if it fits.

    Found by halving: no token reaches over a space, so the words before the cut have the tokens that they have alone.
    """
    if count_tokens(tokenizer, prompt) <= max_length:
        return []
    words = list(re.finditer(r"\S+", prompt))

    def fits(count: int) -> bool:
        return count == 0 or count_tokens(tokenizer, prompt[: words[count - 1].end()]) <= max_length

    read = bisect_left(range(len(words) + 1), True, key=lambda count: not fits(count)) - 1
    return [word.group() for word in words[read:]]


def word_tokenizer(vocabulary: Sequence[str], max_length: int) -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark, lower case. Ids: padding 0, end 1, unknown 2, then `vocabulary`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate([PAD, END, UNKNOWN, *vocabulary])}
    if len(words) != len(vocabulary) + 3:
        raise ValueError("the vocabulary holds a word twice")
    core = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    core.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, words[END])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=max_length
    )


def tiny_t5(
    vocab_size: int, *, d_model: int = 128, num_layers: int = 2, num_heads: int = 4, d_ff: int = 256
) -> T5EncoderModel:
    """A small encoder with fresh weights, of the kind of the published T5 v1.1 XXL (gated GELU)."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=d_model // num_heads,
        d_ff=d_ff,
        num_layers=num_layers,
        num_heads=num_heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)
