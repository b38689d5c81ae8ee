"""The kernels of verification that this process uses: in C where they were built and the environment says nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline import native
from stages.verify.kernels import words as twins
from stages.verify.values import UINT8

try:
    from stages.verify.kernels import _kernels
except ImportError as error:  # it was not built, or for another system
    _missing = str(error)
else:
    _missing = ""

_INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def in_c() -> bool:
    """Whether this process uses the kernels in C. Raises BadInput where HEADRACE_KERNELS asks for what there is not."""
    return native.native(_missing)


def compared(*arguments: Any) -> tuple[float, float, float, float, float] | None:
    """`compared` of _kernels.pyi, where `in_c`."""
    return _kernels.compared(*arguments)


def kept(*arguments: Any) -> tuple[float, float, float, float, float] | None:
    """`kept` of _kernels.pyi, where `in_c`."""
    return _kernels.kept(*arguments)


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool | None:
    """Whether two arrays of one type and shape [n, ...] are equal bit for bit; None where the kernels cannot say."""
    if a.ndim not in (1, 2) or not a.size or not all(each.strides[-1] == each.itemsize for each in (a, b)) or not in_c():
        return None
    if any(each.ndim == 2 and each.strides[0] < each.shape[1] * each.itemsize for each in (a, b)):
        return None
    return _kernels.same_bytes(a.view(UINT8), b.view(UINT8))


def words_as_rows(words: np.ndarray, out: np.ndarray) -> None:
    """Words of 32 bits [m, n] as rows `out`, uint32 [n, m], which may be columns of a wider matrix."""
    if in_c():
        _kernels.words_as_rows(rows_contiguous(words), out)
    else:
        twins.words_as_rows(words, out)


def columns_as_rows(words: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
    """Words of 32 bits [m, n] as rows `out`, uint8 [8 n, m / 2], as the twin has it, which may be columns of a wider matrix."""
    if in_c():
        _kernels.columns_as_rows(rows_contiguous(words), places, out)
    else:
        twins.columns_as_rows(words, places, out)


def _passed(values: np.ndarray) -> np.ndarray:
    """An array as the module takes it: bit patterns as integers, where a buffer does not know the type."""
    return values if values.dtype == np.float32 else values.view(_INTEGERS[values.itemsize])


def contiguous(values: np.ndarray) -> np.ndarray:
    """The same, contiguous and aligned."""
    return np.require(_passed(values), requirements=("C", "A"))


def rows_contiguous(values: np.ndarray) -> np.ndarray:
    """A matrix as the module takes it where only the rows need be contiguous: a part of a wider one is not copied."""
    size = values.itemsize
    if values.flags.aligned and values.strides[1] == size and values.strides[0] >= values.shape[1] * size:
        return _passed(values)
    return contiguous(values)
