"""Evaluates tensors part by part: reads what they are made from, checks it, and puts the values in order."""

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from streamconv.errors import OutputError
from streamconv.files.base import ByteRange, File, FileRef
from streamconv.files.local import LocalFile
from streamconv.files.reader import Reader
from streamconv.tensors.casts import cast_into
from streamconv.tensors.checksums import RecordChecks
from streamconv.tensors.expressions import Expression, Record
from streamconv.tensors.gather import gather
from streamconv.tensors.runs import Block
from streamconv.tensors.tiles import PIECE_BYTES, Part, direct, parts, reads_of


class Evaluator:
    """Evaluates the parts of tensors, and adds what it reads to the checks of records.

    A contiguous read goes straight into the caller's buffer. What any other tile is made from is read when its first
    part is wanted, and kept for the others; that memory is reused. A record on another machine that is not read in its
    order is first copied into a file without a name in ``folder``, by default the system's for temporary files. Use an
    evaluator in a ``with`` statement.
    """

    def __init__(self, reader: Reader, checks: RecordChecks, folder: Path | None = None):
        self._reader, self._checks, self._folder = reader, checks, folder
        self._stored = memoryview(b"")
        self._blocks: tuple[Block, ...] = ()
        self._source = bytearray()
        self._copies: dict[Record, LocalFile] = {}

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
        read = direct(values)
        if read is None:
            raise ValueError(f"{name} is not contiguous")
        if values is not read and not self._stored:
            self._stored = memoryview(bytearray(PIECE_BYTES))
        stored = buffer if values is read else self._stored[: read.info.nbytes]
        self._reader.open(read.record.file).read_at(read.range.start, stored)
        self._checks.add(name, read.record, read.offset, stored)
        return 0 if values is read else cast_into(stored, read.info.dtype, buffer, values.info.dtype)

    def _read_blocks(self, name: str, blocks: tuple[Block, ...]) -> None:
        size = max(block.at + block.runs.nbytes for block in blocks)
        if len(self._source) < size:
            self._source = bytearray(size)
        scattered = {block.record for block in blocks if block.runs.steps}
        for record in self._copies.keys() - scattered:
            self._copies.pop(record).close()
        for block in blocks:
            memory = memoryview(self._source)[block.at : block.at + block.runs.nbytes]
            if block.runs.steps:
                self._read_scattered(name, block, memory)
            else:
                self._reader.open(block.record.file).read_at(block.runs.start, memory)
                self._checks.add(name, block.record, block.runs.start - block.record.range.start, memory)

    def _read_scattered(self, name: str, block: Block, memory: memoryview) -> None:
        record, runs = block.record, block.runs
        file = self._reader.open(record.file)
        if isinstance(file, LocalFile):
            file.read_runs(runs.starts(), runs.length, memory)
            self._checks.add(name, record, 0, None)
            return
        if record not in self._copies:
            self._copies[record] = self._copy(name, record, file)
        starts = (start - record.range.start for start in runs.starts())
        self._copies[record].read_runs(starts, runs.length, memory)

    def _copy(self, name: str, record: Record, file: File) -> LocalFile:
        """Copy a record into a file that is deleted already, so that nothing of it remains."""
        import tempfile  # with random, which only this needs

        buffer = memoryview(bytearray(PIECE_BYTES))
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder, buffering=0) as temporary:
                for at in range(0, record.range.length, PIECE_BYTES):
                    piece = buffer[: min(PIECE_BYTES, record.range.length - at)]
                    file.read_at(record.range.start + at, piece)
                    self._checks.add(name, record, at, piece)
                    temporary.write(piece)
                return LocalFile(Path(temporary.name))
        except OSError as error:
            where = self._folder or tempfile.gettempdir()
            raise OutputError(
                f"{where}: {name} is not read in its order, so its {record.range.length:,} bytes are copied there "
                f"first, but {error.strerror}. Free some space, or download the file first."
            ) from error

    def __enter__(self) -> "Evaluator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._copies:
            self._copies.popitem()[1].close()


def prefetch(tensors: Iterable[Expression], reader: Reader) -> None:
    """Announce to each file that these tensors will be evaluated, in this order."""
    ranges: dict[FileRef, list[ByteRange]] = {}
    for tensor in tensors:
        for part in parts(tensor):
            for file, each in reads_of(part):
                ranges.setdefault(file, []).append(each)
    for file, wanted in ranges.items():
        reader.open(file).prefetch(wanted)


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
