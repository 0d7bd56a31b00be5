"""How much memory a clip needs under each plan, and which plan is best: by formulas over shapes alone, without torch.

A stage needs the weights that are there, the activations of its network at the widest place, what the network keeps
from step to step or chunk to chunk, and the workspace of kernels. The formulas follow the lifetimes of tensors in
`models` and `runtime`; tests hold them against the counted peaks of the networks themselves on the meta device, and
against measured ones. All sizes are bytes.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from videogen.config import DiTConfig, VAEConfig
from videogen.errors import VideogenError
from videogen.runtime.memory import PLANS, Plan

if TYPE_CHECKING:
    from videogen.request import Request
    from videogen.weights.card import Card

Number = int | float
GIB = 2**30
ITEM = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
SMALL = 1024  # the width of a DiT below which, on a CPU, the call of a fused operation costs more than it saves
STRIP = {"cpu": 2**24, "cuda": 2**26}  # the buffer of a strip of the VAE's pictures (`runtime.vae.BUFFER`)
PIECE = {"cpu": 512, "cuda": 4096}  # tokens that the MLP widens at a time (`runtime.dit`)
TIMES = 64  # times that cached modulation has room for, at least
LIBRARIES = {"cpu": 2**29, "cuda": 2**30}  # of the host: Python, torch and its libraries
KERNELS = {"cpu": 0, "cuda": 2**27}  # of the device: workspaces of cuBLAS and cuDNN
UNFOLDED = 20480  # channels x frames x rows up to which torch convolves on a CPU by a matrix of all neighbourhoods
WIDE, BLOCK = 128, 2**21  # channels from which a CPU convolves in fewer multiplications, and values of a block
RESERVE = 0.05  # of what a plan needs, for what an allocator loses between its blocks


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """The T5 encoder by its `text_encoder/config.json`; the default is that of all published models."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32

    @classmethod
    def of(cls, folder: Path) -> TextShape:
        path = folder / "text_encoder" / "config.json"
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if isinstance(values.get(name), int)})


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be counted. `known`: how many condition images the VAE encodes, one after the other; `video`: whether
    it encodes a clip. `files`: the dtype on disk. `window`: the frames that are denoised at once."""

    dit: DiTConfig
    vae: VAEConfig
    text: TextShape = field(default_factory=TextShape)
    num_frames: int = 49
    height: int = 480
    width: int = 720
    window: int | None = None
    batch: int = 1
    guided: bool = True
    known: int = 0
    video: bool = False
    steps: int = 50
    step_cache: bool = False
    encodes_text: bool = True
    dtype: str = "bfloat16"
    files: str = "bfloat16"
    device: str = "cuda"

    @property
    def item(self) -> int:
        return ITEM[self.dtype]

    @property
    def rows(self) -> bool:
        """Whether the fast rows are in the networks, as `load` decides."""
        return self.device != "cpu" or self.dit.width >= SMALL

    @property
    def latent_frames(self) -> int:
        """Of all the clip, without padding."""
        return (self.num_frames - 1) // int(self.vae.temporal_compression_ratio) + 1

    @property
    def grid(self) -> tuple[int, int, int]:
        """(f, h, w) of what is denoised at once, padding included."""
        frames = (min(self.window or self.num_frames, self.num_frames) - 1) // int(self.vae.temporal_compression_ratio)
        frames += 1
        frames += -frames % (self.dit.patch_size_t or 1)
        return frames, self.height // self.vae.spatial_compression, self.width // self.vae.spatial_compression

    @property
    def tokens(self) -> int:
        """Of the picture; those of the text come on top."""
        f, h, w = self.grid
        return f // (self.dit.patch_size_t or 1) * (h // self.dit.patch_size) * (w // self.dit.patch_size)


def native_job(card: Card, *, dtype: str, device: str) -> Job:
    """A guided clip of the model's own size and length, from an image if it takes one."""
    return Job(
        dit=card.dit,
        vae=card.vae,
        text=TextShape.of(card.folder),
        num_frames=card.num_frames,
        height=card.height,
        width=card.width,
        window=card.native_frames,
        known=int("first_frame" in card.conditions),
        steps=card.num_inference_steps,
        dtype=dtype,
        files=card.trained_dtype if card.trained_dtype in ITEM else "bfloat16",
        device="cpu" if device == "cpu" else "cuda",
    )


