"""Connects to a Dask cluster, or starts one on this machine, for the time of a command."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from streamconv.display import printable
from streamconv.errors import UsageError
from streamconv.jobs.dask.local_workers import local_workers

if TYPE_CHECKING:
    from distributed import Client

CONNECT_SECONDS = 10
MIN_WORKER_BYTES = 256 << 20  # a process with its imports, and the memory that writing a file takes
NO_DASHBOARD = "127.0.0.1:0"  # None would be a fixed port, which may be taken


@contextmanager
def client_of(scheduler: str) -> "Iterator[Client]":
    """Connect to a scheduler; the connection is closed at the end.

    Raises:
        UsageError: distributed is not installed, or no scheduler answers at the address.
    """
    distributed = import_distributed()
    try:
        import_module("distributed.comm").resolve_address(scheduler)  # a client that fails cannot be closed
    except (ValueError, OSError, TypeError, ImportError) as error:
        raise UsageError(
            f"{printable(scheduler)} is not the address of a Dask scheduler: {_reason(error)}. Give one such as "
            "tcp://10.0.0.1:8786."
        ) from None
    try:
        client = distributed.Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError):
        raise UsageError(
            f"No Dask scheduler answers at {printable(scheduler)} within {CONNECT_SECONDS} s. Start one with "
            "`dask scheduler`, which prints its address, or check the address and the firewall."
        ) from None
    with client:
        yield client


@contextmanager
def local_client(workers: int) -> "Iterator[Client]":
    """Start a scheduler and ``workers`` processes on this machine; they end with the block.

    Raises:
        UsageError: distributed is not installed, there is too little memory, or the processes cannot be started.
    """
    distributed = import_distributed()
    memory = import_module("distributed.system").MEMORY_LIMIT // workers
    if memory < MIN_WORKER_BYTES:
        possible = memory * workers // MIN_WORKER_BYTES
        raise UsageError(
            f"{workers} worker{'s' * (workers != 1)} would have {memory >> 20} MiB of memory each, and need "
            f"{MIN_WORKER_BYTES >> 20} MiB. {f'Start at most {possible}' if possible else 'Convert without workers'}."
        )
    with (
        TemporaryDirectory(prefix="streamconv-dask-", ignore_cleanup_errors=True) as folder,
        distributed.LocalCluster(
            n_workers=0, processes=True, dashboard_address=NO_DASHBOARD, silence_logs=False,
            scheduler_kwargs={"dashboard": False, "local_directory": folder},
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
        local_workers(client, workers, memory, Path(folder)),
    ):  # fmt: skip
        yield client


def import_distributed() -> Any:
    """Return the package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module("distributed")
    except ModuleNotFoundError as error:
        raise UsageError(
            "This needs the Python package distributed, which is not installed. Run `pip install 'streamconv[dask]'`."
        ) from error


def _reason(error: BaseException) -> str:
    return printable(str(error).rstrip(".") or type(error).__name__)
