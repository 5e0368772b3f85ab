"""What a Dask worker reports of itself before it gets work."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from streamconv._version import __version__
from streamconv.jobs.dask.task import WRITE_BYTES, inspect_worker


def worker(threads: int, memory_limit: int | None) -> SimpleNamespace:
    memory = SimpleNamespace(memory_limit=memory_limit)
    return SimpleNamespace(state=SimpleNamespace(nthreads=threads), memory_manager=memory)


@pytest.mark.parametrize(
    ("threads", "memory_limit", "files"),
    [
        (8, None, 8),
        (8, 8 * WRITE_BYTES, 8),
        (8, 4 * WRITE_BYTES - 1, 3),
        (8, WRITE_BYTES // 2, 1),
        (1, 8 * WRITE_BYTES, 1),
    ],
)
def test_worker_writes_as_many_files_as_its_threads_and_memory_allow(
    threads: int, memory_limit: int | None, files: int
) -> None:
    assert inspect_worker({}, "", "", worker(threads, memory_limit)) == (__version__, files, [])


def test_worker_names_what_it_cannot_reach(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    (tmp_path / "x.pth").write_bytes(b"12345")
    here = {str(tmp_path / "x.pth"): 5}
    assert inspect_worker(here, str(tmp_path), "there", worker(1, None))[2] == []
    sources = {str(tmp_path / "x.pth"): 6, str(tmp_path / "y.pth"): 5}
    folder, other_size, missing = inspect_worker(sources, str(tmp_path), "elsewhere", worker(1, None))[2]
    assert folder.startswith(f"{tmp_path} is another folder there, or does not exist (host ")
    assert other_size.startswith(f"{tmp_path}/x.pth has 5 bytes there, not 6 (host ")
    assert missing.startswith(f"{tmp_path}/y.pth: No such file or directory (host ")
