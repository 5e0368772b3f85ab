"""What the pickles of torch.save say of tensors: the same in a zip and in the format from before 1.6.

No pickle is ever trusted: `unpickle` carries it out, `Index.find` answers for a fixed list of names with
functions that build descriptions, and for every other name with one that does nothing. No code of a
checkpoint runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from streamconv.errors import CorruptError, NotACheckpointError, SourceError, UnsafePickleError, printable
from streamconv.formats.limits import MAX_NAME_LENGTH, MAX_TENSORS, are_sizes, check_name, is_shape
from streamconv.formats.unpickle import PickleError, Unread
from streamconv.tensors.expressions import Record, SourceTensor
from streamconv.tensors.info import DTYPES, TensorInfo

# torch's names of the typed storages and, for dtypes without one, of the dtypes themselves; to safetensors' codes.
_STORAGE_DTYPES = {dtype.storage: dtype.code for dtype in DTYPES.values() if dtype.storage}
_V3_DTYPES = {dtype.torch: dtype.code for dtype in DTYPES.values() if not dtype.storage}

# No checkpoint has a use for these: a file that names one is meant to do harm, and is better not kept.
_HARMFUL_MODULES = {"os", "posix", "nt", "sys", "subprocess", "pty", "shutil", "socket", "runpy", "importlib", "ctypes"}
_HARMFUL_BUILTINS = {"eval", "exec", "compile", "open", "__import__", "execfile", "input", "breakpoint"}


_MAX_OTHERS = 10_000
_MAX_ENTRIES = 4 * MAX_TENSORS  # of a dict and the dicts in it; an optimizer has a few for each tensor


class _Name(str):
    """Stands for a torch class or dtype that a pickle names; it can be compared, not called."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    record: Record


class Index:
    """What the names and persistent ids of a pickle stand for.

    ``record_of`` gives a storage's record for its key, dtype and number of elements, or raises.
    """

    def __init__(self, where: str, record_of: Callable[[str, str, int], Record]):
        self._where, self._record_of = where, record_of
        self._dtypes: dict[str, str] = {}  # of the records that are named as storages
        self._count = 0
        self._functions: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): lambda: {},
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor_v2,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_v3,
            ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
            ("torch._utils", "_rebuild_parameter_with_state"): lambda data, requires_grad, hooks, state: data,
        }

    def find(self, module: str, name: str) -> Any:
        function = self._functions.get((module, name))
        if function is not None:
            return function
        if module == "torch" and (name in _STORAGE_DTYPES or name in _V3_DTYPES):
            return _Name(name)
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return _Name(name)
        root = module.partition(".")[0]
        if root in _HARMFUL_MODULES or (root in ("builtins", "__builtin__") and name in _HARMFUL_BUILTINS):
            raise UnsafePickleError(
                f"{self._where} names {printable(f'{module}.{name}')}, which no checkpoint has a use for. "
                "Nothing of it was run. Do not trust this file."
            )
        return Unread(f"{module}.{name}")

    def storage(self, pid: Any) -> _Storage:
        """For ``("storage", type, key, device, number of elements)``."""
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise PickleError("it has a persistent id that is no storage's")
        _, kind, key, _, numel = pid
        if type(kind) is not _Name or kind in _V3_DTYPES or type(key) is not str or not are_sizes([numel]):
            raise PickleError("it names a storage without a type, a key or a size")
        dtype = _STORAGE_DTYPES.get(kind, "U8")  # an UntypedStorage counts bytes
        record = self._record_of(key, dtype, numel)
        # torch.save refuses this where there are bytes; some releases of torch.load read the first dtype twice.
        if numel and self._dtypes.setdefault(record.name, dtype) != dtype:
            raise CorruptError(f"{self._where} names its record {record.name} as {dtype} and as another dtype.")
        return _Storage(dtype, record)

    def _tensor_v2(
        self, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
    ) -> SourceTensor:
        if type(storage) is not _Storage:
            raise PickleError("it has a tensor without a storage")
        return self._tensor(storage.dtype, storage, offset, shape, strides, metadata)

    def _tensor_v3(
        self, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, dtype: Any,
        metadata: Any = None,
    ) -> SourceTensor:  # fmt: skip
        if type(storage) is not _Storage or type(dtype) is not _Name or dtype not in _V3_DTYPES:
            raise PickleError("it has a tensor without a storage or a dtype")
        return self._tensor(_V3_DTYPES[dtype], storage, offset, shape, strides, metadata)

    def _tensor(
        self, dtype: str, storage: _Storage, offset: Any, shape: Any, strides: Any, metadata: Any
    ) -> SourceTensor:
        self._count += 1
        if self._count > MAX_TENSORS:
            raise PickleError(f"it describes more than {MAX_TENSORS:,} tensors")
        if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
            raise PickleError("it has a tensor whose shape and strides do not fit together")
        if not is_shape(shape) or not are_sizes((offset, *strides)):
            raise PickleError("it has a tensor with an impossible offset, shape or strides")
        if metadata:  # {"conj": True} or {"neg": True}: the bytes are not the values
            raise SourceError(
                f"{self._where} holds a tensor whose values are a lazy view of its bytes, conjugated or negated. "
                "Save it again after tensor.resolve_conj().resolve_neg()."
            )
        tensor = SourceTensor(TensorInfo(dtype, shape), storage.record, offset * DTYPES[dtype].itemsize, strides)
        if 0 not in shape and tensor.offset + tensor.span > storage.record.range.length:
            raise PickleError(
                f"a tensor {tensor.info} at element {offset} reaches beyond its storage {storage.record.name} "
                f"of {storage.record.range.length} bytes"
            )
        return tensor


