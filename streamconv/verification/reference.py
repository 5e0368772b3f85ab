"""The original model, with its weights mapped from the original file by torch itself.

This shares nothing with the conversion but the sizes, so that a wrong reader, rule or writer shows. A
file at an address torch cannot map: then its reader is shared, whose bytes are held against CRC-32s.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn

from streamconv.errors import UsageError
from streamconv.families.base import HEAD_PREFIX
from streamconv.formats import torch_legacy
from streamconv.planning.plan import Plan
from streamconv.source.open import OpenSource
from streamconv.tensors.expressions import AnyTensor, joined, parts_of
from streamconv.verification.offload import StreamedWeights

BUILTIN, HUB = "builtin", "hub"


def check_reference(reference: str | PathLike[str]) -> None:
    """
    Raises:
        UsageError: it is none of the words, and no folder that torch.hub could load from.
    """
    if reference not in (BUILTIN, HUB) and not os.path.exists(os.path.join(reference, "hubconf.py")):
        raise UsageError(f"The reference {reference} is neither builtin, hub nor a folder with a hubconf.py.")


def build_original(plan: Plan, reference: str | PathLike[str]) -> tuple[Any, Callable[..., Any]]:
    """The original graph on the meta device, and its family's `states`.

    ``reference`` is "builtin" for this package's graph; "hub" for the authors' own code, which
    torch.hub fetches and runs; or a folder that holds that code.

    Raises:
        UsageError: the authors' code cannot be had, or knows no such model.
    """
    module = importlib.import_module(f"streamconv.verification.originals.{plan.family.name}")
    if reference == BUILTIN:
        with init_empty_weights():
            return module.build(plan.dimensions), module.states
    check_reference(reference)
    if plan.model is None:
        raise UsageError("torch.hub has published models only, and this is none. Use --reference builtin.")
    place = (module.REPOSITORY, "github") if reference == HUB else (fspath(reference), "local")
    before = set(sys.modules)
    try:
        with init_empty_weights():
            original = module.load(*place, plan.model)
        if not isinstance(original, nn.Module) or not hasattr(original, "prepare_tokens_with_masks"):
            raise TypeError(f"it gives a {type(original).__name__}, and no model of the authors' code")
        return original, module.states
    except (Exception, SystemExit) as error:  # anything may go wrong in code that is not ours
        message = f"{plan.model.name} could not be loaded from {place[0]}: {type(error).__name__}: {error}"
        raise UsageError(f"{message}. Use --reference builtin, or a folder with the authors' code.") from error
    finally:
        # Another folder's code has the same names, and shall not be taken for this one's.
        folders = (os.path.realpath(place[0]), os.path.realpath(torch.hub.get_dir()))
        for name in set(sys.modules) - before:
            if os.path.realpath(getattr(sys.modules[name], "__file__", None) or "").startswith(folders):
                del sys.modules[name]


def load_weights(
    original: Any, source: OpenSource, device: torch.device, cast_to: str
) -> tuple[StreamedWeights | None, str]:
    """Assign the files' tensors, mapped and not copied, to a model on the meta device, strictly.

    Those of a source at an address are not assigned, but given, to be read when they are needed, and cast; so are
    those of a file that torch does not load without trusting it, and then what is told of that is not empty.
    """
    files, why = {}, ""
    if not source.is_remote:
        try:
            files = {
                role: {name: value for path in checkpoint.paths for name, value in _flatten(_map_file(path))}
                for role, checkpoint in source.checkpoints.items()
            }
        except (UnpicklingError, ValueError, TypeError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            why = f"torch does not load all that the source holds ({reason}): streamconv read its tensors"
    if source.is_remote or why:
        shapes = {name: torch.empty(tensor.info.shape, device="meta") for name, tensor in source.tensors.items()}
        original.load_state_dict(shapes, strict=True, assign=True)
        tensors = {name: _cast(source.tensors[name], cast_to) for name in original.state_dict()}
        return StreamedWeights(tensors, source.reader, device), why
    state: dict[str, Any] = {}
    for key, names in source.selection.names.items():
        parts = [files["backbone"][name] for name in names]
        state[key] = torch.cat(parts) if len(parts) > 1 else parts[0]
    state |= {HEAD_PREFIX + name: value for name, value in files.get("head", {}).items()}
    original.load_state_dict(state, strict=True, assign=True)
    return None, ""


def _cast(tensor: AnyTensor, dtype: str) -> AnyTensor:
    return joined([replace(part, cast_to=dtype) for part in parts_of(tensor)])


def _map_file(path: Path) -> Any:
    with open(path, "rb") as file:
        is_legacy = file.read(len(torch_legacy.MAGIC)) == torch_legacy.MAGIC
    if not is_legacy and not is_zipfile(path):
        return load_file(path)
    load = partial(torch.load, path, map_location="cpu", mmap=not is_legacy, weights_only=True)  # torch maps zips only
    try:
        return load()
    except UnpicklingError:  # a training checkpoint's settings, of classes that torch would have to import
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Unread, name) for name in names]):
            return load()


class _Unread:
    """Stands for every class that a file names and torch does not trust: none of them is imported or called."""

    def __new__(cls, *arguments: object) -> "_Unread":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None: ...


def _flatten(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors of dicts in dicts, by their keys joined with dots."""
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
