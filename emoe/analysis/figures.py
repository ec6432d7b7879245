"""Three kinds of picture as inline SVG: heat maps, curves, lanes of time. No library, nothing fetched when shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

# Distinct for the colour-blind too (Okabe and Ito); lines also differ in dashes.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#444444", "#e69f00")
DASHES = ("", "7 3", "2 3", "8 3 2 3")
# Dark to light, equal steps in lightness (viridis at nine places).
SCALE = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
MISSING = "#dddddd"
SHORT = 3  # letters of a label that is never written upwards
FONT = "font-family='Helvetica,Arial,sans-serif' font-size='12'"


@dataclass(frozen=True)
class Series:
    """A curve: points (x, y); NaN leaves a gap. `dashed` tells kinds apart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def curves(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    x_ticks: Sequence[float] | None = None,
    points: bool = True,
    width: int = 640,
    height: int = 340,
) -> str:
    """Curves with points, a grid, and a legend at the right where there are several.

    Args:
        y_range: ends of the axis; None for round numbers around the data.
        x_ticks: where the axis has numbers; None for round ones.
        points: mark them on the curve.
    """
    left, top, bottom = 64, 14, 50
    legend = len(series) > 1
    right = 24 + (max(90, max(7 * len(each.name) for each in series) + 34) if legend else 0)
    known = [(x, y) for each in series for x, y in zip(each.x, each.y, strict=True) if math.isfinite(y)]
    xs = [x for x, _ in known] or [0.0, 1.0]
    ys = [y for _, y in known] or [0.0, 1.0]
    x_low, x_high = _spread(min(xs), max(xs))
    y_ticks = ticks(*(y_range or _padded(min(ys), max(ys))))
    y_low, y_high = (y_range[0], y_range[1]) if y_range else (y_ticks[0], y_ticks[-1])
    plot_width, plot_height = width - left - right, height - top - bottom

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        return left + plot_width * across, top + plot_height * (1 - (y - y_low) / (y_high - y_low))

    parts = []
    for tick in y_ticks:
        if not y_low <= tick <= y_high:
            continue
        _, y = at(x_low, tick)
        parts.append(f"<line x1='{left}' x2='{left + plot_width}' y1='{y:.1f}' y2='{y:.1f}' stroke='#e4e4e4'/>")
        parts.append(_text(left - 8, y + 4, _number(tick), "end"))
    for tick in x_ticks if x_ticks is not None else ticks(x_low, x_high):
        x, _ = at(tick, y_low)
        if left - 1 <= x <= left + plot_width + 1:
            parts.append(
                f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{top}' y2='{top + plot_height + 4}' stroke='#e4e4e4'/>"
                + _text(x, top + plot_height + 18, _number(tick), "middle")
            )
    parts.append(f"<path d='M{left} {top}V{top + plot_height}H{left + plot_width}' fill='none' stroke='#777'/>")
    for number, each in enumerate(series):
        colour = PALETTE[number % len(PALETTE)]
        dash = DASHES[1 + number % 3] if each.dashed else DASHES[0]
        parts.append(
            _line([at(x, y) if math.isfinite(y) else None for x, y in zip(each.x, each.y, strict=True)], colour, dash)
        )
        for x, y in zip(each.x, each.y, strict=True):
            if points and math.isfinite(y):
                across, down = at(x, y)
                title = f"<title>{escape(each.name)}: {_number(x)}, {_number(y)}</title>"
                parts.append(f"<circle cx='{across:.1f}' cy='{down:.1f}' r='3' fill='{colour}'>{title}</circle>")
        if not legend:
            continue
        y = top + 8 + 20 * number
        x = left + plot_width + 18
        parts.append(_line([(x, y), (x + 24, y)], colour, dash) + _text(x + 30, y + 4, each.name, "start"))
    parts.append(_text(left + plot_width / 2, height - 10, x_label, "middle"))
    parts.append(_text(0, 0, y_label, "middle", f"translate(15,{top + plot_height / 2:.0f}) rotate(-90)"))
    height = max(height, top + 20 * len(series) + 20)
    return _svg(width, height, parts)


