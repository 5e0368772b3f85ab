"""Downloads a source's files into torch.hub's cache: complete or absent, and resumed after an interruption."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from streamconv.errors import CorruptError, OutputError, SourceError
from streamconv.files.address import Address, Location
from streamconv.files.base import ByteRange, File
from streamconv.files.open import open_file
from streamconv.files.reader import Reader
from streamconv.files.remote import RemoteFile
from streamconv.formats.checkpoint import Checkpoint, open_checkpoint
from streamconv.logs import logger
from streamconv.output.disk import require_space, require_writable
from streamconv.output.files import as_output_error, make_folder, temporary_path
from streamconv.output.journal import Journal
from streamconv.output.manifest import Provenance, SourceFile
from streamconv.output.resumable import journal_path, missing_bytes, resumable_files
from streamconv.output.writer import written_file
from streamconv.progress import Progress
from streamconv.source.authors import named_after
from streamconv.source.cache import MAX_VERSIONS, Download, download_path, forget_download, is_published
from streamconv.source.copies import explain_new_download, find_copy, has_checksums, has_copy, modified_time
from streamconv.source.resolve import Source
from streamconv.tensors.checksums import RecordChecks, read_crc
from streamconv.tensors.expressions import Read, Record
from streamconv.tensors.info import TensorInfo

_log = logger(__name__)


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
        OutputError: the cache cannot be written, or another process is downloading the file.
    """

    local_checkpoints: dict[str, Checkpoint] = {}

    def local(role: str, location: Location) -> Path:
        remote = opened[role] if opened is not None else None
        if not isinstance(location, Address):
            if remote is not None:
                local_checkpoints[role] = remote
            return location
        with _cache_advice(), ExitStack() as closed_now:
            file = _remote(remote.files[0] if remote else closed_now.enter_context(closing(open_file(location))))
            copy = find_copy(location, file, remote)
            if copy is None:
                explain_new_download(location, file)
                path = download_path(location)
                copy = _download(location, path, file, remote, progress)
            if copy is None:
                return path
            local_checkpoints[role] = stack.enter_context(copy)
            return copy.paths[0]

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
            if isinstance(location, Address) and not has_copy(location, _remote(opened[role].files[0]), opened[role]):
                missing[download_path(location)] = opened[role].size
        for path, size in missing.items():
            require_writable(path.parent)
            written = Journal.read(journal_path([path])).size_of(path.name)
            require_space(path.parent, missing_bytes(path, size, written), besides=output)
    return missing


@contextmanager
def _cache_advice() -> Iterator[None]:
    """Add to an error about torch.hub's cache how to do without it."""
    try:
        yield
    except OutputError as error:
        hint = "This is torch.hub's cache: set TORCH_HOME to use another folder, or use --stream to keep no copy."
        raise OutputError(f"{error} {hint}") from error


def _download(
    address: Address, path: Path, file: RemoteFile, remote: Checkpoint | None, progress: Progress
) -> Checkpoint | None:
    """Download a file to ``path``, or return the copy that another process has completed meanwhile."""
    with as_output_error(path):
        make_folder(path.parent)
    provenance = Provenance(
        source={"file": _describe(address, path, file, remote)}, plan=f"{address}, {file.size} bytes"
    )
    record = Record(file.ref, path.name, ByteRange(0, file.size))
    contents = Read(TensorInfo("U8", (file.size,)), record, 0, (1,))

    def advance(position: int, is_kept: bool) -> None:
        progress(f"{'checking' if is_kept else 'downloading'} {path.name}", position, file.size, "bytes")

    reader = Reader([file])
    if remote is not None and has_checksums(remote):
        file.proved_by = "copy"
    with resumable_files({path: file.size}, provenance, force=True) as journal:
        if (copy := find_copy(address, file, remote)) is not None:
            journal.discard(path)
            return copy
        previous = Download.read(path)
        with written_file(path, [(path.name, contents)], journal, reader, RecordChecks(reader), advance) as result:
            partial = temporary_path(path)
            try:
                is_crc_checked = _require_intact(partial, address, path.name, progress)
                _require_published_digest(result[0].sha256, address)
            except SourceError:
                journal.discard(path)  # the next attempt starts over
                raise
            is_same = previous is not None and previous.sha256 == result[0].sha256
            _set_time(partial, path, file, is_same=is_same)
            with as_output_error(partial):
                state = os.stat(partial)
            forget_download(path)
        known = previous.versions if previous is not None and is_same else ()
        Download(
            address=str(address),
            size=file.size,
            sha256=result[0].sha256,
            versions=(*known, file.validators)[-MAX_VERSIONS:],
            is_crc_checked=is_crc_checked,
            date=time.strftime("%Y-%m-%d", time.gmtime()),
            is_published=is_published(address),
            modified_ns=state.st_mtime_ns,
            changed_ns=_time_of_renaming(path, state),
        ).write(path)
    _log.info("downloaded %s to %s", address, path)
    return None


