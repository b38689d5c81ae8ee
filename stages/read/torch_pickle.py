"""Files of torch.save (.bin, .pt, .pth), opened without torch and without running what they pickle.

Both of their formats keep a pickle of names, shapes and strides apart from the storages, each of which is one run of bytes:

    since torch 1.6   a zip archive, stored: */data.pkl, and a record */data/<key> for each storage
    before            pickles of a magic number, a version, sys_info, the object and the storages' keys; then each storage

So a tensor is a mapped byte range as in any other container, or elements at strides within one.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.model.dtypes import BY_SAFETENSORS, TABLE
from pipeline.tensor.tensors import LazyTensor, SourceFile
from stages.read.mapped import MappedTensor
from stages.read.pickles import MAX_BYTES, Foreign, Pickles, set_items
from stages.read.strided import StridedTensor, contiguous, span
from stages.read.torch_archive import RESAVE, Archive, byte_order, shown

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
MAX_AXES = 8  # more than any checkpoint has, fewer than NumPy can
MAX_SIZE = 1 << 62  # of a number in a file, so that products can be said
MAX_REPEATED_BYTES = 1 << 30  # of an expanded tensor, whose shape no storage bounds
WRAPPERS = ("state_dict", "model", "module")  # under which training scripts keep the state dict
FETCH = "The file is damaged or cut short: fetch it again"

_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16",
    "Long": "I64", "Int": "I32", "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL",
}  # fmt: skip
# The bytes of an element of types that are no weights.
_OTHERS = {"QInt8": 1, "QUInt8": 1, "QInt32": 4, "QUInt4x2": 1, "QUInt2x4": 1, "ComplexFloat": 8, "ComplexDouble": 16}

Homes = Mapping[str, tuple[int, int]]  # of each storage: its first byte in the file, and its bytes


@dataclass(frozen=True)
class _Kind:
    """A class of storages: its name, the bytes of an element, and the type of one where weights can have it."""

    name: str
    itemsize: int
    dtype: np.dtype | None = None


@dataclass(frozen=True)
class _Storage:
    """A view of the storage `key`, which has `total` bytes: `nbytes` of them from byte `start`."""

    kind: _Kind
    key: str
    total: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class _Record:
    """A tensor as it is pickled, unchecked: the arguments of torch's _rebuild_tensor_v3, and with another order those of v2."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    requires_grad: Any
    hooks: Any
    dtype: Any = None
    metadata: Any = None


def _rebuild_v2(storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, metadata: Any = None) -> _Record:
    return _Record(storage, offset, shape, strides, grad, hooks, None, metadata)


def _ordered_dict(pairs: Any = ()) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        set_items(result, [key, value])
    return result


# Every global that a file may name, and what stands for it here: nothing is imported by a name from a file.
KNOWN: Mapping[str, Any] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": lambda sizes=(): sizes,
    "torch._utils._rebuild_parameter": lambda tensor, _grad, _hooks: tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_v2,
    "torch._utils._rebuild_tensor_v3": _Record,
    "torch.storage.UntypedStorage": _Kind("UntypedStorage", 1),
    **{f"torch.{row.numpy.name}": row.numpy for row in TABLE},  # torch and NumPy call them the same
    **{
        f"torch.{name}Storage": _Kind(f"{name}Storage", BY_SAFETENSORS[row].numpy.itemsize, BY_SAFETENSORS[row].numpy)
        for name, row in _STORAGES.items()
    },
    **{f"torch.{name}Storage": _Kind(f"{name}Storage", itemsize) for name, itemsize in _OTHERS.items()},
}


