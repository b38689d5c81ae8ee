"""unpack: the inverse of the format's packing; leaves dense modules alone.

Works module by module on local parameter names, so that it knows no family. Each module of `stages/quantization` that has
`accepts` and `unpack` is a format; adding a format is adding a file there.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import defaultdict
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import stages.quantization
from pipeline.tensors import TensorMap

if TYPE_CHECKING:
    import dask.array as da


@cache
def formats() -> tuple[ModuleType, ...]:
    """The packed formats, in the order of their file names."""
    package = stages.quantization
    found = [importlib.import_module(f"{package.__name__}.{module.name}") for module in pkgutil.iter_modules(package.__path__)]
    return tuple(module for module in found if hasattr(module, "accepts"))


def format_of(parameters: frozenset[str]) -> ModuleType | None:
    """The format whose parameters a module's are; None for a dense module."""
    return next((module for module in formats() if module.accepts(parameters)), None)


def unpack(tensors: TensorMap) -> TensorMap:
    """Turn every packed module into canonical parameters (`weight`, `bias`)."""
    modules: dict[str, dict[str, da.Array]] = defaultdict(dict)
    for name, array in tensors.items():
        module, _, parameter = name.rpartition(".")
        modules[module][parameter] = array
    result = {}
    for module, parameters in modules.items():
        packing = format_of(frozenset(parameters))
        for parameter, array in (packing.unpack(parameters) if packing else parameters).items():
            result[f"{module}.{parameter}"] = array
    return result
