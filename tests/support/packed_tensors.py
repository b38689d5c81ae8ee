"""Packed modules as their quantizers write them, packed word by word from the formats' descriptions
(docs/format/quantized-layouts.md, sections 5 to 9b), and any part of what is unpacked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import dask
import dask.array as da
import numpy as np
from hypothesis import strategies as st

from pipeline.tensor.placement import Region, extent, intersect, shift, slices
from pipeline.tensor.tensors import Block
from stages.read import read
from tests.support.lazy import held

Name = TypeVar("Name")  # a text, or a TensorName

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
CHUNKS = (1, 150, 1 << 20)  # bytes: a row each, a few rows, all


def opened(parameters: Mapping[Name, np.ndarray], block_bytes: int = 1 << 20) -> dict[Name, da.Array]:
    """Parameters as they come from a file, in chunks of at most `block_bytes`, but for a row."""
    return dict(read(held(parameters), block_bytes, 1))


def part(array: da.Array, region: Region) -> np.ndarray:
    """A region of a lazy array, read from its blocks as a task does: no more than the region of each."""
    result = np.empty(extent(region), dtype=array.dtype)
    for index in np.ndindex(*array.numblocks):
        place = tuple((sum(axis[:i]), sum(axis[: i + 1])) for axis, i in zip(array.chunks, index, strict=True))
        common = intersect(place, region)
        if common is None:
            continue
        block = dask.get(dict(array.dask), (array.name, *index))
        values = block.read(shift(common, [start for start, _ in place], -1))
        assert values.dtype == array.dtype
        result[slices(shift(common, [start for start, _ in region], -1))] = values
    return result


def blocks(array: da.Array) -> list[Block]:
    """The blocks of a lazy array, still unread."""
    return [dask.get(dict(array.dask), (array.name, *index)) for index in np.ndindex(*array.numblocks)]


def word(codes: Sequence[int], bits: int) -> int:
    """A 32-bit word of unsigned codes, the first in the lowest bits, as a signed integer."""
    assert len(codes) * bits == 32
    value = 0
    for i, code in enumerate(codes):
        value |= int(code) << (bits * i)
    return value - (1 << 32) if value >> 31 else value


def words_down(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [rows, columns] as int32 [rows / p, columns]: a word holds p rows of a column."""
    p = 32 // bits
    rows, columns = codes.shape
    result = np.empty((rows // p, columns), dtype=np.int32)
    for j in range(rows // p):
        for n in range(columns):
            result[j, n] = word([codes[p * j + i, n] for i in range(p)], bits)
    return result


def words_across(codes: np.ndarray, bits: int, order: Sequence[int] | None = None) -> np.ndarray:
    """Codes [rows, columns] as int32 [rows, columns / p]: a word holds p columns of a row, in `order`."""
    p = 32 // bits
    rows, columns = codes.shape
    result = np.empty((rows, columns // p), dtype=np.int32)
    for row in range(rows):
        for j in range(columns // p):
            result[row, j] = word([codes[row, p * j + i] for i in (order or range(p))], bits)
    return result


def gptq(codes: np.ndarray, stored: np.ndarray, scales: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """Unsigned codes [N, K], zero points as stored and scales [G, N]."""
    return {"qweight": words_down(codes.T, bits), "qzeros": words_across(stored, bits), "scales": scales}


def awq(codes: np.ndarray, stored: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "qweight": words_across(codes.T, 4, AWQ_COLUMNS),
        "qzeros": words_across(stored, 4, AWQ_COLUMNS),
        "scales": scales,
    }


def compressed(codes: np.ndarray, stored: np.ndarray | None, scales: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """Scales come as [G, N] and are stored as [N, G]; zero points [G, N] are packed along N."""
    result = {
        "weight_packed": words_across(codes, bits),
        "weight_scale": np.ascontiguousarray(scales.T),
        "weight_shape": np.array(codes.shape, dtype=np.int64),
    }
    return result | ({} if stored is None else {"weight_zero_point": words_down(stored.T, bits)})


def modelopt(codes: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    """Unsigned codes [N, K] as two's complement nibbles, two out-features a byte."""
    out, features = codes.shape
    weight = np.empty((out // 2, features), dtype=np.uint8)
    for i in range(out // 2):
        for k in range(features):
            low, high = (int(codes[2 * i + half, k]) - 8 for half in (0, 1))
            weight[i, k] = (low & 15) + 16 * (high & 15)
    return {"weight": weight, "weight_scale": np.ascontiguousarray(scales.T)}


def expected_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Canonical codes: uint8 [N, K * bits / 8], even k in the low half."""
    return codes.astype(np.uint8) if bits == 8 else (codes[:, 0::2] + 16 * codes[:, 1::2]).astype(np.uint8)


def naive_weight(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, index: np.ndarray | None = None, smooth: np.ndarray | None = None
) -> np.ndarray:
    """float32 [N, K]: (code - zero point) * scale of its group, one by one. `zeros` are the points themselves, [G, N]."""
    out, features = codes.shape
    size = features // len(scales)
    result = np.empty((out, features), dtype=np.float32)
    for n in range(out):
        for k in range(features):
            g = k // size if index is None else int(index[k])
            value = np.float32(int(codes[n, k]) - int(zeros[g, n])) * np.float32(scales[g, n])
            result[n, k] = value if smooth is None else value * np.float32(smooth[k])
    return result


@st.composite
def shapes(draw: st.DrawFn, out: int, features: int) -> tuple[int, int, int]:
    """(N, K, groups): N a multiple of `out`, K of `features`, and groups that divide K."""
    n, k = out * draw(st.integers(1, 5)), features * draw(st.integers(1, 5))
    return n, k, draw(st.sampled_from([g for g in range(1, k + 1) if k % g == 0 and (k // g) % 2 == 0]))


def random_codes(shape: tuple[int, ...], bits: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, shape)


def random_scales(shape: tuple[int, ...], seed: int, dtype: np.dtype | type = np.float16) -> np.ndarray:
    return np.random.default_rng(seed + 1).uniform(0.001, 0.1, shape).astype(dtype)
