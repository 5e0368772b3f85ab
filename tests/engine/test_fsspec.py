"""Addresses that fsspec reads; its own memory:// stands in for remote stores."""

import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch

from streamconv import ChangedError, NetworkError, SourceError, SourceMissingError, UsageError
from streamconv.formats.checkpoint import open_checkpoint
from streamconv.tensors.evaluation import read_bytes
from tests import api
from tests.checkpoints import make_states
from tests.s3_server import Bucket
from tests.support import tiny


@pytest.fixture
def files() -> Iterator[Any]:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield memory
    memory.store.clear()


def put(files: Any, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    torch.save(make_states(tiny(layers=3, hidden=256), seed)[0], buffer)
    files.pipe_file("/bucket/x.pth", buffer.getvalue())
    return buffer.getvalue()


def test_store_is_read_by_ranges(files: Any, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(put(files))
    there = api.convert("memory://bucket/x.pth", tmp_path / "there", stream=True)
    here = api.convert(tmp_path / "x.pth", tmp_path / "here")
    assert there.shards == here.shards
    assert '"address": "memory://bucket/x.pth"' in (tmp_path / "there" / "streamconv.json").read_text()


def test_s3_is_read_by_ranges(bucket: Bucket, tmp_path: Path) -> None:
    """s3fs takes an object's version as the second argument, where other packages take the start of a range."""
    torch.save(make_states(tiny(layers=3, hidden=256))[0], tmp_path / "x.pth")
    bucket.put("x.pth", (tmp_path / "x.pth").read_bytes())
    there = api.convert(f"{bucket.url}/x.pth", tmp_path / "there", stream=True)
    assert there.shards == api.convert(tmp_path / "x.pth", tmp_path / "here").shards


def test_store_with_one_file_position_is_read_by_one_thread(tmp_path: Path) -> None:
    """tar:// reads one file with one position: four threads would mix up their bytes, and no CRC would detect it."""
    state = make_states(tiny(layers=4, hidden=512))[0]
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "x.safetensors", "x.safetensors")
    expected = api.convert(tmp_path / "x.safetensors", tmp_path / "here").shards
    for name in ("one", "two", "three"):
        place = f"tar://x.safetensors::{tmp_path}/x.tar"
        assert api.convert(place, tmp_path / name, stream=True).shards == expected


def test_failed_and_short_reads_are_retried(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(files)
    cat_file, calls = type(files).cat_file, 0

    def sometimes(self: Any, *args: Any, **kwargs: Any) -> bytes:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise RuntimeError("the store's own kind of error")
        data: bytes = cat_file(self, *args, **kwargs)
        return data[:-1] if calls % 5 == 0 else data

    monkeypatch.setattr(type(files), "cat_file", sometimes)
    with open_checkpoint("memory://bucket/x.pth") as checkpoint:
        for name, value in make_states(tiny(layers=3, hidden=256))[0].items():
            assert read_bytes(checkpoint[name]) == value.numpy().tobytes()
    assert calls > 15
    monkeypatch.setattr(type(files), "cat_file", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(NetworkError, match="ZeroDivisionError"):
        open_checkpoint("memory://bucket/x.pth")


def test_failures_to_open_are_retried(files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put(files)
    info, faults = type(files).info, [TimeoutError("slow"), RuntimeError("busy")]

    def sometimes(self: Any, *args: Any, **kwargs: Any) -> Any:
        if faults:
            raise faults.pop()
        return info(self, *args, **kwargs)

    monkeypatch.setattr(type(files), "info", sometimes)
    open_checkpoint("memory://bucket/x.pth").close()
    faults += [RuntimeError("\x1b[31mbusy")] * 20
    with pytest.raises(SourceError, match="cannot be read: RuntimeError") as caught:
        open_checkpoint("memory://bucket/x.pth")
    assert "\x1b" not in str(caught.value)


def test_errors_of_stores_show_no_secret(
    files: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no answer from https://me:SECRET@host/x.pth?signature=SECRET")

    monkeypatch.setattr(type(files), "info", fail)
    with pytest.raises(SourceError, match=r"no answer from https://host/x\.pth\. Check") as caught:
        open_checkpoint("memory://bucket/x.pth")
    monkeypatch.setattr("fsspec.core.url_to_fs", fail)
    with pytest.raises(SourceError, match=r"no answer from https://host/x\.pth\.$") as also_caught:
        open_checkpoint("memory://bucket/x.pth")
    assert "no answer" in caplog.text
    assert "SECRET" not in f"{caplog.text} {caught.value} {also_caught.value}"


def test_changed_file_is_refused(files: Any) -> None:
    put(files)
    with open_checkpoint("memory://bucket/x.pth") as checkpoint:
        file = checkpoint.files[0]
        file.require_unchanged()
        put(files, seed=1)
        with pytest.raises(ChangedError, match=r"memory://bucket/x\.pth was changed"):
            file.require_unchanged()


def test_download_from_a_store_is_used_until_the_store_has_another_version(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    read, cat_file = [0], type(files).cat_file

    def counting(self: Any, *args: Any, **kwargs: Any) -> bytes:
        data: bytes = cat_file(self, *args, **kwargs)
        read[0] += len(data)
        return data

    monkeypatch.setattr(type(files), "cat_file", counting)
    for seed in (0, 1):
        data = safetensors.torch.save(make_states(tiny(layers=3, hidden=256), seed)[0])
        files.pipe_file("/bucket/x.safetensors", data)
        (tmp_path / "x.safetensors").write_bytes(data)
        for folder, is_read in (("one", True), ("two", False)):
            read[0] = 0
            done = api.convert("memory://bucket/x.safetensors", tmp_path / f"{folder}{seed}")
            assert done.shards == api.convert(tmp_path / "x.safetensors", tmp_path / f"{folder}{seed}_local").shards
            assert (read[0] >= len(data)) == is_read
    assert caplog.text.count("it has changed on its server: downloading it again") == 1


def test_mistakes_are_reported_in_one_message(files: Any) -> None:
    put(files)
    with pytest.raises(SourceMissingError, match=r"memory://bucket/y\.pth: there is no such file"):
        open_checkpoint("memory://bucket/y.pth")
    with pytest.raises(SourceError, match="is not a file"):
        open_checkpoint("memory://bucket")
    with pytest.raises(UsageError, match=r"nosuch://a/b\.pth: Protocol not known"):
        open_checkpoint("nosuch://a/b.pth")
    with pytest.raises(UsageError, match="does not name a file"):
        open_checkpoint("memory://bucket/")


def test_missing_package_of_a_scheme_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    imported = sys.modules["fsspec.registry"].__dict__["_registry"]
    monkeypatch.delitem(imported, "s3", raising=False)  # another test may have imported it
    with pytest.raises(UsageError, match="s3fs"):
        open_checkpoint("s3://bucket/x.pth")
