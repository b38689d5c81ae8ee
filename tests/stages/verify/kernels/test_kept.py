"""Codes that a rank has kept, held against the words of the source in C, say what NumPy says: of every code, of shapes that are no
multiple of anything, and of codes and factors that are wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.verify.column_words import ColumnWords, Window
from stages.verify.kernel_orders import interleaved
from stages.verify.matrices import Matrix
from stages.verify.roundtrip.bounds import kept_codes
from stages.verify.roundtrip.figures import Figures
from stages.verify.roundtrip.kept_codes import compare_columns, knows_columns
from stages.verify.roundtrip.original.grouped import PLACES
from stages.verify.values import rounded, to_float32
from tests.support.built_kernels import at, levels, needs_module
from tests.support.examples import examples
from tests.support.lazy import Held

pytestmark = needs_module

BF16, FP16, FP32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
KINDS = [(order, packing) for order in "APT" for packing in ("gptq", "awq")]
each_kind = pytest.mark.parametrize(("order", "packing"), KINDS)


@dataclass(frozen=True)
class Case:
    """A matrix whose codes are those of a source, and the source's: [rows, in_features], scales and zero points [groups, rows]."""

    matrix: Matrix
    data: np.ndarray
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    packing: str
    dtype: np.dtype

    def words(self, first: int, last: int, step: int = 1 << 20) -> ColumnWords:
        """Rows [first, last) as the source packs them, `step` in-features at a time."""
        wide = first // 8 * 8, -(-last // 8) * 8
        if self.packing == "gptq":
            packed = sum(self.codes[first:last, code::8].T.astype(np.uint32) << np.uint32(4 * code) for code in range(8))
        else:
            codes = np.zeros((wide[1] - wide[0], self.codes.shape[1]), np.uint32)
            codes[: len(self.codes[wide[0] : wide[1]])] = self.codes[wide[0] : wide[1]]
            packed = sum(codes[row::8].T << np.uint32(4 * int(place)) for row, place in enumerate(PLACES))
        assert isinstance(packed, np.ndarray)
        each = 8 if self.packing == "gptq" else 1
        around = np.full((len(packed), packed.shape[1] + 3), 0x5A5A5A5A, np.uint32)  # as of a wider matrix
        around[:, 1:-2] = packed
        some = around[:, 1:-2]
        windows = [Window(start, some[start // each : (start + step) // each]) for start in range(0, self.codes.shape[1], step)]
        packs = (PLACES, first % 8) if each == 1 else ()
        return ColumnWords(
            lambda: iter(windows), *(np.ascontiguousarray(part[:, first:last]) for part in (self.scales, self.zeros)), *packs
        )


def case(
    order: str, packing: str, rows: int, features: int, groups: int, seed: int,
    stored: np.dtype = FP16, dtype: np.dtype = FP16, zeros: bool = True, size: float = 0.01, source_groups: int = 0,
) -> Case:  # fmt: skip
    """`stored`: the type of the source's scales; `dtype`: the model's. `zeros`: whether zero points are any but the middle."""
    random = np.random.default_rng(seed)
    period = interleaved(4, order)
    data = random.integers(0, 256, (rows // period, period * features // 2), dtype=np.uint8)
    scales = to_float32(rounded(random.uniform(size / 10, size, (groups, rows)).astype(np.float32), stored))
    points = random.integers(0, 16, (groups, rows)).astype(np.float32) if zeros else np.full((groups, rows), 8, np.float32)
    tensors: dict[str, Any] = {"weight": Held(data.view(np.int8)), "weights_scaling_factor": Held(rounded(scales, dtype))}
    if zeros:
        tensors["zero"] = Held(rounded((8 - points) * scales, dtype))
    matrix = Matrix(tensors, "groupwise", (rows, features), 4, order, None)
    codes = (matrix.signed(data).astype(np.int16) + 8).astype(np.uint8)
    more = source_groups // groups if source_groups else 1
    return Case(matrix, data, codes, *(np.repeat(each, more, axis=0) for each in (scales, points)), packing, dtype)


def alike(made: Case, first: int, last: int, step: int = 1 << 20) -> bool:
    """At each level C has NumPy's figures, with sums of float64, or leaves what is wrong to it; returns whether it is right."""
    period, features = made.matrix.period, made.matrix.shape[1]
    base = first // period * period
    data = made.data[base // period : -(-last // period)]
    actual = made.matrix.numbers(data, base)[first - base : last - base].copy()
    per_group = features // len(made.scales)
    scales, points = (np.repeat(each[:, first:last].T, per_group, axis=1) for each in (made.scales, made.zeros))
    twin, zeros = Figures(), made.matrix.zeros(first, last)
    with np.errstate(all="ignore"):
        numbers = (made.codes[first:last].astype(np.float32) - points) * scales
        bound = kept_codes(zeros, made.dtype)
        twin.compare(actual, numbers, lambda: bound.of(actual, numbers, zeros))
        wide, other = actual.astype(np.float64), numbers.astype(np.float64)
        sums = [float(np.square(each).sum()) for each in (wide - other, other, wide)]
    assert knows_columns(made.matrix)
    for level in levels():
        with at(level):
            found = compare_columns(made.matrix, data, base, first, made.words(first, last, step), made.dtype, 0.0)
        if found is None:
            assert twin.wrong or twin.worst >= 0.999, level
            continue
        assert not twin.wrong
        assert found.greatest == twin.max_abs, level
        assert found.worst == pytest.approx(twin.worst, rel=1e-6), level
        assert found[2:] == pytest.approx(sums, rel=3e-6, abs=1e-35), level
    return found is not None


@each_kind
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
@pytest.mark.parametrize("zeros", [False, True])
def test_every_code(order: str, packing: str, dtype: np.dtype, zeros: bool) -> None:
    made = case(order, packing, 64, 256, 2, 0, dtype=dtype, zeros=zeros)
    assert len(np.unique(made.codes)) == 16
    assert alike(made, 0, 64)


@each_kind
@examples(25)
@given(data=st.data())
def test_any_shape_and_rows(order: str, packing: str, data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 2, 3]))
    features = 64 * groups * data.draw(st.integers(1, 6))
    rows = 4 * data.draw(st.integers(1, 40))
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    stored, dtype = data.draw(st.sampled_from([FP16, BF16, FP32])), data.draw(st.sampled_from([FP16, BF16, FP32]))
    size = data.draw(st.sampled_from([0.01, 30.0]))
    more = groups * data.draw(st.sampled_from([1, 2]))
    made = case(order, packing, rows, features, groups, rows, stored, dtype, data.draw(st.booleans()), size, more)
    assert alike(made, first, last, 32 * data.draw(st.integers(1, 8)))


@pytest.mark.parametrize("size", [1e-22, 1e-14, 1e14, 1e17])
def test_numbers_whose_squares_are_very_small_or_large(size: float) -> None:
    for zeros in (False, True):
        assert alike(case("A", "gptq", 8, 128, 2, 0, FP32, BF16, zeros, size), 0, 8)


def test_codes_that_are_all_alike() -> None:
    for code in range(16):
        for zeros in (False, True):
            for packing in ("gptq", "awq"):
                made = case("A", packing, 8, 256, 1, code, BF16, FP16, zeros)
                made.data[:] = code * 0x11
                made.codes[:] = code
                assert alike(made, 0, 8)


@each_kind
@examples(10)
@given(data=st.data())
def test_a_code_that_is_another_is_never_confirmed(order: str, packing: str, data: st.DataObject) -> None:
    made = case(order, packing, 24, 192, 1, 1)
    row, column = data.draw(st.integers(0, 23)), data.draw(st.integers(0, 191))
    assert alike(made, 0, 24)
    made.codes[row, column] ^= 1 << data.draw(st.integers(0, 3))
    for level in levels():
        with at(level):
            assert compare_columns(made.matrix, made.data, 0, 0, made.words(0, 24), FP16, 0.0) is None


@each_kind
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 3.0])
def test_a_factor_that_is_wrong_is_never_confirmed(order: str, packing: str, wrong: float) -> None:
    for row in (0, 9, 22):
        made = case(order, packing, 24, 192, 3, 1, zeros=False)
        made.scales[1, row] = wrong
        assert not alike(made, 0, 24)
        made = case(order, packing, 24, 192, 3, 1)
        made.zeros[2, row] += np.float32(wrong)
        assert not alike(made, 0, 24)


def test_scales_of_either_sign_and_zeros() -> None:
    made = case("A", "gptq", 16, 128, 2, 3, zeros=False)
    for scales in (made.scales, made.matrix.tensors["weights_scaling_factor"].values):  # type: ignore[attr-defined]
        scales[0, ::2] *= -1
        scales[1, 3] = 0
    assert alike(made, 0, 16)
