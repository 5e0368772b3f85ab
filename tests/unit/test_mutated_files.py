"""Small files with any entry replaced by anything: only our own errors come out of what reads them."""

import copy
import json
import random
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from streamconv import open_checkpoint
from streamconv.errors import SourceError, StreamconvError
from streamconv.families.dinov2 import FAMILY
from streamconv.families.dinov2_models import IMAGE_PROCESSOR
from streamconv.families.image_processors import UnknownStepsError, read_pixel_steps
from streamconv.formats.shards import MAX_FILES, read_weights_index
from streamconv.hub.card import make_card
from streamconv.output.journal import Journal
from streamconv.output.locks import LockedError, open_exclusive
from streamconv.output.manifest import Manifest, Provenance, SourceFile, WrittenFile
from streamconv.output.processes import Process
from streamconv.output.verdict import has_passed
from streamconv.planning.plan import label_config
from streamconv.planning.plan_json import from_json
from streamconv.source.cache import Download
from streamconv.source.labels import labels_in, read_labels
from streamconv.verification.result import Check, Verification
from tests.support import plan_of_shapes, tiny

CASES = 100  # of each file; every entry is replaced a few times
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


def outcomes(read: Callable[[Any], object], values: Iterable[Any], *refusals: type[Exception]) -> set[str]:
    """Return how values were treated: "read" or "refused". Any other exception ends the test."""
    found = set()
    for value in values:
        try:
            read(value)
        except refusals:
            found.add("refused")
        else:
            found.add("read")
    return found


BOTH = {"read", "refused"}


def manifest() -> Manifest:
    source = {"backbone": SourceFile("x.pth", 1, "ab", "https://host/x.pth", version={"x.pth": (1, "a")})}
    provenance = Provenance(source=source, plan="ab", filled={"a": 0.0}, notes=("n",), skipped=("s",))
    files = {name: WrittenFile(1, "ab") for name in ("model.safetensors", "config.json")}
    versions = {"streamconv": "1"}
    made = Manifest.of(provenance, "Dinov2Model", files, True, {"from": "float32", "to": "float16"}, versions)
    return replace(made, verification=verification(made).as_record())


def verification(made: Manifest) -> Verification:
    numbers = {
        "size": 224, "largest": 0.1, "tolerance": 0.2, "float32": {"largest": 0.3}, "as_published": {"cls": 0.1},
        "known_difference": {"changes": "x"},
    }  # fmt: skip
    check = Check("parity", True, "proved", ("a problem",), numbers, "a gap")
    output = {"files": {name: asdict(file) for name, file in made.files.items()}}
    return Verification((check,), "cpu", "builtin", made.versions, made.source, output, {}, 1.0)


def test_mutated_manifest_is_read_or_refused() -> None:
    whole = json.loads(manifest().to_bytes())
    verdicts = ({**whole, "verification": each} for each in mutations(whole["verification"]))

    def read(value: Any) -> None:
        found = Manifest.from_json(value, Path("streamconv.json"))
        has_passed(found)
        make_card(found, "a/b", None, ()).encode()

    assert outcomes(read, (*mutations(whole), *verdicts), StreamconvError) == BOTH


LABELS = {str(i): name for i, name in enumerate("abc")}
DOWNLOAD = Download("https://host/x.pth", 3, "ab", ({"etag": "a", "size": 1},), True, "today", True, 1, 1)


def object_in(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_bytes())
    return value if isinstance(value, dict) else {}


RECORD = {"format_version": 1, **asdict(DOWNLOAD)}
SAFETENSORS = {
    name: {"dtype": "F32", "shape": [1, 2], "data_offsets": [at, at + 8]} for name, at in (("a", 0), ("b", 8))
}
SMALL_FILES: dict[str, tuple[object, Callable[[Path], object]]] = {
    "labels.json": (LABELS, read_labels),
    "list.json": (list(LABELS.values()), read_labels),
    "config.json": ({"id2label": LABELS}, lambda path: label_config(labels_in(object_in(path)))),
    "x.safetensors.index.json": ({"weight_map": {"a": "y.safetensors"}, "metadata": {}}, read_weights_index),
    ".x.pth.streamconv-download.json": (RECORD, lambda path: Download.read(path.parent / "x.pth")),
    "x.lock": (asdict(Process.this()), lambda path: open_exclusive(path.with_name("x")).close()),
}  # fmt: skip
ALWAYS_READ = {"config.json", ".x.pth.streamconv-download.json"}  # what is wrong in them is ignored


@pytest.mark.parametrize("name", SMALL_FILES)
def test_mutated_small_file_is_read_or_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, read = SMALL_FILES[name]
    monkeypatch.setattr("streamconv.source.cache.torch_hub_cache", lambda: tmp_path)
    monkeypatch.setattr("streamconv.source.cache._record_path", lambda path: tmp_path / name)
    (tmp_path / "y.safetensors").touch()
    (tmp_path / "x.pth").write_bytes(b"abc")

    def write_and_read(value: Any) -> None:
        (tmp_path / name).write_text(json.dumps(value))
        read(tmp_path / name)

    values = mutations(json.loads(json.dumps(whole)))
    assert outcomes(write_and_read, values, StreamconvError, LockedError) == ({"read"} if name in ALWAYS_READ else BOTH)


def test_mutated_safetensors_header_is_read_or_refused(tmp_path: Path) -> None:
    for value in mutations(SAFETENSORS):
        header = json.dumps(value).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
        with suppress(StreamconvError), open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
            assert {*checkpoint} <= {"a", "b"}


def test_mutated_journal_is_read_or_refused() -> None:
    whole = manifest()
    provenance = {key: value for key, value in asdict(whole).items() if key in Provenance.__dataclass_fields__}
    values = mutations({"format_version": 1, "provenance": json.loads(json.dumps(provenance))})
    lines = (json.dumps(value).encode() + b"\n" for value in values)
    assert outcomes(lambda line: Journal.parse(line, Path("journal")), lines, StreamconvError) == BOTH


def test_mutated_image_processor_is_read_or_unknown() -> None:
    values = [each for each in mutations(json.loads(json.dumps(IMAGE_PROCESSOR))) if isinstance(each, dict)]
    assert outcomes(read_pixel_steps, values, UnknownStepsError) == BOTH


def test_image_processor_that_crops_to_no_size_is_unknown() -> None:
    with pytest.raises(UnknownStepsError, match="the crop_size None of its SiglipImageProcessor"):
        read_pixel_steps({"image_processor_type": "SiglipImageProcessor", "do_center_crop": True})


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


def test_index_of_too_many_files_is_refused(tmp_path: Path) -> None:
    names = {str(i): f"{i}.safetensors" for i in range(MAX_FILES + 1)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(SourceError, match=r"names 10,001 files of weights, and streamconv reads up to 10,000\."):
        read_weights_index(index)


def test_plan_that_is_nested_too_deeply_is_refused() -> None:
    with pytest.raises(ValueError, match="not a plan: RecursionError"):
        from_json("[" * 100_000)
