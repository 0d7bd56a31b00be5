"""A small training that is real in all but its data, and processes to run it in: forked, so they start at once."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from videogen.config import ClipTraining, ConditionsConfig, FitConfig, ParallelConfig, SafetyConfig
from videogen.distributed.training import parallelize
from videogen.errors import VideogenError
from videogen.testing import TINY_DIT, tiny_pipeline
from videogen.training.draws import draw_noise, draws
from videogen.training.ema import ema_copy
from videogen.training.examples import Example
from videogen.training.lesson import Lesson
from videogen.training.logs import read_log
from videogen.training.processes import Replicated, join_process_group
from videogen.training.step import Batches, losses_of
from videogen.training.trainer import fit

WORDS = (TINY_DIT.max_text_seq_length, TINY_DIT.text_embed_dim)


class Clips:
    """Latents of two shapes, and words, out of nothing; the one called `broken` is not finite."""

    def __init__(self, count: int = 20, broken: str = "") -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"clip {index}"

    def shape(self, index: int) -> tuple[int, int, int]:
        return (1 if index % 3 == 0 else 3), 4, 6

    def read(self, index, rng) -> Example:
        own = draws(0, 0, self.name(index), "content")
        f, h, w = self.shape(index)
        latents = draw_noise(own, (f, 4, h, w)) + 0.1 * draw_noise(rng, (f, 4, h, w))
        if self.name(index) == self.broken:
            latents = latents * float("nan")
        return Example(latents, latents * 0.5, draw_noise(own, WORDS), 8.0)


def settings(batch_size: int = 4, micro_batch_size: int = 0, safety: SafetyConfig | None = None, **fit) -> ClipTraining:
    usual = {"steps": 12, "learning_rate": 3e-3, "warmup_steps": 2, "save_every": 6, "log_every": 1, "bfloat16": False}
    return ClipTraining(
        fit=FitConfig(**{**usual, **fit}, safety=safety or SafetyConfig(timeout=30.0)),
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
    )


def train(
    folder: Path,
    config: ClipTraining,
    *,
    dropout: float = 0.0,
    broken: str = "",
    validate: Callable | None = None,
    at_step: Callable[[int], None] = lambda step: None,
    shard: int = 1,
) -> nn.Module:
    """The trained transformer itself (not its average); its weights spread over `shard` processes."""
    pipe = tiny_pipeline(dit=replace(TINY_DIT, dropout=dropout))
    dit = pipe.dit.float().train().requires_grad_(True)
    clips, averages = Clips(broken=broken), {"dit": ema_copy(dit)}
    parallel = Replicated(*join_process_group(config.fit.safety.timeout))
    if shard > 1:
        everything = {"dit": dit, "average": averages["dit"]}
        parallel = parallelize(everything, ParallelConfig(shard=shard), torch.device("cpu"))

    def embed(texts: list) -> torch.Tensor:
        return torch.stack([text if isinstance(text, torch.Tensor) else torch.zeros(WORDS) for text in texts])

    losses_at = losses_of(
        config,
        Batches(clips, config, dit.config),
        lambda done: clips,
        Lesson(pipe.card, embed, torch.device("cpu")),
        dit,
        parallel,
        conditions=ConditionsConfig(),
        timesteps="informative",
    )

    def watched(step: int):
        at_step(step)
        return losses_at(step)

    fit({"dit": dit}, watched, config.fit, folder, validate=validate, parallel=parallel, averages=averages)
    return dit


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder)]


def weights(dit: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in dit.parameters()])


class Processes:
    """Forks that each call `function(rank)`, as torchrun would start them; a rank's output is in `folder/RANK.txt`."""

    def __init__(self, count: int, function: Callable[[int], object], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self.children = folder, []
        for rank in range(count):
            child = os.fork()
            if child:
                self.children.append(child)
                continue
            place = {"RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port} if count > 1 else {}
            os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
            _become(function, rank, folder / f"{rank}.txt")

    def wait(self, limit: float = 100.0) -> list[int]:
        """Exit codes; of a killed process minus the signal's number. None runs on after this."""
        end, codes = time.monotonic() + limit, {}
        while len(codes) < len(self.children):
            for child in self.children:
                if child not in codes:
                    done, status = os.waitpid(child, os.WNOHANG)
                    if done:
                        codes[child] = os.waitstatus_to_exitcode(status)
                    elif time.monotonic() > end:
                        os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        return [codes[child] for child in self.children]

    def told(self, rank: int) -> str:
        return (self.folder / f"{rank}.txt").read_text()


def _become(function: Callable[[int], object], rank: int, output: Path) -> None:
    code = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.stderr = io.TextIOWrapper(io.FileIO(descriptor, "w"), write_through=True)
        function(rank)
        code = 0
    except VideogenError as error:
        print(error)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":  # under torchrun: a run whose second process is killed once, at a step
    folder, last = Path(sys.argv[1]), int(sys.argv[2])

    def dies(step: int) -> None:
        mark = folder / f"killed at {last}"
        if step == last and os.environ.get("RANK") == "1" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    trained = train(folder, settings(), at_step=dies)
    if os.environ.get("RANK", "0") == "0":
        (folder / "weights").write_bytes(weights(trained).numpy().tobytes())
