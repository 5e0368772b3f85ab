"""The tensors that a pickle of torch.save describes, in a zip or in the format from before torch 1.6.

No pickle is trusted. `unpickle` executes it; for a fixed list of globals, `Index.find_global` returns functions that
build descriptions, and for any other a placeholder that does nothing. No code from a checkpoint runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from streamconv.display import printable
from streamconv.errors import CorruptError, UnsafePickleError
from streamconv.formats.limits import MAX_TENSORS, are_sizes, is_shape
from streamconv.formats.non_tensors import Kind, NonTensor, tensor_of_class
from streamconv.formats.unread import PickleError, Unread
from streamconv.tensors.expressions import Read, Record
from streamconv.tensors.info import DTYPES, DtypeCode, TensorInfo

# From torch's typed storage classes, and from torch's dtypes that have no such class, to safetensors' codes.
_STORAGE_DTYPES = {dtype.storage: dtype.code for dtype in DTYPES.values() if dtype.storage}
_V3_DTYPES = {dtype.torch: dtype.code for dtype in DTYPES.values() if not dtype.storage}

# No checkpoint needs these: a file that names one was made to do harm.
_HARMFUL_MODULES = {"os", "posix", "nt", "sys", "subprocess", "pty", "shutil", "socket", "runpy", "importlib", "ctypes"}
_HARMFUL_BUILTINS = {"eval", "exec", "compile", "open", "__import__", "execfile", "input", "breakpoint"}

# The classes of torch whose objects are plain tensors, which may have attributes.
_PLAIN_TENSORS = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
_VALUE_ATTRIBUTES = {"data", "imag", "real"}  # setting one of these changes a tensor's values


class _TorchGlobal(str):
    """The name of a torch class or dtype in a pickle. It can be compared but not called."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: DtypeCode
    record: Record


