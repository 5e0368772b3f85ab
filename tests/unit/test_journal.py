"""The resume points that a journal records."""

import json
from pathlib import Path

from streamconv.output.journal import Journal
from streamconv.output.manifest import FORMAT_VERSION

FIRST = {"format_version": FORMAT_VERSION, "process": {"pid": 1, "host": "here", "since": "today", "started": 1.0}}


def entry(name: object, size: object) -> dict[str, object]:
    return {"file": name, "resume_point": {"size": size, "sha256": "0" * 64}}


def read(*entries: object) -> Journal:
    return Journal.parse(b"".join(json.dumps(each).encode() + b"\n" for each in (FIRST, *entries)), Path("journal"))


def test_last_entry_of_each_file_counts_however_many_there_are() -> None:
    journal = read(*(entry(f"{i // 160}.safetensors", i + 1) for i in range(24_000)))
    assert {name: point.size for name, point in journal.resume_points.items()} == {
        f"{file}.safetensors": 160 * (file + 1) for file in range(150)
    }


def test_journal_ends_at_the_first_invalid_line() -> None:
    for line in ([], entry(["a"], 5), {"file": "a"}, entry(None, 5), entry("a", "6")):
        journal = read(entry("a", 5), line, entry("a", 7))
        assert journal.size_of("a") == 5, line
        assert journal.length == len(json.dumps(FIRST)) + len(json.dumps(entry("a", 5))) + 2, line
