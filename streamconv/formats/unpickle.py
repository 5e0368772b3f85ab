"""A stack machine for the pickles that torch.save writes. It builds descriptions and runs nothing.

pickle.Unpickler cannot be made safe by its ``find_class`` alone: one opcode allocates a memo of any
size, one-byte opcodes pile up gigabytes of containers, a dict key that is a tuple of shared tuples
takes for ever to hash, and BUILD sets attributes of whatever lies on the stack. So the opcodes that
torch's own weights-only reader takes (torch/_weights_only_unpickler.py) are carried out here, less
those that no checkpoint of tensors needs. No value is ever hashed, compared or printed unless it is
a string or an int, and nothing recurses into values, so that their depth costs nothing.

https://github.com/python/cpython/blob/main/Lib/pickletools.py describes every opcode.
"""

import struct
from collections.abc import Callable
from sys import getsizeof
from typing import Any

# A tensor takes torch.save 32 to 38 opcodes, 110 to 140 bytes of pickle and 800 of memory, by the estimates
# below, which lie close above the truth: 65,536 tensors pass, with names of some 60 characters.
MAX_PICKLE_BYTES = 12 << 20
MAX_OPCODES = 2_600_000
MAX_MEMORY_BYTES = 66 << 20  # the pickle and all that it builds
MAX_TEXT_BYTES = 1 << 20
MAX_STACK = 200_000  # picklers write a dict's items by thousands, `pth.write_pth` all at once
MAX_DEPTH = 1_000  # of marks; picklers recurse, so that Python's own limit is theirs

_GLOBAL = 200  # picklers write one once, and remember it
_CONTAINER, _TUPLE, _ITEM, _NUMBER, _SLOT = 80, 48, 60, 32, 8
_MAX_GLOBAL_BYTES = 1_000
_MAX_OPCODE_BYTES = 1 + _MAX_GLOBAL_BYTES  # but a string's, which says how long it is
_UINT32, _INT32 = struct.Struct("<I"), struct.Struct("<i")
_USED = type("used value", (), {})()  # in the memo, for the arguments of what was called


class PickleError(Exception):
    """The pickle is damaged, not of torch.save, or larger than any checkpoint's."""


def _none_follow(count: int) -> bytes:
    return b""


