"""Publishing to a small Hub over real HTTP, whose docstring lists what it does not model, and once to the real Hub."""

import json
import logging
import os
import re
import shutil
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard, constants, get_token
from huggingface_hub.utils import _http, are_progress_bars_disabled, enable_progress_bars, get_session
from huggingface_hub.utils import logging as hub_logging

import streamconv
from streamconv import PushOptions
from streamconv.errors import HubError, MissingUploadError, OutputError, StreamconvError, UsageError
from streamconv.hub import client, transport
from streamconv.hub.destination import Destination
from streamconv.hub.repository import Repository
from streamconv.jobs.publish import publish_folder
from streamconv.output.manifest import Manifest
from streamconv.source.cache import Download
from streamconv.source.outputs import remember_output
from tests import api
from tests.hub_server import READ_TOKEN, TOKEN, HubServer, Repo, fine_grained, running, who
from tests.support import PUBLISHED, Ran, Save, run, run_python, run_with_hub, sha256_of, tiny

UNVERIFIED = PushOptions(unverified=True)
SMALL = {"config.json", "preprocessor_config.json", "streamconv.json", "model.safetensors.index.json"}


@pytest.fixture
def folder(tmp_path: Path, save: Save) -> Path:
    """A finished conversion in several shards."""
    done = api.convert(save(tiny())[0], tmp_path / "out", max_shard_size="1MB")
    assert len(done.shards) > 2
    return done.output


def pushed(folder: Path, **wanted: Any) -> str:
    repository = Repository(Destination(**{"repo": "it", **wanted}), None)
    return publish_folder(folder, repository, push=UNVERIFIED).url


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def commits(hub: HubServer, branch: str = "main") -> int:
    return len(hub.repos["ada/it"].branches[branch])


@pytest.mark.transformers
@pytest.mark.parametrize("multipart", [False, True])
def test_folder_arrives_byte_for_byte_in_one_commit(hub: HubServer, folder: Path, multipart: bool) -> None:
    hub.multipart = multipart
    (folder / "notes.txt").write_text("mine")
    address = pushed(folder)
    arrived = hub.files("ada/it")
    assert arrived.keys() == {*SMALL, *(path.name for path in shards(folder)), "README.md", ".gitattributes"}
    assert all(arrived[path.name] == path.read_bytes() for path in folder.iterdir() if path.name != "notes.txt")
    assert commits(hub) == 2  # the first is the repository's own
    assert address == f"{hub.url}/ada/it/commit/{hub.repos['ada/it'].branches['main'][-1][0]}"
    assert not hub.repos["ada/it"].private


