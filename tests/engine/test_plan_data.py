"""A plan is data: it crosses processes, and each command makes it once."""

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import streamconv
from streamconv import ConversionOptions, UsageError, VerificationOptions
from streamconv.files.address import Address
from streamconv.files.base import FileRef
from streamconv.files.reader import Reader
from streamconv.jobs import prepare
from streamconv.planning.plan import Plan
from streamconv.planning.plan_json import from_json, to_json
from streamconv.source import download
from streamconv.source import open as source_open
from streamconv.verification.bytes import check_bytes
from tests.conftest import make_states, tiny
from tests.file_server import FileServer


def plan_of(tmp_path: Path, **options: Any) -> Plan:
    backbone, head = make_states(tiny(classes=5, registers=4))
    del backbone["mask_token"]  # so that something is filled in
    torch.save(backbone, tmp_path / "x.pth")
    torch.save(head, tmp_path / "head.pth")
    return streamconv.plan(tmp_path / "x.pth", ConversionOptions(head=tmp_path / "head.pth", **options))


@pytest.mark.parametrize("options", [{}, {"dtype": "float16", "max_shard_size": 500_000}], ids=["stored", "cast, cut"])
def test_a_plan_survives_pickle_and_json(tmp_path: Path, options: dict[str, Any]) -> None:
    plan = plan_of(tmp_path, **options)
    assert pickle.loads(pickle.dumps(plan)) == plan
    again = from_json(to_json(plan))
    assert again == plan
    assert again.fingerprint == plan.fingerprint
    assert list(again.config["id2label"]) == [0, 1, 2, 3, 4]  # numbers, which sort otherwise than words
    assert again.small_files == plan.small_files
    assert (again.index is None) == (plan.index is None) == (not options)


def test_a_plan_that_was_sent_elsewhere_reads_the_files_there(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    streamconv.convert(tmp_path / "x.pth", tmp_path / "out", ConversionOptions(head=tmp_path / "head.pth"))
    with Reader() as reader:
        found = check_bytes(tmp_path / "out", from_json(to_json(plan)), reader, lambda count: None)
    assert found.problems == ()
    assert found.compared == plan.weights
    (tmp_path / "x.pth").write_bytes((tmp_path / "x.pth").read_bytes())  # another version of the file
    with Reader() as reader, pytest.raises(streamconv.ChangedError, match="was changed after its index was read"):
        check_bytes(tmp_path / "out", plan, reader, lambda count: None)


def test_a_plan_as_json_holds_no_secret(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    secret = FileRef(Address("https://user:password@host/x.pth?signature=abc"), 1)
    record = plan.shards[0].tensors[0][1].record
    moved = plan.with_records({record: type(record)(secret, record.name, record.range, record.crc32)})
    text = to_json(moved)
    assert not {"user", "password", "signature", "abc"} & {
        word for word in ("user", "password", "signature", "abc") if word in text
    }
    assert "https://host/x.pth" in text
    assert "password" not in repr(moved)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1}', '{"format_version": 99}'])
def test_what_is_not_a_plan_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="Make it again"):
        from_json(text)


def test_a_plan_refuses_a_copy_with_other_records(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    record = plan.shards[0].tensors[0][1].record
    other = type(record)(record.file, record.name, record.range, 1)
    with pytest.raises(streamconv.ChangedError, match=r"x\.pth was changed|head\.pth was changed"):
        plan.with_records({record: other})


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the words were resolved, an index was read by its location, and a plan was made."""
    counted: Counter[str] = Counter()

    def count(module: Any, name: str, label: Any) -> None:
        real = getattr(module, name)

        def counting(*args: Any, **options: Any) -> Any:
            counted[label(args[0])] += 1
            return real(*args, **options)

        monkeypatch.setattr(module, name, counting)

    count(prepare, "resolve_source", lambda source: "resolved")
    count(prepare, "make_plan", lambda tensors: "plans")
    for module in (source_open, download):
        count(module, "open_checkpoint", lambda location: f"opened {Path(str(location)).parent.name}/{location.name}")
    return counted


def test_run_opens_each_index_once_and_makes_one_plan(tmp_path: Path, counts: Counter[str]) -> None:
    torch.save(make_states(tiny())[0], tmp_path / "x.pth")
    done = streamconv.run(tmp_path / "x.pth", tmp_path / "out", verification=VerificationOptions(device="cpu"))
    assert done.passed
    assert counts == {"resolved": 1, "plans": 1, f"opened {tmp_path.name}/x.pth": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_run_from_an_address_opens_each_index_once(
    server: FileServer, tmp_path: Path, counts: Counter[str], stream: bool
) -> None:
    """The address and, unless it is streamed, the copy: when it is whole, and when it has its name."""
    torch.save(make_states(tiny())[0], server.folder / "x.pth")
    options = ConversionOptions(stream=stream)
    done = streamconv.run(f"{server.url}/x.pth", tmp_path / "out", options, VerificationOptions(device="cpu"))
    assert done.passed
    assert counts.pop("resolved") == 1
    assert counts.pop("plans") == 1
    assert set(counts.values()) == {1}, counts
    assert len(counts) == (1 if stream else 3)


def test_verify_makes_one_plan(tmp_path: Path, counts: Counter[str]) -> None:
    backbone, head = make_states(tiny(classes=5))
    torch.save(backbone, tmp_path / "x.pth")
    torch.save(head, tmp_path / "head.pth")
    options = ConversionOptions(head=tmp_path / "head.pth")
    streamconv.convert(tmp_path / "x.pth", tmp_path / "out", options)
    counts.clear()
    found = streamconv.verify(
        tmp_path / "out",
        tmp_path / "x.pth",
        VerificationOptions(device="cpu", parity=False),
        streamconv.SourceOptions(head=tmp_path / "head.pth"),
    )
    assert found.passed
    assert counts == {
        "resolved": 1,
        "plans": 1,
        f"opened {tmp_path.name}/x.pth": 1,
        f"opened {tmp_path.name}/head.pth": 1,
    }
    assert json.loads((tmp_path / "out" / "streamconv.json").read_text())["verification"]["passed"]
