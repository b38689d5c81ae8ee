"""The objects that files of torch.save pickle, as records: what stands for each global and each persistent id of such a pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.model.dtypes import BY_SAFETENSORS, TABLE
from stages.read.pickles import MAX_LINE, Foreign, set_items

MAX_SIZE = 1 << 62  # of a number in a file, so that products of sizes stay printable

_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16",
    "Long": "I64", "Int": "I32", "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL",
}  # fmt: skip
# The size in bytes of an element of the types that weights cannot have.
_OTHERS = {"QInt8": 1, "QUInt8": 1, "QInt32": 4, "QUInt4x2": 1, "QUInt2x4": 1, "ComplexFloat": 8, "ComplexDouble": 16}


@dataclass(frozen=True)
class StorageClass:
    """A class of storages: its name, the bytes of an element, and its dtype; None for a type that weights cannot have."""

    name: str
    itemsize: int
    dtype: np.dtype | None = None


@dataclass(frozen=True)
class StorageView:
    """A view of the storage `key`, which has `total` bytes: the `nbytes` bytes from byte `start`."""

    kind: StorageClass
    key: str
    total: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class TensorRecord:
    """A pickled tensor, unchecked: the arguments of torch's `_rebuild_tensor_v3`, which has those of `_rebuild_tensor_v2` too."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    requires_grad: Any
    hooks: Any
    dtype: Any = None
    metadata: Any = None


def _rebuild_v2(storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, metadata: Any = None) -> TensorRecord:
    return TensorRecord(storage, offset, shape, strides, grad, hooks, None, metadata)


def _ordered_dict(pairs: Any = ()) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        set_items(result, [key, value])
    return result


# What stands for each global that a file may name. Nothing is ever imported by a name from a file.
KNOWN: Mapping[str, Any] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": lambda sizes=(): sizes,
    "torch._utils._rebuild_parameter": lambda tensor, _grad, _hooks: tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_v2,
    "torch._utils._rebuild_tensor_v3": TensorRecord,
    "torch.storage.UntypedStorage": StorageClass("UntypedStorage", 1),
    **{f"torch.{row.numpy.name}": row.numpy for row in TABLE},  # torch and NumPy have the same names for these
    **{
        f"torch.{name}Storage": StorageClass(f"{name}Storage", BY_SAFETENSORS[row].numpy.itemsize, BY_SAFETENSORS[row].numpy)
        for name, row in _STORAGES.items()
    },
    **{f"torch.{name}Storage": StorageClass(f"{name}Storage", itemsize) for name, itemsize in _OTHERS.items()},
}


def storage_view(storages: dict[str, StorageView], identity: Any) -> StorageView | Foreign:
    """Return the storage that a persistent id stands for, and add it to `storages` by its key.

    The id is ("storage", class, key, location, number of elements) and, before torch 1.6, a view (key, first element, length) or
    None. Returns Foreign for an unknown class of objects. Raises ValueError for anything else.
    """
    if not isinstance(identity, tuple) or len(identity) < 4:
        raise ValueError("a persistent id that is none of torch.save")
    if isinstance(identity[1], Foreign):
        return identity[1]  # a module, or another class of storage: refused by its name
    name, kind, key, _, count, *more = identity
    _, first, length = (more[0] if more else None) or (None, 0, count)
    sound = decoded(name) == "storage" and all(map(is_size, (count, first, length)))
    if not sound or not isinstance(kind, StorageClass) or first + length > count:
        raise ValueError("a storage of no known class or size")
    storage = StorageView(kind, decoded(key), *(n * kind.itemsize for n in (count, first, length)))
    storages.setdefault(storage.key, storage)
    return storage


def is_size(value: Any) -> bool:
    """Return whether a value is an integer from 0 to MAX_SIZE."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE


def decoded(text: Any) -> str:
    """Return a short string, also from ASCII bytes, which files of Python 2 have. Raises ValueError for anything else."""
    if isinstance(text, str | bytes) and len(text) > MAX_LINE:  # bytes would be copied for each storage that is named by them
        raise ValueError(f"a storage's name of {len(text):,} bytes")
    if isinstance(text, bytes):
        text = text.decode("ascii")
    if not isinstance(text, str):
        raise ValueError(f"a {type(text).__name__} in the place of a name")
    return text
