"""HTTPS with a certificate made for the test, also through a proxy that is asked to CONNECT."""

import base64
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch

from streamconv import NetworkError, SourceError
from streamconv.files import retries
from tests import api
from tests.checkpoints import make_states
from tests.file_server import FileServer, serving
from tests.support import tiny

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "RETRY_WAITS_SECONDS", (0, 0.01, 0.01))
    for name in (
        "https_proxy",
        "HTTPS_PROXY",
        "all_proxy",
        "ALL_PROXY",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "REQUESTS_CA_BUNDLE",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Return a self-signed certificate for 127.0.0.1, with its key."""
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    files = ["-keyout", tmp_path / "key.pem", "-out", tmp_path / "only.pem"]
    subprocess.run(["openssl", *words.split(), *files], check=True, capture_output=True)
    both = tmp_path / "certificate.pem"
    both.write_bytes((tmp_path / "key.pem").read_bytes() + (tmp_path / "only.pem").read_bytes())
    return both


@pytest.fixture
def server(tmp_path: Path, certificate: Path) -> Iterator[FileServer]:
    (tmp_path / "served").mkdir()
    torch.save(make_states(tiny(layers=3, hidden=512))[0], tmp_path / "served" / "x.pth")
    with serving(tmp_path / "served", certificate) as running:
        yield running


class ConnectProxy(threading.Thread):
    """Opens every tunnel that is requested, and keeps the heads of the requests."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.heads: list[str] = []
        self.start()

    def run(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self.tunnel, args=(self.listening.accept()[0],), daemon=True).start()

    def tunnel(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(4096)
        self.heads.append(head.decode())
        host, port = head.split()[1].decode().rsplit(":", 1)
        with suppress(OSError), client, socket.create_connection((host, int(port))) as server:
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=copy, args=(server, client), daemon=True)
            back.start()
            copy(client, server)
            back.join()

    def close(self) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.join()
        self.listening.close()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.listening.getsockname()[1]}"


def copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def require_the_same(server: FileServer, output: Path) -> None:
    expected = api.convert(server.folder / "x.pth", output.with_name("expected")).shards
    assert api.convert(f"{server.url}/x.pth", output, stream=True).shards == expected


def test_only_a_trusted_certificate_is_accepted(
    server: FileServer, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceError, match=r"certificate of 127\.0\.0\.1 cannot be trusted: self.signed"):
        api.plan(f"{server.url}/x.pth")
    assert not server.requests
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    require_the_same(server, tmp_path / "out")
    with pytest.raises(SourceError, match=r"certificate of .* cannot be trusted"):
        api.plan(f"{server.url}/x.pth".replace("127.0.0.1", "localhost"))


def test_proxy_tunnel_reveals_only_the_host(
    server: FileServer, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("no_proxy", "")
    with closing(ConnectProxy()) as proxy:
        monkeypatch.setenv("https_proxy", f"http://me:word@{proxy.address}")
        require_the_same(server, tmp_path / "out")
    secret = base64.b64encode(b"me:word").decode()
    assert proxy.heads
    for head in proxy.heads:
        assert head.startswith(f"CONNECT 127.0.0.1:{server.server_port} ")
        assert f"Proxy-Authorization: Basic {secret}" in head
        assert "x.pth" not in head
    assert all("Proxy-Authorization" not in headers for _, _, headers in server.requests)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(NetworkError, match=r"cannot connect through the proxy 127\.0\.0\.1"):
        api.plan(f"{server.url}/x.pth")


def test_redirect_may_lead_to_https_but_not_back_to_http(
    server: FileServer, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with serving(server.folder) as plain:
        plain.faults.redirects = {"/a": f"{server.url}/x.pth"}
        assert api.plan(f"{plain.url}/a").weights
        server.faults.redirects = {"/b": f"{plain.url}/x.pth"}
        with pytest.raises(SourceError, match="is not secure"):
            api.plan(f"{server.url}/b")


def test_server_without_tls_is_an_error(server: FileServer) -> None:
    with serving(server.folder) as plain, pytest.raises(NetworkError, match="cannot be read from the beginning"):
        api.plan(plain.url.replace("http://", "https://") + "/x.pth")
