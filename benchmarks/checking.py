"""The work of verification's kernels on blocks in memory, for `benchmarks.kernels`: quantized rows held against the source's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.quantize import ArrayBlock
from pipeline.tensor.placement import Region, slices
from pipeline.tensor.tensors import Block
from stages.quantization.kernels import twins
from stages.quantization.kernels.layout import kernel_layout
from stages.verify.column_words import ColumnWords, Window
from stages.verify.kernels import words as twins_of_words
from stages.verify.matrices import Matrix
from stages.verify.roundtrip.bounds import allowed
from stages.verify.roundtrip.figures import Figures
from stages.verify.roundtrip.kept_codes import compare_columns
from stages.verify.roundtrip.one_pass import one_pass
from stages.verify.roundtrip.original.grouped import PLACES
from stages.verify.rows import StoredRows
from stages.verify.values import Buffers, halves

BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class ArrayTensor:
    """An array in memory as a tensor of a rank."""

    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    def block(self, region: Region) -> Block:
        return ArrayBlock(self.values[slices(region)])


def checks(rows: int, features: int) -> dict[str, tuple[np.ndarray, Callable[[], Any], Callable[[], Any]]]:
    """Name -> the source's values, and what compares them with what was made of them: in C, and in NumPy."""
    random = np.random.default_rng(0)
    values = (random.standard_normal((rows, features), dtype=np.float32) * np.float32(0.02)).astype(BF16)
    result = {}
    for bits in (8, 4):
        codes, scales = twins.weight_only_codes(values, kernel_layout(bits, 80, False), 1, "")
        tensors = {"weight": ArrayTensor(codes), "per_channel_scale": ArrayTensor(scales.reshape(-1).astype(BF16))}
        matrix = Matrix(tensors, "weight-only", (rows, features), bits, "A", None)  # type: ignore[arg-type]
        result[f"int{bits} checked against bf16"] = (values, *both(matrix, codes, StoredRows(values), False))
    eight, scales = twins.float8_codes(values, 1, 1200.0, "")
    tensors = {"weight": ArrayTensor(eight), "per_channel_scale": ArrayTensor(scales.reshape(-1))}
    matrix = Matrix(tensors, "fp8 rowwise", (rows, features), 8, "", None)  # type: ignore[arg-type]
    result["FP8 by row checked against bf16"] = (values, *both(matrix, eight.view(np.uint8), StoredRows(values), False))
    stream = random.integers(0, 256, (rows, features // 2), dtype=np.uint8)
    factors = random.uniform(0.001, 0.01, (rows, features // 128)).astype(np.float16)
    tensors = {
        "weight": ArrayTensor(twins.arranged(stream, kernel_layout(4, 80, False))),
        "weights_scaling_factor": ArrayTensor(np.ascontiguousarray(factors.T)),
        "zero": ArrayTensor(np.zeros(factors.shape[::-1], np.float16)),
    }
    matrix = Matrix(tensors, "groupwise", (rows, features), 4, "A", None)  # type: ignore[arg-type]
    middle = np.full(factors.shape, 8, np.float32)
    expected = StoredRows(stream, 4, factors.astype(np.float32), middle)
    result["int4 groups checked against codes"] = (stream, *both(matrix, tensors["weight"].values, expected, True))
    for name in ("GPTQ", "AWQ"):
        words, order = packed(stream, name), PLACES if name == "AWQ" else None
        columns = ColumnWords(partial(windows, words), np.ascontiguousarray(expected.scales.T), middle.T.copy(), order)  # type: ignore[union-attr]
        result[f"{name}'s words checked where they lie"] = (words, *kept(matrix, tensors["weight"].values, columns, expected))
    return result


def packed(stream: np.ndarray, name: str) -> np.ndarray:
    """Codes [rows, in_features / 2], two a byte, in the words of a format."""
    if name == "GPTQ":
        return np.ascontiguousarray(stream.view(np.uint32).T)
    codes = halves(stream).astype(np.uint32)
    return np.ascontiguousarray(sum(codes[row::8] << np.uint32(4 * int(place)) for row, place in enumerate(PLACES)).T)  # type: ignore[union-attr]


def windows(words: np.ndarray) -> Iterator[Window]:
    yield Window(0, words)


def kept(
    matrix: Matrix, data: np.ndarray, columns: ColumnWords, expected: StoredRows
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    ((_, words),) = columns.windows()

    def in_c() -> None:
        assert compare_columns(matrix, data, 0, 0, columns, np.dtype(np.float16), 0.0) is not None

    def in_numpy() -> None:
        codes = np.empty_like(expected.values)
        if columns.order is None:
            twins_of_words.words_as_rows(words, codes.view(np.uint32))
        else:
            twins_of_words.columns_as_rows(words, columns.order, codes)
        both(matrix, data, StoredRows(codes, 4, expected.scales, expected.zeros), True)[1]()

    return in_c, in_numpy


def both(matrix: Matrix, data: np.ndarray, expected: StoredRows, kept: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    rows, buffers = matrix.shape[0], Buffers()

    def in_c() -> None:
        found = one_pass(matrix, data, 0, 0, expected, allowed(matrix, 0, rows, BF16, kept), 0.0)
        assert found is not None

    def in_numpy() -> None:
        bound, figures = allowed(matrix, 0, rows, BF16, kept), Figures()
        actual, numbers = matrix.numbers(data, 0, buffers), expected.numbers(buffers)
        figures.compare(actual, numbers, lambda: bound.of(actual, numbers, matrix.zeros(0, rows), buffers), buffers=buffers)
        assert not figures.wrong

    return in_c, in_numpy
