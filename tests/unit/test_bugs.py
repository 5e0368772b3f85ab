"""Unexpected exceptions: a bug in streamconv has an exit code of its own, and its report contains no secrets."""

import errno
import json
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import streamconv
from streamconv.cli.bugs import MAX_LINE_LENGTH, MAX_LINES
from streamconv.cli.commands import app
from streamconv.cli.start import _IgnoreBrokenPipe, _prepare_streams
from tests.support import ROOT, run_python, save_zeros, tiny

TOKEN = "hf_itsme"


def planning_raises(error: BaseException, monkeypatch: pytest.MonkeyPatch, *words: str) -> Result:
    def plan(*given: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(streamconv, "plan", plan)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return CliRunner().invoke(app, ["plan", "https://me:passw0rd@host/x.pth?sig=passw0rd", *words])


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        RecursionError("maximum recursion depth exceeded"),
        UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        EOFError(),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_bug_is_one_message_that_asks_for_a_report(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    done = planning_raises(error, monkeypatch)
    assert (done.exit_code, done.stdout) == (70, "")
    assert done.stderr.startswith("error: This is a bug in streamconv. Please report it to its maintainers")
    for part in ("streamconv plan https://host/x.pth", f"streamconv {streamconv.__version__}, Python 3.", "Traceback"):
        assert part in done.stderr
    assert type(error).__name__ in done.stderr


def test_report_of_a_bug_shows_no_secret_and_no_control_character(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ValueError(
        f"\x1b[2J\u202e\r\x85 https://me:passw0rd@host/y?sig=passw0rd {TOKEN} " + "x" * 10**6 + "\ny" * 10**5
    )
    done = planning_raises(error, monkeypatch)
    assert done.exit_code == 70
    assert "passw0rd" not in done.stderr
    assert TOKEN not in done.stderr
    assert all(line.isprintable() for line in done.stderr.split("\n"))
    assert len(done.stderr) < 1.2 * MAX_LINES * MAX_LINE_LENGTH


def test_bug_under_json_is_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    done = planning_raises(KeyError("x"), monkeypatch, "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.exit_code, error["type"], error["exit_code"]) == (70, "InternalError", 70)
    assert "KeyError: 'x'" in error["message"]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 2, "too little memory"),
        (OSError(errno.EMFILE, "Too many open files", "x"), 2, "system limit was reached: Too many open files"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), 2, "system limit"),
        (OSError(errno.ENOSPC, "No space left on device", "a\x1b"), 4, r"a\x1b: No space left on device"),
        (OSError(errno.EIO, "Input/output error"), 4, "Input/output error"),
        (ModuleNotFoundError("No module named 'click.x'", name="click.x"), 2, "pip install click"),
        (ImportError("cannot map", name="torch", path="x"), 2, "torch cannot be imported: cannot map"),
    ],
    ids=str,
)
def test_shortage_is_not_a_bug(error: Exception, code: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = planning_raises(error, monkeypatch)
    assert done.exit_code == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_thread_that_cannot_be_started_is_not_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.stack_size(1 << 47)  # more than the address space has
    try:
        with pytest.raises(RuntimeError) as caught:
            threading.Thread(target=print).start()
    finally:
        threading.stack_size(before)
    done = planning_raises(caught.value, monkeypatch)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: No more threads can be started.")


AT_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            {}
sys.meta_path.insert(0, Finder())
sys.argv = ["streamconv", "plan", "x.pth"]
from streamconv.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("event", "code", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "Interrupted. To resume, run\n  streamconv plan x.pth\n"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 130, "Interrupted. To resume, run\n  streamconv plan x.pth\n"),
        (
            "raise ModuleNotFoundError(name='click')", 2,
            "error: This needs the Python package click, which is not installed. Run `pip install click`.\n",
        ),
        ("raise MemoryError", 2, "error: There is too little memory."),
        ("raise KeyError", 70, "error: This is a bug in streamconv."),
    ],
    ids=["ctrl-c", "sigterm", "missing package", "memory", "bug"],
)  # fmt: skip
def test_failure_or_signal_during_imports_ends_in_one_message(event: str, code: int, message: str) -> None:
    words = [sys.executable, "-c", AT_IMPORT.format(event)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(message)
    assert ("Traceback" in done.stderr) == (code == 70)


IN_A_CALLBACK = """
import os, signal, time, weakref
from streamconv.cli.start import run_with_signals
def work():
    collected = set()
    watched = weakref.ref(collected, lambda reference: os.kill(os.getpid(), signal.SIGTERM))
    del collected
    time.sleep(2)
run_with_signals(work)
"""


def test_signal_that_arrives_in_a_callback_is_not_lost() -> None:
    """Python prints a traceback of what such a callback raises, and goes on; imports have such callbacks."""
    done = subprocess.run([sys.executable, "-c", IN_A_CALLBACK], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, "Interrupted. To resume, run\n  streamconv\n")


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ("raise OSError(24, 'Too many open files')", "Too many open files"),
        ("raise MemoryError", "there is too little memory"),
    ],
    ids=["files", "memory"],
)
def test_failing_imports_end_in_one_message(event: str, message: str) -> None:
    code = AT_IMPORT.replace('"click"', '"click" or name == "streamconv.cli.bugs"').format(event)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: streamconv cannot be started: {message}\. Raise .*\.\n", done.stderr)


@pytest.mark.parametrize(("limit", "code"), [("RLIMIT_NOFILE, 5", 2), ("RLIMIT_FSIZE, 100", 4)])
def test_small_limits_of_the_system_end_in_one_message(limit: str, code: int, tmp_path: Path) -> None:
    name, value = limit.split(", ")
    source = save_zeros(tmp_path / "x.pth", tiny(layers=1, hidden=64))
    done = subprocess.run(
        [sys.executable, "-m", "streamconv", "convert", source, "-q", "-o", tmp_path / "out"],
        capture_output=True, text=True, cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(getattr(resource, name), (int(value), int(value))),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_signals_are_handled_before_anything_is_imported() -> None:
    names = run_python("import sys, streamconv.cli.start; print(*sys.modules)").split()
    ours = {name for name in names if name.startswith("streamconv")}
    assert ours == {"streamconv", "streamconv.cli", "streamconv.cli.grace", "streamconv.cli.start"}
    assert not {"click", "json", "urllib"} & {*names}


@pytest.mark.parametrize("redirection", ["<&-", "<&- >&-", "<&- >&- 2>&-"])
def test_closed_streams_are_not_an_error(redirection: str) -> None:
    script = f"{sys.executable} -m streamconv models {redirection}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == (redirection == "<&-")


def test_streams_are_prepared_without_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.devnull", "/nonexistent")
    monkeypatch.setattr("sys.stderr", sys.stderr)  # which is wrapped
    _prepare_streams()
    assert isinstance(sys.stderr, _IgnoreBrokenPipe)


@pytest.mark.parametrize("words", ["--help", "run --help"])
def test_closed_pipe_and_full_disk_have_their_exit_codes(words: str) -> None:
    command = f"{sys.executable} -m streamconv {words}"
    script = f"{command} | true; echo ${{PIPESTATUS[0]}}; {command} >/dev/full; echo $?"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["0", "4"]
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
