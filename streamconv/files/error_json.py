"""The message in a server's JSON answer to a request that failed."""

from typing import Any

_KEYS = ("error", "message", "detail", "error_description", "msg", "title")


def error_message(value: Any) -> str:
    """Return the message in a parsed answer; empty if there is none."""
    for key in _KEYS:
        found = value.get(key) if isinstance(value, dict) else None
        if isinstance(found, dict):
            found = found.get("message")
        if isinstance(found, str) and found:
            return found
    return ""
