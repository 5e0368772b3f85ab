"""Fixtures that several test modules share. Importing this module imports no torch: tests/unit must run without it."""

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import count
from pathlib import Path

import pytest

from streamconv.files import retries
from tests.file_server import FileServer, serving
from tests.hostile import Attacked, Refusal
from tests.hub_server import TOKEN, HubServer, running
from tests.s3_server import CREDENTIALS, Bucket, S3Server
from tests.s3_server import running as running_s3
from tests.support import HUB_MODEL, SMALL_STEPS, Save

_numbers = count()


@pytest.fixture(autouse=True)
def _default_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test as if the user had said nothing about colours; pytest itself still follows them."""
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait only a moment before a request is sent again, as many times as for a user."""
    waits = [min(seconds, 0.01) for seconds in retries.RETRY_WAITS_SECONDS]
    monkeypatch.setattr(retries, "RETRY_WAITS_SECONDS", tuple(waits))


@pytest.fixture(scope="session", autouse=True)
def _no_real_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's own cache, which remembers outputs and verdicts, out of fixtures that several tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(tmp_path_factory.getbasetemp() / "torch"))
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a cache of its own, beside its folder."""
    monkeypatch.setenv("TORCH_HOME", f"{tmp_path}-cache")


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Save a random checkpoint of given dimensions with torch.save; returns the paths of its files."""
    import torch

    from tests.checkpoints import make_states

    def make(geometry: object, name: str = "source") -> tuple[Path, Path | None]:
        backbone, head = make_states(geometry)  # type: ignore[arg-type]
        torch.save(backbone, tmp_path / f"{name}.pth")
        if head:
            torch.save(head, tmp_path / f"{name}_head.pth")
        return tmp_path / f"{name}.pth", tmp_path / f"{name}_head.pth" if head else None

    return make


@pytest.fixture
def read_counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which each later read at an offset of a file adds its number of bytes."""
    counts: list[int] = []
    real = os.preadv

    def counting(fd: int, buffers: list[memoryview], offset: int) -> int:
        counts.append(real(fd, buffers, offset))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counting)
    return counts


@pytest.fixture(scope="session")
def attacked() -> Iterator[Attacked]:
    """Yield one process for the commands of the whole test run; see `tests.hostile`."""
    process = Attacked()
    yield process
    process.close()


@pytest.fixture
def refusal(attacked: Attacked) -> Refusal:
    """Return `Attacked.refusal`."""
    return attacked.refusal


@pytest.fixture
def frequent_journal_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a journal entry after every 32 kB, so that a small model has many; read ahead of the disk by as much."""
    for module, name, value in SMALL_STEPS:
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 4 MB."""
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path / "disk"], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a small disk")
    try:
        yield tmp_path / "disk"
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """Run a file server on the loopback, with a separate torch.hub cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "served").mkdir()
    with serving(tmp_path / "served") as running_server:
        yield running_server


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Return a function that starts a server, which sends these parts to every client, and returns its URL."""
    servers = []

    def start(parts: Callable[[], Iterator[tuple[bytes, float]]]) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def send(client: socket.socket) -> None:
            with closing(client), suppress(OSError):
                client.recv(65536)
                for part, pause in parts():
                    time.sleep(pause)
                    client.sendall(part)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=send, args=(server.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}/x.pth?sig=s1gn4ture"

    yield start
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Run a small Hub that this process is logged in to, without waits before retries."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    forget_sessions = _http.close_session if hasattr(_http, "close_session") else _http.reset_sessions
    with running() as hub_server:
        template = hub_server.url + "/{repo_id}/resolve/{revision}/{filename}"
        patched = {"ENDPOINT": hub_server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
        for name, value in {**patched, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # 0.x has its own
        monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        forget_sessions()
        yield hub_server
    forget_sessions()


@pytest.fixture
def remote_hub_model(server: FileServer) -> str:
    """Return the address of a .pth that is converted to several shards."""
    import torch

    from tests.checkpoints import make_states

    torch.save(make_states(HUB_MODEL)[0], server.folder / "x.pth")
    return f"{server.url}/x.pth"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """Run one S3 server for all tests: it takes half a second to start."""
    pytest.importorskip("moto.server")
    with running_s3() as s3_server:
        yield s3_server


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """Make a new bucket, which this process and those that it starts reach under its URL."""
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": s3_server.url}.items():
        monkeypatch.setenv(name, value)
    bucket = Bucket(f"bucket-{next(_numbers)}", s3_server)
    bucket.create()
    s3_server.reset()
    yield bucket
    s3_server.reset()
