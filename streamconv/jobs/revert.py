"""Converts a folder back to the layout of the model's authors, with the inverse rules, as a stream.

The dimensions come from the names and shapes of the tensors; a config.json in the folder must agree.
"""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

from streamconv.errors import OutputError, SourceMissingError, UsageError
from streamconv.families.base import ConversionSpec, Family
from streamconv.families.registry import family_named
from streamconv.files.address import COPY_FOLDER, local_path
from streamconv.formats.checkpoint import Checkpoint, open_checkpoint
from streamconv.formats.non_tensors import non_tensor_error
from streamconv.formats.safetensors import make_header
from streamconv.formats.segments import Segment
from streamconv.jobs.authors_layout import restore_originals, without_fillings
from streamconv.output.contents import Segments, fingerprint, size_of
from streamconv.output.journal import Journal
from streamconv.output.manifest import Manifest, Provenance, SourceFile, WrittenFile
from streamconv.output.resumable import journal_path, require_absent, resumable_files
from streamconv.output.writer import written_file
from streamconv.planning.plan import CONFIG_NAME
from streamconv.progress import Progress, ignore_progress, job
from streamconv.source.small_files import read_json_beside
from streamconv.tensors.checksums import RecordChecks
from streamconv.tensors.expressions import Expression
from streamconv.tensors.packages import check_packages

SAFETENSORS = ".safetensors"
SUFFIXES = (".pth", ".pt", ".bin", SAFETENSORS)


@dataclass(frozen=True)
class Reverted:
    """The result of `revert`: the files of the backbone and of a classifier's head, with their sizes and sha256.

    ``shaped_like`` is the published model with these dimensions; None if there is none. ``weights`` is the size of all
    tensors in bytes. ``resumed_bytes`` counts the bytes that an interrupted run had written and that were kept after a
    check. ``seconds`` is the time spent writing the files. ``restored`` lists tensors, or parts of them, that the
    conversion left out: their values are those that the authors' code starts with, not those of the original file.
    """

    family_name: str
    shaped_like: str | None
    written: Mapping[Path, WrittenFile]
    weights: int
    resumed_bytes: int = 0
    seconds: float = 0.0
    restored: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self.written)

    @property
    def title(self) -> str:
        """A name for the checkpoint in messages."""
        return family_named(self.family_name).title_of(None, self.shaped_like)

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {
            "shaped_like": self.shaped_like,
            "files": [
                {"file": str(path), "bytes": file.size, "sha256": file.sha256} for path, file in self.written.items()
            ],
            "weights": self.weights,
            "resumed_bytes": self.resumed_bytes,
            "seconds": self.seconds,
            "restored": list(self.restored),
        }


@job
def revert(
    folder: str | PathLike[str],
    output: str | PathLike[str],
    *,
    head: str | PathLike[str] | None = None,
    block_chunks: int | None = None,
    force: bool = False,
    progress: Progress = ignore_progress,
) -> Reverted:
    """Write the checkpoint that a folder was, or could have been, converted from.

    Args:
        folder: A folder in the format of transformers 4 or 5, with one safetensors file, or several and their index.
        output: The file to write: .pth, .pt or .bin, like torch.save, or .safetensors, like save_file.
        head: The file to write a classifier's linear head to. The authors publish it separately from the backbone.
        block_chunks: The number of lists to put the blocks in, 0 for one plain list; by default, that of the source
            in the folder's manifest, or of the published model's file.
        force: Replace existing files of these names, once the new ones are complete.
        progress: Called with the number of bytes written to both files. An exception that it raises ends the job: see
            `Cancelled`.

    Raises:
        UsageError: a file has another suffix, or ``head`` is missing for a classifier or given for another model; or a
            package that evaluating the tensors needs is not installed.
        SourceError: the folder does not hold a model of a known family. The message lists all differences.
        OutputError: a file exists already, or cannot be written. The same call resumes; the files are renamed into
            place when both are complete.
    """
    source = local_path(folder, "folder", COPY_FOLDER)
    paths = (local_path(output, "output"), *([local_path(head, "head")] if head is not None else []))
    _require_writable(paths, source, force)
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise UsageError(f"{paths[0]} cannot be backbone and head at once. Give --head another name.")
    if not os.path.isdir(source):
        raise SourceMissingError(f"{source} is not a folder. Give the folder of the safetensors files.")
    manifest = Manifest.read(source)
    with open_checkpoint(source) as checkpoint:
        others = {name: each for name, each in checkpoint.non_tensors.items() if each.kind.is_tensor}
        if others:
            raise non_tensor_error(others, str(source))
        family, model, spec, tensors = restore_originals(
            without_fillings(checkpoint, manifest.filled if manifest else {}),
            str(source),
            read_json_beside(checkpoint.folder or source, CONFIG_NAME)[0] or {},
            (manifest.model or manifest.shaped_like) if manifest else None,
        )
        known = model.block_chunks if model is not None else 0
        recorded = manifest.block_chunks if manifest is not None else known
        chunks = block_chunks if block_chunks is not None else recorded
        tensors = _chunked(tensors, chunks, family, spec)
        backbone, heads = family.split_head(tensors)
        if heads and head is None:
            raise UsageError(f"{source} is a classifier, whose head needs a separate file. Name it with --head FILE.")
        if head is not None and not heads:
            raise UsageError(f"{source} is not a classifier and has no head. Omit --head.")
        files = dict(zip(paths, (backbone, heads), strict=False))
        check_packages(tensors)
        start = time.monotonic()
        written, resumed_bytes = _write(files, checkpoint, source, force, progress)
        seconds = time.monotonic() - start
    weights = sum(tensor.info.nbytes for tensor in tensors.values())
    restored = tuple(text for rule in spec.rules for text in rule.restorations())
    return Reverted(family.name, model.name if model else None, written, weights, resumed_bytes, seconds, restored)


