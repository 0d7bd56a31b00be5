"""Ours against diffusers, on the same weights and inputs, in one process and one run.

    python scripts/benchmark.py                              what this machine can bear; make bench
    python scripts/benchmark.py --shape 5b --stage dit decode --compiled
    python scripts/benchmark.py floors                       what the machine can do, alone
    python scripts/benchmark.py counters                     FLOPs, bytes and peaks at full size, on the meta device

Writes docs/benchmarks/<device>-<date>.md and .json. docs/benchmarks/README.md says how it measures and how to read it.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads would count as work in the process's time
os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler would announce itself

import torch
from bench import cases, floors
from bench.cases import Case, Variant
from bench.measure import Run, Seconds, error, first_line, interleaved, median, peak, weight_bytes
from bench.models import SHAPES, Bundled, Weights
from bench.plans import compare_plans
from bench.report import ROOT, Report, table

STAGES = {"text": cases.text, "dit": cases.dit, "encode": cases.encode, "decode": cases.decode, "clip": cases.clip}
FOLDER = ROOT / "docs" / "benchmarks"


def main(arguments: list[str] | None = None) -> int:
    from diffusers.utils import logging

    logging.set_verbosity_error()
    args = parse(arguments)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.backends.cudnn.allow_tf32 = False  # or references in float32 would be none
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.what == "counters":
        from bench.budgets import write

        print(write(args.out))
        return 0

    report = Report(args.out, device)
    for kind in args.floors:
        report.add("floors", kind, list(floors.KINDS[kind](device, small=args.shape == ["smoke"])))
    if args.what == "floors":
        return 0
    failed = []
    for name in args.shape or (["tiny", "toy"] if device.type == "cpu" else ["5b"]):
        weights = weights_of(name, device, args.steps)
        usual = [*STAGES, *(["plans"] if device.type == "cpu" and name != "tiny" else [])]
        for stage in args.stage or usual:
            try:
                run_stage(stage, name, weights, report, args)
            except Exception:  # the other stages are worth having
                traceback.print_exc()
                failed.append(f"{name} {stage}")
    print(f"\nwritten: {report.path.with_suffix('.md')} and {report.path.name}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run_stage(stage: str, name: str, weights: Weights, report: Report, args: argparse.Namespace) -> None:
    if stage == "plans":
        title, results = f"{name}: memory plans", compare_plans(weights.shape, weights.device)
    else:
        case = STAGES[stage](weights.shape, weights, args.compiled)
        rounds = args.rounds or weights.shape.rounds
        rows = report.floor_rows() if weights.dtype != torch.float32 else []  # which are measured in bfloat16
        title, results = f"{name}: {case.name}", [measure(case, weights.device, rows, rounds, args.variants)]
    result = {}
    for result in results:
        report.add("cases", title, result)
    print(f"\n{title}: {result['what']}\n" + "\n".join(table(result)), flush=True)


def weights_of(name: str, device: torch.device, steps: int | None) -> Weights:
    if name == "tiny":
        return Bundled(torch.float32, device, steps or 20)
    shape = SHAPES[name]
    return Weights(replace(shape, steps=steps or shape.steps), shape.dtype, device)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "floors", "counters"), default="all")
    parser.add_argument("--shape", nargs="+", choices=["tiny", *SHAPES], help="default: tiny and toy, on a GPU 5b")
    parser.add_argument("--stage", nargs="+", choices=[*STAGES, "plans"])
    parser.add_argument("--variants", nargs="+", help="parts of their names; default: all")
    parser.add_argument("--floors", nargs="*", choices=floors.KINDS, default=list(floors.KINDS))
    parser.add_argument("--compiled", nargs="?", const="plain", choices=("plain", "cudnn"), help="torch.compile's too")
    parser.add_argument("--rounds", type=int, help="default: 3, toy 2")
    parser.add_argument("--steps", type=int, help="of a whole clip")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=FOLDER)
    return parser.parse_args(arguments)


@torch.no_grad()
def measure(
    case: Case, device: torch.device, floor_rows: list[dict[str, Any]], rounds: int, only: list[str] | None = None
) -> dict[str, Any]:
    """Build each variant, warm it up, take its error and peak; then time all of them, interleaved.

    The first variant runs twice in every round: how far its two medians differ is the noise. What fails is a row that
    says why, so that one kernel a machine lacks does not cost the others.
    """
    reference = case.reference() if case.reference else None
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    first, started = next(iter(case.variants)), time.monotonic()
    for name, build in case.variants.items():
        if only and name != first and not any(part in name for part in only):
            continue
        free(device)
        try:
            variant = build()
            rows[name] = examine(variant, device, reference)
            runs[name] = variant.run
        except Exception as problem:
            if name == first:
                raise
            rows[name] = {"note": first_line(problem)}
        print(f"  {case.name}, {name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    again = f"{first} again"
    times = interleaved({**runs, again: runs[first]}, device, rounds)
    # What is compared: GPU time, or the process's own time on a CPU, which other programs disturb less.
    effective = {name: _effective(median(runs), device) for name, runs in times.items()}
    result = {"what": case.what, "rows": rows, "rounds": rounds, "flops": case.flops}
    result["noise"] = abs(effective[again] / effective[first] - 1)
    work, kinds = sum(case.flops.values()), {kind for kind, value in case.flops.items() if value}
    if kinds and kinds <= {row["what"].split()[0] for row in floor_rows if "tflops" in row}:
        result["floor_seconds"] = floors.floor_seconds(case.flops, floor_rows)
    for name in runs:
        row, base = rows[name], rows[first]
        row |= {"seconds": median(times[name]).wall, "cpu_seconds": median(times[name]).cpu, "runs": times[name]}
        row["faster"] = effective[first] / effective[name]
        row |= {f"{kind}_ratio": row[f"{kind}_gib"] / base[f"{kind}_gib"] for kind in ("peak", "total")}
        if work:
            row["tflops"] = work / effective[name] / 1e12
        if "floor_seconds" in result:
            row["of_floor"] = result["floor_seconds"] / effective[name]
        if base.get("error"):
            row["error_ratio"] = row["error"] / base["error"]
    return result


def _effective(time: Seconds, device: torch.device) -> float:
    return time.wall if device.type == "cuda" else time.cpu / torch.get_num_threads()


def examine(variant: Variant, device: torch.device, reference: torch.Tensor | None) -> dict[str, float]:
    """Error and peak memory of a variant, which is warm after that."""
    row = {}
    if reference is not None:
        row["error"] = error(variant.output()[: len(reference)], reference)
    added, reserved = peak(variant.run, device)
    weights = weight_bytes(*variant.modules, device=device)
    row |= {"peak_gib": added / 2**30, "total_gib": (added + weights) / 2**30, "reserved_gib": reserved / 2**30}
    return row


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
