"""The library logs to "streamconv" the events that the operator of a service looks for, and no secrets."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import streamconv
from streamconv import Cancelled, Destination, PushOptions
from streamconv.output.files import temporary_path
from tests import api
from tests.checkpoints import make_states
from tests.file_server import FileServer
from tests.hub_server import TOKEN, HubServer
from tests.support import Save, interrupt_after, run, run_python, sha256_of, tiny

Logged = Callable[[int], list[str]]


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Logged:
    """Return a function that returns, and forgets, the library's messages of a level."""
    caplog.set_level(logging.DEBUG, "streamconv")

    def messages(level: int) -> list[str]:
        ours = [record for record in caplog.records if record.name.startswith("streamconv.")]
        found = [record.getMessage() for record in ours if record.levelno == level]
        caplog.clear()
        return found

    return messages


def test_library_prints_no_log_line_unless_the_program_wants_it() -> None:
    code = (
        "import logging, sys, streamconv; sys.stderr = sys.stdout\n"
        "log = logging.getLogger('streamconv.files.remote'); log.warning('retried')\n"
        "logging.basicConfig(stream=sys.stdout, format='%(name)s %(message)s'); log.warning('again')"
    )
    assert run_python(code) == "streamconv.files.remote again\n"


def test_written_files_are_logged_with_their_sha256(save: Save, tmp_path: Path, logged: Logged) -> None:
    out = api.convert(save(tiny())[0], tmp_path / "out", max_shard_size="1MB").output
    shards = sorted(out.glob("*.safetensors"))
    assert logged(logging.INFO) == [
        f"wrote {path}, {path.stat().st_size} bytes, sha256 {sha256_of(path)}" for path in shards
    ]


@pytest.mark.usefixtures("frequent_journal_entries")
def test_resuming_and_starting_over_are_logged_with_the_reason(save: Save, tmp_path: Path, logged: Logged) -> None:
    source, _ = save(tiny())
    file = tmp_path / "out" / "model.safetensors"
    interrupt_after(source, tmp_path / "out", 0.5)
    interrupt_after(source, tmp_path / "out", 0.9)
    (resumed,) = logged(logging.INFO)
    assert resumed.startswith(f"resuming {file} at byte ")
    with open(temporary_path(file), "r+b") as partial:
        partial.seek(10_000)
        partial.write(b"damage")
    interrupt_after(source, tmp_path / "out", 0.9)
    (damaged,) = logged(logging.WARNING)
    assert damaged.endswith(f"Writing all of {file} again.")
    temporary_path(file).unlink()
    api.convert(source, tmp_path / "out")
    assert logged(logging.INFO)[0] == f"starting over with {file}, because its unfinished file was removed"


@pytest.mark.usefixtures("frequent_journal_entries")
def test_download_is_logged_and_so_is_the_source_that_changed_meanwhile(
    server: FileServer, save: Save, tmp_path: Path, logged: Logged
) -> None:
    save(tiny(), "served/x")

    def cancel(step: str, done: int, total: int, unit: str) -> None:
        if done > total // 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        api.convert(f"{server.url}/x.pth", tmp_path / "out", progress=cancel)
    torch.save(make_states(tiny(), seed=1)[0], server.folder / "x.pth")
    logged(logging.INFO)
    api.convert(f"{server.url}/x.pth", tmp_path / "out")
    (cached,) = (tmp_path / "torch" / "hub" / "checkpoints").rglob("x.pth")
    lines = logged(logging.INFO)
    assert lines[0] == f"starting over with {cached}, because the file changed"
    assert f"downloaded {server.url}/x.pth to {cached}" in lines


def test_checks_and_uploads_are_logged(hub: HubServer, save: Save, tmp_path: Path, logged: Logged) -> None:
    folder = api.convert(save(tiny())[0], tmp_path / "out").output
    logged(logging.INFO)
    streamconv.verify(folder)
    assert logged(logging.INFO) == [
        "files: passed: every file is as it was written, according to streamconv.json",
    ]
    done = streamconv.publish(folder, PushOptions(Destination("it"), unverified=True))
    assert logged(logging.INFO) == ["uploaded model.safetensors to ada/it", f"committed {done.url}"]
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    streamconv.verify(folder)
    (failed,) = logged(logging.INFO)
    assert failed.startswith("files: failed: model.safetensors has 1,000 bytes")


def test_no_log_line_shows_a_password_a_signed_query_or_a_token(
    server: FileServer, hub: HubServer, save: Save, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "streamconv")
    save(tiny(), "served/x")
    server.faults.redirects = {"/start": "/x.pth?signature=SECRET"}
    address = f"{server.url}/start?key=SECRET".replace("://", "://ada:SECRET@")
    server.faults.statuses = [503, 503]
    push = PushOptions(Destination("it"), unverified=True)
    options = streamconv.ConversionOptions(stream=True)
    streamconv.run(address, tmp_path / "out", options, None, push)
    messages = [record.getMessage() for record in caplog.records]
    for expected in ("trying again in", "redirects to", "requesting bytes", "wrote", "uploaded", "committed"):
        assert any(expected in message for message in messages), expected
    assert "SECRET" not in caplog.text
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(("options", "is_shown"), [([], True), (["-q"], False), (["-v"], True)])
def test_command_line_shows_a_retried_connection_unless_it_is_quiet(
    server: FileServer, save: Save, tmp_path: Path, options: list[str], is_shown: bool
) -> None:
    save(tiny(), "served/x")
    server.faults.statuses = [503, 503]
    done = run("convert", f"{server.url}/x.pth?key=SECRET", "-o", "out", "--stream", *options, cwd=tmp_path)
    assert done.returncode == 0
    assert ("the server answered 503" in done.stderr) == is_shown
    assert ("wrote" in done.stderr) == ("-v" in options)
    assert "SECRET" not in done.stderr
    assert len(logging.getLogger("streamconv").handlers) == 1  # the library's own, which prints nothing


def test_a_request_to_the_hub_that_is_retried_is_logged(
    hub: HubServer, save: Save, tmp_path: Path, logged: Logged
) -> None:
    folder = api.convert(save(tiny())[0], tmp_path / "out").output
    hub.fail("POST /api/repos/create", status=503, body={}, times=1)
    streamconv.publish(folder, PushOptions(Destination("it"), unverified=True))
    assert logged(logging.WARNING) == ["ada/it cannot be created; trying again in 1 s"]