def heat_map(
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    row_label: str,
    column_label: str,
    unit: str,
    limits: tuple[float, float] | None = None,
    numbers: bool = False,
    size: int = 420,
) -> str:
    """A matrix in colours with its scale; equal neighbouring labels are written once, with a line between groups.

    Args:
        values: [R, C]; NaN is grey.
        unit: what the scale shows.
        limits: values of the scale's ends; None for the data's own.
        numbers: write each value into its cell.
    """
    matrix = np.asarray(values, dtype=float)
    R, C = matrix.shape
    finite = matrix[np.isfinite(matrix)]
    low, high = limits or ((float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0))
    cell = max(4.0, min(56.0, size / max(R, C)))
    left = 34 + 7 * max(len(label) for label in rows)
    below = 34 + (7 * max(len(label) for label in columns) if _turned(columns, cell) else 14)
    top = 10
    parts = []
    for row in range(R):
        for column in range(C):
            value = matrix[row, column]
            known = math.isfinite(value)
            colour = shade((value - low) / ((high - low) or 1.0)) if known else MISSING
            x, y = left + cell * column, top + cell * row
            text = f"{value:.2f}" if known else "-"
            hover = f"<title>{escape(f'{rows[row]}, {columns[column]}: {text}')}</title>"
            parts.append(
                f"<rect x='{x:.1f}' y='{y:.1f}' width='{cell:.2f}' height='{cell:.2f}' fill='{colour}'>{hover}</rect>"
            )
            if numbers and cell >= 30:
                ink = "#000" if not known or (value - low) / ((high - low) or 1.0) > 0.55 else "#fff"
                parts.append(_text(x + cell / 2, y + cell / 2 + 4, text, "middle", ink=ink))
    for start, stop, label in _groups(rows, cell):
        parts.append(_text(left - 6, top + cell * (start + stop) / 2 + 4, label, "end"))
    for start, stop, label in _groups(columns, cell, True):
        x, y = left + cell * (start + stop) / 2, top + cell * R + 14
        turned = f"translate({x + 4:.1f},{y - 4:.1f}) rotate(-90)"
        parts.append(_text(0, 0, label, "end", turned) if _turned(columns, cell) else _text(x, y, label, "middle"))
    parts += _borders(rows, columns, cell, left, top)
    parts.append(_text(left + cell * C / 2, top + cell * R + below - 8, column_label, "middle"))
    parts.append(_text(0, 0, row_label, "middle", f"translate(13,{top + cell * R / 2:.0f}) rotate(-90)"))
    parts += _scale_bar(left + cell * C + 22, top, max(120.0, min(cell * R, 260.0)), low, high, unit)
    height = max(top + cell * R + below, 170)
    return _svg(round(left + cell * C + 110), round(height), parts)


def lanes(rows: Sequence[tuple[str, Sequence[tuple[float, float, str]]]], *, x_label: str, width: int = 760) -> str:
    """Bars on a common axis of time, one row of them above the other.

    Args:
        rows: (label, [(begin, end, what it is)]); rows of one label have one colour.
    """
    left, top, row_height = 24 + 7 * max(len(label) for label, _ in rows), 10, 22
    ends = [time for _, bars in rows for begin, end, _ in bars for time in (begin, end)] or [0.0, 1.0]
    low, high = _spread(min(ends), max(ends))
    plot_width, bottom = width - left - 20, top + row_height * len(rows)
    colours = {label: PALETTE[number % len(PALETTE)] for number, label in enumerate(dict(rows))}

    def at(time: float) -> float:
        return left + plot_width * (time - low) / (high - low)

    parts = []
    for tick in ticks(low, high):
        if low <= tick <= high:
            x = at(tick)
            parts.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{top}' y2='{bottom + 4}' stroke='#e4e4e4'/>")
            parts.append(_text(x, bottom + 18, _number(tick), "middle"))
    for number, (label, bars) in enumerate(rows):
        y = top + row_height * number
        if not number or rows[number - 1][0] != label:
            parts.append(_text(left - 8, y + 15, label, "end"))
        for begin, end, name in bars:
            size = f"width='{max(0.5, at(end) - at(begin)):.2f}' height='{row_height - 6}'"
            title = f"<title>{escape(name)}: {_number(begin)} to {_number(end)}</title>"
            parts.append(f"<rect x='{at(begin):.2f}' y='{y + 3}' {size} fill='{colours[label]}'>{title}</rect>")
    parts.append(_text(left + plot_width / 2, bottom + 38, x_label, "middle"))
    return _svg(width, bottom + 48, parts)


