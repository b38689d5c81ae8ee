"""Which kernels a process uses: those in C, or their NumPy twins, which give the same bytes.

The environment variable HEADRACE_KERNELS says it: `c`, `numpy`, or `auto`, which is C where the module was built. Nothing slow is
imported here: `headrace --version` asks.
"""

from __future__ import annotations

import os

from pipeline.errors import BadInput, Problem

try:
    from stages.quantization.kernels import _kernels
except ImportError as error:  # it was not built, or for another system
    _missing = str(error)
else:
    _missing = ""

VARIABLE = "HEADRACE_KERNELS"
AUTO, C, NUMPY = "auto", "c", "numpy"


def kernel_problems() -> list[Problem]:
    """Whether HEADRACE_KERNELS asks for what there is not."""
    said = os.environ.get(VARIABLE) or AUTO
    if said not in (AUTO, C, NUMPY):
        return [Problem(VARIABLE, said, f"{C}, {NUMPY} or {AUTO}", "Unset it: it is for tests and measurements")]
    if said == C and _missing:
        remedy = "Install headrace again where there is a C compiler, or unset it: the NumPy kernels give the same bytes"
        return [Problem(VARIABLE, f"{C}, but the module of the C kernels cannot be imported: {_missing}", "the module", remedy)]
    return []


def c_is_used() -> bool:
    """Whether this process uses the kernels in C. Raises BadInput where HEADRACE_KERNELS asks for what there is not."""
    if problems := kernel_problems():
        raise BadInput(problems)
    return not _missing and os.environ.get(VARIABLE) != NUMPY


def kernels_in_use() -> str:
    """The kernels in use, with the level of the processor's instructions: `C (x86-64-v4)`, or `NumPy`."""
    return f"C ({_kernels.level()})" if c_is_used() else "NumPy"
