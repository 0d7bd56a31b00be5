"""`videogen eval`: a model's clips of the procedural world under its score, with ceiling and floor.

A run that was stopped goes on where it was. The folder it writes holds `clips.jsonl` (a row for each clip, as it is
made), `samples.png` and `samples.txt` (the first eight, seeds 0 to 7), and at the end `score.json` and `score.md`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videogen.data.files import written
from videogen.data.video import Video
from videogen.data.world import Scene, render
from videogen.demo import contact_sheet
from videogen.errors import InvalidRequest
from videogen.evaluation import KINDS, ceiling, evaluate, floor, held_out_prompts, markdown, score_prompts, score_table
from videogen.pipeline import Pipeline, load
from videogen.progress import Event, Progress
from videogen.weights.card import read_card
from videogen.weights.hub import find_model

MODES: dict[str, tuple[int, ...]] = {
    "text": (),
    "first_frame": (0,),
    "last_frame": (-1,),
    "first_and_last_frame": (0, -1),
}
CEILING, FLOOR = "ceiling: the truth through the VAE", "floor: clips of other scenes"
SAMPLES = 8  # clips on the contact sheet

Make = Callable[[list[dict[str, Any]]], Iterable[list[np.ndarray]]]  # generate()'s keywords, per batch -> clips


@dataclass(frozen=True)
class Evaluation:
    """What is measured. Two evaluations that are equal make the same clips."""

    model: str
    mode: str = "text"
    scenes: str = "one"  # of KINDS
    split: str = "triples"  # of SPLITS: what training never showed
    n: int = 256
    seed: int = 0
    steps: int | None = None  # None: the model's own
    guidance: float | None = None
    ceiling: int = 64  # clips of the ceiling row

    @property
    def label(self) -> str:
        """Of its row: "first frame", "text, two"."""
        rest = [word for word, usual in ((self.scenes, "one"), (self.split, "triples")) if word != usual]
        return ", ".join([self.mode.replace("_", " "), *rest])


def run(what: Evaluation, out: Path, *, batch: int = 16, processes: int = 0) -> dict[str, dict]:
    """The rows of the table: the model, the ceiling, the floor. Finished parts of an earlier run are not done again.

    batch      clips that are denoised together
    processes  of one thread each, on a CPU (two threads of one process are slower); 0: one per core, 1 on a GPU
    """
    open_folder(what, out)
    if (out / "score.json").exists():
        return json.loads((out / "score.json").read_text())["rows"]
    prompts = held_out_prompts(what.n, what.seed, split=what.split, **KINDS[what.scenes])
    rows = [json.loads(line) for line in (out / "clips.jsonl").read_text().splitlines()]

    with workers(what.model, processes) as (pipeline, make, count):
        reconstruct = through_vae(pipeline)
        generate = keeping_samples(generator(pipeline, make, what, batch), [text for _, text in prompts], out)
        given, progress, started = MODES[what.mode], Progress(), time.monotonic()
        parts = score_prompts(
            generate,
            prompts,
            first=len(rows),
            seed=what.seed,
            batch=batch * count,
            given=given,
            reconstruct=reconstruct,
        )
        first = len(rows)
        with (out / "clips.jsonl").open("a") as file:
            for part in parts:
                rows += part
                print(*map(json.dumps, part), sep="\n", file=file, flush=True)
                eta = (time.monotonic() - started) / (len(rows) - first) * (what.n - len(rows))
                progress(Event("clips", len(rows), what.n, eta=eta))
        progress.close()

        size: Any = {
            "num_frames": pipeline.card.num_frames,
            "height": pipeline.card.height,
            "width": pipeline.card.width,
        }
        shares: Any = KINDS[what.scenes]
        which: Any = {"seed": what.seed, "split": what.split, **shares}
        table = {
            what.label: score_table(rows) | {"clips": rows},
            CEILING: evaluate(ceiling(reconstruct, **size), n=min(what.n, what.ceiling), **which),
            FLOOR: evaluate(floor(**size, **shares), n=what.n, **which),
        }
    seconds = round(time.monotonic() - started, 1)
    write(out / "score.md", markdown(table) + "\n")
    facts = {"evaluation": asdict(what), "seconds": seconds, "clips_in_these_seconds": what.n - first, "rows": table}
    write(out / "score.json", json.dumps(facts, indent=1))
    return table


def open_folder(what: Evaluation, out: Path) -> None:
    """Make the folder, or find the same evaluation in it; a line that was being written when a run stopped is cut."""
    note, facts = out / "evaluation.json", asdict(what) | {"weights": fingerprint(what.model)}
    if note.exists():
        if json.loads(note.read_text()) != facts:
            raise InvalidRequest(
                f"{out} holds another evaluation.", why=f"{note} says which.", hint="choose another --out.", param="out"
            )
    else:
        out.mkdir(parents=True, exist_ok=True)
        write(note, json.dumps(facts, indent=1))
    clips = out / "clips.jsonl"
    text = clips.read_text() if clips.exists() else ""
    write(clips, text[: text.rfind("\n") + 1])


def fingerprint(model: str) -> str:
    """What tells this model from one that is trained into the same folder later."""
    card = read_card(find_model(model))
    files = {str(path.relative_to(card.folder)): path.stat() for path in card.folder.rglob("*.safetensors")}
    facts = card.sha256 or {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def write(path: Path, text: str) -> None:
    """The whole file or none."""
    with written(path) as part:
        part.write_text(text)


def generator(pipeline: Any, make: Make, what: Evaluation, batch: int):
    """The model as the evaluation wants it: prompts, scenes and seeds in, clips out; scenes give the known frames."""
    card, given = pipeline.card, MODES[what.mode]
    chosen = {"num_inference_steps": what.steps, "guidance_scale": what.guidance}

    def generate(prompts: list[str], scenes: list[Scene], seeds: list[int]) -> list[np.ndarray]:
        truth = [render(scene, card.num_frames, card.height, card.width) for scene in scenes] if given else []
        jobs = []
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            job: dict[str, Any] = {"prompt": prompts[part], "seed": seeds[part]}
            for name, index in (("first_frame", 0), ("last_frame", -1)):
                if index in given:
                    job[name] = [clip[index] for clip in truth[part]]
            jobs.append(job | {name: value for name, value in chosen.items() if value is not None})
        return [frames for clips in make(jobs) for frames in clips]

    return generate


def keeping_samples(generate, words: Sequence[str], out: Path):
    """`generate`, that draws the very first clips on a contact sheet: uncurated, seeds 0 to 7."""

    def with_sheet(prompts: list[str], scenes: list[Scene], seeds: list[int]) -> list[np.ndarray]:
        clips = generate(prompts, scenes, seeds)
        if prompts[0] == words[0] and not (out / "samples.png").exists():
            contact_sheet([Video(clip, 8) for clip in clips[:SAMPLES]], out / "samples.png")
            write(out / "samples.txt", "\n".join(words[:SAMPLES]) + "\n")
        return clips

    return with_sheet


@contextmanager
def workers(model: str, processes: int = 0) -> Iterator[tuple[Pipeline, Make, int]]:
    """The model here (for its VAE and card), a `Make` that runs on all of the machine, and how many batches at once."""
    pipeline = load(model)
    count = processes or (1 if pipeline.device.type == "cuda" else os.cpu_count() or 1)
    if count == 1:
        yield pipeline, lambda jobs: [clips_of(pipeline, job) for job in jobs], 1
        return
    torch.set_num_threads(1)
    options: dict[str, Any] = {"mp_context": get_context("spawn"), "initializer": open_model, "initargs": (model,)}
    with ProcessPoolExecutor(count, **options) as pool:
        yield pipeline, lambda jobs: pool.map(in_worker, jobs), count


def open_model(model: str) -> None:
    """What a worker starts with: a pipeline of its own, and one thread."""
    global worker
    torch.set_num_threads(1)
    worker = load(model)


def in_worker(job: dict[str, Any]) -> list[np.ndarray]:
    return clips_of(worker, job)


def clips_of(pipeline: Pipeline, job: dict[str, Any]) -> list[np.ndarray]:
    return [video.frames for video in pipeline.generate(**job)]


def through_vae(pipeline: Pipeline):
    """Clips to latents and back, one by one."""

    @torch.no_grad()
    def reconstruct(clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        out = []
        for clip in clips:
            pixels = torch.from_numpy(np.asarray(clip, dtype=np.float32)).permute(3, 0, 1, 2)[None] * 2 - 1
            decoded = pipeline.vae.decode(pipeline.vae.encode(pixels.to(pipeline.device, pipeline.dtype)))
            out.append((decoded[0] / 2 + 0.5).clamp(0, 1).float().cpu().permute(1, 2, 3, 0).numpy())
        return out

    return reconstruct


def report(table: dict[str, dict], out: Path) -> None:
    print(markdown(table))
    print(f"{out}: score.md, score.json, samples.png, clips.jsonl", file=sys.stderr)
