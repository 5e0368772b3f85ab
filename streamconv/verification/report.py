"""A verification as one HTML page to publish: no network, no script, light and dark, wide and narrow.

The page is made from `Verification.as_dict()` and nothing else, so whatever it shows is in the JSON too.
matplotlib and Jinja2 are the `report` extra, imported only when a page is rendered.
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

# Stand-ins that the page's own colours take the place of: one drawing is light, dark and printed.
INK, MUTED, LINE, GOOD, SOFT, BAD = COLOURS = ("#010101", "#020202", "#030303", "#040404", "#050505", "#060606")
VARIABLES = ("--ink", "--muted", "--line", "--good", "--good-soft", "--bad")
SIZES = {"wide": (7.6, 2.9), "narrow": (3.7, 3.0)}  # inches; the page shows each at about its own size
FONT_SIZE = 8.5  # pt
PICTURE = re.compile(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+")


def require() -> None:
    """Ask for the `report` extra before hours of work, without importing it.

    Raises:
        UsageError: matplotlib or Jinja2 is not installed.
    """
    missing = [name for name in ("matplotlib", "Jinja2") if find_spec(name.lower()) is None]
    if missing:
        raise UsageError(f"--report needs {' and '.join(missing)}: pip install 'streamconv[report]'")


def render(verification: Mapping[str, Any]) -> str:
    """The whole page. What ``verification`` lacks is left out; equal mappings give equal pages."""
    from jinja2 import ChainableUndefined, Environment
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"size": _size, "difference": _difference, "seconds": _seconds, "sentence": _sentence}
    template = environment.from_string((files("streamconv") / "report.html.jinja").read_text("utf-8"))
    known = _known(verification)
    pictures = {key: picture for key, picture in known.get("pictures", {}).items() if PICTURE.fullmatch(picture)}
    parity: dict[str, Any] = next(
        (check.get("numbers", {}) for check in known.get("checks", ()) if check["name"] == "parity"), {}
    )
    drawings = {size: Markup(_draw(parity, *SIZES[size])) for size in SIZES if parity.get("differences")}
    page = template.render(
        known, facts=FACTS, pictures=pictures, drawings=drawings, summary=_summary(parity) if drawings else ""
    )
    # A file's name may hold bytes that are no UTF-8: Python keeps them as surrogates, which cannot be written.
    return page.encode("utf-8", "replace").decode("utf-8")


def _known(value: Any) -> Any:
    """Without any None: not measured and not there are one to the page."""
    if isinstance(value, Mapping):
        return {key: _known(item) for key, item in value.items() if item is not None}
    return [_known(item) for item in value] if isinstance(value, (list, tuple)) else value


def _summary(parity: Mapping[str, Any]) -> str:
    differences = [float(d) for d in parity["differences"].values()]
    zeros, count = differences.count(0.0), len(differences)
    if zeros == count:
        return f"0.0 in all {count} states"
    largest = max(differences, key=lambda d: math.inf if math.isnan(d) else d)
    return f"largest difference {_difference(largest)}; exactly 0 in {zeros or 'none'} of {count} states"


def _draw(parity: Mapping[str, Any], width: float, height: float) -> str:
    """The difference in every state as an SVG element, ``width`` x ``height`` inches, in the page's colours."""
    from matplotlib import style
    from matplotlib.figure import Figure

    # The user's own matplotlibrc has no say, and the salt makes ids the same each time, but other ones in each size:
    # both stand in one page. Text stays text, in the page's font.
    ours = {"svg.hashsalt": f"{width}", "svg.fonttype": "none", "font.size": FONT_SIZE, "text.parse_math": False}
    out = io.StringIO()
    with style.context(["default", ours]):
        figure = Figure(figsize=(width, height), layout="constrained")
        _draw_states(figure.add_subplot(), parity, width)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=no_metadata)
    svg = out.getvalue()
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg[svg.index("<svg") :])  # groups' names: the same in both sizes
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
    room = max(1.0, len(names) * 0.19 / width)  # what an upright name takes, in layers
    places = dict(zip(names, accumulate(1.0 if layers.get(name) else room for name in names), strict=True))

    def mark(states: Mapping[str, float], marker: str, **look: Any) -> None:
        heights = [
            rows["exactly 0"] if d == 0 else math.log10(d) if math.isfinite(d) else rows["not finite"]
            for d in states.values()
        ]
        axes.plot([places[name] for name in states], heights, marker, linestyle="none", **look)

    def note(text: str, x: float, y: float, shift: tuple[float, float], edge: Any, **look: Any) -> None:
        axes.annotate(text, (x, y), shift, edge, textcoords="offset points", annotation_clip=False, **look)

    to_right, to_top = axes.get_yaxis_transform(), axes.get_xaxis_transform()  # x or y as a share of the axes
    axes.axhspan(rows["exactly 0"] - 0.45, rows["exactly 0"] + 0.45, color=SOFT, lw=0)
    mark({name: d for name, d in float32.items() if name in places}, "o", ms=4.5, mfc="none", mec=MUTED)
    mark({name: d for name, d in differences.items() if d <= tolerance}, "o", ms=4.5, color=GOOD, mew=0)
    mark({name: d for name, d in differences.items() if not d <= tolerance}, "x", ms=5.5, color=BAD, mew=1.6)
    if tolerance > 0:
        axes.axhline(math.log10(tolerance), color=INK, lw=1, ls=(0, (5, 3)))
        note(f"tolerance {_difference(tolerance)}", 1, math.log10(tolerance), (-2, 3), to_right, ha="right", color=INK)
    if (first := parity.get("first")) in places:
        axes.axvline(places[first], color=BAD, lw=1, ls=(0, (2, 2)))
        side = "left" if names.index(first) < len(names) / 2 else "right"
        note(f"first: {first:.12}", places[first], 1, (0, 4), to_top, ha=side, color=BAD)
    if not any((*differences.values(), *float32.values())):
        middle = rows["exactly 0"] + 3.5  # between two lines
        note(
            f"0.0 in all {len(names)} states",
            0.5,
            middle,
            (0, 0),
            to_right,
            ha="center",
            va="center",
            color=INK,
            size=13,
        )
    for name in (name for name in names if name not in layers):
        note(f"{name:.12}", places[name], 0, (0, -4), to_top, rotation=90, ha="center", va="top", color=MUTED)
    each = next(each for each in (1, 5, 10, 20, 50, 10_000) if each * width / len(names) > 0.25)
    ticks = {places[name]: str(i) for name, i in layers.items() if i % each == 0}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_yticks(list(rows.values()), list(rows))
    axes.set_xlabel("layer", color=MUTED)
    axes.set_ylim(rows["exactly 0"] - 0.5, max(rows.values()) + 0.4)
    axes.grid(axis="y", color=LINE, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    axes.spines[:].set_visible(False)


def _rows(values: Sequence[float]) -> dict[str, float]:
    """Heights by label: decades at their exponents, and beside them what has no logarithm: 0 and the infinite."""
    known = [value for value in values if 0 < value < math.inf]
    low = math.floor(math.log10(min(known, default=1e-8)))
    high = max(math.ceil(math.log10(max(known, default=1e-4))), low + 3)
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


FACTS = (  # a rung's number, what the page calls it, how it says it
    ("tensors", "Tensors compared", "{:,}".format),
    ("bytes", "Bytes compared", "{:,}".format),
    ("parameters", "Parameters loaded", "{:,}".format),
    ("size", "Picture", "{0} × {0} pixels".format),
    ("largest", "Largest difference", _difference),
    ("tolerance", "Tolerance", lambda value: _difference(value) if float(value) else "0.0, bit for bit"),
    ("first", "First state to differ", str),
    ("seconds", "Time", _seconds),
)
