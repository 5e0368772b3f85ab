"""The CRC-32s of records are checked while they are read, in whatever pieces and order."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import streamconv
from streamconv import CorruptError
from streamconv.files.local import LocalFile
from streamconv.files.reader import Reader
from streamconv.tensors import tiles
from streamconv.tensors.checksums import RecordChecks
from streamconv.tensors.evaluation import Evaluator
from streamconv.tensors.expressions import Expression
from streamconv.tensors.tiles import parts


def read(checks: RecordChecks, name: str, tensor: Expression) -> None:
    with Reader() as reader, Evaluator(reader, checks) as evaluator:
        for part in parts(tensor):
            evaluator.evaluate(name, part, memoryview(bytearray(part.values.info.nbytes)))


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "PIECE_BYTES", 64)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1], [0, 0, 1, 2]], ids=str)
@pytest.mark.parametrize("is_damaged", [False, True])
def test_record_is_checked_for_any_parts_in_any_order(tmp_path: Path, order: list[int], is_damaged: bool) -> None:
    path = tmp_path / "x.pth"
    torch.save({"x": torch.randn(30, 7)}, path)
    if is_damaged:  # in rows that only some of the orders read
        data = bytearray(path.read_bytes())
        with streamconv.open_checkpoint(path) as checkpoint:
            data[checkpoint["x"].record.range.start + 30] ^= 1
        path.write_bytes(data)
    with streamconv.open_checkpoint(path) as checkpoint:
        checks = RecordChecks(checkpoint.reader)
        with pytest.raises(CorruptError, match="the name") if is_damaged else nullcontext():
            for part in order:
                read(checks, "the name", checkpoint["x"].narrow(0, 10 * part, 10))
            checks.verify_pending()


def test_damaged_record_is_reported_when_its_last_byte_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"x": torch.randn(30, 7)}, path)
    with streamconv.open_checkpoint(path) as checkpoint:
        at = checkpoint["x"].record.range.start
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with streamconv.open_checkpoint(path) as checkpoint:
        checks = RecordChecks(checkpoint.reader)
        tensor = checkpoint["x"]
        read(checks, "x", tensor.narrow(0, 0, 29))
        with pytest.raises(CorruptError, match=rf"bytes {at:,} to {at + 840:,}"):
            read(checks, "x", tensor.narrow(0, 29, 1))


def test_pending_record_is_read_again_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pth"
    torch.save({"x": torch.randn(30, 7)}, path)
    again: list[int] = []
    with streamconv.open_checkpoint(path) as checkpoint:
        checks, tensor = RecordChecks(checkpoint.reader), checkpoint["x"]
        real = LocalFile.read_at
        read(checks, "x", tensor.narrow(0, 0, 10))
        monkeypatch.setattr(LocalFile, "read_at", lambda *a: (again.append(a[1]), real(*a)))
        checks.verify_pending()  # before the first shard gets its name
        assert len(again) == 1
        monkeypatch.undo()
        read(checks, "x", tensor.narrow(0, 10, 20))  # complete, with what the first shard read
        assert tensor.record not in checks._read


def test_reading_a_pending_record_again_is_prefetched_in_small_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pth"
    torch.save({"x": torch.randn(3, 1 << 18)}, path)  # 3 MiB, as a model's qkv in two shards
    calls: list[object] = []
    with streamconv.open_checkpoint(path) as checkpoint:
        checks, tensor = RecordChecks(checkpoint.reader), checkpoint["x"]
        read(checks, "x", tensor.narrow(0, 0, 1))
        file = LocalFile
        real = file.read_at
        monkeypatch.setattr(file, "prefetch", lambda _, ranges: calls.extend(ranges))
        monkeypatch.setattr(file, "read_at", lambda *a: (calls.append(len(a[2])), real(*a)))
        checks.verify_pending()
        assert calls[0] == tensor.record.range
        assert sum(int(str(size)) for size in calls[1:]) == 3 << 20
        assert max(int(str(size)) for size in calls[1:]) <= 128 << 10


@pytest.mark.parametrize("view", [torch.randn(20, 20)[:, ::2], torch.randn(2, 8).t()], ids=["skipping", "transposed"])
@pytest.mark.parametrize("is_damaged", [False, True])
def test_records_of_strided_tensors_are_checked(tmp_path: Path, view: torch.Tensor, is_damaged: bool) -> None:
    path = tmp_path / "x.pth"
    torch.save({"x": view}, path)
    with streamconv.open_checkpoint(path) as checkpoint:
        last = checkpoint["x"].record.range.end - 1  # of the first view, a byte that it skips
    data = bytearray(path.read_bytes())
    data[last] ^= is_damaged
    path.write_bytes(data)
    with streamconv.open_checkpoint(path) as checkpoint:
        checks = RecordChecks(checkpoint.reader)
        with pytest.raises(CorruptError, match=r"x \(record") if is_damaged else nullcontext():
            read(checks, "x", checkpoint["x"])
            checks.verify_pending()


@pytest.mark.parametrize(
    "view",
    [
        torch.randn(20, 30).t(),
        torch.randn(4, 9, 5).permute(1, 0, 2),
        torch.randn(6, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(3, 50).flip(0)[:, :].t(),
    ],
    ids=["transposed", "permuted", "channels last", "flipped"],
)
@pytest.mark.parametrize("is_damaged", [False, True])
def test_permuted_tensors_are_checked_without_a_second_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, view: torch.Tensor, is_damaged: bool
) -> None:
    """All bytes of the record are read in some order, so nothing is left to verify at the end."""
    path = tmp_path / "x.pth"
    torch.save({"x": view}, path)
    with streamconv.open_checkpoint(path) as checkpoint:
        middle = checkpoint["x"].record.range.start + checkpoint["x"].record.range.length // 2
    data = bytearray(path.read_bytes())
    data[middle] ^= is_damaged
    path.write_bytes(data)
    with streamconv.open_checkpoint(path) as checkpoint:
        checks = RecordChecks(checkpoint.reader)
        if is_damaged:
            with pytest.raises(CorruptError, match=r"x \(record"):
                read(checks, "x", checkpoint["x"])
            return
        read(checks, "x", checkpoint["x"])
        monkeypatch.setattr(LocalFile, "read_at", lambda *a: pytest.fail("the record is read a second time"))
        assert not checks.is_pending(checkpoint["x"].record)
        checks.verify_pending()
