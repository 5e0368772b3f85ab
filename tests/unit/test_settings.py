"""The limits on a config.json and a preprocessor_config.json, which may come from anywhere."""

import json
import time

import pytest

from streamconv import SourceError
from streamconv.formats.limits import MAX_SETTINGS_DEPTH, read_settings

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
