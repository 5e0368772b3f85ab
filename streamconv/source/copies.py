"""Finds the copy of a file in torch.hub's cache, if it is known to have the same bytes as the file at its URL."""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from streamconv.errors import SourceError
from streamconv.files.address import Address
from streamconv.files.base import UNVERSIONED, is_same_version
from streamconv.files.remote import RemoteFile
from streamconv.formats.checkpoint import Checkpoint, open_checkpoint
from streamconv.logs import logger
from streamconv.source.authors import authorship
from streamconv.source.cache import Download, is_published, own_path, torch_hub_path
from streamconv.source.resolve import Source

_log = logger(__name__)


def find_copy(address: Address, file: RemoteFile, remote: Checkpoint | None) -> Checkpoint | None:
    """Open the copy of a file in the cache, if there is one that is known to be of the version at ``address``.

    The copy of a published file must have been downloaded from its URL: equal names, sizes and CRC-32s would not prove
    that it is the authors' own.

    Args:
        file: The open file at ``address``.
        remote: Its index; None if the server sends only whole files.
    """
    for path in dict.fromkeys((own_path(address), torch_hub_path(address))):
        if not os.path.exists(path):
            continue
        try:
            copy = open_checkpoint(path)
        except SourceError as error:
            _log.debug("%s is not used: %s", path, error)
            continue
        if _is_copy(copy, path, file, remote) and (not is_published(address) or authorship(path, copy).is_published):
            return copy
        copy.close()
    return None


def has_copy(address: Address, file: RemoteFile, remote: Checkpoint) -> bool:
    """Return whether `find_copy` finds a copy; if its record tells, the copy is not opened."""
    record = Download.read(own_path(address))
    is_known = record is not None and record.size == file.size and _is_of_version(record, file)
    if is_known and not is_published(address):
        return True
    copy = find_copy(address, file, remote)
    if copy is not None:
        copy.close()
    return copy is not None


def _is_of_version(record: Download, file: RemoteFile) -> bool:
    return any(is_same_version(version, file.validators) for version in record.versions)


def _is_copy(copy: Checkpoint, path: Path, file: RemoteFile, remote: Checkpoint | None) -> bool:
    """Return whether ``copy`` has the bytes of ``file``: by its index with CRC-32s, its record, or its time."""
    if copy.size != file.size or (remote is not None and copy.fingerprint != remote.fingerprint):
        return False
    if remote is not None and has_checksums(copy):
        return True
    record = Download.read(path)
    if record is not None:
        return _is_of_version(record, file)
    return os.path.getmtime(path) == modified_time(file)  # as 0.2.0 and curl -R leave it


def explain_new_download(address: Address, file: RemoteFile) -> None:
    """Log why a file is downloaded although there is a copy of it."""
    if Download.read(own_path(address)) is None:
        if is_published(address) and os.path.exists(path := torch_hub_path(address)):
            _log.warning("%s may not be the file at %s, which is downloaded instead", path, address)
        return
    if {UNVERSIONED} == file.validators.keys():
        why = "its server sends neither an ETag nor a Last-Modified, so it may have changed"
    else:
        why = "it has changed on its server"
    _log.warning("%s was downloaded before, but %s: downloading it again", address, why)


def has_checksums(checkpoint: Checkpoint) -> bool:
    return all(tensor.record.crc32 is not None for tensor in checkpoint.values())


def offline_copies(source: Source) -> Source | None:
    """Return the source with the copies of its remote files, whatever their servers have now; None if one is missing.

    Without a network, torch.hub and huggingface_hub use their copies, too. The output's notes say so.
    """
    copies, notes = {}, []
    for role, location in source.locations.items():
        if not isinstance(location, Address):
            continue
        places = (torch_hub_path(location), own_path(location)) if is_published(location) else (own_path(location),)
        found = ((path, Download.read(path)) for path in places)
        path, download = next(((path, each) for path, each in found if each is not None), (places[0], None))
        if download is None:
            return None
        copies[role] = path
        notes.append(f"the copy of {location} of {download.date}: its server could not be asked whether it has changed")
    origins = {role: location for role, location in source.locations.items() if isinstance(location, Address)}
    return replace(
        source,
        backbone=copies.get("backbone", source.backbone),
        head=copies.get("head", source.head),
        origins=origins,
        notes=(*source.notes, *notes),
    )


def modified_time(file: RemoteFile) -> float | None:
    """Return the time of the last change that the server reports, in seconds since 1970."""
    from email.utils import parsedate_to_datetime  # takes half a megabyte, which only downloads should pay

    with suppress(TypeError, ValueError, OverflowError):
        return parsedate_to_datetime(str(file.validators.get("last_modified"))).timestamp()
    return None
