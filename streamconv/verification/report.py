"""The verification report: one HTML page that needs no network and no script, for any screen and for print.

The page is made from `Verification.as_dict()` alone, so everything that it shows is in the JSON, too.
matplotlib and Jinja2 are the `report` extra and are imported only when a page is rendered.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from streamconv.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Placeholder colours in the SVG, each replaced by a CSS variable: one drawing suits light mode, dark mode and print.
INK, MUTED, LINE, GOOD, SOFT, BAD = COLOURS = ("#010101", "#020202", "#030303", "#040404", "#050505", "#060606")
VARIABLES = ("--ink", "--muted", "--line", "--good", "--good-soft", "--bad")
SIZES = {"wide": (7.6, 2.9), "narrow": (3.7, 3.0)}  # width and height in inches, about as the page shows them
FONT_SIZE = 8.5  # pt
DATA_URL = re.compile(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+")


def check_installed() -> None:
    """Check that the `report` extra is installed, without importing it.

    Raises:
        UsageError: matplotlib or Jinja2 is missing.
    """
    missing = [name for name in ("matplotlib", "Jinja2") if find_spec(name.lower()) is None]
    if missing:
        raise UsageError(f"--report needs {' and '.join(missing)}: pip install 'streamconv[report]'")


def render(verification: Mapping[str, Any]) -> str:
    """Render the page. Parts that ``verification`` lacks are omitted. Equal mappings give equal pages."""
    from jinja2 import ChainableUndefined, Environment
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"size": _size, "difference": _difference, "seconds": _seconds, "sentence": _sentence}
    template = environment.from_string((files("streamconv.verification") / "report.html.jinja").read_text("utf-8"))
    known = _without_none(verification)
    pictures = {key: picture for key, picture in known.get("pictures", {}).items() if DATA_URL.fullmatch(picture)}
    parity: dict[str, Any] = next(
        (check.get("numbers", {}) for check in known.get("checks", ()) if check["name"] == "parity"), {}
    )
    drawings = {size: Markup(_draw(parity, *SIZES[size])) for size in SIZES if parity.get("differences")}
    page = template.render(
        known, facts=FACTS, pictures=pictures, drawings=drawings, summary=_summary(parity) if drawings else ""
    )
    # Bytes of a file name that are not UTF-8 become surrogates in Python, which cannot be encoded.
    return page.encode("utf-8", "replace").decode("utf-8")


def _without_none(value: Any) -> Any:
    """Remove every None: for the page, not measured is the same as absent."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, (list, tuple)) else value


def _summary(parity: Mapping[str, Any]) -> str:
    differences = [float(d) for d in parity["differences"].values()]
    zeros, count = differences.count(0.0), len(differences)
    if zeros == count:
        return f"0.0 in all {count} layer outputs"
    largest = max(differences, key=lambda d: math.inf if math.isnan(d) else d)
    return f"largest difference {_difference(largest)}; exactly 0 in {zeros or 'none'} of {count} layer outputs"


def _draw(parity: Mapping[str, Any], width: float, height: float) -> str:
    """Draw the difference in every layer output as an SVG element of ``width`` x ``height`` inches."""
    from matplotlib import style
    from matplotlib.figure import Figure

    # "default" overrides the user's matplotlibrc. The salt makes ids reproducible, but different for each size, since
    # both drawings are in one page. "none" keeps text as text, in the page's font.
    style_overrides = {
        "svg.hashsalt": f"{width}",
        "svg.fonttype": "none",
        "font.size": FONT_SIZE,
        "text.parse_math": False,
    }
    out = io.StringIO()
    with style.context(["default", style_overrides]):
        figure = Figure(figsize=(width, height), layout="constrained")
        _draw_states(figure.add_subplot(), parity, width)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=no_metadata)
    svg = out.getvalue()
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg[svg.index("<svg") :])  # ids of groups do not depend on the salt
    for colour, variable in zip(COLOURS, VARIABLES, strict=True):
        svg = svg.replace(colour, f"var({variable})")
    return svg