def job_of(card: Card, request: Request, *, dtype: str, device: str) -> Job:
    """The job of a checked request."""
    frames, height, width = request.size
    return replace(
        native_job(card, dtype=dtype, device=device),
        num_frames=frames,
        height=height,
        width=width,
        batch=request.batch_size,
        guided=(request.guidance_scale or 0) > 1,
        known=len(request.images),
        video=request.video is not None or request.control_video is not None,
        steps=request.num_inference_steps or 50,
        step_cache=bool(request.step_cache),
        encodes_text=request.prompt_embeds is None,
    )


@dataclass(frozen=True)
class Need:
    """Bytes of one stage on the device."""

    weights: int
    activations: int
    kept: int  # from step to step, or from chunk to chunk
    workspace: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.kept + self.workspace


@dataclass(frozen=True)
class Estimate:
    """What one plan needs: `stages` of the device by name, and bytes of the host that it cannot give back."""

    plan: Plan
    stages: dict[str, Need]
    host: int

    @property
    def device(self) -> int:
        return max(need.total for need in self.stages.values())

    @property
    def widest(self) -> str:
        """The stage that decides."""
        return max(self.stages, key=lambda name: self.stages[name].total)


def estimates(job: Job) -> list[Estimate]:
    """Of all plans, the fastest first."""
    return [estimate(job, plan) for plan in PLANS.values()]


def estimate(job: Job, plan: Plan) -> Estimate:
    """What a clip needs under a plan.

    On a CPU, device and host are one; weights count in full there, also where they are only mapped from a file that has
    their dtype already.
    """
    text, dit, vae = text_weights(job), dit_weights(job), vae_weights(job)
    present = {"text": text.there(plan), "denoise": dit.there(plan), "encode": vae.total, "decode": vae.total}
    if not plan.stages_in_turn:
        everything = text.total + dit.total + vae.total + dit.parked
        present = dict.fromkeys(present, everything)
        if job.device != "cpu":  # from the first step on, the weights of modulation wait on the host
            present |= {"denoise": everything - dit.parked, "decode": everything - dit.parked}
    # T5's second layer is float32 from the moment it is opened where its file is float16.
    opened = 4 * job.text.num_layers * job.text.d_ff * job.text.d_model
    opened = opened if plan.stages_in_turn and job.files == "float16" else 0
    if job.device == "cpu":
        present = {name: there + opened * (name != "text" or plan.stream_blocks) for name, there in present.items()}
    latents, tables = latent_bytes(job), table_bytes(job)
    words = (1 + job.guided) * job.batch * job.dit.max_text_seq_length * job.dit.text_embed_dim * job.item
    held = latents + words
    stages = {}
    if job.encodes_text:
        stages["text"] = Need(present["text"], text_activations(job), words, KERNELS[job.device])
    if job.known or job.video:
        taken = (3 * job.num_frames * job.height * job.width if job.video else 3 * job.height * job.width) * job.item
        frames = job.num_frames if job.video else 1
        need = vae_need(job, plan, frames, encode=True)
        stages["encode"] = Need(present["encode"], need.activations + taken, need.kept + held, need.workspace)
    stages["denoise"] = Need(present["denoise"], dit_activations(job, plan), tables + held, KERNELS[job.device])
    need = vae_need(job, plan, job.latent_frames, encode=False)
    stages["decode"] = Need(present["decode"], need.activations, need.kept + tables + latents, need.workspace)
    found = Estimate(plan, stages, 0)
    return replace(found, host=_host(job, plan, text, dit, found) + (opened if job.device != "cpu" else 0))


