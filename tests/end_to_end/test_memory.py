"""Peak memory is bounded by the setting: models larger than the limit convert in processes that stay under it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.models import make
from tests.support.examples import by_night
from tests.support.places import SMOLLM2 as MODEL
from tests.support.range_server import range_server

SCRIPT = """
import json, sys
from pipeline import convert, plan
options = json.loads(sys.argv[1])
projected = plan(**options).budget.peak_bytes
result = convert(**options)
moved = {"written": result.bytes_written, "scratch": result.scratch_bytes_written}
print(json.dumps({"projected": projected, "peak": result.peak_memory_bytes, **moved}))
"""


def peak(**options: object) -> dict[str, int]:
    """Convert in a process of its own, whose high-water mark is that of the conversion alone."""
    run = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(options)], capture_output=True, text=True, check=True)
    measured: dict[str, int] = json.loads(run.stdout)
    return measured


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 GB of 8B-shaped bf16 that takes no disk: its embedding alone is 268 MB, more than the limit."""
    directory = tmp_path_factory.mktemp("big")
    make(directory, "8B", layers=1, sparse=True, vocab_size=1 << 15)
    return directory


@pytest.mark.parametrize(
    ("scheduler", "dtype"),
    by_night(itertools.product(["threads", "local"], ["bfloat16", "float16"]), [("threads", "bfloat16"), ("local", "float16")]),
)
def test_dense(big: Path, scheduler: str, dtype: str, tmp_path: Path) -> None:
    limit = 200 << 20
    out = str(tmp_path / "out")
    measured = peak(model_dir=str(big), output_dir=out, tp_size=2, dtype=dtype, scheduler=scheduler, workers=2, memory_limit=limit)
    assert measured["peak"] <= measured["projected"] <= limit < measured["written"]


@pytest.mark.nightly
@pytest.mark.parametrize("options", [{}, {"use_weight_only": True}])
def test_a_source_behind_a_url(big: Path, options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched ahead is in memory, and no page of a file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    limit, out = 220 << 20, str(tmp_path / "out")
    with range_server(big) as served:
        measured = peak(
            model_dir=served.url, output_dir=out, tp_size=2, scheduler="threads", workers=2, memory_limit=limit, **options
        )
    assert measured["peak"] <= measured["projected"] <= limit < measured["written"]


def test_packed(tmp_path: Path) -> None:
    limit = 200 << 20
    measured = peak(model_dir=str(MODEL), output_dir=str(tmp_path / "out"), tp_size=3, workers=2, memory_limit=limit)
    assert measured["peak"] <= measured["projected"] <= limit < measured["written"]


@pytest.mark.parametrize("scheduler", by_night(["threads", "local"], ["local"]))
def test_a_mixture_of_thousands_of_tensors(scheduler: str, tmp_path: Path) -> None:
    """Here the plan is more than the pieces: each tensor is three arrays on its way to int8."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    make(tmp_path / "model", "235B", layers=8, sparse=True, vocab_size=256, **sizes)
    ranks = {"tp_size": 2, "moe_ep_size": 2, "use_weight_only": True}
    measured = peak(
        model_dir=str(tmp_path / "model"),
        output_dir=str(tmp_path / "out"),
        scheduler=scheduler,
        workers=2,
        **ranks,
        memory_limit=300 << 20,
    )
    assert measured["peak"] <= measured["projected"] <= 300 << 20
