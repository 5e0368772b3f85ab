"""Small files with any entry replaced by anything: only our own errors come out of what reads them."""

import contextlib
import copy
import json
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streamconv.errors import StreamconvError
from streamconv.families.dinov2 import FAMILY, IMAGE_PROCESSOR
from streamconv.families.image_processors import UnknownStepsError, read_pixel_steps
from streamconv.hub.card import make_card
from streamconv.output.journal import Journal
from streamconv.output.manifest import Manifest, Provenance, SourceFile, WrittenFile
from tests.support import plan_of_shapes, tiny

CASES = 200  # of each file; every entry is replaced a few times
DEEP: Any = {}
for _ in range(30):
    DEEP = {"a": [DEEP]}
VALUES: list[Any] = [
    None, [], {}, "", "x" * 2000, "\ud800", "\x1b[2J", 1e300, float("nan"), 0.5, 0, -1, 2**63, 10**400, True, [None],
    {"x": None}, ["a"], [[1]], "../x", DEEP,
]  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*at, key))


def mutations(value: Any) -> Iterator[Any]:
    """Yield copies of JSON with one entry replaced or removed, the same ones each time."""
    chance, found = random.Random(0), [*places(value)]
    for number in range(CASES):
        at, changed = found[number % len(found)], copy.deepcopy(value)
        if not at:
            yield chance.choice(VALUES)
            continue
        parent = changed
        for key in at[:-1]:
            parent = parent[key]
        if chance.random() < 0.1:
            del parent[at[-1]]
        else:
            parent[at[-1]] = chance.choice(VALUES)
        yield changed


def manifest() -> Manifest:
    source = {"backbone": SourceFile("x.pth", 1, "ab", "https://host/x.pth", version={"x.pth": (1, "a")})}
    provenance = Provenance(source=source, plan="ab", filled={"a": 0.0}, notes=("n",), skipped=("s",))
    files = {name: WrittenFile(1, "ab") for name in ("model.safetensors", "config.json")}
    versions = {"streamconv": "1"}
    return Manifest.of(provenance, "Dinov2Model", files, True, {"from": "float32", "to": "float16"}, versions)


def test_mutated_manifest_is_read_or_refused() -> None:
    for value in mutations(json.loads(manifest().to_bytes())):
        with suppress(StreamconvError):
            make_card(Manifest.from_json(value, Path("streamconv.json")), "a/b", None, ())


def test_mutated_journal_is_read_or_refused() -> None:
    whole = manifest()
    provenance = {key: value for key, value in asdict(whole).items() if key in Provenance.__dataclass_fields__}
    for value in mutations({"format_version": 1, "provenance": json.loads(json.dumps(provenance))}):
        with contextlib.suppress(StreamconvError):
            Journal.parse(json.dumps(value).encode() + b"\n", Path("journal"))


def test_mutated_image_processor_is_read_or_unknown() -> None:
    for value in mutations(json.loads(json.dumps(IMAGE_PROCESSOR))):
        if isinstance(value, dict):
            with suppress(UnknownStepsError):
                read_pixel_steps(value)


def test_mutated_config_is_compared_or_refused(tmp_path: Path) -> None:
    dimensions = tiny(layers=1, hidden=64)
    plan = plan_of_shapes({key: info.shape for key, info in FAMILY.sources(dimensions).items()}, tmp_path)
    for value in mutations(dict(plan.config)):
        if isinstance(value, dict):
            try:
                read = FAMILY.with_config(dimensions, value)
                assert FAMILY.attention_heads is not None
                FAMILY.attention_heads.number_in(value)
                FAMILY.attention_heads.number_beside(value, dimensions)
                FAMILY.config_problems(FAMILY.conversion_spec(read), value)
            except StreamconvError:
                pass
