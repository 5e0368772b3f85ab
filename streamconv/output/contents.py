"""The contents of a file to be written: segments, which are cut into pieces and read into buffers."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from streamconv.errors import CorruptError
from streamconv.files.base import FileRef
from streamconv.files.reader import Reader
from streamconv.files.remote import RemoteFile
from streamconv.formats.segments import LateBytes
from streamconv.output.files import OutputFile
from streamconv.output.hashing import BUFFER_BYTES
from streamconv.output.journal import ResumePoint
from streamconv.tensors.checksums import RecordChecks
from streamconv.tensors.evaluation import Evaluator
from streamconv.tensors.expressions import Expression, Read, Record
from streamconv.tensors.tiles import PIECE_BYTES, Part, contiguous_read, parts

Segments = Sequence[bytes | tuple[str, Expression] | LateBytes]
"""Bytes, tensors with their names, and bytes that depend on the tensors' CRC-32s, in the order of the file."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a segment: of a tensor, or ``size`` bytes of other segments from ``start`` on.

    ``at`` is its offset in the file; ``is_kept`` is True if an earlier process wrote it.
    """

    at: int
    size: int
    is_kept: bool
    segment: bytes | tuple[str, Part] | LateBytes
    start: int = 0


class Contents:
    """Fills buffers with pieces, from the source or, before ``point``, from the file of an earlier process."""

    def __init__(
        self, segments: Segments, point: ResumePoint, reader: Reader, checks: RecordChecks, folder: Path | None
    ):
        self._segments, self._point, self._reader, self._checks = segments, point, reader, checks
        self.evaluator = Evaluator(reader, checks, folder)
        self._files = {leaf.record.file for leaf in self._leaves()}
        self._is_copied = all(each[1].is_copied for each in segments if isinstance(each, tuple))
        self._again = memoryview(bytearray(0 if self._is_copied else PIECE_BYTES))
        self._crcs: dict[str, int] | None = {} if any(isinstance(each, LateBytes) for each in segments) else None
        self._late: tuple[LateBytes, bytes] | None = None
        self._places: dict[Record, tuple[int, int]] = {}  # offsets of the first and last pieces read from each record
        self.overflow_count = point.overflow_count

    def files_without_crc(self) -> set[FileRef]:
        """The source files of records that have no CRC-32."""
        return {leaf.record.file for leaf in self._leaves() if leaf.record.crc32 is None}

    def _leaves(self) -> Iterator[Read]:
        for segment in self._segments:
            if isinstance(segment, tuple):
                yield from segment[1].leaves()

    def prefetch(self) -> None:
        """Announce the reads to the source's files."""
        self.evaluator.prefetch_parts(self._files, self._parts_to_read)

    def _parts_to_read(self) -> Iterator[Part]:
        for batch in batches(self._segments, self._point):
            for piece in batch:
                if isinstance(piece.segment, tuple) and self._is_read(piece, piece.segment[1]):
                    yield piece.segment[1]

    @contextmanager
    def proved_by_records(self) -> Iterator[None]:
        """Accept responses of other versions of those source files all of whose records have CRC-32s."""
        opened = map(self._reader.open, self._files - self.files_without_crc())
        files = [file for file in opened if isinstance(file, RemoteFile)]
        for file in files:
            file.proved_by = "records"
        try:
            yield
        finally:
            for file in files:
                file.proved_by = "version"

    def _is_read(self, piece: Piece, part: Part) -> bool:
        """Return whether the source is read for a piece: always, unless it is kept and proven."""
        unproven = self._point.size - self._point.unproven
        return not piece.is_kept or (not part.values.is_copied and piece.at + piece.size > unproven)

    def read(self, batch: Sequence[Piece], buffer: memoryview) -> tuple[int, int]:
        """Fill ``buffer``; return the number of bytes in it, and the number of bytes read or written for them."""
        filled, read = 0, self.evaluator.read_bytes
        for piece in batch:
            place = buffer[filled : filled + piece.size]
            if isinstance(piece.segment, tuple):
                name, part = piece.segment
                self.overflow_count += self._evaluate(name, part, piece.at, place)
            else:
                place[:] = self._bytes_of(piece.segment)[piece.start : piece.start + piece.size]
            self._add_crc(piece, place)
            filled += piece.size
        return filled, max(filled, self.evaluator.read_bytes - read)

    def read_back(self, batch: Sequence[Piece], buffer: memoryview, file: OutputFile) -> int:
        """Fill ``buffer`` with the bytes that an earlier process wrote, and check them; return their number.

        Raises:
            CorruptError: values that are not copied differ from those that the source gives now.
        """
        filled = 0
        for piece in batch:
            place = buffer[filled : filled + piece.size]
            file.read_at(piece.at, place)
            if isinstance(piece.segment, tuple):
                name, part = piece.segment
                if part.values.is_copied:
                    self._add_to_checks(name, part, place)
                elif self._is_read(piece, part):
                    self._evaluate(name, part, piece.at, self._again[: piece.size])
                    if bytes(self._again[: piece.size]) != bytes(place):
                        raise CorruptError(f"{name} differs from the values that its source gives.")
            self._add_crc(piece, place)
            filled += piece.size
        return filled

    def _add_to_checks(self, name: str, part: Part, place: memoryview) -> None:
        """Add copied bytes to the checks of their records, without reading the source."""
        if (read := contiguous_read(part.values)) is not None and not part.blocks:
            self._checks.add(name, read.record, read.offset, place)
        for block in part.blocks:
            self._checks.add(name, block.record, 0, None)

    def _evaluate(self, name: str, part: Part, at: int, place: memoryview) -> int:
        """Fill ``place``; return how many values a cast made infinite."""
        records = (block.record for block in part.blocks) if part.blocks else (r.record for r in part.values.leaves())
        for record in records:
            self._places[record] = self._places.get(record, (at, at))[0], at
        return self.evaluator.evaluate(name, part, place)

    def _add_crc(self, piece: Piece, place: memoryview) -> None:
        if self._crcs is not None and isinstance(piece.segment, tuple):
            name, _ = piece.segment
            self._crcs[name] = zlib.crc32(place, self._crcs.get(name, 0))

    def _bytes_of(self, segment: bytes | LateBytes) -> bytes:
        if isinstance(segment, bytes):
            return segment
        if self._late is None or self._late[0] is not segment:
            self._late = segment, segment.make(self._crcs or {})
        return self._late[1]

    def resume_point(self, position: int) -> ResumePoint:
        """Return the resume point, without its sha256, for a file that ends at ``position``."""
        unproven = 0 if self._is_copied else position - self._proven(position)
        return ResumePoint(position, "", overflow_count=self.overflow_count, unproven=unproven)

    def _proven(self, position: int) -> int:
        """Return the largest offset at which every record that was read before it is complete and checked.

        Resuming there reads whole records again, so their CRC-32s can be compared.
        """
        places = self._places
        pending = (first for record, (first, _) in places.items() if self._checks.is_pending(record))
        return uncut(min(pending, default=position), places.values())


