"""Which kernels a process uses: those in C, or their NumPy twins, which give the same bytes.

The environment variable HEADRACE_KERNELS says it (pipeline/native.py). Nothing slow is imported here: `headrace --version` asks.
"""

from __future__ import annotations

from pipeline import native
from pipeline.errors import Problem
from pipeline.native import NUMPY as NUMPY
from pipeline.native import VARIABLE as VARIABLE
from pipeline.native import C as C

try:
    from stages.quantization.kernels import _kernels
except ImportError as error:  # it was not built, or for another system
    _missing = str(error)
else:
    _missing = ""


def kernel_problems() -> list[Problem]:
    """Whether HEADRACE_KERNELS asks for what there is not."""
    return native.native_problems(_missing)


def c_is_used() -> bool:
    """Whether this process uses the kernels in C. Raises BadInput where HEADRACE_KERNELS asks for what there is not."""
    return native.native(_missing)


def kernels_in_use() -> str:
    """The kernels in use, with the level of the processor's instructions: `C (x86-64-v4)`, or `NumPy`."""
    return f"C ({_kernels.level()})" if c_is_used() else "NumPy"
