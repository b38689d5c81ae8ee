"""The memory of a conversion that calibrates: as the plan says, below the limit, and the same for any number of layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.models import make, weights

LIMIT = 1300 << 20
SCRIPT = """
import json, sys
from pipeline import plan
from pipeline.run.execute import execute

model, tokens, output, limit = sys.argv[1:]
planned = plan(model_dir=model, output_dir=output, calibration_tokens=tokens, use_fp8=True, memory_limit=int(limit))
layer = planned.summary()["calibration"]["layer_bytes"]
result = execute(planned)
print(json.dumps({"peak": result.peak_memory_bytes, "projected": planned.budget.peak_bytes, "layer": layer}))
"""


def converted(place: Path, layers: int, noise: bytes) -> dict[str, Any]:
    """What a process that calibrates and converts a model of 8B's shape to FP8 says of itself."""
    model, output = place / f"model{layers}", place / f"out{layers}"
    make(model, "8B", layers=layers, noise=noise, vocab_size=8192)
    words = [sys.executable, "-c", SCRIPT, *map(str, (model, place / "tokens", output, LIMIT))]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert (output / "config.json").exists()
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@pytest.mark.nightly
def test_the_peak_is_flat_in_the_number_of_layers(tmp_path: Path) -> None:
    save_file({"input_ids": np.random.default_rng(0).integers(0, 8192, (2, 128))}, tmp_path / "tokens")
    few, many = (converted(tmp_path, layers, weights()) for layers in (4, 16))
    for each in (few, many):
        assert each["layer"] < each["peak"] <= each["projected"] <= LIMIT
    assert abs(many["peak"] - few["peak"]) < few["layer"] / 2, "12 layers more are 5 GB"
