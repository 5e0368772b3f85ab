"""What pickles of torch.save hold: read like torch.load reads it, or named with the way to save it as plain tensors."""

import argparse
import datetime
import enum
import fractions
import functools
import random
import re
import uuid
import warnings
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import Shard, distribute_tensor

import streamconv
from streamconv import MappingError, NotACheckpointError, SourceError
from streamconv.errors import UnsafePickleError
from streamconv.formats.non_tensors import Kind, NonTensor
from streamconv.tensors.evaluation import read_bytes
from streamconv.verification.originals.dinov2 import build as build_dinov2
from streamconv.verification.reference import flatten
from streamconv.verification.torch_loading import load
from tests import api
from tests.checkpoints import EVERY_KIND, OwnDict, State, described, make_states, saved
from tests.support import tiny

FORMATS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
PROTOCOLS = pytest.mark.parametrize("protocol", [2, 3, 4, 5])
SHAPES = [torch.ones(1), torch.ones(2)]
OLD = {name: value for name, value in EVERY_KIND.items() if name != "fp8"}  # which torch cannot load from there


def read(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    with streamconv.open_checkpoint(path) as checkpoint:
        return {name: (t.info.dtype, t.info.shape, read_bytes(t)) for name, t in checkpoint.items()}


def tensors_of(is_zip: bool) -> State:
    return {name: value.clone() for name, value in (EVERY_KIND if is_zip else OLD).items()}


def with_attributes(state: State) -> State:
    for value in state.values():
        value._has_been_cloned = True  # type: ignore[attr-defined]  # as FSDP does
    return state


def parameters(state: State) -> State:
    return {name: torch.nn.Parameter(value, requires_grad=False) for name, value in state.items()}


class OwnTensor(torch.Tensor):
    """A tensor of a class that torch does not know."""


TENSORS = {
    "with attributes": with_attributes,
    "buffers": lambda state: {name: torch.nn.Buffer(value) for name, value in state.items()},
    "parameters": parameters,
    "parameters with attributes": lambda state: with_attributes(parameters(state)),
    "views with attributes": lambda state: with_attributes(
        {name: value.T if value.ndim == 2 else value for name, value in state.items()}
    ),
}


@FORMATS
@pytest.mark.parametrize("what", TENSORS)
def test_tensors_with_state_are_read_like_torch_loads_them(tmp_path: Path, what: str, is_zip: bool) -> None:
    state = TENSORS[what](tensors_of(is_zip))
    path = tmp_path / "x.pth"
    torch.save(state, path, _use_new_zipfile_serialization=is_zip)
    loaded = torch.load(path, weights_only=True)
    assert read(path) == described(loaded)
    assert list(read(path)) == list(loaded)


def test_attribute_of_any_name_leaves_the_values_as_torch_loads_them(tmp_path: Path) -> None:
    """Setting some attributes of a tensor replaces its values; a file with one of these is refused."""
    equal, refused = 0, set()
    for attribute in dir(torch.Tensor):
        tensor = torch.tensor([1 + 2j, 3j])
        tensor.__dict__[attribute] = torch.zeros(2)
        try:
            torch.save({"x": tensor}, tmp_path / "x.pth")
            loaded = torch.load(tmp_path / "x.pth", weights_only=True)["x"]
        except Exception:  # a method that saving needs, or an attribute that cannot be set
            continue
        try:
            found = read(tmp_path / "x.pth")
        except SourceError:
            refused.add(attribute)
            continue
        assert found == described({"x": torch.Tensor.as_subclass(loaded, torch.Tensor)})
        equal += 1
    assert refused == {"data", "imag", "real"}
    assert equal > 400


@FORMATS
@PROTOCOLS
def test_every_pickle_protocol_is_read(tmp_path: Path, protocol: int, is_zip: bool) -> None:
    contents = {
        "model": with_attributes(tensors_of(is_zip)),
        "epoch": 3,
        "large": 1 << 5000,
        "set": {1, "a"},
        "frozen": frozenset([(1, 2)]),
        "bytes": bytes(300),
        "many bytes": bytes(70_000),
        "bytearray": bytearray(b"abc"),
        "array": np.arange(200_000.0),
        "name": "x" * 300,
        "text": "é" * 2_000_000,
        "args": argparse.Namespace(lr=1e-3),
        "last": {"x": torch.arange(3.0)},
    }
    path = tmp_path / "x.pth"
    torch.save(contents, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    with warnings.catch_warnings(action="ignore"):
        loaded = torch.load(path, weights_only=False)
    wanted = {f"model.{name}": value for name, value in loaded["model"].items()} | {"last.x": torch.arange(3.0)}
    assert read(path) == described(wanted)


@PROTOCOLS
def test_short_file_of_every_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    for is_zip in (True, False):
        torch.save(
            {"x": torch.ones(1)}, tmp_path / "x", pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip
        )
        assert read(tmp_path / "x") == described({"x": torch.ones(1)})


class OwnOrderedDict(OrderedDict):  # type: ignore[type-arg]
    """A dict subclass that pickles as OrderedDict does, with attributes."""


class OwnUserDict(UserDict):  # type: ignore[type-arg]
    """A mapping whose items are in its only attribute, like those of transformers."""


class ConfigDict(dict):  # type: ignore[type-arg]
    """A dict subclass whose items are an argument of its class, like mmengine's."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), (dict(self),), None, None, None


class AttributeDict(dict):  # type: ignore[type-arg]
    """A dict subclass whose items are attributes too, like easydict's."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self.__dict__[key] = value


def own_ordered_dict(state: State) -> Any:
    mapping = OwnOrderedDict(state)
    mapping._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    return mapping


def attribute_dict(state: State) -> Any:
    mapping = AttributeDict()
    for name, value in state.items():
        mapping[name] = value
    return mapping


MAPPINGS = {
    "of its own class": OwnDict,
    "an OrderedDict of its own class": own_ordered_dict,
    "a UserDict": OwnUserDict,
    "an argument of its class": ConfigDict,
    "with attributes": attribute_dict,
    "a defaultdict": lambda state: defaultdict(list, state),
    "a Counter": Counter,
}


class Outer:
    class Inner:
        """Protocol 2 names it by a call of getattr."""

        def __init__(self) -> None:
            self.x = torch.ones(1)


class OwnList(list):  # type: ignore[type-arg]
    pass


class Mode(enum.Enum):
    A = 1


@FORMATS
@PROTOCOLS
@pytest.mark.filterwarnings("ignore")
def test_torch_with_stand_ins_loads_the_tensors_that_are_read(tmp_path: Path, protocol: int, is_zip: bool) -> None:
    """Verification makes torch load the original's weights, whatever objects of other classes are beside them."""
    mappings = {kind: make({"x": torch.rand(2), "y": make({"z": torch.rand(1)})}) for kind, make in MAPPINGS.items()}
    states = {what: make(tensors_of(is_zip)) for what, make in TENSORS.items()}
    left_out = OTHERS if is_zip else OTHERS | QUANTIZED
    others = {kind: make() for kind, (make, _, _) in MADE_BY.items() if kind not in left_out}
    settings = {
        "list": OwnList([1, 2]), "enum": Mode.A, "set": {Mode.A, 2}, "frozen set": frozenset([Path("a")]),
        "object": Outer.Inner(), "deque": deque([1]), "array": np.arange(5.0), "object array": np.array(["a", None]),
        "partial": functools.partial(torch.nn.LayerNorm, eps=1e-6), "optimizer": torch.optim.AdamW([torch.ones(2)]),
        "keys": {Mode.A: 1, (1, 2): 3, 4: torch.ones(1)}, "complex": 1 + 2j, "slice": slice(1, 2), "ellipsis": ...,
        "dtype": torch.bfloat16, "device": torch.device("cuda:1"), "size": torch.Size([1]), "large": 1 << 900,
        "random": random.getstate(), "generator": np.random.default_rng(0), "bytes": b"\0\xff", "more": bytearray(b"x"),
        "uuid": uuid.UUID(int=5), "fraction": fractions.Fraction(1, 3), "when": datetime.datetime(2026, 1, 2),
    }  # fmt: skip
    path = tmp_path / "x.pth"
    contents = {"mappings": mappings, "states": states, "others": others, "settings": settings}
    torch.save(contents, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    loaded = dict(flatten(load(path, is_legacy=not is_zip)))
    assert read(path) == described({name: value.detach() for name, value in loaded.items()})
    names = {f"mappings.{kind}.{name}" for kind in mappings for name in ("x", "y.z")}
    names |= {f"states.{what}.{name}" for what, state in states.items() for name in state}
    assert {*loaded} == names | {"settings.keys.4"}


@FORMATS
@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("kind", MAPPINGS)
def test_mapping_of_any_class_is_read_as_a_dict(tmp_path: Path, kind: str, protocol: int, is_zip: bool) -> None:
    """Two objects of one class stay apart, and their class is neither imported nor called."""
    make, state = MAPPINGS[kind], tensors_of(is_zip)
    first, second = dict(list(state.items())[:3]), dict(list(state.items())[2:])
    path = tmp_path / "x.pth"
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": is_zip}
    torch.save(make({"a": make(first), "b": make(second), "lr": 0.1}), path, **options)
    wanted = {f"a.{name}": value for name, value in first.items()} | {f"b.{name}": v for name, v in second.items()}
    assert read(path) == described(wanted)
    assert list(read(path)) == list(wanted)
    with streamconv.open_checkpoint(path) as checkpoint:
        assert checkpoint.non_tensors == {"lr": NonTensor("Python float", Kind.VALUE)}


@FORMATS
def test_tensors_under_keys_of_any_type_are_named(tmp_path: Path, is_zip: bool) -> None:
    keys = [7, -1, True, None, 0.5, float("inf"), (1, "a"), (2, "b"), 1 << 70]
    state = {"x": {key: torch.full((2,), float(i)) for i, key in enumerate(keys)}}
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
    loaded = dict(flatten(torch.load(tmp_path / "x.pth", weights_only=False)))
    found = read(tmp_path / "x.pth")
    assert list(found) == [*list(loaded)[:6], "x.<tuple 1>", "x.<tuple 2>", "x.<int 3>"]
    assert list(found.values()) == list(described(loaded).values())


@FORMATS
def test_tensors_under_other_keys_than_strings_are_reported(tmp_path: Path, is_zip: bool) -> None:
    state, _ = make_states(tiny())
    others = {key: torch.zeros(3) for key in (None, True, 0.5, (1, "a"))}
    torch.save({"model": state, "more": others}, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(MappingError) as caught:
        api.plan(tmp_path / "x.pth")
    listed = "".join(caught.value.problems)
    assert all(f"more.{name} [3]" in listed for name in ("None", "True", "0.5", "<tuple 1>")), listed
    skipped = api.plan(tmp_path / "x.pth", select="model").skipped
    assert [(each.start, each.tensors) for each in skipped] == [("more.", 4)]


def test_dict_that_is_in_several_others_is_read_under_each_name(tmp_path: Path) -> None:
    shared = {"w": torch.ones(2), "deep": {"b": torch.zeros(3)}}
    path = saved({"a": shared, "b": {"c": shared}, "d": [shared], "e": shared}, tmp_path / "x.pth")
    assert read(path) == described(dict(flatten(torch.load(path, weights_only=True))))
    assert len(read(path)) == 6


def test_attributes_of_an_object_are_not_read_as_tensors(tmp_path: Path) -> None:
    """An average of the weights, or a whole model, beside a state dict does not change what is converted."""
    state, _ = make_states(tiny())
    beside = {"ema": argparse.Namespace(shadow=state), "net": torch.nn.Linear(2, 2), "means": argparse.Namespace(a=1)}
    path = saved({"model": state, **beside}, tmp_path / "x.pth")
    with streamconv.open_checkpoint(path) as checkpoint:
        kinds = {name: each.kind for name, each in checkpoint.non_tensors.items()}
    assert kinds == {"ema": Kind.ATTRIBUTES, "net": Kind.MODULE, "means": Kind.OBJECT}
    assert api.plan(path).skipped == ()


MADE_BY: dict[str, tuple[Callable[[], Any], str, str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "a sparse tensor", "to_dense"),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), "a sparse tensor", "to_dense"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8), "a quantised tensor", "dequantize"
    ),
    "channels": (
        lambda: torch.quantize_per_channel(torch.eye(3), torch.ones(3), torch.zeros(3), 0, torch.quint8),
        "a quantised tensor", "dequantize",
    ),
    "meta": (lambda: torch.empty(3, device="meta"), "a meta tensor", "no values"),
    "nested": (lambda: torch.nested.nested_tensor(SHAPES), "a nested tensor", "unbind"),
    "jagged": (
        lambda: torch.nested.nested_tensor(SHAPES, layout=torch.jagged), r"a torch.*NestedTensor", "unbind"
    ),
    "complex": (
        lambda: torch.ones(2, dtype=torch.complex128), r"a tensor in a torch\.ComplexDoubleStorage", "of a dtype that"
    ),
    "lazy": (
        lambda: torch.ones(2, dtype=torch.complex64).conj(), "a lazily conjugated or negated tensor", "resolve_conj"
    ),
    "new dtype": (lambda: torch.ones(2).to(torch.float8_e4m3fnuz), r"a tensor of torch\.float8_e4m3fnuz", "of a dtype"),
    "own class": (lambda: torch.ones(2).as_subclass(OwnTensor), r"a tests.*OwnTensor", "as_subclass"),
    "parameter": (
        lambda: torch.nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False), "a sparse tensor", "to_dense"
    ),
    "module": (lambda: torch.nn.Linear(2, 2), r"a torch.*\.Linear", r"\['kind'\]\['0'\]\.state_dict"),
    "attributes": (
        lambda: argparse.Namespace(x=torch.ones(1)), r"a argparse\.Namespace", r"vars\(.*\['kind'\]\['0'\]"
    ),
    "list": (lambda: [{"x": torch.ones(1)}], "a list", r"torch\.load\('old\.pth'\)\['kind'\]\['0'\]\[0\]"),
    "pairs": (lambda: [("x", torch.ones(1))], "a list", r"dict\(torch\.load\('old\.pth'\)\['kind'\]\['0'\]\)"),
    "tuple": (lambda: (torch.ones(1),), "a tuple", "which streamconv does not search"),
    "object": (lambda: argparse.Namespace(lr=1), r"a argparse\.Namespace", "Save a dict of tensors"),
}  # fmt: skip


