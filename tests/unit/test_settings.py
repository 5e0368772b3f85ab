"""The limits on a config.json and other small files of JSON, which may come from anywhere."""

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from streamconv import SourceError
from streamconv.errors import OutputError, StreamconvError, UsageError
from streamconv.families.dinov2 import FAMILY
from streamconv.formats.limits import MAX_SETTINGS_BYTES, MAX_SETTINGS_DEPTH, read_settings
from streamconv.jobs.options import ConversionOptions
from streamconv.jobs.own_image_processor import own_image_processor
from streamconv.output.journal import Journal
from streamconv.output.manifest import Manifest
from streamconv.planning.image_processor import OwnImageProcessor
from streamconv.source.labels import read_labels
from streamconv.source.open import read_config
from streamconv.source.small_files import read_json_beside
from tests.support import plan_of_shapes, tiny

HOSTILE = {
    "millions of numbers": b'{"x": [' + b"1.5," * 1_950_000 + b"1]}",
    "millions of strings": b'{"x": [' + b'"ab",' * 1_500_000 + b"1]}",
    "a million keys": b"{" + b",".join(b'"%d":1' % i for i in range(600_000)) + b"}",
    "millions of lists": b'{"x": [' + b"[]," * 2_000_000 + b"1]}",
    "a list deeper than Python's recursion limit": b'{"x": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
    "a list that takes too much recursion later": b'{"x": ' + b"[" * 800 + b"]" * 800 + b"}",
    "an object that takes too much recursion later": b'{"x": ' + b'{"x": ' * 800 + b"1" + b"}" * 801,
    "endless digits": b'{"x": ' + b"9" * 5_000_000 + b"}",
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_settings_of_no_model_are_refused(attack: str) -> None:
    start = time.process_time()
    with pytest.raises(SourceError) as caught:
        read_settings(HOSTILE[attack], "config.json")
    assert time.process_time() - start < 1
    assert str(caught.value).isprintable()


READERS: dict[str, tuple[Callable[[Path], object], type[StreamconvError] | None]] = {  # None: as if there were no file
    "config.json": (lambda path: read_json_beside(path.parent, path.name), SourceError),
    "the config.json of an output/config.json": (lambda path: read_config(path.parent), None),
    "preprocessor_config.json": (
        lambda path: own_image_processor(ConversionOptions(image_processor=path), None), UsageError
    ),
    "streamconv.json": (lambda path: Manifest.read(path.parent), OutputError),
    "labels.json": (read_labels, UsageError),
    "labels.txt": (read_labels, UsageError),
    ".streamconv-journal": (Journal.read, None),
}  # fmt: skip
MEMORY = {
    "10 MB of objects": b'{"x": [' + b"{}," * 3_490_000 + b"1]}",
    "8 MB of objects": b'{"x": [' + b"{}," * 2_790_000 + b"1]}",
    "a long text with a wide character": b'{"x": "' + "🙂".encode() + b"a" * 8_000_000 + b'"}',
    "a wide text of two-letter lines": "ab\n🙂".encode() * 1_000_000,
    "a number for each of a million keys": HOSTILE["a million keys"],
}


@pytest.mark.parametrize("attack", MEMORY)
@pytest.mark.parametrize("name", READERS)
def test_hostile_small_file_takes_little_memory(tmp_path: Path, name: str, attack: str) -> None:
    read, error = READERS[name]
    path = tmp_path / Path(name).name
    path.write_bytes(MEMORY[attack])
    tracemalloc.start()
    try:
        is_one_label = name == "labels.txt" and len(MEMORY[attack]) < MAX_SETTINGS_BYTES and b"\n" not in MEMORY[attack]
        if error is None or is_one_label:
            read(path)
        else:
            with pytest.raises(error) as caught:
                read(path)
            assert len(str(caught.value)) < 1_000
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_settings_as_deep_as_allowed_are_read() -> None:
    def nested(levels: int) -> bytes:
        return b'{"x": ' * levels + b"1" + b"}" * levels

    assert read_settings(nested(MAX_SETTINGS_DEPTH), "config.json") == json.loads(nested(MAX_SETTINGS_DEPTH))
    with pytest.raises(SourceError, match="nested deeper"):
        read_settings(nested(MAX_SETTINGS_DEPTH + 1), "config.json")


def test_settings_with_the_labels_of_the_largest_classifier_are_read() -> None:
    names = {i: f"great white shark, white shark, man-eater, {i}" for i in range(21_841)}  # more than ImageNet's own
    config = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    assert len(read_settings(json.dumps(config, indent=2).encode(), "config.json")["label2id"]) == 21_841


@pytest.mark.parametrize("label", ["a" * 600, "a" + ", b" * 20])
def test_labels_that_could_not_be_read_again_are_refused(label: str) -> None:
    classes = 8_000
    shapes = {name: info.shape for name, info in FAMILY.sources(tiny(classes=classes)).items()}
    with pytest.raises(
        UsageError, match=r"config\.json could not be read again: .* it holds more .* Give shorter labels"
    ):
        plan_of_shapes(shapes, Path(), labels=[f"{label}{i}" for i in range(classes)])
    plan = plan_of_shapes(shapes, Path(), labels=[f"great white shark, white shark {i}" for i in range(classes)])
    assert len(read_settings(plan.small_files["config.json"], "config.json")["id2label"]) == classes


def test_image_processor_that_grows_when_it_is_written_is_refused() -> None:
    shapes = {name: info.shape for name, info in FAMILY.sources(tiny()).items()}
    levels = MAX_SETTINGS_DEPTH - 1
    deep = read_settings(b'{"x": ' + b"[" * levels + b"1," * 100_000 + b"1" + b"]" * levels + b"}", "x.json")
    own = OwnImageProcessor(config=deep, origin="x.json")
    with pytest.raises(SourceError, match=r"preprocessor_config\.json could not be read again: .* it holds more"):
        plan_of_shapes(shapes, Path(), image_processor=own)
