"""What tests change in the processes of Dask workers, by `Client.run`."""

import os
import time
from typing import Any

from streamconv import _version
from streamconv.jobs.dask import task
from tests.support import SMALL_STEPS

_changed: list[tuple[Any, str, Any]] = []


def write_slowly(pause: float) -> None:
    """Write in small steps, with a pause after each; progress is reported after every step."""
    for module, name, value in SMALL_STEPS:
        _set(module, name, value)
    _set(task, "REPORT_SECONDS", 0.0)
    advance = task._RunningTask.advance

    def advance_slowly(*args: Any) -> None:
        time.sleep(pause)
        advance(*args)

    _set(task._RunningTask, "advance", advance_slowly)


def pretend_version(version: str) -> None:
    _set(_version, "__version__", version)


def end_when_writing() -> None:
    """End the process, as if it were killed, when it begins to write a file."""
    _set(task._RunningTask, "advance", lambda *args: os._exit(1))


def refuse_busy_files() -> None:
    """Do not wait for a file that another process has locked."""
    _set(task, "BUSY_SECONDS", 0.0)


def restore() -> None:
    """Undo all changes of this process."""
    while _changed:
        setattr(*_changed.pop())


def _set(owner: Any, name: str, value: Any) -> None:
    _changed.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)
