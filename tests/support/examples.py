"""How many examples a property is tried on."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

USUAL = 100  # of a property that does not say how many


def examples(count: int, **more: Any) -> settings:
    """`count` examples, or as many times more as the profile in use tries more than the usual."""
    return settings(max_examples=count * settings.default.max_examples // USUAL, **more)
