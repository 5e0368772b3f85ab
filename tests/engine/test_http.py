"""Conversions over real HTTP on the loopback, with the faults of real servers and connections."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants

import streamconv
from streamconv import ChangedError, CorruptError, NetworkError, NoRangesError, SourceError, SourceMissingError
from streamconv.families.registry import find_model
from streamconv.files import client, remote, retries
from streamconv.files.remote import GAP_BYTES, WINDOW_BYTES
from streamconv.formats.checkpoint import open_checkpoint
from streamconv.tensors.evaluation import read_bytes
from tests import api
from tests.checkpoints import make_states
from tests.file_server import FileServer, serving
from tests.support import model_files, run_python, save_zeros, tiny

LARGE = tiny(layers=3, hidden=512)  # 38 MB


@pytest.fixture
def source(server: FileServer) -> str:
    """Return the address of a .pth of 38 MB."""
    torch.save(make_states(LARGE)[0], server.folder / "x.pth")
    return f"{server.url}/x.pth"


def require_the_same_from_the_file(server: FileServer, output: Path, **options: str) -> None:
    expected = output.with_name("expected")
    api.convert(server.folder / "x.pth", expected, **options)
    assert model_files(output) == model_files(expected)
    shutil.rmtree(expected)


@pytest.mark.parametrize(("max_shard_size", "shared"), [("5GB", 0), ("3MB", 3 * 3 * 512 * 512 * 4)])
def test_each_weight_is_fetched_once_and_the_output_equals_a_local_conversion(
    server: FileServer, source: str, tmp_path: Path, max_shard_size: str, shared: int
) -> None:
    """Except for records that shards share, such as a split qkv: the first shard reads all of them to check them."""
    done = api.convert(source, tmp_path / "out", stream=True, max_shard_size=max_shard_size)
    assert done.is_crc_checked
    size = (server.folder / "x.pth").stat().st_size
    records = 3 * 14 + 7
    assert size + shared <= server.sent < size + shared + 2 * WINDOW_BYTES + records * GAP_BYTES
    require_the_same_from_the_file(server, tmp_path / "out", max_shard_size=max_shard_size)
    manifest = json.loads((tmp_path / "out" / "streamconv.json").read_text())
    assert manifest["source"]["backbone"]["address"] == source
    assert server.connections <= remote.MAX_IN_FLIGHT + 1


def test_planning_a_remote_vit_g_reads_less_than_two_megabytes(server: FileServer) -> None:
    _, model = find_model("dinov2_vitg14")
    save_zeros(server.folder / "g.pth", model.dimensions)
    assert (server.folder / "g.pth").stat().st_size > 4_500_000_000
    planned = api.plan(f"{server.url}/g.pth")
    assert planned.model is model
    assert server.sent < 2_000_000
    assert len(server.requests) == 2


@pytest.mark.parametrize("save_as", ["torch", "ours"])
def test_record_positions_are_predicted_as_torch_writes_them(server: FileServer, save_as: str) -> None:
    state = {f"{'n' * i}x": torch.randn(i) for i in range(1, 130)}
    path = server.folder / "x.pth"
    torch.save(state, path)
    with open_checkpoint(path) as exact, open_checkpoint(f"{server.url}/x.pth", read_local_headers=False) as foreseen:
        assert {name: t.record.range for name, t in exact.items()} == {n: t.record.range for n, t in foreseen.items()}
        assert exact.fingerprint == foreseen.fingerprint
    assert len(server.requests) == 1


def test_zip_of_another_layout_is_read_by_its_local_headers(server: FileServer, tmp_path: Path) -> None:
    import zipfile

    torch.save(make_states(tiny())[0], tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as old, zipfile.ZipFile(server.folder / "x.pth", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with open_checkpoint(f"{server.url}/x.pth", read_local_headers=False) as checkpoint:
        value = torch.load(tmp_path / "x.pth", weights_only=True)["norm.weight"]
        assert read_bytes(checkpoint["norm.weight"]) == value.numpy().tobytes()


@pytest.mark.parametrize(
    ("after", "cuts", "resets"),
    [(0, 4, False), (1, 30, False), (100_000, 30, False), (2_000_000, 6, False), (2_000_000, 4, True)],
)
def test_cut_connection_is_resumed_at_the_same_byte(
    server: FileServer, source: str, tmp_path: Path, after: int, cuts: int, resets: bool
) -> None:
    server.faults.resets = resets
    begun: list[bool] = []

    def cut(what: str, done: int, total: int, unit: str) -> None:
        if unit == "bytes" and not begun:
            begun.append(True)
            server.faults.cut_after, server.faults.cuts = after, cuts

    api.convert(source, tmp_path / "out", stream=True, progress=cut)
    assert server.faults.cuts == 0
    assert server.sent < (server.folder / "x.pth").stat().st_size * 1.1 + (16 << 20)  # data in flight is lost
    require_the_same_from_the_file(server, tmp_path / "out")


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_busy_server_is_retried(
    server: FileServer, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    server.faults.statuses, server.faults.retry_after = [status] * 3, "0"
    api.convert(source, tmp_path / "out", stream=True)
    assert any(f"the server answered {status}" in what and "trying again" in what for what in caplog.messages)
    require_the_same_from_the_file(server, tmp_path / "out")


def test_silent_connection_times_out_and_is_retried(
    server: FileServer, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client, "TIMEOUT_SECONDS", 0.3)
    server.faults.stall = [
        0.0,
        0.6,
        0.6,
        0.6,
        0.0,
        0.6,
    ]  # an idle connection and the next one are retried without a message
    api.convert(source, tmp_path / "out", stream=True)
    assert any("timed out; trying again" in what for what in caplog.messages)
    require_the_same_from_the_file(server, tmp_path / "out")


def test_connection_that_stays_broken_is_an_error_and_the_conversion_can_be_resumed(
    server: FileServer, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamconv.output.writer.SYNC_BYTES", 1 << 20)
    size = (server.folder / "x.pth").stat().st_size
    half: list[int] = []

    def break_at_half(what: str, done: int, total: int, unit: str) -> None:
        if unit == "bytes" and done > total // 2 and not half:
            half.append(done)
            server.faults.cut_after, server.faults.cuts = 0, 1_000

    with pytest.raises(NetworkError, match=r"x\.pth cannot be read at byte .* it resumes from there"):
        api.convert(source, tmp_path / "out", stream=True, progress=break_at_half)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    server.faults.cuts, server.sent = 0, 0
    done = api.convert(source, tmp_path / "out", stream=True)
    assert done.resumed_bytes > half[0] - (4 << 20)
    assert server.sent < size - done.resumed_bytes + (2 << 20)
    require_the_same_from_the_file(server, tmp_path / "out")


@pytest.mark.parametrize("known_by", ["etag", "last_modified", "length"])
def test_remote_file_that_changes_while_it_is_read_is_refused(
    server: FileServer, source: str, tmp_path: Path, known_by: str
) -> None:
    """The new file has the same names and shapes, but other CRC-32s."""
    server.faults.etag, server.faults.last_modified = known_by == "etag", known_by == "last_modified"
    other = tmp_path / "x.pth"
    torch.save(make_states(LARGE, seed=1)[0], other)
    assert other.stat().st_size == (server.folder / "x.pth").stat().st_size
    if known_by == "length":
        with open(other, "ab") as file:
            file.write(b"more")
    os.utime(other, (1, 1))

    def change(what: str, done: int, total: int, unit: str) -> None:
        if unit == "bytes" and done > total // 4 and other.exists():
            os.replace(other, server.folder / "x.pth")

    with pytest.raises(ChangedError, match=r"x\.pth was changed while it was read"):
        api.convert(source, tmp_path / "out", stream=True, progress=change)
    assert not list((tmp_path / "out").glob("*.safetensors")) if (tmp_path / "out").exists() else True


def test_changed_file_without_etag_or_time_is_found_by_its_crc(server: FileServer, source: str, tmp_path: Path) -> None:
    server.faults.etag = server.faults.last_modified = False
    torch.save(make_states(LARGE, seed=1)[0], tmp_path / "x.pth")

    def change(what: str, done: int, total: int, unit: str) -> None:
        if unit == "bytes" and done > total // 4 and (tmp_path / "x.pth").exists():
            os.replace(tmp_path / "x.pth", server.folder / "x.pth")

    with pytest.raises(CorruptError, match="does not match its CRC-32"):
        api.convert(source, tmp_path / "out", stream=True, progress=change)


def test_changed_etag_prevents_resuming_a_file_without_checksums(server: FileServer, tmp_path: Path) -> None:
    """safetensors files have no checksums, so the journal and the manifest record the server's ETag."""
    path = server.folder / "x.safetensors"
    safetensors.torch.save_file(make_states(LARGE)[0], path)
    os.utime(path, (1, 1))
    api.convert(f"{server.url}/x.safetensors", tmp_path / "out", stream=True)
    assert api.convert(f"{server.url}/x.safetensors", tmp_path / "out", stream=True).was_finished
    os.utime(path, (2, 2))
    with pytest.raises(streamconv.OutputError, match="its backbone differs"):
        api.convert(f"{server.url}/x.safetensors", tmp_path / "out", stream=True)


