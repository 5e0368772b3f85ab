"""Describes values in a checkpoint that are not plain tensors, and says how to save plain tensors instead."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from streamconv.display import printable
from streamconv.errors import MappingError
from streamconv.formats.unread import Unread

_MAX_NAMES = 3
_QUANTISING_PACKAGES = {"bitsandbytes", "hqq", "optimum", "torchao", "transformer_engine"}


class Kind(Enum):
    """The kinds of values, each with what a file of them is, and how to save plain tensors instead.

    ``NAME`` in the second text is the name of the first value, as subscripts.
    """

    DTENSOR = (
        "holds DTensors, as FSDP2 and tensor parallelism make them: each is one process's part of a tensor",
        "Save whole tensors: let every process call state = get_model_state_dict(model, options=StateDictOptions("
        "full_state_dict=True, cpu_offload=True)), from torch.distributed.checkpoint.state_dict, and the first one "
        "torch.save(state, 'model.pth').",
    )
    SHARDED_TENSOR = (
        "holds ShardedTensors, as FSDP makes them for SHARDED_STATE_DICT: each is one process's part of a tensor",
        "Save whole tensors: let every process call state = model.state_dict() under FSDP.state_dict_type(model, "
        "StateDictType.FULL_STATE_DICT, FullStateDictConfig(offload_to_cpu=True, rank0_only=True)), and the first one "
        "torch.save(state, 'model.pth').",
    )
    QUANTISED = (
        "holds quantised tensors, which are integers with scales",
        "Convert the checkpoint that was quantised. If you do not have it, save tensor.dequantize() for each.",
    )
    SPARSE = ("holds sparse tensors", "Save tensor.to_dense() for each.")
    NESTED = (
        "holds nested tensors, which are several tensors of different shapes in one",
        "Save each of them under a name of its own: tensor.unbind() returns them.",
    )
    META = (
        "holds meta tensors, which have a shape but no values: it was saved before the model had its weights, or while "
        "they were offloaded",
        "Save it again with the weights loaded; accelerate has accelerator.get_state_dict(model).",
    )
    LAZY = (
        "holds tensors whose values are lazy views of their bytes, conjugated or negated",
        "Save tensor.resolve_conj().resolve_neg() for each.",
    )
    XLA = (
        "holds tensors of an XLA device, whose values are numpy arrays in the pickle",
        "Save tensor.cpu() for each.",
    )
    DTYPE = (
        "holds tensors of a dtype that streamconv does not read",
        "Save tensor.to(torch.float32) for each, or another floating-point dtype.",
    )
    TENSOR_SUBCLASS = (
        "holds tensors of a class that is not torch's own, whose code would have to run",
        "Save them as plain tensors: tensor.as_subclass(torch.Tensor), or the conversion that the class has.",
    )
    MODULE = (
        "holds a whole model, whose code would have to run",
        "If you trust the file and can import its class, save its state dict: "
        "torch.save(torch.load('old.pth', weights_only=False)NAME.state_dict(), 'new.pth').",
    )
    ATTRIBUTES = (
        "holds its tensors in the attributes of an object, which streamconv does not read",
        "If you trust the file and can import its class, save the dict of tensors alone: "
        "vars(torch.load('old.pth', weights_only=False)NAME) shows the attributes.",
    )
    LIST = (
        "holds its tensors in a list, which streamconv does not search",
        "Save one dict of tensors alone: torch.save(torch.load('old.pth')NAME[0], 'new.pth') if it is a list of dicts, "
        "or torch.save(dict(torch.load('old.pth')NAME), 'new.pth') if it is one of names with tensors.",
    )
    OBJECT = ("holds objects, which are not read, and no tensor", "Save a dict of tensors, such as model.state_dict().")
    VALUE = ("holds plain Python values, and no tensor", "Save a dict of tensors, such as model.state_dict().")

    @property
    def is_tensor(self) -> bool:
        return self not in (Kind.MODULE, Kind.ATTRIBUTES, Kind.LIST, Kind.OBJECT, Kind.VALUE)


@dataclass(frozen=True, slots=True)
class NonTensor:
    """A value that is not a plain tensor: its class, or the function that would have made it."""

    class_name: str
    kind: Kind = Kind.OBJECT

    def __str__(self) -> str:
        return self.class_name


# The functions of torch._utils that make tensors whose values are not a strided view of a storage.
_MADE_BY = {
    "torch._utils._rebuild_sparse_tensor": NonTensor("sparse tensor", Kind.SPARSE),
    "torch._utils._rebuild_nested_tensor": NonTensor("nested tensor", Kind.NESTED),
    "torch._utils._rebuild_qtensor": NonTensor("quantised tensor", Kind.QUANTISED),
    "torch._utils._rebuild_meta_tensor_no_storage": NonTensor("meta tensor", Kind.META),
    "torch._utils._rebuild_device_tensor_from_numpy": NonTensor("tensor of an XLA device", Kind.XLA),
    "torch._utils._rebuild_xla_tensor": NonTensor("tensor of an XLA device", Kind.XLA),
}


def describe(value: Unread) -> NonTensor:
    """Describe a value by what made it, and by its attributes if it is a torch.nn.Module."""
    if value.name in _MADE_BY:
        return _MADE_BY[value.name]
    state = value.state
    if value.name == "torch._utils._rebuild_wrapper_subclass" and type(state) is tuple and type(state[0]) is Unread:
        return tensor_of_class(state[0].name)
    is_module = type(state) is dict and "_parameters" in state and "_modules" in state
    return NonTensor(printable(value.name), Kind.MODULE if is_module else Kind.OBJECT)


def tensor_of_class(name: str) -> NonTensor:
    """Describe a tensor of another class than torch.Tensor."""
    package, last = name.partition(".")[0], name.rpartition(".")[2]
    kind = Kind.TENSOR_SUBCLASS
    if package in _QUANTISING_PACKAGES:
        kind = Kind.QUANTISED
    elif package == "torch":
        kind = {"DTensor": Kind.DTENSOR, "ShardedTensor": Kind.SHARDED_TENSOR, "NestedTensor": Kind.NESTED}.get(
            last, kind
        )
    return NonTensor(printable(name), kind)


def non_tensor_error(found: Mapping[str, NonTensor], where: str) -> MappingError:
    """Return the error about ``found``, which a file holds instead of weights, and its most important kind."""
    names: dict[Kind, list[str]] = {}
    for name, each in found.items():
        names.setdefault(each.kind, []).append(name)
    order = list(Kind)
    kind = min(names, key=lambda kind: (not kind.is_tensor, -len(names[kind]) * kind.is_tensor, order.index(kind)))
    what, fix = kind.value
    subscripts = "".join(f"[{part!r}]" for part in names[kind][0].split("."))
    held = [f"{name} is a {found[name]}" for name in names[kind][:_MAX_NAMES]]
    more = [f"… and {len(names[kind]) - _MAX_NAMES:,} more"] * (len(names[kind]) > _MAX_NAMES)
    return MappingError(f"{where} {what}. {fix.replace('NAME', subscripts)} It holds:", held + more)
