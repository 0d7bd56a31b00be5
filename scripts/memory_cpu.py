"""The memory that a process needs on a CPU under each plan: `python scripts/memory_cpu.py [a model's folder]`.

Without a folder a random model is written first, 0.6 GB in float16, which runs in float32 here. Each plan makes a short
clip in a process of its own, which says the most resident memory it has had (GiB, Linux): with the libraries imported,
with the model opened, and in the end.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from videogen.models.text import TextEncoder, tiny_t5
from videogen.runtime.memory import PLANS
from videogen.testing import TINY_DIT, randomize, tiny_pipeline

RUN = """
import re, sys, videogen, videogen.pipeline, transformers.models.t5.modeling_t5, av
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 2**20
before, (folder, plan, out) = peak(), sys.argv[1:]
pipeline = videogen.load(folder, device="cpu", dtype="float32", memory=plan)
opened = peak()
pipeline.generate("a red circle", num_inference_steps=2, out=out)
print(f"| {plan} | {before:.2f} | {opened:.2f} | {peak():.2f} |", flush=True)
"""


def random_model(folder: Path) -> Path:
    """A text encoder of 0.17 GB and a DiT of 0.45 GB in 12 blocks."""
    config = replace(TINY_DIT, num_layers=12, num_attention_heads=16, attention_head_dim=64, time_embed_dim=512)
    pipeline = tiny_pipeline(dit=replace(config, text_embed_dim=768))
    tokenizer = pipeline.tokenizer
    t5 = tiny_t5(len(tokenizer), d_model=768, num_layers=12, num_heads=12, d_ff=2048)
    pipeline.text_encoder = TextEncoder(t5, tokenizer, config.max_text_seq_length)
    for network in (randomize(pipeline.text_encoder), pipeline.dit, pipeline.vae):
        network.half()
    return pipeline.save(folder)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else random_model(Path(scratch) / "model")
        print("| plan | libraries | opened | clip made |\n|---|---|---|---|", flush=True)
        for plan in PLANS:
            subprocess.run([sys.executable, "-c", RUN, str(folder), plan, f"{scratch}/{plan}.mp4"], check=True)


if __name__ == "__main__":
    main()