def _host(job: Job, plan: Plan, text: Weights, dit: Weights, found: Estimate) -> int:
    """What the host must have: on a CPU all; else weights that wait on it and can't be read anew, and frames."""
    frames = 3 * job.num_frames * job.height * job.width  # bytes of the clip, where it is not written as it is decoded
    base = LIBRARIES[job.device] + frames
    if job.device == "cpu":
        return base + found.device
    in_files = ITEM[job.files] / job.item
    waiting = dit.parked * (in_files if plan.stages_in_turn else 1)
    if plan.stream_blocks:
        waiting += (text.blocks * text.block + dit.blocks * dit.block) * in_files
    if plan.caches_on_host:
        waiting += vae_need(job, replace(plan, caches_on_host=False), job.latent_frames, encode=False).kept
    return int(base + waiting)


def choose(found: Iterable[Estimate], *, device: int | None, host: int | None = None) -> Estimate | None:
    """The first, and so the fastest, that fits into so many free bytes; None if none does. None is: any number."""
    for one in found:
        if fits(one.device, device) and fits(one.host, host):
            return one
    return None


def fits(need: int, free: int | None) -> bool:
    return free is None or need * (1 + RESERVE) <= free


# ---- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Bytes: of the blocks, which can be streamed, of the rest, and of what is parked on the host once it was used."""

    blocks: int
    block: int
    rest: int
    parked: int = 0

    @property
    def total(self) -> int:
        return self.blocks * self.block + self.rest

    def there(self, plan: Plan) -> int:
        """While the network is at work."""
        return (min(2, self.blocks) * self.block if plan.stream_blocks else self.blocks * self.block) + self.rest


def text_weights(job: Job) -> Weights:
    t, inner = job.text, job.text.num_heads * job.text.d_kv
    wide = 4 if job.dtype == "float16" else job.item  # T5's second layer overflows in float16
    block = (4 * t.d_model * inner + 2 * t.d_model * t.d_ff + 2 * t.d_model) * job.item + t.d_ff * t.d_model * wide
    rest = (t.vocab_size + 1) * t.d_model + t.relative_attention_num_buckets * t.num_heads
    return Weights(t.num_layers, block, rest * job.item)


