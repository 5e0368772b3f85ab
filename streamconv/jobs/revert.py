"""Back again: a folder of transformers' to its authors' layout, by the rules that led there, and as lean.

The sizes come from the tensors' names and shapes; a config.json beside them must say the same.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from streamconv.errors import MappingError, OutputError, SourceMissingError, UsageError
from streamconv.families.base import Family, Model
from streamconv.families.detection import find_converted
from streamconv.families.registry import all_families
from streamconv.families.rules import invert
from streamconv.files.reader import Reader
from streamconv.formats.checkpoint import Checkpoint, open_checkpoint
from streamconv.formats.safetensors import make_header
from streamconv.formats.torch_writer import write_pth
from streamconv.output.files import OutputFile, atomic_file, require_space
from streamconv.output.manifest import Manifest
from streamconv.output.writer import SYNC_BYTES
from streamconv.planning.shards import PIECE_BYTES
from streamconv.progress import Progress, ignore_progress
from streamconv.source.open import read_config
from streamconv.tensors.expressions import AnyTensor, SourceTensor, filled, joined
from streamconv.tensors.info import DTYPES

SAFETENSORS = ".safetensors"
MAX_FILLING_BYTES = 1 << 20  # a LayerScale or a mask token is a few kB
SUFFIXES = (".pth", ".pt", ".bin", SAFETENSORS)


@dataclass(frozen=True)
class Reverted:
    """What was written: a backbone's file, and a classifier's head's. ``weights`` are bytes of tensors.

    ``model`` is None where no published model has these sizes.
    """

    family: Family
    model: Model | None
    files: tuple[Path, ...]
    weights: int

    @property
    def title(self) -> str:
        return self.family.title_of(self.model)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model.name if self.model else None,
            "files": [{"file": str(path), "bytes": path.stat().st_size} for path in self.files],
            "weights": self.weights,
        }


def revert(
    folder: str | PathLike[str],
    output: str | PathLike[str],
    *,
    head: str | PathLike[str] | None = None,
    block_chunks: int | None = None,
    progress: Progress = ignore_progress,
) -> Reverted:
    """Write the checkpoint that a folder of transformers' was, or could have been, converted from.

    Args:
        folder: Holds safetensors files, one or several with their index, of transformers 4 or 5.
        output: The file to write: .pth, .pt and .bin as torch.save writes them, .safetensors as save_file.
        head: The file for a classifier's linear head, whose authors keep it apart from the backbone.
        block_chunks: The number of lists that the blocks are in, 0 for one plain list; by default that of the source
            in the folder's manifest, or of the published model's file.
        progress: Told of the bytes written.

    Raises:
        UsageError: a file has another suffix, or a head is wanted and not named, or named and not there.
        SourceError: the folder holds no model of a known family; lists all that differs.
        OutputError: a file is there already, or cannot be written. Both have their names only when all is synced.
    """
    source = Path(folder)
    paths = tuple(Path(path) for path in (output, head) if path is not None)
    for path in paths:
        _require_writable(path, source)
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise UsageError(f"{paths[0]} cannot be backbone and head at once. Give --head another name.")
    if not os.path.isdir(source):
        raise SourceMissingError(f"{source} is no folder. Name the one that holds the safetensors files.")
    manifest = Manifest.read(source)
    with open_checkpoint(source) as checkpoint:
        family, model, count, tensors = _originals(
            _without_fillings(checkpoint, manifest.filled if manifest else {}), str(source), read_config(source)
        )
        known = model.block_chunks if model is not None else 0
        recorded = manifest.block_chunks if manifest is not None else known
        chunks = block_chunks if block_chunks is not None else recorded
        if not 0 <= chunks <= count:
            raise UsageError(f"{count} blocks cannot be in {chunks} chunks. Give --block-chunks from 0 to {count}.")
        if chunks:
            if family.block_chunks is None:
                raise UsageError(f"A {family.name} model has no block chunks. Omit --block-chunks.")
            chunked_key = family.block_chunks.chunked_key
            tensors = {chunked_key(key, count, chunks): tensor for key, tensor in tensors.items()}
        backbone, heads = family.split_head(tensors)
        if heads and head is None:
            raise UsageError(f"{source} is a classifier, whose head has a file of its own. Name it: --head FILE.")
        if head is not None and not heads:
            raise UsageError(f"{source} is no classifier, and has no head. Leave --head out.")
        written = dict(zip(paths, (backbone, heads), strict=False))
        _write(written, checkpoint, progress)
    return Reverted(family, model, paths, _size(tensors))


def _require_writable(path: Path, source: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path} has no suffix of a checkpoint. End its name in {', '.join(SUFFIXES)}.")
    if os.path.lexists(path):
        raise OutputError(f"{path} is there already. Choose another name, or delete it.")
    if not os.path.isdir(path.parent):
        raise OutputError(f"{path.parent} is no folder. Make it first.")
    if os.path.isdir(source) and os.path.samefile(path.parent, source):
        raise UsageError(f"{path} would lie among the model's own files, and be taken for one. Choose another folder.")


def _without_fillings(checkpoint: Checkpoint, constants: Mapping[str, float]) -> Mapping[str, SourceTensor]:
    """Leave out the tensors that a conversion filled in, if all of them still have their values."""
    if not constants.keys() <= checkpoint.keys():
        return checkpoint
    for name, value in constants.items():
        info = checkpoint[name].info
        if not DTYPES[info.dtype].is_weight or info.nbytes > MAX_FILLING_BYTES:
            return checkpoint
        try:
            data = filled(value, info).tobytes()
        except OverflowError:  # beyond the range of a dtype: someone altered the manifest
            return checkpoint
        if checkpoint[name].tobytes(checkpoint.reader) != data:
            return checkpoint
    return {name: tensor for name, tensor in checkpoint.items() if name not in constants}


def _originals(
    checkpoint: Mapping[str, SourceTensor], where: str, config: Mapping[str, Any]
) -> tuple[Family, Model | None, int, dict[str, AnyTensor]]:
    """Return the family, the published model, the number of blocks, and the original's tensors in its own order."""
    infos = {name: tensor.info for name, tensor in checkpoint.items()}
    found = find_converted(infos, where)
    if found is None:
        known = ", ".join(each.name for each in all_families())
        held = [*list(infos)[:3], *["…"] * (len(infos) > 3)]
        raise MappingError(f"{where} holds no model that streamconv converts to ({known}), but:", held)
    family, sources = found
    originals = {key: joined([checkpoint[name] for name in names]) for key, names in sources.items()}
    dimensions = family.read_dimensions({key: tensor.info for key, tensor in originals.items()})
    heads = family.attention_heads
    # The number of heads is not in the files written: without a config.json, any number will do.
    spec = family.conversion_spec(heads.with_number(dimensions, heads.number_in(config) or 1) if heads else dimensions)
    problems = family.config_problems(spec, config)
    tensors = invert(spec.rules, checkpoint, spec.dims, spec.count, where, problems)
    dtype = next(iter(tensors.values())).info.dtype  # of them all: `invert` refuses mixed ones
    if not DTYPES[dtype].is_weight:
        raise MappingError(f"{where} cannot be reverted:", [f"its tensors are {dtype}, which is no model's dtype"])
    model = next((known for known in family.models if known.dimensions == dimensions), None)
    return family, model, spec.count, tensors


