"""Figures add up over blocks, and a value rounded once is inside its bound where its neighbours are not."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.verify.roundtrip.bounds import rounding
from stages.verify.roundtrip.figures import RUN, BlockPlace, Figures
from stages.verify.values import rounded, to_float32
from tests.support.examples import examples


def test_figures_are_those_of_the_definitions() -> None:
    wanted, got = np.array([1.0, -2.0, 3.0], np.float32), np.array([1.0, -2.5, 3.0], np.float32)
    figures = Figures()
    figures.compare(got, wanted, 0.4, BlockPlace(10))
    summary = figures.summary()
    assert summary["elements"] == 3
    assert summary["max_abs"] == 0.5
    assert summary["bound"] == pytest.approx(1.25)
    assert summary["relative_rms"] == pytest.approx(math.sqrt(0.25 / 14))
    assert summary["snr_db"] == pytest.approx(10 * math.log10(14 / 0.25))
    assert summary["cosine"] == pytest.approx((1 + 5 + 9) / math.sqrt(14 * (1 + 6.25 + 9)))
    assert figures.wrong == 1
    assert figures.first == ("[11]", -2.5, -2.0)


def test_blocks_add_up_to_the_whole() -> None:
    values = np.random.default_rng(0).standard_normal((40, 8), dtype=np.float32)
    noisy = values + np.float32(0.01) * values[::-1]
    whole, parts = Figures(), Figures()
    whole.compare(noisy, values, 1.0)
    for start in range(0, 40, 7):
        part = Figures()
        part.compare(noisy[start : start + 7], values[start : start + 7], 1.0)
        parts.add(part)
    assert parts.summary() == pytest.approx(whole.summary())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_wrong(value: float) -> None:
    figures = Figures()
    figures.compare(np.array([value], np.float32), np.array([1.0], np.float32), 1e30)
    assert figures.wrong == 1
    assert figures.worst > 1


SCALES = [1.0, 1e-25, 1e25]  # the squares of the last two are no float32


@pytest.mark.parametrize("off", [1 / 300, 3.0])
@pytest.mark.parametrize("scale", SCALES)
def test_figures_are_those_of_float64(scale: float, off: float) -> None:
    """The sums of a block, which are float32 for a while, and a cosine that is made of the others where errors are small."""
    random = np.random.default_rng(1)
    wanted = (random.standard_normal((5, RUN // 2 + 3)) * scale).astype(np.float32)
    got = (wanted * (1 + random.standard_normal(wanted.shape) * off)).astype(np.float32)
    bound = np.abs(wanted) * np.float32(0.01) + np.float32(1e-38)
    figures = Figures()
    figures.compare(got, wanted, lambda: bound)
    a, b = got.astype(np.float64), wanted.astype(np.float64)
    noise, power, square = (float(np.square(each).sum()) for each in (a - b, b, a))
    summary = figures.summary()
    assert summary["relative_rms"] == pytest.approx(math.sqrt(noise / power), rel=1e-5)
    assert summary["snr_db"] == pytest.approx(10 * math.log10(power / noise), rel=1e-6)
    assert 1 - summary["cosine"] == pytest.approx(1 - float((a * b).sum()) / math.sqrt(power * square), rel=1e-4)
    assert summary["max_abs"] == pytest.approx(float(np.abs(a - b).max()))
    assert summary["bound"] == pytest.approx(float((np.abs(a - b) / bound).max()), rel=1e-5)
    assert figures.wrong == int((np.abs(got - wanted) > bound).sum()) > 0


@examples(60)
@given(st.lists(st.floats(-6e4, 6e4, width=32), min_size=1), st.sampled_from([ml_dtypes.bfloat16, np.float16]))
def test_a_value_rounded_once_is_inside_and_the_next_one_is_not(values: list[float], kind: Any) -> None:
    wanted, dtype = np.array(values, np.float32), np.dtype(kind)
    nearest = rounded(wanted, dtype)
    assert (np.abs(to_float32(nearest) - wanted) <= rounding(wanted, dtype)).all()
    # Two steps away in the type itself.
    beside = to_float32((nearest.view(np.int16) + np.int16(2)).view(dtype))
    far = np.abs(beside - wanted) > rounding(wanted, dtype)
    assert (far | ~np.isfinite(beside) | (np.abs(wanted) < 0.001)).all()
