"""`videogen models list | pull`: the published models, and bringing one into the cache."""

from __future__ import annotations

import argparse
import json
from typing import Any

from videogen.weights.hub import bundled, fetch, in_cache, parse_name, select
from videogen.weights.hub import names as names_in
from videogen.weights.models import PUBLISHED


def add_command(subparsers: Any) -> None:
    command = subparsers.add_parser("models", help="list the published models, or fetch one")
    actions = command.add_subparsers(dest="action", metavar="action", required=True)
    action = actions.add_parser("list", help="published models: licence, native size, conditions, whether cached")
    action.add_argument("--json", action="store_true", help="print JSON")
    action.set_defaults(run=list_models)
    action = actions.add_parser("pull", help="fetch what is missing or newer, after saying how much it is")
    action.add_argument("model", help="CogVideoX-2b, org/name[@revision], hf://org/name")
    action.set_defaults(run=pull)


def list_models(args: argparse.Namespace) -> None:
    """One line or one JSON object for each."""
    for row in PUBLISHED:
        found = in_cache(row.name)
        state = "no" if not found else "partly" if select(names_in(found))[1] else "yes"
        facts = {"name": row.name, "licence": row.licence, "width": row.width, "height": row.height}
        facts |= {"num_frames": row.num_frames, "fps": row.fps, "conditions": list(row.conditions), "cached": state}
        size = f"{row.width}x{row.height}"
        line = f"{row.name:<42} {size:>9} x {row.num_frames:<3} {row.licence:<18} cached: {state:<7}"
        print(json.dumps(facts) if args.json else f"{line} {', '.join(row.conditions)}")


def pull(args: argparse.Namespace) -> None:
    """Print the folder."""
    if args.model == "tiny":
        print(bundled("tiny"))
    else:
        print(fetch(*parse_name(args.model)))
