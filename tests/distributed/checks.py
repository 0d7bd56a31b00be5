"""What several processes must agree on with one: run by `processes.py`, once per process.

Each check computes the whole in this process, then its part of it together with the others, and compares.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import videogen
from videogen.cli import main as videogen_main
from videogen.config import DiTConfig
from videogen.diffusion.denoiser import guided
from videogen.distributed.guidance import split_guidance, unsplit_guidance
from videogen.distributed.mesh import make_mesh, start
from videogen.distributed.parallel import parallel, single
from videogen.distributed.sequence import shard_sequence, unshard_sequence
from videogen.distributed.vae import split_vae, unsplit_vae
from videogen.errors import InvalidRequest
from videogen.models.attention import sdpa
from videogen.models.dit import DiT
from videogen.models.vae import VAE
from videogen.runtime.memory import PLANS
from videogen.testing import TINY_VAE, randomize
from videogen.types import Conditioning

DEVICE = os.environ.get("CHECKS_DEVICE", "cpu")
SMALL = {
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "time_embed_dim": 24,
    "text_embed_dim": 20,
    "max_text_seq_length": 6,
    "sample_height": 10,
    "sample_width": 6,
    "sample_frames": 9,
}
ROTARY = {"use_rotary_positional_embeddings": True}
LEARNED = {**ROTARY, "use_learned_positional_embeddings": True}
VARIANTS = {
    "2B": DiTConfig(**SMALL),
    "5B": DiTConfig(**SMALL, **ROTARY),
    "5B-I2V": DiTConfig(**SMALL, **LEARNED, in_channels=32),
    "1.5-I2V": DiTConfig(**{**SMALL, **ROTARY}, patch_size_t=2, patch_bias=False, in_channels=32, ofs_embed_dim=24),
}
CHECKS: dict[int, list[Callable[[], None]]] = {2: [], 4: [], 3: []}


def on(*counts: int):
    """This check is for so many processes."""

    def add(check: Callable[[], None]) -> Callable[[], None]:
        for count in counts:
            CHECKS[count].append(check)
        return check

    return add


def network(config: DiTConfig) -> DiT:
    dit = DiT(config)
    randomize(dit, seed=1)
    return dit.double().eval().to(DEVICE)


def batch(config: DiTConfig, size: int, text: int, frames: int = 3) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """What the network is called with. Latents of 10 x 6: 15 tokens per frame, which no even degree divides."""
    g = torch.Generator().manual_seed(text)
    extra = config.in_channels - config.out_channels
    frames += frames % (config.patch_size_t or 1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(size, *shape, generator=g, dtype=torch.float64).to(DEVICE)

    cond = Conditioning(
        text=normal(text, config.text_embed_dim),
        channels=normal(frames, extra, 10, 6) if extra else None,
        vectors={"ofs": torch.full((1,), 2.0, dtype=torch.float64, device=DEVICE)} if config.ofs_embed_dim else {},
    )
    return normal(frames, config.out_channels, 10, 6), torch.tensor([999, 20, 500, 1][:size], device=DEVICE), cond


def assert_close(ours: torch.Tensor, whole: torch.Tensor, tolerance: float = 1e-12) -> None:
    error = float((ours - whole).abs().max() / whole.abs().max())
    assert error <= tolerance, f"{error:.1e}"


def assert_same_everywhere(x: torch.Tensor) -> None:
    """Every process has the same bits."""
    first = x.clone()
    dist.broadcast(first, src=0)
    assert torch.equal(first, x)


@on(2, 4)
def a_stream_in_parts_equals_the_whole() -> None:
    """Every variant; text shorter and longer than a part, so that parts are text, video or both; odd lengths."""
    for name, config in VARIANTS.items():
        dit = network(config)
        for text in (6,) if name == "5B-I2V" else (2, 6, 70):
            given = batch(config, 1 + text % 3, text)
            assert (text + 45) % dist.get_world_size() or name == "1.5-I2V"
            whole = dit(*given)
            shard_sequence(dit, world())
            ours = dit(*given)
            assert ours.dtype == torch.float64
            assert_close(ours, whole)
            unshard_sequence(dit)
            assert torch.equal(dit(*given), whole)


@on(2)
def sharding_changes_no_weight_and_is_taken_out_whole() -> None:
    dit = network(VARIANTS["5B"])
    before = {name: value.clone() for name, value in dit.state_dict().items()}
    loop = dit.run_blocks
    shard_sequence(dit, world())
    kernels = [block.attention.kernel for block in dit.blocks]
    assert sdpa not in kernels
    assert dit.state_dict().keys() == before.keys()
    unshard_sequence(dit)
    assert "run_blocks" not in vars(dit)
    assert dit.run_blocks == loop
    assert all(block.attention.kernel is sdpa for block in dit.blocks)
    assert all(torch.equal(value, before[name]) for name, value in dit.state_dict().items())

    def mine(tokens):
        return DiT.run_blocks(dit, tokens)

    dit.run_blocks = mine  # somebody else's loop comes back, too
    unshard_sequence(shard_sequence(dit, world()))
    assert dit.run_blocks is mine


@on(2)
def each_process_computes_only_its_part() -> None:
    dit, seen = network(VARIANTS["5B"]), []

    def kernel(q, k, v):
        seen.append(tuple(q.shape))
        return sdpa(q, k, v)

    for block in dit.blocks:
        block.attention.kernel = kernel
        block.mlp.register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape)))
    given = batch(VARIANTS["5B"], 1, 6)  # 6 + 45 tokens: 26 and 25
    shard_sequence(dit, world())(*given)
    assert seen == [(1, 2, 51, 16), (1, 26 - dist.get_rank(), 64)] * 2


@on(2)
def what_is_sent_is_what_the_page_counts() -> None:
    """Per block a quarter of each to the other: q, k, v of own tokens, and the result of theirs (docs/many_gpus.md)."""
    dit, given, sent = network(VARIANTS["5B"]), batch(VARIANTS["5B"], 1, 6), []
    exchange, own, other = dist.all_to_all_single, 26 - dist.get_rank(), 25 + dist.get_rank()

    def counting(received, send, received_sizes, send_sizes, **options):
        sent.append(send.numel() * send_sizes[1 - dist.get_rank()] // sum(send_sizes))
        return exchange(received, send, received_sizes, send_sizes, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counting)
        shard_sequence(dit, world())(*given)
    width = VARIANTS["5B"].width
    assert sent == [3 * own * width // 2, other * width // 2] * VARIANTS["5B"].num_layers


@on(2)
def with_gradients_everyone_computes_the_whole() -> None:
    dit = network(VARIANTS["2B"])
    given = batch(VARIANTS["2B"], 2, 6)
    with torch.enable_grad():
        whole = torch.autograd.grad(dit(*given).square().sum(), list(dit.parameters()))
        split_guidance(shard_sequence(dit, world()), make_mesh(4))
        ours = torch.autograd.grad(dit(*given).square().sum(), list(dit.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(ours, whole, strict=True))


@on(2)
def heads_that_do_not_divide_are_refused() -> None:
    dit = network(replace(VARIANTS["5B"], num_attention_heads=3))
    with pytest.raises(InvalidRequest, match="2 processes cannot share 3 attention heads") as error:
        shard_sequence(dit, world())
    assert "a degree among 1, 3" in str(error.value)
    assert "run_blocks" not in vars(dit)


@on(2)
def a_kernel_put_in_afterwards_is_refused() -> None:
    dit = shard_sequence(network(VARIANTS["5B"]), world())
    dit.blocks[1].attention.kernel = sdpa
    with pytest.raises(RuntimeError, match="after the sequence was sharded"):
        dit(*batch(VARIANTS["5B"], 1, 6))


@on(2)
def guidance_in_groups_equals_one_batch() -> None:
    """Guided steps of one clip and of two, one without guidance, and a scale that is a function of time."""
    mesh = make_mesh(4)
    for name in ("5B", "1.5-I2V"):
        config = VARIANTS[name]
        dit = network(config)
        for size in (1, 2):
            x, _, cond = batch(config, size, 6)
            uncond = replace(cond, text=torch.zeros_like(cond.text))
            for scale in (6.0, 1.0, lambda t: 1 + t / 1000):
                whole = guided(dit, cond, uncond, scale)(x, 500.0)
                ours = guided(split_guidance(dit, mesh), cond, uncond, scale)(x, 500.0)
                unsplit_guidance(dit)
                assert "forward" not in vars(dit)
                assert ours.dtype == torch.float32
                assert_close(ours, whole, 1e-6)
                assert_same_everywhere(ours)


@on(2)
def each_group_computes_only_its_rows() -> None:
    dit, seen = network(VARIANTS["5B"]), []
    dit.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    split_guidance(dit, make_mesh(4))
    for size in (1, 2, 4):
        dit(*batch(VARIANTS["5B"], size, 6))
    x, t, cond = batch(VARIANTS["5B"], 3, 6)
    dit(x, t, cond)
    assert seen == [1, 1, 2, 2 - dist.get_rank()]


@on(2)
def fast_rows_are_shared_like_plain_ones() -> None:
    """Parts of the stream are text, video or both, too; what the fast VAE keeps has other shapes."""
    from videogen.runtime.dit import fast_dit
    from videogen.runtime.vae import fast_vae

    dit = fast_dit(network(VARIANTS["5B"]), mlp_tokens=16)
    for text in (2, 70):
        given = batch(VARIANTS["5B"], 2, text)
        whole = dit(*given)
        assert_close(shard_sequence(dit, world())(*given), whole)
        unshard_sequence(dit)

    vae = fast_vae(autoencoder())
    pixels, latents = clip(vae, 49)
    encoded, decoded = vae.encode(pixels), vae.decode(latents)
    split_vae(vae, world(), "time")
    assert torch.equal(vae.decode(latents), decoded)
    assert torch.equal(vae.encode(pixels), encoded)
    ops = vae.decoder.ops
    unsplit_vae(vae)
    split_vae(vae, world(), "space")  # with plain rows
    assert_close(vae.decode(latents), decoded, 1e-10)
    assert vae.decoder.ops is ops


@on(3)
def one_compiled_block_serves_all() -> None:
    """The exchange is inside the graph, and neither steps nor blocks compile anew."""
    from torch._dynamo.utils import counters

    from videogen.runtime.compile import compile_blocks
    from videogen.runtime.dit import fast_dit

    config = replace(VARIANTS["5B"], num_attention_heads=3)
    dit, given = network(config), batch(config, 1, 8)  # 53 tokens
    whole = dit(*given)
    shard_sequence(compile_blocks(fast_dit(dit), backend="aot_eager"), world())
    for _ in range(2):
        assert_close(dit(*given), whole)
    assert counters["stats"]["unique_graphs"] == 1


@on(4)
def parallel_is_all_of_it_and_single_takes_it_out() -> None:
    """Guidance x sequence, and the VAE on all four."""
    dit, vae = network(VARIANTS["5B-I2V"]), autoencoder()
    x, _, cond = batch(VARIANTS["5B-I2V"], 1, 6)
    uncond = replace(cond, text=torch.zeros_like(cond.text))
    latents = clip(vae, 17, 64)[1]
    pipe = SimpleNamespace(dit=dit, vae=vae, stages=SimpleNamespace(plan=PLANS["low"]))

    def story() -> tuple[torch.Tensor, torch.Tensor]:
        return guided(pipe.dit, cond, uncond, 6.0)(x, 500.0), pipe.vae.decode(latents)

    whole = story()
    assert parallel(pipe) is pipe
    assert not pipe.stages.plan.guidance_in_two
    ours = story()
    assert_close(ours[0], whole[0], 1e-6)
    assert_close(ours[1], whole[1], 1e-10)
    for part in ours:
        assert_same_everywhere(part)
    assert single(pipe).stages.plan is PLANS["low"]
    assert all(torch.equal(a, b) for a, b in zip(story(), whole, strict=True))
    assert not {"forward", "run_blocks"} & vars(dit).keys()
    assert not {"_encode", "_decode"} & vars(vae).keys()


@on(2)
def the_command_line_makes_the_same_clip_and_one_process_speaks() -> None:
    """The bundled model by the command that torchrun starts, in float64."""
    words = "a small red circle moves right on a navy background"
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(out), redirect_stderr(err):
        path = Path(folder, "clip.mp4")
        flags = ["--seed", "7", "--steps", "2", "--dtype", "float64", "--crf", "0"]
        flags += ["--device", DEVICE, "--out", str(path)]
        assert videogen_main(["text-to-video", words, *flags]) == 0, err.getvalue()
        if os.environ["RANK"] == "0":
            whole = videogen.load("tiny", device=DEVICE, dtype="float64").generate(words, seed=7, num_inference_steps=2)
            whole.save(Path(folder, "one.mp4"), crf=0)
            assert path.read_bytes() == Path(folder, "one.mp4").read_bytes()
            assert out.getvalue().strip() == str(path)
            assert "denoise 2/2" in err.getvalue()
        else:
            assert list(Path(folder).iterdir()) == []
            assert out.getvalue() + err.getvalue() == ""


def autoencoder() -> VAE:
    vae = VAE(TINY_VAE)
    randomize(vae, seed=2)
    return vae.double().eval().to(DEVICE)


def clip(vae: VAE, frames: int, height: int = 40, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels, and latents of as many frames. Latents of 5 rows, which no even degree divides."""
    g = torch.Generator().manual_seed(frames)
    pixels = 2 * torch.rand(1, 3, frames, height, width, generator=g, dtype=torch.float64) - 1
    latents = torch.randn(1, *vae.latent_shape(frames, height, width), generator=g, dtype=torch.float64)
    return pixels.to(DEVICE), latents.to(DEVICE)


