"""Random checkpoints in a model's original layout, exact in names and shapes, in bounded memory.

They demonstrate and test the whole job when no weights are available. The same seed gives the same file.
"""

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from streamconv.errors import OutputError, UsageError
from streamconv.families.base import Model
from streamconv.families.registry import find_model
from streamconv.output.files import as_output_error, atomic_file, open_exclusive, require_space
from streamconv.tensors.info import TensorInfo

CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class SyntheticFiles:
    """The file of a backbone, and that of a classifier's head."""

    backbone: Path
    head: Path | None


def synth(model: str, path: str | PathLike[str], *, seed: int = 0, force: bool = False) -> SyntheticFiles:
    """Write a random checkpoint of a published model; a classifier's head is written next to it.

    Args:
        force: Replace files of these names.

    Raises:
        UsageError: there is no such model.
        OutputError: a file exists already, or cannot be written.
    """
    family, found = find_model(model)
    backbone = Path(path)
    head = _head_path(backbone, found)
    for file in (backbone, head):
        if file is not None and os.path.exists(file) and not force:
            raise OutputError(f"{file} exists already. Choose another name, or replace it with --force.")
        if file is not None and not os.path.isdir(file.parent):
            raise OutputError(f"{file.parent} is not a folder. Create it first.")
    backbone_infos, head_infos = family.split_head(family.sources(found.dimensions, found.block_chunks))
    _write(backbone, backbone_infos, seed)
    if head is not None:
        _write(head, head_infos, seed + 1)
    return SyntheticFiles(backbone, head)


@contextmanager
def temporary_checkpoint(model: str, output: Path | None, *, seed: int = 0) -> Iterator[SyntheticFiles]:
    """Yield a random checkpoint in a hidden folder next to ``output``, which is deleted when the block ends.

    The files of a killed process are reused.

    Raises:
        UsageError, OutputError: see `synth`; or another process uses the folder.
    """
    try:
        _, found = find_model(model)
    except UsageError as error:
        raise UsageError(f"--synthetic needs the name of a model: {error}") from None
    folder = output or Path(found.published_name)
    near = next((path for path in folder.absolute().parents if os.path.isdir(path)), folder)
    temporary = near / f".{folder.name}.streamconv-synthetic"
    with as_output_error(temporary):
        temporary.mkdir(exist_ok=True)
        try:
            lock = open_exclusive(temporary / "lock")
        except BlockingIOError:
            raise OutputError(f"{folder} is being written by another process. Let it finish, or end it.") from None
    try:
        # The manifest records this name, so that nobody takes these weights for the published ones.
        backbone = temporary / f"{model}_synthetic_seed{seed}.pth"
        head = _head_path(backbone, found)
        made = SyntheticFiles(backbone, head)
        if not all(os.path.exists(file) for file in (backbone, head) if file is not None):
            backbone.unlink(missing_ok=True)
            made = synth(model, backbone, seed=seed)
        yield made
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


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


def _write(path: Path, infos: dict[str, TensorInfo], seed: int) -> None:
    from streamconv.formats.torch_writer import write_pth  # with pickle, which nothing else needs

    order = {name: i for i, name in enumerate(infos)}
    require_space(path.parent, sum(info.nbytes for info in infos.values()))
    with atomic_file(path) as file, file.stream() as stream:
        write_pth(stream, path.stem, infos, lambda name: _values(name, infos[name], seed, order[name]))


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
