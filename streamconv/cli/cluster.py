"""The Dask cluster that a command uses: the one that the user names, or worker processes on this machine."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from streamconv.progress import Progress

# Loggers with levels of their own: two of Dask's, and tornado's, on which Dask is built.
_LOGGERS = ("distributed", "distributed.client", "tornado.application")


@contextmanager
def cluster_client(scheduler: str | None, workers: int | None, progress: Progress) -> Iterator[object]:
    """Yield a client of the cluster until the command ends; None if neither a scheduler nor workers are wanted.

    Raises:
        UsageError: see `client_of` and `local_client`.
    """
    if scheduler is None and workers is None:
        yield None
        return
    from streamconv.jobs.dask.client import client_of, import_distributed, local_client  # rarely needed

    import_distributed()  # sets the levels of its loggers
    with ExitStack() as stack:
        for name in _LOGGERS:  # streamconv reports what matters
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
        if scheduler is not None:
            progress(f"connecting to {scheduler}", 0, 1, "steps")
            yield stack.enter_context(client_of(scheduler))
        else:
            progress(f"starting {workers} worker{'s' * (workers != 1)}", 0, 1, "steps")
            yield stack.enter_context(local_client(workers or 1))
