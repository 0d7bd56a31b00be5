"""A run's state on disk: complete or absent, safetensors and JSON, resumed exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from videogen.data.files import sync
from videogen.errors import FileError


def save_state(
    folder: Path,
    step: int,
    samples: int,
    modules: dict[str, nn.Module],
    optimizers: list[Optimizer],
    run: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write `folder/step_00000200`: a temporary folder first, synced, then renamed. The newest `keep` states stay."""
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, module in modules.items():
        save_file(_module_tensors(module), temporary / f"{name}.safetensors")
    for index, optimizer in enumerate(optimizers):
        save_file(_optimizer_tensors(optimizer), temporary / f"optimizer_{index}.safetensors")
    (temporary / "run.json").write_text(json.dumps({"step": step, "samples": samples, **run}, indent=1))
    for path in [*temporary.iterdir(), temporary]:
        path.chmod(temporary.stat().st_mode & (0o666 if path.is_file() else 0o777))  # safetensors makes private files
        sync(path)
    if final.exists():  # a resumed run reaches a step it had already saved
        shutil.rmtree(final)
    temporary.rename(final)
    sync(folder)
    for old in saved_states(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def saved_states(folder: Path) -> list[Path]:
    """Complete states, oldest first."""
    return sorted(folder.glob("step_*"))


def load_state(
    state: Path, modules: dict[str, nn.Module], optimizers: list[Optimizer], run: dict[str, Any]
) -> tuple[int, int]:
    """Put a saved state back; the step to go on with and the samples seen. Refuses a run with other settings."""
    saved = json.loads((state / "run.json").read_text())
    step, samples = saved.pop("step"), saved.pop("samples", 0)
    run = json.loads(json.dumps(run))  # tuples become lists, as they are in the file
    if saved != run:
        changed = sorted(k for k in saved.keys() | run.keys() if saved.get(k) != run.get(k))
        raise FileError(
            f"{state.parent} was started with other settings: {', '.join(changed)} changed.",
            why="a resumed run must equal an uninterrupted one.",
            hint="give the run another folder, or restore the settings.",
        )
    for name, module in modules.items():
        _load_module(module, load_file(state / f"{name}.safetensors"))
    for index, optimizer in enumerate(optimizers):
        _load_optimizer(optimizer, load_file(state / f"optimizer_{index}.safetensors"))
    return step, samples


def _module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once: tied ones (T5's embedding) have two names in a state dict."""
    return {k: v.detach().contiguous() for k, v in [*module.named_parameters(), *module.named_buffers()]}


@torch.no_grad()
def _load_module(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = dict([*module.named_parameters(), *module.named_buffers()])
    if own.keys() != tensors.keys():
        raise FileError(f"the saved state lacks or adds tensors: {sorted(own.keys() ^ tensors.keys())[:3]}.")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def _optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(v) for i, values in state.items() for name, v in values.items()}


def _load_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
