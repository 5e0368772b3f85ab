"""The loggers of the library. What they log is safe to show: text from elsewhere in it is escaped."""

import logging

from streamconv.display import visible


def logger(name: str) -> logging.Logger:
    """Return the logger of a module, whose records have arguments that are numbers or text without control characters.

    They are escaped here rather than in a handler, since the handlers are the caller's own.
    """
    found = logging.getLogger(name)
    found.addFilter(_escape_arguments)  # which adds it once
    return found


def _escape_arguments(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        record.args = tuple(each if isinstance(each, (int, float)) else visible(str(each)) for each in record.args)
    return True
