"""The files of an output against what its manifest records of them; the source is not read."""

import time
from collections.abc import Mapping
from contextlib import closing

from streamconv.errors import SourceMissingError
from streamconv.files.address import Location
from streamconv.files.base import ByteRange
from streamconv.files.folders import file_in
from streamconv.files.open import open_file
from streamconv.output.hashing import BackgroundHash
from streamconv.output.manifest import MANIFEST_NAME, Manifest, WrittenFile, is_weights
from streamconv.output.readable import reading_output
from streamconv.planning.plan import Plan
from streamconv.progress import Progress
from streamconv.verification.bytes import cast_note
from streamconv.verification.output_files import hash_range
from streamconv.verification.result import Check
from streamconv.verification.structure import header_problems

REPORT_BYTES = 32 << 20  # read between two progress reports


def compare_with_manifest(
    folder: Location, plan: Plan, manifest: Manifest, progress: Progress
) -> tuple[Check, Mapping[str, WrittenFile]]:
    """Compare the weight files with the manifest, for a source whose CRC-32s were checked while it was copied.

    Returns:
        The same as `compare_with_source`, but no files if something is wrong.
    """
    start = time.monotonic()
    weights = {name: file for name, file in manifest.files.items() if is_weights(name)}
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
                crc = hash_range(file, start, end, digest, None if each.sha256 else crc)
                done += end - start
                progress("reading files", done, total, "bytes")
            kind, found, expected = "sha256", digest.hexdigest(), each.sha256
            if not each.sha256:
                kind, found, expected = "CRC-32", f"{crc:08x}", each.crc32
            if found != expected:
                hashes = f"its {kind} is {found[:12]}…, not {expected[:12]}…"
                problems.append(f"{name} has changed since it was written: {hashes}")
    return sorted(problems)
