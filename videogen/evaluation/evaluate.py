"""How well a generator does what prompts ask for, over many held-out scenes.

A generator is any callable `(prompts, scenes) -> clips`, one clip [F, H, W, 3] per prompt; this room knows no pipeline.
It gets the scenes beside the prompts so that it can render the frames it is given, or, for the ceiling, the truth.

    rows = {
        "model": evaluate(generate),
        "ceiling": evaluate(ceiling(reconstruct)),
        "floor": evaluate(floor()),
    }
    print(markdown(rows))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from videogen.data.world import caption, draw_scene, is_held_out_pair, render
from videogen.data.world.scene import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, Scene
from videogen.evaluation.metrics import psnr, ssim, wilson
from videogen.evaluation.score import ATTRIBUTES, Measurement, measure, score_measurement

Generate = Callable[[list[str], list[Scene]], Sequence[np.ndarray]]
Reconstruct = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]  # clips through a VAE and back


def held_out_prompts(n: int, seed: int = 0, *, checkered: float = 0.0, pairs: bool = False) -> list[tuple[Scene, str]]:
    """n scenes that training never shows, with their canonical captions; prompt i depends on (seed, i) only.

    pairs  scenes with a held-out colour and shape instead of a held-out triple: harder, reported apart
    """
    prompts = []
    for i in range(n):
        rng = np.random.default_rng((seed, i))
        scene = draw_scene(rng, held_out=None if pairs else True, checkered=checkered)
        while pairs and not is_held_out_pair(scene):
            scene = draw_scene(rng, held_out=None, checkered=checkered)
        prompts.append((scene, caption(scene)))
    return prompts


def evaluate(
    generate: Generate,
    *,
    n: int = 256,
    seed: int = 0,
    batch: int = 32,
    checkered: float = 0.0,
    pairs: bool = False,
    given: Sequence[int] = (),
    reconstruct: Reconstruct | None = None,
) -> dict:
    """Ask for n held-out scenes in batches and score every clip: see `score_table` for what comes back.

    given        frames that the generator was given (0: the first, -1: the last), to be compared with the truth
    reconstruct  the VAE, to compare them with its reconstruction of the given frame, too: what the model lost, without
                 what no model behind that VAE can keep
    """
    prompts = held_out_prompts(n, seed, checkered=checkered, pairs=pairs)
    results: list[dict] = []
    measured: list[Measurement] = []
    for start in range(0, n, batch):
        words = [words for _, words in prompts[start : start + batch]]
        scenes = [scene for scene, _ in prompts[start : start + batch]]
        clips = generate(words, scenes)
        rows = []
        for text, scene, clip in zip(words, scenes, clips, strict=True):
            measured.append(measure(clip))
            rows.append({"prompt": text, **score_measurement(measured[-1], scene)})
        for index in given:
            name = {0: "first", -1: "last"}.get(index, f"frame_{index}")
            images = [render(scene, *clip.shape[:3])[index] for scene, clip in zip(scenes, clips, strict=True)]
            # alone, as videos of one frame: the way the model is given them
            kept = reconstruct([image[None] for image in images]) if reconstruct else None
            for i, (row, clip, image) in enumerate(zip(rows, clips, images, strict=True)):
                row |= {f"{name}_psnr": psnr(clip[index], image), f"{name}_ssim": ssim(clip[index], image)}
                if kept is not None:
                    row |= {
                        f"vae_{name}_psnr": psnr(kept[i][0], image),
                        f"{name}_psnr_to_vae": psnr(clip[index], kept[i][0]),
                    }
        results += rows
    table = score_table(results)
    table["swap"] = swap_rate(measured, [scene for scene, _ in prompts])
    return table | {"clips": results}


def score_table(results: list[dict]) -> dict:
    """The summary of `score_clip` results: rates with 95 % intervals; means of PSNR and SSIM, medians of other figures.

    {"n": 256, "rates": {"colour": {"right": 251, "rate": .98, "low": .95, "high": .99}, ..}, "figures": {"jump": .2}}
    """
    n, first = len(results), results[0]
    rates, figures = {}, {}
    for name in first:
        if name in (*ATTRIBUTES, "all"):
            right = sum(bool(row[name]) for row in results)
            low, high = wilson(right, n)
            rates[name] = {"right": right, "rate": right / n, "low": low, "high": high}
        elif name != "prompt":
            # nothing moves where nothing was found: such clips have no residual and no jump
            known = [row[name] for row in results if row[name] is not None]
            average = np.mean if "psnr" in name or "ssim" in name else np.median
            figures[name] = float(average(known)) if known else None
    return {"n": n, "rates": rates, "figures": figures}


def markdown(rows: dict[str, dict]) -> str:
    """Tables of `evaluate` as one Markdown table: a line per table, rates with their intervals, then the figures."""
    names = [name for name in (*ATTRIBUTES, "all") if any(name in table["rates"] for table in rows.values())]
    figures = list(dict.fromkeys(name for table in rows.values() for name in table["figures"]))
    lines = [f"| | n | {' | '.join([*names, *figures])} |", "|---" * (2 + len(names) + len(figures)) + "|"]
    for label, table in rows.items():
        cells = []
        for name in names:
            cell = table["rates"].get(name)
            cells.append(f"{cell['rate']:.3f} [{cell['low']:.2f}, {cell['high']:.2f}]" if cell else "")
        for name in figures:
            value = table["figures"].get(name)
            cells.append("" if value is None else f"{value:.3g}")
        lines.append(f"| {label} | {table['n']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def swap_rate(measured: Sequence[Measurement], scenes: Sequence[Scene]) -> float:
    """How often another clip's prompt fits a clip better than its own does: 0 is right, 0.5 is blind to prompts.

    Clips pair up with their successors; what counts is the number of right attributes, ties count half.
    """

    def fits(seen: Measurement, scene: Scene) -> int:
        score = score_measurement(seen, scene)
        return sum(bool(score[name]) for name in ATTRIBUTES)

    wrong = 0.0
    for i, seen in enumerate(measured):
        own, other = fits(seen, scenes[i]), fits(seen, scenes[(i + 1) % len(scenes)])
        wrong += 1.0 if other > own else 0.5 if other == own else 0.0
    return wrong / len(measured)


def ceiling(reconstruct: Reconstruct, *, num_frames: int = 17, height: int = 64, width: int = 64) -> Generate:
    """The generator behind the ceiling row: the true clips through the VAE. `lambda clips: clips` tests the score."""
    return lambda prompts, scenes: reconstruct([render(scene, num_frames, height, width) for scene in scenes])


def floor(seed: int = 1, *, num_frames: int = 17, height: int = 64, width: int = 64) -> Generate:
    """The generator behind the floor row: a good clip of some other scene, whatever the prompt says."""
    rng = np.random.default_rng(seed)
    return lambda prompts, scenes: [render(draw_scene(rng, checkered=0.0), num_frames, height, width) for _ in prompts]


def reconstruction(reconstruct: Reconstruct, *, n: int = 64, seed: int = 0, num_frames: int = 17) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM of a VAE over n held-out clips."""
    clips = [render(scene, num_frames) for scene, _ in held_out_prompts(n, seed)]
    pairs = [(clip, reconstruct([clip])[0]) for clip in clips]
    return {
        "psnr": float(np.mean([psnr(a, b) for a, b in pairs])),
        "ssim": float(np.mean([ssim(a, b) for a, b in pairs])),
    }


def swap_attribute(scene: Scene, name: str, rng: np.random.Generator) -> Scene:
    """The scene with another value of one attribute, for a wrong caption.

    The gap between the training loss under the wrong and the right caption shows per attribute what a model has learnt,
    long before whole clips come out right. The geometry stays, so the result is to be named, not rendered.
    """
    if name == "background":
        return replace(scene, background=_another(BACKGROUNDS, scene.background, rng))
    (thing,) = scene.objects
    values = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "motion": MOTIONS}[name]
    changed = replace(thing, **{name: _another(values, getattr(thing, name), rng)})
    return replace(scene, objects=(changed,))


def _another(values, value: str, rng: np.random.Generator) -> str:
    others = [other for other in values if other != value]
    return others[int(rng.integers(len(others)))]
