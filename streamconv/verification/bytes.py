"""The bytes check: the output against the source, byte by byte, without torch.

Both are read from the disk again, including their indexes: nothing that the conversion held in memory is trusted.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from streamconv.errors import ChangedError, SourceError, SourceMissingError
from streamconv.files.address import Location
from streamconv.files.base import ByteRange, File, FileRef
from streamconv.files.reader import Reader
from streamconv.formats.checkpoint import Checkpoint, open_output
from streamconv.output.hashing import BUFFER_BYTES, BackgroundHash
from streamconv.output.manifest import WrittenFile
from streamconv.output.readable import reading_output
from streamconv.planning.plan import Plan
from streamconv.progress import Progress
from streamconv.tensors.checksums import RecordChecks
from streamconv.tensors.computed import Cast, is_computed
from streamconv.tensors.evaluation import Evaluator
from streamconv.tensors.expressions import Expression, Read
from streamconv.tensors.info import DTYPES
from streamconv.tensors.tiles import parts
from streamconv.verification.output_files import changed_output, hash_range, read_output
from streamconv.verification.result import Check
from streamconv.verification.structure import (
    manifest_problems,
    planned_tensors,
    tensor_problems,
    weight_file_problems,
)


def compare_with_source(
    folder: Location, plan: Plan, reader: Reader, has_checksums: bool, progress: Progress
) -> tuple[Check, Mapping[str, WrittenFile]]:
    """Compare every byte of every tensor with the source.

    Returns:
        The check, and the output's weight files as they are now.
    """
    start, done, total = time.monotonic(), 0, plan.weights  # a sum over all tensors, too slow for each piece

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("comparing bytes", done, total, "bytes")

    found = check_bytes(folder, plan, reader, advance)
    crc = "every source record matches its CRC-32" if has_checksums else "the source has no CRC-32s to check"
    proves = f"every byte of every tensor equals its source's{cast_note(plan)}{_computed_note(plan)}; {crc}"
    numbers = {"tensors": found.tensors, "bytes": found.compared, "wrong": found.wrong}
    return Check("bytes", not found.problems, proves, found.problems, numbers).since(start), found.files


def cast_note(plan: Plan) -> str:
    """Return " after the cast from … to …" for a plan that casts, and nothing for others."""
    return " after the cast from {from} to {to}".format_map(plan.cast) if plan.cast else ""


def _computed_note(plan: Plan) -> str:
    """Return the number of tensors that are sums or products, which are computed again, in words; "" if none is."""
    count = sum(is_computed(tensor) for shard in plan.shards for _, tensor in shard.tensors)
    return f" ({count:,} {'is a sum or product' if count == 1 else 'are sums or products'} of two)" if count else ""


@dataclass(frozen=True)
class ByteCheck:
    """The result of `check_bytes`. ``problems`` is empty if every byte is correct.

    ``compared`` counts bytes of weights; ``wrong`` counts the tensors that do not match their source; ``files`` are the
    output's weight files.
    """

    compared: int
    tensors: int
    wrong: int
    problems: tuple[str, ...]
    files: Mapping[str, WrittenFile]


def check_bytes(folder: Location, plan: Plan, reader: Reader, advance: Callable[[int], None]) -> ByteCheck:
    """Compare every tensor of ``folder`` with what the plan takes from the source.

    Each source record that has a CRC-32 is checked on the way, and so are the digests in the folder's own manifest.

    Raises:
        SourceError: the source cannot be read, or does not match its own CRC-32s. That proves nothing about the output.
        OutputError: a file of the output cannot be read. A file that is missing or malformed is one of the problems.
    """
    wanted = planned_tensors(plan)
    checks, compared, wrong = RecordChecks(reader), 0, 0
    problems: list[str] = []
    files: dict[str, WrittenFile] = {}
    try:
        with reading_output():
            written = open_output(folder)
    except SourceError as error:
        return ByteCheck(0, len(wanted), len(wanted), (f"the output cannot be read: {error}",), files)
    with written, BackgroundHash() as digest, Evaluator(reader, checks) as evaluator:
        shapes = tensor_problems(wanted, written)
        wrong += len(shapes)
        problems += shapes + weight_file_problems(folder, written)
        for ref, names in _in_file_order(written).items():
            with _opened(written, ref) as file:
                evaluator.prefetch([wanted[name] for name in names if name in wanted])
                hash_range(file, 0, written[names[0]].record.range.start, digest)
                for name in names:
                    source, output = wanted.get(name), written[name]
                    if source is not None and source.info == output.info:
                        found = _differences(name, source, output, file, evaluator, digest, advance)
                        problems += found
                        wrong += bool(found)
                        compared += source.info.nbytes
                    else:
                        hash_range(file, output.record.range.start, output.record.range.end, digest)
                files[file.name] = WrittenFile(file.size, digest.hexdigest())
    checks.verify_pending()
    problems += manifest_problems(folder, files)
    return ByteCheck(compared, len(wanted), wrong, tuple(sorted(set(problems))), files)


@contextmanager
def _opened(written: Checkpoint, ref: FileRef) -> Iterator[File]:
    """Return a file of the output, to be read from its beginning to its end.

    Raises:
        OutputError: it cannot be opened, or is not the file that ``written`` has the index of.
    """
    if isinstance(ref.location, Path):
        yield written.reader.open(ref)
        return
    with Reader(accepts_unversioned=True) as reader:
        try:
            with reading_output():
                file = reader.open(ref)
        except (ChangedError, SourceMissingError) as error:
            raise changed_output(str(ref.location)) from error
        file.prefetch([ByteRange(0, file.size)])
        yield file


def _in_file_order(written: Checkpoint) -> dict[FileRef, list[str]]:
    """Return the names of each file's tensors in file order. Their bytes are adjacent."""
    files: dict[FileRef, list[str]] = {}
    for name in sorted(written, key=lambda name: written[name].record.range.start):
        files.setdefault(written[name].record.file, []).append(name)
    return files


def _differences(
    name: str,
    source: Expression,
    output: Read,
    file: File,
    evaluator: Evaluator,
    digest: BackgroundHash,
    advance: Callable[[int], None],
) -> list[str]:
    """Find the first element in which ``output`` differs from ``source``; hash all of ``output``."""
    wanted = bytearray(BUFFER_BYTES)
    at, differs = output.record.range.start, False
    problems: list[str] = []
    for part in parts(source):
        size = part.values.info.nbytes
        if size != len(wanted):  # bytearrays compare by memcmp, memoryviews element by element
            wanted = bytearray(size)
        evaluator.evaluate(name, part, memoryview(wanted))
        found = digest.next_buffer()[:size]
        read_output(file, at, found)
        digest.update(found)
        if not differs and wanted != found:
            differs = True
            first = next(i for i, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b)
            cast_to = f", cast to {DTYPES[source.info.dtype].torch}," if isinstance(source, Cast) else ""
            element = (at - output.record.range.start + first) // output.info.itemsize
            problems.append(f"{name} differs from its source{cast_to} from element {element:,} on")
        at += size
        advance(size)
    return problems
