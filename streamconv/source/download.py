"""Downloads a source's files into torch.hub's cache: complete or absent, and resumed after an interruption."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from streamconv.errors import CorruptError, OutputError, SourceError
from streamconv.files.address import Address, Location
from streamconv.files.base import ByteRange, File
from streamconv.files.open import open_file
from streamconv.files.reader import Reader
from streamconv.formats.checkpoint import Checkpoint, open_checkpoint
from streamconv.output.disk import require_space, require_writable
from streamconv.output.files import as_output_error, make_folder, temporary_path
from streamconv.output.manifest import Provenance, SourceFile
from streamconv.output.resumable import resumable_files
from streamconv.output.writer import written_file
from streamconv.progress import Progress
from streamconv.source.resolve import Source, torch_hub_cache
from streamconv.tensors.checksums import RecordChecks, read_crc
from streamconv.tensors.expressions import Record, SourceTensor
from streamconv.tensors.info import TensorInfo

_log = logging.getLogger(__name__)


def downloaded(
    source: Source, progress: Progress, stack: ExitStack, opened: Mapping[str, Checkpoint] | None = None
) -> tuple[Source, dict[str, Checkpoint]]:
    """Download the remote files of a source into torch.hub's cache.

    Args:
        stack: Closes the checkpoints that are returned.
        opened: The source's checkpoints by role; None if their indexes cannot be read remotely.

    Returns:
        The source with local files only, and those of its checkpoints that are already open, by role.

    Raises:
        SourceError: a file cannot be fetched, or arrived damaged.
        OutputError: the cache cannot be written, or holds another file under that name.
    """

    local_checkpoints: dict[str, Checkpoint] = {}

    def local(role: str, location: Location) -> Path:
        if not isinstance(location, Address):
            if opened is not None:
                local_checkpoints[role] = opened[role]
            return location
        with _cache_advice():
            path = torch_hub_cache() / location.name
            if os.path.exists(path):
                local_checkpoints[role] = kept = stack.enter_context(open_checkpoint(path))
                _require_same(location, path, kept, opened[role] if opened is not None else None)
            elif opened is not None:
                _download(location, path, opened[role].files[0], progress)
            else:
                with closing(open_file(location)) as file:
                    _download(location, path, file, progress)
            return path

    origins = {role: location for role, location in source.locations.items() if isinstance(location, Address)}
    paths = {role: local(role, location) for role, location in source.locations.items()}
    local_source = replace(source, backbone=paths["backbone"], head=paths.get("head"), origins=origins)
    return local_source, local_checkpoints


def check_downloads(
    source: Source, opened: Mapping[str, Checkpoint], output: tuple[Path, int] | None
) -> dict[Path, int]:
    """Return the files that `downloaded` would fetch, with their sizes in bytes. Nothing is written.

    Args:
        output: The folder that will be written while the download is kept, and the bytes that it will grow by.

    Raises:
        OutputError: the cache cannot be written or is too full.
    """
    missing = {}
    with _cache_advice():
        for role, location in source.locations.items():
            path = torch_hub_cache() / location.name
            if isinstance(location, Address) and not os.path.exists(path):  # `downloaded` checks a file that exists
                missing[path] = opened[role].size
        for path, size in missing.items():
            begun = temporary_path(path)
            require_writable(path.parent)
            size_left = size - (begun.stat().st_blocks * 512 if os.path.exists(begun) else 0)
            require_space(path.parent, size_left, besides=output)
    return missing


@contextmanager
def _cache_advice() -> Iterator[None]:
    """Add to an error about torch.hub's cache how to do without it."""
    try:
        yield
    except OutputError as error:
        hint = "This is torch.hub's cache: set TORCH_HOME to use another folder, or use --stream to keep no copy."
        raise OutputError(f"{error}\n{hint}") from error


def _download(address: Address, path: Path, file: File, progress: Progress) -> None:
    with as_output_error(path):
        make_folder(path.parent)
    version = {key: (value,) for key, value in file.ref.version}
    provenance = Provenance(
        source={"file": SourceFile(path.name, file.size, "", str(address), version=version)},
        plan=f"{address}, {file.size} bytes",
    )
    record = Record(file.ref, path.name, ByteRange(0, file.size))
    contents = SourceTensor(TensorInfo("U8", (file.size,)), record, 0, (1,))

    def advance(position: int, is_kept: bool) -> None:
        progress(f"{'checking' if is_kept else 'downloading'} {path.name}", position, file.size, "bytes")

    reader = Reader([file])
    with (
        resumable_files({path: file.size}, provenance) as journal,
        written_file(path, [(path.name, contents)], journal, reader, RecordChecks(reader), advance),
    ):
        partial = temporary_path(path)
        try:
            _require_intact(partial, str(address), path.name, progress)
        except SourceError:
            journal.discard(path)  # the next attempt starts over
            raise
        if (modified := _modified(file)) is not None:
            os.utime(partial, (modified, modified))  # as curl -R does, for `_require_same`
    _log.info("downloaded %s to %s", address, path)


def _require_intact(path: Path, where: str, name: str, progress: Progress) -> None:
    """Compare every record with its CRC-32, before the file is renamed into place."""
    with open_checkpoint(path, where=where) as checkpoint:
        reader = checkpoint.reader
        records = {tensor.record for tensor in checkpoint.values() if tensor.record.crc32 is not None}
        total, done = sum(record.range.length for record in records), 0
        for record in sorted(records, key=lambda record: record.range.start):
            if read_crc(record, reader.open(record.file)) != record.crc32:
                raise CorruptError(
                    f"{where} was damaged on the way: bytes {record.range.start:,} to {record.range.end:,} do not "
                    "match their CRC-32. Run the same command again to download it again."
                )
            done += record.range.length
            progress(f"checking {name}", done, total, "bytes")


def _require_same(address: Address, path: Path, cached: Checkpoint, remote: Checkpoint | None) -> None:
    """Require that the cached file of this name came from ``address``, by its CRC-32s or its modification time.

    ``remote`` is None if the server sends only whole files: then the size and the modification time must suffice.
    """
    if remote is None:
        with closing(open_file(address)) as file:
            is_same = cached.size == file.size and os.path.getmtime(path) == _modified(file)
    else:
        has_checksums = all(tensor.record.crc32 is not None for tensor in cached.values())
        is_same = cached.fingerprint == remote.fingerprint and (
            has_checksums or os.path.getmtime(path) == _modified(remote.files[0])
        )
    if not is_same:
        raise OutputError(
            f"{path} exists already and may not be a copy of {address}. If it is one, give it as the source; otherwise "
            "delete it."
        )


def _modified(file: File) -> float | None:
    """Return the time of the last change that the server reports, in seconds since 1970."""
    from email.utils import parsedate_to_datetime  # takes half a megabyte, which only downloads should pay

    with suppress(TypeError, ValueError, OverflowError):
        return parsedate_to_datetime(str(getattr(file, "modified", None))).timestamp()
    return None