@on(2, 4)
def chunks_side_by_side_equal_one_after_another_to_the_bit() -> None:
    """One chunk, as many as processes, fewer, and so many that a process has several."""
    vae = autoencoder()
    for frames in (1, 17, 25, 49):
        pixels, latents = clip(vae, frames, 24)
        encoded, decoded = vae.encode(pixels), list(vae.decode_chunks(latents))
        split_vae(vae, world(), "time")
        ours = list(vae.decode_chunks(latents))
        assert [chunk.shape for chunk in ours] == [chunk.shape for chunk in decoded]
        assert torch.equal(torch.cat(ours, dim=2), torch.cat(decoded, dim=2))
        assert torch.equal(vae.encode(pixels), encoded)
        unsplit_vae(vae)


@on(2, 4)
def strips_equal_whole_pictures() -> None:
    vae = autoencoder()
    for frames, height in ((1, 40), (17, 64)):
        pixels, latents = clip(vae, frames, height)
        encoded, decoded = vae.encode(pixels), vae.decode(latents)
        split_vae(vae, world(), "space")
        assert_close(vae.decode(latents), decoded, 1e-10)
        assert_close(vae.encode(pixels), encoded, 1e-10)
        unsplit_vae(vae)
        assert torch.equal(vae.decode(latents), decoded)


