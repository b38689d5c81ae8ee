"""Regions of canonical codes, scales and zero points (AXES in pipeline/tensor/tensors.py), of integers as sources store them."""

from __future__ import annotations

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, extent, whole
from pipeline.tensor.tensors import Block


def transposed(region: Region, values: Block) -> np.ndarray:
    """[groups, n] of [n, groups]."""
    return np.ascontiguousarray(values.read((region[1], region[0])).T)


def by_group(region: Region, values: Block) -> np.ndarray:
    """[groups, n] of scales or zero points [n, groups], [n], or one that is of all rows."""
    if values.size == 1:
        return np.full(extent(region), np.asarray(values.read(whole(values.shape))).reshape(-1)[0], dtype=values.dtype)
    if values.ndim == 1:
        return np.asarray(values.read((region[1],)))[None]
    return transposed(region, values)


def as_bytes(region: Region, words: Block) -> np.ndarray:
    """uint8 [n, K * bits / 8]: words of unsigned codes are the stream of codes already."""
    values = np.ascontiguousarray(words.read((region[0], whole(words.shape)[1])))
    return values.view(np.uint8)[:, slice(*region[1])]


def biased(region: Region, values: Block) -> np.ndarray:
    """uint8 [n, K] of int8: 128 more."""
    signed = values.read(region)
    with meter("unpack", signed.nbytes):
        return signed.view(np.uint8) ^ np.uint8(0x80)


def in_pairs(region: Region, values: Block) -> np.ndarray:
    """uint8 [n, K / 2]: codes from -8 to 7, one a byte, as two unsigned ones. Raises BadInput where a code has more bits."""
    signed = np.asarray(values.read((region[0], (2 * region[1][0], 2 * region[1][1]))))
    with meter("unpack", signed.nbytes):
        unsigned = (signed + np.int8(8)).view(np.uint8)
        if unsigned.size and unsigned.max() > 15:
            wrong = signed[unsigned > 15][0]
            raise BadInput([Problem("an int8 weight of compressed-tensors", f"a code of {wrong}", "-8 to 7, as num_bits is 4")])
        return unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)


def no_offsets(region: Region, scales: Block) -> np.ndarray:  # noqa: ARG001
    """int16 [groups, n] of zeros: the format is symmetric."""
    return np.zeros(extent(region), dtype=np.int16)


def signed_offsets(region: Region, zeros: Block) -> np.ndarray:
    """int16 [groups, n]: a signed zero point is counted from the middle of the range."""
    return -by_group(region, zeros).astype(np.int16)


def read_offsets(region: Region, zeros: Block, bits: int) -> np.ndarray:
    """int16 [groups, n]: 2 ** (bits - 1) less the zero point, of words [N / p, groups] that are packed along N."""
    packed = 32 // bits
    first, last = region[1][0] // packed, -(-region[1][1] // packed)
    words = np.ascontiguousarray(zeros.read(((first, last), region[0]))).view(np.uint32)
    with meter("unpack", words.nbytes):
        stored = np.stack([(words >> (bits * i)) & ((1 << bits) - 1) for i in range(packed)], axis=1)
        stored = stored.reshape(-1, words.shape[1]).T.astype(np.int16)
        result = ((1 << (bits - 1)) - stored).astype(np.int16)
    return np.ascontiguousarray(result[:, region[1][0] - first * packed : region[1][1] - first * packed])


def read_index(region: Region, index: Block, groups: int) -> np.ndarray:
    """int32 [k]: the group of each in-feature; consecutive ones, where the source has -1 throughout."""
    values = np.asarray(index.read(whole(index.shape)))
    if np.all(values == -1):
        values = np.arange(values.size) // (values.size // groups)
    return values[slice(*region[0])].astype(np.int32)
