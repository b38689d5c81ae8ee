"""Read arrays, and turn numbers of one type into another: by bits and tables of this module's own, so that NumPy is all it needs.

Arrays of bfloat16 and float8 are read as ml_dtypes' types, whose names and sizes alone are used.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import LazyTensor

# The bits of infinity, which those of each smaller number are below, and of each negative one above.
_INFINITIES: dict[str, np.uint16 | np.uint32] = {
    "float32": np.uint32(0x7F800000),
    "bfloat16": np.uint16(0x7F80),
    "float16": np.uint16(0x7C00),
}
UINT8 = np.dtype(np.uint8)
# The 8-bit floats, by name: bits of the exponent, bits of the mantissa, the exponent's bias, whether the format has infinities.
_SMALL = {
    "float8_e4m3fn": (4, 3, 7, False),
    "float8_e5m2": (5, 2, 15, True),
}


class Buffers:
    """Arrays by what they hold, used again by one thread for block after block, so that they stay in the processor's cache."""

    def __init__(self) -> None:
        self._bytes: dict[str, np.ndarray] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        """An array with any values, which is the caller's until the next one of the same name."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        held = self._bytes.get(name)
        if held is None or len(held) < nbytes:
            self._bytes[name] = held = np.empty(nbytes, UINT8)
        result: np.ndarray = held[:nbytes].view(dtype).reshape(shape)
        return result


def read(tensor: LazyTensor, region: Region | None = None) -> np.ndarray:
    """Read a region of a tensor, or all of it, in its own type, as an array that must not be changed.

    `region`: (start, stop) of each axis. Of a file, the array is a view of mapped pages where that is possible.
    """
    region = tuple((0, n) for n in tensor.shape) if region is None else region
    return tensor.block(region).read(tuple((0, stop - start) for start, stop in region))


def read_again(tensor: LazyTensor, region: Region, buffers: Buffers, name: str) -> np.ndarray:
    """Read a region as `read` does, of a local file into the buffer of a name: until the next array of that name."""
    block = tensor.block(region)
    out = buffers.array(name, block.shape, tensor.dtype)
    if block.read_into(out.reshape(-1).view(UINT8)):
        return out
    return block.read(tuple((0, length) for length in block.shape))


def is_float(dtype: np.dtype) -> bool:
    """Whether a type is one of numbers with an exponent, and not one of codes."""
    return dtype.name.startswith(("float", "bfloat"))


def plainly_positive(values: np.ndarray) -> bool:
    """Whether all numbers of an array are finite, and 0 or more, as their bits tell at once; False of -0.0 and other types too."""
    infinity = _INFINITIES.get(values.dtype.name)
    return infinity is not None and bool(values.view(infinity.dtype).max(initial=0) < infinity)


def to_float32(values: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The same numbers as float32, which holds those of every smaller type; float64 is rounded.

    `values`: of any type. `out`: float32, contiguous, of the same shape, to compute in. Values that are float32 are returned
    themselves.
    """
    kind = values.dtype.name
    if kind == "float32":
        return values
    if out is None:
        out = np.empty(values.shape, np.float32)
    if kind == "bfloat16":
        wide = out.view(np.uint32)
        np.copyto(wide, values.view(np.uint16))
        np.left_shift(wide, 16, out=wide)
    elif kind == "float16":
        np.take(_half_table(), values.view(np.uint16), out=out, mode="clip")
    elif kind.startswith("float8"):
        np.take(_byte_table(kind), values.view(np.uint8), out=out, mode="clip")
    else:
        np.copyto(out, values, casting="unsafe")
    return out


def rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Numbers of a floating type in another one, rounded once, to nearest, halves to even. NaN stays NaN."""
    if values.dtype == dtype:
        return values
    wide = to_float32(values)
    if dtype.name != "bfloat16":
        with np.errstate(over="ignore", invalid="ignore"):  # too large for float16 becomes infinity
            return wide.astype(dtype)
    data = np.ascontiguousarray(wide).view(np.uint32)
    nearest = data >> 16
    nearest &= 1
    nearest += 0x7FFF
    nearest += data
    nearest >>= 16
    nearest[np.isnan(wide)] = 0x7FC0
    return nearest.astype(np.uint16).view(dtype)


def halves(data: np.ndarray, high_first: bool = False) -> np.ndarray:
    """The two halves of each byte, uint8 [..., 2 n] of uint8 [..., n], the low one first or the high one."""
    wide = data.astype("<u2", order="C")
    if high_first:
        wide = wide >> 4 | wide << 8
    else:
        wide |= wide << 4
    wide &= 0x0F0F
    return wide.view(np.uint8)


def signed_pairs(data: np.ndarray) -> np.ndarray:
    """Two's complement int4 of two rows a byte, int8 [2 n, columns] of uint8 [n, columns]: row 2 i is in the low half of row i."""
    both = np.empty((len(data), 2, *data.shape[1:]), np.uint8)
    np.bitwise_and(data, 15, out=both[:, 0])
    np.right_shift(data, 4, out=both[:, 1])
    both ^= 8
    both -= 8
    return both.reshape(-1, *data.shape[1:]).view(np.int8)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of one type and shape are equal bit for bit, NaN and signs of zeros included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return np.array_equal(*_words(a, b))


def _words(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays as unsigned integers as wide as rows and addresses allow: few are compared, and none is copied to be aligned."""
    size = a.dtype.itemsize
    rows = [each for each in (a, b) if each.ndim and each.shape[-1] > 1]
    if not all(each.strides[-1] == size for each in rows) or not rows:
        kind = np.dtype(f"u{size}")
        return a.view(kind), b.view(kind)
    a, b = a.view(UINT8), b.view(UINT8)
    for width in (8, 4, 2):
        numbers = [a.shape[-1], *(n for each in (a, b) for n in (each.ctypes.data, *each.strides[:-1]))]
        if all(number % width == 0 for number in numbers):
            return a.view(f"u{width}"), b.view(f"u{width}")
    return a, b


@cache
def _half_table() -> np.ndarray:
    """The number that each pattern of float16 stands for, float32 [65536]."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


@cache
def _byte_table(kind: str) -> np.ndarray:
    """The number that each byte of an 8-bit float stands for, float32 [256], by the definition of the format."""
    codes = np.arange(256)
    if kind == "float8_e8m0fnu":  # powers of two alone
        powers = np.ldexp(1.0, codes - 127)
        powers[255] = np.nan
        return powers.astype(np.float32)
    exponent_bits, mantissa_bits, bias, infinite = _SMALL[kind]
    mantissa, exponent = codes & ((1 << mantissa_bits) - 1), codes >> mantissa_bits & ((1 << exponent_bits) - 1)
    numbers = np.ldexp(mantissa + np.where(exponent, 1 << mantissa_bits, 0), np.maximum(exponent, 1) - bias - mantissa_bits)
    last = exponent == (1 << exponent_bits) - 1
    if infinite:
        numbers[last] = np.where(mantissa[last] == 0, np.inf, np.nan)
    else:
        numbers[last & (mantissa == (1 << mantissa_bits) - 1)] = np.nan
    result: np.ndarray = np.where(codes < 128, numbers, -numbers).astype(np.float32)
    return result
