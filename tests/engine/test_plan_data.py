"""A plan is data: it can be sent to another process, and each command makes it once."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import streamconv
from streamconv import ConversionOptions
from streamconv.files.address import Address
from streamconv.files.base import FileRef
from streamconv.files.reader import Reader
from streamconv.planning.plan import Plan
from streamconv.planning.plan_json import from_json, to_json
from streamconv.verification.bytes import check_bytes
from tests.checkpoints import make_states
from tests.support import tiny


def plan_of(tmp_path: Path, **options: Any) -> Plan:
    backbone, head = make_states(tiny(classes=5, registers=4))
    del backbone["mask_token"]  # so that constant tensors are filled in
    torch.save(backbone, tmp_path / "x.pth")
    torch.save(head, tmp_path / "head.pth")
    return streamconv.plan(tmp_path / "x.pth", ConversionOptions(head=tmp_path / "head.pth", **options))


@pytest.mark.parametrize("options", [{}, {"dtype": "float16", "max_shard_size": 500_000}], ids=["stored", "cast, cut"])
def test_plan_survives_pickle_and_json(tmp_path: Path, options: dict[str, Any]) -> None:
    plan = plan_of(tmp_path, **options)
    assert pickle.loads(pickle.dumps(plan)) == plan
    again = from_json(to_json(plan))
    assert again == plan
    assert again.fingerprint == plan.fingerprint
    assert list(again.config["id2label"]) == [0, 1, 2, 3, 4]  # numbers are sorted differently from words
    assert again.small_files == plan.small_files
    assert (again.index is None) == (plan.index is None) == (not options)


def test_plans_and_results_are_short_when_printed(tmp_path: Path) -> None:
    """Services log them and put them in error reports."""
    plan = plan_of(tmp_path)
    assert "Dinov2WithRegistersForImageClassification" in repr(plan)
    assert len(repr(plan)) < 2000
    done = streamconv.convert(tmp_path / "x.pth", tmp_path / "out", ConversionOptions(head=tmp_path / "head.pth"))
    assert len(repr(done)) < 2000
    verified = streamconv.verify(tmp_path / "out")
    assert repr(replace(verified, pictures={"image": "x" * 10_000})) == repr(verified)


def test_plan_sent_elsewhere_reads_the_files_there(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    streamconv.convert(tmp_path / "x.pth", tmp_path / "out", ConversionOptions(head=tmp_path / "head.pth"))
    with Reader() as reader:
        found = check_bytes(tmp_path / "out", from_json(to_json(plan)), reader, lambda count: None)
    assert found.problems == ()
    assert found.compared == plan.weights
    (tmp_path / "x.pth").write_bytes((tmp_path / "x.pth").read_bytes())  # another version of the file
    with Reader() as reader, pytest.raises(streamconv.ChangedError, match="was changed after its index was read"):
        check_bytes(tmp_path / "out", plan, reader, lambda count: None)


def test_plan_as_json_holds_no_secret(tmp_path: Path) -> None:
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
def test_text_that_is_not_a_plan_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a plan|Expecting value|version"):
        from_json(text)


def test_plan_refuses_a_copy_with_other_records(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    record = plan.shards[0].tensors[0][1].record
    other = type(record)(record.file, record.name, record.range, 1)
    with pytest.raises(streamconv.ChangedError, match=r"x\.pth was changed|head\.pth was changed"):
        plan.with_records({record: other})
