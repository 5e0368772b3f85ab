"""Output files are complete or absent, and never another process's file."""

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamconv import OutputError
from streamconv.output.files import PAGE_BYTES, PageAligner, atomic_file, make_folder, temporary_path, write_file


def test_file_appears_under_its_name_only_when_complete(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "x") as file:
        file.write_at(0, memoryview(b"whole"))
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_failure_keeps_the_previous_file(tmp_path: Path) -> None:
    write_file(tmp_path / "x", b"before")
    writing = atomic_file(tmp_path / "x")
    writing.__enter__().write_at(0, memoryview(b"half"))
    assert not writing.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert (tmp_path / "x").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_temporary_file_of_a_dead_process_is_overwritten(tmp_path: Path) -> None:
    temporary_path(tmp_path / "x").write_bytes(b"a longer half file")
    write_file(tmp_path / "x", b"whole")
    assert (tmp_path / "x").read_bytes() == b"whole"


def test_second_writer_of_the_same_file_is_refused(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "x") as file:
        with pytest.raises(OutputError, match="being written by another process"):
            write_file(tmp_path / "x", b"other")
        file.write_at(0, memoryview(b"mine"))
    assert (tmp_path / "x").read_bytes() == b"mine"


def test_writer_that_locks_a_file_just_renamed_by_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock

    def late(fd: int, operation: int) -> None:
        os.replace(
            temporary_path(tmp_path / "x"), tmp_path / "x"
        )  # as the other process does, between our open and our lock
        real(fd, operation)

    temporary_path(tmp_path / "x").write_bytes(b"the other's")
    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(OutputError, match="being written by another process"):
        write_file(tmp_path / "x", b"mine")
    assert (tmp_path / "x").read_bytes() == b"the other's"


def test_link_at_the_temporary_path_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    temporary_path(tmp_path / "x").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="cannot be written"):
        write_file(tmp_path / "x", b"mine")
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_file_is_synced_before_the_rename_and_the_folder_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(f"sync {os.fstat(fd).st_size}") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda old, new: calls.append("name") or replace(old, new))
    write_file(tmp_path / "x", b"whole")
    assert calls == ["sync 5", "name", f"sync {tmp_path.stat().st_size}"]


@given(st.lists(st.binary(max_size=3 * PAGE_BYTES), max_size=7))
def test_aligned_pages_add_up_to_the_file(parts: list[bytes]) -> None:
    written, pages = bytearray(), PageAligner()
    for number, part in enumerate(parts):
        room = pages.next_window(memoryview(bytearray([number]) * (4 * PAGE_BYTES)))
        room[: len(part)] = part
        offset, data = pages.add(len(part))
        assert offset % PAGE_BYTES == len(data) % PAGE_BYTES == 0
        written[offset : offset + len(data)] = data
    whole = b"".join(parts)
    assert pages.position == len(whole)
    assert written[: len(whole)] == whole


@pytest.mark.parametrize(
    ("number", "is_error"),
    [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.ENOSYS, False), (errno.EBADF, False), (errno.EIO, True)],
)
def test_file_system_that_cannot_sync_folders_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_error: bool
) -> None:
    real, seen = os.fsync, 0

    def fsync(fd: int) -> None:
        nonlocal seen
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            seen += 1
            raise OSError(number, os.strerror(number))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match=os.strerror(number)) if is_error else nullcontext():
        write_file(tmp_path / "x", b"whole")
    assert (tmp_path / "x").read_bytes() == b"whole"
    with pytest.raises(OSError, match=os.strerror(number)) if is_error else nullcontext():
        make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").exists() != is_error
    assert seen > 1


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


def refuse_flag(real: Callable[..., Any], fd: int, command: int, *rest: int) -> Any:
    if command == fcntl.F_SETFL and rest[0] & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument")
    return real(fd, command, *rest)


def refuse_writes(real: Callable[..., Any], fd: int, data: memoryview, offset: int) -> Any:
    if is_direct(fd):
        raise OSError(errno.EINVAL, "Invalid argument")
    return real(fd, data, offset)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system has no such flag")
@pytest.mark.parametrize(
    ("module", "name", "refuse"),
    [(None, "", None), (fcntl, "fcntl", refuse_flag), (os, "pwrite", refuse_writes)],
    ids=["takes it", "refuses the flag", "refuses the write"],
)
def test_pages_bypass_the_cache_if_the_file_system_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, refuse: Any
) -> None:
    if refuse is not None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: refuse(real, *args))
    pages = memoryview(mmap.mmap(-1, 2 * PAGE_BYTES))
    pages[:] = os.urandom(len(pages))
    with atomic_file(tmp_path / "x") as file:
        file.write_at(0, memoryview(b"header"))
        file.write_pages(0, pages)
        file.write_pages(PAGE_BYTES, pages)
        if refuse is not None:
            assert not is_direct(file._fd)
        elif not is_direct(file._fd):
            pytest.skip("this file system has only its cache")
        file.truncate(2 * PAGE_BYTES + 5)
    assert (tmp_path / "x").read_bytes() == bytes(pages[:PAGE_BYTES]) + bytes(pages[: PAGE_BYTES + 5])


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system has no such flag")
def test_other_errors_of_direct_writes_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, data: memoryview, offset: int) -> int:
        if is_direct(fd):
            raise OSError(errno.EIO, "Input/output error")
        pytest.skip("this file system has only its cache")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OutputError, match="Input/output error"), atomic_file(tmp_path / "x") as file:
        file.write_pages(0, memoryview(mmap.mmap(-1, PAGE_BYTES)))
    assert list(tmp_path.iterdir()) == []
