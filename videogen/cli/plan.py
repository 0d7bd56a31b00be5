"""`videogen plan …`: what a clip needs under each memory plan, before anything is loaded. Also `--dry-run`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from videogen.cli import generate
from videogen.errors import InvalidRequest
from videogen.request import Request
from videogen.runtime.plan import (
    GIB,
    RESERVE,
    Estimate,
    choose_for,
    estimates,
    fits,
    free_device,
    free_host,
    gib,
    job_of,
    smaller,
    valid_for,
)
from videogen.weights.card import Card

COMMANDS = ("text-to-video", "t2v", "image-to-video", "i2v")
STAGES = ("text", "encode", "denoise", "decode")


def add_command(subparsers: Any) -> None:
    command = subparsers.add_parser("plan", help="the memory a clip needs under each plan; loads nothing")
    command.add_argument("prompt", nargs="*", help="text-to-video or image-to-video and prompts, as for that command")
    generate.add_request_flags(command)
    generate.add_image_flags(command)
    generate.add_habit_flags(command)
    generate.add_run_flags(command)
    command.add_argument("--device-memory", type=float, metavar="GIB", help="plan for a GPU with so much free memory")
    command.add_argument("--host-memory", type=float, metavar="GIB", help="and a machine with so much beside it")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check the request and print the table, or with --json its numbers in GiB."""
    generate.check_run_flags(args)
    card = generate.card_of_model(args)
    words = args.prompt[1:] if args.prompt[:1] and args.prompt[0] in COMMANDS else args.prompt
    prompt = next(iter(generate.prompts_of(words)), "")
    request = Request(prompt, **generate.keywords(args) | generate.frames_of(args, card)).checked(card)
    facts = planned(card, request, args)
    print(json.dumps(facts, ensure_ascii=False) if args.json else table(facts))


def planned(card: Card, request: Request, args: argparse.Namespace) -> dict[str, Any]:
    """All that the table shows, sizes in GiB. Without --device-memory torch is asked what this machine has."""
    device, dtype, free, host = machine(card, args)
    job = job_of(card, request, dtype=dtype, device=device)
    found = estimates(job)
    _, chosen = choose_for([job], device=free, host=host)  # as the command that makes the clip does
    if args.memory != "auto":
        chosen = next(one for one in found if one.plan.name == args.memory)
    elif not fits(chosen.device, free) or (free is None and not fits(chosen.host, host)):
        chosen = None
    f, h, w = job.grid
    facts: dict[str, Any] = {
        "model": card.name,
        "size": f"{job.width}x{job.height}",
        "num_frames": job.num_frames,
        "latents": [f, card.vae.latent_channels, h, w],
        "tokens": {"text": card.dit.max_text_seq_length, "video": job.tokens},
        "steps": job.steps,
        "device": device,
        "dtype": dtype,
        "free_device": None if free is None else round(free / GIB, 2),
        "free_host": None if host is None else round(host / GIB, 2),
        "plans": {one.plan.name: row(one, free, host) for one in found},
        "chosen": chosen.plan.name if chosen else None,
        "why": why(found, chosen, args.memory, free, host),
    }
    if chosen is None:
        least = found[-1]
        multiple, valid = card.size_multiple, valid_for(card, request)
        flags = smaller(job, least.plan, stage=least.widest, free=free, multiple=multiple, valid=valid)
        facts["would_fit"] = {flag: round(need / GIB, 2) for flag, need in flags.items()}
    return facts


def row(one: Estimate, free: int | None, host: int | None) -> dict[str, Any]:
    stages = {name: round(need.total / GIB, 3) for name, need in one.stages.items()}
    sizes = {"device": round(one.device / GIB, 3), "host": round(one.host / GIB, 3)}
    return {**sizes, "stages": stages, "fits": fits(one.device, free) and fits(one.host, host)}


def why(found: list[Estimate], chosen: Estimate | None, asked: str, free: int | None, host: int | None) -> str:
    if chosen is None:
        return "none fits: even the least is too much"
    if asked != "auto":
        return "asked for"
    if not fits(chosen.host, host):
        return "the fastest that fits the device; for any that does, the host has little memory"
    faster = found[: found.index(chosen)]
    if not faster:
        return "the fastest there is, and it fits"
    last = faster[-1]
    short = [
        f"{gib(need * (1 + RESERVE))} of {name} memory"
        for name, need, there in (("device", last.device, free), ("host", last.host, host))
        if not fits(need, there)
    ]
    return f"the fastest that fits: {last.plan.name} wants {' and '.join(short)}, a reserve included"


def machine(card: Card, args: argparse.Namespace) -> tuple[str, str, int | None, int | None]:
    """(device, dtype, free bytes there, free bytes of the host): of this machine, or of the one the flags describe."""
    given = args.__dict__.get("device_memory")
    if any(value is not None and not 0 < value <= 2**20 for value in (given, args.__dict__.get("host_memory"))):
        raise InvalidRequest("memory is counted in GiB.", why="it is more than 0.", hint="--device-memory 24")
    host = free_host() if args.__dict__.get("host_memory") is None else int(args.host_memory * GIB)
    if given is not None:
        if args.device == "cpu":
            raise InvalidRequest(
                "--device-memory is given for a CPU.",
                why="a CPU has the host's memory.",
                hint="--host-memory",
                param="device",
            )
        trained = card.trained_dtype
        host = host if args.host_memory is not None else None  # another machine's is not known
        return "cuda", trained if args.dtype == "auto" else args.dtype, int(given * GIB), host
    if args.device == "cpu":  # known without torch
        return "cpu", "float32" if args.dtype == "auto" else args.dtype, None, host
    from videogen.runtime.devices import choose_device, choose_dtype

    device = choose_device(args.device)
    dtype = str(choose_dtype(args.dtype, device, card)).removeprefix("torch.")
    return device.type, dtype, free_device(str(device)), host


def table(facts: dict[str, Any]) -> str:
    """For people; sizes in GiB."""
    f, _, h, w = facts["latents"]
    tokens = facts["tokens"]
    lines = [
        f"{facts['model']}: {facts['num_frames']} frames of {facts['size']}, {facts['steps']} steps",
        f"{facts['dtype']} on {facts['device']}",
        f"latents {f} x {h} x {w}, {tokens['video']} tokens and {tokens['text']} of text",
        "",
    ]
    stages = [name for name in STAGES if any(name in plan["stages"] for plan in facts["plans"].values())]
    lines.append(f"{'GiB':10}" + "".join(f"{name:>9}" for name in (*stages, "device", "host")))
    for name, plan in facts["plans"].items():
        sizes = [*(plan["stages"].get(stage, 0) for stage in stages), plan["device"], plan["host"]]
        mark = "  <-" if name == facts["chosen"] else "" if plan["fits"] else "  too much"
        lines.append(f"{name:10}" + "".join(f"{size:9.2f}" for size in sizes) + mark)
    free = {"device": facts["free_device"], "host": facts["free_host"]}
    known = [f"{name} {size} GiB" for name, size in free.items() if size is not None]
    lines += ["", f"free: {', '.join(known) or 'not known'}", f"{facts['chosen'] or 'no plan'}: {facts['why']}"]
    lines += [f"would fit: {flag} ({size} GiB)" for flag, size in facts.get("would_fit", {}).items()]
    return "\n".join(lines)
