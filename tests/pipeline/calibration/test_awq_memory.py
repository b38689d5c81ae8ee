"""A search of AWQ's scales, in a process of its own: killed and taken up again, and its memory as the plan says."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.models import make

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from pipeline.calibration.plan import Calibration
from pipeline.model.awq_settings import AwqSettings
from pipeline.run.calibrations import calibrate, plan_ranges
model, tokens, output, stop = sys.argv[1:]

def advance(_, done, total):
    if stop == str(done):
        os.kill(os.getpid(), signal.SIGKILL)

output = Path(output)
asked = Calibration(Path(tokens), None, output.parent / "scratch", output.name, "bfloat16", awq=AwqSettings(128, 64))
file = plan_ranges(Path(model), output, asked, 4 << 30, None)
result = calibrate(file, advance)
facts = {"peak": result.peak_memory_bytes, "projected": file.plan.peak_bytes(False), "resumed": result.resumed_layers}
print(json.dumps({**facts, "layer": file.plan.layer_bytes}))
"""


def ran(folder: Path, output: str, stop: int, code: int = 0) -> str:
    words = [sys.executable, "-c", SCRIPT, *map(str, (folder / "model", folder / "tokens", folder / output, stop))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.mark.nightly
def test_a_killed_search_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    noise = (0.05 * np.random.default_rng(1).standard_normal(4096)).astype(ml_dtypes.bfloat16).tobytes()
    make(tmp_path / "model", "8B", layers=2, noise=noise, vocab_size=1024, **sizes)
    save_file({"input_ids": np.random.default_rng(0).integers(0, 1000, (4, 32))}, tmp_path / "tokens")
    ran(tmp_path, "ranges", 1, -signal.SIGKILL)
    assert json.loads(ran(tmp_path, "ranges", 0))["resumed"] == 1
    ran(tmp_path, "at once", 0)
    assert (tmp_path / "ranges").read_bytes() == (tmp_path / "at once").read_bytes()
    assert sum(name.endswith("|awq") for name in load_file(tmp_path / "ranges")) == 14


@pytest.mark.nightly
def test_memory_is_as_the_plan_says(tmp_path: Path) -> None:
    """A layer of half 8B's width: a quarter of its weights."""
    make(tmp_path / "model", "8B", layers=1, sparse=True, hidden_size=2048, intermediate_size=7168)
    save_file({"input_ids": np.random.default_rng(0).integers(0, 1000, (2, 256))}, tmp_path / "tokens")
    done = json.loads(ran(tmp_path, "ranges", 0))
    assert done["layer"] < done["peak"] <= done["projected"], done
