"""Read files of torch.save (.bin, .pt, .pth) without torch, and without running what they pickle.

Both formats of these files keep a pickle of names, shapes and strides apart from the storages, each of which is one run of bytes:

    since torch 1.6   a zip archive, stored: */data.pkl, and a record */data/<key> for each storage
    before            pickles of a magic number, a version, sys_info, the object and the storages' keys; then each storage

So a tensor is a mapped byte range, as in any other container, or a set of elements at strides within one.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.documents import open_regular
from pipeline.errors import BadInput, Problem
from pipeline.tensor.source_file import SourceFile, source_file
from pipeline.tensor.system_errors import naming
from pipeline.tensor.tensors import LazyTensor
from stages.read.mapped import MappedTensor
from stages.read.pickles import MAX_BYTES, Pickles
from stages.read.strided import StridedTensor, contiguous, span
from stages.read.torch_archive import RESAVE, Archive, byte_order, shown
from stages.read.torch_records import KNOWN, StorageView, TensorRecord, decoded, is_size, storage_view

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
MAX_AXES = 8  # more than any checkpoint has, fewer than NumPy allows
MAX_REPEATED_BYTES = 1 << 30  # of an expanded tensor (stride 0), which can be larger than its storage
WRAPPERS = ("state_dict", "model", "module")  # the keys under which training scripts keep the state dict
HEAD_BYTES = 64 << 10  # of a file, that are looked at again when it has been read
FETCH = "The file is damaged or cut short: fetch it again"

Homes = Mapping[str, tuple[int, int]]  # of each storage by key: the offset of its first byte in the file, and its size in bytes


def open_file(path: Path) -> tuple[SourceFile, dict[str, LazyTensor]]:
    """Read and check the index of a file; return the file's fingerprint and its tensors by name.

    The file must hold a dictionary of tensors, or one such dictionary under a key of WRAPPERS. Raises BadInput with every problem
    of the file, and OSError where it cannot be read.
    """
    with naming(path), open_regular(path) as file:
        status = os.fstat(file.fileno())
        try:
            read = _zip if file.read(4) == b"PK\3\4" else _legacy
            value, homes, digest = read(path, file, status.st_size)
            file.seek(0)
            head = file.read(HEAD_BYTES)
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
    return source_file(path, status, head, digest), tensors


def _zip(path: Path, file: BinaryIO, file_bytes: int) -> tuple[Any, Homes, str]:
    """Read a zip archive: return the pickled value, the places of its storages, and a digest of both."""
    archive = Archive(path, file, file_bytes)
    start, size = archive.locate("data.pkl")
    if size > MAX_BYTES:
        raise BadInput([Problem(f"{path}: data.pkl", f"{size:,} bytes", f"names and shapes, in at most {MAX_BYTES:,}", RESAVE)])
    file.seek(start)
    storages: dict[str, StorageView] = {}
    pickles = Pickles(file, size, KNOWN, partial(storage_view, storages))
    value = _load(path, pickles)
    homes = {key: archive.locate(f"data/{key}") for key in storages if f"data/{key}" in archive.entries}
    pickles.digest.update(repr(sorted(homes.items())).encode())
    return value, homes, pickles.digest.hexdigest()


def _legacy(path: Path, file: BinaryIO, file_bytes: int) -> tuple[Any, Homes, str]:
    """Read a file from before torch 1.6: return the pickled value, the places of its storages, and a digest of both."""
    file.seek(0)
    head = file.read(262)
    if head.endswith(b"ustar") and not head.startswith(b"\x80"):
        raise BadInput([Problem(str(path), "a tar archive, as torch made before 0.2", "a later file of torch.save", RESAVE)])
    file.seek(0)
    storages: dict[str, StorageView] = {}
    pickles = Pickles(file, MAX_BYTES, KNOWN, partial(storage_view, storages))
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
    for key in map(decoded, keys):
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


def _load(path: Path, pickles: Pickles) -> Any:
    """Return the next pickle's value. Raises BadInput with every global that is not in KNOWN, ValueError for a damaged pickle."""
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
    """Return the dictionary of tensors in a file's value. Raises BadInput where there is none, or more than one."""
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
    return any(isinstance(item, TensorRecord) for item in value.values())


def _tensor(path: Path, name: Any, record: Any, homes: Homes) -> LazyTensor:
    """Check one tensor against its storage, and return it. Raises BadInput with its problem."""
    subject = f"{path}: {shown(name) if isinstance(name, str) else f'a key of type {name.name}'}"

    def wrong(found: str, expected: str, remedy: str = FETCH) -> BadInput:
        return BadInput([Problem(subject, found, expected, remedy)])

    if not isinstance(name, str) or not name.isprintable():
        raise wrong("a name that is no printable text", "the name of a tensor", RESAVE)
    if not isinstance(record, TensorRecord):
        raise wrong(_described(record), "a tensor", RESAVE)
    if not isinstance(record.storage, StorageView):
        raise wrong("a tensor without a storage", "its values")
    storage, shape, strides = record.storage, record.shape, record.strides
    dtype = storage.kind.dtype if record.dtype is None else record.dtype
    if not isinstance(dtype, np.dtype):
        raise wrong(f"values of type {storage.kind.name}, which are no weights", "numbers that are not quantized")
    if record.metadata:
        raise wrong("values that torch conjugates or negates as it loads them", "values as they are", RESAVE)
    sound = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= MAX_AXES
    if not sound or not all(map(is_size, (*shape, *strides, record.offset))):
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


def _described(value: Any) -> str:
    names = {TensorRecord: "a tensor", StorageView: "a storage without a tensor", dict: "a dictionary"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