def shade(place: float) -> str:
    """The colour at a place of the scale, 0 to 1; beyond, its ends."""
    place = min(1.0, max(0.0, place)) * (len(SCALE) - 1)
    below = min(int(place), len(SCALE) - 2)
    first, second = (tuple(int(SCALE[below + step][i : i + 2], 16) for i in (1, 3, 5)) for step in (0, 1))
    mixed = (round(a + (b - a) * (place - below)) for a, b in zip(first, second, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers, equally spaced, that cover [low, high]."""
    low, high = _spread(low, high)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _spread(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _padded(low: float, high: float) -> tuple[float, float]:
    low, high = _spread(low, high)
    pad = 0.04 * (high - low)
    return (max(0.0, low - pad) if low >= 0 else low - pad), high + pad


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.2e}"


def _text(x: float, y: float, text: str, anchor: str, transform: str = "", ink: str = "#222") -> str:
    turned = f" transform='{transform}'" if transform else ""
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='{ink}'{turned}>{escape(text)}</text>"


def _line(points: Sequence[tuple[float, float] | None], colour: str, dash: str) -> str:
    path, drawing = "", False
    for point in points:
        if point is not None:
            path += f"{'L' if drawing else 'M'}{point[0]:.1f} {point[1]:.1f}"
        drawing = point is not None
    return f"<path d='{path}' fill='none' stroke='{colour}' stroke-width='2' stroke-dasharray='{dash or 'none'}'/>"


def _groups(labels: Sequence[str], cell: float, across: bool = False) -> list[tuple[int, int, str]]:
    """Runs of equal labels as (start, stop, label); where single labels would collide, every so many-th."""
    runs: list[tuple[int, int, str]] = []
    for place, label in enumerate(labels):
        if runs and runs[-1][2] == label:
            runs[-1] = (runs[-1][0], place + 1, label)
        else:
            runs.append((place, place + 1, label))
    if len(runs) < len(labels):
        return runs
    longest = max(len(label) for label in labels)
    room = 7 * longest + 6 if across and longest <= SHORT else 14
    return runs[:: next((each for each in (1, 2, 5, 10, 20, 50) if each * cell >= room), 100)]


def _turned(labels: Sequence[str], cell: float) -> bool:
    """Whether labels under columns are written upwards."""
    return any(
        7 * len(label) > cell * (stop - start) and len(label) > SHORT
        for start, stop, label in _groups(labels, cell, True)
    )


def _borders(rows: Sequence[str], columns: Sequence[str], cell: float, left: float, top: float) -> list[str]:
    high, wide = cell * len(rows), cell * len(columns)
    lines = []
    for labels, across in ((rows, False), (columns, True)):
        if len(set(labels)) == len(labels):
            continue
        for start, _, _ in _groups(labels, cell)[1:]:
            at = cell * start
            path = f"M{left + at:.1f} {top}v{high:.1f}" if across else f"M{left} {top + at:.1f}h{wide:.1f}"
            lines.append(f"<path d='{path}' stroke='#fff' stroke-width='1.5'/>")
    return lines


def _scale_bar(x: float, top: float, height: float, low: float, high: float, unit: str) -> list[str]:
    steps = 40
    parts = []
    for step in range(steps):
        y = top + height * (1 - (step + 1) / steps)
        colour = shade((step + 0.5) / steps)
        parts.append(f"<rect x='{x:.1f}' y='{y:.1f}' width='14' height='{height / steps + 0.5:.2f}' fill='{colour}'/>")
    for tick in ticks(low, high, 5):
        if low - 1e-9 <= tick <= high + 1e-9:
            y = top + height * (1 - (tick - low) / ((high - low) or 1.0))
            parts.append(
                f"<path d='M{x + 14:.1f} {y:.1f}h4' stroke='#777'/>" + _text(x + 21, y + 4, _number(tick), "start")
            )
    turned = f"translate({x + 66:.1f},{top + height / 2:.0f}) rotate(-90)"
    return [*parts, _text(0, 0, unit, "middle", turned)]


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    size = f"width='{width}' height='{height}' viewBox='0 0 {width} {height}'"
    body = "\n".join(parts)
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size} {FONT} role='img'>\n{body}\n</svg>"
