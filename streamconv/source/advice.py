"""Adds advice to errors about damaged files in torch.hub's cache."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamconv.errors import ChangedError, CorruptError, NotACheckpointError, SourceError, TruncatedError
from streamconv.source.cache import torch_hub_cache
from streamconv.source.resolve import Source


@contextmanager
def named_torch_hub_copy(source: Source) -> Iterator[None]:
    """Add the advice to delete a file in torch.hub's cache to an error about it, so that it is fetched again."""
    try:
        yield
    except (CorruptError, TruncatedError, NotACheckpointError) as error:
        cached = [
            path for path in source.locations.values() if isinstance(path, Path) and torch_hub_cache() in path.parents
        ]
        path = next((path for path in cached if _is_at(error, path)), None)
        if path is None or isinstance(error, ChangedError):
            raise
        hint = f"It is a copy in torch.hub's cache. Delete it to fetch it again: {path}"
        raise type(error)(f"{error} {hint}") from error


def _is_at(error: SourceError, path: Path) -> bool:
    return isinstance(error.location, Path) and os.path.abspath(error.location) == os.path.abspath(path)
