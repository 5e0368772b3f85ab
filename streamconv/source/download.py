"""Brings a source's files into torch.hub's cache: whole or absent, and gone on with after an interruption."""

import glob
import os
from contextlib import closing, suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from streamconv.errors import CorruptError, OutputError, SourceError
from streamconv.files.address import Address, Location
from streamconv.files.base import ByteRange, File
from streamconv.files.open import open_file
from streamconv.formats.checkpoint import open_checkpoint
from streamconv.output.files import (
    as_output_error,
    atomic_file,
    make_folder,
    open_exclusive,
    require_space,
    temporary_path,
)
from streamconv.progress import Progress
from streamconv.source.resolve import Source, torch_hub_cache
from streamconv.tensors.checksums import read_crc

SYNC_BYTES = 32 << 20
BUFFER_BYTES = 1 << 20


def downloaded(source: Source, progress: Progress) -> Source:
    """The source, all of it on this machine; what lies at an address is in torch.hub's cache then.

    Raises:
        SourceError: it cannot be had, or came damaged.
        OutputError: the cache cannot be written, or holds another file under that name.
    """

    def kept(place: Location) -> Path:
        if not isinstance(place, Address):
            return place
        try:
            return _download(place, torch_hub_cache() / place.name, progress)
        except OutputError as error:
            hint = "It is torch.hub's folder: TORCH_HOME names another one, and --stream keeps no copy."
            raise OutputError(f"{error}\n{hint}") from error

    origins = {role: place for role, place in source.locations.items() if isinstance(place, Address)}
    head = None if source.head is None else kept(source.head)
    return replace(source, backbone=kept(source.backbone), head=head, origins=origins)


def _download(address: Address, path: Path, progress: Progress) -> Path:
    def notify(text: str) -> None:
        progress(text, 0, 1, "steps")

    with closing(open_file(address, notify)) as file:
        if os.path.exists(path):
            _require_same(address, path, file)
            return path
        with as_output_error(path):
            make_folder(path.parent)
        version = sha256(repr((str(address), file.size, file.ref.version)).encode()).hexdigest()[:16]
        _remove_others(path, version)
        partial = temporary_path(path, version)
        missing = file.size - (os.path.getsize(partial) if os.path.exists(partial) else 0)
        require_space(path.parent, missing)
        with atomic_file(path, resume=True, version=version) as output:
            # What was written in the last moments before a power cut may be missing.
            done = max(0, output.size - 2 * SYNC_BYTES)
            output.truncate(done)
            file.prefetch([ByteRange(done, file.size - done)])
            buffer, synced = memoryview(bytearray(BUFFER_BYTES)), done
            while done < file.size:
                part = buffer[: min(BUFFER_BYTES, file.size - done)]
                file.read_at(done, part)
                output.write_at(done, part)
                done += len(part)
                if done - synced >= SYNC_BYTES:
                    output.sync(synced, done - synced)
                    synced = done
                progress(f"downloading {path.name}", done, file.size, "bytes")
            try:
                _require_intact(partial, path.name, progress)
            except SourceError as error:
                output.truncate(0)  # to begin anew
                text = str(error).replace(str(partial), str(address)).replace(partial.name, str(address))
                raise type(error)(text) from error
            if (modified := _modified(file)) is not None:
                os.utime(partial, (modified, modified))  # as curl -R does, for `_require_same`
    return path


def _require_intact(path: Path, name: str, progress: Progress) -> None:
    """Hold every record against its CRC-32, before anyone finds the file."""
    with open_checkpoint(path) as checkpoint:
        reader = checkpoint.reader
        records = {tensor.record for tensor in checkpoint.values() if tensor.record.crc32 is not None}
        total, done = sum(record.range.length for record in records), 0
        for record in sorted(records, key=lambda record: record.range.start):
            if read_crc(record, reader.open(record.file)) != record.crc32:
                raise CorruptError(
                    f"{path} came damaged: bytes {record.range.start:,} to {record.range.end:,} do not match their "
                    "CRC-32. Run again, to fetch it anew."
                )
            done += record.range.length
            progress(f"checking {name}", done, total, "bytes")


def _require_same(address: Address, path: Path, file: File) -> None:
    """That the cache's file of this name came from there: its CRC-32s say so, or its time is the server's."""
    with open_checkpoint(path) as kept, open_checkpoint(address, read_local_headers=False) as there:
        has_checksums = all(tensor.record.crc32 is not None for tensor in kept.values())
        modified = _modified(file)
        if kept.fingerprint == there.fingerprint and (has_checksums or os.path.getmtime(path) == modified):
            return
    raise OutputError(
        f"{path} is there already, and is not known to be {address}. Name the file itself if it is the one, "
        "else delete it."
    )


def _modified(file: File) -> float | None:
    """When the server says that the file was last changed, in seconds since 1970."""
    from email.utils import parsedate_to_datetime  # half a megabyte, which a file on this machine needs not

    with suppress(TypeError, ValueError, OverflowError):
        return parsedate_to_datetime(str(getattr(file, "modified", None))).timestamp()
    return None


def _remove_others(path: Path, version: str) -> None:
    """What interrupted downloads of other versions left, and no one goes on with."""
    for left in path.parent.glob(temporary_path(Path(glob.escape(path.name)), "?" * len(version)).name):
        with suppress(OSError):
            if left != temporary_path(path, version):
                fd = open_exclusive(left)
                left.unlink()
                os.close(fd)
