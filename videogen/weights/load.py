"""safetensors files to modules and back, without a format's names: which files, do they fit, read, write.

Nothing but safetensors is opened: a pickle can run any program when it is read.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from videogen.data.files import sync
from videogen.errors import InvalidRequest, ModelNotFound, VideogenError
from videogen.weights.guard import read_json
from videogen.weights.header import Shape, read_header, read_shapes
from videogen.weights.hub import PICKLES, weight_names
from videogen.weights.table import Rules, listed, to_ours, to_theirs

log = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)


def build(
    make: Callable[[], M],
    files: list[Path],
    rules: Rules,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    names: Mapping[str, str] | None = None,
) -> M:
    """The module with the weights of `files`, in eval mode. Made on the meta device: no memory is filled twice.

    Names and shapes are compared before the first tensor is read. Tensors keep the file's dtype unless one is given.
    `names`: of a file that holds more than this module or has prefixes, the name that the rules know -> the file's.
    """
    to_ours(found_shapes(files, names), rules)  # a name outside the table is a better error than one outside this model
    try:
        with torch.device("meta"):
            module = make()
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # ours, of bad settings, pass
        if isinstance(error, VideogenError):
            raise
        raise ModelNotFound(
            f"the config.json of {files[0].parent} describes no network.",
            why=f"{error}".splitlines()[0] if str(error) else type(error).__name__,
            hint="fetch or copy it again.",
        ) from error
    expected = to_theirs(shapes_of(module), rules)
    state = read_tensors(files, expected, device=device, dtype=dtype, names=names)
    module.load_state_dict(to_ours(state, rules), strict=True, assign=True)
    unfilled = [name for name, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta]
    assert not unfilled, f"not part of the state dict, so still on the meta device: {unfilled}"
    return module.eval()


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}


# ---- which files ----------------------------------------------------------------------------------------------------


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of one component, those that `hub.weight_names` chooses: of shards, what their index names.

    Raises ModelNotFound if there are none, several variants and none of them plain, or shards that are not all there.
    """
    names, lacking = weight_names([path.name for path in folder.iterdir()], stem, where=folder)
    if not names or f"{stem}.safetensors.index.json" in lacking:
        raise _nothing_to_open(folder, stem)
    if not names[-1].startswith((f"{stem}.safetensors", f"{stem}-")):
        log.info("%s: using the only variant there is, %s", folder, names[0])
    return _shards(folder / names[0]) if names[0].endswith(".json") else [folder / names[0]]


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        if len(names) > 1000:
            raise TypeError("nothing has so many shards")
        outside = [name for name in names if not re.fullmatch(r"\w[\w.-]*\.safetensors", name, re.ASCII)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelNotFound(f"{index} is not an index of shards.", hint="fetch or copy the file again.") from error
    if outside:
        raise ModelNotFound(
            f"{index} points outside its folder.",
            why=f"shards are safetensors files beside their index, not {outside[0][:80]!r}.",
            hint="fetch the model from where it was published.",
        )
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ModelNotFound(
            f"{index.parent} lacks {len(missing)} of {len(names)} shards: {listed(missing)}.",
            why=f"{index.name} names them.",
            hint="the download or copy is incomplete: run it again.",
        )
    return [index.parent / name for name in names]


def _nothing_to_open(folder: Path, stem: str) -> ModelNotFound:
    names = [p.name for p in sorted(folder.iterdir())]
    if pickles := [n for n in names if n.endswith(PICKLES)]:
        return ModelNotFound(
            f"{folder} has its weights only as pickles: {listed(pickles)}.",
            why="a pickle can run any program when it is opened; only safetensors are read.",
            hint=f"videogen convert {folder} --out FOLDER   (reads it in a process of its own), or fetch safetensors.",
        )
    if shards := [n for n in names if n.startswith(stem) and n.endswith(".safetensors")]:
        return ModelNotFound(
            f"{folder} has shards but no {stem}.safetensors.index.json: {listed(shards)}.",
            why="the index says which shards there should be.",
            hint="fetch or copy the index file too.",
        )
    return ModelNotFound(
        f"{folder} has no {stem}.safetensors.",
        why=f"found: {listed(names) or 'nothing'}.",
        hint="fetch or copy the model again.",
    )


# ---- reading --------------------------------------------------------------------------------------------------------


def found_shapes(files: list[Path], names: Mapping[str, str] | None = None) -> dict[str, Shape]:
    """Name -> shape of all tensors, from the headers alone; with `names` of those it maps to names in the files."""
    shapes = read_shapes(files)
    return shapes if names is None else {known: shapes[name] for known, name in names.items()}


def read_tensors(
    files: list[Path],
    expected: Mapping[str, Shape],
    *,
    optional: Collection[str] = (),
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    names: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """The tensors of `files`, which must be exactly the expected ones. Integers stay. `names`: see `build`."""
    check_fit(found_shapes(files, names), expected, optional=optional, where=files[0] if names else files[0].parent)
    known = None if names is None else {name: known for known, name in names.items()}
    state: dict[str, Tensor] = {}
    for path in files:
        with _open(path, str(device)) as file:
            for name in file.keys():  # noqa: SIM118
                if known is not None and name not in known:
                    continue
                tensor = file.get_tensor(name)
                name = name if known is None else known[name]
                state[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
    return state


def tensor_of(path: Path, name: str) -> Tensor:
    with _open(path) as file:
        return file.get_tensor(name)


def check_fit(
    found: Mapping[str, Shape], expected: Mapping[str, Shape], *, optional: Collection[str] = (), where: Path
) -> None:
    wrong = [n for n in expected if n in found and found[n] != expected[n]]
    problems = {
        "missing": [n for n in expected if n not in found and n not in optional],
        "unknown": [n for n in found if n not in expected],
        "wrong shape": [f"{n} is {list(found[n])}, should be {list(expected[n])}" for n in wrong],
    }
    if any(problems.values()):
        raise ModelNotFound(
            f"the weights in {where} do not fit {'what it was taken for' if where.is_file() else 'its config.json'}.",
            why="; ".join(f"{kind} ({len(names)}): {listed(names)}" for kind, names in problems.items() if names) + ".",
            hint="both files must come from the same model: fetch or copy it again.",
        )


def _open(path: Path, device: str = "cpu"):
    read_header(path)
    try:
        return safe_open(path, framework="pt", device=device)
    except SafetensorError as error:
        raise ModelNotFound(
            f"{path} is not a readable safetensors file.",
            why=f"damaged or cut short ({error}).",
            hint="fetch or copy the file again.",
        ) from error


# ---- writing --------------------------------------------------------------------------------------------------------


def write_tensors(folder: Path, stem: str, state: Mapping[str, Tensor], *, max_shard_size: int | str) -> None:
    """`{stem}.safetensors`, or shards with an index. The caller renames the folder, so that a name is a whole file."""
    shards = _split(state, _bytes(max_shard_size))
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in state.values())},
            "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
        }
        write_json(folder / f"{stem}.safetensors.index.json", index)
    for name, shard in zip(names, shards, strict=True):
        tensors = {n: t.detach().cpu().contiguous() for n, t in shard.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})  # transformers refuses files without it
        os.chmod(folder / name, folder.stat().st_mode & 0o666)  # the writer makes private files; follow the umask
        sync(folder / name)


def write_json(path: Path, values: Mapping) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(path)


def _split(state: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """In order, each shard as full as the limit allows; a tensor larger than that has one of its own."""
    shards: list[dict[str, Tensor]] = [{}]
    room: float = limit
    for name, tensor in state.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def _bytes(size: int | str) -> int:
    """`"10GB"` -> 10_000_000_000, as the Hub counts."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(size).strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise InvalidRequest(f"{size!r} is no size.", hint='for example "10GB".', param="max_shard_size")
    return math.ceil(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))