def tensors_in(contents: Any, where: str) -> tuple[dict[str, SourceTensor], dict[str, str]]:
    """The tensors in a dict and in the dicts in it, the keys joined by dots; and what else lies there.

    That is, by name, the class of what is no tensor, no dict, and of no type of Python's own. Lists are not looked
    into: no state dict is in one.

    Raises:
        NotACheckpointError, UnsafePickleError, SourceError
    """
    if type(contents) is Unread:
        raise UnsafePickleError(
            f"{where} holds a {printable(contents.name)}, which is no dict of tensors. Nothing of it was run. "
            "Save its state_dict() instead."
        )
    if type(contents) is not dict:
        kind = "tensor" if type(contents) is SourceTensor else type(contents).__name__
        raise NotACheckpointError(f"{where} holds a {kind}, not a dict of tensors.")
    tensors: dict[str, SourceTensor] = {}
    others: dict[str, str] = {}
    waiting: list[tuple[str, Any, Any]] = [("", key, value) for key, value in reversed(contents.items())]
    count = len(waiting)
    while waiting:
        prefix, key, value = waiting.pop()
        name = prefix + str(key)[: MAX_NAME_LENGTH + 1]
        if type(value) is SourceTensor:
            check_name(name, where)
            if name in tensors:
                raise SourceError(f"{where} names two tensors '{printable(name)}'. Do not trust this file.")
            tensors[name] = value
        elif type(value) is Unread:
            if len(others) < _MAX_OTHERS:
                others[name if name.isprintable() else printable(name)] = printable(value.name)
        elif type(value) is dict and value:
            count += len(value)  # a dict may stand in many others, or in itself
            if count > _MAX_ENTRIES or len(name) > MAX_NAME_LENGTH:
                raise SourceError(f"{where} has dicts too deep or with too many entries. Do not trust this file.")
            waiting += ((f"{name}.", key, item) for key, item in reversed(value.items()))
    if len(tensors) > MAX_TENSORS:
        raise SourceError(f"{where} has more than {MAX_TENSORS:,} tensors. Do not trust this file.")
    return tensors, others
