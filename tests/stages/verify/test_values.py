"""Numbers of every type become float32 and back by tables of this project's own: as ml_dtypes has them, which is beside it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.verify.values import halves, plainly_positive, rounded, same_bits, signed_pairs, to_float32

BF16, HALF = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_every_pattern_is_the_number_that_it_stands_for(name: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    values = np.arange(1 << 8 * dtype.itemsize, dtype=np.dtype(f"u{dtype.itemsize}")).view(dtype)
    found, wanted = to_float32(values), values.astype(np.float32)
    assert np.array_equal(found, wanted, equal_nan=True)
    number = ~np.isnan(wanted)
    assert same_bits(found[number], wanted[number])  # zeros have their signs
    strided = np.stack([values, values], 1)[:, 0]
    assert np.array_equal(to_float32(strided, np.empty(strided.shape, np.float32)), wanted, equal_nan=True)


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
def test_what_is_plainly_positive_is(dtype: np.dtype) -> None:
    """Each number of a type, beside one that is: never said of what is negative or not finite, and said of all others."""
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    wide = every.astype(np.float32)
    wanted = np.isfinite(wide) & ~np.signbit(wide)
    assert [plainly_positive(np.array([1, value], dtype)) for value in every] == wanted.tolist()
    assert not plainly_positive(np.array([-1.0], np.float32))
    assert not plainly_positive(np.array([np.nan], np.float32))
    assert plainly_positive(np.array([0.0, 3e38], np.float32))
    assert not plainly_positive(np.ones(1, np.float64)), "of a type that is not known"


@given(st.integers(0, 1 << 32))
def test_numbers_are_rounded_once_to_nearest_even(seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << 32, 4096, dtype=np.uint32)
    values[::2] &= np.uint32(0xFFFF8000)  # ties and near ones
    wide = values.view(np.float32)
    wide = wide[~np.isnan(wide)]
    with np.errstate(over="ignore"):
        assert same_bits(rounded(wide, BF16), wide.astype(BF16))
        assert same_bits(rounded(wide, HALF), wide.astype(HALF))
        half = rounded(wide, HALF)
    assert same_bits(rounded(half, BF16), half.astype(np.float32).astype(BF16))
    assert np.isnan(to_float32(rounded(np.array([np.nan, -np.nan], np.float32), BF16))).all()


@pytest.mark.parametrize("kind", [np.uint8, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("offset", [0, 1, 2, 4])
@pytest.mark.parametrize("columns", [None, (1, 6), (4, 12)])
def test_bits_are_compared_wherever_they_lie(kind: Any, offset: int, columns: tuple[int, int] | None) -> None:
    """At odd addresses and in some columns of rows too, as a file's header and a split leave them; each changed bit is seen."""
    size = np.dtype(kind).itemsize
    data = np.random.default_rng(offset).integers(0, 256, offset + 5 * 12 * size, dtype=np.uint8)
    lying = data[offset:].view(kind).reshape(5, 12)[:, slice(*(columns or (0, 12)))]
    copy = lying.copy()
    assert same_bits(lying, copy)
    assert not same_bits(lying, copy[1:])
    for place in np.ndindex(copy.shape):
        changed = copy.copy()
        changed.view(np.uint8).reshape(*copy.shape, size)[place][size // 2] ^= 1
        assert not same_bits(lying, changed)


def test_zeros_of_two_signs_differ_and_nan_is_itself() -> None:
    assert not same_bits(np.array([0.0], np.float32), np.array([-0.0], np.float32))
    assert same_bits(np.array([np.nan], np.float32), np.array([np.nan], np.float32))
    assert not same_bits(np.array([1.0], np.float32), np.array([1.0], np.float64))


def test_halves_of_bytes() -> None:
    data = np.arange(256, dtype=np.uint8).reshape(8, 32)
    assert halves(data)[..., 0::2].tolist() == (data & 15).tolist()
    assert halves(data)[..., 1::2].tolist() == (data >> 4).tolist()
    assert same_bits(halves(data, high_first=True), halves(data >> 4 | data << 4))
    assert same_bits(halves(data[:, ::2]), halves(data[:, ::2].copy()))
    codes = signed_pairs(data)
    assert codes[0::2].tolist() == (((data & 15) ^ 8).astype(int) - 8).tolist()
    assert codes[1::2].tolist() == (((data >> 4) ^ 8).astype(int) - 8).tolist()
