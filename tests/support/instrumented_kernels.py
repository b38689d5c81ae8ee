"""A plugin of pytest: the module of the kernels in C that HEADRACE_TEST_MODULE names takes the place of the one that is built."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import module_from_spec, spec_from_file_location

NAME = "stages.quantization.kernels._kernels"
spec = spec_from_file_location(NAME, os.environ["HEADRACE_TEST_MODULE"])
assert spec is not None
assert spec.loader is not None
package, _, name = NAME.rpartition(".")
module = module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules[NAME] = module
setattr(importlib.import_module(package), name, module)
