"""The program of the child process that runs models. It receives the messages of `process` on stdin.

Importing this module does not import torch; `main` does.
"""

import gc
import io
import logging
import os
import pickle
import signal
import sys
import traceback
import warnings
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, NoReturn

from streamconv.display import visible
from streamconv.errors import StreamconvError, UsageError
from streamconv.files.hub_settings import without_invalid_endpoint
from streamconv.logs import logger
from streamconv.progress import ProgressUnit
from streamconv.verification.machine import OUT_OF_MEMORY
from streamconv.verification.process import ModelsHere

MAX_PRINTED = 10_000  # characters that are kept of what a library prints at once
MAX_IMPORT_SECONDS = 120  # of CPU time; 5 to 20 are usual. Under a limit of memory, OpenBLAS may ask for it forever.


class _Parent:
    """The process that started this one."""

    def __init__(self) -> None:
        # stdin and stdout carry messages, so nothing else may read stdin, and what C libraries print goes to stderr.
        self._input, self._output = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        self._messages: SimpleQueue[Any] = SimpleQueue()
        self._lock = Lock()
        Thread(target=self._read, name="parent", daemon=True).start()

    def _read(self) -> None:
        """Queue messages until the parent closes the pipe or ends, which ends this process as well."""
        try:
            while True:
                self._messages.put(pickle.load(self._input))
        except (EOFError, pickle.UnpicklingError):  # between two messages, or within one
            pass
        except BaseException:
            traceback.print_exc()
        os._exit(1)

    def receive(self) -> Any:
        return self._messages.get()

    def send(self, kind: str, value: object) -> None:
        data = pickle.dumps((kind, value))  # before anything is written, because it may fail
        try:
            with self._lock:  # any thread may log
                self._output.write(data)
                self._output.flush()
        except OSError:  # the parent has ended
            os._exit(1)

    def progress(self, step: str, done: int, total: int, unit: ProgressUnit, /) -> None:
        """Report progress, and wait until the caller's function has returned: it may end the job."""
        self.send("progress", (step, done, total, unit))
        self.receive()


class _SentLog(logging.Handler):
    """Sends log records, as text: their arguments may be anything."""

    def __init__(self, parent: _Parent):
        super().__init__()
        self._parent = parent

    def emit(self, record: logging.LogRecord) -> None:
        record.msg = visible(self.format(record))
        record.args = record.exc_info = record.exc_text = None
        self._parent.send("log", record)


class _LoggedOutput(io.TextIOBase):
    """Logs, line by line, what torch and transformers print, because it quotes config.json and the names of tensors."""

    def __init__(self) -> None:
        self._log = logger(f"{__name__}.libraries")
        self._line = ""

    def write(self, text: str) -> int:
        *lines, self._line = f"{self._line}{text[-MAX_PRINTED:]}".split("\n")
        for line in filter(str.strip, lines):
            self._log.warning("torch or transformers: %s", line.strip())
        self._line = self._line[-MAX_PRINTED:]
        return len(text)

    def fileno(self) -> int:
        return 2


def main() -> NoReturn:
    """Run one job, and end the process."""
    parent = _Parent()
    log = logging.getLogger("streamconv")
    log.addHandler(_SentLog(parent))
    sys.stdout = sys.stderr = _LoggedOutput()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the caller shows the progress
    warnings.filterwarnings("ignore", "xFormers is")  # from the code of DINOv2's authors
    warnings.filterwarnings("ignore", module="PIL")  # problems with the user's image are reported as errors
    try:
        _import_models()
        options, level = parent.receive()
        log.setLevel(level)
        models = ModelsHere(options)
        models.wait_until_ready()
        parent.send("ready", None)
        parent.send("result", models.check(parent.receive(), parent.progress))
    except BaseException as error:
        parent.send("error", _portable(error))
    os._exit(0)  # at once: tearing down torch's modules can take a second


def _import_models() -> None:
    """Import everything that running models needs.

    Raises:
        UsageError: something is missing or broken.
    """
    signal.setitimer(signal.ITIMER_PROF, MAX_IMPORT_SECONDS)  # ends the process, even within a library's loop
    gc.disable()  # collecting garbage among the many new objects takes a fifth of the time
    try:
        with without_invalid_endpoint():
            import streamconv.verification.model_checks  # noqa: F401
    except (Exception, SystemExit) as error:
        lines = "".join(traceback.format_exception_only(error)).strip().splitlines()[-3:]
        raise UsageError(
            "torch, torchvision, transformers or accelerate cannot be imported. Reinstall the one in the error or, if "
            "it could not map a file, allow more memory: " + "; ".join(map(str.strip, lines))
        ) from error
    gc.freeze()
    gc.enable()
    signal.setitimer(signal.ITIMER_PROF, 0)


def _portable(error: BaseException) -> tuple[BaseException, str]:
    """Return the error to raise in the parent, which may lack the error's class, and its traceback if it is a bug."""
    if isinstance(error, StreamconvError):
        return error, ""
    if isinstance(error, MemoryError):
        return UsageError(f"There is too little memory to run the models. {OUT_OF_MEMORY}"), ""
    return RuntimeError(f"{type(error).__name__}: {error}"), traceback.format_exc()