def _draw_states(axes: "Axes", parity: Mapping[str, Any], width: float) -> None:
    differences = {name: float(d) for name, d in parity["differences"].items()}
    float32 = {name: float(d) for name, d in parity.get("float32", {}).get("differences", {}).items()}
    tolerance = float(parity.get("tolerance", 0))
    rows = _rows([*differences.values(), *float32.values(), tolerance])
    names = list(differences)
    layers = {name: int(name[6:]) for name in names if re.fullmatch(r"layer \d+", name)}
    name_width = max(1.0, len(names) * 0.19 / width)  # of a rotated name, in units of one layer
    xs = dict(zip(names, accumulate(1.0 if layers.get(name) else name_width for name in names), strict=True))

    def mark(states: Mapping[str, float], marker: str, **look: Any) -> None:
        ys = [
            rows["exactly 0"] if d == 0 else math.log10(d) if math.isfinite(d) else rows["not finite"]
            for d in states.values()
        ]
        axes.plot([xs[name] for name in states], ys, marker, linestyle="none", **look)

    def note(text: str, x: float, y: float, shift: tuple[float, float], edge: Any, **look: Any) -> None:
        axes.annotate(text, (x, y), shift, edge, textcoords="offset points", annotation_clip=False, **look)

    # Coordinates whose x, or whose y, is a fraction of the axes.
    x_fraction, y_fraction = axes.get_yaxis_transform(), axes.get_xaxis_transform()
    axes.axhspan(rows["exactly 0"] - 0.45, rows["exactly 0"] + 0.45, color=SOFT, lw=0)
    mark({name: d for name, d in float32.items() if name in xs}, "o", ms=4.5, mfc="none", mec=MUTED)
    mark({name: d for name, d in differences.items() if d <= tolerance}, "o", ms=4.5, color=GOOD, mew=0)
    mark({name: d for name, d in differences.items() if not d <= tolerance}, "x", ms=5.5, color=BAD, mew=1.6)
    if tolerance > 0:
        axes.axhline(math.log10(tolerance), color=INK, lw=1, ls=(0, (5, 3)))
        note(
            f"tolerance {_difference(tolerance)}", 1, math.log10(tolerance), (-2, 3), x_fraction, ha="right", color=INK
        )
    if (first := parity.get("first")) in xs:
        axes.axvline(xs[first], color=BAD, lw=1, ls=(0, (2, 2)))
        side = "left" if names.index(first) < len(names) / 2 else "right"
        note(f"first: {first:.12}", xs[first], 1, (0, 4), y_fraction, ha=side, color=BAD)
    if not any((*differences.values(), *float32.values())):
        middle = rows["exactly 0"] + 3.5  # between two grid lines
        note(
            f"0.0 in all {len(names)} layer outputs",
            0.5,
            middle,
            (0, 0),
            x_fraction,
            ha="center",
            va="center",
            color=INK,
            size=13,
        )
    for name in (name for name in names if name not in layers):
        note(f"{name:.12}", xs[name], 0, (0, -4), y_fraction, rotation=90, ha="center", va="top", color=MUTED)
    each = next(each for each in (1, 5, 10, 20, 50, 10_000) if each * width / len(names) > 0.25)
    ticks = {xs[name]: str(i) for name, i in layers.items() if i % each == 0}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_yticks(list(rows.values()), list(rows))
    axes.set_xlabel("layer", color=MUTED)
    axes.set_ylim(rows["exactly 0"] - 0.5, max(rows.values()) + 0.4)
    axes.grid(axis="y", color=LINE, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    axes.spines[:].set_visible(False)


def _rows(values: Sequence[float]) -> dict[str, float]:
    """The y axis: each label's position. Decades are at their exponents; 0 and infinity, which have none, outside."""
    positive = [value for value in values if 0 < value < math.inf]
    low = math.floor(math.log10(min(positive, default=1e-8)))
    high = max(math.ceil(math.log10(max(positive, default=1e-4))), low + 3)
    step = math.ceil((high - low) / 6)
    rows: dict[str, float] = {f"1e{decade}": decade for decade in range(high, low - 1, -step)}
    rows["exactly 0"] = low - step
    if not all(map(math.isfinite, values)):
        rows["not finite"] = high + step
    return rows


def _difference(value: Any) -> str:
    number = float(value)
    if not math.isfinite(number):
        return "not a number" if math.isnan(number) else "infinite"
    return f"{number:.3g}" if number else "0.0"


def _size(count: Any) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def _seconds(value: Any) -> str:
    minutes, seconds = divmod(float(value), 60)
    return f"{minutes:.0f} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


FACTS = (  # the key in a check's numbers, the page's term for it, its format
    ("tensors", "Tensors compared", "{:,}".format),
    ("bytes", "Bytes compared", "{:,}".format),
    ("parameters", "Parameters loaded", "{:,}".format),
    ("size", "Image", "{0} × {0} pixels".format),
    ("largest", "Largest difference", _difference),
    ("tolerance", "Tolerance", lambda value: _difference(value) if float(value) else "0.0 (bit for bit)"),
    ("first", "First difference in", str),
    ("seconds", "Time", _seconds),
)
