"""Files are whole or absent, and no one else's."""

import fcntl
import os
from pathlib import Path

import pytest

from streamconv import OutputError
from streamconv.output import temporary_path, whole_file, write_file


def test_a_file_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    with whole_file(tmp_path / "x") as file:
        file.write_at(0, memoryview(b"whole"))
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    write_file(tmp_path / "x", b"before")
    writing = whole_file(tmp_path / "x")
    writing.__enter__().write_at(0, memoryview(b"half"))
    assert not writing.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert (tmp_path / "x").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_a_dead_process_left_is_written_over(tmp_path: Path) -> None:
    temporary_path(tmp_path / "x").write_bytes(b"a longer half file")
    write_file(tmp_path / "x", b"whole")
    assert (tmp_path / "x").read_bytes() == b"whole"


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    with whole_file(tmp_path / "x") as file:
        with pytest.raises(OutputError, match="being written by another process"):
            write_file(tmp_path / "x", b"other")
        file.write_at(0, memoryview(b"mine"))
    assert (tmp_path / "x").read_bytes() == b"mine"


def test_a_writer_that_opened_just_before_the_other_finished_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock

    def late(fd: int, operation: int) -> None:
        os.replace(temporary_path(tmp_path / "x"), tmp_path / "x")  # as the other does, between open and lock
        real(fd, operation)

    temporary_path(tmp_path / "x").write_bytes(b"the other's")
    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(OutputError, match="being written by another process"):
        write_file(tmp_path / "x", b"mine")
    assert (tmp_path / "x").read_bytes() == b"the other's"


def test_a_link_in_the_temporary_files_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    temporary_path(tmp_path / "x").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="cannot be written"):
        write_file(tmp_path / "x", b"mine")
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_is_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(f"sync {os.fstat(fd).st_size}") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda old, new: calls.append("name") or replace(old, new))
    write_file(tmp_path / "x", b"whole")
    assert calls == ["sync 5", "name", f"sync {tmp_path.stat().st_size}"]
