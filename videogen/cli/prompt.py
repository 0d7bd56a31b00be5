"""`videogen prompt TEXT`: the prompt that `--enhance` and `--style` would make of it. Makes no clip."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from videogen.cli import generate
from videogen.request import Request
from videogen.weights.hub import find_model


def add_command(subparsers: Any) -> None:
    command = subparsers.add_parser("prompt", help="show a prompt enhanced, or in a style")
    add = command.add_argument
    add("prompt", nargs="+", help="a prompt in quotes; - reads lines from stdin, @FILE from a file")
    add("--enhance", default="template", metavar="HOW", help="template (default), local:FOLDER, URL, or none")
    add("--style", metavar="NAME", help="words for a look, put behind the prompt")
    add("--styles", metavar="FILE", help="YAML file with more styles")
    add("--seed", type=int, default=0, metavar="N", help="chooses the template's phrases (default 0)")
    add("--model", help="also say how many tokens of this model's text encoder the prompt has")
    add("--offline", action="store_true", help="never use the network")
    add("--json", action="store_true", help="print one JSON object per prompt")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """One line per prompt on stdout."""
    count = token_counter(args.model, args.offline) if args.model else None
    requests = [Request(prompt, seed=args.seed) for prompt in generate.prompts_of(args.prompt)]
    how = None if args.enhance == "none" else args.enhance
    for request, note in generate.reworded(requests, how, args.style, args.styles):
        facts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt} | note
        if count:
            facts |= count(request.prompt)
            cut = f"; it does not see: {facts['cut']!r}" if facts["cut"] else ""
            print(f"{facts['tokens']} tokens, {args.model} reads {facts['most_tokens']}{cut}", file=sys.stderr)
        print(json.dumps(facts, ensure_ascii=False) if args.json else request.prompt, flush=True)


def token_counter(model: str, offline: bool) -> Callable[[str], dict[str, Any]]:
    """How many tokens a prompt has for this model, how many it reads, and the words beyond; opens no weights."""
    from videogen.weights.single import open_card

    card = open_card(find_model(model, offline=offline, weights=False), offline=offline, weights=False)
    most = card.max_sequence_length
    from videogen.models.text import count_tokens, cut_words
    from videogen.weights.diffusers import load_tokenizer

    tokenizer = load_tokenizer(card.folder)
    return lambda text: {
        "tokens": count_tokens(tokenizer, text),
        "most_tokens": most,
        "cut": " ".join(cut_words(tokenizer, text, most)),
    }
