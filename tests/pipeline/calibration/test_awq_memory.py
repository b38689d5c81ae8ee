"""A search of AWQ's scales, in a process of its own: killed and taken up again, and its memory as the plan says."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.models import make
from tests.support.calibrations import ran, random_tokens


@pytest.mark.nightly
def test_a_killed_search_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    noise = (0.05 * np.random.default_rng(1).standard_normal(4096)).astype(ml_dtypes.bfloat16).tobytes()
    make(tmp_path / "model", "8B", layers=2, noise=noise, vocab_size=1024, **sizes)
    random_tokens(tmp_path / "tokens", 1000, (4, 32))
    ran(tmp_path, "ranges", killed_after=1, awq=True)
    assert ran(tmp_path, "ranges", awq=True)["resumed"] == 1
    ran(tmp_path, "at once", awq=True)
    assert (tmp_path / "ranges").read_bytes() == (tmp_path / "at once").read_bytes()
    assert sum(name.endswith("|awq") for name in load_file(tmp_path / "ranges")) == 14


@pytest.mark.nightly
def test_memory_is_as_the_plan_says(tmp_path: Path) -> None:
    """A layer of half 8B's width: a quarter of its weights."""
    make(tmp_path / "model", "8B", layers=1, sparse=True, hidden_size=2048, intermediate_size=7168)
    random_tokens(tmp_path / "tokens", 1000, (2, 256))
    done = ran(tmp_path, "ranges", awq=True)
    assert done["layer"] < done["peak"] <= done["projected"], done
