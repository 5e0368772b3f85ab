"""Decides whether a file is the one that its authors published.

Its name, its shapes and its CRC-32s prove nothing: any file can have them. Two things do: streamconv downloaded it from
exactly the published URL, or its sha256 begins with the digits in its published name.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from streamconv.errors import OutputError
from streamconv.families.base import RemoteFile
from streamconv.families.registry import published_files
from streamconv.files.address import Location
from streamconv.files.local import LocalFile
from streamconv.formats.checkpoint import Checkpoint
from streamconv.progress import Progress
from streamconv.source.cache import Download, is_published, torch_hub_cache

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Authorship:
    """The answer to whether a file is the one that its authors published.

    ``address`` is the URL that the authors' file was downloaded from, and ``sha256`` that of the file's bytes; each is
    empty if it is not known. ``found`` is the published file that a file in torch.hub's cache is named after, if
    streamconv did not download it, so that it may be another file. ``contradicted`` is the published file that a file
    is named after, if its sha256 does not begin with the digits in that name, so that it is another file.
    """

    is_published: bool = False
    address: str = ""
    sha256: str = ""
    found: RemoteFile | None = None
    contradicted: RemoteFile | None = None


def authorship(location: Location, checkpoint: Checkpoint, digest: str = "") -> Authorship:
    """Return whether the checkpoint at ``location`` is its authors' own; ``digest`` is its sha256, if it was computed.

    No weights are read: the record of a download is trusted if the file still has the times in it.
    """
    if not isinstance(location, Path):
        return Authorship(is_published(location), str(location))
    file = _only_file(checkpoint)
    if file is None:
        return Authorship()
    record = Download.read_unchecked(file.path)
    known = digest
    if record is not None and (_has_times(file, record) or (digest and digest == record.sha256)):
        known = record.sha256
        if record.is_published:
            return Authorship(True, record.address, known)
    published = named_after(file.name)
    if published is not None and published.sha256_start and known:
        if known.startswith(published.sha256_start):
            return Authorship(True, sha256=known)
        return Authorship(sha256=known, contradicted=published)
    is_cached = os.path.realpath(file.path.parent) == os.path.realpath(torch_hub_cache())
    return Authorship(sha256=known, found=published if is_cached else None)


def compute_digests(checkpoints: Mapping[str, Checkpoint], progress: Progress) -> dict[str, str]:
    """Return, by role, the sha256 of each file whose origin only a sha256 can prove. Such a file is read completely.

    These are downloads whose times have changed, for example because the cache was moved, and files whose published
    name contains digits of the sha256.

    Raises:
        SourceError: a file cannot be read.
    """
    return {role: digest for role, each in checkpoints.items() if (digest := _digest(_only_file(each), progress))}


def _digest(file: LocalFile | None, progress: Progress) -> str:
    if file is None:
        return ""
    record, published = Download.read_unchecked(file.path), named_after(file.name)
    if record is not None and _has_times(file, record):
        return ""
    may_be_moved = record is not None and record.is_published and record.size == file.size
    if not may_be_moved and (published is None or not published.sha256_start):
        return ""
    digest = _sha256(file, progress)
    if record is not None and record.sha256 == digest:
        with suppress(OutputError):  # if this user cannot write the cache, it is computed each time
            replace(record, modified_ns=file.modified_ns, changed_ns=file.changed_ns).write(file.path)
    return digest


def _sha256(file: LocalFile, progress: Progress) -> str:
    digest, buffer = sha256(), memoryview(bytearray(_PIECE_BYTES))
    for at in range(0, file.size, _PIECE_BYTES):
        piece = buffer[: min(_PIECE_BYTES, file.size - at)]
        file.read_at(at, piece)
        digest.update(piece)
        progress(f"checking whether {file.name} is the published file", at + len(piece), file.size, "bytes")
    return digest.hexdigest()


def _only_file(checkpoint: Checkpoint) -> LocalFile | None:
    """Return the checkpoint's file, if it is a single one on this machine."""
    files = checkpoint.files
    return files[0] if len(files) == 1 and isinstance(files[0], LocalFile) else None


def _has_times(file: LocalFile, record: Download) -> bool:
    """Return whether the file has the size, mtime and ctime that it had when it was downloaded."""
    return (record.size, record.modified_ns, record.changed_ns) == (file.size, file.modified_ns, file.changed_ns)


def named_after(name: str) -> RemoteFile | None:
    """Return the published file that has this name."""
    return next((each for each in published_files() if each.filename == name), None)
