"""Converting from an address straight to the Hub with one shard on disk, over real HTTP on both sides."""

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from streamconv import OutputError, UsageError, errors
from streamconv.hub.card import MARKER
from tests import api
from tests.file_server import FileServer
from tests.hub_server import HubServer
from tests.support import HUB_SHARD_SIZE, require_uploaded_folder, to_hub


def on_disk(folder: Path) -> int:
    """Return the disk space of the files in a folder, in bytes."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(path, name)).st_blocks * 512
    return total


class Watch(threading.Thread):
    """Measures the maximum disk space of a folder while the block runs."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.folder, self.most, self.is_over = folder, 0, False

    def run(self) -> None:
        while not self.is_over:
            self.most = max(self.most, on_disk(self.folder))

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.is_over = True
        self.join()


def test_hub_receives_the_folder_while_the_disk_holds_one_shard(
    hub: HubServer, server: FileServer, remote_hub_model: str, tmp_path: Path
) -> None:
    with Watch(tmp_path / "stage") as watch:
        done = to_hub(remote_hub_model, tmp_path / "stage")
    assert done.conversion.seconds > 0
    largest = max(shard.size for shard in done.conversion.plan.shards)
    assert len(done.conversion.plan.shards) > 3
    assert largest <= watch.most < largest + (256 << 10)
    assert not (tmp_path / "stage").exists()
    assert not (tmp_path / "torch").exists()
    assert len(hub.repos["ada/it"].branches["main"]) == 2  # the first is the repository's own
    assert done.published is not None
    require_uploaded_folder(hub, server, tmp_path)


@pytest.mark.parametrize("at", ["uploading", "writing", "committing"])
def test_interrupted_run_uploads_no_shard_twice(
    hub: HubServer, server: FileServer, remote_hub_model: str, tmp_path: Path, at: str
) -> None:
    seen: list[str] = []

    def interrupt(what: str, done: int, total: int, unit: str) -> None:
        if what.startswith(at) and (at not in ("uploading", "writing") or "00003-of" in what):
            raise KeyboardInterrupt
        seen.append(what)

    with pytest.raises(KeyboardInterrupt):
        to_hub(remote_hub_model, tmp_path / "stage", progress=interrupt)
    assert len(hub.repos["ada/it"].branches["main"]) == 1
    sent = dict(hub.uploads)
    assert len(sent) >= 2
    server.sent = 0
    done = to_hub(remote_hub_model, tmp_path / "stage")
    assert set(hub.uploads.values()) == {1}
    assert done.conversion.resumed_bytes >= 2 * 2_000_000
    require_uploaded_folder(hub, server, tmp_path)
    assert not (tmp_path / "stage").exists()


def test_shard_lost_by_the_hub_is_uploaded_again(
    hub: HubServer, server: FileServer, remote_hub_model: str, tmp_path: Path
) -> None:
    def stop(what: str, *rest: Any) -> None:
        if what.startswith("committing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_hub(remote_hub_model, tmp_path / "stage", progress=stop)
    lost = next(iter(hub.blobs))
    del hub.blobs[lost]
    with pytest.raises(errors.MissingUploadError, match="Run the same command again"):
        to_hub(remote_hub_model, tmp_path / "stage")
    to_hub(remote_hub_model, tmp_path / "stage")
    require_uploaded_folder(hub, server, tmp_path)


def test_shard_changed_on_disk_is_not_uploaded(
    hub: HubServer, remote_hub_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["streamconv.jobs.convert_to_hub"]  # whose name the function of the same name hides
    write_shard = module.write_shard

    def write_and_rot(shard: Any, work: Any, *args: Any) -> Any:
        found = write_shard(shard, work, *args)
        with open(work.path / shard.filename, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
        return found

    monkeypatch.setattr(module, "write_shard", write_and_rot)
    with pytest.raises(OutputError, match="has changed since it was written"):
        to_hub(remote_hub_model, tmp_path / "stage")
    assert not hub.uploads


def test_finished_folder_is_not_used_as_a_staging_folder(hub: HubServer, remote_hub_model: str, tmp_path: Path) -> None:
    api.convert(remote_hub_model, tmp_path / "out", stream=True, max_shard_size=HUB_SHARD_SIZE)
    before = {path.name for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UsageError, match="holds the finished model, which would be deleted"):
        to_hub(remote_hub_model, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == before


def test_unrelated_files_in_the_staging_folder_are_kept(hub: HubServer, remote_hub_model: str, tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "notes.txt").write_text("mine")
    to_hub(remote_hub_model, tmp_path / "stage")
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["notes.txt"]


def test_another_repository_receives_every_shard(
    hub: HubServer, server: FileServer, remote_hub_model: str, tmp_path: Path
) -> None:
    def stop(what: str, *rest: Any) -> None:
        if what.startswith("committing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_hub(remote_hub_model, tmp_path / "stage", progress=stop)
    shards = len(hub.uploads)
    hub.uploads.clear()
    hub.blobs.clear()
    to_hub(remote_hub_model, tmp_path / "stage", repository="other")
    assert len(hub.uploads) == shards
    assert hub.files("ada/other").keys() > {"model.safetensors.index.json"}


def test_own_card_is_used_and_an_existing_card_is_kept(hub: HubServer, remote_hub_model: str, tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "README.md").write_text("mine")
    to_hub(remote_hub_model, tmp_path / "stage")
    assert hub.files("ada/it")["README.md"] == b"mine"
    assert (tmp_path / "stage" / "README.md").read_text() == "mine"
    (tmp_path / "stage" / "README.md").unlink()
    to_hub(remote_hub_model, tmp_path / "stage")
    assert hub.files("ada/it")["README.md"] == b"mine"
    hub.put("ada/it", {"README.md": f"{MARKER} -->\nA card of an earlier run.\n".encode()})
    to_hub(remote_hub_model, tmp_path / "stage")
    assert b"Not verified" in hub.files("ada/it")["README.md"]