class Unread:
    """Stands for an object of a class that is not known here, and for the class: nothing of it is made or called."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *arguments: object) -> "Unread":
        return self


class Pickles:
    """Pickles that lie one after another, and the memory that they may take together.

    ``more`` gives the bytes behind ``data`` piece by piece: at least as many as it is asked for, where there are.
    What was read is not kept, so that no pickle is ever in memory as a whole but one that ``data`` holds.
    """

    def __init__(self, data: bytes, more: Callable[[int], bytes] = _none_follow):
        self.rest = data  # of what was given: behind the last pickle
        self._room, self._more = MAX_MEMORY_BYTES - len(data), more

    def load(
        self,
        find: Callable[[str, str], Any],
        load_persistent: Callable[[Any], Any],
        max_opcodes: int = MAX_OPCODES,
    ) -> Any:
        """What the next one describes: dicts, lists, tuples, strings, numbers, None, and what the callables give.

        ``find`` answers for the module and name of a global, or raises; what it gives is called if it
        is callable. ``load_persistent`` answers for a persistent id.

        Raises:
            PickleError
        """
        try:
            value, self.rest, self._room = _run(self.rest, self._more, max_opcodes, self._room, find, load_persistent)
        except (IndexError, struct.error):
            raise PickleError("it ends too early, or takes more from its stack than lies there") from None
        except UnicodeDecodeError:
            raise PickleError("it holds a string that is not UTF-8") from None
        return value


def _run(
    data: bytes, more: Callable[[int], bytes], max_opcodes: int, room: int,
    find: Callable[[str, str], Any], load_persistent: Callable[[Any], Any],
) -> tuple[Any, bytes, int]:  # fmt: skip
    """The value, the bytes behind its pickle, and the memory that is left."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: list[Any] = []
    push, pop, uint32 = stack.append, stack.pop, _UINT32.unpack_from
    at = before = 0  # in ``data``, and of it in the pickle
    enough = len(data) - _MAX_OPCODE_BYTES
    for _ in range(max_opcodes):
        if at > enough:
            before, data, at = before + at, data[at:] + more(_MAX_OPCODE_BYTES), 0
            enough = len(data) - _MAX_OPCODE_BYTES
        opcode = data[at]
        at += 1
        # In the order of how often torch.save writes them: this loop is most of opening a file.
        if opcode == 0x72 or opcode == 0x71:  # LONG_BINPUT, BINPUT
            index = uint32(data, at)[0] if opcode == 0x72 else data[at]
            at += 4 if opcode == 0x72 else 1
            if index == len(memo):  # picklers number what they remember from 0 on
                memo.append(stack[-1])
                room -= _SLOT
            elif index < len(memo):
                memo[index] = stack[-1]
            else:
                raise PickleError(f"it remembers a value as number {index} after {len(memo)} others")
        elif opcode == 0x4B:  # BININT1
            push(data[at])
            at += 1
        elif opcode == 0x68:  # BINGET
            push(memo[data[at]])
            at += 1
        elif opcode == 0x6A:  # LONG_BINGET
            push(memo[uint32(data, at)[0]])
            at += 4
        elif opcode == 0x28:  # MARK
            marks.append(len(stack))
            if len(marks) > MAX_DEPTH:
                raise PickleError(f"it is nested deeper than {MAX_DEPTH:,}")
        elif opcode == 0x74:  # TUPLE
            mark = marks.pop()
            stack[mark:] = [tuple(stack[mark:])]
            room -= _TUPLE + _SLOT * len(stack[-1])
        elif opcode == 0x86:  # TUPLE2
            second = pop()
            stack[-1] = (stack[-1], second)
            room -= _TUPLE + 2 * _SLOT
        elif opcode == 0x85:  # TUPLE1
            stack[-1] = (stack[-1],)
            room -= _TUPLE + _SLOT
        elif opcode == 0x87:  # TUPLE3
            third, second = pop(), pop()
            stack[-1] = (stack[-1], second, third)
            room -= _TUPLE + 3 * _SLOT
        elif opcode == 0x52:  # REDUCE
            arguments, function = pop(), stack[-1]
            if not callable(function) or type(arguments) is not tuple:
                raise PickleError(f"it calls a {type(function).__name__} at byte {before + at - 1}")
            if memo and memo[-1] is arguments:  # no pickler comes back to them; a fifth of the memory
                memo[-1] = _USED
            stack[-1] = function(*arguments)
            room -= _CONTAINER
        elif opcode == 0x58:  # BINUNICODE
            size = uint32(data, at)[0]
            if size > MAX_TEXT_BYTES:
                raise PickleError(f"it holds a string of {size:,} bytes")
            at += 4 + size
            if at > len(data):
                data += more(size)
                enough = len(data) - _MAX_OPCODE_BYTES
            # As torch reads it: a lone surrogate passes here, and is refused as a name.
            text = data[at - size : at].decode("utf-8", "surrogatepass")
            push(text)
            room -= getsizeof(text) + _SLOT  # which the allocator rounds up
        elif opcode == 0x4A:  # BININT
            push(_INT32.unpack_from(data, at)[0])
            at += 4
            room -= _NUMBER
        elif opcode == 0x51:  # BINPERSID
            persistent_id = pop()
            if memo and memo[-1] is persistent_id:
                memo[-1] = _USED
            push(load_persistent(persistent_id))
        elif opcode == 0x89 or opcode == 0x88:  # NEWFALSE, NEWTRUE
            push(opcode == 0x88)
        elif opcode == 0x29:  # EMPTY_TUPLE
            push(())
        elif opcode == 0x4D:  # BININT2
            push(int.from_bytes(data[at : at + 2], "little"))
            at += 2
            room -= _NUMBER
        elif opcode == 0x8A:  # LONG1
            size = data[at]
            at += 1 + size
            push(int.from_bytes(data[at - size : at], "little", signed=True))
            room -= _NUMBER + size
        elif opcode == 0x63:  # GLOBAL
            lines = data[at : at + _MAX_GLOBAL_BYTES].split(b"\n", 2)
            if len(lines) != 3:
                raise PickleError(f"it names something of more than {_MAX_GLOBAL_BYTES:,} bytes")
            at += len(lines[0]) + len(lines[1]) + 2
            push(find(lines[0].decode(), lines[1].decode()))
            room -= _GLOBAL
        elif opcode == 0x7D or opcode == 0x5D:  # EMPTY_DICT, EMPTY_LIST
            push({} if opcode == 0x7D else [])
            room -= _CONTAINER
        elif opcode == 0x75 or opcode == 0x73:  # SETITEMS, SETITEM
            mark = marks.pop() if opcode == 0x75 else len(stack) - 2
            room -= _ITEM * (1 + len(stack) - mark)
            items = stack[mark:]
            del stack[mark:]
            _set_items(stack[-1], items)
        elif opcode == 0x65 or opcode == 0x61:  # APPENDS, APPEND
            mark = marks.pop() if opcode == 0x65 else len(stack) - 1
            items = stack[mark:]
            del stack[mark:]
            if type(stack[-1]) is list:
                stack[-1] += items
            elif type(stack[-1]) is not Unread:
                raise PickleError(f"it appends to a {type(stack[-1]).__name__}")
            room -= _CONTAINER + _SLOT * len(items)
        elif opcode == 0x62:  # BUILD: torch gives an OrderedDict its _metadata, which describes no tensor
            state = pop()
            if type(stack[-1]) is not Unread and (type(state) is not dict or type(stack[-1]) is not dict):
                raise PickleError(f"it sets attributes of a {type(stack[-1]).__name__}")
            room -= _CONTAINER
        elif opcode == 0x81:  # NEWOBJ
            pop()
            if type(stack[-1]) is not Unread:
                raise PickleError(f"it makes an object of a {type(stack[-1]).__name__}")
            room -= _CONTAINER
        elif opcode == 0x4E:  # NONE
            push(None)
            room -= _NUMBER  # nothing to hold, but last in this chain: it costs time
        elif opcode == 0x47:  # BINFLOAT
            push(*struct.unpack_from(">d", data, at))
            at += 8
            room -= _NUMBER
        elif opcode == 0x55:  # SHORT_BINSTRING
            size = data[at]
            at += 1 + size
            push(data[at - size : at].decode())
            room -= _CONTAINER + size
        elif opcode == 0x80:  # PROTO: the opcodes themselves say what is needed
            at += 1
            room -= _NUMBER
        elif opcode == 0x2E:  # STOP
            return stack[-1], data[at:], room
        else:
            raise PickleError(
                f"it has the opcode {opcode:#04x} at byte {before + at - 1}, which torch.save never writes"
            )
        if room < 0 or len(stack) > MAX_STACK:
            raise PickleError(f"it describes more than {MAX_MEMORY_BYTES:,} bytes of objects, or {MAX_STACK:,} at once")
    raise PickleError(f"it has more than {max_opcodes:,} opcodes")


def _set_items(target: Any, items: list[Any]) -> None:
    if len(items) % 2:
        raise PickleError("it has a dict with a key without a value")
    if type(target) is Unread:
        return
    if type(target) is not dict:
        raise PickleError(f"it sets items of a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Nothing else names a tensor. Ints beyond 64 bits can be chosen so that their hashes collide.
        if type(key) is str or (type(key) is int and not abs(key) >> 63):
            target[key] = value
