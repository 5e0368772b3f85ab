"""The bytes check: the output against the source, byte by byte, without torch.

Both are read from the disk again, including their indexes: nothing that the conversion held in memory is trusted.
"""

import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from streamconv.errors import ChangedError, OutputError, SourceError, SourceMissingError, TruncatedError
from streamconv.files.address import Location
from streamconv.files.base import ByteRange, File, FileRef
from streamconv.files.folders import file_in
from streamconv.files.open import open_file
from streamconv.files.reader import Reader
from streamconv.formats.checkpoint import Checkpoint, open_output
from streamconv.output.hashing import BUFFER_BYTES, BackgroundHash
from streamconv.output.manifest import MANIFEST_NAME, Manifest, WrittenFile
from streamconv.output.readable import reading_output
from streamconv.planning.plan import Plan
from streamconv.progress import Progress
from streamconv.tensors.checksums import RecordChecks
from streamconv.tensors.computed import Cast, is_computed
from streamconv.tensors.evaluation import Evaluator
from streamconv.tensors.expressions import Expression, Read
from streamconv.tensors.info import DTYPES
from streamconv.tensors.tiles import parts
from streamconv.verification.result import Check
from streamconv.verification.structure import (
    header_problems,
    manifest_problems,
    planned_tensors,
    tensor_problems,
    weight_file_problems,
)

SAFETENSORS = ".safetensors"
REPORT_BYTES = 32 << 20  # read between two progress reports


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


def compare_with_manifest(
    folder: Location, plan: Plan, manifest: Manifest, progress: Progress
) -> tuple[Check, Mapping[str, WrittenFile]]:
    """Compare the weight files with the manifest, for a source whose CRC-32s were checked while it was copied.

    Returns:
        The same as `compare_with_source`, but no files if something is wrong.
    """
    start = time.monotonic()
    weights = {name: file for name, file in manifest.files.items() if name.endswith(SAFETENSORS)}
    problems = sorted({*check_files(folder, weights, progress), *header_problems(folder, plan)})
    if not manifest.is_crc_checked:
        problems.append(f"{MANIFEST_NAME} does not record that the source's CRC-32s were checked")
    proves = (
        f"every weight file is as it was written{cast_note(plan)}, according to {MANIFEST_NAME}; every source record "
        "matched its CRC-32 then"
    )
    numbers = {"tensors": sum(len(shard.tensors) for shard in plan.shards), "bytes": plan.weights}
    check = Check("bytes", not problems, proves, tuple(problems), numbers, "the source's bytes were not read again")
    return check.since(start), {} if problems else weights


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
                _hash(file, 0, written[names[0]].record.range.start, digest)
                for name in names:
                    source, output = wanted.get(name), written[name]
                    if source is not None and source.info == output.info:
                        found = _differences(name, source, output, file, evaluator, digest, advance)
                        problems += found
                        wrong += bool(found)
                        compared += source.info.nbytes
                    else:
                        _hash(file, output.record.range.start, output.record.range.end, digest)
                files[file.name] = WrittenFile(file.size, digest.hexdigest())
    checks.verify_pending()
    problems += manifest_problems(folder, files)
    return ByteCheck(compared, len(wanted), wrong, tuple(sorted(set(problems))), files)


def check_files(folder: Location, written: Mapping[str, WrittenFile], progress: Progress) -> list[str]:
    """List the ``written`` files whose size or sha256 has changed; if the sha256 is not known, whose CRC-32 has.

    Raises:
        OutputError: a file cannot be read.
    """
    problems = []
    total, done = sum(each.size for each in written.values()), 0
    for name, each in written.items():
        try:
            with reading_output():
                file = open_file(file_in(folder, name))
        except SourceMissingError as error:
            problems.append(str(error))
            continue
        with closing(file), BackgroundHash() as digest:
            if file.size != each.size:
                problems.append(f"{name} has {file.size:,} bytes, not {each.size:,}")
                continue
            file.prefetch([ByteRange(0, file.size)])
            crc = 0
            for start in range(0, file.size, REPORT_BYTES):
                end = min(start + REPORT_BYTES, file.size)
                crc = _hash(file, start, end, digest, None if each.sha256 else crc)
                done += end - start
                progress("reading files", done, total, "bytes")
            kind, found, expected = "sha256", digest.hexdigest(), each.sha256
            if not each.sha256:
                kind, found, expected = "CRC-32", f"{crc:08x}", each.crc32
            if found != expected:
                hashes = f"its {kind} is {found[:12]}…, not {expected[:12]}…"
                problems.append(f"{name} has changed since it was written: {hashes}")
    return sorted(problems)


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
            raise _changed(str(ref.location)) from error
        file.prefetch([ByteRange(0, file.size)])
        yield file


def _in_file_order(written: Checkpoint) -> dict[FileRef, list[str]]:
    """Return the names of each file's tensors in file order. Their bytes are adjacent."""
    files: dict[FileRef, list[str]] = {}
    for name in sorted(written, key=lambda name: written[name].record.range.start):
        files.setdefault(written[name].record.file, []).append(name)
    return files


def _hash(file: File, start: int, end: int, digest: BackgroundHash, crc: int | None = None) -> int:
    """Hash a range; return the CRC-32 of the file to its end, given that of what is before it, or 0 without one."""
    for at in range(start, end, BUFFER_BYTES):
        part = digest.next_buffer()[: min(BUFFER_BYTES, end - at)]
        _read(file, at, part)
        digest.update(part)
        crc = None if crc is None else zlib.crc32(part, crc)
    return crc or 0


def _read(file: File, at: int, buffer: memoryview) -> None:
    """Read a part of the output.

    Raises:
        OutputError: it cannot be read, or the file has become shorter.
    """
    try:
        with reading_output():
            file.read_at(at, buffer)
    except TruncatedError as error:
        raise _changed(file.where) from error


def _changed(where: str) -> OutputError:
    return OutputError(f"{where} was changed while it was verified. Run the same command again.")


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
        _read(file, at, found)
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