def _size(tensors: Mapping[str, AnyTensor]) -> int:
    return sum(tensor.info.nbytes for tensor in tensors.values())


def _write(files: Mapping[Path, Mapping[str, AnyTensor]], checkpoint: Checkpoint, progress: Progress) -> None:
    """All of the files, or none."""
    for path, tensors in files.items():
        require_space(path.parent, _size(tensors))
    done, total, name = 0, sum(map(_size, files.values())), ""

    def advance(size: int) -> None:
        nonlocal done
        done += size
        progress(f"writing {name}", done, total, "bytes")

    with ExitStack() as whole:
        for path, tensors in files.items():
            name = path.name
            _write_state(whole.enter_context(atomic_file(path)), path, tensors, checkpoint.reader, advance)
        for file in checkpoint.files:
            file.require_unchanged()


def _write_state(
    file: OutputFile, path: Path, tensors: Mapping[str, AnyTensor], reader: Reader, advance: Callable[[int], None]
) -> None:
    """One file, in the format that its suffix names."""
    infos = {key: tensor.info for key, tensor in tensors.items()}
    buffer = memoryview(bytearray(PIECE_BYTES))
    file.allocate(_size(tensors))
    with _synced(file) as sync, file.stream() as stream:

        def data(key: str) -> Iterator[memoryview]:
            for piece in tensors[key].split(PIECE_BYTES):
                part = buffer[: piece.info.nbytes]
                piece.read_into(part, reader)
                yield part
                sync(stream.tell())
                advance(len(part))

        if path.suffix == SAFETENSORS:
            header, keys = make_header(infos)
            stream.write(header)
            for key in keys:
                stream.writelines(data(key))
        else:
            write_pth(stream, path.stem, infos, data)


@contextmanager
def _synced(file: OutputFile) -> Iterator[Callable[[int], None]]:
    """Another thread syncs the file on the way. Call what this gives with how far the file is written."""
    synced_to = 0
    synced: Future[None] | None = None
    with ThreadPoolExecutor(1, "sync") as syncing:

        def sync(position: int) -> None:
            nonlocal synced_to, synced
            if position - synced_to >= SYNC_BYTES:
                if synced is not None:
                    synced.result()
                synced = syncing.submit(file.sync, synced_to, position - synced_to)
                synced_to = position

        yield sync
        if synced is not None:
            synced.result()
        file.sync(synced_to, 0)  # to its end
