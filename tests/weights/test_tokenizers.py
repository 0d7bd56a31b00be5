"""Tokenizer files as repositories have them: a vocabulary alone, transformers 5's one file, or all of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece

from videogen.errors import ModelNotFound
from videogen.models.text import tiny_t5
from videogen.testing import tiny_pipeline
from videogen.weights.card import read_card
from videogen.weights.diffusers import load_text_encoder, load_tokenizer, save_folder

WORDS = ["a", "red", "blue", "circle", "square", "moves", "right", "left", "on", "black", "white", "navy", "small"]
PROMPT = "a small red circle moves right on black"


@pytest.fixture(scope="module")
def spiece(tmp_path_factory) -> Path:
    """A sentencepiece vocabulary with T5's special ids: padding 0, end 1, unknown 2."""
    folder = tmp_path_factory.mktemp("vocabulary")
    lines = (" ".join(WORDS[i % len(WORDS)] for i in range(k, k + 9)) for k in range(400))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(folder / "spiece"),
        vocab_size=48,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder / "spiece.model"


@pytest.fixture(scope="module")
def model(spiece, tmp_path_factory) -> Path:
    """A model whose tokenizer is sentencepiece's, saved by us."""
    from transformers import T5Tokenizer

    pipe = tiny_pipeline()
    tokenizer = T5Tokenizer.from_pretrained(spiece.parent)
    pipe.text_encoder.tokenizer = tokenizer
    pipe.text_encoder.encoder = tiny_t5(len(tokenizer), d_model=16, num_heads=2, d_ff=32)
    return pipe.save(tmp_path_factory.mktemp("model") / "model")


def with_files(model: Path, folder: Path, keep: set[str]) -> Path:
    copy = shutil.copytree(model, folder)
    for path in (copy / "tokenizer").iterdir():
        if path.name not in keep:
            path.unlink()
    return copy


def test_a_saved_model_keeps_the_vocabulary_for_older_readers(model, spiece):
    names = {path.name for path in (model / "tokenizer").iterdir()}
    assert {"spiece.model", "tokenizer.json", "tokenizer_config.json"} <= names
    assert (model / "tokenizer" / "spiece.model").read_bytes() == spiece.read_bytes()


@pytest.mark.parametrize(
    "keep",
    [
        {"spiece.model"},
        {"tokenizer.json"},
        {"spiece.model", "tokenizer_config.json"},
        {"tokenizer.json", "tokenizer_config.json"},
    ],
    ids=lambda names: "+".join(sorted(names)),
)
def test_one_of_the_vocabularies_is_enough(model, spiece, tmp_path, keep):
    copy = with_files(model, tmp_path / "copy", keep)
    ids = load_tokenizer(copy)(PROMPT)["input_ids"]
    own = sentencepiece.SentencePieceProcessor(model_file=str(spiece))
    assert ids == [*own.encode(PROMPT), 1]
    batch = load_text_encoder(copy).token_ids([PROMPT])
    assert batch[0, :8].tolist() == [*ids[:7], 1]
    assert load_tokenizer(copy).pad_token_id == 0


def test_no_vocabulary_at_all_is_said(model, tmp_path):
    copy = with_files(model, tmp_path / "copy", set())
    with pytest.raises(ModelNotFound, match="tokenizer"):
        load_tokenizer(copy)


def test_a_text_encoder_is_copied_with_its_files(model, tmp_path):
    """As `videogen convert` does: shards, index and vocabulary byte for byte."""
    pipe, card = tiny_pipeline(), read_card(model)
    out = save_folder(tmp_path / "out", dit=pipe.dit, vae=pipe.vae, text_encoder=model, scheduler_config=card.scheduler)
    for part in ("text_encoder", "tokenizer"):
        ours, theirs = ({p.name: p.read_bytes() for p in (folder / part).iterdir()} for folder in (out, model))
        assert ours == theirs
    index = json.loads((out / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "T5Tokenizer"]