def _require_published_digest(digest: str, address: Address) -> None:
    """Require of a file with the name of a published one that its sha256 begins with the digits in that name, if any.

    Raises:
        CorruptError: it does not.
    """
    published = named_after(address.name)
    if published is not None and not digest.startswith(published.sha256_start):
        raise CorruptError(
            f"{address} is not the file that its authors published under this name: its sha256 begins with "
            f"{digest[:8]}, and not with {published.sha256_start}, as the name states. It was not kept. Use the "
            "authors' own address."
        )


def _time_of_renaming(path: Path, state: os.stat_result) -> int | None:
    """Return when a file with this ``state`` was renamed to ``path``; None if another one has replaced it already."""
    with suppress(OSError):
        renamed = os.stat(path)
        if os.path.samestat(renamed, state):
            return renamed.st_ctime_ns
    return None


def _remote(file: File) -> RemoteFile:
    assert isinstance(file, RemoteFile), file
    return file


def _describe(address: Address, path: Path, file: RemoteFile, remote: Checkpoint | None) -> SourceFile:
    """Describe what is downloaded, for the journal: CRC-32s prove that two parts belong together, else a version."""
    if remote is not None and has_checksums(remote):
        return SourceFile(path.name, file.size, remote.fingerprint, str(address))
    return SourceFile(path.name, file.size, "", str(address), version={k: (v,) for k, v in file.ref.version})


def _set_time(partial: Path, path: Path, file: RemoteFile, *, is_same: bool) -> None:
    """Give a copy the time that distinguishes it from other versions when it is converted: see `SourceFile.version`.

    That is the server's time, as with ``curl -R``, and for the same bytes as before, the time of the copy before.
    """
    before = os.stat(path).st_mtime_ns if os.path.exists(path) else None
    modified = modified_time(file)
    with suppress(OSError):  # a file system that sets no times; then a new copy counts as another version
        if is_same and before is not None:
            os.utime(partial, ns=(before, before))
        elif modified is not None and before != modified * 1_000_000_000:
            os.utime(partial, (modified, modified))


def _require_intact(path: Path, address: Address, name: str, progress: Progress) -> bool:
    """Compare every record with its CRC-32, before the file is renamed into place; return whether all have one."""
    with open_checkpoint(path, origin=address) as checkpoint:
        reader = checkpoint.reader
        records = {tensor.record for tensor in checkpoint.values() if tensor.record.crc32 is not None}
        total, done = sum(record.range.length for record in records), 0
        for record in sorted(records, key=lambda record: record.range.start):
            if read_crc(record, reader.open(record.file)) != record.crc32:
                raise CorruptError(
                    f"{address} was damaged on the way: bytes {record.range.start:,} to {record.range.end:,} do not "
                    "match their CRC-32. Run the same command again to download it again."
                )
            done += record.range.length
            progress(f"checking {name}", done, total, "bytes")
        return has_checksums(checkpoint)
