"""The modules of the kernels in C, for tests of them: where they are not built, these are skipped, which one test judges."""

from __future__ import annotations

import importlib
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

# Whether this machine has what the module is built with.
_HEADER = Path(sysconfig.get_path("include"), "Python.h")
CAN_BUILD = all(shutil.which(tool) for tool in ("cc", "cmake", "ninja")) and _HEADER.exists()
NAME = "stages.quantization.kernels._kernels"
CHECKS = "stages.verify.kernels._kernels"  # those of verification


def module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


BUILT, BUILT_CHECKS = module(NAME), module(CHECKS)
needs_module = pytest.mark.skipif(BUILT is None, reason="the kernels in C are not built, which test_chosen.py judges")


def levels() -> list[str]:
    """The levels of instructions that this processor has, the highest first."""
    assert BUILT is not None
    found: list[str] = BUILT.levels()
    return found


@contextmanager
def at(level: str) -> Iterator[ModuleType]:
    """The kernels of one level are in use, in each module that has it."""
    assert BUILT is not None
    before = [(module, module.use(level)) for module in (BUILT, BUILT_CHECKS) if module and level in module.levels()]
    try:
        yield BUILT
    finally:
        for module, used in before:
            module.use(used)
