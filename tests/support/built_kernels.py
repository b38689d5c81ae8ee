"""The module of the kernels in C, for tests of it: where it is not built, these are skipped and one says whether that is right."""

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


def module() -> ModuleType | None:
    try:
        return importlib.import_module(NAME)
    except ImportError:
        return None


BUILT = module()
needs_module = pytest.mark.skipif(BUILT is None, reason="the kernels in C are not built, which test_chosen.py judges")


def levels() -> list[str]:
    """The levels of instructions that this processor has, the highest first."""
    assert BUILT is not None
    found: list[str] = BUILT.levels()
    return found


@contextmanager
def at(level: str) -> Iterator[ModuleType]:
    """The kernels of one level are in use."""
    assert BUILT is not None
    before = BUILT.use(level)
    try:
        yield BUILT
    finally:
        BUILT.use(before)
