"""Disks that fill up, fail or disappear: one message, no partial file under a final name, and a resumable folder."""

import errno
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from streamconv import OutputError, SourceError
from streamconv.output.journal import JOURNAL_NAME
from tests import api
from tests.support import Faults, Save, contents, no_half_files, tiny


@pytest.mark.usefixtures("frequent_journal_entries")
@pytest.mark.parametrize("call", ["fsync", "fdatasync", "replace", "pwrite", "write", "posix_fallocate"])
def test_disk_on_which_one_call_always_fails_is_an_error(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    source, _ = save(tiny())
    with monkeypatch.context() as patch:
        Faults(patch, (call,), errno.EIO)
        with pytest.raises(OutputError, match=r"Input/output error\. Choose another place"):
            api.convert(source, tmp_path / "out")
    if call == "replace":  # everything was written and synced, but no file was renamed into place
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            JOURNAL_NAME, ".model.safetensors.streamconv-incomplete"
        }  # fmt: skip
        assert api.convert(source, tmp_path / "out").resumed_bytes > 0
    else:
        assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("frequent_journal_entries")
def test_conversion_is_resumed_after_a_read_error(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = save(tiny())
    api.convert(source, tmp_path / "whole")
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
            api.convert(source, tmp_path / "out")
    assert api.convert(source, tmp_path / "out").resumed_bytes > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("frequent_journal_entries")
def test_short_writes_and_reads_are_completed(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = save(tiny())
    api.convert(source, tmp_path / "whole")
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: max(1, len(data) // 2)], at))
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: preadv(fd, [to[0][: max(1, len(to[0]) // 2)]], at))
    api.convert(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: 0)
    with pytest.raises(OutputError, match="the disk takes no more bytes"):
        api.convert(source, tmp_path / "never")


@pytest.mark.usefixtures("frequent_journal_entries")
@pytest.mark.parametrize("shard_size", ["5GB", "300KB"])
def test_output_folder_that_disappears_is_an_error(tmp_path: Path, save: Save, shard_size: str) -> None:
    source, _ = save(tiny())

    def progress(what: str, done: int, total: int, unit: str) -> None:
        if unit == "bytes" and 0.4 * total < done < 0.6 * total:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)

    with pytest.raises(OutputError, match=r"(was removed while it was written|is gone)\. Run the same command again"):
        api.convert(source, tmp_path / "out", max_shard_size=shard_size, progress=progress)
    api.convert(source, tmp_path / "whole", max_shard_size=shard_size)
    api.convert(source, tmp_path / "out", max_shard_size=shard_size)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("frequent_journal_entries")
@pytest.mark.parametrize("shard_size", ["5GB", "300KB"])
@pytest.mark.parametrize("reserves", [True, False])
def test_conversion_is_resumed_after_the_disk_filled_up(
    tmp_path: Path, save: Save, small_disk: Path, monkeypatch: pytest.MonkeyPatch, shard_size: str, reserves: bool
) -> None:
    """On a real small disk. If blocks cannot be reserved, a full disk is noticed when they are written."""
    source, _ = save(tiny())
    api.convert(source, tmp_path / "whole", max_shard_size=shard_size)
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
        api.convert(source, out, max_shard_size=shard_size, progress=progress)
    assert filler.exists()
    assert no_half_files(out, contents(tmp_path / "whole"))
    filler.unlink()
    assert api.convert(source, out, max_shard_size=shard_size).resumed_bytes > 0
    assert contents(out) == contents(tmp_path / "whole")


def test_too_small_or_read_only_disk_is_refused_before_writing(tmp_path: Path, save: Save, small_disk: Path) -> None:
    source, _ = save(tiny(layers=4, hidden=256))
    with pytest.raises(OutputError, match=r"needs [\d,]+ bytes and its disk has [\d,]+ free\. Make room"):
        api.convert(source, small_disk / "out")
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
