"""Manifests and journals are checked when they are read."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from streamconv import OutputError
from streamconv.formats.typed_json import parse
from streamconv.output.identity import differences
from streamconv.output.journal import JOURNAL_NAME, Journal, ResumePoint, is_unfinished
from streamconv.output.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Labels,
    Manifest,
    Provenance,
    SourceFile,
    WrittenFile,
    in_order,
)

SOURCE = SourceFile("x.pth", 5, "f00d", version={"changed_ns": (3,), "modified_ns": (2,)})
PROVENANCE = Provenance(
    source={"backbone": SOURCE, "head": SourceFile("y.pth", 6, "beef", "https://example.org/y.pth", synthetic=True)},
    plan="cafe",
    model="dinov2_vits14",
    select="teacher.",
    num_heads=6,
    filled={"norm.bias": 0.5},
    block_chunks=4,
    notes=("a note",),
    skipped=("optimizer",),
    labels=Labels("labels.txt", False, "1abe1"),
)
MANIFEST = Manifest.of(
    PROVENANCE,
    architecture="Dinov2Model",
    files={"model.safetensors": WrittenFile(7, "abcd", 3)},
    is_crc_checked=True,
    cast={"from": "float32", "to": "float16"},
    versions={"streamconv": "0.1.0"},
)


def changed(value: Any, path: list[str], new: Any) -> Any:
    """Return a copy of nested dicts with one value replaced by ``new``, or removed if ``new`` is ``KeyError``."""
    key, *rest = path
    if not rest and new is KeyError:
        return {name: each for name, each in value.items() if name != key}
    return {**value, key: changed(value[key], rest, new) if rest else new}


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert Manifest.read(tmp_path) is None
    (tmp_path / "streamconv.json").write_bytes(MANIFEST.to_bytes())
    assert Manifest.read(tmp_path) == MANIFEST
    assert MANIFEST.source["backbone"].version == {"modified_ns": (2,)}
    assert json.loads(MANIFEST.to_bytes())["format_version"] == FORMAT_VERSION


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        (["plan"], KeyError, "its field plan is missing"),
        (["plan"], 5, "its field plan is 5, which is not of type str"),
        (["num_heads"], True, "its field num_heads is True, which is not of type int"),
        (["num_heads"], 6.0, "its field num_heads is 6.0, which is not of type int"),
        (["source"], [], "its field source is not a JSON object"),
        (["source", "head"], "y.pth", "its field source.head is not a JSON object"),
        (["source", "head", "size"], "6", "its field source.head.size is '6', which is not of type int"),
        (["source", "backbone", "version", "modified_ns"], [2, []], "version.modified_ns[1] is [], which is not"),
        (["filled", "norm.bias"], "0", "its field filled.norm.bias is '0', which is not of type float"),
        (["notes"], "a note", "its field notes is 'a note', which is not of type"),
        (["labels", "sha256"], None, "its field labels.sha256 is None, which is not of type str"),
        (["files", "model.safetensors", "size"], 10**400, "files.model.safetensors.size is a number of 1,329"),
        (["files", "model.safetensors"], {"size": 7}, "its field files.model.safetensors.sha256 is missing"),
        (["files"], {"../x": {"size": 7, "sha256": ""}}, "files names '../x', which streamconv does not write"),
        (["cast", "to"], 16, "its field cast.to is 16, which is not of type str"),
        (["verification"], "passed", "its field verification is not a JSON object"),
    ],
)  # fmt: skip
def test_a_damaged_field_is_refused_by_its_name(tmp_path: Path, path: list[str], new: Any, message: str) -> None:
    value = changed(json.loads(MANIFEST.to_bytes()), path, new)
    (tmp_path / "streamconv.json").write_text(json.dumps(value))
    with pytest.raises(OutputError, match=rf"streamconv\.json is damaged: .*{re.escape(message)}"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("value", ["[]", '"x"', "5", "null"])
def test_another_json_value_is_not_a_manifest(tmp_path: Path, value: str) -> None:
    (tmp_path / "streamconv.json").write_text(value)
    with pytest.raises(OutputError, match="is damaged: it is not a JSON object"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"a": ' * 100_000, "1" * 10_000])
def test_invalid_json_is_not_a_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "streamconv.json").write_text(text)
    with pytest.raises(OutputError, match=r"streamconv\.json (cannot be read|is damaged)"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("path", "new", "differs"),
    [
        ([], None, []),
        (["source", "backbone", "fingerprint"], "beef", ["backbone"]),
        (["source", "backbone", "version"], {}, ["backbone"]),
        (["source", "backbone", "version", "modified_ns"], [3], ["backbone"]),
        (["source", "backbone", "version", "changed_ns"], [4], ["backbone"]),
        (["source", "backbone", "version", "changed_ns"], KeyError, []),
        (["source", "head"], KeyError, ["head"]),
        (["source", "backbone", "file"], "renamed.pth", []),
        (["plan"], "f00d", ["plan (its names, its selection, its shard size, its dtype)"]),
        (["labels", "sha256"], "f00d", ["list of labels"]),
        (["labels", "is_default"], True, ["list of labels"]),
        (["labels"], None, ["list of labels"]),
        (["notes"], [], []),
    ],
)
def test_conversions_differ_in_their_files_plan_and_labels(path: list[str], new: Any, differs: list[str]) -> None:
    value = json.loads(json.dumps(asdict(PROVENANCE)))
    other = parse(Provenance, changed(value, path, new) if path else value)
    assert differences(PROVENANCE, other) == differences(other, PROVENANCE) == differs


def test_default_labels_of_two_sources_are_not_a_difference() -> None:
    ours, theirs = (
        Provenance(source={}, plan="", labels=Labels(origin, True, origin or ""))
        for origin in ("the Hub", "torchvision")
    )
    assert differences(ours, theirs) == []
    assert differences(ours, Provenance(source={}, plan="")) == []


def test_a_journal_keeps_only_entries_that_are_complete(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    assert Journal.read(path) == Journal()
    lines = [
        {"format_version": FORMAT_VERSION, "provenance": {"source": {}, "plan": "cafe"}},
        {"process": {"pid": 5, "host": "here", "since": "now"}},
        {"file": "x", "resume_point": {"size": 5, "sha256": "abcd"}},
        {"file": "x", "resume_point": {"size": "6", "sha256": "abcd"}},
        {"file": "x", "resume_point": {"size": 7, "sha256": "abcd"}},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    journal = Journal.read(path)
    assert journal.provenance == Provenance(source={}, plan="cafe")
    assert str(journal.process) == "process 5 on here, since now"
    assert journal.resume_points == {"x": ResumePoint(5, "abcd")}
    assert journal.length == sum(len(json.dumps(line)) + 1 for line in lines[:3])


def test_folder_that_cannot_be_accessed_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "loop", tmp_path / "file" / "x"):
        with pytest.raises(OutputError, match=r"(loop|file/x) cannot be read: "):
            is_unfinished(folder)
        with pytest.raises(OutputError, match=r"Choose another place for the output\.$"):
            Journal.read(folder / JOURNAL_NAME)
    (tmp_path / JOURNAL_NAME).symlink_to(JOURNAL_NAME)
    with pytest.raises(OutputError, match="delete it and start again"):
        Journal.read(tmp_path / JOURNAL_NAME)


def test_files_are_listed_weights_first_and_by_their_numbers() -> None:
    shards = [f"model-{i}-of-12.safetensors" for i in (10, 2, 1, 12, 3, 4, 5, 6, 7, 8, 9, 11)]
    files = dict.fromkeys(["config.json", *shards], WrittenFile(1, "00"))
    assert list(in_order(files)) == [*(f"model-{i}-of-12.safetensors" for i in range(1, 13)), "config.json"]


def test_manifest_of_many_files_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[Path] = []
    real = Manifest.from_json

    def from_json(value: object, path: Path) -> Manifest:
        parsed.append(path)
        return real(value, path)

    monkeypatch.setattr(Manifest, "from_json", from_json)
    (tmp_path / MANIFEST_NAME).write_bytes(MANIFEST.to_bytes())
    assert [Manifest.read(tmp_path) for _ in range(3)] == [MANIFEST] * 3
    assert parsed == [tmp_path / MANIFEST_NAME]
    other = replace(MANIFEST, plan="face")
    (tmp_path / MANIFEST_NAME).write_bytes(other.to_bytes())  # of the same size, and perhaps at the same time
    assert Manifest.read(tmp_path) == other
    (tmp_path / MANIFEST_NAME).unlink()
    assert Manifest.read(tmp_path) is None
