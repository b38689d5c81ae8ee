"""How much of a test is tried by day: how many random examples, which of many like values."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
from hypothesis import settings

USUAL = 100  # of a property that does not say how many


def examples(count: int, **more: Any) -> settings:
    """`count` examples, or as many times more or fewer as the profile in use tries more or fewer than the usual."""
    return settings(max_examples=max(count * settings.default.max_examples // USUAL, 1), **more)


def by_night(values: Iterable[Any], day: Collection[Any]) -> list[Any]:
    """Values to be tried one by one: those of `day` always, the others by night alone. Those of several names are tuples."""
    listed = list(values)
    assert all(value in listed for value in day), "a value by day that there is not"
    return [
        value if value in day else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.nightly)
        for value in listed
    ]
