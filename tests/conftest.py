"""What all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("headrace", deadline=None, derandomize=True)
settings.load_profile("headrace")

DATA = Path(__file__).parent / "data"


@pytest.fixture
def data() -> Path:
    return DATA
