"""Refuses what a verification cannot do before hours of conversion, without importing torch into this process."""

import os
import subprocess
import sys
from pathlib import Path

from streamconv.errors import OutputError, UsageError


def check_report(path: Path) -> None:
    """
    Raises:
        UsageError: it is no page's name, or what renders pages is not installed.
        OutputError: it cannot be written.
    """
    from streamconv.verification.report import require  # with what it imports, only for those who want one

    require()
    parent = path.absolute().parent
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{path} is no name for a page. Give --report FILE.html.")
    if os.path.isdir(path) or not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        raise OutputError(f"{path} cannot be written. Give --report a file in a folder that can be.")


def check_arguments(device: str, image: str | None, reference: str) -> None:
    """
    Raises:
        UsageError: the device, the image or the reference does not exist.
    """
    if device in ("auto", "cpu") and image is None and reference == "builtin":
        return
    if "torch" in sys.modules:
        from streamconv.verification.devices import check_arguments_here

        check_arguments_here(device, reference, image)
        return
    words = [device, reference, *([image] if image is not None else [])]
    command = [sys.executable, "-m", "streamconv.verification.devices", *words]
    asked = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if asked.returncode == UsageError.exit_code and asked.stdout:
        raise UsageError(asked.stdout.strip())
    asked.check_returncode()  # anything else is a bug, and shows its traceback
