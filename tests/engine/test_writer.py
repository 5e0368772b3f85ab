"""The writer: buffers are not reused before they are hashed and written, and weights bypass the page cache."""

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import streamconv
from streamconv.errors import OutputError
from streamconv.output import contents, hashing
from streamconv.output import writer as streaming
from streamconv.output.files import atomic_file, temporary_path
from streamconv.output.folder import open_output_folder
from streamconv.output.journal import JOURNAL_NAME, NOT_STARTED, Journal
from streamconv.output.manifest import Provenance
from streamconv.planning.shards import make_shard
from streamconv.tensors import tiles
from streamconv.tensors.checksums import RecordChecks
from streamconv.tensors.evaluation import read_bytes

PROVENANCE = Provenance(source={}, plan="")


class SlowDigest:
    """A sha256 that falls behind the writer."""

    def __init__(self, data: bytes = b""):
        self._digest = hashlib.sha256(data)

    def update(self, data: memoryview) -> None:
        time.sleep(0.01)
        self._digest.update(data)

    def copy(self) -> "SlowDigest":
        copied = SlowDigest()
        copied._digest = self._digest.copy()
        return copied

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def slow_write(real: Callable[..., int], *args: Any) -> int:
    time.sleep(0.01)
    return real(*args)


@pytest.mark.parametrize("ring", [1, 2, hashing.RING_BUFFERS])
@pytest.mark.parametrize("slow", ["hash", "disk"])
def test_slow_hash_or_slow_disk_still_gets_every_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ring: int, slow: str
) -> None:
    torch.save({f"x{i}": torch.randn(1000, 577) for i in range(10)}, tmp_path / "x.pth")  # 23 MB
    if slow == "hash":
        monkeypatch.setattr(hashing, "hashlib", type("slow", (), {"sha256": SlowDigest}))
    else:
        monkeypatch.setattr(os, "pwrite", partial(slow_write, os.pwrite))
    monkeypatch.setattr(hashing, "RING_BUFFERS", ring)
    with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
        shard = make_shard("x.safetensors", checkpoint)
        with open_output_folder(tmp_path, PROVENANCE, [], 0) as folder:
            written, _ = streaming.write_shard(
                shard, folder, checkpoint.reader, RecordChecks(checkpoint.reader), lambda position, is_kept: None
            )
        data = (tmp_path / "x.safetensors").read_bytes()
        assert data == shard.header + b"".join(read_bytes(tensor) for _, tensor in shard.tensors)
        assert written.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system has no such flag")
def test_weights_bypass_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.open(tmp_path / "probe", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
    except OSError:
        pytest.skip("this file system has only its cache")
    finally:
        os.close(fd)
    torch.save({f"x{i}": torch.randn(1 << 18, 9) for i in range(2)}, tmp_path / "x.pth")  # buffers are filled
    cached, real = 0, os.pwrite

    def pwrite(fd: int, data: Any, offset: int) -> int:
        nonlocal cached
        cached += 0 if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT else len(data)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
        shard = make_shard("x.safetensors", checkpoint)
        with open_output_folder(tmp_path, PROVENANCE, [], 0) as folder:
            streaming.write_shard(
                shard, folder, checkpoint.reader, RecordChecks(checkpoint.reader), lambda position, is_kept: None
            )
        assert (tmp_path / "x.safetensors").read_bytes() == shard.header + b"".join(
            read_bytes(tensor) for _, tensor in shard.tensors
        )
    assert cached == 0


def test_journal_never_covers_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the cache is bypassed, a later sync does not report a write that failed."""
    torch.save({f"x{i}": torch.randn(1 << 16, 9) for i in range(4)}, tmp_path / "x.pth")
    for module in (hashing, contents):
        monkeypatch.setattr(module, "BUFFER_BYTES", 64 << 10)
    for module in (contents, tiles):
        monkeypatch.setattr(module, "PIECE_BYTES", 64 << 10)
    monkeypatch.setattr(streaming, "SYNC_BYTES", 128 << 10)
    real = os.pwrite
    for failing in range(2, 60, 5):
        calls = 0

        def pwrite(fd: int, data: Any, offset: int) -> int:
            nonlocal calls
            calls += 1
            if calls == failing:  # noqa: B023 - called within the turn
                raise OSError(errno.EIO, "Input/output error")
            return real(fd, data, offset)

        out = tmp_path / f"out{failing}"
        with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
            shard = make_shard("x.safetensors", checkpoint)
            with (
                monkeypatch.context() as patch,
                suppress(OutputError),
                open_output_folder(out, PROVENANCE, [shard.filename], 0) as folder,
            ):
                patch.setattr(os, "pwrite", pwrite)
                streaming.write_shard(
                    shard, folder, checkpoint.reader, RecordChecks(checkpoint.reader), lambda position, is_kept: None
                )
        assert not (out / shard.filename).exists()
        mark = Journal.read(out / JOURNAL_NAME).resume_points.get(shard.filename, NOT_STARTED)
        if mark.size:
            written = temporary_path(out / shard.filename).read_bytes()[: mark.size]
            assert hashlib.sha256(written).hexdigest() == mark.sha256, failing
    assert mark.size  # the last ones had marks


def test_writing_to_a_closed_file_fails(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "x") as file:
        pass
    with open(tmp_path / "other", "wb"), pytest.raises(OutputError, match="Bad file descriptor"):
        file.write_at(0, memoryview(b"x"))
    assert (tmp_path / "other").read_bytes() == b""
