"""Malicious files: each is refused with one clear message, within a second and 100 MB of memory.

The files are written by hand, small or sparse. Each one is converted by the command line in a forked process, which
measures itself; nothing may be written.
"""

import json
import os
import pickle
import pickletools
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

import streamconv
from streamconv.tensors.evaluation import read_bytes
from tests.checkpoints import bytes_of
from tests.hostile import Refusal
from tests.support import rewrite

# Pickles

NEW_DICT = b"ccollections\nOrderedDict\n)R"
TENSOR, TENSOR_V3 = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_tensor_v3\n"


def put(value: object) -> bytes:
    """Return the opcodes that push a plain value."""
    if isinstance(value, str):  # the common cases without pickletools, which is slow
        data = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(data)) + data
    if isinstance(value, int):
        return pickle.dumps(value, protocol=2)[2:-1]
    return pickletools.optimize(pickle.dumps(value, protocol=2))[2:-1]


def storage(numel: object = 2, kind: bytes = b"ctorch\nFloatStorage\n", key: object = "0") -> bytes:
    return b"(" + put("storage") + kind + put(key) + put("cpu") + put(numel) + b"tQ"


def tensor(
    offset: object = 0, shape: object = (2,), strides: object = (1,), store: bytes = storage(), more: bytes = b""
) -> bytes:
    return TENSOR + b"(" + store + put(offset) + put(shape) + put(strides) + b"\x89" + NEW_DICT + more + b"tR"


def state(*values: bytes) -> bytes:
    """Return the pickle of a state dict with ``values``, which are opcodes."""
    return b"\x80\x02}(" + b"".join(put(f"x{i}") + value for i, value in enumerate(values)) + b"u."


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    torch.save({"x": torch.arange(2.0)}, tmp_path / "x.pth")
    return tmp_path / "x.pth"


def test_handmade_pickle_without_a_fault_is_read(pth: Path) -> None:
    rewrite(pth, {"data.pkl": state(tensor())})
    with streamconv.open_checkpoint(pth) as checkpoint:
        assert read_bytes(checkpoint["x0"]) == bytes_of(torch.arange(2.0))
    assert torch.equal(torch.load(pth, weights_only=True)["x0"], torch.arange(2.0))


FROM_TYPE, TENSOR_CLASS = b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch\nTensor\n"
PARAMETER = b"ctorch._utils\n_rebuild_parameter_with_state\n"


def tensor_arguments() -> bytes:
    return tensor().removeprefix(TENSOR).removesuffix(b"R")


def tensor_with_attributes(attributes: bytes) -> bytes:
    return FROM_TYPE + b"(" + TENSOR + TENSOR_CLASS + tensor_arguments() + attributes + b"tR"


def test_handmade_tensor_with_attributes_is_read(pth: Path) -> None:
    rewrite(pth, {"data.pkl": state(tensor_with_attributes(b"}" + put("tag") + tensor() + b"s"))})
    with streamconv.open_checkpoint(pth) as checkpoint:
        assert read_bytes(checkpoint["x0"]) == bytes_of(torch.arange(2.0))
    assert torch.equal(torch.load(pth, weights_only=True)["x0"], torch.arange(2.0))


DAG = b"]" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(100))  # a tuple of 2^100 leaves
SHARED = b"\x80\x02)q\x00" + DAG[1:]


def many_items(count: int) -> bytes:
    """Return the opcodes that set ``count`` items, 50,000 at a time."""
    items = [b"J" + struct.pack("<i", i) + b"\x89" for i in range(count)]
    return b"".join(b"(" + b"".join(items[at : at + 50_000]) + b"u" for at in range(0, count, 50_000))


