"""How well a generator does what prompts ask for, over many scenes that training never showed.

A generator is any callable `(prompts, scenes, seeds) -> clips`, one clip [F, H, W, 3] per prompt; this room knows no
pipeline. It gets the scenes beside the prompts so that it can render the frames it is given, or, for the ceiling, the
truth.

    rows = {
        "model": evaluate(generate),
        "ceiling": evaluate(ceiling(reconstruct)),
        "floor": evaluate(floor()),
    }
    print(markdown(rows))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from videogen.data.world import caption, draw_scene, is_held_out_pair, render
from videogen.data.world.scene import BACKGROUNDS, CAMERAS, COLOURS, MOTIONS, SHAPES, SIZES, STYLES, Scene
from videogen.evaluation.metrics import psnr, ssim, wilson
from videogen.evaluation.score import ATTRIBUTES, Measurement, count, measure, score_measurement

Generate = Callable[[list[str], list[Scene], list[int]], Sequence[np.ndarray]]
Reconstruct = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]  # clips through a VAE and back

# Kinds of scenes that are scored apart, as shares of `draw_scene`.
KINDS: dict[str, dict[str, float]] = {
    "one": {"checkered": 0.0},
    "checkered": {"checkered": 1.0},
    "two": {"checkered": 0.0, "two": 1.0},
    "camera": {"checkered": 1.0, "camera": 0.8},  # the fifth that rests is to be told from the others
    "style": {"checkered": 0.0, "style": 1.0},
}
SPLITS = ("triples", "pairs", "none")


def held_out_prompts(
    n: int, seed: int = 0, *, split: str = "triples", checkered: float = 0.0, **shares: float
) -> list[tuple[Scene, str]]:
    """n scenes with their canonical captions; prompt i depends on (seed, i) only.

    split   "triples": colour, shape and motion were never joined in training; "pairs": nor were colour and shape of an
            object, which is harder; "none": what training shows, too
    shares  of `draw_scene`, such as those of KINDS
    """
    prompts = []
    for i in range(n):
        rng = np.random.default_rng((seed, i))
        held_out = {"triples": True, "pairs": None, "none": False}[split]
        scene = draw_scene(rng, held_out=held_out, checkered=checkered, **shares)
        while split == "pairs" and not is_held_out_pair(scene):
            scene = draw_scene(rng, held_out=None, checkered=checkered, **shares)
        prompts.append((scene, caption(scene)))
    return prompts


def evaluate(
    generate: Generate,
    *,
    n: int = 256,
    seed: int = 0,
    batch: int = 32,
    given: Sequence[int] = (),
    reconstruct: Reconstruct | None = None,
    split: str = "triples",
    **shares: float,
) -> dict:
    """Ask for n scenes in batches and score every clip: see `score_table` for what comes back."""
    prompts = held_out_prompts(n, seed, split=split, **shares)
    batches = score_prompts(generate, prompts, seed=seed, batch=batch, given=given, reconstruct=reconstruct)
    rows = [row for part in batches for row in part]
    return score_table(rows) | {"clips": rows}


def score_prompts(
    generate: Generate,
    prompts: Sequence[tuple[Scene, str]],
    *,
    first: int = 0,
    seed: int = 0,
    batch: int = 32,
    given: Sequence[int] = (),
    reconstruct: Reconstruct | None = None,
) -> Iterator[list[dict]]:
    """A row for each clip, batch by batch; clip i has the seed i (of `seed` 0), so that any of them can be made again.

    first        where to go on, in a run that was stopped
    given        frames that the generator was given (0: the first, -1: the last), to be compared with the truth
    reconstruct  the VAE, to compare them with its reconstruction of the given frame, too: what the model lost, without
                 what no model behind that VAE can keep
    """
    for start in range(first, len(prompts), batch):
        part = range(start, min(start + batch, len(prompts)))
        scenes, words = [prompts[i][0] for i in part], [prompts[i][1] for i in part]
        clips = generate(words, scenes, [seed * 1_000_000 + i for i in part])
        rows = []
        for i, clip in zip(part, clips, strict=True):
            scene, text = prompts[i]
            seen = measure(clip, count(scene))
            rows.append({"prompt": text, **score_measurement(seen, scene)})
            rows[-1]["swap"] = swap(seen, scene, prompts[(i + 1) % len(prompts)][0])
        for index in given:
            name = {0: "first", -1: "last"}.get(index, f"frame_{index}")
            images = [render(scene, *clip.shape[:3])[index] for scene, clip in zip(scenes, clips, strict=True)]
            # alone, as videos of one frame: the way the model is given them
            kept = reconstruct([image[None] for image in images]) if reconstruct else None
            for i, (row, clip, image) in enumerate(zip(rows, clips, images, strict=True)):
                row |= {f"{name}_psnr": psnr(clip[index], image), f"{name}_ssim": ssim(clip[index], image)}
                if kept is not None:
                    row |= {f"vae_{name}_psnr": psnr(kept[i][0], image), f"vae_{name}_ssim": ssim(kept[i][0], image)}
                    row |= {
                        f"{name}_psnr_to_vae": psnr(clip[index], kept[i][0]),
                        f"{name}_ssim_to_vae": ssim(clip[index], kept[i][0]),
                    }
        yield rows


def swap(seen: Measurement, own: Scene, other: Scene) -> float:
    """Does another prompt fit a clip better than its own? 0 is right, 1 is wrong, a tie 0.5: so much is blindness.

    What counts is the number of right attributes.
    """

    def fits(scene: Scene) -> int:
        score = score_measurement(seen, scene)
        return sum(int(np.sum(score.get(name) or False)) for name in ATTRIBUTES)

    right, wrong = fits(own), fits(other)
    return 1.0 if wrong > right else 0.5 if wrong == right else 0.0


def score_table(results: list[dict]) -> dict:
    """The summary of rows: rates with 95 % intervals; means of PSNR, SSIM and swap, medians of other figures.

    {"n": 256, "rates": {"colour": {"right": 251, "of": 256, "rate": .98, "low": .95, ..}, ..}, "figures": {"jump": .2}}
    With two objects to a clip, rates about objects are over objects, and `all` over clips.
    """
    rates, figures = {}, {}
    for name in dict.fromkeys(name for row in results for name in row):
        known = [row[name] for row in results if row.get(name) is not None]
        if name in (*ATTRIBUTES, "all"):
            answers = np.concatenate([np.atleast_1d(value) for value in known])
            right, of = int(answers.sum()), len(answers)
            low, high = wilson(right, of)
            rates[name] = {"right": right, "of": of, "rate": right / of, "low": low, "high": high}
        elif name != "prompt":
            # nothing moves where nothing was found: such clips have no residual and no jump
            average = np.mean if name == "swap" or "psnr" in name or "ssim" in name else np.median
            figures[name] = float(average(known)) if known else None
    return {"n": len(results), "rates": rates, "figures": figures}


def markdown(rows: dict[str, dict]) -> str:
    """Tables of `evaluate` as two Markdown tables with a line for each: rates with their intervals; figures."""
    names = [name for name in (*ATTRIBUTES, "all") if any(name in table["rates"] for table in rows.values())]
    figures = list(dict.fromkeys(name for table in rows.values() for name in table["figures"]))

    def rate(table: dict, name: str) -> str:
        cell = table["rates"].get(name)
        return f"{cell['rate']:.3f} [{cell['low']:.2f}, {cell['high']:.2f}]" if cell else ""

    def figure(table: dict, name: str) -> str:
        value = table["figures"].get(name)
        return "" if value is None else f"{value:.3g}"

    def lines(columns: list[str], cell: Callable[[dict, str], str]) -> list[str]:
        head = [f"| | n | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
        return head + [
            f"| {label} | {table['n']} | {' | '.join(cell(table, name) for name in columns)} |"
            for label, table in rows.items()
        ]

    return "\n".join([*lines(names, rate), "", *lines(figures, figure)])


def ceiling(reconstruct: Reconstruct, *, num_frames: int = 17, height: int = 64, width: int = 64) -> Generate:
    """The generator behind the ceiling row: the true clips through the VAE. `lambda clips: clips` tests the score."""
    return lambda prompts, scenes, seeds: reconstruct([render(scene, num_frames, height, width) for scene in scenes])


def floor(*, num_frames: int = 17, height: int = 64, width: int = 64, **shares: float) -> Generate:
    """The generator behind the floor row: a good clip of some other scene of the kind, whatever the prompt says."""
    shares = {"checkered": 0.0} | shares

    def generate(prompts: list[str], scenes: list[Scene], seeds: list[int]) -> list[np.ndarray]:
        others = [draw_scene(np.random.default_rng((1, i)), held_out=False, **shares) for i in seeds]
        return [render(scene, num_frames, height, width) for scene in others]

    return generate


def reconstruction(reconstruct: Reconstruct, *, n: int = 64, seed: int = 0, num_frames: int = 17) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM of a VAE over n held-out clips."""
    clips = [render(scene, num_frames) for scene, _ in held_out_prompts(n, seed)]
    pairs = [(clip, reconstruct([clip])[0]) for clip in clips]
    return {
        "psnr": float(np.mean([psnr(a, b) for a, b in pairs])),
        "ssim": float(np.mean([ssim(a, b) for a, b in pairs])),
    }


