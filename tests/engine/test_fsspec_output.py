"""Outputs in stores that fsspec reaches; its own memory:// stands in for them."""

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from streamconv import Cancelled, OutputError, UsageError
from streamconv.files import slow
from streamconv.files.address import Address
from streamconv.output.stores import fsspec_store
from streamconv.output.stores.records import CONVERSION
from streamconv.progress import Progress
from tests import api
from tests.support import Raising, Save, contents, require_cancellable, tiny

URL = "memory://bucket/a"


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture
def source(save: Save, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fsspec_store, "BLOCK_BYTES", 64 << 10)
    return save(tiny(layers=2, hidden=64))[0]


def objects(memory: Any, prefix: str = "/bucket/a/") -> dict[str, bytes]:
    return {
        path.removeprefix(prefix): file.getvalue() for path, file in memory.store.items() if path.startswith(prefix)
    }


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "100KB"}])
def test_store_holds_the_same_objects_as_a_folder(
    memory: Any, source: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    done = api.convert(source, URL, **options)
    assert objects(memory) == contents(api.convert(source, tmp_path / "whole", **options).output)
    assert done.output == URL
    assert api.convert(source, URL, **options).was_finished


def test_complete_files_are_kept(memory: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "mv", failing(memory.mv, "model-00003"))
    with pytest.raises(OutputError, match=r"OSError: the store's own words"):
        api.convert(source, URL, max_shard_size="100KB")
    monkeypatch.undo()
    kept = {name: len(data) for name, data in objects(memory).items() if name.startswith("model")}
    assert len(kept) == 2
    done = api.convert(source, URL, max_shard_size="100KB")
    assert objects(memory) == contents(api.convert(source, tmp_path / "whole", max_shard_size="100KB").output)
    assert done.resumed_bytes == sum(kept.values())


def failing(real: Any, name: str) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        if any(name in str(each) for each in args):
            raise OSError("the store's own words, https://me:SECRET@host/x")
        return real(*args, **options)

    return call


def test_exceptions_of_callbacks_leave_an_output_that_is_resumed(memory: Any, source: Path, tmp_path: Path) -> None:
    def job(folder: Path, progress: Progress) -> None:
        api.convert(source, f"memory://bucket/{folder.name}", progress=progress)

    def outputs(folder: Path) -> dict[str, bytes]:
        return {n: data for n, data in objects(memory, f"/bucket/{folder.name}/").items() if ".streamconv" not in n}

    require_cancellable(job, tmp_path / "jobs", outputs)
    assert not [path for path in memory.store if "incomplete" in path]


def test_two_processes_may_write_the_same_object(memory: Any) -> None:
    stores = [fsspec_store.FsspecStore(Address(URL)) for _ in range(2)]
    for name in (CONVERSION, "model.safetensors"):
        uploads = [store.start(name, 5) for store in stores]
        for upload in uploads:
            upload.write(memoryview(b"bytes"))
        for upload in uploads:
            assert upload.complete().size == 5
        assert objects(memory)[name] == b"bytes"
    stores[0].start("model.safetensors", 5)  # its process is killed
    assert len(objects(memory)) == 3
    stores[1].abort_uploads(["model.safetensors"])
    assert objects(memory).keys() == {CONVERSION, "model.safetensors"}


def test_another_conversion_is_refused_and_replaced_with_force(memory: Any, source: Path, tmp_path: Path) -> None:
    memory.pipe_file("/bucket/a/notes.txt", b"foreign")
    api.convert(source, URL, max_shard_size="100KB")
    before = objects(memory)
    with pytest.raises(OutputError, match="holds another conversion"):
        api.convert(source, URL)
    assert objects(memory) == before
    api.convert(source, URL, force=True)
    whole = contents(api.convert(source, tmp_path / "whole").output)
    assert objects(memory) == {**whole, "notes.txt": b"foreign"}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hf://me/model", r"repository on the Hub.*--push-to-hub.*streamconv push"),
        ("zip://a::memory://x.zip", "chain of URLs"),
        ("nosuch://a/b", "Protocol not known"),
        ("reference://a/b", "cannot be written"),
        ("s3://bucket/a?key=SECRET", r"^s3://bucket/a was given with a query"),
        ("s3://bucket/a?b#c", "with a query"),  # messages would name another folder
        ("s3:/SECRET@bucket/a", r"^The output has one slash after s3:\. Write s3://BUCKET/FOLDER"),
    ],
)
def test_urls_that_cannot_be_written_to_are_refused(source: Path, url: str, message: str) -> None:
    with pytest.raises((OutputError, UsageError), match=message):
        api.convert(source, url)


def test_package_that_is_not_installed_is_named(source: Path) -> None:
    with pytest.raises(OutputError, match="oss://bucket/a cannot be written: Install ossfs"):
        api.convert(source, "oss://bucket/a")


def test_store_that_does_not_answer_is_given_up(memory: Any, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow, "RESPONSE_SECONDS", 0.1)
    monkeypatch.setattr(memory, "ls", lambda *args, **options: time.sleep(0.5))
    with pytest.raises(OutputError, match="did not respond within 0 s"):
        api.convert(source, URL)


def test_errors_show_no_secret(memory: Any, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "info", failing(memory.info, "model"))
    with pytest.raises(OutputError, match=r"own words, https://host/x\. Check the URL") as caught:
        api.convert(source, URL)
    assert "SECRET" not in str(caught.value)


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield gcsfs's file system of an emulator of Google Cloud Storage, which has an empty bucket, "bucket"."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # which speaks gRPC
    pytest.importorskip("gcsfs")
    server = pytest.importorskip("gcp_storage_emulator.server").create_server("127.0.0.1", 0, True, "bucket")
    server.start()
    port = server._api._httpd.server_port
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon", "endpoint_url": f"http://127.0.0.1:{port}"})
    files = fsspec.filesystem("gs")
    monkeypatch.setattr("gcsfs.retry.is_retriable", lambda error: False)  # the emulator cannot cancel uploads
    yield files
    server.stop()


@pytest.mark.usefixtures("frequent_journal_entries")  # small buffers
def test_google_cloud_storage_shows_complete_objects_only(
    google: Any, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fsspec_store, "BLOCK_BYTES", 256 << 10)  # the least that it takes
    source = save(tiny(layers=4))[0]
    stop = Raising(Cancelled(), 100)
    with pytest.raises(Cancelled):
        api.convert(source, "gs://bucket/a", progress=stop, max_shard_size="1MB")
    gc.collect()  # fsspec would complete a file that is deleted from memory
    google.invalidate_cache()
    whole = contents(api.convert(source, tmp_path / "whole", max_shard_size="1MB").output)
    begun = {path.rpartition("/")[2]: google.cat_file(path) for path in google.find("bucket")}
    weights = {name: data for name, data in begun.items() if name.endswith(".safetensors")}
    assert weights.items() < whole.items()
    assert weights
    done = api.convert(source, "gs://bucket/a", max_shard_size="1MB")
    google.invalidate_cache()
    assert {path.rpartition("/")[2]: google.cat_file(path) for path in google.find("bucket")} == whole
    assert done.resumed_bytes == sum(map(len, weights.values()))
    with pytest.raises(OutputError, match="Create the bucket"):
        api.convert(source, "gs://nobucket/a")
