"""Low-rank updates of linear maps (LoRA, arXiv:2106.09685 Eq. 3): y = W x + Σ s · B A x, beside the weight or merged.

A linear map that gets an update changes its class, in place, and nothing else: object, weight, hooks and names stay, so
what was attached to it before or will be afterwards does not notice. `merge` writes W + Σ s · B A into the weight and
gives the class back: from then on the map is as fast as it was. `unmerge` restores the weight bit for bit.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from videogen.errors import InvalidRequest

TARGETS = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out")  # what CogVideoX LoRAs train
ALL = ("",)  # every linear map


@dataclass(frozen=True)
class Update:
    """The update of one linear map, as files have it: W' = W + alpha / rank · B A."""

    A: Float[Tensor, "r d_in"]
    B: Float[Tensor, "d_out r"]
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.A)


class Adapter(nn.Module):
    """One update as a module. `scale` may be changed at any time; at 0 the map is the plain one, bit for bit."""

    def __init__(self, update: Update, *, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(update.A), nn.Parameter(update.B)
        self.alpha, self.scale = float(update.alpha), float(scale)
        self.dropout = nn.Dropout(dropout)

    @property
    def factor(self) -> float:
        """s of the equation: scale · alpha / rank."""
        return self.scale * self.alpha / len(self.A)

    def forward(self, x: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n d_out"]:
        return F.linear(F.linear(self.dropout(x).to(self.A.dtype), self.A) * self.factor, self.B)

    def extra_repr(self) -> str:
        return f"rank={len(self.A)}, alpha={self.alpha:g}, scale={self.scale:g}"


class LoRALinear(nn.Linear):
    """A linear map with adapters beside its weight. Not made but become: see `attach`."""

    adapters: nn.ModuleDict

    def forward(self, x: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n d_out"]:
        y = super().forward(x)
        for adapter in cast("Collection[Adapter]", self.adapters.values()):
            if adapter.factor:
                y = y + adapter(x).to(y.dtype)
        return y


@dataclass
class Merged:
    """What a merged map was: its weight, on the host, and the adapters that are in it now."""

    base: Tensor
    adapters: nn.ModuleDict


# ---- putting adapters on, and off -----------------------------------------------------------------------------------


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float | int | None = None,
    targets: Collection[str] = TARGETS,
    dropout: float = 0.0,
    name: str = "default",
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Fresh adapters for training, which change nothing yet: A Kaiming uniform, B zeros. Returns the maps' names.

    targets  ends of the names of linear maps, such as "to_q" or "mlp.up"; `ALL` is every linear map
    alpha    the update counts alpha / rank; default: the rank
    dtype    of A and B, default: the weight's. Gradients of a model in half precision want float32

    Nothing is frozen: that is `train_only_lora`. Raises InvalidRequest for a target that names no linear map, a rank
    below 1, or adapters of this name that are there already.
    """
    if rank < 1 or not 0 <= dropout < 1:
        raise InvalidRequest(
            f"a LoRA of rank {rank} with dropout {dropout}.",
            why="the rank is 1 or more, the dropout 0 or more and below 1.",
            hint="rank=16",
            param="rank",
        )
    maps = linear_maps(model)
    chosen = {}
    for target in targets:
        found = {path: m for path, m in maps.items() if not target or f".{path}".endswith(f".{target}")}
        if not found:
            endings = {path.rpartition(".")[2] for path in maps}
            near = difflib.get_close_matches(target, endings, n=1) or sorted(endings)
            raise InvalidRequest(
                f"no linear map's name ends with {target!r}.",
                why=f"names end with {', '.join(sorted(endings))}.",
                hint=f"targets=({near[0]!r},)" if near else "choose another model.",
                param="targets",
            )
        chosen |= found
    updates = {}
    for path, linear in chosen.items():
        A = torch.empty(rank, linear.in_features, dtype=torch.float32)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        B = torch.zeros(linear.out_features, rank)
        kind = dtype or linear.weight.dtype
        updates[path] = Update(A.to(kind), B.to(kind), float(rank if alpha is None else alpha))
    attach(model, updates, name=name, dropout=dropout)
    return list(updates)


def attach(
    model: nn.Module,
    updates: Mapping[str, Update],
    *,
    name: str = "default",
    scale: float | int = 1.0,
    dropout: float = 0.0,
) -> None:
    """Put updates beside the weights of linear maps, by the maps' names, as the adapters called `name`.

    They go to the device of the weight and keep their dtype. All or none: raises InvalidRequest for a map that is not
    there, a shape that does not fit, adapters of that name that are there already, merged ones, or 8-bit maps.
    """
    if is_merged(model):
        raise InvalidRequest(
            "a LoRA is merged into this model.", why="the next would come on top of it.", hint="unmerge(model) first."
        )
    if name in adapter_names(model) or not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise InvalidRequest(
            f"adapters cannot be called {name!r}.",
            why="there are such already, or it is no plain word.",
            hint=f"name={name + '_2'!r}" if name.isidentifier() else 'name="style"',
            param="name",
        )
    maps = linear_maps(model)
    _require_plain(model)
    check_shapes(updates, {path: (m.out_features, m.in_features) for path, m in maps.items()})
    for path, update in updates.items():
        linear = maps[path]
        if type(linear) is nn.Linear:
            linear.adapters = nn.ModuleDict()
            _become(linear, LoRALinear)
        assert isinstance(linear, LoRALinear), f"{path} is {type(linear).__name__}"
        where = linear.weight.device
        # Copies: the parameters are trained and travel, the update is the caller's.
        ours = Update(update.A.detach().to(where, copy=True), update.B.detach().to(where, copy=True), update.alpha)
        linear.adapters[name] = Adapter(ours, scale=scale, dropout=dropout).train(linear.training)


def check_shapes(updates: Mapping[str, Update], sizes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse updates for maps that are not among `sizes` (d_out, d_in), or of other shapes."""
    for path, update in updates.items():
        found, rank = (len(update.B), update.A.shape[-1]), (len(update.A), update.B.shape[-1])
        if path not in sizes or found != sizes[path] or rank[0] != rank[1]:
            raise InvalidRequest(
                f"there is no linear map {path} for this LoRA."
                if path not in sizes
                else f"the LoRA of {path} is A {list(update.A.shape)}, B {list(update.B.shape)}.",
                why="the model has none of that name."
                if path not in sizes
                else f"the map is {sizes[path][1]} to {sizes[path][0]}: A is [rank, in], B is [out, rank].",
                hint="use the model that the LoRA was made for.",
                param="lora",
            )


def detach(model: nn.Module, *names: str) -> None:
    """Take adapters off again, those of these names or all; maps without any are plain ones. Merged ones come out."""
    unmerge(model)
    for linear in _with_adapters(model):
        for name in [name for name in linear.adapters if not names or name in names]:
            del linear.adapters[name]
        if not linear.adapters:
            del linear.adapters
            _become(linear, nn.Linear)


# ---- at run time ----------------------------------------------------------------------------------------------------


def set_scales(model: nn.Module, scales: Mapping[str, float | int]) -> None:
    """How much the adapters of each name count, from the next call on (1 is as their file says, 0 is not at all).

    Where they are merged, the weights are made anew from the plain ones. Raises InvalidRequest for an unknown name.
    """
    names = adapter_names(model)
    for name, scale in scales.items():
        if name not in names or not math.isfinite(scale):
            raise InvalidRequest(
                f"there is no LoRA {name!r} to be scaled by {scale}.",
                why=f"there {'are ' + ', '.join(names) if names else 'is none'}; scales are finite numbers.",
                hint=f"set_scales(model, {{{(names or ['name'])[0]!r}: 0.5}})",
                param="lora_scale",
            )
    were_merged = is_merged(model)
    unmerge(model)
    for linear in _with_adapters(model):
        for name, adapter in cast("Mapping[str, Adapter]", linear.adapters).items():
            adapter.scale = float(scales.get(name, adapter.scale))
    if were_merged:
        merge(model)


@torch.inference_mode(mode=False)
@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Write every adapter into its map's weight, W + Σ s · B A, rounded once; the maps are plain ones again.

    The weights as they were stay on the host, for `unmerge`; a map whose updates all count 0 keeps its bits.
    """
    for linear in _with_adapters(model):
        weight, adapters = linear.weight, linear.adapters
        base = weight.detach().to("cpu", copy=True)
        updated = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for adapter in cast("Collection[Adapter]", adapters.values()):
            if adapter.factor:
                updated.addmm_(adapter.B.to(updated), adapter.A.to(updated), alpha=adapter.factor)
        weight.copy_(updated)  # in place: whoever holds the parameter, or a view of it, sees it
        del linear.adapters
        _become(linear, nn.Linear)
        linear.__dict__["merged"] = Merged(base, adapters)  # past nn.Module, for which these would be weights


@torch.inference_mode(mode=False)
@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """The opposite of `merge`: the weights of before, bit for bit, and adapters beside them. Twice is once.

    Raises InvalidRequest if 8-bit maps were made of the merged weights.
    """
    if is_merged(model):
        _require_plain(model)
    for linear in linear_maps(model).values():
        was: Merged | None = linear.__dict__.pop("merged", None)
        if was is not None:
            linear.weight.copy_(was.base)
            linear.adapters = was.adapters.to(linear.weight.device).train(linear.training)
            _become(linear, LoRALinear)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """For the time of a `with`, every map is a plain one with its adapters in the weight: for saving."""
    if is_merged(model) or not has_adapters(model):
        yield
        return
    merge(model)
    try:
        yield
    finally:
        unmerge(model)


# ---- what there is --------------------------------------------------------------------------------------------------


def linear_maps(model: nn.Module) -> dict[str, nn.Linear]:
    """Name -> every linear map of the model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def adapters(model: nn.Module, name: str = "default") -> dict[str, Adapter]:
    """Map -> its adapter of that name, in the order of the model, whether beside the weights or merged.

    `nn.ModuleList(adapters(model).values())` is a module of these parameters alone: what an optimiser, a moving average
    and a saved state of training take, and what a resumed run loads into.
    """
    return {path: found[name] for path, found in _all_adapters(model) if name in found}


def adapter_names(model: nn.Module) -> list[str]:
    """The names adapters were given, in the order they came."""
    return list(dict.fromkeys(name for _, found in _all_adapters(model) for name in found))


def is_merged(model: nn.Module) -> bool:
    return any("merged" in linear.__dict__ for linear in linear_maps(model).values())


def has_adapters(model: nn.Module) -> bool:
    """Whether updates stand beside weights; merged ones do not."""
    return any(True for _ in _with_adapters(model))


def updates_of(model: nn.Module, name: str = "default") -> dict[str, Update]:
    """Map -> its update of that name: for saving, without the scale of the moment. Shares memory with the model."""
    return {path: Update(a.A.detach(), a.B.detach(), a.alpha) for path, a in adapters(model, name).items()}


def factors(module: nn.Module) -> tuple[float, ...]:
    """How much each adapter inside `module` counts: with its parameters, all that its output depends on."""
    return tuple(m.factor for m in module.modules() if isinstance(m, Adapter))


# ---- training -------------------------------------------------------------------------------------------------------


def lora_parameters(model: nn.Module, *names: str) -> list[nn.Parameter]:
    """A and B of the adapters of these names, or of all."""
    return [p for name in names or adapter_names(model) for a in adapters(model, name).values() for p in (a.A, a.B)]


def train_only_lora(model: nn.Module, *names: str) -> list[nn.Parameter]:
    """From now on only these adapters (default: all) have gradients; returns their parameters, for the optimiser."""
    model.requires_grad_(False)
    chosen = lora_parameters(model, *names)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def lora_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """`MAP.A` and `MAP.B` for every map with an adapter of that name: all that training changes. Shares memory."""
    return {f"{path}.{k}": getattr(a, k).detach() for path, a in adapters(model, name).items() for k in ("A", "B")}


@torch.no_grad()
def load_lora_state(model: nn.Module, state: Mapping[str, Tensor], name: str = "default") -> None:
    """Put a `lora_state` back, exactly: raises InvalidRequest if names or shapes are not those of the adapters."""
    own = lora_state(model, name)
    wrong = [k for k in own.keys() | state.keys() if k not in own or k not in state or own[k].shape != state[k].shape]
    if wrong:
        raise InvalidRequest(
            f"the saved adapters are not those of {name!r}: {len(wrong)} of {len(own)} tensors differ.",
            why=f"for example {sorted(wrong)[0]}.",
            hint="add_lora with the rank and targets of the run that saved them.",
            param="state",
        )
    for key, tensor in own.items():
        tensor.copy_(state[key])


def _require_plain(model: nn.Module) -> None:
    """Refuse a model whose maps compute in another way, from what their weights were before (8 bits)."""
    if any("forward" in linear.__dict__ for linear in linear_maps(model).values()):
        raise InvalidRequest(
            "the linear maps of this model are quantised.",
            why="they were made of the weights as they are, and would not notice.",
            hint="load the model again with the LoRA, or without quantize.",
            param="quantize",
        )


def _become(linear: nn.Linear, kind: type[nn.Linear]) -> None:
    """Another class for the same object, as torch's own parametrisations do it."""
    linear.__class__ = kind


def _with_adapters(model: nn.Module) -> Iterator[LoRALinear]:
    yield from [linear for linear in linear_maps(model).values() if isinstance(linear, LoRALinear)]


def _all_adapters(model: nn.Module) -> Iterator[tuple[str, Mapping[str, Adapter]]]:
    for path, linear in linear_maps(model).items():
        inside: Merged | None = linear.__dict__.get("merged")
        found = inside.adapters if inside else linear.adapters if isinstance(linear, LoRALinear) else None
        if found is not None:
            yield path, cast("Mapping[str, Adapter]", found)