def test_file_without_etag_time_or_checksums_is_never_resumed(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, halves of two files with the same names and sizes could be combined into one."""
    monkeypatch.setattr("streamconv.output.writer.SYNC_BYTES", 1 << 20)
    server.faults.etag = server.faults.last_modified = False
    path = server.folder / "x.safetensors"
    safetensors.torch.save_file(make_states(LARGE)[0], path)

    def stop(what: str, done: int, total: int, unit: str) -> None:
        if unit == "bytes" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.convert(f"{server.url}/x.safetensors", tmp_path / "out", stream=True, progress=stop)
    safetensors.torch.save_file(make_states(LARGE, seed=1)[0], path)
    done = api.convert(f"{server.url}/x.safetensors", tmp_path / "out", stream=True)
    assert (done.resumed_bytes, done.shards) == (0, api.convert(path, tmp_path / "expected").shards)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(KeyboardInterrupt):
        api.convert(f"{server.url}/x.safetensors", tmp_path / "other", progress=stop)
    safetensors.torch.save_file(make_states(LARGE)[0], path)
    api.convert(f"{server.url}/x.safetensors", tmp_path / "other")
    (copy,) = (tmp_path / "torch" / "hub" / "checkpoints").rglob("x.safetensors")
    assert copy.read_bytes() == path.read_bytes()


def test_server_without_ranges_is_refused_when_streaming_a_pth(server: FileServer, source: str, tmp_path: Path) -> None:
    server.faults.ranges = False
    for call in (lambda: api.convert(source, tmp_path / "out", stream=True), lambda: api.plan(source)):
        with pytest.raises(NoRangesError, match=r"sends only whole files.*without --stream"):
            call()
    assert not (tmp_path / "out").exists()


def test_server_without_ranges_is_read_in_one_pass_if_the_order_allows_it(server: FileServer, tmp_path: Path) -> None:
    """The output's sorted names must have the source's order; otherwise, streaming is refused."""
    server.faults.ranges = False
    names = ["a", "b", "c"]
    safetensors.torch.save_file({name: torch.randn(300_000) for name in names}, server.folder / "x.safetensors")
    with open_checkpoint(f"{server.url}/x.safetensors") as there, open_checkpoint(server.folder / "x.safetensors") as f:
        server.sent, server.faults.cut_after, server.faults.cuts = 0, 1_500_000, 1
        there.files[0].prefetch(there[name].range for name in names)
        for name in names:
            assert read_bytes(there[name], there.reader) == read_bytes(f[name])
        assert server.faults.cuts == 0
        with pytest.raises(NoRangesError, match="another order"):
            there.files[0].prefetch(there[name].range for name in reversed(names))


def test_server_that_once_ignores_a_range_is_retried(
    server: FileServer, source: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with open_checkpoint(source) as there, open_checkpoint(server.folder / "x.pth") as file:
        server.faults.ranges = False
        monkeypatch.setattr(retries.time, "sleep", lambda seconds: setattr(server.faults, "ranges", True))
        name = "blocks.1.mlp.fc1.weight"
        assert read_bytes(there[name], there.reader) == read_bytes(file[name])
        assert "the whole file instead of a part" in caplog.messages[0]


@pytest.mark.parametrize(
    ("status", "kind", "advice"),
    [
        (401, SourceError, "hf auth login"),
        (403, SourceError, "accept the model's terms"),
        (404, SourceMissingError, "Check the URL"),
        (410, SourceMissingError, "Check the URL"),
        (418, SourceError, "Check the URL, or download"),
    ],
)
def test_refused_request_is_reported_in_one_message(
    server: FileServer, source: str, status: int, kind: type[Exception], advice: str
) -> None:
    server.faults.statuses = [status]
    with pytest.raises(kind, match=advice) as caught:
        api.plan(source)
    assert str(caught.value).startswith(f"{source} cannot be fetched: the server answered {status}")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"wrong_part": True}, "another part than requested"),
        ({"headers": {"Content-Encoding": "gzip"}}, "is sent compressed"),
        ({"ranges": False, "length": False}, "does not report its length"),
    ],
)
def test_inconsistent_responses_are_refused(
    server: FileServer, source: str, faults: dict[str, object], message: str
) -> None:
    for name, value in faults.items():
        setattr(server.faults, name, value)
    with pytest.raises(SourceError, match=message):
        api.plan(source)


def test_empty_file_and_web_page_are_reported_as_such(server: FileServer) -> None:
    (server.folder / "empty.pth").touch()
    (server.folder / "page.pth").write_text("<!DOCTYPE html>no model")
    with pytest.raises(SourceError, match=r"empty\.pth is empty"):
        api.plan(f"{server.url}/empty.pth")
    server.faults.ranges = False
    with pytest.raises(SourceError, match=r"empty\.pth is empty"):
        api.plan(f"{server.url}/empty.pth")
    with pytest.raises(SourceError, match="is a web page"):
        api.plan(f"{server.url}/page.pth")


@pytest.mark.usefixtures("server")
def test_unknown_host_and_refused_connection_are_reported_at_once() -> None:
    with pytest.raises(NetworkError, match="Check the URL and the network"):
        api.plan("http://127.0.0.1:9/x.pth")
    with pytest.raises(NetworkError, match=r"cannot find the host no-such-host\.invalid"):
        api.plan("http://no-such-host.invalid/x.pth")


def test_redirect_is_followed_once_and_again_when_it_expires(server: FileServer, source: str, tmp_path: Path) -> None:
    server.faults.redirects = {"/start": "/signed?secret=abc", "/signed": "/x.pth"}
    expired: list[bool] = []

    def expire(what: str, done: int, total: int, unit: str) -> None:
        if unit == "bytes" and done > total // 2 and not expired:
            expired.append(True)
            server.faults.statuses = [403]

    api.convert(f"{server.url}/start", tmp_path / "out", stream=True, progress=expire)
    paths = [path for path, _, _ in server.requests]
    assert paths.count("/start") == 2
    require_the_same_from_the_file(server, tmp_path / "out")


def test_connections_to_the_host_of_an_expired_redirect_are_not_reused(
    server: FileServer, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither idle connections nor those with pending responses are reused, so the token is sent to the Hub only."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "hub").mkdir()
    with serving(tmp_path / "hub") as hub, serving(server.folder) as second:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.faults.redirects = {"/start": f"{server.url}/first/x.pth"}
        with open_checkpoint(f"{hub.url}/start") as there, open_checkpoint(server.folder / "x.pth") as file:
            names = [f"blocks.{i}.mlp.{layer}.weight" for i in range(3) for layer in ("fc1", "fc2")]
            assert read_bytes(there[names[0]], there.reader) == read_bytes(file[names[0]])  # its connection is idle now
            there.files[0].prefetch(there[name].range for name in names[1:])
            server.faults.statuses = [403]
            hub.faults.redirects = {"/start": f"{second.url}/second/x.pth"}
            for name in names[1:]:
                assert read_bytes(there[name], there.reader) == read_bytes(file[name])
        assert {path for path, _, _ in server.requests} == {"/first/x.pth"}
        assert {path for path, _, _ in second.requests} == {"/second/x.pth"}
        with_user = f"{hub.url}/start".replace("http://", "http://someone:secret@")
        monkeypatch.delenv("HF_ENDPOINT")
        api.plan(with_user)
        assert hub.requests[-1][2]["Authorization"].startswith("Basic ")
        assert {headers.get("Authorization") for _, _, headers in server.requests + second.requests} == {None}


@pytest.mark.parametrize("fault", ["drops_idle", "close_after_each"])
def test_server_that_closes_connections_causes_no_retry_message(
    server: FileServer, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    setattr(server.faults, fault, True)
    api.convert(source, tmp_path / "out", stream=True)
    assert caplog.messages == []  # at level WARNING
    require_the_same_from_the_file(server, tmp_path / "out")


def test_circular_redirects_are_refused(server: FileServer) -> None:
    server.faults.redirects = {"/a": "/b", "/b": "/a"}
    with pytest.raises(SourceError, match="redirects more than 10 times in a row"):
        api.plan(f"{server.url}/a")


def test_redirect_to_an_insecure_or_foreign_scheme_is_refused(server: FileServer) -> None:
    for target in ("ftp://127.0.0.1/x", "file:///etc/passwd", "http://127.0.0.1:99999/x", "http://[::1/x"):
        server.faults.redirects = {"/a": target}
        with pytest.raises(SourceError, match="is not secure"):
            api.plan(f"{server.url}/a")


def test_token_is_sent_to_the_hub_only(
    server: FileServer, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub redirects to a store on another host, which does not receive the token."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "hub").mkdir()
    with serving(tmp_path / "hub") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.faults.redirects = {"/o/m/resolve/main/x.pth": source}
        expired: list[bool] = []

        def expire(what: str, done: int, total: int, unit: str) -> None:
            """Expire while other responses of the store are pending, whose connections become idle afterwards."""
            if unit == "bytes" and not expired:
                expired.append(True)
                server.faults.statuses = [403]

        api.convert(f"{hub.url}/o/m/resolve/main/x.pth", tmp_path / "out", stream=True, progress=expire)
        paths = [path.rpartition("/")[2] for path, _, _ in hub.requests]
        assert paths == ["x.pth", "config.json", "x.pth"]
        assert {headers.get("Authorization") for _, _, headers in hub.requests} == {"Bearer hf_secret"}
        assert {headers.get("Authorization") for _, _, headers in server.requests} == {None}
        assert "hf_secret" not in (tmp_path / "out" / "streamconv.json").read_text()
        hub.faults.redirects = {}
        with pytest.raises(SourceMissingError) as caught:
            api.plan(f"{hub.url}/o/m/resolve/main/y.pth")
        assert "hf_secret" not in str(caught.value)


def test_hf_addresses_are_resolved_on_the_hub(server: FileServer, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import streamconv; streamconv.plan({!r})"
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for words, path in (
        ("hf://owner/name/x.pth", "/owner/name/resolve/main/x.pth"),
        ("hf://owner/name@v1/deep/x.pth", "/owner/name/resolve/v1/deep/x.pth"),
        ("hf://datasets/owner/name/x.pth", "/datasets/owner/name/resolve/main/x.pth"),
        ("hf://owner/name@refs/pr/1/deep/x.pth", "/owner/name/resolve/refs%2Fpr%2F1/deep/x.pth"),
        ("hf://owner/name@refs%2Fpr%2F1/x.pth", "/owner/name/resolve/refs%2Fpr%2F1/x.pth"),
    ):
        server.requests.clear()
        run_python(code.format(words))  # huggingface_hub reads the endpoint when it is imported
        assert server.requests[0][0] == path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(streamconv.UsageError, match="Write it as hf://OWNER/NAME"):
        api.plan("hf://owner/x.pth")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set"):
        api.plan("hf://owner/name/x.pth")


def test_credentials_in_a_url_are_used_and_never_shown(server: FileServer, source: str, tmp_path: Path) -> None:
    server.faults.needs_authorization = "Basic " + base64.b64encode(b"someone:top secret").decode()
    address = source.replace("http://", "http://someone:top%20secret@") + "?signature=xyzzy"
    done = api.convert(address, tmp_path / "out", stream=True)
    assert server.requests[0][0] == "/x.pth?signature=xyzzy"
    manifest = (tmp_path / "out" / "streamconv.json").read_text()
    server.faults.needs_authorization = "other"
    with pytest.raises(SourceError) as caught:
        api.plan(address)
    for text in (manifest, str(caught.value), str(done)):
        assert not any(secret in text for secret in ("someone", "secret", "xyzzy"))


def test_proxy_from_the_environment_is_used_unless_the_host_is_excluded(
    server: FileServer, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server acts as a proxy: it finds the file's name at the end of the whole URL."""
    monkeypatch.setenv("http_proxy", server.url.replace("http://", "http://user:word@"))
    monkeypatch.setenv("no_proxy", "excepted.invalid")
    api.convert("http://models.invalid/x.pth", tmp_path / "out", stream=True)
    assert {path for path, _, _ in server.requests} == {f"http://models.invalid/{f}" for f in ("x.pth", "config.json")}
    secret = "Basic " + base64.b64encode(b"user:word").decode()
    assert {headers["Proxy-Authorization"] for _, _, headers in server.requests} == {secret}
    with pytest.raises(NetworkError, match="cannot find the host"):
        api.plan("http://excepted.invalid/x.pth")
    for proxy in ("ftp://user:word@h:1", "http://user:word@h:99999", "http://user:word@:1"):
        monkeypatch.setenv("http_proxy", proxy)
        with pytest.raises(streamconv.UsageError, match=r"streamconv cannot use the proxy") as caught:
            api.plan("http://models.invalid/x.pth")
        assert "word" not in str(caught.value)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(NetworkError, match=r"cannot connect through the proxy 127\.0\.0\.1"):
        api.plan("http://models.invalid/x.pth")


def test_each_host_of_a_redirect_has_its_own_proxy_and_credentials(
    server: FileServer, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first host is reached through a proxy, the second one is not. Neither sees the other's credentials."""
    (tmp_path / "proxy").mkdir()
    with serving(tmp_path / "proxy") as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.replace("http://", "http://user:word@"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        first = "http://models.invalid/start"
        proxy.faults.redirects = {first: source.replace("http://", "http://other:secret@")}
        assert api.plan(first.replace("http://", "http://someone:secret@")).weights
    assert {path for path, _, _ in proxy.requests} == {first, "http://models.invalid/config.json"}
    secret = "Basic " + base64.b64encode(b"someone:secret").decode()
    assert {headers["Authorization"] for _, _, headers in proxy.requests} == {secret}
    assert server.requests
    for _, _, headers in server.requests:
        assert not {"Authorization", "Proxy-Authorization"} & set(headers)


def test_proxy_that_refuses_the_password_is_reported(
    server: FileServer, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    server.faults.statuses = [407]
    with pytest.raises(SourceError, match=r"the server answered 407 .* Set the proxy's user and password"):
        api.plan("http://models.invalid/x.pth")


def test_urllib3_is_imported_for_urls_only(source: str, server: FileServer) -> None:
    code = "import sys, streamconv; streamconv.plan({!r}); print('urllib3' in sys.modules)"
    assert run_python(code.format(str(server.folder / "x.pth"))) == "False\n"
    assert run_python(code.format(source)) == "True\n"


def test_interrupted_process_does_not_wait_for_a_silent_server(server: FileServer, source: str) -> None:
    server.faults.latency = 20
    command = [sys.executable, "-m", "streamconv", "plan", source]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not server.requests and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
    finally:
        process.kill()
        process.wait()
