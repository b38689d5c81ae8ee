"""A TensorRT-LLM 1.2.1 that builds nothing, for machines without a GPU: as strict with checkpoints and calls as the real one.

`packages/tensorrt_llm` is the Python package, `trtllm_build.py` the command; they share the loader and the parser as the real ones
do. Written from the format's description and by none of headrace's code, which they do not import.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
PACKAGES = FOLDER / "packages"
TORCH = FOLDER / "torch_alone"


def install(folder: Path, name: str = "trtllm-build") -> Path:
    """Put a `trtllm-build` into a folder, which can then be put on PATH; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    command = folder / name
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -P {FOLDER / "trtllm_build.py"} "$@"\n')
    command.chmod(0o755)
    return command


def python_path() -> str:
    """PYTHONPATH for processes that are to have the package, and a torch that takes no time to import."""
    return os.pathsep.join([str(TORCH), str(PACKAGES)])
