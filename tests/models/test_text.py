"""The small tokenizer and encoder, and the wrapper around any T5."""

import json

import pytest
import torch

from videogen.models.text import TextEncoder, cut_words, tiny_t5, word_tokenizer

WORDS = ["a", "red", "blue", "circle", "moves", ",", "."]


def make() -> TextEncoder:
    torch.manual_seed(0)
    tokenizer = word_tokenizer(WORDS, max_length=8)
    return TextEncoder(tiny_t5(len(tokenizer), d_model=32, num_heads=2, d_ff=64).eval(), tokenizer, max_length=8)


def ids(text: TextEncoder, prompt: str) -> list[int]:
    return text.tokenizer(prompt, padding="max_length", max_length=8, truncation=True)["input_ids"]


def test_words_punctuation_and_case():
    text = make()
    assert ids(text, "A red circle, moves.") == [3, 4, 6, 8, 7, 9, 1, 0]
    assert ids(text, "a RED  hexagon") == [3, 4, 2, 1, 0, 0, 0, 0]
    assert ids(text, "") == [1] + 7 * [0]
    assert ids(text, "a " * 20) == 7 * [3] + [1]  # cut, and still ended
    assert len(text.tokenizer) == len(WORDS) + 3


def test_count_tokens_counts_beyond_the_limit():
    text = make()
    assert text.count_tokens("a red circle") == 4
    assert text.count_tokens("") == 1
    assert text.count_tokens("a " * 20) == 21


def test_the_words_that_are_cut_are_exactly_those_the_tokens_do_not_reach():
    text = make()
    for prompt in ("a red circle", "a " * 7, ""):
        assert cut_words(text.tokenizer, prompt, 8) == []
    assert cut_words(text.tokenizer, "a red circle moves. a blue circle, moves", 8) == ["circle,", "moves"]
    assert cut_words(text.tokenizer, "a red circle moves a red circle.  a", 8) == ["circle.", "a"], "cut in part"
    for count in range(8, 30):
        prompt = " ".join(WORDS[i % len(WORDS)] for i in range(count))
        words = cut_words(text.tokenizer, prompt, 8)
        read = prompt.split()[: count - len(words)]
        assert ids(text, prompt) == [*text.tokenizer(" ".join(read))["input_ids"]]
        assert read + words == prompt.split()


def test_embeddings():
    text = make()
    both = text(["a red circle", "a blue circle moves"])
    assert both.shape == (2, 8, 32)
    assert not both.requires_grad
    assert torch.allclose(text(["a red circle"])[0], both[0], atol=1e-6)
    assert not torch.allclose(both[0], both[1])
    # The padding takes part: there is no mask.
    padded = text.encoder(torch.tensor([ids(text, "a red circle")])).last_hidden_state
    bare = text.encoder(torch.tensor([ids(text, "a red circle")[:4]])).last_hidden_state
    assert torch.allclose(padded[0], both[0], atol=1e-6)
    assert not torch.allclose(bare[0], both[0, :4], atol=1e-4)


def test_a_word_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        word_tokenizer(["a", "a"], 8)


def test_saved_parts_open_again(tmp_path):
    """By transformers, under the class name that `model_index.json` shall carry."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5EncoderModel

    text = make()
    text.tokenizer.save_pretrained(tmp_path / "tokenizer")
    text.encoder.save_pretrained(tmp_path / "text_encoder")
    assert not list(tmp_path.rglob("*.bin"))
    encoder = T5EncoderModel.from_pretrained(tmp_path / "text_encoder").eval()
    for kind in (PreTrainedTokenizerFast, AutoTokenizer):
        tokenizer = kind.from_pretrained(tmp_path / "tokenizer")
        again = TextEncoder(encoder, tokenizer, 8)
        assert ids(again, "A red hexagon.") == ids(text, "A red hexagon.")
        assert torch.allclose(again(["a red circle"]), text(["a red circle"]), atol=1e-5)


def test_diffusers_pipeline_opens_them(tmp_path):
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXTransformer3DModel,
    )

    text = make()
    transformer = CogVideoXTransformer3DModel(
        num_layers=1, num_attention_heads=1, attention_head_dim=16, text_embed_dim=32, sample_height=8, sample_width=8
    )
    vae = AutoencoderKLCogVideoX(block_out_channels=(8, 8, 8, 8), norm_num_groups=2, layers_per_block=1)
    CogVideoXImageToVideoPipeline(
        tokenizer=text.tokenizer,
        text_encoder=text.encoder,
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(),
    ).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]  # exists in transformers 4 and 5
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(tmp_path)
    embeds, _ = pipeline.encode_prompt("a red circle", do_classifier_free_guidance=False, max_sequence_length=8)
    assert torch.allclose(embeds, text(["a red circle"]), atol=1e-5)
