"""Servers that send without end or almost nothing end in an error, and honest slow ones do not; so do signals."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from itertools import repeat

import pytest

from streamconv import NetworkError
from streamconv.files import fsspec, retries, slow
from streamconv.files.address import Address
from streamconv.files.http import HttpFile

SIZE = 3_000
HEAD = f"HTTP/1.1 206 Partial\r\nETag: 1\r\nContent-Range: bytes 0-{SIZE - 1}/{SIZE}\r\n".encode()
LENGTH = f"Content-Length: {SIZE}\r\n\r\n".encode()
CHUNK = f"Transfer-Encoding: chunked\r\n\r\n{SIZE - 1:x}\r\n".encode() + b"x" * (SIZE - 1) + b"\r\n0\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </x.css>\r\n\r\n"


def drip(start: bytes, part: bytes, pause: float = 0.01) -> Callable[[], Iterator[tuple[bytes, float]]]:
    def parts() -> Iterator[tuple[bytes, float]]:
        yield start, 0
        yield from repeat((part, pause))

    return parts


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HEADER_SECONDS": 0.3, "WINDOW_SECONDS": 0.3, "RESPONSE_SECONDS": 1.0}.items():
        monkeypatch.setattr(slow, name, value)


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        (drip(b"", CONTINUE, 0), "sends headers without end"),
        (drip(b"", CONTINUE), "sends headers without end"),
        (drip(b"", HINTS, 0), "sends headers without end"),
        (drip(b"", HINTS), "sends headers without end"),
        (drip(b"HTTP/1.1 200 OK\r\n", b"x"), "sends headers without end"),
        (drip(b"HTTP/1.1 200 ", b"x"), "sends headers without end"),
        (drip(HEAD + LENGTH, b"x"), "sends too slowly"),
        (drip(HEAD + CHUNK, b"A: b\r\n", 0), "sends headers without end"),
        (drip(HEAD + CHUNK, b"A: b\r\n"), "sends headers without end"),
        (drip(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", 0.05), "sends too slowly"),
    ],
)
def test_server_that_sends_without_end_or_almost_nothing_is_refused_with_its_rate(
    serve: Callable[..., str], parts: Callable[[], Iterator[tuple[bytes, float]]], problem: str
) -> None:
    started = time.monotonic()
    with pytest.raises(NetworkError, match=rf"x\.pth cannot be read: its server {problem}.* bytes a second") as caught:
        HttpFile(Address(serve(parts)))
    assert time.monotonic() - started < 5
    assert "s1gn" not in str(caught.value)


def test_chunks_of_negative_size_are_an_error_and_not_a_bug(
    serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "RETRY_WAITS_SECONDS", (0,))
    with pytest.raises(NetworkError, match="the response is not valid"):
        HttpFile(Address(serve(drip(HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n", b"x"))))


def test_response_that_never_comes_is_refused(serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow, "RESPONSE_SECONDS", 0.1)
    with pytest.raises(NetworkError, match="its server sent no response in 0 s"):
        HttpFile(Address(serve(drip(b"", b"", 5))))
    with pytest.raises(NetworkError, match=r"s3://b/x cannot be read: .* did not send 400 bytes within 0 s .1,333 b"):
        fsspec.result_in_time(Future(), 400, Address("s3://b/x"))


@pytest.mark.usefixtures("limits")
def test_honest_slow_server_is_read(serve: Callable[..., str]) -> None:
    """It sends 5 kB a second, for longer than the window."""
    with closing(HttpFile(Address(serve(drip(HEAD + LENGTH, b"x" * 50))))) as file:
        assert file.read(0, SIZE) == b"x" * SIZE


def test_interim_responses_are_skipped(serve: Callable[..., str]) -> None:
    interim = HINTS + CONTINUE + b"HTTP/1.1 102 Processing\r\n\r\n" + HINTS
    with closing(HttpFile(Address(serve(drip(interim + HEAD + LENGTH, b"x" * SIZE))))) as file:
        assert file.read(0, SIZE) == b"x" * SIZE


STUCK = """
import os, sys, time
from contextlib import suppress
from streamconv.cli import grace, start
grace.GRACE_SECONDS = 0.3
def wait():
    if sys.argv[1] == "full":  # nobody reads what is printed
        os.set_blocking(2, False)
        with suppress(BlockingIOError):
            while os.write(2, bytes(512)):
                pass
        os.set_blocking(2, True)
    print("ready", flush=True)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass  # as a library that waits for its threads
sys.argv[1:] = sys.argv[1:] or ["run", "http://me:word@h/x.pth", "--json"]
def run():
    import streamconv.cli.commands.run, streamconv.cli.commands as commands
    streamconv.cli.commands.run.run.callback = lambda *given, **options: wait()
    commands.app()
start.run_with_signals(wait if sys.argv[1] == "full" else run)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_a_process_that_is_stuck(number: signal.Signals) -> None:
    command = [sys.executable, "-c", STUCK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            assert process.wait(5) == 130
            assert process.stderr.read().startswith("Interrupted. To resume, run\n  streamconv run http://h/x.pth ")
            assert json.loads(process.stdout.read())["error"] == {
                "type": "Interrupted",
                "message": "Interrupted. Run the same command again to resume.",
                "exit_code": 130,
            }
        finally:
            process.kill()


def test_signal_ends_a_process_whose_output_is_not_read() -> None:
    command = [sys.executable, "-c", STUCK, "full"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 130
        finally:
            process.kill()


def test_sigterm_ends_reading_from_a_server_that_drips(serve: Callable[..., str]) -> None:
    url = serve(drip(HEAD + LENGTH, b"x", 0.2))
    command = [sys.executable, "-m", "streamconv", "plan", url, "-vv"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "requesting bytes" in process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 130
        finally:
            process.kill()
