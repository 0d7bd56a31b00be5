"""How much memory a distillation needs on each GPU, counted on the meta device: nothing is computed, no GPU is needed.

    python scripts/distill_memory.py configs/train/distill-2b.yaml [key=value ...]

Weights, gradients, optimiser and averages are the sizes of the tensors the trainer holds, in float32. Activations are
the most bytes alive in one step of each role, forward and backward, with every activation in bfloat16; autocast leaves
norms and the loss in float32, so the true figure lies up to twice as high.
"""

from __future__ import annotations

import sys
import weakref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from videogen.config import DistillTraining, DiTConfig, VAEConfig, load_training
from videogen.diffusion.schedule import Schedule
from videogen.models.dit import DiT
from videogen.training.distill_step import Process, Teacher, Told, critic_loss, matching_loss
from videogen.types import Conditioning

GIB = 2**30


class Alive(TorchDispatchMode):
    """The most bytes alive at once, of storages made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, tuple[int, weakref.ref]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outside = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in outside | self.known.keys():
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known[key] = size, weakref.ref(storage, lambda _: self.free(key))
        self.now += size
        self.peak = max(self.peak, self.now)

    def free(self, key: int) -> None:
        self.now -= self.known.pop(key)[0]


class Flash(torch.autograd.Function):
    """Attention that keeps what a fused kernel keeps: q, k, v and its output."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(v)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, *grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def network(config: DiTConfig, checkpointing: bool) -> DiT:
    dit = DiT(config).to(torch.bfloat16)
    dit.gradient_checkpointing = checkpointing
    for block in dit.blocks:
        block.get_submodule("attention").kernel = Flash.apply  # type: ignore[assignment]
    return dit


def activations(config: DistillTraining, model: DiTConfig, vae: VAEConfig) -> dict[str, float]:
    """GiB beyond the roles' own tensors, in a step of each role; the last input of the roll-out, the largest."""
    process = Process(Schedule.from_config({"rescale_betas_zero_snr": True}), "v_prediction")
    times = process.schedule.times(config.num_inference_steps)
    frames = (config.num_frames - 1) // int(vae.temporal_compression_ratio) + 1
    frames += -frames % (model.patch_size_t or 1)
    scale = vae.spatial_compression
    samples = config.micro_batch_size or config.batch_size  # of one process
    shape = (samples, frames, model.out_channels, config.height // scale, config.width // scale)
    with torch.device("meta"):
        student, critic, teacher = (network(model, config.gradient_checkpointing) for _ in range(3))
        noise = torch.empty(shape, dtype=torch.bfloat16)
        text = torch.empty(samples, model.max_text_seq_length, model.text_embed_dim, dtype=torch.bfloat16)
        t = torch.empty(samples, dtype=torch.float64)
    teacher.requires_grad_(False)
    told = Told(Conditioning(text=text), Conditioning(text=text))
    guided = Teacher(bfloat16(teacher), config.guidance_scale, process)
    step, draw, found = config.num_inference_steps - 1, torch.empty_like, {}
    roles = {"student": student, "critic": critic}
    for role in roles:
        for parameter in roles[role].parameters():
            parameter.grad = torch.empty_like(parameter)  # counted elsewhere
        alive = Alive()
        with alive:
            if role == "student":
                loss = matching_loss(
                    bfloat16(student), bfloat16(critic), guided, told, noise, t, step, draw, times=times
                )
            else:
                loss = critic_loss(
                    bfloat16(critic), bfloat16(student), told, noise, t, step, draw, times=times, process=process
                )
            loss.mean().backward()
        found[role] = alive.peak / GIB
        roles[role].zero_grad()
    return found


def bfloat16(dit: nn.Module):
    return lambda x, t, cond: dit(x.to(torch.bfloat16), t, cond)


def main() -> None:
    config = load_training(sys.argv[1], sys.argv[2:])
    assert isinstance(config, DistillTraining), "a file with task: distill"
    model, vae = sizes(config.teacher)
    with torch.device("meta"):
        weights = sum(t.numel() for t in DiT(model).parameters()) * 4 / GIB
    rows = {
        "weights of student, critic and teacher": 3 * weights,
        "gradients of the role that learns": weights,
        "the same once more, while processes average them": weights,
        "Adam, both roles": 4 * weights,
        "average of the student": weights,
    }
    for name, value in rows.items():
        print(f"{name:55s} {value:7.1f} GiB")
    peaks = activations(config, model, vae)
    for role, value in peaks.items():
        print(f"{'activations, a step of the ' + role:55s} {value:7.1f} GiB")
    # averaging begins when the activations are gone
    rest = sum(rows.values()) - weights
    print(f"{'most at once':55s} {max(rest + max(peaks.values()), rest + weights):7.1f} GiB")


def sizes(teacher: str) -> tuple[DiTConfig, VAEConfig]:
    """The teacher's, if its folder is here; else those of CogVideoX-2B, the defaults."""
    from videogen.errors import VideogenError
    from videogen.weights.card import read_card
    from videogen.weights.hub import find_model

    if teacher == "zai-org/CogVideoX-2b":
        return DiTConfig(), VAEConfig()
    try:
        card = read_card(find_model(teacher, offline=True, weights=False))
    except VideogenError as error:
        raise SystemExit(str(error)) from error
    return card.dit, card.vae


if __name__ == "__main__":
    main()
