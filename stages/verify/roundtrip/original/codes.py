"""Codes of packed weights: out of their 32-bit words, and into numbers by scales and zero points of groups."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from stages.verify.values import Buffers, halves


class LastBlock(threading.local):
    """The block that was unpacked last, of whichever module; each thread keeps its own."""

    def __init__(self) -> None:
        self._last: tuple[Any, Any] | None = None
        self.buffers = Buffers()  # for the block and what it is made of

    def __reduce__(self) -> tuple[type[LastBlock], tuple[()]]:
        return LastBlock, ()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value of `key`, made unless it is the last one."""
        if self._last is None or self._last[0] != key:
            self._last = None  # not two blocks at once
            self._last = (key, make())
        return self._last[1]


def unpack_codes(words: np.ndarray, bits: int) -> np.ndarray:
    """Unpack 32-bit words, int32 [..., n], to their codes, uint8 [..., n * 32 / bits], lowest bits first.

    `bits` is 2, 3, 4 or 8; codes of 3 bits go over the ends of words.
    """
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits >= 4:
        return data if bits == 8 else halves(data)
    each = np.unpackbits(data, axis=-1, bitorder="little").reshape(*data.shape[:-1], -1, bits)
    codes = each[..., 0].copy()
    for bit in range(1, bits):
        codes |= each[..., bit] << np.uint8(bit)
    return codes


def unpack_planes(words: np.ndarray, bits: int) -> np.ndarray:
    """Unpack words in planes, int32 [rows, n], to their codes, uint8 [rows, n * 32 / bits].

    32 codes are `bits` words: first those of 4 bits of each code (of 3 bits: of 2), then those of the bits above.
    """
    data = np.ascontiguousarray(words).reshape(len(words), -1, bits)
    each = np.unpackbits(data.view(np.uint8), axis=-1, bitorder="little")  # [rows, blocks, 32 * bits]
    codes, bit, first = np.zeros((*each.shape[:2], 32), np.uint8), 0, 0
    for width in {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}[bits]:
        plane = each[..., first : first + 32 * width].reshape(*each.shape[:2], 32, width)
        for place in range(width):
            codes |= plane[..., place] << np.uint8(bit + place)
        bit, first = bit + width, first + 32 * width
    return codes.reshape(len(words), -1)


def dequantize(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, index: np.ndarray | None) -> np.ndarray:
    """Compute (code - zero) * scale of each in-feature's group, float32 [rows, in_features].

    `codes`: uint8 [rows, in_features]. `zeros`, `scales`: float32 [rows, groups]. `index`: int64 [in_features], the group of each
    in-feature, or None where groups are consecutive in-features.
    """
    result = codes.astype(np.float32)
    if index is not None:
        result -= zeros[:, index]
        result *= scales[:, index]
        return result
    groups = zeros.shape[1]
    by_group = result.reshape(len(codes), groups, codes.shape[1] // groups)
    by_group -= zeros[:, :, None]
    by_group *= scales[:, :, None]
    return result


def explicit_groups(index: np.ndarray | None, groups: int) -> np.ndarray | None:
    """The group of each in-feature, int64 [in_features]; None where groups are consecutive in-features."""
    if index is None or np.array_equal(index, np.arange(len(index)) // (len(index) // groups)):
        return None
    return index


def divides_evenly(features: int, groups: int) -> bool:
    """Whether `groups` equal groups make up the in-features."""
    return bool(groups) and not features % groups
