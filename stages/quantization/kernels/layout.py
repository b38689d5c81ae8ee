"""The order in which TensorRT-LLM's mixed-precision kernels read int8 and int4 weights, by GPU generation.

A linear has K in-features and N out-features. Its codes come as one stream of bits a row, [N, K * bits / 8] bytes in the order of K
(int4: even k in the low nibble), biased to unsigned (code + 2 ** (bits - 1)). They leave in the kernel's order, [N / C, C * K *
bits / 8] bytes: rows of C out-features, so that any C rows are a contiguous range of the whole, and any tile of K a contiguous
part of a row. Facts: docs/format/quantized-layouts.md, sections 2 and 3, for 16-bit activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.model.kernels import order

ALIGNMENT = 64  # of K and of N: what every kernel asks for
TILE = 64  # in-features of a tile
_LOW = np.uint32(0x0F0F0F0F)


@dataclass(frozen=True)
class KernelLayout:
    """How codes of `bits` bits are arranged: in groups of `columns` out-features whose tiles alternate (1: no alternation).

    `mixed`: in-features change places within each 16 or 32, and codes stay unsigned; otherwise a row is its stream of signed codes.
    """

    bits: int
    columns: int
    mixed: bool = True

    @property
    def tile_bytes(self) -> int:
        """The bytes of one out-feature's share of a tile."""
        return TILE * self.bits // 8

    def arrange(self, stream: np.ndarray) -> np.ndarray:
        """Unsigned codes uint8 [n, K * bits / 8], n a multiple of `columns`, in the kernel's order: [n / columns, ...]."""
        if not self.mixed:
            return stream ^ self._signs
        return self._tiled(_mix_int8(stream) if self.bits == 8 else _mix_int4(stream))

    def arrange_codes(self, codes: np.ndarray) -> np.ndarray:
        """The same of codes that are not packed yet, uint16 [n, K]: faster than to pack and then to arrange them."""
        if not self.mixed:
            # Two codes are 16 bits apart in a word of 32; of int4, the second goes to the high half of the first one's byte.
            pairs = codes.view(np.uint32)
            return (codes if self.bits == 8 else pairs | (pairs >> 12)).astype(np.uint8) ^ self._signs
        # Four codes a word of 64 bits: [n, K / 16 or 32, halves of that, ...].
        words = codes.view(np.uint64).reshape(*codes.shape[:-1], -1, 16 // self.bits * 2)
        if self.bits == 8:
            packed = words[..., :2] | (words[..., 2:] << 8)
        else:
            # Codes 8 further go to the high half of a byte, codes 16 further to the next byte.
            packed = words[..., 0:2] | (words[..., 2:4] << 4)
            packed |= (words[..., 4:6] << 8) | (words[..., 6:8] << 12)
        return self._tiled(packed.view(np.uint8).reshape(*codes.shape[:-1], -1))

    @property
    def _signs(self) -> np.uint8:
        """The highest bit of each code of a byte: turned over, it makes unsigned codes signed ones."""
        return np.uint8(0x80 if self.bits == 8 else 0x88)

    def _tiled(self, mixed: np.ndarray) -> np.ndarray:
        if self.columns == 1:
            return mixed
        tiles = mixed.view(f"V{self.tile_bytes}")
        groups = tiles.reshape(-1, self.columns, tiles.shape[1]).swapaxes(1, 2)
        return np.ascontiguousarray(groups).view(np.uint8).reshape(len(groups), -1)


def arranged(stream: np.ndarray, layout: KernelLayout) -> np.ndarray:
    """`layout.arrange(stream)`: the twin of arranged.c."""
    return layout.arrange(stream)


def kernel_layout(bits: int, sm: int, stacked: bool) -> KernelLayout:
    """The layout of matrices, or of stacks of experts, for a GPU generation."""
    letter = order(sm, stacked)
    return KernelLayout(bits, 16 // bits if letter == "A" else 1, letter != "T")


def int8_of_order_a(arranged: np.ndarray) -> np.ndarray:
    """Unsigned codes uint8 [2 n, K] of rows [n, 2 K] in order A, whose every row is two out-features: `arrange` backwards."""
    rows = 2 * len(arranged)
    tiles = arranged.reshape(len(arranged), -1, 2, TILE).swapaxes(1, 2)
    halves = tiles.reshape(rows, -1, 8, 2).swapaxes(-1, -2)
    return np.ascontiguousarray(halves).reshape(rows, -1)


def _mix_int8(stream: np.ndarray) -> np.ndarray:
    """Rows of K bytes: in each 16, the pairs of one half alternate with those of the other, and in each word the middle bytes swap.

    Together that is: the bytes of the two halves alternate.
    """
    halves = stream.reshape(*stream.shape[:-1], -1, 2, 8)
    result = np.empty((*halves.shape[:-2], 8, 2), dtype=np.uint8)
    result[..., 0] = halves[..., 0, :]
    result[..., 1] = halves[..., 1, :]
    return result.reshape(stream.shape)


def _mix_int4(stream: np.ndarray) -> np.ndarray:
    """Rows of K / 2 bytes: in each 32 codes, word j takes byte j of all four words; then each word its even nibbles before the odd.

    Nibbles are paired on whole words, a quarter of them at a time, before any byte moves: masks and shifts are faster than moves.
    """
    words = stream.view(np.uint32).reshape(*stream.shape[:-1], -1, 4)
    first, second, third, fourth = (words[..., i].copy() for i in range(4))  # which are used up
    even, odd = _pair_nibbles(first, second)
    even2, odd2 = _pair_nibbles(third, fourth)
    result = np.empty((*words.shape, 4), dtype=np.uint8)
    for i, part in enumerate((even, even2, odd, odd2)):
        result[..., i] = part.view(np.uint8).reshape(*part.shape, 4)
    return result.reshape(stream.shape)


def _pair_nibbles(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From two arrays of uint32, whose memory is used up: bytes of their low nibbles, and bytes of their high nibbles."""
    low = np.bitwise_and(second, _LOW)
    low <<= 4
    low |= first & _LOW
    first >>= 4
    first &= _LOW
    second &= ~_LOW
    first |= second
    return low, first