def test_own_readme_is_used_as_the_card(hub: HubServer, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    pushed(folder)
    assert hub.files("ada/it")["README.md"] == (folder / "README.md").read_bytes()


def test_foreign_card_is_kept_and_our_own_is_updated(hub: HubServer, folder: Path) -> None:
    hub.put("ada/it", {"README.md": b"theirs"})
    pushed(folder)
    assert hub.files("ada/it")["README.md"] == b"theirs"
    hub.put("ada/new", {"config.json": b"{}"})
    pushed(folder, repo="new")
    first = hub.files("ada/new")["README.md"]
    manifest = json.loads((folder / "streamconv.json").read_text())
    (folder / "streamconv.json").write_text(json.dumps({**manifest, "is_crc_checked": False}))
    pushed(folder, repo="new")
    assert hub.files("ada/new")["README.md"] != first


def test_uploaded_files_are_not_sent_again(hub: HubServer, folder: Path) -> None:
    hub.fail(f"PUT /upload/{sha256_of(shards(folder)[-1])}", status=403, body={"error": "no"}, times=1)
    with pytest.raises(HubError):
        pushed(folder)
    assert sum(hub.uploads.values()) == len(shards(folder)) - 1
    assert commits(hub) == 1  # nothing is visible
    pushed(folder)
    assert set(hub.uploads.values()) == {1}
    assert len(hub.uploads) == len(shards(folder))
    address = pushed(folder)
    assert commits(hub) == 2  # the same once more makes no commit
    assert address.endswith(hub.repos["ada/it"].branches["main"][-1][0])


@pytest.mark.transformers
def test_another_process_can_commit_files_that_were_deleted_after_their_upload(hub: HubServer, folder: Path) -> None:
    data = {path.name: path.read_bytes() for path in shards(folder)}
    first, *rest = shards(folder)
    one = Repository(Destination("it"), None)
    one.create()
    one.upload(first, first.name, sha256_of(first))
    digest, size = sha256_of(first), first.stat().st_size
    first.unlink()
    two = Repository(Destination("it"), None)
    two.create()
    two.restore(first.name, size, digest)
    for path in rest:
        two.upload(path, path.name, sha256_of(path))
        path.unlink()
    two.commit({"config.json": b"{}", "index": folder / "model.safetensors.index.json"}, "all")
    arrived = hub.files("ada/it")
    assert {name: arrived[name] for name in data} == data
    assert arrived["config.json"] == b"{}"
    assert arrived["index"] == (folder / "model.safetensors.index.json").read_bytes()
    assert set(hub.uploads.values()) == {1}
    assert len(hub.requests("objects/batch")) == len(data)  # the Hub was not asked about restored files
    assert commits(hub) == 2


@pytest.mark.transformers
def test_lost_upload_is_named(hub: HubServer, folder: Path) -> None:
    repository = Repository(Destination("it"), None)
    repository.create()
    repository.restore("model.safetensors", 5, "a" * 64)
    with pytest.raises(MissingUploadError, match=r"no longer has .* earlier: model\.safetensors") as caught:
        repository.commit({"config.json": b"{}"}, "all")
    assert caught.value.names == ("model.safetensors",)
    assert commits(hub) == 1


def test_changed_files_are_named_before_anything_is_changed_on_the_hub(hub: HubServer, folder: Path) -> None:
    names = [shards(folder)[1].name, "config.json"]
    before = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).write_bytes(before[name][:-2] + b" }")
    with pytest.raises(OutputError, match=rf": {names[0]}, config\.json was changed after .* Convert again, which"):
        pushed(folder)
    (folder / names[0]).write_bytes(before[names[0]])
    command = re.escape(f"`streamconv verify {folder} source.pth`")
    with pytest.raises(OutputError, match=rf": config\.json was changed after .* edits: {command}\.$"):
        pushed(folder)
    (folder / "config.json").unlink()
    shards(folder)[0].write_bytes(b"")
    with pytest.raises(
        OutputError, match=rf"{shards(folder)[0].name} was changed .*, and config\.json is missing\. Conv"
    ):
        pushed(folder)
    assert not hub.requests("^(POST|PUT)")


def test_folder_without_a_valid_manifest_is_not_published(hub: HubServer, folder: Path) -> None:
    path = folder / "streamconv.json"
    manifest = json.loads(path.read_text())
    for files, message in (({"../secret": {"size": 1, "sha256": "00"}}, "names '../secret'"), ({}, "files is empty")):
        path.write_text(json.dumps({**manifest, "files": files}))
        with pytest.raises(OutputError, match=rf"streamconv\.json is damaged: its field .*{message}"):
            pushed(folder)
    path.unlink()
    with pytest.raises(OutputError, match=r"has no streamconv\.json"):
        pushed(folder)
    assert not hub.requests("POST")


@pytest.mark.parametrize("revision", [None, "new", "old"])
def test_foreign_weights_in_the_repository_are_listed_and_nothing_is_changed(
    hub: HubServer, folder: Path, revision: str | None
) -> None:
    others = {"pytorch_model.bin": b"1", "adapter_config.json": b"{}"}
    hub.put("ada/it", {**others, "sub/x.bin": b"2", "notes.md": b"3", "model.safetensors": b"4"})
    if revision == "old":  # this branch has none, unlike main
        hub.put("ada/it", {"model.safetensors": b"4"}, "old")
        repository = Repository(Destination("it", revision="old"), None)
        with pytest.raises(HubError, match=r"ada/it at old already holds model\.safetensors, which"):
            publish_folder(folder, repository, push=UNVERIFIED)
    else:
        with pytest.raises(HubError, match=r"holds adapter_config\.json, pytorch_model\.bin, which .* Delete them"):
            Repository(Destination("it", revision=revision), None)
    assert not hub.requests("^(POST|PUT)")


