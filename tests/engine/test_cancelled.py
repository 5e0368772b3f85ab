"""An exception of a callback ends any job as it is: never retried, never wrapped, and the same call resumes."""

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

import streamconv
from streamconv import Cancelled, ConversionOptions, Destination, Progress, PushOptions
from tests import api
from tests.checkpoints import converted_folder
from tests.file_server import FileServer
from tests.hub_server import HubServer
from tests.support import Raising, Save, contents, model_files, require_cancellable, tiny

FREQUENT = pytest.mark.usefixtures("frequent_journal_entries")


def files_in(folder: Path) -> Mapping[str, bytes]:
    """Return the complete files below a folder, except what records times of the source, or what was seen of it."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {
        path.name: path.read_bytes()
        for path in paths
        if path.name != "streamconv.json" and path.parent.name != "outputs"
    }


@FREQUENT
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_convert(save: Save, tmp_path: Path, dtype: str | None) -> None:
    source, _ = save(tiny())

    def job(folder: Path, progress: Progress) -> None:
        api.convert(source, folder / "out", max_shard_size="1MB", dtype=dtype, progress=progress)

    assert len(set(require_cancellable(job, tmp_path / "jobs", files_in))) > 1  # several shards


@FREQUENT
@pytest.mark.parametrize("stream", [False, True])
def test_convert_from_an_address(
    server: FileServer, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    save(tiny(), "served/x")

    def job(folder: Path, progress: Progress) -> None:
        monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
        api.convert(f"{server.url}/x.pth", folder / "out", stream=stream, progress=progress)

    steps = set(require_cancellable(job, tmp_path / "jobs", files_in))
    download = {"downloading x.pth", "checking x.pth"} if not stream else set()
    assert steps == download | {"writing model.safetensors"}


@FREQUENT
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_revert(tmp_path: Path, suffix: str) -> None:
    model = converted_folder(tmp_path, tiny(classes=900))

    def job(folder: Path, progress: Progress) -> None:
        paths = folder / f"x{suffix}", folder / f"head{suffix}"
        if not paths[0].exists():
            streamconv.revert(model, paths[0], head=paths[1], progress=progress)

    assert set(require_cancellable(job, tmp_path / "jobs", files_in)) == {f"writing {n}{suffix}" for n in ("x", "head")}


def test_synth_writes_both_files_or_none(tmp_path: Path) -> None:
    error, paths = Cancelled(), [tmp_path / f"dinov2_vits14_{part}.pth" for part in ("pretrain", "linear_head")]

    def cancel(step: str, done: int, total: int, unit: str) -> None:
        if step == "generating dinov2_vits14_linear_head.pth":
            raise error

    with pytest.raises(Cancelled) as caught:
        streamconv.synth("dinov2_vits14_1layer", paths[0], progress=cancel)
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []
    streamconv.synth("dinov2_vits14_1layer", paths[0])
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_publish(hub: HubServer, save: Save, tmp_path: Path) -> None:
    output = api.convert(save(tiny())[0], tmp_path / "model", max_shard_size="1MB").output

    def job(folder: Path, progress: Progress) -> None:
        push = PushOptions(Destination(folder.name), unverified=True)
        streamconv.publish(output, push, progress=progress)

    def published(folder: Path) -> Mapping[str, bytes]:
        name = f"ada/{folder.name}"
        files = hub.files(name) if name in hub.repos else {}
        return {name: data for name, data in files.items() if name in contents(output)}

    steps = require_cancellable(job, tmp_path / "jobs", published)
    assert steps[-1] == "committing to ada/whole"
    assert published(Path("whole")) == contents(output)


@FREQUENT
def test_conversion_straight_to_the_hub(hub: HubServer, server: FileServer, save: Save, tmp_path: Path) -> None:
    save(tiny(), "served/x")

    def job(folder: Path, progress: Progress) -> None:
        options = ConversionOptions(stream=True, max_shard_size="1MB")
        push = PushOptions(Destination(folder.name), unverified=True)
        streamconv.run(f"{server.url}/x.pth", folder / "out", options, None, push, progress=progress)

    def published(folder: Path) -> Mapping[str, bytes]:
        name = f"ada/{folder.name}"
        files = hub.files(name) if name in hub.repos else {}
        return {name: data for name, data in files.items() if name.startswith("model")}

    steps = require_cancellable(job, tmp_path / "jobs", published)
    assert steps[-1] == "committing to ada/whole"


def test_on_result_may_raise(save: Save, tmp_path: Path) -> None:
    source, _ = save(tiny())
    error = OSError("its own")
    with pytest.raises(OSError, match="its own") as caught:
        streamconv.run(source, tmp_path / "out", verification=None, on_result=Raising(error))
    assert caught.value is error
    assert streamconv.convert(source, tmp_path / "out").was_finished


def test_an_event_cancels_a_thread_that_asyncio_waits_for(save: Save, tmp_path: Path) -> None:
    """As in the docstring of Cancelled."""
    source, _ = save(tiny())
    stop, has_begun, may_go_on = threading.Event(), threading.Event(), threading.Event()

    def check(step: str, done: int, total: int, unit: str) -> None:
        has_begun.set()
        may_go_on.wait(60)
        if stop.is_set():
            raise Cancelled

    async def cancelled() -> None:
        task = asyncio.create_task(asyncio.to_thread(streamconv.convert, source, tmp_path / "out", progress=check))
        await asyncio.to_thread(has_begun.wait, 60)
        stop.set()
        may_go_on.set()
        with pytest.raises(Cancelled, match="The job was cancelled"):
            await task
        stop.clear()
        await asyncio.to_thread(streamconv.convert, source, tmp_path / "out", progress=check)

    asyncio.run(cancelled())
    api.convert(source, tmp_path / "whole")
    assert model_files(tmp_path / "out") == model_files(tmp_path / "whole")