@on(2)
def each_process_decodes_only_its_part() -> None:
    vae, seen = autoencoder(), []
    vae.decoder.conv_in.register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape[2:])))
    latents = clip(vae, 25)[1]  # 7 frames of 5 x 2: chunks of 3, 2 and 2
    rank = dist.get_rank()
    vae.decode(latents)
    split_vae(vae, world(), "time").decode(latents)
    unsplit_vae(vae)
    split_vae(vae, world(), "space").decode(latents)
    strip = [5, 4][rank]  # its 3 or 2 rows, and one on either side
    whole, times = [(3, 5, 2), (2, 5, 2), (2, 5, 2)], [[(3, 5, 2), (2, 5, 2)], [(2, 5, 2)]][rank]
    assert seen == whole + times + [(n, strip, 2) for n in (3, 2, 2)], seen


@on(2)
def a_vae_with_gradients_runs_alone_and_comes_out_whole() -> None:
    vae = autoencoder()
    latents = clip(vae, 17)[1]
    loops = vae._encode, vae._decode
    whole = vae.decode(latents)
    names = list(vae.state_dict())
    split_vae(vae, world(), "time")
    assert list(vae.state_dict()) == names
    with torch.enable_grad():
        gradient = torch.autograd.grad(vae.decode(latents).square().sum(), vae.decoder.conv_in.weight)[0]
    unsplit_vae(vae)
    assert (vae._encode, vae._decode) == loops
    assert not {"_encode", "_decode"} & vars(vae).keys()
    assert torch.equal(vae.decode(latents), whole)
    with torch.enable_grad():
        alone = torch.autograd.grad(vae.decode(latents).square().sum(), vae.decoder.conv_in.weight)[0]
    assert torch.equal(gradient, alone)


@on(2)
def tiles_and_slices_are_shared_one_after_another() -> None:
    vae = autoencoder()
    latents = torch.cat([clip(vae, 9, 32, 24)[1], clip(vae, 17, 32, 24)[1][:, :, :3]])
    for tiling, slicing in ((None, True), (vae.default_tiling, False)):
        vae.tiling, vae.slicing = tiling, slicing
        whole = vae.decode(latents)
        assert torch.equal(split_vae(vae, world(), "time").decode(latents), whole)
        unsplit_vae(vae)


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def main() -> None:
    count = int(os.environ["WORLD_SIZE"])
    checks = sorted(CHECKS[count], key=lambda check: ("command_line" in check.__name__, "fast_rows" in check.__name__))
    for check in checks:
        print("todo", check.__name__, flush=True)
    start(DEVICE)
    torch.backends.cudnn.deterministic = True
    torch.set_num_threads(1)
    for check in checks:
        with torch.no_grad():
            check()
        print("done", check.__name__, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