def uncut(position: int, places: Iterable[tuple[int, int]]) -> int:
    """Return the largest offset up to ``position`` that cuts none of ``places``, offsets of first and last pieces."""
    for first, last in sorted(places, key=lambda place: -place[1]):
        if last < position:
            break
        position = min(position, first)
    return position


def size_of(segment: bytes | tuple[str, Expression] | LateBytes) -> int:
    if isinstance(segment, bytes):
        return len(segment)
    return segment.size if isinstance(segment, LateBytes) else segment[1].info.nbytes


def fingerprint(segments: Segments) -> str:
    """Return a sha256 over the origin of every byte: names, and places in the source's files."""
    digest = sha256()
    for segment in segments:
        if isinstance(segment, tuple):
            name, tensor = segment
            digest.update(f"{name}\n{tensor.fingerprint}".encode())
        else:
            digest.update(segment if isinstance(segment, bytes) else str(segment.size).encode())
    return digest.hexdigest()


def batches(segments: Segments, point: ResumePoint) -> Iterator[list[Piece]]:
    """Cut the segments into pieces, and group these into batches that fit into a buffer, in the file's order."""
    batch: list[Piece] = []
    size = at = 0
    is_kept = at < point.size
    for segment in segments:
        for part, start, length in _parts(segment):
            if batch and size + length > BUFFER_BYTES:
                yield batch
                batch, size, is_kept = [], 0, at < point.size
            batch.append(Piece(at, length, is_kept, part, start))
            size, at = size + length, at + length
    if batch:
        yield batch


def _parts(
    segment: bytes | tuple[str, Expression] | LateBytes,
) -> Iterator[tuple[bytes | tuple[str, Part] | LateBytes, int, int]]:
    """Cut a segment into parts of at most `PIECE_BYTES`, each with its start (0 for a tensor) and its length."""
    if isinstance(segment, tuple):
        name, tensor = segment
        yield from (((name, part), 0, part.values.info.nbytes) for part in parts(tensor))
        return
    size = size_of(segment)
    yield from ((segment, start, min(PIECE_BYTES, size - start)) for start in range(0, size, PIECE_BYTES))
