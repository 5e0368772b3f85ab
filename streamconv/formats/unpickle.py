"""A stack machine for the pickles that torch.save writes. It builds descriptions and runs no code from them.

pickle.Unpickler cannot be made safe by its ``find_class`` alone: one opcode allocates a memo of any size, one-byte
opcodes build gigabytes of containers, a dict key that is a tuple of shared tuples takes forever to hash, and BUILD
sets attributes of any object on the stack. So this module executes what picklers write for protocols 2 to 5, within
limits on time and memory. A value is hashed, compared or printed only if it is a string, a number or None, and no
function recurses into values, so their depth is harmless. `rare_opcodes` has the opcodes that are not in the loop here.

https://github.com/python/cpython/blob/main/Lib/pickletools.py describes every opcode.
"""

import struct
from collections.abc import Callable
from sys import getrefcount, getsizeof
from typing import Any

from streamconv.formats.rare_opcodes import MAX_GLOBAL_BYTES, RARE_OPCODES, Machine
from streamconv.formats.unread import PickleError, Unread, set_items

# For each tensor, torch.save writes 32 to 38 opcodes, which are 110 to 140 bytes of pickle and take 600 bytes of
# memory by the estimates below, slightly more than in fact. 65,536 tensors with names of 60 characters are accepted.
MAX_PICKLE_BYTES = 12 << 20
MAX_OPCODES = 2_600_000
MAX_MEMORY_BYTES = 64 << 20  # the objects that the pickle builds, and the file's records
RECORD_BYTES = 340
_STORAGE_BYTES = 200  # of a record, beside what the estimates below exceed the memory by
MAX_TEXT_BYTES = 1 << 20
_LONG_TEXT_BYTES = 64 << 10
_COPIED_TEXT_BYTES = 1_000
MAX_STACK = 200_000  # picklers set a dict's items in thousands, `torch_writer.write_pth` all at once
MAX_DEPTH = 1_000  # of marks; picklers recurse, so Python's recursion limit applies to them

# Estimates of memory in bytes.
_CONTAINER, _TUPLE, _ITEM, _NUMBER, _SLOT = 80, 48, 60, 32, 8
_MAX_OPCODE_BYTES = 1 + MAX_GLOBAL_BYTES  # except a string's, which begins with its length
_UINT32, _UINT64, _INT32 = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<i")
_TOO_LARGE = f"it describes more than {MAX_MEMORY_BYTES:,} bytes of objects, or {MAX_STACK:,} at once"
_USED = type("used value", (), {})()  # replaces the arguments of a call in the memo


class Pickles:
    """Loads pickles that are stored one after another, within one limit on their memory.

    ``more(count)`` returns the bytes after ``data`` piece by piece, at least ``count`` unless there are fewer. Pieces
    are not kept, so of the pickles only ``data`` is ever in memory as a whole. ``record_count`` is the number of the
    file's records in memory. If it is None, ``load_persistent`` makes a record for each persistent id.
    """

    def __init__(self, data: bytes, more: Callable[[int], bytes], record_count: int | None = 0):
        self.rest = data  # read, but not part of a loaded pickle
        self._more, self._free_memory = more, MAX_MEMORY_BYTES - len(data) - RECORD_BYTES * (record_count or 0)
        self._storage_bytes = _STORAGE_BYTES if record_count is None else 0

    def load(
        self,
        find_global: Callable[[str, str], Any],
        load_persistent: Callable[[Any], Any],
        max_opcodes: int = MAX_OPCODES,
    ) -> Any:
        """Load the next pickle: dicts, lists, tuples, strings, numbers, None, and what the callables return.

        ``find_global`` resolves the module and name of a global, or raises; if the pickle calls the global, its result
        is called. ``load_persistent`` resolves a persistent id.

        Raises:
            PickleError: it is damaged, was not written by torch.save, or is too large.
        """
        try:
            value, self.rest, self._free_memory = _run(
                self.rest, self._more, max_opcodes, self._free_memory, self._storage_bytes, find_global, load_persistent
            )
        except (IndexError, struct.error):
            raise PickleError("it ends too early, or takes more from its stack than there is") from None
        except UnicodeDecodeError:
            raise PickleError("it holds a string that is not UTF-8") from None
        return value


