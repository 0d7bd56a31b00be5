"""A run's figures as pictures: `plot_run(folder)` draws what `folder/log.jsonl` holds into `folder/plots/*.png`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from videogen.data.files import written
from videogen.training.logs import read_log

Number = int | float
Points = Sequence[tuple[Number, Number]]
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#e377c2", "#7f7f7f", "#bcbd22")
SIZE = (900, 540)
LEFT, TOP, RIGHT, BOTTOM = 80, 40, 190, 50  # px around the axes; on the right the names
FONT = 14  # px


def plot_run(folder: Path) -> list[Path]:
    """Write the pictures there are figures for, and return their paths: the loss with the held-out loss, the held-out
    loss at each time, and for the others a picture per kind (norm, rate, PSNR, scores)."""
    lines = read_log(folder)
    curves = {name: _points(lines, name) for name in dict.fromkeys(name for line in lines for name in line)}
    pictures = {
        "loss": {
            name: curves.get(name, []) for name in ("loss", "held_out_loss", "right_caption_loss", "wrong_caption_loss")
        },
        "held_out_times": {n: p for n, p in curves.items() if n.startswith("held_out_loss_t")},
        "norm": {"norm": curves.get("norm", [])},
        "psnr": {n: p for n, p in curves.items() if "psnr" in n},
        "score": {n: p for n, p in curves.items() if n.startswith("score_")},
        "gaps": {n: p for n, p in curves.items() if n.startswith("gap")},
    }
    made = []
    for name, found in pictures.items():
        drawn = {label: points for label, points in found.items() if points}
        if drawn:
            made.append(folder / "plots" / f"{name}.png")
            log = name in ("loss", "norm", "held_out_times")
            chart(drawn, made[-1], title=f"{folder.name}: {name.replace('_', ' ')} by step", logarithmic=log)
    return made


def chart(curves: Mapping[str, Points], path: Path, *, title: str = "", logarithmic: bool = False) -> None:
    """Draw curves of (x, y), one colour each, into a PNG. A curve of many points is drawn pale, with its running mean
    over a fiftieth of its length on top. `logarithmic`: the y axis; points that are not above 0 are left out."""
    curves = {name: [(x, y) for x, y in points if not logarithmic or y > 0] for name, points in curves.items()}
    curves = {name: points for name, points in curves.items() if points}
    across = [x for points in curves.values() for x, _ in points] or [0.0]
    upright = [y for points in curves.values() for _, y in points] or [1.0]
    x0, x1 = _range(across)
    ticks_y = _log_ticks(*_range(upright, 0.05)) if logarithmic else _ticks(*_range(upright, 0.05))
    y0, y1 = (min(ticks_y[0], min(upright)), max(ticks_y[-1], max(upright)))
    scale = math.log if logarithmic else float
    width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM

    def at(x: Number, y: Number) -> tuple[float, float]:
        share = (scale(y) - scale(y0)) / ((scale(y1) - scale(y0)) or 1)
        return LEFT + width * (x - x0) / (x1 - x0), TOP + height * (1 - share)

    picture = Image.new("RGB", SIZE, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT)
    for y in ticks_y:
        draw.line([at(x0, y), at(x1, y)], fill="#dddddd")
        draw.text((LEFT - 8, at(x0, y)[1]), f"{y:g}", fill="black", font=font, anchor="rm")
    for x in _ticks(x0, x1):
        if x0 <= x <= x1:
            draw.line([at(x, y0), at(x, y1)], fill="#eeeeee")
            draw.text((at(x, y0)[0], TOP + height + 8), f"{x:g}", fill="black", font=font, anchor="mt")
    draw.rectangle([LEFT, TOP, LEFT + width, TOP + height], outline="black")
    for place, (name, points) in enumerate(curves.items()):
        colour = COLOURS[place % len(COLOURS)]
        smooth = running_mean(points, max(1, len(points) // 50))
        if len(points) >= 100:
            draw.line([at(*point) for point in points], fill=_pale(colour))
        if len(points) == 1:
            x, y = at(*points[0])
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        else:
            draw.line([at(*point) for point in smooth], fill=colour, width=2)
        draw.text((LEFT + width + 10, TOP + 4 + 18 * place), name, fill=colour, font=font, anchor="lt")
    draw.text((LEFT, TOP - 10), title, fill="black", font=font, anchor="ls")
    with written(path) as part:
        picture.save(part, format="PNG")


def running_mean(points: Points, count: int) -> list[tuple[Number, Number]]:
    """The mean of the last `count` values at each point.

    >>> running_mean([(0, 1.0), (1, 3.0), (2, 5.0)], 2)
    [(0, 1.0), (1, 2.0), (2, 4.0)]
    """
    values = [y for _, y in points]
    return [(x, sum(values[max(0, i + 1 - count) : i + 1]) / min(i + 1, count)) for i, (x, _) in enumerate(points)]


def _points(lines: Sequence[Mapping[str, object]], name: str) -> list[tuple[float, float]]:
    found = [(line["step"], line.get(name)) for line in lines]
    return [(float(x), float(y)) for x, y in found if isinstance(x, int) and isinstance(y, int | float)]


def _range(values: Sequence[Number], margin: float = 0.0) -> tuple[Number, Number]:
    low, high = min(values), max(values)
    if low == high:
        return (low - 0.5, high + 0.5) if low <= 0 else (low * 0.9, high * 1.1)
    return (low, high) if low > 0 and margin else (low - margin * (high - low), high + margin * (high - low))


def _ticks(low: Number, high: Number) -> list[Number]:
    """Round numbers around a range: about six steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [n * step for n in range(first, last + 1)]


def _log_ticks(low: Number, high: Number) -> list[Number]:
    """1, 2 and 5 times powers of ten around a range of positive numbers."""
    marks = [
        n * 10.0**p for p in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1) for n in (1, 2, 5)
    ]
    inside = [mark for mark in marks if low <= mark <= high]
    below, above = [m for m in marks if m < low][-1:], [m for m in marks if m > high][:1]
    return [*below, *inside, *above]


def _pale(colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return tuple(round(255 - 0.35 * (255 - value)) for value in (red, green, blue))  # type: ignore[return-value]
