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
TESTS = (
    *(f"tests/stages/quantization/kernels/test_{name}.py" for name in ("twins", "boundary")),
    *(f"tests/stages/verify/kernels/test_{name}.py" for name in ("compared", "checks_boundary")),
)
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"

pytestmark = [pytest.mark.nightly, pytest.mark.skipif(not CAN_BUILD, reason="no compiler, or no headers of Python's")]


def instrumented(folder: Path) -> tuple[Path, Path]:
    """Build the modules with sanitizers in a folder of their own: that of the kernels, and that of verification's."""
    defined = [f"-DCMAKE_C_FLAGS={FLAGS}", f"-DPython_EXECUTABLE={sys.executable}"]
    command = ["cmake", "-G", "Ninja", "-S", KERNELS, "-B", folder, *defined]
    for each in (command, ["cmake", "--build", folder]):
        ran = subprocess.run(each, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    (module,), (checks,) = folder.glob("_kernels*.so"), folder.glob("checks/_kernels*.so")
    return module, checks


def under_sanitizers(modules: tuple[Path, Path], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter with the sanitizers' library loaded before it, as they need where it is not built with them."""
    library = subprocess.run(["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    environment = {
        **os.environ,
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own at its end are none of ours
        "PYTHONMALLOC": "malloc",  # so that each array has an end that is watched
        "HEADRACE_TEST_MODULES": ":".join(map(str, modules)),
    }
    command = [sys.executable, "-X", "faulthandler", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_kernels_tests_pass_under_sanitizers(tmp_path: Path) -> None:
    modules = instrumented(tmp_path / "built")
    ran = under_sanitizers(modules, "-m", "pytest", "-v", "-p", "no:xdist", "-p", "tests.support.instrumented_kernels", *TESTS)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    assert " passed" in ran.stdout
    assert "skipped" not in ran.stdout

    # That they would see it: the same modules, told of more room than there is.
    for overrun in OVERRUNS:
        said = under_sanitizers(modules, "-c", CLAIMED + overrun)
        assert "AddressSanitizer: heap-buffer-overflow" in said.stderr, said.stderr


# A buffer that claims twice the bytes that it has, as no array does.
CLAIMED = """
import ctypes
import numpy as np
import tests.support.instrumented_kernels
from stages.quantization.kernels import _kernels
from stages.verify.kernels import _kernels as checks


memory = np.zeros(1024, dtype=np.uint8)
claimed = np.ctypeslib.as_array(ctypes.cast(memory.ctypes.data, ctypes.POINTER(ctypes.c_uint8)), (1, 2048))
"""
OVERRUNS = (
    "_kernels.float8_rescaled(claimed, 1.0, 2.0, np.zeros((1, 2048), dtype=np.uint8))",
    "checks.words_as_rows(claimed.view(np.uint32).reshape(8, 64), np.zeros((64, 8), dtype=np.uint32))",
)
