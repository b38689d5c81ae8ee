"""The kernels in C under AddressSanitizer and UndefinedBehaviorSanitizer: their tests read and write nothing that is not theirs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.built_kernels import CAN_BUILD
from tests.support.places import ROOT

KERNELS = ROOT / "stages/quantization/kernels"
TESTS = ("tests/stages/quantization/kernels/test_twins.py", "tests/stages/quantization/kernels/test_boundary.py")
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"

pytestmark = [pytest.mark.nightly, pytest.mark.skipif(not CAN_BUILD, reason="no compiler, or no headers of Python's")]


def instrumented(folder: Path) -> Path:
    """Build the module with sanitizers in a folder of its own."""
    defined = [f"-DCMAKE_C_FLAGS={FLAGS}", f"-DPython_EXECUTABLE={sys.executable}"]
    command = ["cmake", "-G", "Ninja", "-S", KERNELS, "-B", folder, *defined]
    for each in (command, ["cmake", "--build", folder]):
        ran = subprocess.run(each, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    (module,) = folder.glob("_kernels*.so")
    return module


def under_sanitizers(module: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter with the sanitizers' library loaded before it, as they need where it is not built with them."""
    library = subprocess.run(["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    environment = {
        **os.environ,
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own at its end are none of ours
        "PYTHONMALLOC": "malloc",  # so that each array has an end that is watched
        "HEADRACE_TEST_MODULE": str(module),
    }
    command = [sys.executable, "-X", "faulthandler", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_kernels_tests_pass_under_sanitizers(tmp_path: Path) -> None:
    module = instrumented(tmp_path / "built")
    ran = under_sanitizers(module, "-m", "pytest", "-v", "-p", "no:xdist", "-p", "tests.support.instrumented_kernels", *TESTS)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    assert " passed" in ran.stdout
    assert "skipped" not in ran.stdout

    # That they would see it: the same module, told of more room than there is.
    said = under_sanitizers(module, "-c", OVERRUN)
    assert "AddressSanitizer: heap-buffer-overflow" in said.stderr, said.stderr


# A buffer that claims twice the bytes that it has, as no array does.
OVERRUN = """
import ctypes
import numpy as np
import tests.support.instrumented_kernels
from stages.quantization.kernels import _kernels


memory = np.zeros(1024, dtype=np.uint8)
claimed = np.ctypeslib.as_array(ctypes.cast(memory.ctypes.data, ctypes.POINTER(ctypes.c_uint8)), (1, 2048))
_kernels.float8_rescaled(claimed, 1.0, 2.0, np.zeros((1, 2048), dtype=np.uint8))
"""
