"""Read pickles as data: interpret the opcodes that files of tensors consist of, without importing or calling what they name.

Refusing names is not enough to make Python's own unpickler safe: nine bytes can make it fill memory (its memo is a list as long as
the greatest index), and two hundred bytes can keep it busy for ever (hashing nested tuples). Here only strings are hashed as keys,
the memo is a dictionary, and the number of operations is bounded. The items that a call goes through count as operations, and names
that are put together are short, since one long list or text can be taken again in three bytes.
"""

from __future__ import annotations

import hashlib
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_BYTES = 256 << 20
MAX_OPERATIONS = 5_000_000  # a tensor takes about 36
MAX_LINE = 1024  # bytes of a module's or a global's name
MAX_REFUSED = 100  # names of other globals that are listed: a file with more is read no further
MAX_BITS = 127  # of an integer; torch's magic number has 77

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_INTEGERS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4"}
_VALUES = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_PUT = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GET = {"BINGET", "LONG_BINGET"}


@dataclass(frozen=True, eq=False)
class Foreign:
    """Stands for anything but plain data and known globals: another global, the object it would make, a key that is no string."""

    name: str


class Pickles:
    """A reader of the consecutive pickles in a file, from its current position, in at most `limit` bytes altogether.

    Parameters
    ----------
    file
        A binary file.
    limit
        The most bytes that may be read.
    known
        What stands for each allowed global, by `module.name`: a value, or a function that is called with the pickle's arguments.
        All other globals become Foreign, and their names are listed in `refused`.
    persistent
        A function from a persistent id to its value.

    `digest` is the SHA-256 of the bytes read so far.
    """

    def __init__(self, file: BinaryIO, limit: int, known: Mapping[str, Any], persistent: Callable[[Any], Any]) -> None:
        self.known, self.persistent = known, persistent
        self.refused: dict[str, Foreign] = {}
        self.digest = hashlib.sha256()
        self._file, self._limit, self._left, self._operations = file, limit, limit, 0

    def load(self) -> Any:
        """Return the next pickle's value. Raises ValueError for a damaged pickle, or one larger than any checkpoint's."""
        try:
            return self._load()
        except (LookupError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"a pickle whose opcodes do not fit together ({type(error).__name__})") from None

    def read(self, count: int) -> bytes:
        """Read `count` bytes of the file, and add them to the digest. Raises ValueError beyond the limit."""
        if not 0 <= count <= self._left:
            raise ValueError(f"a pickle that goes beyond its {self._limit:,} bytes")
        return self._counted(self._file.read(count))

    def readline(self) -> bytes:
        """Read a line of at most MAX_LINE bytes, and add it to the digest."""
        return self._counted(self._file.readline(min(self._left, MAX_LINE)))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        self.digest.update(data)
        return data

    def _load(self) -> Any:
        stack: list[Any] = []
        outer: list[list[Any]] = []  # the stacks below each mark
        memo: dict[int, Any] = {}
        source: Any = self  # read and readline are all that genops needs
        argument: Any
        for opcode, argument, _ in pickletools.genops(source):
            name = opcode.name
            self._count(1)
            if name in _PUT:
                memo[len(memo) if argument is None else argument] = stack[-1]
            elif name in _GET:
                stack.append(memo[argument])
            elif name in _INTEGERS:
                if argument.bit_length() > MAX_BITS:
                    raise ValueError(f"an integer of {argument.bit_length()} bits")
                stack.append(argument)
            elif name in _VALUES:
                stack.append(argument)
            elif name in ("BINSTRING", "SHORT_BINSTRING"):  # from Python 2, whose strings were bytes
                stack.append(argument.encode("latin-1").decode())
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "EMPTY_LIST":
                stack.append([])
            elif name == "MARK":
                outer.append(stack)
                stack = []
            elif name in _TUPLES:
                count = _TUPLES[name]
                stack[-count:] = [tuple(_last(stack, count))]
            elif name in ("TUPLE", "APPENDS", "SETITEMS"):
                items, stack = stack, outer.pop()
                if name == "TUPLE":
                    stack.append(tuple(items))
                elif name == "APPENDS":
                    _append(stack[-1], items)
                else:
                    set_items(stack[-1], items)
            elif name == "APPEND":
                item = stack.pop()
                _append(stack[-1], [item])
            elif name == "SETITEM":
                value, key = stack.pop(), stack.pop()
                set_items(stack[-1], [key, value])
            elif name == "GLOBAL":
                stack.append(self._global(argument.replace(" ", ".", 1)))
            elif name == "STACK_GLOBAL":
                last, module = stack.pop(), stack.pop()
                if len(module) + len(last) > MAX_LINE:  # both may be anywhere in the file, and be taken again and again
                    raise ValueError(f"a global's name of {len(module) + len(last):,} characters")
                stack.append(self._global(f"{module:s}.{last:s}"))
            elif name in ("REDUCE", "NEWOBJ"):
                arguments = stack.pop()
                if not isinstance(stack[-1], Foreign):
                    if name == "NEWOBJ" or not isinstance(arguments, tuple):
                        raise ValueError("a pickle that makes an object of no known class")
                    self._count(sum(len(each) for each in arguments if isinstance(each, list | tuple | dict)))
                    stack[-1] = stack[-1](*arguments)
            elif name == "BUILD":
                stack.pop()  # an object's attributes, such as a state dict's _metadata, are dropped
            elif name == "BINPERSID":
                stack.append(self.persistent(stack.pop()))
            elif name == "POP":
                stack.pop()
            elif name == "STOP":
                return stack.pop()
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"the pickle opcode {name}, which files of tensors do not have")
        raise ValueError("a pickle without an end")

    def _global(self, name: str) -> Any:
        if name in self.known:
            return self.known[name]
        if len(self.refused) == MAX_REFUSED and name not in self.refused:
            raise ValueError(f"a pickle of more than {MAX_REFUSED} globals that no tensor has")
        return self.refused.setdefault(name, Foreign(name))

    def _count(self, operations: int) -> None:
        self._operations += operations
        if self._operations > MAX_OPERATIONS:
            raise ValueError(f"a pickle of more than {MAX_OPERATIONS:,} operations")


def _last(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise IndexError("the stack is too short")
    return stack[-count:]


def _append(target: Any, items: list[Any]) -> None:
    if not isinstance(target, Foreign):
        if not isinstance(target, list):
            raise TypeError("not a list")
        target += items


def set_items(target: Any, items: list[Any]) -> None:
    """Put the alternating keys and values of `items` into a dictionary. A key that is not a string becomes Foreign, by its type.

    Does nothing to a Foreign `target`. Raises TypeError where it is no dictionary.
    """
    if isinstance(target, Foreign):
        return
    if not isinstance(target, dict):
        raise TypeError("not a dictionary")
    # Only strings are hashed: hashing numbers and tuples that an attacker chose can take for ever.
    keys = (key if isinstance(key, str) else Foreign(type(key).__name__) for key in items[::2])
    target.update(zip(keys, items[1::2], strict=True))
