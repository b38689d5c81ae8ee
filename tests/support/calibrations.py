"""Calibrations in processes of their own, which can be killed and whose memory is theirs alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from pipeline.calibration.plan import Calibration
from pipeline.model.awq_settings import AwqSettings
from pipeline.run.calibrations import calibrate, plan_ranges
model, tokens, output, stop, searched = sys.argv[1:]

def advance(_, done, total):
    if stop == str(done):
        os.kill(os.getpid(), signal.SIGKILL)

output = Path(output)
awq = {"awq": AwqSettings(128, 64)} if searched == "awq" else {}
asked = Calibration(Path(tokens), None, output.parent / "scratch", output.name, "bfloat16", **awq)
file = plan_ranges(Path(model), output, asked, 4 << 30, None)
result = calibrate(file, advance)
facts = {"peak": result.peak_memory_bytes, "projected": file.plan.peak_bytes(False), "resumed": result.resumed_layers}
print(json.dumps({**facts, "layer": file.plan.layer_bytes}))
"""


def random_tokens(path: Path, vocabulary: int, shape: tuple[int, int]) -> Path:
    save_file({"input_ids": np.random.default_rng(0).integers(0, vocabulary, shape)}, path)
    return path


def ran(folder: Path, output: str, *, killed_after: int = 0, awq: bool = False) -> dict[str, Any]:
    """Calibrate `folder`/model on `folder`/tokens into `folder`/`output`: its measured and projected memory, a layer's bytes, and
    how many layers it took up; nothing where it was killed after so many."""
    places = (folder / "model", folder / "tokens", folder / output)
    words = [sys.executable, "-c", SCRIPT, *map(str, places), str(killed_after), "awq" if awq else ""]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == (-signal.SIGKILL if killed_after else 0), done.stderr
    return {} if killed_after else json.loads(done.stdout)