def dit_weights(job: Job) -> Weights:
    c, d, e = job.dit, job.dit.width, job.dit.time_embed_dim
    affine = 2 * d * c.norm_elementwise_affine
    attention = 4 * d * d + (3 * c.attention_bias + 1) * d + 4 * c.attention_head_dim
    block = 2 * affine + attention + 8 * d * d + 5 * d
    volume = c.patch_size**2 * (c.patch_size_t or 1)
    rest = c.in_channels * volume * d + d * (c.patch_bias or c.patch_size_t is not None)
    rest += c.text_embed_dim * d + d + (d + 1) * e + (e + 1) * e + 2 * affine + (d + 1) * volume * c.out_channels
    rest += 2 * (c.ofs_embed_dim + 1) * c.ofs_embed_dim if c.ofs_embed_dim else 0
    if c.use_learned_positional_embeddings:
        frames = (c.sample_frames - 1) // c.temporal_compression_ratio + 1
        tokens = frames * (c.sample_height // c.patch_size) * (c.sample_width // c.patch_size)
        rest += (c.max_text_seq_length + tokens) * d
    parked = (12 * c.num_layers + 2) * d * (e + 1)
    return Weights(c.num_layers, block * job.item, rest * job.item, parked * job.item)


def vae_weights(job: Job) -> Weights:
    c, z = job.vae, job.vae.latent_channels
    widths, back = c.block_out_channels, c.block_out_channels[::-1]

    def conv(a: int, b: int, taps: int) -> int:
        return (a * taps + 1) * b

    def resnet(a: int, b: int, modulated: bool) -> int:
        norms = 2 * (a + b) + (2 * (z + 1) * (a + b) if modulated else 0)
        return norms + conv(a, b, 27) + conv(b, b, 27) + (conv(a, b, 1) if a != b else 0)

    def stages(widths: tuple[int, ...], layers: int, modulated: bool) -> int:
        total = 0
        for level, (a, b) in enumerate(pairwise((widths[0], *widths))):
            total += resnet(a, b, modulated) + (layers - 1) * resnet(b, b, modulated)
            total += conv(b, b, 9) if level < len(widths) - 1 else 0
        return total

    encoder = conv(c.in_channels, widths[0], 27) + stages(widths, c.layers_per_block, False)
    encoder += 2 * resnet(widths[-1], widths[-1], False) + 2 * widths[-1] + conv(widths[-1], 2 * z, 27)
    decoder = conv(z, back[0], 27) + 2 * resnet(back[0], back[0], True) + stages(back, c.layers_per_block + 1, True)
    decoder += (2 + 2 * (z + 1)) * back[-1] + conv(back[-1], c.out_channels, 27)
    return Weights(0, 0, (encoder + decoder) * job.item)


# ---- text and transformer -------------------------------------------------------------------------------------------


def text_activations(job: Job) -> int:
    """T5 at its gated MLP: four tensors of its inner width, four of the stream, and the table of relative positions."""
    t, length = job.text, job.dit.max_text_seq_length
    return (t.num_heads * length**2 + job.batch * length * 4 * (t.d_ff + t.d_model)) * job.item


def latent_bytes(job: Job) -> int:
    """The latents of samplers, in float32 at least: of now, of the step before, of both halves of guidance; what the
    network is told beside them."""
    f, h, w = job.grid
    one = job.batch * f * h * w
    channels = job.dit.in_channels - job.dit.out_channels
    noisy = job.dit.out_channels * max(4, job.item) * (4 + 2 * job.guided)
    return one * (noisy + (1 + job.guided) * channels * job.item)


def table_bytes(job: Job) -> int:
    """The rows of all adaptive norms by time."""
    return max(TIMES, job.steps) * (12 * job.dit.num_layers + 2) * job.dit.width * job.item


def dit_activations(job: Job, plan: Plan) -> int:
    """Of a step; or of what comes before the first one, the rows of modulation, one norm's weights at a time."""
    modulation = 0
    if job.device != "cpu" or plan.stages_in_turn:  # those weights are not where the rest is
        modulation = 6 * job.dit.width * (job.dit.time_embed_dim + 1 + job.steps) * job.item
    return max(step_activations(job, plan), modulation)


def step_activations(job: Job, plan: Plan) -> int:
    """A block at its widest: attention with the stream, q, k, v and its result, or the MLP of a piece of the stream
    beside the stream before and after attention. The plain rows keep eleven tensors of the stream's size.
    """
    samples = job.batch * (1 if plan.guidance_in_two or not job.guided else 2)
    d, tokens = job.dit.width, samples * (job.dit.max_text_seq_length + job.tokens)
    rotary = 2 * 4 * job.tokens * job.dit.attention_head_dim if job.dit.use_rotary_positional_embeddings else 0
    if job.rows:
        piece = PIECE[job.device]
        widest = max(5 * tokens, 8 * tokens if tokens <= piece else 3 * tokens + 4 * piece)
    else:
        widest = 11 * tokens
    foretold = 4 * tokens if job.step_cache else 0
    return (widest + foretold) * d * job.item + rotary


# ---- the VAE --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def vae_need(job: Job, plan: Plan, frames: int, *, encode: bool) -> Need:
    """Activations, frames kept from chunk to chunk and workspace where they are most together; without the weights.

    `frames` are pixel frames to encode, or latent frames to decode.
    """
    on_host = plan.caches_on_host and job.device != "cpu"
    sizes = _chunks(job.vae, frames, encode=encode)
    needs: list[Need] = []
    for place in {0, 1, len(sizes) - 1} & set(range(len(sizes))):  # all between the first and the last are alike
        walk = _Walk(job, on_host, plan.vae_strips, first=place == 0, last=place == len(sizes) - 1)
        needs += (walk.encode if encode else walk.decode)(sizes[place])
    return max(needs, key=lambda need: need.total)


def _chunks(vae: VAEConfig, frames: int, *, encode: bool) -> list[int]:
    """How many frames each chunk has: `models.vae.chunk_plan` and `decode_plan`."""
    batch = vae.frame_batch_size if encode else vae.latent_batch_size
    if not encode and vae.first_latent_alone:
        return [1] + [min(batch, frames - start) for start in range(1, frames, batch)]
    count = max(frames // batch, 1)
    return [frames - batch * (count - 1)] + [batch] * (count - 1)


class _Walk:
    """One chunk on its way through the VAE: at each convolution, what is alive. Counts values, and gives bytes.

    alive   the pictures that somebody holds: what came into the stage, and the stream where it lies elsewhere
    kept    frames that convolutions keep; a first chunk adds to them as it goes, a later one finds them all, and a last
            one leaves nothing of them
    """

    def __init__(self, job: Job, on_host: bool, strips: int | None, *, first: bool, last: bool) -> None:
        self.job, self.vae, self.on_host, self.strips = job, job.vae, on_host, strips
        self.first, self.last = first, last
        self.space = self.vae.spatial_compression
        self.size = job.height, job.width
        self.kept, self.needs = 0, []

    def at(self, alive: Number, workspace: Number = 0, *, now: Number = 0) -> None:
        """A moment. `now`: frames that the convolution of this moment keeps."""
        kept = now if self.on_host else self.kept
        self.needs.append(Need(0, *(int(n * self.job.item) for n in (alive, kept, workspace))))

    def decode(self, latents: int) -> list[Need]:
        widths, levels = self.vae.block_out_channels[::-1], len(self.vae.block_out_channels)
        self.height, self.width = self.size[0] // self.space, self.size[1] // self.space
        self.scaled = self.vae.latent_channels * self.job.latent_frames * self.height * self.width
        self.latents = latents * self.height * self.width
        if not self.first:
            self.kept = self._all_kept(latents)
        self.kept += 2 * self.vae.latent_channels * self.area * (self.first - self.last)
        frames, stored = latents, latents
        self.resnets([widths[0]] * 3, frames, stored, modulated=True)
        for level, (a, b) in enumerate(pairwise((widths[0], *widths))):
            alive = self.resnets([a, *[b] * (self.vae.layers_per_block + 1)], frames, stored, modulated=True)
            if level == levels - 1:
                self.conv(alive, b, self.vae.out_channels, frames, frames, new=True, modulated=True)
                break
            doubled = level < self.time_levels and frames > 1
            stored, frames = frames, 2 * frames - frames % 2 if doubled else frames
            if self.job.rows:  # each frame once, in four phases
                folded = 16 * b * b * (1 + 4 / self.job.item)
                self.at(alive + 4 * b * self.area * (stored + 1) + folded)
            else:
                stored = frames
                self.at(alive + 3 * 4 * b * self.area * frames)
            self.height, self.width = 2 * self.height, 2 * self.width
        return self.needs

    def encode(self, frames: int) -> list[Need]:
        widths, levels = self.vae.block_out_channels, len(self.vae.block_out_channels)
        self.height, self.width = self.size
        self.scaled = self.latents = 0
        if not self.first:
            self.kept = self._all_kept(frames, encode=True)
        self.kept += 2 * self.vae.in_channels * self.area * (self.first - self.last)
        self.at((self.vae.in_channels * (2 * frames + 2) + widths[0] * frames) * self.area)
        for level, (a, b) in enumerate(pairwise((widths[0], *widths))):
            alive = self.resnets([a, *[b] * self.vae.layers_per_block], frames, frames, modulated=False)
            if level == levels - 1:
                break
            halved = (frames + 1) // 2 if level < self.time_levels else frames
            if self.job.rows:
                self.at(alive + b * self.area * (halved / 4 + 4))
            else:
                self.at(alive + b * self.area * (3 * halved + halved / 4))
            frames, self.height, self.width = halved, self.height // 2, self.width // 2
        self.resnets([widths[-1]] * 3, frames, frames, modulated=False)
        return self.needs

    @property
    def area(self) -> int:
        return self.height * self.width

    @property
    def time_levels(self) -> int:
        return int(self.vae.temporal_compression_ratio).bit_length() - 1

    def resnets(self, widths: list[int], frames: int, stored: int, *, modulated: bool) -> Number:
        """Those of a stage, one from each width to the next; `stored` < `frames`: each frame stands for two, but an odd
        first one. Returns what is alive in the end."""
        came = widths[0] * stored * self.area  # held by the caller all along
        alive: Number = came
        for a, b in pairwise(widths):
            y = b * frames * self.area
            self.conv(alive, a, b, stored, frames, new=True, modulated=modulated)
            if not self.job.rows:
                beside = came + (0 if alive == came else a * stored * self.area)  # what came into this resnet
                around = b * frames * self.area if a != b else 0
                self.conv(beside + around + y, b, b, frames, frames, new=True, modulated=modulated)
                self.at(beside + around + 3 * y)  # the sum of both ways
                alive = came + y
            elif stored < frames:  # the way around is repeated into a picture of its own
                self.at(alive + 4 * y)
                self.conv(alive + 2 * y, b, b, frames, frames, new=False, modulated=modulated)
                alive += y
            elif b > a:
                self.conv(alive + 2 * y, b, b, frames, frames, new=False, modulated=modulated)
                alive += y
            else:  # written over what came in
                self.conv(alive + y, b, b, frames, frames, new=False, modulated=modulated)
            stored = frames
        return alive

    def conv(self, alive: Number, a: int, b: int, stored: int, frames: int, *, new: bool, modulated: bool) -> None:
        """Norm, SiLU and causal convolution from width a to b; `new`: into a new picture, else one that is alive."""
        now = (1 if self.job.rows and stored < frames else 2) * a * self.area
        alone = self.first and self.last and not self.job.rows  # what is kept is gone before the convolution begins
        if self.first and not alone:
            self.kept += now
        self._conv(alive + self.scaled, a, b, stored, frames, now, new=new, modulated=modulated)
        if self.last and not alone:
            self.kept -= now

    def _conv(
        self, alive: Number, a: int, b: int, stored: int, frames: int, now: int, *, new: bool, modulated: bool
    ) -> None:
        out = b * frames * self.area if new else 0
        if not self.job.rows:
            x = a * self.area
            twice = 0 if self.first or self.last else now  # what was kept lives until the convolution is done
            direct = self.job.device == "cpu" and a * (frames + 2) * self.height <= UNFOLDED
            columns = 27 * x * frames if direct else 0
            self.at(alive + max(3 * x * frames, x * (2 * frames + 2) + twice + out + columns), now=now)
            return
        tables = 2 * a * self.latents if modulated else 0
        seen = (now // self.height) + a * stored * self.width
        most = STRIP[self.job.device] / self.job.item
        rows = -(-self.height // (self.strips or max(1, math.ceil(self.height * seen / most))))
        strip = seen * (rows + 2)
        # Frames that stand for two are convolved in two halves, with two taps in time.
        taps, frames = (18, frames // 2) if stored < frames else (27, frames)
        workspace = self.workspace(a, b, strip, rows * frames * self.width, taps)
        self.at(alive + out + tables + strip, workspace + now * self.on_host, now=now)

    def workspace(self, a: int, b: int, strip: int, places: int, taps: int) -> int:
        """Of the convolution of a strip: its result; on a CPU also the strip in another layout, its neighbourhoods
        where torch unfolds them, or the matrices and blocks of one in fewer multiplications (`runtime.winograd`)."""
        result = b * places
        if self.job.device != "cpu":
            return result
        if self.job.dtype == "bfloat16":
            return 0
        if min(a, b) >= WIDE:
            return 64 * a * b + 2 * BLOCK
        if strip // self.width <= UNFOLDED:
            return taps * a * places + strip + result
        return max(2 * strip + result, strip + 2 * result)

    def _all_kept(self, frames: int, *, encode: bool = False) -> int:
        """What a first chunk leaves. Of how many frames it was does not matter, but for one alone."""
        before = _Walk(self.job, False, 1, first=True, last=False)
        (before.encode if encode else before.decode)(max(frames, 2))
        return before.kept


# ---- what there is, and what would fit ------------------------------------------------------------------------------


def free_host() -> int | None:
    """Bytes of memory that programs can have now, without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


def free_device(device: str) -> int | None:
    """Free bytes of a device such as "cuda:1", those that this process holds and does not use included; of a CPU None:
    there the host counts."""
    if device.startswith("cpu"):
        return None
    import torch

    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def choose_or_least(job: Job, *, device: int | None, host: int | None) -> Estimate:
    """The fastest plan that fits; beside a GPU, if the host is what is short, by the device alone; else the least."""
    found = estimates(job)
    by_device = None if device is None else choose(found, device=device)
    return choose(found, device=device, host=host) or by_device or found[-1]


def choose_for(jobs: Iterable[Job], *, device: int | None, host: int | None) -> tuple[Job, Estimate]:
    """`choose_or_least` for the job that needs most: under its plan all the others can be done as well."""
    order = list(PLANS)
    found = [(job, choose_or_least(job, device=device, host=host)) for job in dict.fromkeys(jobs)]
    return max(found, key=lambda pair: (order.index(pair[1].plan.name), pair[1].device, pair[1].host))


Valid = Callable[[int, int, int], bool]  # whether a model makes clips of (frames, height, width)


def valid_for(card: Card, request: Request) -> Valid:
    """Whether the model can make this request at another length and size."""

    def valid(num_frames: int, height: int, width: int) -> bool:
        other = replace(request, num_frames=num_frames, height=height, width=width, snap=False)
        try:
            with warnings.catch_warnings(action="ignore"):
                other.checked(card)
        except VideogenError:
            return False
        return True

    return valid


def smaller(job: Job, plan: Plan, *, stage: str, free: int | None, multiple: int, valid: Valid) -> dict[str, int]:
    """Up to three flags, each of which alone makes `stage` fit where it did not, and what the clip then needs.

    A lower plan, fewer frames, a smaller picture; where these cannot be had, another dtype or device.
    """

    def need(job: Job, plan: Plan = plan) -> int:
        return estimate(job, plan).stages[stage].total

    def device(job: Job, plan: Plan = plan) -> int:
        found = estimate(job, plan)
        return found.host if job.device == "cpu" else found.device

    now = need(job)
    room = min(0.9 * now, math.inf if free is None else free / (1 + RESERVE))
    flags: dict[str, int] = {}
    order = list(PLANS.values())
    lower = [one for one in (order[order.index(plan) + 1 :] if plan in order else order) if need(job, one) < now]
    if lower:
        one = next((one for one in lower if need(job, one) <= room), lower[-1])
        flags[f"--memory {one.name}"] = device(job, one)
    shorter = (replace(job, num_frames=n) for n in range((job.num_frames - 2) // 8 * 8 + 1, 8, -8))
    for other in shorter:
        if need(other) <= room and valid(other.num_frames, job.height, job.width):
            flags[f"--frames {other.num_frames}"] = device(other)
            break
    for percent in range(95, 15, -5):
        height, width = (n * percent // (100 * multiple) * multiple for n in (job.height, job.width))
        other = replace(job, height=height, width=width)
        if min(height, width) and need(other) <= room and valid(job.num_frames, height, width):
            flags[f"--size {width}x{height}"] = device(other)
            break
    if job.dtype in ("float32", "float64") and len(flags) < 3:
        flags["--dtype bfloat16"] = device(replace(job, dtype="bfloat16"))
    if job.device != "cpu" and len(flags) < 3:
        flags["--device cpu"] = device(replace(job, device="cpu", dtype="float32"), PLANS["low"])
    return flags


def gib(size: Number) -> str:
    """`9.6 GiB`, `47 MiB`."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 4 else f"{size / 2**20:.0f} MiB"