def test_foreign_weights_that_appear_during_the_upload_stop_the_commit(hub: HubServer, folder: Path) -> None:
    repository = Repository(Destination("it"), None)
    repository.create()
    hub.put("ada/it", {"model.safetensors": b"4"})
    with pytest.raises(HubError, match=r"already holds model\.safetensors"):
        repository.commit({"config.json": b"{}"}, "all")
    assert commits(hub) == 2


@pytest.mark.transformers
def test_invalid_destinations_are_refused_before_anything_is_changed(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.users["hf_fine"] = who(fine_grained("repo.content.read"))
    hub.put("ada/public", {"notes": b""})
    hub.repos["eve/gated"] = Repo(private=False, gated=True)
    for kind, message, token, wanted, default in (
        (HubError, "no token for pushing", None, Destination("it"), None),
        (HubError, r"not accepted \(401\).* write access", "hf_wrong", Destination("it"), None),
        (HubError, "is read-only", READ_TOKEN, Destination("it"), None),
        (HubError, "is read-only", "hf_fine", Destination("it"), None),
        (HubError, "exists and is public", TOKEN, Destination("public", private=True), None),
        (HubError, "access to the repository is restricted", TOKEN, Destination("eve/gated"), None),
        (UsageError, "needs a name", TOKEN, Destination(), None),
        (UsageError, "not a valid repository name", TOKEN, Destination("a/b/c"), None),
        (UsageError, "not a valid repository name", TOKEN, Destination("it--is"), None),
        (UsageError, "not a valid repository name", TOKEN, Destination("my models"), None),
    ):
        monkeypatch.setenv("HF_TOKEN", token or "")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(kind, match=message):
            Repository(wanted, default)
    assert not hub.requests("^(POST|PUT)")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert Repository(Destination(), "dinov2-small").id == "ada/dinov2-small"
    (tmp_path / "token").write_text(TOKEN)  # the hub's login
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert Repository(Destination("it"), None).id == "ada/it"


def test_unreachable_hub_and_offline_mode_are_reported_at_once(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError, match=r"127\.0\.0\.1:1 cannot be reached"):
        Repository(Destination("it"), None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        Repository(Destination("it"), None)


STEPS = (
    "GET /api/models/ada/it",
    "POST /api/repos/create",
    "POST /api/models/ada/it/branch/new",
    "POST /api/models/ada/it/preupload/new",
    "POST /ada/it.git/info/lfs/objects/batch",
    "PUT /upload/",
    "POST /ada/it.git/info/lfs/objects/verify",
    "POST /api/models/ada/it/commit/new",
)


FAULTS: tuple[dict[str, Any], ...] = (
    {"status": 503, "body": {}, "times": 2},
    {"cut_after": 10, "times": 2},
    {"late": True},
)


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        # The other version of huggingface_hub is tested with each step and each fault, but not with every pair.
        pytest.param(step, fault, marks=[pytest.mark.transformers] if (i + j) % 3 == 0 else [])
        for i, step in enumerate(STEPS)
        for j, fault in enumerate(FAULTS)
    ],
)
def test_temporary_fault_at_any_step_changes_nothing(
    hub: HubServer, folder: Path, step: str, fault: dict[str, Any]
) -> None:
    """This includes faults after which the Hub had done its work, and only the response was lost."""
    hub.fail(step, **fault)
    pushed(folder, revision="new")
    assert not any(fault.times for fault in hub.faults)
    arrived = hub.files("ada/it", "new")
    assert all(arrived[path.name] == path.read_bytes() for path in folder.iterdir())
    assert commits(hub, "new") == 2
    assert commits(hub) == 1


