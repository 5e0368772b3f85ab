"""HTTPS with a certificate made for the test, also through proxies."""

import base64
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch

from streamconv import NetworkError, SourceError, UsageError
from streamconv.files import client, remote, retries
from tests import api
from tests.checkpoints import make_states
from tests.file_server import FileServer, serving
from tests.support import tiny

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "RETRY_WAITS_SECONDS", (0, 0.01, 0.01))
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"):
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
    """Opens every tunnel that is requested, and keeps the heads of the requests. With a certificate, it speaks TLS."""

    def __init__(self, certificate: Path | None = None) -> None:
        super().__init__(daemon=True)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if certificate else None
        if self.context and certificate:
            self.context.load_cert_chain(certificate)
        self.heads: list[str] = []
        self.start()

    def run(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self.tunnel, args=(self.listening.accept()[0],), daemon=True).start()

    def open_tunnel(self, client: socket.socket) -> tuple[str, int]:
        head = b""
        while b"\r\n\r\n" not in head:
            data = client.recv(4096)
            if not data:
                raise ConnectionError
            head += data
        self.heads.append(head.decode())
        host, port = head.split()[1].decode().rsplit(":", 1)
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        return host, int(port)

    def tunnel(self, client: socket.socket) -> None:
        with suppress(OSError), client:
            self.forward(self.context.wrap_socket(client, server_side=True) if self.context else client)

    def forward(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.open_tunnel(client)) as server:
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


class SocksProxy(ConnectProxy):
    """Opens SOCKS5 tunnels to IPv4 addresses, without authentication (RFC 1928)."""

    def open_tunnel(self, client: socket.socket) -> tuple[str, int]:
        client.recv(64)
        client.sendall(b"\5\0")
        request = client.recv(10)
        self.heads.append(request.hex())
        client.sendall(b"\5\0\0\1" + bytes(6))
        return socket.inet_ntoa(request[4:8]), int.from_bytes(request[8:10], "big")


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


def test_https_hosts_in_no_proxy_are_reached_without_the_proxy(
    server: FileServer, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", f"127.0.0.1:{server.server_port}")
    assert api.plan(f"{server.url}/x.pth").weights


@pytest.mark.parametrize("is_tls", [True, False])
def test_https_proxy_tunnels_https_and_must_be_trusted(
    server: FileServer, certificate: Path, monkeypatch: pytest.MonkeyPatch, is_tls: bool
) -> None:
    monkeypatch.setenv("no_proxy", "")
    with closing(ConnectProxy(certificate if is_tls else None)) as proxy:
        monkeypatch.setenv("https_proxy", f"https://me:word@{proxy.address}")
        if not is_tls:  # the proxy waits for the end of a request, and the client for its answer
            monkeypatch.setattr(client, "TIMEOUT_SECONDS", 0.3)
            with pytest.raises(NetworkError, match=r"cannot connect through the proxy 127\.0\.0\.1"):
                api.plan(f"{server.url}/x.pth")
            return
        with pytest.raises(SourceError, match=r"certificate of 127\.0\.0\.1 cannot be trusted"):
            api.plan(f"{server.url}/x.pth")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert api.plan(f"{server.url}/x.pth").weights
        assert all(base64.b64encode(b"me:word").decode() in head for head in proxy.heads)


def test_https_proxy_forwards_http(server: FileServer, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server acts as the proxy: it finds the file's name at the end of the whole URL."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("http_proxy", server.url)
    assert api.plan("http://models.invalid/x.pth").weights
    assert {path for path, _, _ in server.requests} == {
        f"http://models.invalid/{name}" for name in ("x.pth", "config.json")
    }


def test_socks_proxy_needs_pysocks(server: FileServer, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("no_proxy", "")
    with closing(SocksProxy()) as proxy:
        monkeypatch.setenv("all_proxy", f"socks5://{proxy.address}")
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "socks", None)
            with pytest.raises(UsageError, match=r"without PySocks \(`pip install PySocks`\)"):
                api.plan(f"{server.url}/x.pth")
        pytest.importorskip("socks")
        assert api.plan(f"{server.url}/x.pth").weights
        assert proxy.heads
        monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
        with pytest.raises(NetworkError, match=r"cannot connect through the proxy 127\.0\.0\.1"):
            api.plan(f"{server.url}/x.pth")


def test_certificates_for_requests_are_trusted(
    server: FileServer, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    assert api.plan(f"{server.url}/x.pth").weights
    folder = tmp_path / "certificates"
    folder.mkdir()
    (folder / "it.pem").write_bytes((tmp_path / "only.pem").read_bytes())
    subprocess.run(["openssl", "rehash", folder], check=True)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(folder))
    assert api.plan(f"{server.url}/x.pth").weights
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    with pytest.raises(UsageError, match=r"certificates in .*none\.pem, which REQUESTS_CA_BUNDLE names, cannot"):
        api.plan(f"{server.url}/x.pth")


def test_tls_connections_are_reused(
    server: FileServer, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    require_the_same(server, tmp_path / "out")
    assert len(server.requests) > server.connections
    assert server.connections <= remote.MAX_IN_FLIGHT + 1


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
    with serving(server.folder) as plain, pytest.raises(NetworkError, match="cannot be opened"):
        api.plan(plain.url.replace("http://", "https://") + "/x.pth")
