"""Network file systems and those in user space: what they lack is replaced, and that is reported."""

import errno
import fcntl
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import streamconv
from streamconv import OutputError
from streamconv.output import fallbacks
from streamconv.output.files import temporary_path
from streamconv.output.journal import JOURNAL_NAME
from streamconv.output.processes import Process
from tests import api
from tests.file_server import FileServer
from tests.hub_server import HubServer
from tests.support import (
    Save,
    contents,
    interrupt_after,
    require_uploaded_folder,
    run,
    run_process,
    tiny,
    to_hub,
)

NOT_SUPPORTED = [errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL]
LOCK = f"{JOURNAL_NAME}.lock"
# For child processes: flock as on Lustre without the option flock.
NO_LOCKS = "import fcntl, os\ndef no(*args): raise OSError(38, os.strerror(38))\nfcntl.flock = no\n"


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallbacks, "_found", {})


@pytest.fixture
def source(save: Save) -> Path:
    return save(tiny())[0]


@pytest.fixture
def whole(tmp_path: Path, source: Path) -> dict[str, bytes]:
    """The files of a conversion on this machine's own file system."""
    return contents(api.convert(source, tmp_path / "whole").output)


def refuse(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: int) -> None:
    def call(*args: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, name, call)


def refuse_folder_sync(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)


