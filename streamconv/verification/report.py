"""The verification report: one HTML page that needs no network and no script, for any screen and for print.

The page is made from `Verification.as_dict()` alone, so everything that it shows is in the JSON, too.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from streamconv.display import printable, visible
from streamconv.verification.chart import make_chart

DATA_URL = re.compile(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+")


def render(verification: Mapping[str, Any]) -> str:
    """Render the page. Parts that ``verification`` lacks are omitted. Equal mappings give equal pages."""
    from jinja2 import ChainableUndefined, Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("streamconv.verification", ""),
        autoescape=True,
        undefined=ChainableUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": _size, "difference": _difference, "seconds": _seconds, "sentence": _sentence, "date": _date,
        "printable": printable
    }  # fmt: skip
    known = _without_none(verification)
    pictures = {key: picture for key, picture in known.get("pictures", {}).items() if DATA_URL.fullmatch(picture)}
    parity: dict[str, Any] = next(
        (check.get("numbers", {}) for check in known.get("checks", ()) if check["name"] == "parity"), {}
    )
    drawn = {"chart": make_chart(parity), "summary": _summary(parity)} if parity.get("differences") else {}
    return environment.get_template("report.html.jinja").render(
        known, facts=FACTS, glossary=GLOSSARY, pictures=pictures, **drawn
    )


def _without_none(value: Any) -> Any:
    """Remove every None: the page treats what was not measured as absent."""
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


def _date(text: str) -> str:
    """Return "2026-11-26 02:20:03 UTC" for a date in ISO 8601."""
    return text.replace("T", " ").replace("+00:00", " UTC")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


FACTS = (  # the key in a check's numbers, its label on the page, its format
    ("tensors", "Tensors compared", "{:,}".format),
    ("bytes", "Bytes compared", "{:,}".format),
    ("files", "Files compared", "{:,}".format),
    ("parameters", "Parameters loaded", "{:,}".format),
    ("size", "Image", "{0} × {0} pixels".format),
    ("largest", "Largest difference", _difference),
    ("tolerance", "Tolerance", lambda value: _difference(value) if float(value) else "0.0 (bit for bit)"),
    ("first", "First difference in", str),
    ("seconds", "Time", _seconds),
)

GLOSSARY = (
    (
        "Layer output",
        "The numbers that a layer of the model passes on to the next one: first the embeddings, last the class token "
        "(cls), the patches and, for a classifier, the logits.",
    ),
    (
        "Difference",
        "The largest difference between a value in one model and the same value in the other. For a layer output whose "
        "largest value is above 1, it is divided by that value (a relative difference).",
    ),
    ("Tolerance", "The largest difference that passes. 0.0 means bit for bit: all values are equal."),
    (
        "Second pass in float64",
        "If float32 arithmetic rounds differently in the two models, both run again with numbers of 64 bits. There, "
        "rounding causes differences of about 1e-15, and the last bit of one float32 weight about 1e-12. The "
        "tolerance, 1e-13, tells them apart.",
    ),
    (
        "float32, float16, bfloat16",
        "Number formats (dtypes) of 32, 16 and 16 bits. A cast to fewer bits rounds the weights.",
    ),
    (
        "By design",
        "transformers deliberately computes something slightly different from the authors' code. No conversion of the "
        "weights can change that.",
    ),
    (
        "Position embeddings",
        "Weights that tell the model where a patch is in the image, stored for one image size, the native one.",
    ),
    ("Grey level", "The smallest step between two shades in an image file, after normalisation."),
    ("safetensors", "The file format of the output's weights."),
    (
        "CRC-32",
        "A checksum that torch stores with each tensor in a .pth file. It detects accidental damage to the source.",
    ),
    ("sha256", "A checksum of a whole file. Equal checksums mean equal files."),
)
