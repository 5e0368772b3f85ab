"""Disks that are full, fail or go away: one message, no half file under a final name, and the same command goes on."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv import OutputError, SourceError, StreamconvError
from streamconv.output.journal import JOURNAL_NAME
from tests.conftest import tiny
from tests.engine.test_resume import contents, many_marks

Save = Callable[..., tuple[Path, Path | None]]
__all__ = ["many_marks"]  # a fixture
CALLS = ("open", "pwrite", "write", "fsync", "fdatasync", "replace", "ftruncate", "posix_fallocate", "mkdir", "unlink")


class Faults:
    """Makes the disk's calls fail: the one at a place in their order, or all of one name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: tuple[str, ...], number: int, at: int | None = None):
        self.seen = 0
        for name in calls:
            monkeypatch.setattr(os, name, self._failing(getattr(os, name), number, at))

    def _failing(self, real: Callable[..., Any], number: int, at: int | None) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.seen += 1
            if at is None or self.seen == at:
                raise OSError(number, os.strerror(number))
            return real(*args, **options)

        return call


def no_half_files(out: Path, whole: dict[str, bytes]) -> bool:
    return not out.exists() or all(
        whole[path.name] == path.read_bytes() for path in out.iterdir() if path.name in whole
    )


@pytest.mark.usefixtures("many_marks")
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS], ids=["EIO", "ENOSPC", "EROFS"])
def test_each_call_may_fail(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    source, _ = save(tiny(layers=1, hidden=64))
    with monkeypatch.context() as patch:
        counting = Faults(patch, CALLS, number, at=-1)
        streamconv.convert(source, tmp_path / "whole", max_shard_size="100KB")
    whole = contents(tmp_path / "whole")
    assert counting.seen > 100
    said: list[str] = []
    for at in range(1, counting.seen + 1):
        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            Faults(patch, CALLS, number, at)
            try:
                streamconv.convert(source, out, max_shard_size="100KB")
            except StreamconvError as error:  # any other error is a bug
                said.append(str(error))
        assert no_half_files(out, whole), at
        streamconv.convert(source, out, max_shard_size="100KB")
        assert contents(out) == whole, at
        shutil.rmtree(out)
    assert all(os.strerror(number) in text for text in said)
    assert len(said) > 0.95 * counting.seen  # what fails while a failure is cleaned up says nothing more


@pytest.mark.usefixtures("many_marks")
@pytest.mark.parametrize("call", ["fsync", "fdatasync", "replace", "pwrite", "write", "posix_fallocate"])
def test_a_disk_that_keeps_nothing_is_an_error(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    source, _ = save(tiny())
    with monkeypatch.context() as patch:
        Faults(patch, (call,), errno.EIO)
        with pytest.raises(OutputError, match=r"Input/output error\. Choose another place"):
            streamconv.convert(source, tmp_path / "out")
    if call == "replace":  # all was written and synced, and not one file has its name
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            JOURNAL_NAME, ".model.safetensors.streamconv-incomplete"
        }  # fmt: skip
        assert streamconv.convert(source, tmp_path / "out").resumed_bytes > 0
    else:
        assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("many_marks")
def test_a_source_that_cannot_be_read_is_gone_on_with(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = save(tiny())
    streamconv.convert(source, tmp_path / "whole")
    read, real = 0, os.preadv

    def bad_sector(fd: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        if os.path.samestat(os.fstat(fd), source.stat()):
            read += len(buffers[0])
            if read > source.stat().st_size // 2:
                raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", bad_sector)
        with pytest.raises(SourceError, match=r"cannot be read at byte [\d,]+: Input/output error\. Fetch it again"):
            streamconv.convert(source, tmp_path / "out")
    assert streamconv.convert(source, tmp_path / "out").resumed_bytes > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("many_marks")
def test_short_writes_and_reads_are_finished(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = save(tiny())
    streamconv.convert(source, tmp_path / "whole")
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: max(1, len(data) // 2)], at))
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: preadv(fd, [to[0][: max(1, len(to[0]) // 2)]], at))
    streamconv.convert(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: 0)
    with pytest.raises(OutputError, match="the disk takes no more bytes"):
        streamconv.convert(source, tmp_path / "never")


@pytest.mark.usefixtures("many_marks")
@pytest.mark.parametrize("shard_size", ["5GB", "300KB"])
def test_an_output_folder_that_goes_away_is_an_error(tmp_path: Path, save: Save, shard_size: str) -> None:
    source, _ = save(tiny())

    def progress(what: str, done: int, total: int, unit: str) -> None:
        if unit == "bytes" and 0.4 * total < done < 0.6 * total:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)

    with pytest.raises(OutputError, match=r"(was removed while it was written|is gone)\. Run the same command again"):
        streamconv.convert(source, tmp_path / "out", max_shard_size=shard_size, progress=progress)
    streamconv.convert(source, tmp_path / "whole", max_shard_size=shard_size)
    streamconv.convert(source, tmp_path / "out", max_shard_size=shard_size)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path / "disk"], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a small disk")
    try:
        yield tmp_path / "disk"
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


@pytest.mark.usefixtures("many_marks")
@pytest.mark.parametrize("shard_size", ["5GB", "300KB"])
@pytest.mark.parametrize("reserves", [True, False])
def test_a_disk_that_fills_half_way_is_gone_on_with(
    tmp_path: Path, save: Save, small_disk: Path, monkeypatch: pytest.MonkeyPatch, shard_size: str, reserves: bool
) -> None:
    """A real one; where blocks cannot be reserved, it is noticed when they are written."""
    source, _ = save(tiny())
    streamconv.convert(source, tmp_path / "whole", max_shard_size=shard_size)
    filler, out = small_disk / "filler", small_disk / "out"
    if not reserves:
        monkeypatch.delattr(os, "posix_fallocate")

    def progress(what: str, done: int, total: int, unit: str) -> None:
        if unit == "bytes" and done > 0.4 * total and not filler.exists():
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(1 << 12)):
                    pass

    # Where all was reserved when it began, the journal is what finds no room.
    with pytest.raises(OutputError, match=r"No space left on device\. Make room and run the same command again"):
        streamconv.convert(source, out, max_shard_size=shard_size, progress=progress)
    assert filler.exists()
    assert no_half_files(out, contents(tmp_path / "whole"))
    filler.unlink()
    assert streamconv.convert(source, out, max_shard_size=shard_size).resumed_bytes > 0
    assert contents(out) == contents(tmp_path / "whole")


def test_a_disk_without_room_or_that_is_read_only_is_refused_before(
    tmp_path: Path, save: Save, small_disk: Path
) -> None:
    source, _ = save(tiny(layers=4, hidden=256))
    with pytest.raises(OutputError, match=r"needs [\d,]+ bytes and its disk has [\d,]+ free\. Make room"):
        streamconv.convert(source, small_disk / "out")
    subprocess.run(["mount", "-o", "remount,ro,size=64m", small_disk], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "streamconv", "convert", source, "-o", small_disk / "out"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4
    assert "Read-only file system. Choose another place for the output." in done.stderr
    assert "Traceback" not in done.stderr
    assert list(small_disk.iterdir()) == []
