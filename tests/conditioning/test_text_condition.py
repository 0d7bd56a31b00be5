"""The prompt as a condition: its absence is the empty prompt, and what is not read is said."""

import warnings

import pytest
import torch

from videogen.conditioning import text
from videogen.errors import Note
from videogen.models.text import TextEncoder, tiny_t5, word_tokenizer

WORDS = ("a", "red", "circle")


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    tokenizer = word_tokenizer(WORDS, max_length=6)
    return TextEncoder(tiny_t5(len(tokenizer), d_model=8, num_layers=1, num_heads=1, d_ff=8), tokenizer, 6)


def test_absence_is_the_empty_prompt(encoder):
    absent = text.absent(encoder, 2).text
    assert absent is not None
    assert absent.shape == (2, 6, 8)
    assert torch.equal(absent[1:], text.prompt(encoder, [""]).text)
    assert not torch.equal(absent[1:], text.prompt(encoder, ["red"]).text)


def test_a_prompt_longer_than_the_model_reads_is_said(encoder):
    with pytest.warns(Note, match="9 tokens, the model reads 6; it does not see: 'circle a red'") as said:
        text.prompt(encoder, ["a red circle a red circle a red"] * 2)
    assert len(said) == 1, "once for equal prompts"
    with pytest.warns(Note, match=r"… \(195 words\)"):
        text.say_what_is_cut(encoder.tokenizer, ["circle " * 200], 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.prompt(encoder, ["a red circle a red"])