QUANTIZED = {"quantized", "channels"}  # streamconv refuses an older file with these, and torch cannot load it
OTHERS = {"complex", "lazy", "new dtype"}  # torch loads these, and streamconv does not


@pytest.mark.parametrize("kind", MADE_BY)
@pytest.mark.filterwarnings("ignore")
def test_values_instead_of_tensors_are_named_once(tmp_path: Path, kind: str) -> None:
    make, name, advice = MADE_BY[kind]
    contents: dict[str, Any] = {"kind": {str(i): make() for i in range(5)}}
    if kind != "object":  # which is only named in a file without a tensor: any checkpoint holds objects
        contents["step"] = torch.tensor(1)
    with pytest.raises(MappingError, match=advice) as caught:
        api.plan(saved(contents, tmp_path / "x.pth"))
    *named, more = caught.value.problems
    assert len(named) == 3
    for i, problem in enumerate(named):
        assert re.fullmatch(rf"kind\.{i} is {name}", problem)
    assert more == "… and 2 more"


NOT_DICTS: dict[str, tuple[Callable[[], Any], type[SourceError], str]] = {
    "a model": (
        lambda: torch.nn.Linear(2, 2), UnsafePickleError, r"a whole model, a torch.*Linear.*\.state_dict\(\), 'new"
    ),
    "a pair": (
        lambda: (3, {"x": torch.ones(1)}), NotACheckpointError, r"a tuple with tensors.*load\('old\.pth'\)\[1\]"
    ),
    "a list": (lambda: [{"x": torch.ones(1)}], NotACheckpointError, r"a list with tensors.*load\('old\.pth'\)\[0\]"),
    "items": (lambda: [("x", torch.ones(1))], NotACheckpointError, r"a list with tensors.*dict\(torch\.load\('old"),
    "a list of numbers": (lambda: [1], NotACheckpointError, "holds a list, not a dict of tensors"),
    "a sparse tensor": (lambda: torch.eye(2).to_sparse(), NotACheckpointError, "holds a sparse tensor, not a dict"),
    "a tensor": (lambda: torch.eye(2), NotACheckpointError, "holds a tensor, not a dict of tensors"),
    "an object": (
        lambda: argparse.Namespace(x=torch.ones(1)), UnsafePickleError, r"a argparse\.Namespace, which is not a dict"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_DICTS)
def test_file_without_a_dict_says_what_it_holds(tmp_path: Path, what: str) -> None:
    make, error, message = NOT_DICTS[what]
    with pytest.raises(error, match=message):
        streamconv.open_checkpoint(saved(make(), tmp_path / "x.pth"))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_weights_in_a_plain_state_dict_are_named_once(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    weights = {name: value for name, value in state.items() if value.ndim == 2 and name.startswith("blocks")}
    for name, value in weights.items():
        state[name] = torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)
    with pytest.raises(MappingError, match=r"holds quantised tensors.*that was quantised") as caught:
        api.plan(saved(state, tmp_path / "x.pth"))
    assert caught.value.problems[-1] == f"… and {len(weights) - 3} more"


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")
def test_state_dict_of_fsdp_is_read_like_torch_loads_it(tmp_path: Path) -> None:
    """FSDP sets an attribute on each tensor of a FULL_STATE_DICT, so DINOv2's teacher_checkpoint.pth has them."""
    state, _ = make_states(tiny())
    original = build_dinov2(tiny())
    original.load_state_dict(state)
    teacher = torch.nn.ModuleDict({"backbone": FSDP(original, device_id=torch.device("cpu"), use_orig_params=True)})
    path = saved({"teacher": teacher.state_dict()}, tmp_path / "teacher_checkpoint.pth")
    assert b"_rebuild_from_type_v2" in path.read_bytes()
    loaded = torch.load(path, weights_only=True)["teacher"]
    assert read(path) == described({f"teacher.{name}": value for name, value in loaded.items()})
    assert api.plan(path).skipped == ()


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")
def test_parts_of_a_sharded_model_are_named_once(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    mesh = init_device_mesh("cpu", (1,))
    parts = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in state.items()}
    with pytest.raises(MappingError, match=r"holds DTensors, as FSDP2.*full_state_dict=True") as caught:
        api.plan(saved({"model": parts, "epoch": 3}, tmp_path / "x.pth"))
    assert len(caught.value.problems) == 4
    sharded = sharded_tensor.ones(ChunkShardingSpec(0, ["rank:0/cpu"]), 4, 4)
    with pytest.raises(MappingError, match=r"holds ShardedTensors, as FSDP.*StateDictType\.FULL_STATE_DICT") as caught:
        api.plan(saved({"model": {"a": sharded, "b": sharded}}, tmp_path / "y.pth"))
    assert len(caught.value.problems) == 2
    beside = saved({"model": state, "optimizer": {"state": {0: {"exp_avg": parts["norm.bias"]}}}}, tmp_path / "z.pth")
    assert api.plan(beside).skipped == ()
