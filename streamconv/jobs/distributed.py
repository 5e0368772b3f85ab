"""Writes the weight files of a plan by the workers of a Dask cluster."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from streamconv.files.address import Location
from streamconv.output.manifest import WrittenFile
from streamconv.output.planned import PlannedConversion
from streamconv.planning.shards import Shard
from streamconv.progress import Progress


def write_files_on(
    client: Any, planned: PlannedConversion, location: Location, shards: Sequence[Shard], progress: Progress
) -> tuple[dict[str, WrittenFile], int]:
    """Write weight files by the workers of ``client``."""
    raise NotImplementedError


def client_of(scheduler: str) -> AbstractContextManager[Any]:
    """Return a context with a client of the scheduler at this address."""
    raise NotImplementedError


def local_client(workers: int) -> AbstractContextManager[Any]:
    """Return a context with a client of a cluster of this many processes on this machine."""
    raise NotImplementedError
