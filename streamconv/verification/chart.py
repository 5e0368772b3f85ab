"""Computes the report's chart of the differences in all layer outputs: positions and labels for an SVG template.

x is a percentage of the plot's width and y is in pixels, so one drawing fits every width, and its text keeps its size.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

TOP, HEIGHT = 24, 190  # of the plot, in pixels
NARROW = 280  # the plot's width in pixels on a phone of 390 pixels; labels do not overlap at this width or above
NAME_WIDTH, TICK_WIDTH, CHARACTER = 28, 24, 7  # in pixels: a rotated name's column, between ticks, one character
NAME_LENGTH = 12  # the number of characters of a name that are shown


@dataclass(frozen=True)
class Mark:
    """The mark of one difference. ``kind`` is "float32", "good" or, outside the tolerance, "bad"."""

    state: str
    difference: float
    kind: str
    x: float
    y: float


@dataclass(frozen=True)
class Chart:
    """The positions and labels of a chart. ``top`` and ``bottom`` are the edges of the plot.

    ``rows`` are the labels of the y axis. ``zeros`` is the y of the row of exact zeros, ``row_height`` the height of
    that row. ``ticks`` are the numbers of layers, ``names`` the states that are not layers, ``first`` the first
    difference. If all differences are 0, ``note`` is the y of a text that says so.
    """

    height: int
    top: float
    bottom: float
    rows: tuple[tuple[str, float], ...]
    zeros: float
    row_height: float
    marks: tuple[Mark, ...]
    ticks: tuple[tuple[str, float], ...]
    names: tuple[tuple[str, float], ...]
    tolerance: tuple[float, float] | None
    first: tuple[str, float] | None
    note: float | None


def make_chart(parity: Mapping[str, Any]) -> Chart:
    """Make the chart for the numbers of a parity check."""
    differences = {name: float(d) for name, d in parity["differences"].items()}
    float32 = {name: float(d) for name, d in parity.get("float32", {}).get("differences", {}).items()}
    tolerance = float(parity.get("tolerance", 0))
    values = [*differences.values(), *float32.values()]
    rows, step = _rows([*values, tolerance])
    highest, lowest = max(rows.values()) + 0.4 * step, rows["exactly 0"] - 0.5 * step

    def place(row: float) -> float:
        return round(TOP + HEIGHT * (highest - row) / (highest - lowest), 1)

    def y(difference: float) -> float:
        if math.isfinite(difference):
            return place(math.log10(difference) if difference else rows["exactly 0"])
        return place(rows["not finite"])

    layers = {name: int(name[6:]) for name in differences if re.fullmatch(r"layer \d+", name)}
    names = [name for name in differences if name not in layers]
    layer_width = max(1.0, (NARROW - NAME_WIDTH * len(names)) / max(1, len(layers)))  # in pixels
    widths = [layer_width if name in layers else NAME_WIDTH for name in differences]
    xs = {
        name: round(100 * (end - width / 2) / sum(widths), 2)
        for name, width, end in zip(differences, widths, accumulate(widths), strict=True)
    }
    marks = [Mark(name, d, "float32", xs[name], y(d)) for name, d in float32.items() if name in xs]
    marks += [Mark(name, d, "good" if d <= tolerance else "bad", xs[name], y(d)) for name, d in differences.items()]
    each = next((each for each in (1, 2, 5, 10, 20, 50) if each * layer_width >= TICK_WIDTH), 100)
    first = parity.get("first")
    return Chart(
        height=round(TOP + HEIGHT + 16 + CHARACTER * max((len(name[:NAME_LENGTH]) for name in names), default=1)),
        top=TOP,
        bottom=TOP + HEIGHT,
        rows=tuple((label, place(row)) for label, row in rows.items()),
        zeros=place(rows["exactly 0"]),
        row_height=round(HEIGHT * 0.9 * step / (highest - lowest), 1),
        marks=tuple(marks),
        ticks=tuple((str(i), xs[name]) for name, i in layers.items() if i % each == 0),
        names=tuple((name[:NAME_LENGTH], xs[name]) for name in names),
        tolerance=(tolerance, y(tolerance)) if tolerance > 0 else None,
        first=(first[:NAME_LENGTH], xs[first]) if first is not None and first in xs else None,
        note=None if any(values) else place(rows["exactly 0"] + 3.5 * step),
    )


def _rows(values: Sequence[float]) -> tuple[dict[str, float], int]:
    """Return the rows of the y axis: the position of each label, and the distance between two labels.

    A decade is at its exponent; 0 and infinity, which have no exponent, are below and above all decades.
    """
    positive = [value for value in values if 0 < value < math.inf]
    low = math.floor(math.log10(min(positive, default=1e-8)))
    high = max(math.ceil(math.log10(max(positive, default=1e-4))), low + 3)
    step = math.ceil((high - low) / 6)
    rows: dict[str, float] = {f"1e{decade}": decade for decade in range(high, low - 1, -step)}
    rows["exactly 0"] = low - step
    if not all(map(math.isfinite, values)):
        rows["not finite"] = high + step
    return rows, step
