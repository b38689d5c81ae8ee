"""Which kernels a process uses: what the environment may ask for, and that C is built where there is a compiler."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import BadInput
from stages.quantization.kernels import chosen, compiled, twins
from stages.quantization.kernels.dispatch import kernels
from tests.support import checkpoints
from tests.support.built_kernels import BUILT, BUILT_CHECKS, CAN_BUILD, needs_module
from tests.support.commands import convert
from tests.support.places import ROOT


def version(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headrace", "--version"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_module_is_built_where_there_is_a_compiler() -> None:
    assert (BUILT is not None and BUILT_CHECKS is not None) or not CAN_BUILD, (
        "pip install --editable . builds it, as make test does"
    )


@needs_module
def test_c_is_used_unless_something_else_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BUILT is not None
    for said, wanted in (("", compiled), ("auto", compiled), ("c", compiled), ("numpy", twins)):
        monkeypatch.setenv(chosen.VARIABLE, said)
        assert kernels() is wanted
    monkeypatch.delenv(chosen.VARIABLE)
    assert kernels() is compiled
    assert chosen.kernels_in_use() == f"C ({BUILT.levels()[0]})"


def test_without_the_module_the_twins_are_used_and_c_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "_missing", "no such module")
    for said in ("", "auto", "numpy"):
        monkeypatch.setenv(chosen.VARIABLE, said)
        assert kernels() is twins
        assert chosen.kernels_in_use() == "NumPy"
    monkeypatch.setenv(chosen.VARIABLE, "c")
    with pytest.raises(BadInput, match=r"HEADRACE_KERNELS: found c, but .*no such module"):
        kernels()


def test_what_there_is_not_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    monkeypatch.setenv(chosen.VARIABLE, "fortran")
    ran = convert(tmp_path / "model", tmp_path / "out")
    assert ran.code == 2
    assert "HEADRACE_KERNELS: found fortran" in ran.err
    assert not (tmp_path / "out").exists()


def test_the_version_says_which_kernels_are_in_use() -> None:
    assert version(HEADRACE_KERNELS="numpy").stdout.splitlines()[1] == "kernels: NumPy"
    assert version().stdout.splitlines()[1] == f"kernels: {chosen.kernels_in_use()}"
    refused = version(HEADRACE_KERNELS="fortran")
    assert refused.returncode == 2
    assert "found fortran" in refused.stderr


def test_a_checkout_without_the_module_is_used_as_it_is(tmp_path: Path) -> None:
    """PYTHONPATH names another checkout, which nobody has built: its own files are imported, and no other's module."""
    for name in ("headrace.py", "pipeline", "stages"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name, **({"ignore": shutil.ignore_patterns("*.so")} if copy is shutil.copytree else {}))
    script = "import stages.quantization.kernels.chosen as c; print(c.__file__, c.kernels_in_use())"
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [str(tmp_path / "stages/quantization/kernels/chosen.py"), "NumPy"]


def test_the_twins_are_what_numpy_gives() -> None:
    """Where this process uses C, the twins are still there to be called."""
    values = np.array([[1, -2, 448, 0]], dtype=np.float32)
    assert twins.float8_codes(values, 1, 1200.0, "w")[0].view(np.uint8).tolist() == [[0x38, 0xC0, 0x7E, 0]]
