"""The header of a GGUF file: its metadata, and the type, shape and place of each tensor.

It is read as far as it reaches and no further, so that a file need not be mapped, and of long arrays (a vocabulary) the length
alone is kept. Everything that it says is held against the file's size, or a limit, before it is believed.

Source: the specification of GGUF, versions 2 and 3, in the documents of ggml (`docs/gguf.md`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.errors import BadInput, Problem

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
SHORT_ARRAY = 1024  # of a metadata array with more values than this only the length is kept
MAX_HEADER_BYTES = 128 << 20  # vocabularies take some ten
MAX_KEYS = 100_000
MAX_TENSORS = 500_000
MAX_AXES = 4  # of ggml
MAX_DEPTH = 4  # of arrays of arrays
MAX_ALIGNMENT = 1 << 20  # of tensors; files have 32

_STRING, _ARRAY, _FLOAT32, _UINT32 = 8, 9, 6, 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", _UINT32: "I", 5: "i", _FLOAT32: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_READ_BYTES = 1 << 20  # read at once


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file.

    `kind`: its type by ggml's name. `shape`: outermost axis first, as `[out_features, in_features]`. `offset`: of its first byte in
    the file. `nbytes`, `row_bytes`: of all of it, and of a row of the innermost axis.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    row_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """A header, parsed and held against the file's size.

    `text`: its bytes, up to the first tensor's. `alignment`: of which the places of tensors, counted from there, are multiples.
    """

    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]
    alignment: int
    text: bytes

    @property
    def data_offset(self) -> int:
        """Where tensors begin: at the end of the header, padded to the alignment."""
        return len(self.text)


def read_header(path: Path, file: BinaryIO, file_bytes: int) -> GgufHeader:
    """Read the header of an open file.

    Parameters
    ----------
    path
        The file's name, for messages.
    file
        The file, at its beginning.
    file_bytes
        Its size.

    Raises
    ------
    BadInput
        It does not begin as such a file does, or is of the other byte order.
    ValueError
        It is damaged, cut short, or says more than any model's; the text says where.
    OSError
        It cannot be read.
    """
    cursor = _Cursor(file, file_bytes)
    if cursor.take(4) != MAGIC:
        raise BadInput([damaged(path, "a file that does not begin with GGUF")])
    (version,) = cursor.unpack("I")
    if version and not version & 0xFFFF:
        raise BadInput([Problem(str(path), "a file of the other byte order", "a little-endian GGUF file")])
    if version not in VERSIONS:
        raise ValueError(f"version {version}")
    tensor_count, key_count = cursor.unpack("QQ")
    for count, most, least_bytes, what in ((tensor_count, MAX_TENSORS, 24, "tensors"), (key_count, MAX_KEYS, 13, "keys")):
        if count > most or count * least_bytes > file_bytes:
            raise ValueError(f"{count:,} {what} in {file_bytes:,} bytes")
    metadata: dict[str, Any] = {}
    alignment = 32
    for _ in range(key_count):
        key, (kind,) = cursor.text(), cursor.unpack("I")
        value = cursor.value(kind)
        if key in metadata:
            raise ValueError(f"the key {key} twice")
        metadata[key] = value
        if key == ALIGNMENT:
            if kind != _UINT32 or not value or value & (value - 1):
                raise ValueError(f"{ALIGNMENT} {value!r}, which is no power of 2")
            if value > MAX_ALIGNMENT:
                raise ValueError(f"{ALIGNMENT} {value:,}, more than {MAX_ALIGNMENT:,}")
            alignment = value
    infos = [cursor.tensor() for _ in range(tensor_count)]
    if len({name for name, _, _, _ in infos}) < len(infos):
        raise ValueError("two tensors of one name")
    begin = -(-cursor.at // alignment) * alignment
    tensors = tuple(_tensor(*info, begin, file_bytes) for info in infos)
    return GgufHeader(metadata, tensors, alignment, cursor.text_to(begin))


def damaged(path: Path, found: str) -> Problem:
    """The problem of a file that is no whole GGUF file."""
    return Problem(str(path), found, "a whole GGUF file", "The file is damaged or cut short: fetch it again")


class _Cursor:
    """A place in a header, of which as many bytes have been read as were needed."""

    def __init__(self, file: BinaryIO, file_bytes: int) -> None:
        self.at = 0
        self._file, self._file_bytes, self._read = file, file_bytes, bytearray()

    def take(self, count: int) -> bytes:
        """The next bytes. Raises ValueError behind the end of the file."""
        start = self._advance(count)
        return bytes(self._read[start : start + count])

    def unpack(self, kinds: str) -> tuple[Any, ...]:
        """The next numbers, of these kinds of `struct`, little-endian without padding."""
        form = f"<{kinds}"
        return struct.unpack_from(form, self._read, self._advance(struct.calcsize(form)))

    def text(self) -> str:
        """The next string."""
        return self.take(*self.unpack("Q")).decode()

    def value(self, kind: int, depth: int = 0) -> Any:
        """The next value of metadata; of a long array its length, of a float32 the number that was meant."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(depth)
        if kind not in _SCALARS:
            raise ValueError(f"a value of type {kind}")
        (value,) = self.unpack(_SCALARS[kind])
        return float(str(np.float32(value))) if kind == _FLOAT32 and not depth else value

    def tensor(self) -> tuple[str, list[int], int, int]:
        """The name, the lengths of the axes (innermost first), the type and the place of the next tensor."""
        name, (axes,) = self.text(), self.unpack("I")
        if axes > MAX_AXES:
            raise ValueError(f"{name} with {axes:,} axes")
        lengths = list(self.unpack("Q" * axes))
        kind, offset = self.unpack("IQ")
        return name, lengths, kind, offset

    def text_to(self, end: int) -> bytes:
        """All bytes of the file up to `end`, fewer where it is shorter."""
        self._need(min(end, self._file_bytes))
        return bytes(self._read[:end]).ljust(end, b"\0")

    def _array(self, depth: int) -> list[Any] | int:
        kind, count = self.unpack("IQ")
        item_bytes = struct.calcsize(f"<{_SCALARS[kind]}") if kind in _SCALARS else 8
        if kind not in _SCALARS and kind not in (_STRING, _ARRAY):
            raise ValueError(f"an array of type {kind}")
        if depth >= MAX_DEPTH or count * item_bytes > self._file_bytes - self.at:
            raise ValueError(f"an array of {count} values that reaches past the end")
        if count <= SHORT_ARRAY:
            return [self.value(kind, depth + 1) for _ in range(count)]
        if kind in _SCALARS:
            self._advance(count * item_bytes)
        for _ in range(count if kind == _STRING else 0):
            self._advance(*self.unpack("Q"))
        for _ in range(count if kind == _ARRAY else 0):
            self._array(depth + 1)
        return int(count)

    def _advance(self, count: int) -> int:
        """Go on; returns the place before."""
        start, self.at = self.at, self.at + count
        self._need(self.at)
        return start

    def _need(self, end: int) -> None:
        if end > self._file_bytes:
            raise ValueError(f"cut short at {self._file_bytes:,} bytes")
        if end > MAX_HEADER_BYTES:
            raise ValueError(f"more than {MAX_HEADER_BYTES:,} bytes")
        while len(self._read) < end:
            piece = self._file.read(max(_READ_BYTES, end - len(self._read)))
            if not piece:
                raise ValueError(f"cut short at {len(self._read):,} bytes")
            self._read += piece


def _tensor(name: str, lengths: list[int], number: int, offset: int, begin: int, file_bytes: int) -> GgufTensor:
    """A tensor by what the header says of it. Raises ValueError where its type is not known or it reaches past the end."""
    import gguf

    kind = gguf.GGMLQuantizationType(number)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    row = lengths[0] if lengths else 1
    if row % elements:
        raise ValueError(f"{name} with rows of {row:,} values, where {kind.name} has blocks of {elements}")
    row_bytes = row // elements * size
    nbytes = math.prod(lengths[1:]) * row_bytes
    if begin + offset + nbytes > file_bytes:
        raise ValueError(f"{name} up to byte {begin + offset + nbytes:,} of {file_bytes:,}")
    return GgufTensor(name, kind.name, tuple(reversed(lengths)), begin + offset, nbytes, row_bytes)
