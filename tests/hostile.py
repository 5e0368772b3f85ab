"""Runs commands on hostile files, and checks that each ends in one short message, in little time and memory.

A command runs in a process that was forked from one in which streamconv is imported: a new interpreter for each attack
would take most of the time. The process measures itself. Importing this module imports no torch.
"""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MAX_SECONDS = 1.0  # of CPU time on an idle core: the machine may have other work, and so may the one below it
LOOP_SECONDS = 0.045  # of an idle core of an AMD EPYC for the loop below; slower cores get more time, up to twice
MAX_BYTES = 100_000_000
MAX_MESSAGE = 20_000  # characters on stdout and stderr
MAX_JSON = 1_000_000

Refusal = Callable[..., str]  # the fixture `refusal`

_SERVER = f"""
import contextlib, io, json, os, sys, time
from streamconv.cli.commands import app

def run(words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app(words)
            code = 0
        except SystemExit as error:
            code = error.code
        except BaseException as error:
            code = repr(error)
    return code, out.getvalue(), err.getvalue()

def loop_seconds():
    start, total = time.process_time(), 0
    for i in range(1_000_000):
        total += i & 7
    return time.process_time() - start

def rss_bytes(name):
    return int(dict(line.split(":", 1) for line in open("/proc/self/status"))[name].split()[0]) << 10

run(["convert", "/missing.pth", "-o", "/missing", "--json"])  # imports what commands import late
base = rss_bytes("VmHWM")
for line in sys.stdin:
    if not os.fork():
        words, folder = json.loads(line)
        os.chdir(folder)
        before, start = rss_bytes("VmRSS"), time.process_time()
        code, out, err = run(words)
        seconds, peak = time.process_time() - start, base + rss_bytes("VmHWM") - before
        if seconds > {MAX_SECONDS / 2}:
            seconds /= min(max(loop_seconds() / {LOOP_SECONDS}, 1), 2)
        print(json.dumps([code, out[:{MAX_JSON + 1}], err[:{MAX_MESSAGE + 1}], seconds, peak]), flush=True)
        os._exit(0)
    os.wait()
"""


@dataclass(frozen=True)
class Ended:
    """A command that has ended. ``code`` is its exit code, or the exception that it did not catch.

    ``seconds`` are of CPU time on an idle core.
    """

    code: int | str
    stdout: str
    stderr: str
    seconds: float
    peak_bytes: int

    @property
    def document(self) -> Any:
        """The JSON document on stdout."""
        return json.loads(self.stdout)


class Attacked:
    """A process that runs each command in a forked process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def refusal(
        self,
        path: Path,
        *options: object,
        command: str = "convert",
        seconds: float = MAX_SECONDS,
        peak_bytes: int = MAX_BYTES,
    ) -> str:
        """Return the message of a command that refuses the source ``path`` and writes nothing.

        By default, that is a conversion: what it refuses before the plan is made, `plan` refuses likewise. Give files
        that can be opened to both.
        """
        with tempfile.TemporaryDirectory() as folder:
            output = () if command == "plan" else ("-o", Path(folder, "out"))
            ended = self.run(command, path, *output, *options, "--json", seconds=seconds, peak_bytes=peak_bytes)
            assert not os.listdir(folder), f"{command} wrote to its output"
        assert ended.code == 3, ended
        message = str(ended.document["error"]["message"])
        assert message.replace("\n", " ").isprintable(), message
        return message

    def run(self, *words: object, seconds: float = MAX_SECONDS, peak_bytes: int = MAX_BYTES) -> Ended:
        """Run a command, after which its time, its memory and the length of its output are checked.

        Other programs on the machine can only add to the time, so the fastest of five attempts counts.
        """
        for _ in range(5):
            ended = self._run(list(map(str, words)))
            if ended.seconds < seconds:
                break
        shown = f"{ended.code}, {ended.stderr[:2000]}"
        assert ended.seconds < seconds, f"{ended.seconds:.2f} s for {shown}"
        assert ended.peak_bytes < peak_bytes, f"{ended.peak_bytes:,} bytes for {shown}"
        assert len(ended.stdout) <= (MAX_JSON if "--json" in words else MAX_MESSAGE), ended.stdout[:2000]
        assert len(ended.stderr) <= MAX_MESSAGE, shown
        return ended

    def _run(self, words: list[str]) -> Ended:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([words, os.getcwd()]) + "\n")
        self._process.stdin.flush()
        assert select.select([self._process.stdout], [], [], 60)[0], f"{words} has not ended"
        line = self._process.stdout.readline()
        assert line, f"the process that ran {words} was killed"
        return Ended(*json.loads(line))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
