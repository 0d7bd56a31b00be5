"""Memory plans by name: what is resident, what comes in turn, what is cut into pieces.

All give the same clip, bit for bit where guidance is evaluated the same way, otherwise up to the order of sums. LoRAs
are merged under "fast" and else stand beside the weights, which rounds otherwise: `merge_lora` of `videogen.load`
decides it for any plan, and the recipe keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass

from videogen.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a pipeline uses its device.

    stages_in_turn   a network is on the device only while it works: text encoder, then DiT, then VAE
    stream_blocks    of text encoder and DiT only two blocks are there at once, the next one arriving while one works
    vae_strips       how many strips of a picture the VAE works on in turn, inside each layer; None: by their size
    caches_on_host   the frames that the VAE's convolutions keep from chunk to chunk wait on the host
    guidance_in_two  the halves of guidance are two calls of the DiT instead of one of twice the batch
    """

    name: str
    stages_in_turn: bool = True
    stream_blocks: bool = False
    vae_strips: int | None = None
    caches_on_host: bool = False
    guidance_in_two: bool = True


PLANS = {
    plan.name: plan
    for plan in (
        Plan(name="fast", stages_in_turn=False, guidance_in_two=False),  # everything stays on the device
        Plan(name="balanced"),  # one network at a time: the largest of them decides, at next to no cost in time
        Plan(name="low", stream_blocks=True),  # a few blocks at a time: the VAE's frames decide
        Plan(name="minimal", stream_blocks=True, caches_on_host=True),  # those too only where they are worked on
    )
}


# What the memory of a stage depends on.
MATTERS = {
    "text": ("stages_in_turn", "stream_blocks"),
    "encode": ("stages_in_turn", "vae_strips", "caches_on_host"),
    "denoise": ("stages_in_turn", "stream_blocks", "guidance_in_two"),
    "decode": ("stages_in_turn", "vae_strips", "caches_on_host"),
}


def next_plan(plan: Plan, stage: str) -> Plan | None:
    """The next plan under which this stage needs less than under `plan`; None if there is none.

    >>> [next_plan(PLANS["balanced"], stage).name for stage in ("denoise", "decode")]
    ['low', 'minimal']
    """
    order = list(PLANS.values())
    later = order[order.index(plan) + 1 :] if plan in order else order[-1:]
    differs = (other for other in later if any(getattr(other, x) != getattr(plan, x) for x in MATTERS[stage]))
    return next(differs, None)


def choose_plan(memory: str | Plan) -> Plan | None:
    """The plan of that name, or a plan of one's own. None for "auto": it is chosen by what there is."""
    if isinstance(memory, Plan):
        return memory
    if memory == "auto":
        return None
    name = memory
    if name not in PLANS:
        raise InvalidRequest(
            f"there is no memory plan {memory!r}.",
            why=f"there are auto, {', '.join(PLANS)}, from all in memory to as little as possible.",
            hint="low, where a GPU is too small.",
            param="memory",
        )
    return PLANS[name]
