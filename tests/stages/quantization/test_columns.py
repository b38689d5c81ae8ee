"""Codes that are packed along columns are taken out of a file some rows of words at a time, and are the same as all at once."""

from __future__ import annotations

import numpy as np
import pytest

from stages.quantization import columns
from stages.quantization.kernels import twins
from tests.support.lazy import block


@pytest.mark.parametrize("window", [1, 1 << 20])
@pytest.mark.parametrize("rows", [2, 128, 130, 400])
@pytest.mark.parametrize("some", [(0, 40), (3, 21)])
def test_rows_are_those_of_the_whole(window: int, rows: int, some: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "WINDOW_BYTES", window)
    words = np.random.default_rng(rows).integers(-(1 << 31), 1 << 31, (rows, 40), dtype=np.int64).astype(np.int32)
    part = words[:, slice(*some)]
    assert np.array_equal(columns.rows_of_words(block(words), some), twins.transposed(part))
    assert np.array_equal(columns.rows_of_awq(block(words), some), twins.awq_codes(part))
    assert np.array_equal(twins.transposed(part, np.zeros(part.shape[::-1], np.uint32)), part.view(np.uint32).T)
