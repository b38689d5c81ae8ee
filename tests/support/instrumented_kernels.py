"""A plugin of pytest: the modules of the kernels in C that HEADRACE_TEST_MODULES names take the places of those that are built."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import module_from_spec, spec_from_file_location

NAMES = ("stages.quantization.kernels._kernels", "stages.verify.kernels._kernels")
for full, path in zip(NAMES, os.environ["HEADRACE_TEST_MODULES"].split(":"), strict=True):
    spec = spec_from_file_location(full, path)
    assert spec is not None
    assert spec.loader is not None
    package, _, name = full.rpartition(".")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[full] = module
    setattr(importlib.import_module(package), name, module)
