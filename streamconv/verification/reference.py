"""The original model, with its weights mapped from the original file by torch itself.

It shares only the model's dimensions with the conversion, so that a fault in a reader, a rule or the
writer shows. torch cannot map a remote file. For such a file the conversion's reader is used, whose
bytes are checked against CRC-32s.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from threading import Lock
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from safetensors.torch import load_file

from streamconv.errors import UsageError
from streamconv.formats import torch_legacy
from streamconv.formats.foreign.zips import is_npz
from streamconv.planning.plan import Plan
from streamconv.source.open import OpenSource
from streamconv.verification.empty_weights import empty_weights
from streamconv.verification.numpy_file import NumpyFile
from streamconv.verification.originals import OriginalArchitecture, original_of
from streamconv.verification.preflight import BUILTIN, HUB, check_reference
from streamconv.verification.torch_loading import NotLoadedError, load
from streamconv.verification.weights import MappedWeights, StreamedWeights

_hub_lock = Lock()  # torch.hub imports from the front of sys.path, and two folders' modules have the same names


def build_original(plan: Plan, reference: str | PathLike[str]) -> tuple[Any, OriginalArchitecture]:
    """Build the original model on the meta device; returns it and its architecture in `originals`.

    ``reference`` is "builtin" for the code in `originals`; "hub" for the authors' own code, which
    torch.hub downloads and runs; or a folder with that code.

    Raises:
        UsageError: the authors' code cannot be loaded, or does not have this model.
    """
    architecture = original_of(plan.family_name)
    if reference == BUILTIN:
        with empty_weights():
            return architecture.build(plan.dimensions), architecture
    check_reference(reference)
    if plan.model is None:  # for a model with the same shapes, its code is the same
        raise UsageError("torch.hub has published models only, and this is not one of them. Use --reference builtin.")
    location = (architecture.repository, "github") if reference == HUB else (fspath(reference), "local")
    try:
        with _hub_lock, _forgotten_modules(location[0]), empty_weights():
            return architecture.load(*location, plan.model), architecture
    except (Exception, SystemExit) as error:  # the code is not ours and may raise anything
        message = f"{plan.model.name} could not be loaded from {location[0]}: {type(error).__name__}: {error}"
        raise UsageError(f"{message}. Use --reference builtin, or a folder with the authors' code.") from error


@contextmanager
def _forgotten_modules(repository: str) -> Iterator[None]:
    """Forget the imported modules: another folder's modules have the same names and would not be imported."""
    before = set(sys.modules)
    try:
        yield
    finally:
        folders = (os.path.realpath(repository), os.path.realpath(torch.hub.get_dir()))
        for name in set(sys.modules) - before:
            if os.path.realpath(getattr(sys.modules[name], "__file__", None) or "").startswith(folders):
                del sys.modules[name]


def load_weights(original: Any, source: OpenSource) -> tuple[MappedWeights | StreamedWeights, str]:
    """Load the source's tensors into a model on the meta device; missing and unexpected tensors are errors.

    torch maps local files, and nothing is copied. A remote source, a file that torch does not load safely, or a
    converted model whose tensors are not merely concatenated, is not loaded; `StreamedWeights` read its tensors on
    demand.

    Returns:
        The weights, and why those of a local file had to be streamed ("" if they were not).
    """
    files, why = {}, ""
    if not source.is_remote and not source.selection.is_concatenated:
        why = "the source has transformers' names, so streamconv's reader also read the original model's weights"
    elif not source.is_remote:
        try:
            files = {role: _map_files(paths) for role, paths in source.local_paths.items()}
        except NotLoadedError:
            why = "torch.load does not load the source, so streamconv's reader also read the original model's weights"
    if source.is_remote or why:
        shapes = {name: torch.empty(tensor.info.shape, device="meta") for name, tensor in source.tensors.items()}
        original.load_state_dict(shapes, strict=True, assign=True)
        tensors = {name: source.tensors[name] for name in original.state_dict()}
        return StreamedWeights(tensors, source.reader), why
    state: dict[str, Any] = {}
    for key, names in source.selection.names.items():
        parts = [files["backbone"][name] for name in names]
        state[key] = torch.cat(parts) if len(parts) > 1 else parts[0]
    state |= {key: files["head"][name] for key, name in source.selection.head_names.items()}
    original.load_state_dict(state, strict=True, assign=True)
    return MappedWeights(original.state_dict()), ""


def _map_files(paths: Sequence[Path]) -> Mapping[str, Any]:
    """Map the tensors of a checkpoint's files by name."""
    files = [_map_tensors(path) for path in paths]
    return files[0] if len(files) == 1 else {name: value for file in files for name, value in file.items()}


def _map_tensors(path: Path) -> Mapping[str, Any]:
    if is_zipfile(path):
        with ZipFile(path) as archive:
            names = archive.namelist()
        if is_npz(names):
            return NumpyFile(path)
    return dict(flatten(_map_file(path)))


def _map_file(path: Path) -> Any:
    with open(path, "rb") as file:
        is_legacy = torch_legacy.is_legacy(file.read(torch_legacy.HEAD_BYTES))
    if not is_legacy and not is_zipfile(path):
        return load_file(path)
    return load(path, is_legacy=is_legacy)


def flatten(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors of nested dicts, with their keys joined by dots."""
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