PICKLES: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "a name that runs code": (b"\x80\x02cos\nsystem\n" + put(("touch executed",)) + b"R.", r"names os\.system"),
    "a name that controls a terminal": (b"\x80\x02cos\n\x1b[2Jx\n.", r"names os\.\\x1b\[2Jx"),
    "an endless name": (lambda: b"\x80\x02c" + b"a" * 5_000_000, "of more than 1,000 bytes"),
    "a name from the stack": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", r"names os\.system"),
    "a name from the stack, called": (
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0etouch executed\x85R.", r"names posix\.system"
    ),
    "a name from the stack that is a number": (b"\x80\x04\x8c\x02osK\x01\x93.", "by something that is not a string"),
    "a name from the stack that takes forever to show": (
        b"\x80\x04" + SHARED[2:] + b"\x8c\x02osh\x00\x93.", "by something that is not a string"
    ),
    "long names from the stack, over and over": (
        lambda: b"\x80\x04" + put("a" * 500_000) + b"\x94(" + b"h\x00h\x00\x93" * 400_000 + b"t.", "of more than 1,000"
    ),
    "names from the stack, over and over": (
        lambda: b"\x80\x04" + put("é" * 400) + b"\x94" + (b"(" + b"h\x00h\x00\x93" * 1_000 + b"t") * 400 + b".",
        "bytes of objects",
    ),
    "an extension": (b"\x80\x02\x82\x01.", "opcode 0x82"),
    "an instance": (b"\x80\x02(ios\nsystem\n.", "opcode 0x69"),
    "an object by NEWOBJ": (b"\x80\x02" + NEW_DICT[:-2] + b")\x81.", "an object of a function"),
    "a set": (b"\x80\x04\x8f.", "holds a builtins.set, which is not a dict"),
    "a set that takes forever to hash": (SHARED + b"0\x8f(h\x00\x90.", "opcode 0x30"),
    "items of a set that take forever to hash": (SHARED + b"\x8f(h\x00\x90h\x00\x91.", "takes more from its stack"),
    "items added to a dict": (b"\x80\x04}(K\x01\x90.", "adds items to a dict"),
    "millions of sets": (lambda: b"\x80\x04" + (b"(" + b"\x8f" * 1000 + b"t") * 2_500 + b".", "bytes of objects"),
    "millions of frames": (lambda: b"\x80\x04" + (b"\x95" + bytes(8)) * 1_300_000, "bytes of objects"),
    "a frame of 2^64 bytes": (b"\x80\x04\x95" + b"\xff" * 8, "ends too early"),
    "bytes of 2^64 bytes": (b"\x80\x05\x8e" + b"\xff" * 8 + b".", "ends too early"),
    "a bytearray of 2^63 bytes": (b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.", "ends too early"),
    "a number of four gigabytes": (b"\x80\x02\x8b\xff\xff\xff\xff.", "ends too early"),
    "buffers that are not in the file": (b"\x80\x05\x97\x98.", "its buffers are not in it"),
    "millions of values from the stack": (lambda: b"\x80\x04N" + b"\x94" * 12_000_000 + b".", "opcodes"),
    "a memo of four billion": (b"\x80\x02}r\xfe\xff\xff\xff.", "stores memo entry"),
    "a value that was never stored": (b"\x80\x02j\x00\x00\x00\x7f.", "ends too early, or takes more"),
    "an empty stack": (b"\x80\x02.", "takes more from its stack"),
    "no end": (b"\x80\x02}", "ends too early"),
    "a string of four gigabytes": (b"\x80\x02X\xff\xff\xff\xff.", "ends too early"),
    "a string that is not UTF-8": (b"\x80\x02X\x02\x00\x00\x00\xff\xff.", "not UTF-8"),
    "a persistent id that takes forever to show": (SHARED + b"h\x00Q.", "does not describe a storage"),
    "arguments that take forever to show": (SHARED + TENSOR + b"h\x00R.", "damaged"),
    "a dtype that takes forever to hash": (
        SHARED + TENSOR_V3 + b"(" + storage() + b"K\x00K\x02\x85K\x01\x85\x89Nh\x00tR.", "without a storage or a dtype"
    ),
    "a shape that takes forever to show": (
        SHARED + TENSOR + b"(" + storage() + b"K\x00h\x00h\x00\x89NtR.", "impossible offset"
    ),
    "a key that takes forever to hash": (SHARED + b"]}h\x00Nsa.", "holds a list"),
    "keys whose hashes collide": (
        lambda: b"\x80\x02]}(" + b"".join(put(i * (2**61 - 1)) + b"N" for i in range(1, 100_000)) + b"ua.", "a list"
    ),
    "a list of itself": (b"\x80\x02]q\x00h\x00a.", "holds a list"),
    "a dict of itself": (b"\x80\x02}q\x00X\x01\x00\x00\x00xh\x00s.", "dicts that are nested too deeply"),
    "a dict in more and more dicts": (
        b"\x80\x02}q\x00" + b"".join(b"}(" + put("a") + b"h%c" % i + put("b") + b"h%c" % i + b"uq%c" % (i + 1)
        for i in range(99)) + b".", "too many entries",
    ),
    "many dicts below a name of a megabyte": (
        lambda: b"\x80\x02}" + put("a" * 1_000_000) + b"}(" + b"".join(
            put(f"{i}") + b"}K\x00Ns" for i in range(60_000)) + b"us.", "too deeply",
    ),
    "one name of a megabyte in many dicts": (
        lambda: b"\x80\x02}(" + put("a" * 1_000_000) + b"q\x00cmine\nThing\nq\x01" + b"".join(
            put(f"{i}") + b"}h\x00h\x01s" for i in range(60_000)) + put("") + tensor() + b"u.",
        "names of more than",
    ),
    "an object of a name that runs code": (b"\x80\x02cposix\nsystem\n)\x81.", "posix.system, which no checkpoint"),
    "an object instead of a dict": (b"\x80\x02cmine\nModel\n)\x81}b.", "holds a mine.Model, which is not a dict"),

    "millions of dicts": (lambda: b"\x80\x02(" + b"}" * 12_000_000 + b"l.", "bytes of objects"),
    "millions of lists": (lambda: b"\x80\x02](" + b"]" * 12_000_000 + b"e.", "bytes of objects"),
    "millions of dicts of one item": (lambda: b"\x80\x02Nq\x00" + b"}K\x00Ns" * 2_400_000 + b".", "bytes of objects"),
    "millions of lists of one item": (lambda: b"\x80\x02" + b"]Na" * 2_900_000 + b".", "bytes of objects"),
    "one dict of millions": (lambda: b"\x80\x02}" + many_items(1_250_000) + b".", "bytes of objects"),
    "one list of millions": (lambda: b"\x80\x02](" + b"N" * 2_900_000 + b"e" + b"N" * 200_000, "opcodes|bytes of obj"),
    "one tuple over and over": (lambda: b"\x80\x02(" + b"N" * 1_000_000 + b"t" + b"(h\x00t" * 500_000, "at once"),
    "a tuple within a tuple, millions deep": (lambda: b"\x80\x02)" + b"\x85" * 12_000_000 + b".", "bytes of objects"),
    "a list within a list, millions deep": (lambda: b"\x80\x02" + b"](" * 6_000_000, "nested deeper"),
    "millions of marks": (lambda: b"\x80\x02" + b"(" * 12_000_000, "nested deeper"),
    "millions of stored values": (lambda: b"\x80\x02N" + b"".join(
        b"r" + struct.pack("<I", i) for i in range(2_400_000)) + b".", "holds a NoneType"),
    "millions of large numbers": (lambda: b"\x80\x02" + b"M\x00\x02" * 4_000_000, "bytes of objects"),
    "millions of fractions": (lambda: b"\x80\x02" + (b"G" + b"\x40" * 8) * 1_300_000, "too early|bytes of objects"),
    "millions of short strings": (lambda: b"\x80\x02" + b"X\x02\x00\x00\x00ab" * 1_700_000, "bytes of objects"),
    "a long string of wide characters": (
        lambda: b"\x80\x02X" + struct.pack("<I", 12_000_004) + b"a" * 12_000_000 + "🙂".encode(), "ends too early"
    ),
    "millions of states": (lambda: b"\x80\x02}q\x00" + b"h\x00b" * 1_400_000 + b".", "bytes of objects"),
    "too many tensors": (
        lambda: b"\x80\x02(" + storage() + b"K\x00K\x02\x85K\x01\x85\x89Ntq\x00" + TENSOR + b"q\x01"
        + b"h\x01h\x00R" * 70_000 + b".", "more than 65,536 tensors",
    ),
    "one tensor under too many names": (
        lambda: b"\x80\x02" + tensor() + b"q\x00}(" + b"".join(put(f"{i}") + b"h\x00" for i in range(70_000)) + b"u.",
        "more than 65,536 tensors",
    ),
    "millions of booleans": (lambda: b"\x80\x02" + b"\x88" * 12_000_000 + b".", "200,000 at once"),
    "millions of opcodes": (lambda: b"\x80\x02N" + b"q\x00" * 6_000_000 + b".", "more than 2,600,000 opcodes"),
    "a pickle of 13 MB": (lambda: b"\x80\x02" + b"N" * 13_000_000 + b".", "streamconv reads up to"),
    "a negative offset": (state(tensor(offset=-1)), "impossible offset"),
    "a negative size": (state(tensor(shape=(-1,))), "impossible offset, shape"),
    "a negative stride": (state(tensor(strides=(-1,))), "impossible offset"),
    "a boolean offset": (state(tensor(offset=True)), "impossible offset"),
    "a boolean size": (state(tensor(shape=(True,))), "impossible offset, shape"),
    "a fractional size": (state(tensor(shape=(2.0,))), "impossible offset, shape"),
    "a huge offset": (state(tensor(offset=1 << 62)), "beyond its storage"),
    "an offset beyond 64 bits": (state(tensor(offset=1 << 70)), "impossible offset"),
    "a size whose bytes wrap around 64 bits": (state(tensor(shape=(1 << 62, 4), strides=(0, 0))), "impossible offset"),
    "an empty tensor of absurd sizes": (state(tensor(shape=(0, 1 << 62, 4), strides=(1, 1, 1))), "impossible offset"),
    "a stride that wraps around 64 bits": (state(tensor(shape=(2,), strides=(1 << 62,))), "beyond its storage"),
    "sizes without strides": (state(tensor(shape=(2, 1))), "shape and strides do not fit"),
    "a hundred dimensions": (state(tensor(shape=(1,) * 100, strides=(1,) * 100)), "impossible offset, shape"),
    "a list for a shape": (state(tensor(shape=[2])), "shape and strides do not fit"),
    "a negative storage size": (state(tensor(store=storage(-2))), "a storage without"),
    "a boolean storage size": (state(tensor(store=storage(True))), "a storage without"),
    "a huge storage size": (state(tensor(store=storage(1 << 61))), "8 bytes, but its index gives it"),
    "a storage size beyond 64 bits": (state(tensor(store=storage(1 << 80))), "a storage without"),
    "a storage without a type": (state(tensor(store=storage(kind=b"N"))), "a storage without"),
    "a storage whose type is a dtype": (state(tensor(store=storage(kind=b"ctorch\nuint16\n"))), "a storage without"),
    "a storage outside the zip": (state(tensor(store=storage(key="../../x"))), r"no record data/\.\./\.\./x"),
    "a key that controls a terminal": (state(tensor(store=storage(key="\x1b[2J"))), r"no record data/\\x1b\[2J"),
    "a storage whose key is a number": (state(tensor(store=storage(key=0))), "a storage without"),
    "a storage that is a tuple": (state(tensor(store=put(("F32", "x")))), "tensor without a storage"),
    "one storage as two types": (
        state(tensor(), tensor(store=storage(kind=b"ctorch\nIntStorage\n"))), "and as another dtype"
    ),
    "a tensor altered after its check": (state(tensor() + put({"offset": 8}) + b"b"), "sets attributes of a Read"),
    "a tensor whose bytes are not its values": (state(tensor(more=put({"conj": True}))), "resolve_conj"),
    "a tensor whose values are an attribute": (
        state(tensor_with_attributes(b"}" + put("data") + tensor() + b"s")), "replaced by an attr"
    ),
    "a parameter whose values are an attribute": (
        state(PARAMETER + b"(" + tensor() + b"\x89N}" + put("real") + tensor() + b"stR"), "replaced by an attribute"
    ),
    "a tensor whose values are an attribute in a slot": (
        state(tensor_with_attributes(b"N}" + put("imag") + tensor() + b"s\x86")), "replaced by an attribute"
    ),
    "a tensor with attributes within itself": (
        state(FROM_TYPE + b"(" + FROM_TYPE + TENSOR_CLASS + b")NtR"), "not made by one of torch's functions"
    ),
    "a tensor of a class that is a function": (state(FROM_TYPE + b"(" + TENSOR + TENSOR + b")NtR"), "without a class"),
    "a tensor made by a tensor": (state(FROM_TYPE + b"(" + tensor() + TENSOR_CLASS + b")NtR"), "not made by one of"),
    "a tensor made of nothing": (state(FROM_TYPE + b"(" + TENSOR + TENSOR_CLASS + b"NNtR"), "without a class or"),
    "a tensor of too few values": (state(FROM_TYPE + b"(" + TENSOR + TENSOR_CLASS + b")NtR"), "missing 6 required"),
    "a tensor of another dtype than its values": (
        state(b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n(" + tensor() + b"ctorch\nfloat16\nN\x89tR"),
        "of another dtype",
    ),
    "attributes by the thousand, over and over": (
        lambda: b"\x80\x02" + tensor_arguments() + b"q\x00}" + many_items(90_000) + b"q\x01" + FROM_TYPE + b"q\x02"
        + TENSOR + b"q\x03" + TENSOR_CLASS + b"q\x04(" + b"h\x02(h\x03h\x04h\x00h\x01tR" * 70_000, "more than 65,536"
    ),
    "arguments by the thousand, over and over": (
        lambda: b"\x80\x02cmine\nThing\nq\x00(" + b"N" * 100_000 + b"tq\x01Nq\x02(" + b"h\x00h\x01R" * 300_000 + b"t.",
        "at once",
    ),
    "one storage's id, over and over": (
        lambda: b"\x80\x02" + storage()[:-1] + b"q\x00Nq\x01" + (b"(" + b"h\x00Q" * 1_000 + b"t") * 1_200 + b".",
        "bytes of objects",
    ),
    "one object as a dict of millions": (lambda: b"\x80\x02cmine\nDict\n)\x81" + many_items(1_250_000), "bytes of obj"),
    "millions of objects of one item": (
        lambda: b"\x80\x02cmine\nDict\nq\x00" + (b"(" + b"h\x00)\x81K\x00Ns" * 1_000 + b"t") * 800 + b".",
        "bytes of objects",
    ),
    "an object that is a dict of itself": (
        b"\x80\x02cmine\nDict\n)\x81q\x00" + put("x") + b"h\x00s.", "dicts that are nested too deeply"
    ),
    "an object made of itself": (
        b"\x80\x02}(" + put("x") + b"cmine\nThing\n)\x81q\x00h\x00b" + put("") + tensor() + b"u.", "a tensor named ''"
    ),
    "a list that takes forever to search": (
        b"\x80\x02}(" + put("x") + b"]()q\x00" + DAG[1:] + b"e" + put("") + tensor() + b"u.", "a tensor named ''"
    ),
    "a call of something that is not a function": (b"\x80\x02NNR.", "calls a NoneType"),
    "a million names": (lambda: b"\x80\x02" + b"ctorch\nuint16\n" * 890_000 + b".", "describes more than|more values"),
    "a million names in tuples": (
        lambda: b"\x80\x02" + (b"(" + b"ctorch\nuint16\n" * 1000 + b"t") * 850 + b".", "describes more than"
    ),
    "half a million classes": (
        lambda: b"\x80\x02" + b"ctorch\nFloatStorage\n" * 550_000 + b".", "describes more than|more values"
    ),
    "a call of a dtype": (b"\x80\x02ctorch\nuint16\n)R.", "calls a _TorchGlobal"),
    "items of a tensor": (state(tensor() + b"K\x00Ns"), "sets items of a Read"),
    "items without a value": (b"\x80\x02}(K\x00u.", "key without a value"),
    "an append to a dict": (b"\x80\x02}Na.", "appends to a dict"),
    "not a dict": (b"\x80\x02" + tensor() + b".", "holds a tensor, not a dict"),
    "an empty name": (b"\x80\x02}" + put("") + tensor() + b"s.", "a tensor named ''"),
    "a name of two lines": (b"\x80\x02}" + put("a\nb") + tensor() + b"s.", r"a tensor named 'a\\nb'"),
    "a name that is not text": (b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80" + tensor() + b"s.", r"'\\ud800'"),
    "a name that hides itself": (b"\x80\x02}" + put("weight\u202e") + tensor() + b"s.", r"\\u202e"),
    "an endless tensor name": (b"\x80\x02}" + put("x" * 2000) + tensor() + b"s.", "longer than"),
    "a duplicate name": (
        b"\x80\x02}(" + put("a.b") + tensor() + put("a") + b"}" + put("b") + tensor() + b"su.",
        "two tensors named 'a.b'",
    ),
}  # fmt: skip


def named(count: int, name: str, value: bytes) -> bytes:
    """Return the opcodes of a dict that has ``value`` under ``count`` names, which begin with ``name``."""
    items = [put(f"{name}{i}") + value for i in range(count)]
    return b"}" + b"".join(b"(" + b"".join(items[at : at + 50_000]) + b"u" for at in range(0, count, 50_000))


REPEATED: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "long names of one dict in many others": (
        lambda: b"\x80\x02" + tensor() + b"q\x00" + named(250, "w" * 400, b"h\x00") + b"q\x01"
        + named(250, "d", b"h\x01") + b".", "names of more than",
    ),
    "a long name before many others": (
        lambda: b"\x80\x02" + tensor() + b"q\x00}" + put("x" * 990) + named(65_000, "", b"h\x00") + b"s.",
        "names of more than",
    ),
    "the tensors of one dict in thousands of others": (
        lambda: b"\x80\x02" + tensor() + b"q\x00" + named(15, "w", b"h\x00") + b"q\x01"
        + named(17_000, "d", b"h\x01") + b".", "more than 65,536 tensors",
    ),
    "hundreds of thousands of numbers for names": (
        lambda: b"\x80\x02}" + many_items(263_000) + b".", "too many entries"
    ),
    "one tensor under keys that are tuples": (
        lambda: b"\x80\x02)q\x00" + tensor() + b"q\x01}(" + b"h\x00h\x01" * 66_000 + b"u.", "more than 65,536 tensors"
    ),
    "one tensor under keys that take forever to hash": (
        SHARED + tensor() + b"q\x01" + DAG[1:] + b"}h\x00h\x01s.", "holds <tuple 1>"
    ),
    "objects of long names, and a few tensors": (
        lambda: b"\x80\x02cmine\n" + b"T" * 900 + b"\n)\x81q\x00" + tensor() + b"q\x01}(" + put("x" * 800)
        + named(9_999, "", b"h\x00") + put("y") + named(1_000, "y" * 500, b"h\x01") + b"u.", "not a checkpoint of a m",
    ),
    "quantised tensors of long names": (
        lambda: b"\x80\x02ctorch._utils\n_rebuild_qtensor\n)Rq\x00}" + put("x" * 900) + named(9_999, ".", b"h\x00")
        + b"s.", "holds quantised tensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", ["plan", "convert"])
@pytest.mark.parametrize("attack", REPEATED)
def test_pickle_that_repeats_a_value_is_refused(pth: Path, attack: str, command: str, refusal: Refusal) -> None:
    data, message = REPEATED[attack]
    rewrite(pth, {"data.pkl": data() if callable(data) else data})
    text = refusal(pth, command=command)
    assert re.search(message, text), text
    assert "x.pth" in text


@pytest.mark.parametrize("attack", PICKLES)
def test_hostile_pickle_is_refused(pth: Path, attack: str, monkeypatch: pytest.MonkeyPatch, refusal: Refusal) -> None:
    monkeypatch.chdir(pth.parent)
    data, message = PICKLES[attack]
    rewrite(pth, {"data.pkl": data() if callable(data) else data})
    text = refusal(pth)
    assert re.search(message, text), text
    assert "x.pth" in text
    assert not Path("executed").exists()


# The format from before torch 1.6: pickles one after another, then each storage's count and bytes

SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
TWO = struct.pack("<q2f", 2, 0.0, 1.0)  # a storage


def legacy(
    contents: bytes, keys: object = ("0",), data: bytes = TWO, system: object = SYSTEM, more: bytes = b""
) -> bytes:
    """``contents`` is a pickle as of a zip, whose persistent ids do not say that they are no views.

    ``keys`` and ``system`` may be pickles, too.
    """
    start = b"".join(pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001))
    parts = [
        x if type(x) is bytes else pickle.dumps(x, protocol=2)
        for x in (system, list(keys) if type(keys) is tuple else keys)
    ]
    return start + parts[0] + re.sub(rb"(cpu.{1,15}?)tQ", rb"\1NtQ", contents, flags=re.DOTALL) + parts[1] + data + more


def test_handmade_legacy_file_without_a_fault_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(legacy(state(tensor())))
    with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
        assert read_bytes(checkpoint["x0"]) == bytes_of(torch.arange(2.0))
    assert torch.equal(torch.load(tmp_path / "x.pth", weights_only=True)["x0"], torch.arange(2.0))


IN_A_ROW = {  # messages that differ from those for the same pickle in a zip
    "no end": "holds a list",  # of keys
    "one storage's id, over and over": "does not describe a storage",
    "a frame of 2^64 bytes": "holds a list",
    "a long string of wide characters": "holds a list",
    "a pickle of 13 MB": "at once",
    "a huge storage size": "ends within its weights",
    "a storage outside the zip": "a key that is not a number",
    "a key that controls a terminal": "a key that is not a number",
}


@pytest.mark.parametrize("attack", PICKLES)
def test_hostile_pickle_in_a_legacy_file_is_refused(
    tmp_path: Path, attack: str, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    monkeypatch.chdir(tmp_path)
    data, message = PICKLES[attack]
    (tmp_path / "x.pth").write_bytes(legacy(data() if callable(data) else data))
    text = refusal(tmp_path / "x.pth")
    assert re.search(IN_A_ROW.get(attack, message), text), text
    assert "x.pth" in text
    assert not Path("executed").exists()


ONE, VIEW = state(tensor()), b"(" + put("storage") + b"ctorch\nFloatStorage\n" + put("0") + put("cpu") + put(2)
INTS = storage(kind=b"ctorch\nIntStorage\n")
LEGACY: dict[str, tuple[Callable[[], bytes], str]] = {
    "another byte order": (lambda: legacy(ONE, system=SYSTEM | {"little_endian": False}), "big-endian"),
    "no byte order": (lambda: legacy(ONE, system={}), "byte order"),
    "a byte order that is a number": (lambda: legacy(ONE, system=SYSTEM | {"little_endian": 1}), "byte order"),
    "a system that is a list": (lambda: legacy(ONE, system=[True]), "byte order"),
    "a system that runs code": (lambda: legacy(ONE, system=b"\x80\x02cos\nsystem\n."), "only strings and numbers"),
    "a system that is a storage": (lambda: legacy(ONE, system=b"\x80\x02K\x00Q."), "only strings and numbers"),
    "a system of millions of opcodes": (
        lambda: legacy(ONE, system=b"\x80\x02N" + b"q\x00" * 5_000_000 + b"."), "1,000 opcodes"
    ),
    "a system without end": (lambda: legacy(ONE, system=b"\x80\x02(" + b"]" * 12_000_000), "1,000 opcodes"),
    "strings without end": (
        lambda: legacy(b"\x80\x02](" + b"".join(put("a" * (1 << 20)) for _ in range(14)) + b"e."), "12,582,912"
    ),
    "a string beyond the end": (lambda: legacy(b"\x80\x02X" + struct.pack("<I", 1 << 20), b"", b""), "ends too early"),
    "a view": (lambda: legacy(state(tensor(store=VIEW + put(("1", 0, 1)) + b"tq\x00Q"))), "view of another"),
    "a view of nothing": (lambda: legacy(state(tensor(store=VIEW + b")tq\x00Q"))), "view of another"),
    "a zip's storage": (lambda: legacy(state(tensor(store=VIEW + b"tq\x00Q"))), "does not describe a storage"),
    "an untyped storage": (
        lambda: legacy(state(tensor(store=storage(kind=b"ctorch.storage\nUntypedStorage\n")))),
        "torch writes them but cannot load them",
    ),
    "a key that is empty": (lambda: legacy(state(tensor(store=storage(key=""))), ("",)), "not a number"),
    "a key of other digits": (lambda: legacy(state(tensor(store=storage(key="٣"))), ("٣",)), "not a number"),
    "an endless key": (lambda: legacy(state(tensor(store=storage(key="1" * 21))), ("1" * 21,)), "not a number"),
    "one storage of two sizes": (
        lambda: legacy(state(tensor(), tensor(shape=(1,), store=storage(1)))), "both 2 and 1 elements"
    ),
    "one storage of two types": (lambda: legacy(state(tensor(), tensor(store=INTS))), "as another dtype"),
    "too many storages": (
        lambda: legacy(b"\x80\x02]" + b"".join(storage(key=str(i)) + b"a" for i in range(66_000)) + b"."),
        "more than 65,536 storages|bytes of objects",
    ),
    "no keys": (lambda: legacy(ONE, ()), "list of storages"),
    "a duplicate key": (lambda: legacy(ONE, ("0", "0"), TWO * 2), "list of storages"),
    "a duplicate key instead of another": (
        lambda: legacy(state(tensor(), tensor(store=storage(key="1"))), ("0", "0"), TWO * 2), "list of storages"
    ),
    "a key without a tensor": (lambda: legacy(ONE, ("0", "1"), TWO * 2), "list of storages"),
    "another key": (lambda: legacy(ONE, ("1",)), "list of storages"),
    "a key that is a number": (lambda: legacy(ONE, (0,)), "list of storages"),
    "a key that is a list": (lambda: legacy(ONE, ([],)), "list of storages"),
    "keys that are letters": (lambda: legacy(ONE, "0"), "list of storages"),
    "keys that are a dict": (lambda: legacy(ONE, {"0": 0}), "list of storages"),
    "a key that takes forever to hash": (lambda: legacy(ONE, SHARED + b"]h\x00a."), "list of storages"),
    "keys that run code": (lambda: legacy(ONE, b"\x80\x02cos\nsystem\n."), "only strings and numbers"),
    "millions of keys": (lambda: legacy(ONE, b"\x80\x02N" + b"q\x00" * 500_000 + b"."), "196,608 opcodes"),
    "no keys at all": (lambda: legacy(ONE, b"", b""), "ends too early"),
    "a count too low": (lambda: legacy(ONE, data=struct.pack("<q2f", 1, 0, 1)), "begins with a count of 1 elements"),
    "a count too high": (lambda: legacy(ONE, data=struct.pack("<q2f", 3, 0, 1)), "begins with a count of 3 elements"),
    "a negative count": (lambda: legacy(ONE, data=struct.pack("<q2f", -1, 0, 1)), "begins with a count of 18,446"),
    "a count of bytes": (lambda: legacy(ONE, data=struct.pack("<q2f", 8, 0, 1)), "begins with a count of 8 elements"),
    "a count of an empty storage": (
        lambda: legacy(state(tensor(shape=(0,), store=storage(0))), data=struct.pack("<q", 1)),
        "begins with a count of 1 elements",
    ),
    "no count": (lambda: legacy(ONE, data=b""), "cut short"),
    "one byte missing": (lambda: legacy(ONE, data=TWO[:-1]), "cut short"),
    "one extra byte": (lambda: legacy(ONE, more=b"\0"), "1 bytes at its end"),
    "a second file after it": (lambda: legacy(ONE, more=legacy(ONE)), "bytes at its end"),
}  # fmt: skip


@pytest.mark.parametrize("attack", LEGACY)
def test_hostile_legacy_file_is_refused(tmp_path: Path, attack: str, refusal: Refusal) -> None:
    data, message = LEGACY[attack]
    (tmp_path / "x.pth").write_bytes(data())
    text = refusal(tmp_path / "x.pth")
    assert re.search(message, text), text
    assert "x.pth" in text


# Zips. The records are named as torch names them, and laid out by hand, so that anything can be wrong.


def local(name: bytes, data: bytes, size: int | None = None, method: int = 0, flags: int = 0) -> bytes:
    size = len(data) if size is None else size
    return (
        struct.pack("<4s5H3L2H", b"PK\3\4", 20, flags, method, 0, 0, zlib.crc32(data), size, size, len(name), 0)
        + name + data
    )  # fmt: skip


def entry(
    name: bytes, data: bytes, offset: int, size: int | None = None, stored: int | None = None, method: int = 0,
    flags: int = 0, extra: bytes = b"", disk: int = 0, attributes: int = 0,
) -> bytes:  # fmt: skip
    size = len(data) if size is None else size
    stored = size if stored is None else stored
    head = (
        b"PK\1\2",
        20,
        20,
        flags,
        method,
        0,
        0,
        zlib.crc32(data),
        stored,
        size,
        len(name),
        len(extra),
        0,
        disk,
        0,
        attributes,
    )
    return struct.pack("<4s6H3L5H2L", *head, offset) + name + extra


def end(entries: bytes, start: int, count: int, size: int | None = None, comment: bytes = b"") -> bytes:
    size = len(entries) if size is None else size
    return entries + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, start, len(comment)) + comment


def end64(entries: bytes, begin: int, n: int, **lies: int) -> bytes:
    n, where = lies.get("count", n), lies.get("where", begin + len(entries))
    return (
        entries
        + struct.pack(
            "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, n, n, lies.get("size", len(entries)), lies.get("start", begin)
        )
        + struct.pack("<4sLQL", b"PK\6\7", 0, where, 1)
        + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    )


NAMES = (b"x/data.pkl", b"x/data/0", b"x/byteorder", b"x/version")
DATA = (state(tensor()), struct.pack("<2f", 0.0, 1.0), b"little", b"3\n")
PARTS = [local(name, data) for name, data in zip(NAMES, DATA, strict=True)]
OFFSETS = [sum(map(len, PARTS[:i])) for i in range(len(PARTS))]
BODY = b"".join(PARTS)
ENTRIES = [entry(name, data, at) for name, data, at in zip(NAMES, DATA, OFFSETS, strict=True)]


def with_entry(**lies: object) -> bytes:
    """Return the zip, with some ``lies`` about data/0 in its directory."""
    entries = ENTRIES[0] + entry(NAMES[1], DATA[1], **({"offset": OFFSETS[1]} | lies)) + ENTRIES[2] + ENTRIES[3]  # type: ignore
    return BODY + end(entries, len(BODY), 4)


def with_local(part: bytes) -> bytes:
    """Return the zip, with data/0 replaced by ``part``, of the same length."""
    assert len(part) == len(PARTS[1])
    return PARTS[0] + part + PARTS[2] + PARTS[3] + end(ALL, len(BODY), 4)


def patched(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes([value]) + data[at:][1:]


def zip64_size(size: int) -> bytes:
    return struct.pack("<2H2Q", 1, 16, size, size)


BIG = 0xFFFFFFFF
ALL = b"".join(ENTRIES)
ZIPS: dict[str, tuple[Callable[[], bytes], str]] = {
    "data before the zip": (lambda: BODY[:30] + BODY + end(ALL, len(BODY), 4), "not at the offset"),
    "data after the zip": (lambda: BODY + end(ALL, len(BODY), 4) + b"more", "something was appended"),
    "a comment": (lambda: BODY + end(ALL, len(BODY), 4, comment=b"hello"), "something was appended"),
    "a comment that is another end": (
        lambda: BODY + end(ALL, len(BODY), 4, comment=end(b"", 0, 0)), "not at the offset"
    ),
    "bytes between the records and the end": (lambda: BODY + end(ALL + b"gap", len(BODY), 4, len(ALL)), "not at the"),
    "fewer entries than there are": (lambda: BODY + end(ALL, len(BODY), 3), "its entries"),
    "more entries than there are": (lambda: BODY + end(ALL, len(BODY), 5), "damaged zip directory"),
    "a directory before the file": (lambda: BODY + end(ALL, len(BODY), 4, size=len(ALL) + 1), "not at the offset"),
    "a directory of four gigabytes": (lambda: BODY + end(ALL, len(BODY), 4, size=BIG), "not at the offset"),
    "a directory of 2^64 bytes": (lambda: BODY + end64(ALL, len(BODY), 4, size=2**64 - 1), "not at the offset"),
    "a directory that starts at 2^64": (lambda: BODY + end64(ALL, len(BODY), 4, start=2**64 - 1), "not at the offset"),
    "2^64 entries": (lambda: BODY + end64(ALL, len(BODY), 4, count=2**64 - 1), "more than 65,536 tensors need"),
    "a 64-bit end that contradicts its locator": (
        lambda: BODY + end64(ALL, len(BODY), 4, where=7), "64-bit end is not valid"
    ),
    "a file on another disk": (lambda: with_entry(disk=1), "is not one of torch.save"),
    "a compressed record": (lambda: with_entry(method=8), "compressed or encrypted"),
    "an encrypted record": (lambda: with_entry(flags=1), "compressed or encrypted"),
    "a strongly encrypted record": (lambda: with_entry(flags=64), "compressed or encrypted"),
    "a record compressed by its own header alone": (lambda: with_local(local(NAMES[1], DATA[1], method=8)), "header"),
    "a record encrypted by its own header alone": (lambda: with_local(local(NAMES[1], DATA[1], flags=1)), "header"),
    "a record that torch takes for a folder": (lambda: with_entry(attributes=0x3A), "marked as a folder"),  # fuzzed
    "a record with a folder's name": (
        lambda: BODY + local(b"x/data/0/", b"") + end(
            ALL + entry(b"x/data/0/", b"", len(BODY)), len(BODY) + 39, 5), "marked as a folder"
    ),
    "a record of another name": (lambda: with_local(local(b"x/data/1", DATA[1])), "header of its record x/data/0"),
    "a record of another size": (lambda: with_local(local(NAMES[1], DATA[1], 4)), "header of its record x/data/0"),
    "a record of another stored size": (lambda: with_local(patched(PARTS[1], 18, 4)), "header of its record x/data/0"),
    "a record of another full size": (lambda: with_local(patched(PARTS[1], 22, 4)), "header of its record x/data/0"),
    "a header longer than the file": (lambda: with_local(patched(PARTS[1], 28, 255)), "header of its record x/data/0"),
    "fewer entries on this disk": (lambda: patched(BODY + end(ALL, len(BODY), 4), -14, 3), "not at the offset"),
    "a comment that is not there": (lambda: patched(BODY + end(ALL, len(BODY), 4), -2, 5), "something was appended"),
    "a record without a header": (lambda: with_local(b"PK\3\5" + PARTS[1][4:]), "header of its record x/data/0"),
    "a record that pretends to be compressed": (lambda: with_entry(stored=4), "has 4 bytes for 8"),
    "a record beyond the end of the file": (lambda: with_entry(offset=1 << 30), "extends beyond the zip's records"),
    "a record in the directory": (lambda: with_entry(offset=len(BODY)), "extends beyond the zip's records"),
    "a record that reaches into the directory": (lambda: with_entry(size=10_000), "extends beyond the zip's records"),
    "a record of 2^64 bytes": (
        lambda: with_entry(size=BIG, extra=zip64_size(2**64 - 1)), "extends beyond the zip's records"
    ),
    "a record at 2^64": (
        lambda: with_entry(offset=BIG, extra=struct.pack("<2HQ", 1, 8, 2**64 - 1)), "extends beyond the zip's records"
    ),
    "a 64-bit size that is missing": (lambda: with_entry(size=BIG), "64-bit size is missing"),
    "a 64-bit size cut short": (lambda: with_entry(size=BIG, extra=struct.pack("<2HL", 1, 4, 8)), "damaged zip"),
    "two records in one place": (lambda: with_entry(offset=0), "header of|overlaps"),
    "a record within another": (
        lambda: local(b"x/data.pkl", DATA[0]) + local(b"x/data/1", PARTS[1] + b"1234") + end(
            ENTRIES[0] + entry(b"x/data/1", PARTS[1] + b"1234", OFFSETS[1]) + entry(NAMES[1], DATA[1], OFFSETS[1] + 38),
            OFFSETS[1] + 38 + len(PARTS[1]) + 4, 3), "overlaps another one"
    ),
    "a duplicate record": (lambda: BODY + end(ALL + ENTRIES[1], len(BODY), 5), "two records of the same name"),
    "two records that differ in case": (
        lambda: BODY + local(b"x/DATA/0", DATA[1]) + end(
            ALL + entry(b"x/DATA/0", DATA[1], len(BODY)), len(BODY + PARTS[1]), 5), "two records of the same name"
    ),
    "a name with a NUL": (
        lambda: BODY + local(b"x/data/0\0y", b"") + end(
            ALL + entry(b"x/data/0\0y", b"", len(BODY)), len(BODY) + 40, 5), "is not one of torch.save"
    ),
    "a name that is not UTF-8": (
        lambda: BODY + local(b"x/\xff", b"") + end(ALL + entry(b"x/\xff", b"", len(BODY)), len(BODY) + 33, 5), "damaged"
    ),
    "an endless record name": (
        lambda: BODY + local(b"x" * 9999, b"") + end(
            ALL + entry(b"x" * 9999, b"", len(BODY)), len(BODY) + 30 + 9999, 5), "is not one of torch.save"
    ),
    "two pickles": (
        lambda: BODY + local(b"y/data.pkl", b"") + end(
            ALL + entry(b"y/data.pkl", b"", len(BODY)), len(BODY) + 40, 5), "2 data.pkl records"
    ),
    "a pickle elsewhere than where torch looks": (
        lambda: (zipped := BODY.replace(b"x/byteorder", b"y/byteorder"))
        + end(ENTRIES[2].replace(b"x/", b"y/") + ENTRIES[0] + ENTRIES[1], len(zipped), 3), "folder of its first record"
    ),
    "a big-endian file that hides it": (
        lambda: PARTS[0] + PARTS[1] + local(b"x/BYTEORDER", b"big") + end(
            ENTRIES[0] + ENTRIES[1] + entry(b"x/BYTEORDER", b"big", OFFSETS[2]), OFFSETS[3] - 3, 3), "big-endian"
    ),
    "a million records": (
        lambda: BODY + end64(entry(b"x/0", b"", 0) * 160_000, len(BODY), 160_000), "more than 65,536 tensors need"
    ),
    "a directory of 9 MB": (
        lambda: BODY + end64(entry(b"x/0", b"", 0, extra=bytes(60_000)) * 150, len(BODY), 150), "more than 65,536"
    ),
    "60,000 records in one place": (
        lambda: BODY + end64(
            ENTRIES[0] + b"".join(entry(b"x/%d" % i, b"", 0) for i in range(60_000)), len(BODY), 60_001), "header"
    ),
    "half a file": (lambda: BODY[: len(BODY) // 2], "cut short"),
    "a magic number": (lambda: b"PK\3\4", "cut short"),
    "a magic number and an end": (lambda: b"PK\3\4" + end(b"", 4, 0), "no data.pkl record"),
    "TorchScript": (lambda: BODY.replace(b"x/byteorder", b"x/code/aaaa") + end(
        ALL.replace(b"x/byteorder", b"x/code/aaaa"), len(BODY), 4), "TorchScript"),
}  # fmt: skip


def test_handmade_zip_without_a_fault_is_read(tmp_path: Path) -> None:
    for data in (BODY + end(ALL, len(BODY), 4), BODY + end64(ALL, len(BODY), 4), with_entry()):
        (tmp_path / "x.pth").write_bytes(data)
        with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
            assert read_bytes(checkpoint["x0"]) == DATA[1]
        assert torch.equal(torch.load(tmp_path / "x.pth", weights_only=True)["x0"], torch.arange(2.0))


@pytest.mark.parametrize("attack", ZIPS)
def test_hostile_zip_is_refused(tmp_path: Path, attack: str, refusal: Refusal) -> None:
    data, message = ZIPS[attack]
    (tmp_path / "x.pth").write_bytes(data())
    text = refusal(tmp_path / "x.pth")
    assert re.search(message, text), text
    assert "x.pth" in text


def test_absurd_sizes_backed_by_a_sparse_file_are_refused(tmp_path: Path, refusal: Refusal) -> None:
    """A header, directory or pickle has a size that fits into the file, but that no checkpoint needs."""
    with open(tmp_path / "x.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 99_000_000) + b"{")
        file.truncate(1 << 40)
    assert "a header of 99,000,000 bytes" in refusal(tmp_path / "x.safetensors")
    with open(tmp_path / "x.pth", "wb") as file:
        file.write(BODY)
        file.truncate(4_000_000_000)
        file.seek(4_000_000_000)
        file.write(end(b"", len(BODY), 9, size=4_000_000_000 - len(BODY)))
    assert "a zip directory of 9 records in 3,999," in refusal(tmp_path / "x.pth")
    with open(tmp_path / "y.pth", "wb") as file:
        file.write(local(b"x/data.pkl", b"", 3_000_000_000))
        file.truncate(3_000_000_040)
        file.seek(3_000_000_040)
        file.write(end(entry(b"x/data.pkl", b"", 0, 3_000_000_000), 3_000_000_040, 1))
    assert "data.pkl has 3,000,000,000 bytes" in refusal(tmp_path / "y.pth")
    (tmp_path / "model.safetensors.index.json").write_bytes(b"")
    os.truncate(tmp_path / "model.safetensors.index.json", 1 << 40)
    assert "1,099,511,627,776 bytes" in refusal(tmp_path)


# safetensors files


def header_of(**tensors: object) -> bytes:
    return json.dumps(tensors).encode()


def t(start: object, stop: object, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


DEEP = b'{"x":' + b"[" * 100_000
HEADERS: dict[str, tuple[bytes | Callable[[], bytes], int, str]] = {
    "a hole": (header_of(a=t(0, 8), b=t(16, 24)), 24, "b has bytes before it that belong to no tensor"),
    "a hole at the start": (header_of(a=t(8, 16)), 16, "a has bytes before it"),
    "an overlap": (header_of(a=t(0, 8), b=t(4, 12)), 12, "b overlaps another"),
    "one range for two tensors": (header_of(a=t(0, 8), b=t(0, 8)), 8, "b overlaps another"),
    "bytes at the end": (header_of(a=t(0, 8)), 11, "3 bytes at its end"),
    "bytes without a tensor": (b"{}", 5, "5 bytes at its end"),
    "an empty tensor inside another": (header_of(a=t(0, 8), b=t(4, 4, [0])), 8, "b overlaps another"),
    "a file cut short": (header_of(a=t(0, 8)), 7, "cut short"),
    "a negative start": (header_of(a=t(-8, 0)), 0, "does not fill the range"),
    "an end before the start": (header_of(a=t(8, 0)), 8, "does not fill the range"),
    "an end at 2^64": (header_of(a=t(2**64 - 8, 2**64)), 8, "does not fill the range"),
    "a fractional offset": (header_of(a=t(0.0, 8)), 8, "not an integer"),
    "a boolean offset": (header_of(a=t(False, 8)), 8, "does not fill the range"),
    "three offsets": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}}', 8, "does not fill the range"),
    "a negative size": (header_of(a=t(0, 8, [-2])), 8, "impossible shape"),
    "sizes that wrap around 64 bits": (header_of(a=t(0, 0, [1 << 62, 4])), 0, "impossible shape"),
    "an empty tensor of absurd sizes": (header_of(a=t(0, 0, [0, 1 << 62, 4])), 0, "impossible shape"),
    "ten thousand dimensions": (header_of(a=t(0, 8, [2] + [1] * 10_000)), 8, "impossible shape"),
    "an unknown dtype": (header_of(a=t(0, 8, dtype="F\x1b[2J")), 8, r"the dtype F\\x1b\[2J"),
    "a dtype that is a list": (header_of(a=t(0, 8, dtype=["F32"])), 8, "the dtype list"),
    "a tensor without a shape": (b'{"a":{"dtype":"F32","data_offsets":[0,8]}}', 8, "no dtype, shape"),
    "a tensor that is a number": (b'{"a":7}', 8, "no dtype, shape"),
    "a duplicate name": (b'{"a":' + json.dumps(t(0, 8)).encode() + b',"a":' + json.dumps(t(0, 8)).encode() + b"}", 8,
                     "'a' appears twice"),
    "two dtypes": (b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', 8, "'dtype' appears"),
    "metadata without end": (
        lambda: b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(500_000)) + b"}}", 0,
        "more than 65,536 tensors need",
    ),
    "metadata of numbers": (b'{"__metadata__":{"a":1}}', 0, "__metadata__"),
    "metadata that is a list": (b'{"__metadata__":["a"]}', 0, "__metadata__"),
    "an empty name": (header_of(**{"": t(0, 8)}), 8, "a tensor named ''"),
    "a name of two lines": (header_of(**{"a\nb": t(0, 8)}), 8, r"'a\\nb'"),
    "a name that is not text": (header_of(**{"a\ud800": t(0, 8)}), 8, r"a\\ud800"),
    "an endless name": (header_of(**{"a" * 1001: t(0, 8)}), 8, "longer than"),
    "bytes that are not text": (b'{"\xff":7}', 0, "damaged"),
    "not an object": (b'{"a"', 0, "damaged"),
    "not a number": (b'{"a":NaN}', 0, "not an integer"),
    "endless digits": (b'{"a":' + b"9" * 5_000_000 + b"}", 0, "damaged"),
    "a deep list": (DEEP, 0, "damaged|more than"),
    "a deeper list": (lambda: b'{"x":' + b"[" * 10_000_000, 0, "more than 65,536 tensors need"),
    "millions of lists": (lambda: b'{"x":[' + b"[]," * 3_000_000 + b"[]]}", 0, "more than 65,536 tensors need"),
    "as many lists as are allowed": (lambda: b'{"x":[' + b"[]," * 190_000 + b"[]]}", 0, "no dtype"),
    "millions of objects": (lambda: b'{"x":[' + b"{}," * 3_000_000 + b"{}]}", 0, "more than 65,536 tensors need"),
    "as many small objects as are allowed": (lambda: b'{"x":[' + b'{"a":1000},' * 190_000 + b"{}]}", 0, "no dtype"),
    "millions of numbers": (lambda: b'{"x":[' + b"999," * 2_000_000 + b"9]}", 0, "more than 65,536 tensors need"),
    "as many numbers as are allowed": (lambda: b'{"x":[' + b"999999," * 500_000 + b"9]}", 0, "no dtype"),
    "as many names as are allowed": (
        lambda: b"{" + b"".join(b'"%d":{},' % i for i in range(190_000)) + b'"a":{}}', 0, "more than 65,536 tensors"
    ),
    "as many dimensions as are allowed": (lambda: header_of(a=t(0, 0, [0] + [1] * 500_000)), 0, "impossible shape"),
    "a long name of wide characters": (lambda: '{"🙂'.encode() + b"a" * 10_400_000 + b'":7}', 0, "more than"),
    "as long a name as is allowed": (lambda: '{"🙂'.encode() + b"a" * 2_600_000 + b'":7}', 0, "longer than"),
    "long escapes": (lambda: b'{"' + b"\\u00e9" * 1_700_000 + b'":7}', 0, "more than|longer than"),
}  # fmt: skip


@pytest.mark.parametrize("attack", HEADERS)
def test_hostile_safetensors_header_is_refused(tmp_path: Path, attack: str, refusal: Refusal) -> None:
    header, size, message = HEADERS[attack]
    data = header() if callable(header) else header
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + bytes(size))
    text = refusal(tmp_path / "x.safetensors")
    assert re.search(message, text), text
    assert "x.safetensors" in text


# Folders

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Make a folder with two shards, next to a file that is not part of it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    safetensors.torch.save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    safetensors.torch.save_file({"b": torch.ones(2)}, folder / "two.safetensors")
    safetensors.torch.save_file({"b": torch.zeros(2)}, tmp_path / "secret.safetensors")
    (folder / INDEX).write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    return folder


def test_handmade_folder_without_a_fault_is_read(sharded: Path) -> None:
    with streamconv.open_checkpoint(sharded) as checkpoint:
        assert sorted(checkpoint) == ["a", "b"]


INDEXES: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "a path upwards": (b'{"weight_map": {"b": "../secret.safetensors"}}', "not a safetensors file in its folder"),
    "a path with backslashes": (
        b'{"weight_map": {"b": "..\\\\secret.safetensors"}}',
        "not a safetensors file in its folder",
    ),
    "a path through a folder": (
        b'{"weight_map": {"b": "sub/two.safetensors"}}',
        "not a safetensors file in its folder",
    ),
    "an absolute path": (b'{"weight_map": {"b": "/etc/passwd.safetensors"}}', "not a safetensors file in its folder"),
    "a path with a drive": (b'{"weight_map": {"b": "C:two.safetensors"}}', "not a safetensors file in its folder"),
    "the folder": (b'{"weight_map": {"b": "."}}', "not a safetensors file in its folder"),
    "the folder above": (b'{"weight_map": {"b": ".."}}', "not a safetensors file in its folder"),
    "nothing": (b'{"weight_map": {"b": ""}}', "not a safetensors file in its folder"),
    "a NUL": (b'{"weight_map": {"b": "two.safetensors\\u0000.safetensors"}}', r"two\.safetensors\\x00"),
    "a terminal's escape": (b'{"weight_map": {"b": "\\u001b[2J.safetensors"}}', r"\\x1b\[2J"),
    "a pickle": (b'{"weight_map": {"b": "two.bin"}}', "not a safetensors file in its folder"),
    "an endless name": (
        b'{"weight_map": {"b": "' + b"x" * 300 + b'.safetensors"}}',
        "not a safetensors file in its folder",
    ),
    "a file that is not there": (b'{"weight_map": {"b": "three.safetensors"}}', "no such file"),
    "a number": (b'{"weight_map": {"b": 7}}', "names a int"),
    "a list": (b'{"weight_map": [["b", "two.safetensors"]]}', "no weight_map"),
    "no tensors": (b'{"weight_map": {}}', "no weight_map"),
    "no map": (b"{}", "no weight_map"),
    "not an object": (b"[]", "not a JSON object"),
    "not JSON": (b"{", "is damaged"),
    "a duplicate tensor": (b'{"weight_map": {"b": "two.safetensors", "b": "one.safetensors"}}', "'b' appears twice"),
    "a tensor of another file": (b'{"weight_map": {"a": "two.safetensors"}}', "disagree on 2 tensors"),
    "an extra tensor": (
        b'{"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}}',
        "'c' is only in the index",
    ),
    "a deep list": (DEEP, "damaged|more than"),
    "millions of lists": (lambda: b'{"weight_map":[' + b"[]," * 3_000_000 + b"[]]}", "more than 65,536"),
}


@pytest.mark.parametrize("attack", INDEXES)
def test_hostile_index_is_refused(sharded: Path, attack: str, refusal: Refusal) -> None:
    index, message = INDEXES[attack]
    (sharded / INDEX).write_bytes(index() if callable(index) else index)
    text = refusal(sharded)
    assert re.search(message, text), text
    assert "folder" in text


def test_index_cannot_name_a_link_by_a_path(sharded: Path, refusal: Refusal) -> None:
    """Links in the folder are its owner's and are followed, but an index may be anyone's."""
    (sharded / "store").symlink_to(sharded.parent)
    (sharded / INDEX).write_text('{"weight_map": {"b": "store/secret.safetensors"}}')
    assert "not a safetensors file in its folder" in refusal(sharded)


def test_endless_file_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    os.mkfifo(tmp_path / "x.pth")
    assert "not a regular file" in refusal(tmp_path / "x.pth")
    assert "not a regular file" in refusal(Path("/dev/zero"))
