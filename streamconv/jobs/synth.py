"""Writes random checkpoints in a model's original layout, with its exact names and shapes, in bounded memory.

They demonstrate and test a whole job when no weights are available. The same seed gives the same file.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from streamconv.arguments import shown_value
from streamconv.errors import OutputError, UsageError
from streamconv.families.base import Model
from streamconv.families.expected import copies
from streamconv.families.registry import find_model
from streamconv.files.address import local_path
from streamconv.output.disk import require_space
from streamconv.output.files import as_output_error, atomic_file
from streamconv.output.journal import Journal
from streamconv.output.locks import LockedError, open_exclusive
from streamconv.output.resumable import require_absent
from streamconv.progress import Progress, ignore_progress, job
from streamconv.tensors.evaluation import read_bytes
from streamconv.tensors.expressions import Expression
from streamconv.tensors.info import TensorInfo

CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class SyntheticFiles:
    """The paths of the backbone's file and, for a classifier, of the head's file."""

    backbone: Path
    head: Path | None


@job
def synth(
    model: str,
    path: str | PathLike[str],
    *,
    seed: int = 0,
    force: bool = False,
    progress: Progress = ignore_progress,
) -> SyntheticFiles:
    """Write a random checkpoint of a published model; a classifier's head is written next to it.

    Args:
        model: The model's name, such as "dinov2_vits14".
        path: The .pth file to write.
        seed: The seed of the random weights. The same seed gives the same file.
        force: Replace existing files of these names.
        progress: Called with the number of bytes of tensors generated so far.

    Raises:
        UsageError: there is no such model, the seed is negative, or the file's suffix is .safetensors.
        OutputError: a file exists already, or cannot be written.
    """
    return _synth(model, path, seed, force, progress)


def _synth(model: str, path: str | PathLike[str], seed: int, force: bool, progress: Progress) -> SyntheticFiles:
    family, found = find_model(model)
    backbone = local_path(path, "checkpoint")
    head = _head_path(backbone, found)
    if seed < 0:
        raise UsageError(f"The seed {shown_value(seed)} is negative. Choose 0 or a greater number.")
    if backbone.suffix == ".safetensors":
        raise UsageError(f"{backbone} would be a .pth, as the authors publish it. End its name in .pth.")
    require_absent([file for file in (backbone, head) if file is not None], Journal(), force=force)
    if not os.path.isdir(backbone.parent):
        raise OutputError(f"{backbone.parent} is not a folder. Create it first.")
    backbone_infos, head_infos = family.split_head(family.sources(found.dimensions, found.block_chunks))
    fixed = family.fixed_values(found.dimensions)
    equal = copies(family.conversion_spec(found.dimensions).rules)
    with ExitStack() as named:  # both or none
        named.enter_context(_written(backbone, backbone_infos, fixed, equal, seed, progress))
        if head is not None:
            named.enter_context(_written(head, head_infos, {}, {}, seed + 1, progress))
    return SyntheticFiles(backbone, head)


def synthetic_model(name: str) -> Model:
    """Return the model to generate random weights for.

    Raises:
        UsageError: there is no such model.
    """
    try:
        return find_model(name)[1]
    except UsageError as error:
        raise UsageError(f"--synthetic needs the name of a model: {error}") from None


@contextmanager
def temporary_checkpoint(model: str, output: Path | None, seed: int, progress: Progress) -> Iterator[SyntheticFiles]:
    """Yield a random checkpoint in a hidden folder next to ``output``. The folder is deleted when the block ends.

    Complete files that a killed process left are reused.

    Raises:
        UsageError, OutputError: see `synth`; or another process uses the folder.
    """
    import shutil  # takes a quarter of a megabyte

    found = synthetic_model(model)
    folder = output or Path(found.published_name)
    near = next((path for path in folder.absolute().parents if os.path.isdir(path)), folder)
    temporary = near / f".{folder.name}.streamconv-synthetic"
    with as_output_error(temporary):
        temporary.mkdir(exist_ok=True)
        try:
            lock = open_exclusive(temporary / "lock")
        except LockedError as error:
            raise OutputError(error.message(folder)) from None
    try:
        # The manifest records this name, so that nobody takes these weights for the published ones.
        backbone = temporary / f"{found.name}_synthetic_seed{seed}.pth"
        head = _head_path(backbone, found)
        made = SyntheticFiles(backbone, head)
        if not all(os.path.exists(file) for file in (backbone, head) if file is not None):
            made = _synth(model, backbone, seed, True, progress)
        yield made
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        lock.close()
        with suppress(OSError):  # NFS keeps the name of a file until it is closed, and so its folder
            temporary.rmdir()


def _head_path(backbone: Path, model: Model) -> Path | None:
    """Name the head's file as the authors do: x_linear_head.pth next to x.pth or x_pretrain.pth.

    Returns None if the model has no head.
    """
    if model.head is None:
        return None
    published, head = (Path(file.filename).stem for file in (model.backbone, model.head))
    shared = os.path.commonprefix([published, head]).rpartition("_")[0]  # noqa: RUF071 - of names, not of paths
    stem = backbone.stem.removesuffix(published.removeprefix(shared))
    return backbone.with_name(f"{stem}{head.removeprefix(shared)}{backbone.suffix}")


@contextmanager
def _written(
    path: Path,
    infos: Mapping[str, TensorInfo],
    fixed: Mapping[str, Expression],
    equal: Mapping[str, str],
    seed: int,
    progress: Progress,
) -> Iterator[None]:
    """Write a file of random values; it is renamed into place if the block ends well.

    ``fixed`` are values that are not random, and ``equal`` are names of tensors with the values of others.
    """
    from streamconv.formats.torch_writer import write_pth  # with pickle, which nothing else needs

    order = {name: i for i, name in enumerate(infos)}
    total, done = sum(info.nbytes for info in infos.values()), 0
    require_space(path.parent, total)

    def values(name: str) -> Iterator[bytes]:
        nonlocal done
        original = equal.get(name, name)
        values = _values(original, infos[name], seed, order[original])
        for data in (read_bytes(fixed[name]),) if name in fixed else values:
            yield data
            done += len(data)
            progress(f"generating {path.name}", done, total, "bytes")

    with atomic_file(path) as file:
        with file.stream() as stream:
            write_pth(stream, path.stem, infos, values)
        yield


def _values(name: str, info: TensorInfo, seed: int, number: int) -> Iterator[bytes]:
    """Yield normal values at a scale that keeps activations near 1, so that outputs are finite and vary."""
    import numpy as np

    random = np.random.default_rng([seed, number])
    mean, scale = 0.0, 0.02
    if len(info.shape) == 1 and not name.endswith("bias"):  # a norm's weight or a layer scale
        mean, scale = 1.0, 0.1
    elif info.shape[0] > 1 and len(info.shape) > 1:  # a layer's weight
        scale = math.prod(info.shape[1:]) ** -0.5
    count = math.prod(info.shape)
    for start in range(0, count, CHUNK_ELEMENTS):
        values = random.standard_normal(min(CHUNK_ELEMENTS, count - start), dtype=np.float32)
        yield (values * np.float32(scale) + np.float32(mean)).tobytes()
