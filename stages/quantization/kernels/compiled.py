"""The kernels in C as `Kernels` of dispatch.py has them: arrays as the module takes them, and room for what it gives."""

from __future__ import annotations

from contextlib import suppress

import ml_dtypes
import numpy as np

from pipeline.errors import BadInput
from stages.quantization.finite import not_finite
from stages.quantization.kernels import casts, gguf_blocks
from stages.quantization.kernels.layout import KernelLayout
from stages.quantization.kernels.smoothed import Product

with suppress(ImportError):  # then chosen.py chooses the twins
    from stages.quantization.kernels import _kernels

FLOAT8, FLOAT32 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.float32)
_INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_NUMBERS = ("float16", "bfloat16", "float32")
_CASTS = {(a, b) for a in (*_NUMBERS, FLOAT8.name) for b in _NUMBERS if a != b}


def weight_only_scales(values: np.ndarray, bits: int, segments: int, name: str) -> np.ndarray:
    """float32 [n, segments]."""
    scales = np.empty((len(values), segments), dtype=np.float32)
    _finite(_kernels.weight_only_scales(_whole(values), values.dtype.name, segments, bits, scales), name)
    return scales


def weight_only_codes(values: np.ndarray, layout: KernelLayout, segments: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n / columns, columns * K * bits / 8], and float32 [n, segments]."""
    bits, columns, kind = layout.bits, layout.columns, values.dtype.name
    codes = np.empty((len(values) // columns, columns * values.shape[1] * bits // 8), dtype=np.uint8)
    scales = np.empty((len(values), segments), dtype=np.float32)
    _finite(_kernels.weight_only_codes(_whole(values), kind, segments, bits, columns, layout.mixed, scales, codes), name)
    return codes, scales


def float8_scales(values: np.ndarray, segments: int, clamp: float, name: str) -> np.ndarray:
    """float32 [n, segments]."""
    numbers = _numbers(values)
    scales = np.empty((len(values), segments), dtype=np.float32)
    _finite(_kernels.float8_scales(_whole(numbers), numbers.dtype.name, segments, clamp, scales), name)
    return scales


def float8_codes(values: np.ndarray, segments: int, clamp: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    """float8_e4m3fn [n, K], and float32 [n, segments]."""
    numbers = _numbers(values)
    codes, scales = np.empty(values.shape, dtype=np.uint8), np.empty((len(values), segments), dtype=np.float32)
    _finite(_kernels.float8_codes(_whole(numbers), numbers.dtype.name, segments, clamp, scales, codes), name)
    return codes.view(FLOAT8), scales


def float8_rescaled(codes: np.ndarray, scale: np.float32, common: np.float32) -> np.ndarray:
    """float8_e4m3fn, in the shape of the codes."""
    result = np.empty(codes.shape, dtype=np.uint8)
    _kernels.float8_rescaled(_whole(codes).reshape(-1), float(scale), float(common), result.reshape(-1))
    return result.view(FLOAT8)


def cast(values: np.ndarray, to: np.dtype) -> np.ndarray:
    """In another type. Types that few tensors have are left to NumPy."""
    to = np.dtype(to)
    if (values.dtype.name, to.name) not in _CASTS or not (values.dtype.isnative and to.isnative):
        return casts.cast(values, to)
    result = np.empty(values.shape, dtype=to)
    rows = _rows(values) if values.ndim == 2 else _whole(values).reshape(1, -1)
    _kernels.cast(rows, values.dtype.name, to.name, _passed(result).reshape(rows.shape))
    return result


def arranged(stream: np.ndarray, layout: KernelLayout) -> np.ndarray:
    """uint8 [n / columns, columns * K * bits / 8]."""
    result = np.empty((len(stream) // layout.columns, layout.columns * stream.shape[1]), dtype=np.uint8)
    _kernels.arranged(_whole(stream), layout.bits, layout.columns, layout.mixed, result)
    return result


def transposed(words: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """uint32 [n, m]."""
    result = np.empty(words.shape[::-1], dtype=np.uint32) if out is None else out
    _kernels.transposed(_rows(words), result)
    return result


def awq_codes(words: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 [8 * n, K / 2]."""
    result = np.empty((8 * words.shape[1], words.shape[0] // 2), dtype=np.uint8) if out is None else out
    _kernels.awq_codes(_rows(words), result)
    return result


def gguf_numbers(packed: np.ndarray, kind: str, to: np.dtype = FLOAT32) -> np.ndarray:
    """[..., elements]. Types that few files have are left to the package."""
    sizes = _kernels.gguf_types().get(kind)
    if sizes is None or to.name not in _NUMBERS or not to.isnative:
        return cast(gguf_blocks.gguf_numbers(packed, kind), to)
    size, elements = sizes
    result = np.empty((*packed.shape[:-1], packed.shape[-1] // size * elements), dtype=to)
    _kernels.gguf_numbers(_whole(packed).reshape(-1), kind, to.name, _passed(result).reshape(-1))
    return result


def column_magnitudes(values: np.ndarray) -> np.ndarray:
    """uint16 [K]."""
    result = np.empty(values.shape[1], dtype=np.uint16)
    _kernels.column_magnitudes(_rows(values), result)
    return result


def smoothed_magnitudes(values: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """uint16 [n]."""
    result = np.empty(len(values), dtype=np.uint16)
    _kernels.smoothed_magnitudes(_rows(values), np.require(factors, requirements=("C", "A")), result)
    return result


def smoothed(values: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float16 [n, K], and uint16 [n]."""
    result, most = np.empty(values.shape, dtype=np.uint16), np.empty(len(values), dtype=np.uint16)
    _kernels.smoothed(_rows(values), np.require(factors, requirements=("C", "A")), most, result)
    return result.view(np.float16), most


def smoothed_codes(values: np.ndarray, scales: np.ndarray, product: Product, out: np.ndarray | None = None) -> np.ndarray:
    """int8 [n, K]."""
    result = np.empty(values.shape, dtype=np.int8) if out is None else out
    _kernels.smoothed_codes(_rows(values), _whole(scales), product, result.view(np.uint8))
    return result


def _passed(values: np.ndarray) -> np.ndarray:
    """An array as the module takes it: bit patterns as integers, where a buffer does not know the type."""
    return values if values.dtype == np.float32 else values.view(_INTEGERS[values.itemsize])


def _whole(values: np.ndarray) -> np.ndarray:
    """The same, contiguous and aligned: a file's bytes may lie anywhere."""
    return np.require(_passed(values), requirements=("C", "A"))


def _rows(values: np.ndarray) -> np.ndarray:
    """A matrix as the module takes it where only the rows need be contiguous: a part of a wider one is not copied."""
    size = values.itemsize
    if values.flags.aligned and values.strides[1] == size and values.strides[0] >= values.shape[1] * size:
        return _passed(values)
    return _whole(values)


def _numbers(values: np.ndarray) -> np.ndarray:
    """Of a type that the module knows."""
    return values if values.dtype.name in _NUMBERS else values.astype(np.float32)


def _finite(whole: bool, name: str) -> None:
    if not whole:
        raise BadInput([not_finite(name)])
