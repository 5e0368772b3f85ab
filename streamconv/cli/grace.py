"""Ends an interrupted process that does not end by itself.

An interruption is an exception in the main thread. It cannot be raised while that thread waits in C code, such as for a
name server, and libraries wait for their threads before they let it pass. Ending the process at any time is safe: files
are complete or absent, and unfinished work resumes.
"""

import os
import signal
import time
from _thread import start_new_thread
from collections.abc import Callable, Collection

GRACE_SECONDS = 4.0
REPORT_SECONDS = 0.5  # for the final message, which blocks if its pipe is full and not read


def end_after_signals(signals: Collection[int], report: Callable[[], None]) -> None:
    """End this process with 130, `GRACE_SECONDS` after one of these signals, once ``report`` has returned.

    The signals need Python handlers: their C part runs at once, and writes to the pipe that is read here.
    """
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    signal.set_wakeup_fd(sender, warn_on_full_buffer=False)

    def watch() -> None:
        while os.read(receiver, 1)[0] not in signals:
            pass
        time.sleep(GRACE_SECONDS)
        try:
            start_new_thread(report_and_end, ())
            time.sleep(REPORT_SECONDS)
        finally:
            os._exit(130)

    def report_and_end() -> None:
        try:
            report()
        finally:
            os._exit(130)

    start_new_thread(watch, ())  # not threading.Thread, which costs an import
