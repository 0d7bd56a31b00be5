"""The rows of all adaptive norms, computed once per time: they depend on nothing else.

A step reads one row per norm instead of multiplying with weights that are 14 % (5B) to 21 % (2B) of the model; those
weights stay on the host. Samples at the same time, as the two halves of guidance, share the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MethodType

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from videogen.models.dit import AdaptiveNorm, DiT
from videogen.models.lora import factors
from videogen.types import Conditioning

Key = tuple[float, ...]  # the time, and the scalars that join it (`ofs`)


def cache_modulation(
    dit: DiT, times: Sequence[float] = (), vectors: Mapping[str, float] | None = None, *, capacity: int = 64
) -> DiT:
    """From now on `dit` looks its modulation up. The rows of `times` are computed now, others when they first come.

    `vectors` are the scalars the model is told beside the time ({"ofs": 2.0}); `capacity` is how many times have rows
    at once (5B in bfloat16: 3.1 MB each), after which the oldest go. The weights of the norms' linear maps move to the
    host and are marked `parked`. If they change in place, or are replaced, all rows are computed anew; a change behind
    autograd's back (`weight.data.add_`) is not seen.

    Nothing waits for the device if `t` is given to the model on the host. With gradients on, the rows are those of the
    weights, which are brought to the device each time.
    """
    plain_modulation(dit)
    modulation = Modulation(dit, capacity)
    dit.modulation = modulation  # type: ignore[assignment]
    dit.embed_time = modulation.embed_time
    for norm in modulation.norms:
        norm.rows = MethodType(_rows, norm)
        norm.linear.parked = True  # type: ignore[assignment]  # for what moves weights: not these
    if times:
        with torch.no_grad():
            expect(dit, times, {name: torch.tensor([value]) for name, value in (vectors or {}).items()})
    return dit


def expect(dit: DiT, times: Sequence[float], vectors: Mapping[str, Tensor]) -> None:
    """Compute the rows of all these times at once, before they come one by one. Does nothing without a cache.

    `vectors` are those of the Conditioning that comes with them, of one row each. Rows of other times are forgotten:
    the last bits of a row depend on how many are computed with it, and a clip on nothing that was made before it.
    """
    modulation = dit.__dict__.get("modulation")
    if modulation is None or torch.is_grad_enabled():
        return
    if len(times) > modulation.capacity:
        modulation.capacity, modulation.made_of = len(times), ()  # a larger table, begun anew
    weight = dit.time_embed.linear_1.weight
    t = torch.tensor(list(times), dtype=torch.float32)
    keys = modulation.keys(t, Conditioning(vectors=dict(vectors)))
    if keys != modulation.expected:
        modulation.places.clear()
        modulation.expected = keys
    modulation.embed_time(t, Conditioning(vectors=dict(vectors)), weight.device, weight.dtype)


def plain_modulation(dit: DiT) -> DiT:
    """Undoes `cache_modulation`; the weights go back to the device they came from."""
    modulation = dit.__dict__.pop("modulation", None)
    if modulation is not None:
        dit.__dict__.pop("embed_time", None)
        for norm in modulation.norms:
            for name in ("rows", "table"):
                norm.__dict__.pop(name, None)
            del norm.linear.parked
            if modulation.parked_from is not None:
                norm.linear.to(modulation.parked_from)
    return dit


class Modulation:
    """One table [capacity, rows · d] per norm, as `norm.table`, and which time has which row of all of them."""

    def __init__(self, dit: DiT, capacity: int) -> None:
        self.dit, self.capacity = dit, capacity
        self.norms = [module for module in dit.modules() if isinstance(module, AdaptiveNorm)]
        self.places: dict[Key, int] = {}  # oldest first
        self.expected: list[Key] = []
        self.made_of: tuple = ()
        self.parked_from: torch.device | None = None
        self.told: dict[str, tuple[Tensor, list[float]]] = {}

    def embed_time(self, t: Tensor, cond: Conditioning, device: torch.device, dtype: torch.dtype) -> Tensor:
        """In place of `DiT.embed_time`: the index of the row of each sample [b], or [1] where all have the same."""
        if torch.is_grad_enabled():
            return DiT.embed_time(self.dit, t, cond, device, dtype)
        made_of = (device, dtype, *self.weights())
        if made_of != self.made_of:
            self.begin(device, dtype)
            self.made_of = (device, dtype, *self.weights())
        keys = self.keys(t, cond)
        wanted = list(dict.fromkeys(keys))
        if len(wanted) > self.capacity:
            return DiT.embed_time(self.dit, t, cond, device, dtype)
        if missing := [key for key in wanted if key not in self.places]:
            self.add(missing, set(wanted), sorted(cond.vectors), device, dtype)
        if len(wanted) == 1:
            place = self.places[wanted[0]]
            return self.index[place : place + 1]
        return torch.tensor([self.places[key] for key in keys]).to(device, non_blocking=True)

    def begin(self, device: torch.device, dtype: torch.dtype) -> None:
        """Empty tables, and the weights on the host."""
        self.places.clear()
        with torch.inference_mode(False):  # tables outlive the mode they are first filled in
            self.index = torch.arange(self.capacity, device=device)
            for norm in self.norms:
                if norm.linear.weight.device.type not in ("cpu", "meta"):
                    self.parked_from = norm.linear.weight.device
                    norm.linear.to("cpu")
                norm.table = torch.empty(self.capacity, norm.linear.out_features, device=device, dtype=dtype)

    def add(self, keys: list[Key], wanted: set[Key], names: list[str], device: torch.device, dtype: torch.dtype):
        """Rows for new times, over those of the oldest if there is no room."""
        while len(self.places) + len(keys) > self.capacity:
            del self.places[next(key for key in self.places if key not in wanted)]
        free = sorted(set(range(self.capacity)) - set(self.places.values()))[: len(keys)]
        t, *scalars = torch.tensor(keys, dtype=torch.float64).unbind(1)
        time = DiT.embed_time(self.dit, t, Conditioning(vectors=dict(zip(names, scalars, strict=True))), device, dtype)
        place = torch.tensor(free).to(device, non_blocking=True)
        for norm in self.norms:
            norm.__dict__["table"].index_copy_(0, place, _compute(norm.linear, time))
        self.places |= dict(zip(keys, free, strict=True))

    def keys(self, t: Tensor, cond: Conditioning) -> list[Key]:
        columns = [t.float().tolist()]
        for name in sorted(cond.vectors):
            # Asked for again and again with the same tensor, which may lie on the device: read once.
            if name not in self.told or self.told[name][0] is not cond.vectors[name]:
                self.told[name] = cond.vectors[name], cond.vectors[name].tolist()
            values = self.told[name][1]
            columns.append(values * len(columns[0]) if len(values) == 1 else values)
        return list(zip(*columns, strict=True))

    def weights(self) -> Iterator[tuple]:
        """What tells that a weight is another, or was changed, or counts otherwise (that of a LoRA)."""
        for part in (self.dit.time_embed, self.dit.ofs_embed, *(norm.linear for norm in self.norms)):
            if part is not None:
                yield factors(part)
                for p in part.parameters():
                    yield p.data_ptr(), 0 if p.is_inference() else p._version


def _rows(norm: AdaptiveNorm, time: Tensor) -> Float[Tensor, "rows b d"]:
    """In place of `AdaptiveNorm.rows`."""
    rows = _compute(norm.linear, time) if time.is_floating_point() else F.embedding(time, norm.__dict__["table"])
    return rearrange(rows, "b (rows d) -> rows b d", rows=norm.row_count)


def _compute(linear: nn.Module, time: Float[Tensor, "b e"]) -> Float[Tensor, "b rows_d"]:
    """With weights that lie elsewhere, or in their file's dtype."""
    weights = {name: p.to(time.device, time.dtype, non_blocking=True) for name, p in linear.named_parameters()}
    return functional_call(linear, weights, (F.silu(time),))