def _run(
    data: bytes, more: Callable[[int], bytes], max_opcodes: int, free_memory: int, storage_bytes: int,
    find_global: Callable[[str, str], Any], load_persistent: Callable[[Any], Any],
) -> tuple[Any, bytes, int]:  # fmt: skip
    """Execute one pickle. Return its value, the bytes after it, and how much of ``free_memory`` is left, in bytes."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: list[Any] = []
    push, pop, uint32 = stack.append, stack.pop, _UINT32.unpack_from
    machine = Machine(stack, marks, find_global)
    at = dropped = 0  # the position in ``data``, and the bytes of the pickle that came before ``data``
    refill_at = len(data) - _MAX_OPCODE_BYTES
    for _ in range(max_opcodes):
        if at > refill_at:
            while at > len(data):  # the value before was not kept, and ends in a later piece
                dropped, at, data = dropped + len(data), at - len(data), more(_MAX_OPCODE_BYTES)
                if not data:
                    raise IndexError
            dropped, data, at = dropped + at, data[at:] + more(_MAX_OPCODE_BYTES), 0
            refill_at = len(data) - _MAX_OPCODE_BYTES
        opcode = data[at]
        at += 1
        # Sorted by how often torch.save writes them, since most of the time to open a file is spent in this loop.
        if opcode == 0x72 or opcode == 0x71:  # LONG_BINPUT, BINPUT
            index = uint32(data, at)[0] if opcode == 0x72 else data[at]
            at += 4 if opcode == 0x72 else 1
            if index == len(memo):  # picklers number memo entries from 0 on
                memo.append(stack[-1])
                free_memory -= _SLOT
            elif index < len(memo):
                memo[index] = stack[-1]
            else:
                raise PickleError(f"it stores memo entry {index} after {len(memo)} others")
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
            free_memory -= _TUPLE + _SLOT * len(stack[-1])
        elif opcode == 0x86:  # TUPLE2
            second = pop()
            stack[-1] = (stack[-1], second)
            free_memory -= _TUPLE + 2 * _SLOT
        elif opcode == 0x85:  # TUPLE1
            stack[-1] = (stack[-1],)
            free_memory -= _TUPLE + _SLOT
        elif opcode == 0x87:  # TUPLE3
            third, second = pop(), pop()
            stack[-1] = (stack[-1], second, third)
            free_memory -= _TUPLE + 3 * _SLOT
        elif opcode == 0x52:  # REDUCE
            arguments, function = pop(), stack[-1]
            is_unread = type(function) is Unread
            if type(arguments) is not tuple or not (is_unread or callable(function)):
                raise PickleError(f"it calls a {type(function).__name__} at byte {dropped + at - 1}")
            if memo and memo[-1] is arguments:  # no pickler uses them again; they are a fifth of the memory
                memo[-1] = _USED
                if len(memo) > 1 and arguments and memo[-2] is arguments[-1] == {}:  # a tensor's hooks
                    free_memory += _CONTAINER if getrefcount(memo[-2]) <= 3 else 0
                    memo[-2] = _USED
                if not is_unread and getrefcount(arguments) <= 2:
                    free_memory += _TUPLE + _SLOT * len(arguments)
            stack[-1] = Unread(function.name, arguments) if is_unread else function(*arguments)
            free_memory -= _CONTAINER
        elif opcode == 0x58 or opcode == 0x8C or opcode == 0x8D:  # BINUNICODE, SHORT_BINUNICODE, BINUNICODE8
            if opcode == 0x58:
                size = uint32(data, at)[0]
                at += 4 + size
            elif opcode == 0x8C:
                size = data[at]
                at += 1 + size
            else:
                size = _UINT64.unpack_from(data, at)[0]
                at += 8 + size
            if size > _LONG_TEXT_BYTES:
                if size > MAX_TEXT_BYTES:  # not a name but an array's values
                    push(Unread("builtins.str"))
                    free_memory -= _CONTAINER
                    continue
                if 4 * size > free_memory:  # if it has a character that takes four bytes, all take four
                    raise PickleError(_TOO_LARGE)
            if at > len(data):
                data += more(size)
                refill_at = len(data) - _MAX_OPCODE_BYTES
            # Like torch, accept a lone surrogate here; as part of a name it is refused.
            text = data[at - size : at].decode("utf-8", "surrogatepass")
            push(text)
            free_memory -= getsizeof(text) + _SLOT  # the allocator rounds up
            if size > _COPIED_TEXT_BYTES and not text.isascii():  # it was copied as it grew, which leaves gaps
                free_memory -= getsizeof(text)
        elif opcode == 0x94:  # MEMOIZE
            memo.append(stack[-1])
            free_memory -= _SLOT
        elif opcode == 0x4A:  # BININT
            push(_INT32.unpack_from(data, at)[0])
            at += 4
            free_memory -= _NUMBER
        elif opcode == 0x51:  # BINPERSID
            persistent_id = pop()
            if memo and memo[-1] is persistent_id:
                memo[-1] = _USED
                if type(persistent_id) is tuple and getrefcount(persistent_id) <= 2:
                    free_memory += _TUPLE + _SLOT * len(persistent_id)
            else:  # no pickler writes one twice, and each takes time
                free_memory -= 3 * _CONTAINER
            free_memory -= storage_bytes
            push(load_persistent(persistent_id))
        elif opcode == 0x89 or opcode == 0x88:  # NEWFALSE, NEWTRUE
            push(opcode == 0x88)
        elif opcode == 0x29:  # EMPTY_TUPLE
            push(())
        elif opcode == 0x4D:  # BININT2
            push(int.from_bytes(data[at : at + 2], "little"))
            at += 2
            free_memory -= _NUMBER
        elif opcode == 0x8A:  # LONG1
            size = data[at]
            at += 1 + size
            push(int.from_bytes(data[at - size : at], "little", signed=True))
            free_memory -= _NUMBER + size
        elif opcode == 0x7D or opcode == 0x5D:  # EMPTY_DICT, EMPTY_LIST
            push({} if opcode == 0x7D else [])
            free_memory -= _CONTAINER
        elif opcode == 0x75 or opcode == 0x73:  # SETITEMS, SETITEM
            mark = marks.pop() if opcode == 0x75 else len(stack) - 2
            free_memory -= _ITEM * (1 + len(stack) - mark)
            items = stack[mark:]
            del stack[mark:]
            if type(stack[-1]) is Unread:
                free_memory -= _CONTAINER
            free_memory -= _CONTAINER * set_items(stack[-1], items)
        elif opcode == 0x65 or opcode == 0x61:  # APPENDS, APPEND
            mark = marks.pop() if opcode == 0x65 else len(stack) - 1
            items = stack[mark:]
            del stack[mark:]
            if type(stack[-1]) is list:
                stack[-1] += items
            elif type(stack[-1]) is not Unread:
                raise PickleError(f"it appends to a {type(stack[-1]).__name__}")
            free_memory -= _CONTAINER + _SLOT * len(items)
        elif opcode == 0x4E:  # NONE
            push(None)
            free_memory -= _NUMBER  # takes no memory, but time: it is late in this chain
        elif opcode == 0x47:  # BINFLOAT
            push(*struct.unpack_from(">d", data, at))
            at += 8
            free_memory -= _NUMBER
        elif opcode == 0x2E:  # STOP
            return stack[-1], data[at:], free_memory
        else:
            run = RARE_OPCODES.get(opcode)
            if run is None:
                place = f"the opcode {opcode:#04x} at byte {dropped + at - 1}"
                raise PickleError(f"it has {place}, which no checkpoint of pickle protocols 2 to 5 has")
            at, memory = run(data, at, machine)
            free_memory -= memory
        if free_memory < 0 or len(stack) > MAX_STACK:
            raise PickleError(_TOO_LARGE)
    raise PickleError(f"it has more than {max_opcodes:,} opcodes")