def refuse_file_sync(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    for name in ("fsync", "fdatasync"):
        refuse(monkeypatch, os, name, number)


LACKS: dict[str, tuple[Callable[[pytest.MonkeyPatch, int], None], list[int], str]] = {
    "locks": (
        lambda patch, number: refuse(patch, fcntl, "flock", number), [*NOT_SUPPORTED, errno.ENOLCK],
        "has no file locks ({}): lock files keep other processes away instead",
    ),
    "folder sync": (refuse_folder_sync, [*NOT_SUPPORTED, errno.EBADF], "cannot sync folders ({}): after a power cut"),
    "file sync": (refuse_file_sync, NOT_SUPPORTED, "cannot sync files ({}): after a power cut, check them with"),
    "reserving": (
        lambda patch, number: refuse(patch, os, "posix_fallocate", number), NOT_SUPPORTED,
        "cannot reserve space ({}): a disk that is too small is noticed only once it is full",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("frequent_journal_entries")
@pytest.mark.parametrize(("lack", "number"), [(lack, each) for lack, found in LACKS.items() for each in found[1]])
def test_lack_of_a_file_system_is_replaced_and_reported_once(
    tmp_path: Path,
    source: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    lack: str,
    number: int,
) -> None:
    patch, _, text = LACKS[lack]
    patch(monkeypatch, number)
    interrupt_after(source, tmp_path / "out", 0.5)
    done = api.convert(source, tmp_path / "out")
    assert done.resumed_bytes > 0
    assert contents(tmp_path / "out") == whole
    notes = [note for note in done.disk_notes if note.startswith(text.format(os.strerror(number)))]
    assert len(notes) == 1
    assert done.as_dict()["disk_notes"] == done.disk_notes
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == len(done.disk_notes)
    for warning, note in zip(warnings, done.disk_notes, strict=True):
        assert re.fullmatch(rf"The file system of {tmp_path}(/out)? {re.escape(note)}\.", warning)
    assert api.convert(source, tmp_path / "out").was_finished


@pytest.mark.parametrize("call", ["flock", "posix_fallocate", "fsync"])
def test_error_of_a_failing_disk_is_not_hidden(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    refuse(monkeypatch, fcntl if call == "flock" else os, call, errno.EIO)
    with pytest.raises(OutputError, match="Input/output error"):
        api.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_advice_that_is_refused_is_not_mentioned(
    tmp_path: Path, source: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, os, "posix_fadvise", errno.EINVAL)
    done = api.convert(source, tmp_path / "out")
    assert contents(tmp_path / "out") == whole
    assert done.disk_notes == ()


def test_full_disk_is_noticed_without_reserving(
    tmp_path: Path, source: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, os, "posix_fallocate", errno.EOPNOTSUPP)
    monkeypatch.setattr(
        os, "statvfs", lambda path: SimpleNamespace(f_blocks=0, f_bavail=0, f_frsize=1)
    )  # it does not tell
    (small_disk / "filler").write_bytes(bytes(3 << 20))
    with pytest.raises(OutputError, match="No space left on device"):
        api.convert(source, small_disk / "out")
    (small_disk / "filler").unlink()
    api.convert(source, small_disk / "out")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EIO], ids=errno.errorcode.get)
def test_unknown_free_space_is_no_obstacle(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse(monkeypatch, os, "statvfs", number)
    if number == errno.EIO:
        with pytest.raises((OutputError, OSError)):
            api.convert(source, tmp_path / "out")
    else:
        api.convert(source, tmp_path / "out")


@pytest.mark.usefixtures("frequent_journal_entries")
def test_written_bytes_count_on_a_file_system_that_reports_no_blocks(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt_after(source, out, 0.7)
    size = (temporary_path(out / "model.safetensors")).stat().st_size
    real = Path.stat

    def no_blocks(path: Path, **options: Any) -> Any:
        state = real(path, **options)
        names = [name for name in dir(state) if name.startswith("st_")]
        return SimpleNamespace(**{**{name: getattr(state, name) for name in names}, "st_blocks": 0})

    monkeypatch.setattr(Path, "stat", no_blocks)
    free = size // 2  # enough for the rest only
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_blocks=9, f_bavail=free, f_frsize=1))
    assert api.convert(source, out).resumed_bytes > size // 2


@pytest.mark.usefixtures("frequent_journal_entries")
def test_lock_of_a_killed_process_is_taken_over_and_its_work_is_resumed(
    tmp_path: Path, source: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    code = NO_LOCKS + (
        "import streamconv\nfrom streamconv.output import writer as w, contents as c, hashing as h\n"
        "from streamconv.tensors import tiles as t\n"
        "c.BUFFER_BYTES = h.BUFFER_BYTES = 16 << 10; c.PIECE_BYTES = t.PIECE_BYTES = 8 << 10; w.SYNC_BYTES = 32 << 10\n"
        "seen = []\n"
        "def progress(*report):\n"
        "    seen.append(1)\n"
        "    if len(seen) == 60: os._exit(9)\n"
        f"streamconv.convert({str(source)!r}, {str(out)!r}, progress=progress)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert (out / LOCK).exists()
    refuse(monkeypatch, fcntl, "flock", errno.ENOSYS)
    assert api.convert(source, out).resumed_bytes > 0
    assert contents(out) == whole


def test_process_without_locks_is_named_and_a_preview_changes_nothing(tmp_path: Path, source: Path) -> None:
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "sitecustomize.py").write_text(NO_LOCKS)
    path = os.pathsep.join(filter(None, [str(tmp_path / "patch"), os.environ.get("PYTHONPATH", "")]))
    out, other = tmp_path / "out", Process(123, "node7", "2026-01-01T00:00:00Z", "boot", "1")
    code = (
        "import time, streamconv, streamconv.output.writer as s\n"
        "s.RecordChecks.add = lambda *args: print('writing', flush=True) or time.sleep(60)\n"
        f"streamconv.convert({str(source)!r}, {str(out)!r})"
    )
    first = subprocess.Popen([sys.executable, "-c", NO_LOCKS + code], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "writing\n"
    for words in ((), ("--dry-run",)):
        second = run_process("convert", source, "-o", out, *words, cwd=tmp_path, PYTHONPATH=path)
        assert second.returncode == 4
        assert re.search(
            rf"^error: .*out is being written by process {first.pid} on \S+, since 20\S+\. Let it finish, or end it\.$",
            second.stderr,
            re.MULTILINE,
        )
    first.kill()
    first.communicate()
    before = contents(out)
    done = run_process("convert", source, "-o", out, "--dry-run", cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert contents(out) == before
    (out / LOCK).write_text(json.dumps(vars(other)))
    third = run_process("convert", source, "-o", out, cwd=tmp_path, PYTHONPATH=path)
    assert third.returncode == 4
    assert "process 123 on node7" in third.stderr
    assert f"delete {out / LOCK} and run the same command again" in " ".join(third.stderr.split())
    (out / LOCK).unlink()
    done = run_process("convert", source, "-o", out, cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0
    assert "has no file locks (Function not implemented)" in " ".join(done.stderr.split())
    assert not (out / LOCK).exists()


def test_failed_conversion_without_locks_leaves_no_folder(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, fcntl, "flock", errno.ENOLCK)
    refuse(monkeypatch, os, "pwrite", errno.EIO)
    with pytest.raises(OutputError):
        api.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_revert_synth_report_and_manifest_need_no_locks(
    tmp_path: Path, source: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for patch, _, _ in LACKS.values():
        patch(monkeypatch, errno.ENOSYS)
    streamconv.revert(tmp_path / "whole", tmp_path / "back.safetensors")
    assert api.verify(tmp_path / "whole", report=tmp_path / "report.html").passed
    streamconv.synth("dinov2_vits14", tmp_path / "synthetic.pth")
    assert {path.name for path in tmp_path.iterdir()} == {
        "source.pth", "whole", "back.safetensors", "report.html", "synthetic.pth"
    }  # fmt: skip


def test_download_needs_no_locks_and_no_times(
    tmp_path: Path, save: Save, server: FileServer, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(tmp_path / "source.pth", server.folder / "x.pth")
    for patch, _, _ in LACKS.values():
        patch(monkeypatch, errno.EINVAL)
    refuse(monkeypatch, os, "utime", errno.EPERM)
    done = api.convert(f"{server.url}/x.pth", tmp_path / "out")
    assert contents(done.output)["model.safetensors"] == whole["model.safetensors"]
    cached = [path.name for path in (tmp_path / "torch").rglob("*") if path.is_file()]
    assert sorted(cached) == [".x.pth.streamconv-download.json", "x.pth"]


def test_staging_folder_of_an_upload_needs_no_locks(
    hub: HubServer, server: FileServer, remote_hub_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for patch, _, _ in LACKS.values():
        patch(monkeypatch, errno.EINVAL)
    done = to_hub(remote_hub_model, tmp_path / "stage")
    assert not (tmp_path / "stage").exists()
    assert len(done.conversion.disk_notes) == len(LACKS)
    require_uploaded_folder(hub, server, tmp_path)


def test_ramfs_which_reports_no_free_space_and_reserves_none_is_written_to(tmp_path: Path, source: Path) -> None:
    """A real file system of this kind."""
    (tmp_path / "ram").mkdir()
    if subprocess.run(["mount", "-t", "ramfs", "ramfs", tmp_path / "ram"], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        assert shutil.disk_usage(tmp_path / "ram").total == 0
        assert not api.convert(source, tmp_path / "ram" / "out").was_finished
        assert api.convert(source, tmp_path / "ram" / "out").was_finished
    finally:
        subprocess.run(["umount", tmp_path / "ram"], check=True)


def test_notes_are_in_the_json_and_the_terminal(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, fcntl, "flock", errno.ENOLCK)
    done = run("convert", source, "-o", "out", "--json", cwd=tmp_path)
    (note,) = json.loads(done.stdout)["disk_notes"]
    assert note == f"has no file locks ({os.strerror(errno.ENOLCK)}): lock files keep other processes away instead"
    monkeypatch.setattr(fallbacks, "_found", {})
    assert f"The file system of other {note}." in run("convert", source, "-o", "other", cwd=tmp_path).stderr
