"""The opcodes of a pickle that are rare in a checkpoint, and those with which protocols 3 to 5 make other objects.

Each function executes one opcode. It gets the pickle's bytes, the position after the opcode, and the machine; it
returns the position of the next opcode, which may lie beyond ``data``, and an estimate of the memory in bytes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.formats.unread import PickleError, Unread

MAX_GLOBAL_BYTES = 1_000
_COST = 128  # at least: calling one of these functions takes more time than the opcodes that are executed in line
_GLOBAL = 200  # picklers write each one once, and use the memo after that
_SLOT = 8


@dataclass(frozen=True, slots=True)
class Machine:
    stack: list[Any]
    marks: list[int]
    find_global: Callable[[str, str], Any]

    def pop_to_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items


Opcode = Callable[[bytes, int, Machine], tuple[int, int]]


def _global(data: bytes, at: int, machine: Machine) -> tuple[int, int]:
    lines = data[at : at + MAX_GLOBAL_BYTES].split(b"\n", 2)
    if len(lines) != 3:
        raise PickleError(f"it names a global of more than {MAX_GLOBAL_BYTES:,} bytes")
    machine.stack.append(machine.find_global(lines[0].decode(), lines[1].decode()))
    return at + len(lines[0]) + len(lines[1]) + 2, _GLOBAL


def _stack_global(data: bytes, at: int, machine: Machine) -> tuple[int, int]:
    name, module = machine.stack.pop(), machine.stack[-1]
    if type(name) is not str or type(module) is not str:
        raise PickleError("it names a global by something that is not a string")
    if len(module) + len(name) > MAX_GLOBAL_BYTES:
        raise PickleError(f"it names a global of more than {MAX_GLOBAL_BYTES:,} bytes")
    machine.stack[-1] = machine.find_global(module, name)
    return at, _GLOBAL + 4 * (len(module) + len(name))  # the strings may be in the memo, so that none are in the pickle


def _new_object(data: bytes, at: int, machine: Machine) -> tuple[int, int]:
    arguments, kind = machine.stack.pop(), machine.stack[-1]
    if type(kind) is not Unread:
        raise PickleError(f"it makes an object of a {type(kind).__name__}")
    machine.stack[-1] = Unread(kind.name, arguments)
    return at, _COST


def _new_object_with_keywords(data: bytes, at: int, machine: Machine) -> tuple[int, int]:
    machine.stack.pop()
    return _new_object(data, at, machine)


def _build(data: bytes, at: int, machine: Machine) -> tuple[int, int]:
    state, target = machine.stack.pop(), machine.stack[-1]
    if type(target) is Unread:
        target.state = state
    elif type(state) is not dict or type(target) is not dict:  # torch gives an OrderedDict its _metadata
        raise PickleError(f"it sets attributes of a {type(target).__name__}")
    return at, _COST


def _set(data: bytes, at: int, machine: Machine) -> tuple[int, int]:
    machine.stack.append(Unread("builtins.set"))
    return at, _COST


def _frozen_set(data: bytes, at: int, machine: Machine) -> tuple[int, int]:
    machine.pop_to_mark()
    machine.stack.append(Unread("builtins.frozenset"))
    return at, _COST


def _add_items(data: bytes, at: int, machine: Machine) -> tuple[int, int]:
    machine.pop_to_mark()
    if type(machine.stack[-1]) is not Unread:
        raise PickleError(f"it adds items to a {type(machine.stack[-1]).__name__}")
    return at, _COST


def _unkept(name: str, size_bytes: int) -> Opcode:
    """Return a function for a value of ``size_bytes`` bytes that give the value's length, and then the value."""

    def run(data: bytes, at: int, machine: Machine) -> tuple[int, int]:
        end = at + size_bytes
        machine.stack.append(Unread(name))
        return end + int.from_bytes(data[at:end], "little"), _COST

    return run


def _short_byte_string(data: bytes, at: int, machine: Machine) -> tuple[int, int]:
    end = at + 1 + data[at]
    machine.stack.append(data[at + 1 : end].decode())
    return end, _COST + data[at]


def _skip(count: int) -> Opcode:
    return lambda data, at, machine: (at + count, _COST)


def _refuse_buffer(data: bytes, at: int, machine: Machine) -> tuple[int, int]:
    raise PickleError("its buffers are not in it (pickle protocol 5 with a buffer_callback), so its values are lost")


RARE_OPCODES: Mapping[int, Opcode] = {
    0x80: _skip(1),  # PROTO: its number is not needed
    0x95: _skip(8),  # FRAME: its length is for buffering only
    0x63: _global,  # GLOBAL
    0x93: _stack_global,  # STACK_GLOBAL
    0x81: _new_object,  # NEWOBJ
    0x92: _new_object_with_keywords,  # NEWOBJ_EX
    0x62: _build,  # BUILD
    0x8F: _set,  # EMPTY_SET
    0x91: _frozen_set,  # FROZENSET
    0x90: _add_items,  # ADDITEMS
    0x43: _unkept("builtins.bytes", 1),  # SHORT_BINBYTES
    0x42: _unkept("builtins.bytes", 4),  # BINBYTES
    0x8E: _unkept("builtins.bytes", 8),  # BINBYTES8
    0x96: _unkept("builtins.bytearray", 8),  # BYTEARRAY8
    0x8B: _unkept("builtins.int", 4),  # LONG4: more than 2,000 bits
    0x55: _short_byte_string,  # SHORT_BINSTRING
    0x97: _refuse_buffer,  # NEXT_BUFFER
    0x98: _refuse_buffer,  # READONLY_BUFFER
}
