"""The command line as it may be shown: in messages, logs and reports."""

import shlex

from streamconv.redaction import shown_argument


def shown_command(arguments: list[str]) -> str:
    """Return the command line without the parts of URLs that may be secret: users, passwords, queries."""
    return shlex.join(["streamconv", *map(shown_argument, arguments)])


def command_to_resume(arguments: list[str]) -> str:
    shown = shown_command(arguments)
    is_whole = shown == shlex.join(["streamconv", *arguments])
    return shown if is_whole else f"{shown}  (with the full URLs; parts that may be secret are not shown here)"
