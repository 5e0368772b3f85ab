"""Loads a .pth with torch, also one with objects of classes that torch refuses, or of pickle protocols 4 and 5.

``torch.load(weights_only=True)`` reads protocol 2, and few classes but its own. For any other file, Python's unpickler
executes the pickle, torch reads the tensors, and a stand-in takes the place of each other object. Nothing that the file
names is imported or called. (torch.serialization.safe_globals would allow classes to every thread.)
"""

import mmap
import warnings
from collections import OrderedDict
from functools import partial
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import torch

_ERRORS = (UnpicklingError, AttributeError, IndexError, KeyError, TypeError, ValueError)


class NotLoadedError(Exception):
    """torch does not load a file, not even with stand-ins."""


def load(path: Path, *, is_legacy: bool) -> Any:
    """Load a .pth. Its tensors are mapped, unless it is in the format from before torch 1.6, which torch cannot map.

    Raises:
        NotLoadedError: torch does not load the file.
    """
    try:
        return _load(path, is_legacy=is_legacy, map_location="cpu", mmap=not is_legacy)
    except RuntimeError:
        # torch maps a file so that memory could be written to, which Linux refuses if the file is larger than memory.
        if is_legacy:
            raise
    return _on_mapping(_load(path, is_legacy=is_legacy, map_location="meta"), _map_read_only(path))


def _load(path: Path, *, is_legacy: bool, **options: Any) -> Any:
    read = partial(torch.load, path, **options)
    if _is_protocol_2(path, is_legacy=is_legacy):  # torch would warn of others, and warnings belong to the caller
        try:
            return read(weights_only=True)
        except _ERRORS:
            pass
    try:
        return read(weights_only=False, pickle_module=_PICKLE)
    except _ERRORS as error:
        raise NotLoadedError from error


def _map_read_only(path: Path) -> torch.Tensor:
    """Map a file as a tensor of bytes, which must not be changed."""
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the tensor must not be changed
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.uint8)


def _on_mapping(value: Any, mapped: torch.Tensor) -> Any:
    """Return a state dict on the meta device with the values at the places in the file that torch found.

    Raises:
        NotLoadedError: this release of torch does not tell the places.
    """
    if isinstance(value, dict):
        return {key: _on_mapping(each, mapped) for key, each in value.items()}
    if not isinstance(value, torch.Tensor) or not value.is_meta:
        return value
    start = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise NotLoadedError
    empty = torch.empty(0, dtype=value.dtype)
    first = start // value.itemsize + value.storage_offset()
    return empty.set_(mapped.untyped_storage(), first, value.shape, value.stride())


def _is_protocol_2(path: Path, *, is_legacy: bool) -> bool:
    """Return whether the pickle begins with the opcode PROTO and the number 2."""
    if is_legacy:
        with path.open("rb") as file:
            return file.read(2) == b"\x80\x02"
    with ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(name) as pickled:
            return pickled.read(2) == b"\x80\x02"


class _StandIn(dict):  # type: ignore[type-arg]
    """Takes the place of an object of any other class, and keeps the items of one that is a mapping."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be an item of a set
    __eq__ = object.__eq__
    dump_patches = False  # torch asks the class of a module in the older format

    def __new__(cls, *arguments: Any, **keywords: Any) -> "_StandIn":
        made = super().__new__(cls)
        if len(arguments) == 1 and isinstance(arguments[0], dict):
            made.update(arguments[0])
        return made

    def __init__(self, *arguments: Any, **keywords: Any) -> None: ...

    def __call__(self, *arguments: Any) -> "_StandIn":
        return _StandIn()

    def __setstate__(self, state: Any) -> None:
        if not self and isinstance(state, dict) and len(state) == 1 and isinstance(state.get("data"), dict):
            self.update(state["data"])  # as in collections.UserDict

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...


class _PlainTensor(_StandIn):
    """Stands for torch.Tensor and torch.nn.Parameter themselves: calling these could take any amount of memory."""


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    is_plain = kind is _PlainTensor and function in _REBUILDS.values()
    return function(*arguments) if is_plain else _StandIn()


def _rebuild_parameter(data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> Any:
    return data


def _rebuild_device_tensor(data: Any, dtype: Any, device: Any, requires_grad: Any) -> Any:
    return data


_REBUILDS = {
    "_rebuild_tensor": torch._utils._rebuild_tensor,
    "_rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "_rebuild_tensor_v3": torch._utils._rebuild_tensor_v3,
    "_rebuild_parameter": _rebuild_parameter,
    "_rebuild_parameter_with_state": _rebuild_parameter,
    "_rebuild_device_tensor_from_cpu_tensor": _rebuild_device_tensor,
}
_KNOWN = {
    "collections.OrderedDict": OrderedDict,
    "torch.storage.UntypedStorage": torch.UntypedStorage,
    "torch.Tensor": _PlainTensor,
    "torch.nn.parameter.Parameter": _PlainTensor,
    "torch.nn.parameter.Buffer": _PlainTensor,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "builtins.getattr": lambda *arguments: _StandIn,  # how protocol 2 names a class inside another one
    "__builtin__.getattr": lambda *arguments: _StandIn,
    **{f"torch._utils.{name}": function for name, function in _REBUILDS.items()},
}


class _TensorUnpickler(Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch":
            found = getattr(torch, name, None)
            if isinstance(found, torch.dtype):
                return found
            dtype = getattr(found, "dtype", None)
            if name.endswith("Storage") and isinstance(dtype, torch.dtype):
                return type(name, (_StandIn,), {"dtype": dtype})  # torch asks for no more than this
        return _KNOWN.get(f"{module}.{name}", _StandIn)


_PICKLE = SimpleNamespace(
    __name__=__name__, Unpickler=_TensorUnpickler, load=lambda file, **options: _TensorUnpickler(file, **options).load()
)
