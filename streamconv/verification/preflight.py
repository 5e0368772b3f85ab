"""Checks of the verification's options before hours of conversion, without importing torch into this process."""

import os
import sys
from pathlib import Path

from streamconv.errors import OutputError, UsageError


def check_report(path: Path) -> None:
    """Check that a report can be rendered and written to ``path``.

    Raises:
        UsageError: the name does not end in .html, or the packages for a report are not installed.
        OutputError: the file cannot be written.
    """
    from streamconv.verification.report import check_installed  # imported only if a report is wanted

    check_installed()
    parent = path.absolute().parent
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"The report {path} must be an HTML file. Use --report FILE.html.")
    if os.path.isdir(path) or not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        raise OutputError(f"{path} cannot be written. Choose a --report file in a folder that exists and is writable.")


def check_arguments(device: str, image: str | None, reference: str) -> None:
    """Check that the device, the image and the reference exist.

    Raises:
        UsageError: one of them does not.
    """
    if device in ("auto", "cpu") and image is None and reference == "builtin":
        return
    if "torch" in sys.modules:
        from streamconv.verification.devices import check_arguments_here

        check_arguments_here(device, reference, image)
        return
    import subprocess  # takes memory, which a conversion without these options should not pay

    arguments = [device, reference, *([image] if image is not None else [])]
    command = [sys.executable, "-m", "streamconv.verification.devices", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode == UsageError.exit_code and result.stdout:
        raise UsageError(result.stdout.strip())
    result.check_returncode()  # any other exit is a bug: show its traceback