SWAPPED = ("background", "colour", "size", "motion", "shape")


def caption_gaps(
    loss: Callable[[list[str]], float], scenes: Sequence[Scene], names: Sequence[str] = SWAPPED
) -> dict[str, float]:
    """Per attribute, the training loss under captions that are wrong in it, less the loss under the right ones.

    It shows what a model has learnt long before whole clips come out right: 0 is a word that is not read.
    """
    rng = np.random.default_rng(0)
    wrong = {name: [caption(swap_attribute(scene, name, rng)) for scene in scenes] for name in names}
    right = loss([caption(scene) for scene in scenes])
    return {f"gap_{name}": loss(captions) - right for name, captions in wrong.items()}


def swap_attribute(scene: Scene, name: str, rng: np.random.Generator) -> Scene:
    """The scene with another value of one attribute (of one of its objects), for a wrong caption.

    The geometry stays, so the result is to be named, not rendered.
    """
    of_scene = {"background": BACKGROUNDS, "camera": CAMERAS, "style": STYLES}
    if name in of_scene:
        return replace(scene, **{name: _another(of_scene[name], getattr(scene, name), rng)})
    values = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "motion": MOTIONS}[name]
    changed = int(rng.integers(len(scene.objects)))
    things = list(scene.objects)
    things[changed] = replace(things[changed], **{name: _another(values, getattr(things[changed], name), rng)})
    return replace(scene, objects=tuple(things))


def _another(values, value: str, rng: np.random.Generator) -> str:
    others = [other for other in values if other != value]
    return others[int(rng.integers(len(others)))]