def open_file(path: Path) -> tuple[SourceFile, dict[str, LazyTensor]]:
    """Read and check what a file says of its tensors. Raises BadInput with every problem of it, OSError where it cannot be read.

    The file holds a dictionary of tensors, or one such dictionary under a name of WRAPPERS.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        try:
            read = _zip if file.read(4) == b"PK\3\4" else _legacy
            value, homes, digest = read(path, file, status.st_size)
        except (ValueError, LookupError, TypeError, OverflowError, NotImplementedError, struct.error, zipfile.BadZipFile) as error:
            found = f"what is no checkpoint of torch.save, or a damaged one ({shown(str(error))})"
            raise BadInput([Problem(str(path), found, "a whole file", "Fetch it again")]) from None
    tensors: dict[str, LazyTensor] = {}
    problems: list[Problem] = []
    for name, record in _state_dict(path, value).items():
        try:
            tensors[name] = _tensor(path, name, record, homes)
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    return SourceFile(path, status.st_size, status.st_mtime_ns, digest), tensors


def _zip(path: Path, file: BinaryIO, file_bytes: int) -> tuple[Any, Homes, str]:
    """The pickled value, where its storages lie, and a digest of both."""
    archive = Archive(path, file, file_bytes)
    start, size = archive.locate("data.pkl")
    if size > MAX_BYTES:
        raise BadInput([Problem(f"{path}: data.pkl", f"{size:,} bytes", f"names and shapes, in at most {MAX_BYTES:,}", RESAVE)])
    file.seek(start)
    storages: dict[str, _Storage] = {}
    pickles = Pickles(file, size, KNOWN, partial(_storage, storages))
    value = _load(path, pickles)
    homes = {key: archive.locate(f"data/{key}") for key in storages if f"data/{key}" in archive.entries}
    pickles.digest.update(repr(sorted(homes.items())).encode())
    return value, homes, pickles.digest.hexdigest()


def _legacy(path: Path, file: BinaryIO, file_bytes: int) -> tuple[Any, Homes, str]:
    """The same of a file from before torch 1.6."""
    file.seek(0)
    head = file.read(262)
    if head.endswith(b"ustar") and not head.startswith(b"\x80"):
        raise BadInput([Problem(str(path), "a tar archive, as torch made before 0.2", "a later file of torch.save", RESAVE)])
    file.seek(0)
    storages: dict[str, _Storage] = {}
    pickles = Pickles(file, MAX_BYTES, KNOWN, partial(_storage, storages))
    if _load(path, pickles) != MAGIC:
        raise ValueError("it begins with neither a zip archive nor torch's magic number")
    if _load(path, pickles) != PROTOCOL:
        raise ValueError("another version of the format")
    system = _load(path, pickles)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise BadInput([byte_order(path, "sys_info that does not say little_endian")])
    value, keys = _load(path, pickles), _load(path, pickles)
    if not isinstance(keys, list):
        raise ValueError("no list of storages")
    homes, position = {}, file.tell()
    for key in map(_decoded, keys):
        if key not in storages:
            raise ValueError(f"a storage {key} that no tensor has")
        file.seek(position)
        count = int.from_bytes(pickles.read(8), "little")
        nbytes = count * storages[key].kind.itemsize
        homes[key] = position + 8, nbytes
        position += 8 + nbytes
        if position > file_bytes:
            raise ValueError(f"cut short at {file_bytes:,} bytes, before the end of storage {key}")
    return value, homes, pickles.digest.hexdigest()


def _storage(storages: dict[str, _Storage], identity: Any) -> _Storage | Foreign:
    """What a persistent id stands for: ("storage", class, key, location, elements), and in a file before torch 1.6 a view."""
    if not isinstance(identity, tuple) or len(identity) < 4:
        raise ValueError("a persistent id that is none of torch.save")
    if isinstance(identity[1], Foreign):
        return identity[1]  # a module, or a storage of another class: refused by its name
    name, kind, key, _, count, *more = identity
    _, first, length = (more[0] if more else None) or (None, 0, count)
    sound = _decoded(name) == "storage" and all(map(_is_size, (count, first, length)))
    if not sound or not isinstance(kind, _Kind) or first + length > count:
        raise ValueError("a storage of no known class or size")
    storage = _Storage(kind, _decoded(key), *(n * kind.itemsize for n in (count, first, length)))
    storages.setdefault(storage.key, storage)
    return storage


def _load(path: Path, pickles: Pickles) -> Any:
    """The next pickle's value. Raises BadInput with every global that it names and must not, ValueError where it is none."""
    try:
        value = pickles.load()
    except ValueError:
        if not pickles.refused:
            raise
    if not pickles.refused:
        return value
    remedy = "Nothing of it was run. Do not load a file that you do not trust; of one that you do, save the state_dict() alone"
    expected = "only what torch.save writes of tensors"
    raise BadInput(Problem(str(path), f"the global {shown(name)}", expected, remedy) for name in pickles.refused)