class Index:
    """Resolves the globals and persistent ids in a pickle.

    ``record_of`` returns the record of a storage, from its key, dtype and number of elements, or raises.
    """

    def __init__(self, where: str, record_of: Callable[[str, str, int], Record]):
        self._where, self._record_of = where, record_of
        self._dtypes: dict[str, DtypeCode] = {}  # by name of the record
        self._tensor_count = 0
        self._functions: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): lambda: {},
            ("torch._utils", "_rebuild_tensor"): self._tensor_v1,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor_v2,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_v3,
            ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
            ("torch._utils", "_rebuild_parameter_with_state"): _parameter_with_state,
            ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): self._device_tensor,
        }
        self._rebuilds = list(self._functions.values())[1:]
        self._functions["torch._tensor", "_rebuild_from_type_v2"] = self._from_type

    def find_global(self, module: str, name: str) -> Any:
        """Return what ``module.name`` stands for: a function of ours, a `_TorchGlobal`, or an `Unread` placeholder.

        Raises:
            UnsafePickleError: it is one that only a harmful file names.
        """
        function = self._functions.get((module, name))
        if function is not None:
            return function
        if module == "torch" and (name in _STORAGE_DTYPES or name in _V3_DTYPES):
            return _TorchGlobal(name)
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return _TorchGlobal(name)
        root = module.partition(".")[0]
        if root in _HARMFUL_MODULES or (root in ("builtins", "__builtin__") and name in _HARMFUL_BUILTINS):
            raise UnsafePickleError(
                f"{self._where} names {printable(f'{module}.{name}')}, which no checkpoint needs. "
                "It was not run. Do not trust this file."
            )
        return Unread(f"{module}.{name}")

    def storage(self, pid: Any) -> _Storage | Unread:
        """Resolve the persistent id ``("storage", type, key, device, number of elements)``."""
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise PickleError("it has a persistent id that does not describe a storage")
        _, kind, key, _, numel = pid
        if type(kind) is Unread:  # of a dtype that is not in `DTYPES`
            return kind
        if type(kind) is not _TorchGlobal or kind in _V3_DTYPES or type(key) is not str or not are_sizes([numel]):
            raise PickleError("it names a storage without a type, a key or a size")
        dtype = _STORAGE_DTYPES.get(kind, "U8")  # an UntypedStorage counts bytes
        record = self._record_of(key, dtype, numel)
        # torch.save refuses this unless the storage is empty; some releases of torch.load use the first dtype for both.
        if numel and self._dtypes.setdefault(record.name, dtype) != dtype:
            raise CorruptError(f"{self._where} uses its record {record.name} as {dtype} and as another dtype.")
        return _Storage(dtype, record)

    def _tensor_v1(self, storage: Any, offset: Any, shape: Any, strides: Any) -> Read | NonTensor:
        return self._tensor_v2(storage, offset, shape, strides, False, None)

    def _tensor_v2(
        self, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
    ) -> Read | NonTensor:
        if type(storage) is Unread:
            return NonTensor(f"tensor in a {printable(storage.name)}", Kind.DTYPE)
        if type(storage) is not _Storage:
            raise PickleError("it has a tensor without a storage")
        return self._tensor(storage.dtype, storage, offset, shape, strides, metadata)

    def _tensor_v3(
        self, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, dtype: Any,
        metadata: Any = None,
    ) -> Read | NonTensor:  # fmt: skip
        if type(dtype) is Unread:
            return NonTensor(f"tensor of {printable(dtype.name)}", Kind.DTYPE)
        if type(storage) is not _Storage or type(dtype) is not _TorchGlobal or dtype not in _V3_DTYPES:
            raise PickleError("it has a tensor without a storage or a dtype")
        return self._tensor(_V3_DTYPES[dtype], storage, offset, shape, strides, metadata)

    def _from_type(self, function: Any, kind: Any, arguments: Any, state: Any) -> Any:
        """Read a tensor that has attributes, or is of another class than torch.Tensor."""
        if type(kind) is not Unread or type(arguments) is not tuple:
            raise PickleError("it has a tensor without a class or without values")
        if kind.name not in _PLAIN_TENSORS:
            return tensor_of_class(printable(kind.name))
        _check_attributes(state)
        if type(function) is Unread:
            return Unread(function.name, arguments)
        if not any(function is each for each in self._rebuilds):
            raise PickleError("it has a tensor that is not made by one of torch's functions for it")
        return function(*arguments)

    def _device_tensor(self, data: Any, dtype: Any, device: Any, requires_grad: Any) -> Any:
        name = dtype if type(dtype) is _TorchGlobal else dtype.name if type(dtype) is Unread else ""
        if type(data) is Read and name.removeprefix("torch.") != DTYPES[data.info.dtype].torch:
            raise PickleError("it has a tensor of another dtype than its values")
        return data

    def _tensor(
        self, dtype: DtypeCode, storage: _Storage, offset: Any, shape: Any, strides: Any, metadata: Any
    ) -> Read | NonTensor:
        self._tensor_count += 1
        if self._tensor_count > MAX_TENSORS:
            raise PickleError(f"it describes more than {MAX_TENSORS:,} tensors")
        if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
            raise PickleError("it has a tensor whose shape and strides do not fit together")
        if not is_shape(shape) or not are_sizes((offset, *strides)):
            raise PickleError("it has a tensor with an impossible offset, shape or strides")
        if metadata:  # {"conj": True} or {"neg": True}: the bytes are not the values
            return NonTensor("lazily conjugated or negated tensor", Kind.LAZY)
        tensor = Read(TensorInfo(dtype, shape), storage.record, offset * DTYPES[dtype].itemsize, strides)
        if 0 not in shape and tensor.offset + tensor.span > storage.record.range.length:
            raise PickleError(
                f"a tensor {tensor.info} at element {offset} reaches beyond its storage {storage.record.name} "
                f"of {storage.record.range.length} bytes"
            )
        return tensor


def _parameter_with_state(data: Any, requires_grad: Any, hooks: Any, state: Any) -> Any:
    _check_attributes(state)
    return data


def _check_attributes(state: Any) -> None:
    """Require that a tensor's attributes do not replace its values: a dict, or a pair of it and a dict for slots."""
    for each in state[:2] if type(state) is tuple else (state,):
        if type(each) is dict and any(name in each for name in _VALUE_ATTRIBUTES):
            raise PickleError("it has a tensor whose values are replaced by an attribute")
