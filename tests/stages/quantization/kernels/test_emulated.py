"""The kernels in C on aarch64, which an emulator runs, give the bytes of their NumPy twins."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT

COMPILER = shutil.which("aarch64-linux-gnu-gcc")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
KERNELS = ROOT / "stages/quantization/kernels"
OWN = ("module.c", "quantizing.c", "unpacking.c", "smoothing.c", "boundary.c")  # of the module: these know Python

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not (COMPILER and EMULATOR), reason="no compiler for aarch64, or no emulator"),
]


def options() -> list[str]:
    """The compiler's options, as CMakeLists.txt has them."""
    (line,) = [line for line in (KERNELS / "CMakeLists.txt").read_text().splitlines() if line.startswith("set(OPTIONS ")]
    return line.removeprefix("set(OPTIONS ").removesuffix(")").split()


def test_aarch64_gives_the_bytes_of_the_twins(tmp_path: Path) -> None:
    sources = [path for path in sorted(KERNELS.glob("*.c")) if path.name not in OWN]
    program = tmp_path / "kernels"
    command = [COMPILER, "-static", *options(), f"-I{KERNELS}", '-DLEVEL_NAME="aarch64"', *sources]
    command += [ROOT / "tests/support/emulated_kernels.c", "-o", program]
    subprocess.run(list(map(str, command)), check=True)
    environment = {**os.environ, "HEADRACE_TEST_PROGRAM": f"{EMULATOR} {program}"}
    tests = "tests/stages/quantization/kernels/test_twins.py"
    run = [sys.executable, "-m", "pytest", "-v", "-p", "no:xdist", "-p", "tests.support.emulated_kernels", tests]
    ran = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    assert " passed" in ran.stdout
    assert "skipped" not in ran.stdout
