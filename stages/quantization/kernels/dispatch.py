"""The kernels that this process uses. The only place that chooses between C and NumPy: callers do not know which they have."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from stages.quantization.kernels import compiled, twins
from stages.quantization.kernels.chosen import c_is_used
from stages.quantization.kernels.layout import KernelLayout
from stages.quantization.kernels.smoothed import Product


class Kernels(Protocol):
    """One set of kernels: functions of arrays in memory, which need not be contiguous, that keep nothing.

    Numbers are of the types float16 and bfloat16, where nothing else is said. Those that quantize take a row's `segments` equal
    parts each by itself, and raise BadInput naming the tensor `name` where a value is not finite.
    """

    def weight_only_scales(self, values: np.ndarray, bits: int, segments: int, name: str) -> np.ndarray:
        """float32 [n, segments] of [n, K]: the largest magnitude of each segment, divided by 2 ** (bits - 1)."""

    def weight_only_codes(
        self, values: np.ndarray, layout: KernelLayout, segments: int, name: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [n / columns, columns * K * bits / 8] of [n, K]: codes in the kernel's order; and their scales, as those above."""

    def float8_scales(self, values: np.ndarray, segments: int, clamp: float, name: str) -> np.ndarray:
        """float32 [n, segments] of [n, K], float32 too: the largest magnitude of each segment, at most `clamp`, divided by 448."""

    def float8_codes(self, values: np.ndarray, segments: int, clamp: float, name: str) -> tuple[np.ndarray, np.ndarray]:
        """float8_e4m3fn [n, K] of [n, K], float32 too: each value, clamped, divided by the scale of its segment; and the scales."""

    def float8_rescaled(self, codes: np.ndarray, scale: np.float32, common: np.float32) -> np.ndarray:
        """float8_e4m3fn: codes of one scale as codes of another, multiplied, divided, then rounded once."""

    def cast(self, values: np.ndarray, to: np.dtype) -> np.ndarray:
        """Values of any type in another, rounded to nearest even; too large for it becomes infinity, as in torch.

        Each is rounded once; a double that becomes a number of 16 bits, to float32 and from there.
        """

    def arranged(self, stream: np.ndarray, layout: KernelLayout) -> np.ndarray:
        """uint8 [n / columns, columns * K * bits / 8] of unsigned packed codes uint8 [n, K * bits / 8], in the kernel's order."""

    def transposed(self, words: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """uint32 [n, m] of words of 32 bits [m, n]. `out`: where to write it, which may be columns of a wider matrix."""

    def awq_codes(self, words: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 [8 * n, K / 2] of AWQ's words [K, n]: unsigned codes of two in-features a byte. `out`: as that above."""

    def gguf_numbers(self, packed: np.ndarray, kind: str, to: np.dtype = ...) -> np.ndarray:
        """[..., elements] of GGUF's rows of blocks uint8 [..., bytes]; `kind` is the name of their type.

        `to`: float32, or another type that the float32 numbers are cast to.
        """

    def column_magnitudes(self, values: np.ndarray) -> np.ndarray:
        """uint16 [K] of float16 [n, K]: the largest magnitude of each column, as its bits."""

    def smoothed_magnitudes(self, values: np.ndarray, factors: np.ndarray) -> np.ndarray:
        """uint16 [n]: the second of what `smoothed` gives, alone."""

    def smoothed(self, values: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float16 [n, K] times float64 [K], as float16; and uint16 [n]: the largest magnitude of each row, as its bits."""

    def smoothed_codes(self, values: np.ndarray, scales: np.ndarray, product: Product, out: np.ndarray | None = None) -> np.ndarray:
        """int8 [n, K], in [-127, 127], of finite float16 [n, K] and finite scales float32 [n]. `out`: where to write it.

        `product`: multiplied in float32; or multiplied or divided, then rounded to float16.
        """


def kernels() -> Kernels:
    """The kernels in C where they are used, else their twins. Raises BadInput as `c_is_used`."""
    return compiled if c_is_used() else twins
