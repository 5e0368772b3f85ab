"""Identifies the process that writes an output, and finds out whether it has ended."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from streamconv.display import printable

_ENDED = "ended"


@dataclass(frozen=True)
class Process:
    """A process, and when it took a lock.

    ``system`` identifies a running system on which process ids are unique: a boot of a machine, and a container's own
    ids. ``start`` is the process's start on it. Either is empty if the system does not tell.
    """

    pid: int
    host: str
    since: str
    system: str = ""
    start: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {printable(self.host)}, since {printable(self.since)}"

    @classmethod
    def this(cls) -> "Process":
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return cls(os.getpid(), os.uname().nodename, now, _system(), _start_of(os.getpid()) or "")

    @property
    def is_here(self) -> bool:
        """True if it runs, or ran, on this system."""
        return (self.host, self.system) == (os.uname().nodename, _system())

    @property
    def is_dead(self) -> bool:
        """True if it ran on this system and has ended."""
        if not self.is_here:
            return False
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:  # another user's
            pass
        start = _start_of(self.pid)
        if start is None:  # the system hides it
            return False
        return bool(self.start and start != self.start)  # it waits for its parent, or its id is another process's


def _system() -> str:
    boot = ids = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        ids = os.readlink("/proc/self/ns/pid")
    return f"{boot} {ids}".strip()


def _start_of(pid: int) -> str | None:
    """Return when a process started, in ticks since the boot; `_ENDED` for a zombie, and None if it is not known."""
    try:
        # A program's name, in parentheses, may be any bytes.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()
        return _ENDED if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return None
