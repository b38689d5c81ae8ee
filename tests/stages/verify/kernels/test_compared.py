"""The kernels of verification in C say what NumPy says: of every code and number, of shapes that are no multiple of anything, and
of values that are wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.verify.kernel_orders import interleaved
from stages.verify.kernels import checks, words
from stages.verify.matrices import Matrix
from stages.verify.roundtrip.bounds import Allowance, allowed
from stages.verify.roundtrip.figures import Figures
from stages.verify.roundtrip.one_pass import CHUNK, one_pass
from stages.verify.roundtrip.original.grouped import PLACES
from stages.verify.rows import StoredRows
from stages.verify.values import rounded
from tests.support.built_kernels import at, levels, needs_module
from tests.support.examples import examples
from tests.support.lazy import Held

pytestmark = needs_module

BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
FP16, FP32 = np.dtype(np.float16), np.dtype(np.float32)
ORDERED = [(kind, bits, order) for kind in ("weight-only", "groupwise") for bits in (4, 8) for order in "APT"]
STORED = [*ORDERED, ("groupwise zeros", 4, "A"), ("awq", 4, ""), ("fp8", 8, ""), ("fp8 rowwise", 8, "")]
each_stored = pytest.mark.parametrize("stored", STORED, ids=str)


@dataclass(frozen=True)
class Case:
    """A matrix of random codes with its stored units, and the rows of a source that it is right for."""

    matrix: Matrix
    data: np.ndarray
    expected: StoredRows


def case(stored: tuple[str, int, str], rows: int, features: int, groups: int, seed: int, expected: str) -> Case:
    """`expected`: the type of the source's numbers, or "codes4" and "codes8" with scales and zero points of groups."""
    random, (kind, bits, order) = np.random.default_rng(seed), stored
    period = interleaved(bits, order) if order else 2 if kind == "awq" else 1
    unit = features if kind == "awq" else period * features * bits // 8
    data = random.integers(0, 256, (rows // period, unit), dtype=np.uint8)
    if kind.startswith("fp8"):
        data[data & 0x7F == 0x7F] = 0  # those are no numbers
    data.reshape(-1)[: min(256, data.size)] = np.resize(np.delete(np.arange(256, dtype=np.uint8), [127, 255]), min(256, data.size))
    scales = random.uniform(0.001, 0.01, (rows, groups)).astype(np.float32)
    shapes = {"weight-only": ("per_channel_scale", scales[:, 0]), "fp8 rowwise": ("per_channel_scale", scales[:, 0])}
    shapes |= {"fp8": ("weights_scaling_factor", scales[:1, 0]), "awq": ("weights_scaling_factor", scales)}
    name, values = shapes.get(kind, ("weights_scaling_factor", np.ascontiguousarray(scales.T)))
    tensors: dict[str, Any] = {"weight": Held(data.view(FP8) if kind.startswith("fp8") else data.view(np.int8)), name: Held(values)}
    if kind == "groupwise zeros":
        tensors["zero"] = Held(random.normal(0, 0.01, (groups, rows)).astype(np.float32))
    held = Matrix(tensors, kind.removesuffix(" zeros"), (rows, features), bits, order, None)
    numbers = held.numbers(data, 0).copy()
    return Case(held, data, of_source(numbers, expected, groups, random))


def of_source(numbers: np.ndarray, kind: str, groups: int, random: np.random.Generator) -> StoredRows:
    """Numbers, a little off, in the form that a source has them; codes are random."""
    if kind.startswith("codes"):
        bits = int(kind[5:])
        codes = random.integers(0, 256, (len(numbers), numbers.shape[1] * bits // 8), dtype=np.uint8)
        scales = random.uniform(0.001, 0.01, (len(numbers), groups)).astype(np.float32)
        return StoredRows(codes, bits, scales, np.full((len(numbers), groups), 1 << (bits - 1), np.float32))
    if kind == "float8_e4m3fn":
        scale = np.full((1, 1), 0.011, np.float32)
        return StoredRows((numbers / scale).clip(-448, 448).astype(FP8), scales=scale)
    return StoredRows(rounded(numbers * np.float32(1 + 2e-4), np.dtype(kind) if kind != "bfloat16" else BF16))


def judged(case: Case, bound: Allowance, first: int, last: int) -> tuple[Figures, Figures | None]:
    """The figures of rows [first, last) by NumPy, their sums in float64, and by C; None where it does not confirm them."""
    period, (_, features) = case.matrix.period, case.matrix.shape
    base = first // period * period
    data = case.data[base // period : -(-last // period)]
    expected = case.expected.some(first, last)
    actual = case.matrix.numbers(data, base)[first - base : last - base].copy()
    numbers, twin, ours = expected.numbers().copy(), Figures(), Figures()
    with np.errstate(all="ignore"):
        twin.compare(actual, numbers, lambda: bound.of(actual, numbers, case.matrix.zeros(first, last)))
        wide, other = actual.astype(np.float64), numbers.astype(np.float64)
        twin.noise, twin.power, twin.square = (float(np.square(each).sum()) for each in (wide - other, other, wide))
        twin.product = float((wide * other).sum())
    found = one_pass(case.matrix, data, base, first, expected, bound, 0.0)
    return twin, ours if found and ours.right((last - first) * features, *found) else None


def alike(case: Case, bound: Allowance, first: int, last: int) -> bool:
    """At each level C has NumPy's figures, or leaves what is wrong to it; returns whether it is right."""
    for level in levels():
        with at(level):
            twin, ours = judged(case, bound, first, last)
        if ours is None:
            size = case.matrix.shape[1] // bound.constant.shape[1]
            unknown = bound.largest == "group" and bound.constant.shape[1] > 1 and CHUNK % size
            # Sums of errors as large as the values do not tell the product.
            assert twin.wrong or twin.worst >= 0.999 or twin.noise >= twin.power / 9 or unknown, level
            continue
        assert not twin.wrong
        assert (ours.elements, ours.max_abs) == (twin.elements, twin.max_abs), level
        assert ours.worst == pytest.approx(twin.worst, rel=1e-6), level
        for name in ("noise", "power", "square", "product"):
            assert getattr(ours, name) == pytest.approx(getattr(twin, name), rel=3e-6, abs=1e-30), (level, name)
    return ours is not None


def generous(case: Case, base: str = "expected") -> Allowance:
    """A bound that all of a case's values keep to, with a constant of each row and group."""
    groups = case.matrix.scales(0, 1).shape[1]
    rows = case.matrix.shape[0]
    constant = np.random.default_rng(0).uniform(5, 6, (rows, groups)).astype(np.float32)
    return Allowance(0.3, constant, base)


@each_stored
@pytest.mark.parametrize("expected", ["bfloat16", "float16", "float32", "float8_e4m3fn"])
def test_every_code(stored: tuple[str, int, str], expected: str) -> None:
    groups = 4 if "groupwise" in stored[0] or stored[0] == "awq" else 1
    made = case(stored, 64, 256, groups, 0, expected)
    assert alike(made, generous(made), 0, 64)


@pytest.mark.parametrize("expected", ["codes4", "codes8"])
@pytest.mark.parametrize("base", ["expected", "actual", "product"])
def test_every_base_and_codes_of_the_source(expected: str, base: str) -> None:
    made = case(("groupwise zeros", 4, "A"), 8, 256, 4, 1, expected)
    alike(made, generous(made, base), 0, 8)
    same = Case(made.matrix, made.data, StoredRows(made.matrix.rows(0, 8)))
    assert alike(same, generous(same, base), 0, 8)


@each_stored
@examples(15)
@given(data=st.data())
def test_any_shape_and_rows_and_what_formats_allow(stored: tuple[str, int, str], data: st.DataObject) -> None:
    kind, _, order = stored
    run = 2 if order in ("T", "") else 64
    grouped = "groupwise" in kind or kind == "awq"
    groups = data.draw(st.sampled_from([1, 2, 3])) if grouped else 1
    features = (64 if grouped else run) * groups * data.draw(st.integers(1, 40))
    rows = 4 * data.draw(st.integers(1, 4))
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    expected = data.draw(st.sampled_from(["bfloat16", "float16", "float32"]))
    made = case(stored, rows, features, groups, data.draw(st.integers(0, 99)), expected)
    for kept in (False, True):
        dtype = data.draw(st.sampled_from([BF16, FP16]))
        bound = allowed(made.matrix, first, last, dtype, kept)
        alike(made, bound, first, last)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP8], ids=str)
def test_every_number_of_a_small_type(dtype: np.dtype) -> None:
    """Against codes of zeros: what is summed are the source's numbers."""
    patterns = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}").view(dtype)
    numbers = patterns[np.isfinite(patterns.astype(FP32))]
    width = 128 if dtype == FP8 else 1024
    rows = np.resize(numbers, (-(-len(numbers) // width), width))
    made = case(("fp8 rowwise", 8, ""), len(rows), width, 1, 0, "bfloat16")
    zeros = Case(
        made.matrix, np.zeros_like(made.data), StoredRows(rows, scales=np.ones((1, 1), np.float32) if dtype == FP8 else None)
    )
    for level in levels():
        with at(level):
            for row in range(len(rows)):
                bound = Allowance(2.0, np.ones((1, 1), np.float32), largest="row", factor=0.5)
                twin, _ = judged(zeros, bound, row, row + 1)
                expected = zeros.expected.some(row, row + 1)
                found = one_pass(zeros.matrix, zeros.data[row : row + 1], row, row, expected, bound, 0.0)
                assert found is not None
                assert found.greatest == twin.max_abs
                assert found.worst == pytest.approx(twin.worst, rel=1e-6)
                assert found.power == pytest.approx(twin.power, rel=1e-5)


@each_stored
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e30])
def test_what_is_no_number_is_never_confirmed(stored: tuple[str, int, str], wrong: float) -> None:
    made = case(stored, 8, 192, 1, 0, "float32")
    for row, column in ((0, 0), (7, 191), (3, 100)):
        values = made.expected.values.copy()
        values[row, column] = wrong
        bad = Case(made.matrix, made.data, StoredRows(values))
        for kept in (False, True):
            for level in levels():
                with at(level):
                    assert judged(bad, allowed(made.matrix, 0, 8, BF16, kept), 0, 8)[1] is None


@examples(30)
@given(data=st.data())
def test_one_value_that_is_off_is_never_confirmed(data: st.DataObject) -> None:
    stored = data.draw(st.sampled_from(STORED))
    made = case(stored, 8, 4224, 1, 0, "float32")
    bound = Allowance(0.0, np.full((1, 1), 0.5, np.float32))
    row, column = data.draw(st.integers(0, 7)), data.draw(st.integers(0, 4223))
    values = made.matrix.rows(0, 8).copy()
    right = Case(made.matrix, made.data, StoredRows(values.copy()))
    assert alike(right, bound, 0, 8)
    values[row, column] += 0.51
    assert not alike(Case(made.matrix, made.data, StoredRows(values)), bound, 0, 8)


@examples(40)
@given(data=st.data())
def test_words_as_rows(data: st.DataObject) -> None:
    m, n = 2 * data.draw(st.integers(1, 90)), data.draw(st.integers(1, 40))
    stored = np.random.default_rng(m).integers(0, 1 << 32, (m, n + 5), dtype=np.uint64).astype(np.uint32)
    for some in (stored, stored[:, 2 : n + 2], stored[:, :1], stored.view(np.int32)):
        for name, room in (("words_as_rows", np.zeros((some.shape[1], m + 3), np.uint32)),
                           ("columns_as_rows", np.zeros((8 * some.shape[1], m // 2 + 3), np.uint8))):  # fmt: skip
            wide = room.shape[1] - 3
            more = (PLACES,) if name == "columns_as_rows" else ()
            wanted = room.copy()
            getattr(words, name)(some, *more, wanted[:, 1 : wide + 1])
            for level in levels():
                found = room.copy()
                with at(level):
                    getattr(checks, name)(some, *more, found[:, 1 : wide + 1])
                assert np.array_equal(found, wanted), level


def test_same_bytes() -> None:
    one = np.arange(60, dtype=np.uint16).reshape(6, 10)
    for a in (one, one[:, 2:9], one[::2], one[0]):
        b = a.copy()
        assert checks.same_bytes(a, b)
        b.reshape(-1)[-1] ^= 1
        assert checks.same_bytes(a, b) is False
    assert checks.same_bytes(one.T, one.T.copy()) is None  # rows that are not contiguous