@pytest.mark.parametrize(
    ("step", "fault", "message"),
    [
        ("POST /api/repos/create", {"status": 401, "body": {"error": "x"}}, r"not accepted \(401\)"),
        ("POST /api/models/ada/it/preupload", {"status": 403, "body": {"error": "x"}}, r"permission \(403\): x\."),
        ("POST /ada/it.git", {"status": 403, "body": {"error": "Private storage limit reached"}}, "no storage left"),
        ("POST /api/models/ada/it/commit", {"status": 402, "body": {"error": "pay"}}, "no storage left"),
        ("POST /api/models/ada/it/commit", {"status": 404, "body": {"error": "x"}}, "repository does not exist"),
        ("POST /api/models/ada/it/commit", {"status": 412, "body": {"error": "A commit"}}, "at the same time"),
        ("POST /api/models/ada/it/commit", {"status": 429, "body": {"error": "x"}}, "too many requests"),
        ("POST /api/models/ada/it/commit", {"status": 500, "body": {"error": "x"}}, r"an internal error \(500\)"),
        ("POST /api/models/ada/it/commit", {"status": 418, "body": {"error": "tea"}}, r"the request \(418\): tea"),
        ("PUT /upload", {"cut_after": 100}, "cannot be reached, or the connection broke"),
    ],
)  # fmt: skip
def test_permanent_fault_is_reported_in_one_message_with_a_fix(
    hub: HubServer, folder: Path, step: str, fault: dict[str, Any], message: str
) -> None:
    hub.fail(step, times=1000, **fault)
    with pytest.raises(HubError, match=message) as caught:
        pushed(folder)
    message = str(caught.value)
    assert "Run the same command again" in message or "hf auth login" in message
    assert "\n" not in message
    assert len(message) < 500
    assert "ada/it" not in hub.repos or commits(hub) == 1


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("HTTP_PROXY", "http://me:p4ssw0rd@h:bad", r"cannot use the proxy h:bad .* Set HTTP_PROXY to"),
        ("ALL_PROXY", "ftp://me:p4ssw0rd@h:1", r"cannot use the proxy h:1 .* Set HTTP_PROXY to"),
        ("HTTP_PROXY", "http://me:p4ssw0rd@127.0.0.1:9", r"cannot be reached.* \(\[Errno 111\] Connection refused\)"),
        ("SSL_CERT_FILE", "/nonexistent", r"certificates in /nonexistent, which SSL_CERT_FILE names, cannot be read"),
    ],
)
def test_environment_that_allows_no_connection_is_named(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, setting: str, value: str, message: str
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv(setting, value)
    if setting == "HTTP_PROXY":
        monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    with pytest.raises(HubError, match=message) as caught:
        Repository(Destination("it"), None)
    assert "p4ssw0rd" not in str(caught.value)


@pytest.mark.transformers
@pytest.mark.parametrize("body", [b"<html>Log in to use this network</html>", "text", ["a list"], {"name": 1}])
def test_login_page_of_a_network_is_not_taken_for_the_hub(hub: HubServer, body: Any) -> None:
    if isinstance(body, bytes):
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(body)
        hub.fail("GET /api/whoami", drips=head + body)
    else:
        hub.fail("GET /api/whoami", status=200, body=body)
    with pytest.raises(HubError, match=r"token cannot be used: http.* does not answer like the Hub\. Check HF_"):
        Repository(Destination("it"), None)


@pytest.mark.transformers
def test_missing_pull_request_is_reported(hub: HubServer, folder: Path) -> None:
    with pytest.raises(HubError, match=r"the revision does not exist: .* Choose another --revision"):
        pushed(folder, revision="refs/pr/9")


@pytest.mark.transformers
def test_error_inside_a_batch_response_is_reported(hub: HubServer, folder: Path) -> None:
    error = {
        "oid": sha256_of(shards(folder)[0]),
        "size": 1,
        "error": {"code": 413, "message": "storage quota exceeded"},
    }
    hub.fail("POST /ada/it.git", status=200, body={"objects": [error]}, times=100)
    with pytest.raises(HubError, match="no storage left"):
        pushed(folder)


@pytest.fixture
def restored_process(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo `configure_process` after the test."""
    factory = "_GLOBAL_CLIENT_FACTORY" if hasattr(_http, "_GLOBAL_CLIENT_FACTORY") else "_GLOBAL_BACKEND_FACTORY"
    monkeypatch.setattr(_http, factory, getattr(_http, factory))
    verbosity = hub_logging.get_verbosity()
    yield
    enable_progress_bars()
    hub_logging.set_verbosity(verbosity)


@pytest.mark.transformers
@pytest.mark.usefixtures("restored_process")
def test_unresponsive_hub_times_out_in_the_command_lines_process(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(client, "RETRY_DELAYS", ())
    transport.configure_process()
    hub.fail("GET /api/whoami")
    with pytest.raises(HubError, match="does not respond in time"):
        Repository(Destination("it"), None)
    repository = Repository(Destination("it"), None)
    repository.create()
    hub.fail("POST /api/models/ada/it/commit")
    with pytest.raises(HubError, match="does not respond in time"):
        repository.commit({"config.json": b"{}"}, "all")


@pytest.mark.transformers
@pytest.mark.skipif(not hasattr(_http, "set_client_factory"), reason="huggingface_hub before 1.0 uses requests")
@pytest.mark.usefixtures("restored_process")
@pytest.mark.parametrize(
    ("what", "start"),
    [
        ("PUT /upload", b"HTTP/1.1 200 OK\r\nA: b"),
        (r"POST /ada/it\.git/info/lfs/objects/batch", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"),
    ],
)
def test_upload_of_the_command_line_ends_if_the_hub_drips_its_response(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, what: str, start: bytes
) -> None:
    monkeypatch.setattr(transport, "ANSWER_SECONDS", 0.5)
    transport.configure_process()
    hub.fail(what, drips=start)
    started = time.monotonic()
    with pytest.raises(
        HubError, match=r"cannot be uploaded to ada/it: the Hub did not send a complete response within 0 s"
    ):
        pushed(folder)
    assert time.monotonic() - started < 5
    monkeypatch.setattr(transport, "ANSWER_SECONDS", 300)
    assert pushed(folder)  # the same call again succeeds


@pytest.mark.usefixtures("restored_process")
@pytest.mark.parametrize("name", ["Retry-After", "RateLimit"])
def test_hub_that_asks_to_wait_for_years_is_asked_again_soon(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    transport.configure_process()
    value = {"Retry-After": "99999999", "RateLimit": '"api";r=0;t=99999999'}[name]
    hub.fail("PUT /upload", status=429, body={}, headers={name: value})
    assert pushed(folder)
    assert max(waits) < 300


def process_settings() -> list[object]:
    """Return huggingface_hub's settings that hold for the whole process, and the warnings' filters."""
    session: Any = get_session()
    timeout = getattr(session, "timeout", None)
    level = logging.getLogger("huggingface_hub").level
    # A client has no other state that a push could change; before 1.0, each thread has its own.
    return [id(session), timeout, vars(session).get("request"), are_progress_bars_disabled(), level, *warnings.filters]


@pytest.mark.transformers
def test_hub_that_does_not_answer_in_full_is_an_error(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fail("GET /api/whoami")
    monkeypatch.setattr(transport, "ANSWER_SECONDS", 0.2)
    with pytest.raises(HubError, match="The token cannot be used: the Hub did not send a complete response within 0 s"):
        Repository(Destination("ada/it"), None)
    assert client.HubClient().call("x", Event().wait, 0.4, is_upload=True) is False  # which may take longer


def test_pushes_in_two_threads_change_no_setting_of_the_process(hub: HubServer, folder: Path) -> None:
    before = process_settings()
    seen: list[bool] = []

    def push(name: str) -> str:
        own = process_settings() if hasattr(_http, "reset_sessions") else before
        repository = Repository(Destination(name), None)
        publish_folder(folder, repository, lambda *_: seen.append(process_settings() == own), UNVERIFIED)
        return repository.id

    hub.fail("POST /api/models/ada/.*/commit", status=503, body={}, times=2)  # also while a call is retried
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(push, ("one", "two"))) == ["ada/one", "ada/two"]
    assert len(seen) > 4
    assert all(seen)
    assert process_settings() == before


@pytest.mark.transformers
def test_concurrent_commit_is_not_overwritten(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other commit is made between our look at the revision and our commit."""
    repository = Repository(Destination("it"), None)
    repository.create()
    create_commit = HfApi.create_commit

    def commit_late(*args: Any, **options: Any) -> Any:
        hub.put("ada/it", {"pytorch_model.bin": b"1"})
        return create_commit(*args, **options)

    monkeypatch.setattr(HfApi, "create_commit", commit_late)
    with pytest.raises(HubError, match=r"at the same time \(412\)"):
        repository.commit({"config.json": b"{}"}, "all")
    assert hub.files("ada/it").keys() == {"pytorch_model.bin"}


def test_branches_pull_requests_and_private_repositories_are_supported(hub: HubServer, folder: Path) -> None:
    pushed(folder, revision="v1", private=True)
    assert hub.repos["ada/it"].private
    assert hub.files("ada/it").keys() == {".gitattributes"}
    assert "config.json" in hub.files("ada/it", "v1")
    address = pushed(folder, create_pr=True, private=True)
    assert address == f"{hub.url}/ada/it/discussions/1"
    assert hub.files("ada/it").keys() == {".gitattributes"}
    assert "config.json" in hub.files("ada/it", "refs/pr/1")
    assert set(hub.uploads.values()) == {1}


def test_pull_request_is_not_opened_twice_if_the_response_is_lost(hub: HubServer, folder: Path) -> None:
    hub.fail("POST /api/models/ada/it/commit", late=True)
    with pytest.raises(HubError):
        pushed(folder, create_pr=True)
    assert hub.repos["ada/it"].pull_requests == 1


@pytest.mark.transformers
def test_token_is_sent_to_the_hub_only_and_never_shown(
    hub: HubServer, folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """A server that echoes the request's headers does not reveal it, at any step."""
    caplog.set_level(logging.INFO)  # at DEBUG, the HTTP library itself logs every header that it receives
    caplog.set_level(logging.DEBUG, "huggingface_hub")
    for step in ("GET /api/whoami", *(step.replace("new", "main") for step in STEPS if "branch" not in step)):
        for status in (400, 401, 403):
            body = {"error": "you sent {authorization}"}
            hub.fail(step, status=status, body=body, headers={"X-Error-Message": f"no, Bearer {TOKEN}"}, times=1000)
            with pytest.raises(StreamconvError) as caught:
                pushed(folder)
            error = caught.value
            assert error.__cause__ is None
            assert error.__context__ is None
            shown = "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error))
            assert TOKEN not in shown
            assert "aSecretSignature" not in shown
            assert ("***" in shown) == ("PUT" not in step or "Bearer" in shown)  # it was echoed, and is hidden
            for kept in (hub.faults, hub.repos, hub.blobs):
                kept.clear()
    pushed(folder)
    written = capfd.readouterr()
    assert TOKEN not in caplog.text + written.out + written.err
    assert all(TOKEN.encode() not in path.read_bytes() for path in folder.iterdir())
    assert all(TOKEN.encode() not in data for data in hub.files("ada/it").values())
    assert {token for part, _, token in hub.log if part == "cdn"} == {None}
    assert {token for part, word, token in hub.log if "ada/it" in word} == {TOKEN}


def test_converting_does_not_import_huggingface_hub() -> None:
    code = (
        "import sys, streamconv.cli.commands, streamconv.hub.repository, streamconv.hub.card; "
        "print('huggingface_hub' in sys.modules)"
    )
    assert run_python(code) == "False\n"


def test_failed_publishing_exits_with_4_and_can_be_repeated(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    words = ("run", backbone, "-o", "out", "--no-verify", "--push-unverified", "--push-to-hub", "it")
    with running() as hub:
        hub.fail("POST /api/repos/create", status=403, body={"error": "no, {authorization}"})
        done = run_with_hub(hub, tmp_path, *words, "--json")
        assert done.returncode == 4
        assert done.stderr.splitlines()[-1].startswith("error: ada/it cannot be created: the token lacks")
        assert TOKEN not in done.stdout + done.stderr
        assert json.loads(done.stdout)["published"] is None
        hub.fail("PUT /upload", status=503, body={})
        done = run_with_hub(hub, tmp_path, *words)
        assert done.returncode == 0
        assert "aSecretSignature" not in done.stderr  # as huggingface_hub's own log would show it when it retries
        assert not hub.faults[-1].times
        assert "Not verified" in hub.files("ada/it")["README.md"].decode()


def repository_of(done: Ran) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].removeprefix("published: ").rpartition("/commit/")[0]


def record_download(path: Path) -> None:
    """Record that a file was downloaded from its authors' URL."""
    state = path.stat()
    Download(
        PUBLISHED["address"], state.st_size, "", (), True, "2026-01-31",
        is_published=True, modified_ns=state.st_mtime_ns, changed_ns=state.st_ctime_ns,
    ).write(path)  # fmt: skip


def test_only_the_authors_file_is_published_under_its_name(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is known by the record of its download. Another file in torch.hub's cache is used, but not vouched for."""
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    cached = streamconv.synth("dinov2_vits14", cache / "dinov2_vits14_pretrain.pth").backbone
    options = ("--no-verify", "--push-unverified", "--push-to-hub")
    done = run("run", "dinov2_vits14", *options, cwd=tmp_path)
    assert (done.returncode, "not known to be its own. Name the repository" in done.stderr) == (2, True)
    record_download(cached)
    for source in ("dinov2_vits14", "facebook/dinov2-small", cached):
        done = run("run", source, *options, cwd=tmp_path)
        assert repository_of(done) == f"{hub.url}/ada/dinov2-small" or "nothing was changed" in done.stdout
        assert "base_model: facebook/dinov2-small" in hub.files("ada/dinov2-small")["README.md"].decode()
    copies = [tmp_path / "dinov2_vits14_pretrain.pth", tmp_path / "dinov2_vits14_finetuned.pth"]
    for number, copy in enumerate(copies):
        shutil.copy(cached, copy)
        done = run("run", copy, "-o", f"my model {number}", *options, cwd=tmp_path)
        assert repository_of(done) == f"{hub.url}/ada/my-model-{number}"
        assert f"pushing to {hub.url}/ada/my-model-{number}, a new repository: public" in done.stderr
        card = ModelCard(hub.files(f"ada/my-model-{number}")["README.md"].decode())
        assert not card.data.to_dict().keys() & {"license", "base_model"}
        done = run("run", copy, "-o", "DINOv2-small", *options, cwd=tmp_path)
        assert (done.returncode, "not known to be its own. Name the repository" in done.stderr) == (2, True)
    (tmp_path / "elsewhere").mkdir()
    done = run("run", copies[0], *options, cwd=tmp_path / "elsewhere")  # into a folder dinov2-small
    assert (done.returncode, "not known to be its own. Name the repository" in done.stderr) == (2, True)
    done = run("run", copies[0], "-o", "other", *options, "dinov2-small", cwd=tmp_path)
    assert repository_of(done) == f"{hub.url}/ada/dinov2-small"
    assert "which is public" in done.stderr


def test_random_weights_are_not_published_under_a_published_name(hub: HubServer, tmp_path: Path) -> None:
    words = ("run", "dinov2_vits14", "--synthetic", "--no-verify", "--push-unverified", "--push-to-hub")
    done = run(*words, cwd=tmp_path)
    assert (done.returncode, "not known to be its own. Name the repository" in done.stderr) == (2, True)
    assert not (tmp_path / "dinov2-small").exists()
    done = run(*words, "-o", "random", cwd=tmp_path)
    assert repository_of(done) == f"{hub.url}/ada/random"
    assert "Random weights" in hub.files("ada/random")["README.md"].decode()


def test_folder_is_published_under_its_own_name_unless_it_is_the_published_model(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(folder.parent / "torch"))
    path, push = folder / "streamconv.json", PushOptions(unverified=True)
    manifest = json.loads(path.read_text())
    authors = {**manifest["source"]["backbone"], **PUBLISHED, "published": False}
    for model, source, name in (
        (None, authors, "ada/out"),
        ("dinov2_vits14", authors, "ada/out"),  # a name that proves nothing
        ("dinov2_vits14", {**authors, "published": True}, "ada/dinov2-small"),
        ("dinov2_vits14", {**authors, "published": True, "file": "x.pth"}, "ada/out"),
        ("dinov2_vits14_1layer", {**authors, "published": True}, "ada/out"),  # the head is another file
    ):
        path.write_text(json.dumps({**manifest, "model": model, "source": {"backbone": source}}))
        written = Manifest.read(folder)
        assert written is not None
        remember_output(written.source, written.files)
        assert streamconv.publish(folder, push).repository == name
    monkeypatch.chdir(folder)
    assert streamconv.publish(".", push).repository == "ada/out"
    for given, name in (("a b--c.git", "a-b-c"), ("-möd..el.", "m-d-el")):
        folder = folder.rename(folder.with_name(given))
        assert streamconv.publish(folder, push).repository == f"ada/{name}"
    for given, message in (("dinov2-base", "known to be its own"), ("…", "has no name for a repository")):
        folder = folder.rename(folder.with_name(given))
        with pytest.raises(UsageError, match=message):
            streamconv.publish(folder, push)


def test_publishing_mistakes_end_in_one_message_before_anything_is_converted(
    hub: HubServer, tmp_path: Path, save: Save
) -> None:
    backbone, _ = save(tiny())
    there = {path.name for path in tmp_path.iterdir()}
    push = ("run", backbone, "-o", "out", "--push-to-hub")
    hub.put("ada/full", {"pytorch_model.bin": b"1"})
    for code, message, words, token in (
        (2, "took dinov2_vits14 as the repository's name", ("run", "--push-to-hub", "dinov2_vits14"), TOKEN),
        (2, "but it is a source", ("run", "--push-to-hub", backbone, "-o", "out"), TOKEN),
        (2, "but it is a source", ("run", "--push_to_hub", "https://example.org/x.pth"), TOKEN),
        (2, "--private needs --push-to-hub", ("run", backbone, "-o", "out", "--private"), TOKEN),
        (2, "--revision and --create-pr need", ("run", backbone, "--revision", "x", "--create-pr"), TOKEN),
        (2, "--push-unverified needs", ("run", backbone, "--push-unverified"), TOKEN),
        (2, "Unverified models are not pushed", (*push, "it", "--no-verify"), TOKEN),
        (2, "revision's name is empty", (*push, "it", "--revision", ""), TOKEN),
        (2, "Name the repository", ("run", backbone, "-o", "dinov2-base", "--push-to-hub"), TOKEN),
        (2, "is not a list of tags", (*push, "it", "--tag", "a\nb"), TOKEN),
        (2, "--license and --tag need --push-to-hub", ("run", backbone, "--license", "mit", "--tag", "x"), TOKEN),
        (2, 'licence "other" needs a name and a link', (*push, "it", "--license", "other"), TOKEN),
        (2, "not a valid repository name", (*push, "a b"), TOKEN),
        (4, "no token for pushing", (*push, "it"), ""),
        (4, "not accepted (401)", (*push, "it"), "hf_wrong"),
        (4, "is read-only", (*push, "it"), READ_TOKEN),
        (4, "pytorch_model.bin, which", (*push, "full"), TOKEN),
        (4, "eve is neither your account, ada, nor an organisation", (*push, "eve/it"), TOKEN),
    ):
        done = run(*words, cwd=tmp_path, HF_TOKEN=token, HF_HOME=str(tmp_path / "hf"))
        assert done.returncode == code, (words, done.stderr)
        assert message in done.stderr, (words, done.stderr)
        assert done.stderr.count("error: ") == 1
        assert "hf_" not in done.stderr.replace("hf_wrong", "") or "HF_TOKEN" in done.stderr
        assert done.stdout == ""
    assert not hub.requests("^(POST|PUT)")
    assert {path.name for path in tmp_path.iterdir()} - {"hf"} == there


@pytest.mark.hub
@pytest.mark.skipif(
    os.environ["HF_HUB_OFFLINE"] != "0" or not get_token(),
    reason="needs the real Hub, HF_HUB_OFFLINE=0, and a token that may write",
)
def test_real_hub_accepts_resumes_and_returns_the_folder(folder: Path) -> None:
    hub_api = HfApi(token=get_token())
    repository = Repository(Destination(f"streamconv-test-{os.getpid()}-{time.time_ns()}", private=True), None)
    try:
        publish_folder(folder, repository, push=UNVERIFIED)
        again = Repository(Destination(repository.id, private=True), None)
        first, *rest = shards(folder)
        again.restore(first.name, first.stat().st_size, sha256_of(first))
        for path in rest:
            again.upload(path, path.name, sha256_of(path))
        again.commit({"config.json": b'{"changed": true}'}, "resumed")
        for path in folder.iterdir():
            got = Path(hub_api.hf_hub_download(repository.id, path.name)).read_bytes()
            assert got == path.read_bytes() or path.name == "config.json"
        lost = Repository(Destination(repository.id, private=True), None)
        lost.restore(first.name, 5, "a" * 64)
        with pytest.raises(MissingUploadError):
            lost.commit({}, "lost")
    finally:
        hub_api.delete_repo(repository.id, missing_ok=True)
