"""Converts published checkpoints to the Hugging Face format by streaming, and verifies the result.

Importing this package imports neither torch nor transformers. `run` and `verify` start a process that does; if the
calling process has imported transformers already, they use that.

Every job reports to a `Progress` callback, which can end the job by raising `Cancelled`. Options, results and errors
can be copied, pickled and sent to other processes. Events such as a retried connection, a resumed file or a finished
check are logged to the logger "streamconv", which has no handler of its own. In error messages, log records and
progress reports, text from files and servers is escaped and on one line. Strings in results and plans are as they were
read.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

logging.getLogger(__name__).addHandler(logging.NullHandler())

if TYPE_CHECKING:
    from streamconv.api import *  # noqa: F403
else:
    # The public names are imported when one is first used: importing them takes 0.2 s, and the command line must handle
    # signals before that.
    def __getattr__(name: str) -> object:
        if name.startswith("_") and name not in ("__all__", "__version__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        api = import_module("streamconv.api")
        for each in ("__all__", *api.__all__):
            globals().setdefault(each, getattr(api, each))
        if name in globals():  # a public name, or a module that was imported with them
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        dunders = (name for name in globals() if name.startswith("__"))
        return sorted({*dunders, *import_module("streamconv.api").__all__})