def _chunked(
    tensors: dict[str, Expression], chunks: int, family: Family, spec: ConversionSpec
) -> dict[str, Expression]:
    """Return the tensors by their keys in a file whose blocks are in ``chunks`` lists, 0 for one plain list."""
    if not chunks:
        return tensors
    if family.block_chunks is None:
        raise UsageError(f"A {family.name} model has no block chunks. Omit --block-chunks.")
    count = spec.counts[family.block_chunks.index]
    if not 0 <= chunks <= count:
        raise UsageError(f"{count} blocks cannot be in {chunks} chunks. Give --block-chunks from 0 to {count}.")
    return {family.block_chunks.chunked_key(key, count, chunks): tensor for key, tensor in tensors.items()}


def _require_writable(paths: Sequence[Path], source: Path, force: bool) -> None:
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise UsageError(f"{path} does not have the suffix of a checkpoint. Use one of {', '.join(SUFFIXES)}.")
        if not os.path.isdir(path.parent):
            raise OutputError(f"{path.parent} is not a folder. Create it first.")
    require_absent(paths, Journal.read(journal_path(paths)), force=force)
    for path in paths:
        if os.path.isdir(source) and os.path.samefile(path.parent, source):
            raise UsageError(f"{path} would be taken for one of the model's own files. Choose another folder.")


def _write(
    files: Mapping[Path, Mapping[str, Expression]],
    checkpoint: Checkpoint,
    source: Path,
    force: bool,
    progress: Progress,
) -> tuple[dict[Path, WrittenFile], int]:
    """Write all of the files, or none. Also return how many of their bytes an interrupted process had written."""
    contents = {path: _segments(path, tensors) for path, tensors in files.items()}
    sizes = {path: sum(map(size_of, segments)) for path, segments in contents.items()}
    provenance = Provenance(
        source={"model": SourceFile(source.name, checkpoint.size, checkpoint.fingerprint, version=checkpoint.version)},
        plan=sha256("".join(map(fingerprint, contents.values())).encode()).hexdigest(),
    )
    written, resumed_bytes, before = {}, 0, 0
    checks = RecordChecks(checkpoint.reader)
    with resumable_files(sizes, provenance, force=force) as journal, ExitStack() as named:
        for path, segments in contents.items():
            advance = partial(_report, progress, path.name, before, sum(sizes.values()))
            file = written_file(path, segments, journal, checkpoint.reader, checks, advance)
            written[path], kept = named.enter_context(file)
            resumed_bytes, before = resumed_bytes + kept, before + sizes[path]
    return written, resumed_bytes


def _report(progress: Progress, name: str, before: int, total: int, position: int, is_kept: bool) -> None:
    progress(f"{'checking' if is_kept else 'writing'} {name}", before + position, total, "bytes")


def _segments(path: Path, tensors: Mapping[str, Expression]) -> Segments:
    """Lay out a file in the format that its suffix names."""
    infos = {key: tensor.info for key, tensor in tensors.items()}
    layout: list[Segment]
    if path.suffix == SAFETENSORS:
        header, keys = make_header(infos)
        layout = [header, *keys]
    else:
        from streamconv.formats.torch_writer import pth_segments  # with pickle, which nothing else needs

        layout = pth_segments(path.stem, infos)
    return [(each, tensors[each]) if isinstance(each, str) else each for each in layout]
