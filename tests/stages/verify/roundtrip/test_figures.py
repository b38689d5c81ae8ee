"""Figures add up over blocks, and a value rounded once is inside its bound where its neighbours are not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.verify.roundtrip.figures import BlockPlace, Figures, rounding
from tests.support.examples import examples


def test_figures_are_those_of_the_definitions() -> None:
    wanted, got = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.0, -2.5, 3.0])
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
    values = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    noisy = values + 0.01 * values.flip(0)
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
    figures.compare(torch.tensor([value]), torch.tensor([1.0]), 1e30)
    assert figures.wrong == 1
    assert figures.worst > 1


@examples(60)
@given(st.lists(st.floats(-6e4, 6e4, width=32), min_size=1), st.sampled_from([torch.bfloat16, torch.float16]))
def test_a_value_rounded_once_is_inside_and_the_next_one_is_not(values: list[float], kind: torch.dtype) -> None:
    wanted = torch.tensor(np.array(values, np.float32))
    rounded = wanted.to(kind)
    assert bool(((rounded.float() - wanted).abs() <= rounding(wanted, kind)).all())
    # Two steps away in the type itself.
    beside = (rounded.view(torch.int16) + 2).view(kind).float()
    far = (beside - wanted).abs() > rounding(wanted, kind)
    assert bool((far | ~torch.isfinite(beside) | (wanted.abs() < 0.001)).all())
