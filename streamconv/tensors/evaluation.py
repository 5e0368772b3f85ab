"""Evaluates tensors part by part: reads what they are made from, checks it, and puts the values in order."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType

from streamconv.errors import OutputError
from streamconv.files.base import ByteRange, FileRef
from streamconv.files.local import LocalFile
from streamconv.files.reader import Reader
from streamconv.tensors.casts import cast_into
from streamconv.tensors.checksums import RecordChecks
from streamconv.tensors.expressions import Expression, Record
from streamconv.tensors.gather import gather
from streamconv.tensors.runs import Block
from streamconv.tensors.tiles import PIECE_BYTES, Part, contiguous_read, parts

COPIES_BYTES = 1 << 30  # of records that are kept in temporary files; a tile may need more


class Evaluator:
    """Evaluates the parts of tensors, and adds what it reads to the checks of records.

    A contiguous read goes straight into the caller's buffer. The sources of any other tile are read when its first part
    is evaluated, and kept for the others in memory that is reused. A remote record that is read out of order or with
    gaps is first copied to an unnamed file in ``folder``, by default the system's temporary folder. Use an evaluator in
    a ``with`` statement.

    ``read_bytes`` is the number of bytes read from the source so far.
    """

    def __init__(self, reader: Reader, checks: RecordChecks, folder: Path | None = None):
        self._reader, self._checks, self._folder = reader, checks, folder
        self._stored = memoryview(b"")
        self._blocks: tuple[Block, ...] = ()
        self._source = bytearray()
        self._copies: dict[Record, LocalFile] = {}  # least recently used first
        self.read_bytes = 0

    def prefetch(self, tensors: Sequence[Expression]) -> None:
        """Announce to each file that these tensors will be evaluated next, in this order."""
        files = dict.fromkeys(leaf.record.file for tensor in tensors for leaf in tensor.leaves())
        self.prefetch_parts(files, lambda: chain.from_iterable(map(parts, tensors)))

    def prefetch_parts(self, files: Iterable[FileRef], coming: Callable[[], Iterable[Part]]) -> None:
        """Announce to each of ``files`` that the parts that ``coming`` gives will be evaluated next, in this order."""
        for file in files:
            if not self._is_local(file):
                self._reader.open(file).prefetch(self._ranges(file, coming()))

    def _ranges(self, file: FileRef, coming: Iterable[Part]) -> Iterator[ByteRange]:
        """Yield what is read from a file for these parts."""
        copied, blocks = [*self._copies], self._blocks
        for part in coming:
            if not part.blocks:
                leaves = (leaf for leaf in part.values.leaves() if leaf.record.file == file)
                yield from (leaf.range for leaf in leaves if leaf.record not in copied)
            elif part.blocks is not blocks:
                blocks = part.blocks
                kept = _kept(copied, self._records_to_copy(blocks))
                yield from (record.range for record in kept if record not in copied and record.file == file)
                copied = kept
                for block in blocks:
                    if block.record.file == file and block.record not in copied:
                        yield block.runs.span

    def evaluate(self, name: str, part: Part, buffer: memoryview) -> int:
        """Fill ``buffer`` with the values of a part of the tensor ``name``; return how many a cast made infinite."""
        if not part.blocks:
            return self._read_directly(name, part.values, buffer)
        if part.blocks is not self._blocks:
            self._blocks = ()  # until they are complete
            self._read_blocks(name, part.blocks)
            self._blocks = part.blocks
        return gather(part.values, buffer, self._source)

    def _read_directly(self, name: str, values: Expression, buffer: memoryview) -> int:
        read = contiguous_read(values)
        if read is None:
            raise ValueError(f"{name} is not contiguous")
        if values is not read and not self._stored:
            self._stored = memoryview(bytearray(PIECE_BYTES))
        stored = buffer if values is read else self._stored[: read.info.nbytes]
        self._read(name, read.record, read.offset, stored)
        return 0 if values is read else cast_into(stored, read.info.dtype, buffer, values.info.dtype)

    def _read_blocks(self, name: str, blocks: tuple[Block, ...]) -> None:
        size = max(block.at + block.runs.nbytes for block in blocks)
        if len(self._source) < size:
            self._source = bytearray(size)
        self._make_copies(name, self._records_to_copy(blocks))
        for block in blocks:
            record, runs = block.record, block.runs
            memory = memoryview(self._source)[block.at : block.at + runs.nbytes]
            if not runs.steps:
                self._read(name, record, runs.start - record.range.start, memory)
            elif record in self._copies:
                starts = (start - record.range.start for start in runs.starts())
                self._copies[record].read_runs(starts, runs.length, memory)
            else:
                file = self._reader.open(record.file)
                assert isinstance(file, LocalFile)
                file.read_runs(runs.starts(), runs.length, memory)
                self._checks.add(name, record, 0, None)
                self.read_bytes += runs.nbytes

    def _read(self, name: str, record: Record, start: int, memory: memoryview) -> None:
        if record in self._copies:
            self._copies[record].read_at(start, memory)
            return
        self._reader.open(record.file).read_at(record.range.start + start, memory)
        self._checks.add(name, record, start, memory)
        self.read_bytes += len(memory)

    def _is_local(self, file: FileRef) -> bool:
        return isinstance(self._reader.open(file), LocalFile)

    def _records_to_copy(self, blocks: tuple[Block, ...]) -> dict[Record, None]:
        """Return the remote records that must be copied before these blocks are read."""
        return {
            block.record: None
            for block in blocks
            if (block.runs.steps or (block.runs.has_gaps and block.record.range.length <= COPIES_BYTES))
            and not self._is_local(block.record.file)
        }

    def _make_copies(self, name: str, needed: dict[Record, None]) -> None:
        kept = _kept([*self._copies], needed)
        for record in self._copies.keys() - set(kept):
            self._copies.pop(record).close()
        for record in kept:  # in this order
            self._copies[record] = self._copies.pop(record) if record in self._copies else self._copy(name, record)

    def _copy(self, name: str, record: Record) -> LocalFile:
        """Copy a record to an unnamed file, which disappears with the process even if that is killed."""
        import tempfile  # with random, which only this needs

        buffer = memoryview(bytearray(PIECE_BYTES))
        try:
            with tempfile.TemporaryFile(dir=self._folder, buffering=0) as temporary:
                for at in range(0, record.range.length, PIECE_BYTES):
                    piece = buffer[: min(PIECE_BYTES, record.range.length - at)]
                    self._read(name, record, at, piece)
                    temporary.write(piece)
                return LocalFile(Path(f"/dev/fd/{temporary.fileno()}"))
        except OSError as error:
            where = self._folder or tempfile.gettempdir()
            raise OutputError(
                f"{where}: {name} is read out of order, so the {record.range.length:,} bytes of its record are first "
                f"copied there, which failed: {error.strerror}. Free some space there, or download the source first."
            ) from error

    def __enter__(self) -> "Evaluator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._copies:
            self._copies.popitem()[1].close()


def _kept(copied: Sequence[Record], needed: Iterable[Record]) -> list[Record]:
    """Return the records whose copies are kept for a tile that needs some of them, least recently used first.

    One record may give several tensors, so copies are kept as long as they fit into `COPIES_BYTES`.
    """
    kept = [*needed]
    size = sum(record.range.length for record in kept)
    for record in reversed(copied):
        if record not in kept:
            size += record.range.length
            if size > COPIES_BYTES:
                break
            kept.insert(0, record)
    return kept


def read_bytes(tensor: Expression, reader: Reader | None = None) -> bytes:
    """Read a whole tensor into memory, in row-major order. Without a ``reader``, its files are opened for this call."""
    if reader is None:
        with Reader() as own:
            return read_bytes(tensor, own)
    data = bytearray(tensor.info.nbytes)
    view, at = memoryview(data), 0
    with Evaluator(reader, RecordChecks(reader)) as evaluator:
        for part in parts(tensor):
            size = part.values.info.nbytes
            evaluator.evaluate("the tensor", part, view[at : at + size])
            at += size
    return bytes(data)
