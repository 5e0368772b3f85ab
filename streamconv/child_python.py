"""The command that starts a child process which runs Python code and imports what this process would import."""

import sys


def python_command(code: str) -> list[str]:
    """Return the arguments of a process that runs ``code`` with this process's Python, paths and isolation.

    `python -m` would search the current folder first, and run a torch.py that is there.
    """
    return [sys.executable, *_isolation(), "-c", f"import sys; sys.path = {list(map(str, sys.path))!a}; {code}"]


def _isolation() -> list[str]:
    """Return the options with which this Python ignores its environment, so that the child ignores it, too."""
    flags = (("-I", sys.flags.isolated), ("-E", sys.flags.ignore_environment), ("-s", sys.flags.no_user_site))
    return [option for option, is_given in flags if is_given]
