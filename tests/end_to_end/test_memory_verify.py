"""Verifying takes no more memory for a model that is larger: one whose source and ranks are many times what the process holds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.models import make, make_packed
from pipeline import convert
from pipeline.native import VARIABLE
from tests.support.built_kernels import needs_module

LIMIT = 150 << 20
PACKED_LIMIT = 250 << 20  # of codes that NumPy unpacks, some megabytes at once where they are packed along columns
LOGITS_LIMIT = 640 << 20  # of which torch's libraries are the greater part

VERIFY = """
import json, sys
from pathlib import Path
from pipeline.run.execute import peak_memory_bytes
from pipeline.reporting.verification import verify
result = verify(Path(sys.argv[1]), sys.argv[2], workers=2)
print(json.dumps({"ok": result.ok, "peak": peak_memory_bytes(), "bytes": result.integrity["bytes"]}))
"""
LOGITS = """
import json, sys
from pathlib import Path
import torch
from pipeline.run.execute import peak_memory_bytes
from stages.read.ranks import open_checkpoint
from stages.verify.forward.decoder import Decoder
checkpoint = open_checkpoint(Path(sys.argv[1]))
logits = Decoder(checkpoint, block_bytes=16 << 20).logits(torch.arange(3))
print(json.dumps({"ok": list(logits.shape) == [3, 128256], "peak": peak_memory_bytes(), "bytes": 0}))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """2.5 GB of 8B-shaped bf16 (its source takes no disk), at TP 2."""
    place = tmp_path_factory.mktemp("big")
    make(place / "model", "8B", layers=1, sparse=True)
    convert(model_dir=place / "model", output_dir=place / "ranks", tp_size=2, scheduler="threads")
    yield place / "model", place / "ranks"
    shutil.rmtree(place)


def measured(script: str, *arguments: Path) -> dict[str, int]:
    run = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(run.stdout)
    return found


def test_integrity_and_round_trip(ranks: tuple[Path, Path]) -> None:
    source, output = ranks
    found = measured(VERIFY, output, source)
    assert found["ok"]
    assert found["peak"] < LIMIT < found["bytes"]


@pytest.mark.nightly
@pytest.mark.parametrize("flags", [{"use_weight_only": True}, {"use_fp8_rowwise": True}], ids=str)
def test_round_trip_of_what_was_quantized(flags: dict[str, bool], ranks: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = ranks
    convert(model_dir=source, output_dir=tmp_path / "ranks", tp_size=2, scheduler="threads", **flags)
    found = measured(VERIFY, tmp_path / "ranks", source)
    assert found["ok"]
    assert found["peak"] < LIMIT < found["bytes"]


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("kernels", [pytest.param("auto", marks=needs_module), "numpy"])
def test_round_trip_of_codes_that_were_kept(method: str, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, kernels)
    make_packed(tmp_path / "model", "8B", 3, method, vocab_size=8192)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "ranks", tp_size=2, scheduler="threads")
    found = measured(VERIFY, tmp_path / "ranks", tmp_path / "model")
    assert found["ok"]
    assert found["peak"] < (PACKED_LIMIT if kernels == "numpy" else LIMIT)
    assert found["bytes"] > PACKED_LIMIT


@pytest.mark.nightly
def test_logits_of_the_ranks(ranks: tuple[Path, Path]) -> None:
    found = measured(LOGITS, ranks[1])
    assert found["ok"]
    # The embedding as float32 numbers is 2 GB alone.
    assert found["peak"] < LOGITS_LIMIT
