"""What lies in a model folder is looked at before it is read: anybody can have written it. Imports no torch.

Nothing in it may run a program, lead out of the folder, or be larger than its kind ever is. Each refusal names the
file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from videogen.config import check_bounds
from videogen.errors import ModelNotFound

JSON_LIMIT = 4 * 2**20  # bytes; the largest index of a published model has 0.3 MB
HEADER_LIMIT = 2 * 2**20  # of a safetensors file; published ones have 0.2 MB
TOKENIZER_LIMIT = 64 * 2**20
POINTER = b"version https://git-lfs"
# What transformers could be told to import, or to read from elsewhere, by a tokenizer_config.json.
TOKENIZER_KEYS = ("auto_map", "custom_code", "trust_remote_code", "custom_pipeline")
# The settings of T5 that describe its network. All others (auto_map, attention implementations, quantisers) stay out.
T5_SETTINGS = frozenset(
    """
    d_model d_kv d_ff num_layers num_decoder_layers num_heads relative_attention_num_buckets
    relative_attention_max_distance dropout_rate layer_norm_epsilon initializer_factor feed_forward_proj vocab_size
    classifier_dropout is_encoder_decoder use_cache pad_token_id eos_token_id decoder_start_token_id
    tie_word_embeddings output_past n_positions task_specific_params architectures model_type dtype torch_dtype
    """.split()  # noqa: SIM905
)


def check_folder(folder: Path) -> None:
    """Refuse links that lead out of a model folder, in it and in its parts. The Hub's cache links to its own blobs."""
    if not folder.is_dir():
        return
    home = folder.resolve()
    home = next((p for p in home.parents if p.name.startswith("models--")), home)
    for part in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        for path in part.iterdir() if part is folder or part.resolve().is_relative_to(home) else [part]:
            target = Path(os.path.realpath(path))  # `resolve` fails on links that go in a circle
            if path.is_symlink() and not target.is_relative_to(home):
                raise ModelNotFound(
                    f"{path} leads out of the model folder.",
                    why="a model is read from its own folder only.",
                    hint="put the file itself there.",
                )


def check_file(path: Path, limit: int | None = None) -> None:
    """Refuse what is not a plain file (a pipe would be waited for), a Git LFS pointer, and a file beyond `limit`."""
    if not path.is_file():
        why = "it is no plain file." if path.exists() else "no such file."
        raise ModelNotFound(f"{path} cannot be read.", why=why, hint="fetch or copy the model again.")
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ModelNotFound(
                f"{path} cannot be read.", why="it is a Git LFS pointer, not the file itself.", hint="git lfs pull"
            )
    if limit and path.stat().st_size > limit:
        raise ModelNotFound(
            f"{path} has {path.stat().st_size / 2**20:.0f} MiB.",
            why=f"files of this kind have {limit / 2**20:.0f} MiB at most.",
            hint="fetch or copy the model again.",
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder."""
    try:
        check_file(path, JSON_LIMIT)
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelNotFound(
            f"{path} cannot be read.",
            why=f"{type(error).__name__}: {error}",
            hint="the model folder is incomplete: fetch or copy it again.",
        ) from error
    if not isinstance(values, dict):
        raise ModelNotFound(f"{path} is not a JSON object.", hint="fetch or copy the model again.")
    return values


def t5_settings(values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Of a `text_encoder/config.json`, what describes the network, within bounds."""
    known = {key: value for key, value in values.items() if key in T5_SETTINGS}
    check_bounds(known, where=where)
    for key in ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size"):
        if key in known and type(known[key]) is not int:
            raise ModelNotFound(f"{where} has {key} = {known[key]!r}.", why="it is a whole number.")
    return known


def check_tokenizer(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, after a look at all that is read with it: no code, no files from elsewhere.

    Where it is absent but the vocabulary is there, T5's own settings are meant.
    """
    path = folder / "tokenizer_config.json"
    alone = not path.exists() and any((folder / name).is_file() for name in ("spiece.model", "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer"} if alone else read_json(path)
    for key, value in config.items():
        if value is not None and (key in TOKENIZER_KEYS or key.endswith("_file")):
            raise ModelNotFound(
                f"{folder / 'tokenizer_config.json'} has {key}.",
                why="code and files outside of the tokenizer's folder are never read.",
                hint=f"remove {key} from the file, if you trust the rest of it.",
            )
    for name in ("spiece.model", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).exists():
            check_file(folder / name, TOKENIZER_LIMIT)
    return config
