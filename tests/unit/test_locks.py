"""File systems without locks: a lock file keeps other processes away, and one of a dead process is no obstacle."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from threading import Barrier, Thread

import pytest

from streamconv import OutputError
from streamconv.output import fallbacks, locks, processes
from streamconv.output.files import temporary_path, write_file
from streamconv.output.locks import LockedError, LockedFile, open_exclusive, require_unlocked
from streamconv.output.processes import Process


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallbacks, "_found", {})


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL], ids=errno.errorcode.get)
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_locks(monkeypatch, request.param)


@pytest.fixture
def dead() -> Process:
    """A process of this system that has ended."""
    code = "from streamconv.output.processes import Process; import json, dataclasses as d\n"
    code += "print(json.dumps(d.asdict(Process.this())))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return Process(**json.loads(done.stdout))


def refuse_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def leave_lock(path: Path, process: Process) -> Path:
    lock = path.with_name(f"{path.name}.lock")
    lock.write_text(json.dumps(asdict(process)))
    return lock


@pytest.mark.usefixtures("no_locks")
def test_file_is_locked_by_a_lock_file_until_it_is_closed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x"
    file = open_exclusive(path)
    held = Process(**{k: v for k, v in json.loads((tmp_path / "x.lock").read_bytes()).items() if k != "key"})
    assert (held.pid, held.is_here, held.is_dead) == (os.getpid(), True, False)
    for attempt in (open_exclusive, require_unlocked):
        with pytest.raises(LockedError) as caught:
            attempt(path)
        assert caught.value.message(path) == f"{path} is being written by {held}. Let it finish, or end it."
    file.close()
    assert [each.name for each in tmp_path.iterdir()] == ["x"]
    open_exclusive(path).close()
    (record,) = caplog.records  # once for a file system
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"The file system of {tmp_path} has no file locks (")
    assert fallbacks.lacks_of(tmp_path) == (record.getMessage().removeprefix(f"The file system of {tmp_path} ")[:-1],)


@pytest.mark.parametrize("number", [errno.EIO, errno.EBADF, errno.ESTALE], ids=errno.errorcode.get)
def test_other_errors_of_locking_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    refuse_locks(monkeypatch, number)
    with pytest.raises(OutputError, match=os.strerror(number)):
        write_file(tmp_path / "x", b"mine")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES], ids=errno.errorcode.get)
def test_lock_that_another_process_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse_locks(monkeypatch, number)
    with pytest.raises(OutputError, match="being written by another process"):
        write_file(tmp_path / "x", b"mine")


@pytest.mark.parametrize("has_locks", [True, False])
def test_lock_file_of_a_dead_process_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: Process, has_locks: bool
) -> None:
    if not has_locks:
        refuse_locks(monkeypatch, errno.ENOSYS)
    assert dead.is_dead
    leave_lock(tmp_path / "x", dead)
    require_unlocked(tmp_path / "x")
    assert (tmp_path / "x.lock").exists()  # it changes nothing
    file = open_exclusive(tmp_path / "x")
    assert (tmp_path / "x.lock").exists() != has_locks
    file.close()
    assert [each.name for each in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("has_locks", [True, False])
@pytest.mark.parametrize(
    "change",
    [{"host": "node7"}, {"system": "another boot, or a container with other process ids"}],
    ids=["another host", "another system"],
)
def test_lock_file_of_another_host_is_named_with_how_to_remove_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: Process, change: dict[str, str], has_locks: bool
) -> None:
    if not has_locks:
        refuse_locks(monkeypatch, errno.ENOSYS)
    other = replace(dead, **change)
    lock = leave_lock(temporary_path(tmp_path / "x"), other)
    with pytest.raises(OutputError) as caught:
        write_file(tmp_path / "x", b"mine")
    assert str(caught.value) == (
        f"{tmp_path / 'x'} is being written by process {other.pid} on {other.host}, since {other.since}, unless "
        f"that process was killed. Let it finish. If it no longer runs, delete {lock} and run the same command again."
    )
    assert list(tmp_path.iterdir()) == [lock]  # not even an empty file was created
    lock.unlink()
    write_file(tmp_path / "x", b"mine")


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize("contents", [b"", b"{", b"[]", b'{"pid": "x"}'])
def test_lock_file_that_cannot_be_read_is_named(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "x.lock").write_bytes(contents)
    with pytest.raises(LockedError) as caught:
        open_exclusive(tmp_path / "x")
    assert "another process, unless that process was killed. Let it finish. If it no longer runs, delete " in (
        caught.value.message(tmp_path / "x")
    )


def test_process_is_dead_if_its_id_was_given_to_another_one() -> None:
    this = Process.this()
    assert not this.is_dead
    assert replace(this, start="1").is_dead
    assert not replace(this, start="1", host="node7").is_dead


def test_process_that_nobody_has_waited_for_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = replace(Process.this(), pid=child.pid, start=processes._start_of(child.pid) or "")
    assert not process.is_dead
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, but stays in the table of processes
    assert process.is_dead
    child.communicate()
    assert process.is_dead


def test_system_that_hides_its_processes_never_declares_one_dead_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    this = Process.this()
    monkeypatch.setattr(processes, "_start_of", lambda pid: None)
    assert not this.is_dead
    assert replace(this, pid=2**22 - 1).is_dead


def test_process_of_a_hostile_lock_file_is_named_in_few_visible_characters() -> None:
    shown = str(Process(1, "\x1b[2J\nerror: ", "x" * 1_000_000, "", ""))
    assert shown.isprintable()
    assert len(shown) < 200


@pytest.mark.usefixtures("no_locks")
def test_only_one_of_many_takes_over_a_dead_process_lock(tmp_path: Path, dead: Process) -> None:
    for _ in range(20):
        leave_lock(tmp_path / "x", dead)
        barrier, taken = Barrier(4), []

        def take(barrier: Barrier = barrier, taken: list[LockedFile] = taken) -> None:
            barrier.wait()
            with suppress(LockedError):
                taken.append(open_exclusive(tmp_path / "x"))

        threads = [Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 1
        assert taken[0].is_still_ours()
        taken[0].close()
        assert [each.name for each in tmp_path.iterdir()] == ["x"]


@pytest.mark.usefixtures("no_locks")
def test_file_whose_lock_file_was_removed_is_no_longer_ours(tmp_path: Path) -> None:
    first = open_exclusive(tmp_path / "x")
    (tmp_path / "x.lock").unlink()
    second = open_exclusive(tmp_path / "x")
    assert not first.is_still_ours()
    first.close()  # which leaves the other's lock file
    assert second.is_still_ours()
    second.close()


@pytest.mark.usefixtures("no_locks")
def test_small_file_is_written_without_locks(tmp_path: Path) -> None:
    write_file(tmp_path / "x", b"whole")
    assert (tmp_path / "x").read_bytes() == b"whole"
    assert [each.name for each in tmp_path.iterdir()] == ["x"]


@pytest.fixture
def fsync_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.usefixtures("fsync_fails")
def test_file_system_that_syncs_nothing_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_file(tmp_path / "x", b"whole")
    assert (tmp_path / "x").read_bytes() == b"whole"
    files, folders = (record.getMessage() for record in caplog.records)
    assert "cannot sync files (Invalid argument): after a power cut, check them with `streamconv verify`" in files
    assert "cannot sync folders (Invalid argument): after a power cut" in folders


def test_folder_that_cannot_be_opened_for_reading_is_not_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECTORY:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    write_file(tmp_path / "x", b"whole")
    assert "cannot sync folders (Permission denied)" in fallbacks.lacks_of(tmp_path)[0]


def test_lock_path_is_hidden_beside_a_hidden_file() -> None:
    assert locks._lock_path(temporary_path(Path("a/x"))) == Path("a/.x.streamconv-incomplete.lock")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_start_of_a_process_of_any_name_is_known() -> None:
    name, this = Path("/proc/self/comm"), Process.this()
    before = name.read_bytes()
    name.write_bytes(b"\xff\n) Z (")
    try:
        assert replace(Process.this(), since=this.since) == this
        assert not this.is_dead
    finally:
        name.write_bytes(before)