def _state_dict(path: Path, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise BadInput([Problem(str(path), _described(value), "a dictionary of tensors", RESAVE)])
    if _has_tensors(value):
        return value
    inside = [name for name in WRAPPERS if isinstance(value.get(name), dict) and _has_tensors(value[name])]
    if len(inside) > 1:
        raise BadInput([Problem(str(path), f"tensors under {' and '.join(inside)}", "one dictionary of tensors", RESAVE)])
    state: Mapping[Any, Any] = value[inside[0]] if inside else value
    return state


def _has_tensors(value: Mapping[Any, Any]) -> bool:
    return any(isinstance(item, _Record) for item in value.values())


def _tensor(path: Path, name: Any, record: Any, homes: Homes) -> LazyTensor:
    """Check one tensor against its storage. Raises BadInput with its problem."""
    subject = f"{path}: {shown(name) if isinstance(name, str) else f'a key of type {name.name}'}"

    def wrong(found: str, expected: str, remedy: str = FETCH) -> BadInput:
        return BadInput([Problem(subject, found, expected, remedy)])

    if not isinstance(name, str) or not name.isprintable():
        raise wrong("a name that is no printable text", "the name of a tensor", RESAVE)
    if not isinstance(record, _Record):
        raise wrong(_described(record), "a tensor", RESAVE)
    if not isinstance(record.storage, _Storage):
        raise wrong("a tensor without a storage", "its values")
    storage, shape, strides = record.storage, record.shape, record.strides
    dtype = storage.kind.dtype if record.dtype is None else record.dtype
    if not isinstance(dtype, np.dtype):
        raise wrong(f"values of type {storage.kind.name}, which are no weights", "numbers that are not quantized")
    if record.metadata:
        raise wrong("values that torch conjugates or negates as it loads them", "values as they are", RESAVE)
    sound = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= MAX_AXES
    if not sound or not all(map(_is_size, (*shape, *strides, record.offset))):
        raise wrong("a shape, strides or an offset that no tensor has", f"sizes of up to {MAX_AXES} axes")
    if storage.key not in homes:
        raise wrong(f"no storage {shown(storage.key)} in the file", "its values")
    start, nbytes = homes[storage.key]
    if not 0 <= nbytes - storage.total < storage.kind.itemsize:
        raise wrong(f"a storage of {nbytes:,} bytes", f"one of {storage.total:,}")
    if math.prod(filter(None, shape)) * dtype.itemsize > max(storage.nbytes, MAX_REPEATED_BYTES):
        raise wrong(f"shape {list(shape)}", f"one that its storage of {storage.nbytes:,} bytes can hold")
    end = 0 if 0 in shape else (record.offset + span(shape, strides)) * dtype.itemsize
    if end > storage.nbytes:
        raise wrong(f"shape {list(shape)} up to byte {end:,} of its storage", f"at most {storage.nbytes:,}")
    start += storage.start + record.offset * dtype.itemsize
    if contiguous(shape, strides):
        return MappedTensor(str(path), start, shape, dtype)
    return StridedTensor(str(path), start, shape, dtype, strides)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE


def _decoded(text: Any) -> str:
    """Text, which a file of Python 2 may hold as bytes. Raises ValueError for anything else."""
    if isinstance(text, bytes):
        text = text.decode("ascii")
    if not isinstance(text, str):
        raise ValueError(f"a {type(text).__name__} in the place of a name")
    return text


def _described(value: Any) -> str:
    names = {_Record: "a tensor", _Storage: "a storage without a tensor", dict: "a dictionary"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
