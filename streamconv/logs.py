"""The loggers of the library. Their records are safe to show: text from files and servers is escaped."""

import logging

from streamconv.display import visible


def logger(name: str) -> logging.Logger:
    """Return the logger of a module. Arguments of its records that are not numbers become escaped text.

    This happens here and not in a handler, because handlers belong to the caller.
    """
    found = logging.getLogger(name)
    found.addFilter(_escape_arguments)  # added once, however often this is called
    return found


def _escape_arguments(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        record.args = tuple(each if isinstance(each, (int, float)) else visible(str(each)) for each in record.args)
    return True
