"""Whether loops over all values run in C, where it was built, or in NumPy, which gives the same: the environment says.

The environment variable HEADRACE_KERNELS is `c`, `numpy`, or `auto`, which is C where its module can be imported.
"""

from __future__ import annotations

import os

from pipeline.errors import BadInput, Problem

VARIABLE = "HEADRACE_KERNELS"
AUTO, C, NUMPY = "auto", "c", "numpy"


def native_problems(missing: str) -> list[Problem]:
    """Whether HEADRACE_KERNELS asks for what there is not. `missing`: why a module in C cannot be imported, "" where it can."""
    said = os.environ.get(VARIABLE) or AUTO
    if said not in (AUTO, C, NUMPY):
        return [Problem(VARIABLE, said, f"{C}, {NUMPY} or {AUTO}", "Unset it: it is for tests and measurements")]
    if said == C and missing:
        remedy = "Install headrace again where there is a C compiler, or unset it: the NumPy kernels give the same bytes"
        return [Problem(VARIABLE, f"{C}, but the module of the C kernels cannot be imported: {missing}", "the module", remedy)]
    return []


def native(missing: str) -> bool:
    """Whether to use C. Raises BadInput where HEADRACE_KERNELS asks for what there is not."""
    if problems := native_problems(missing):
        raise BadInput(problems)
    return not missing and os.environ.get(VARIABLE) != NUMPY
