"""Packed formats of sources, one file each, and those that other packages add (entry points of `headrace.formats`)."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from pipeline.extensions import extensions
from stages.quantization.packed_format import PackedFormat

GROUP = "headrace.formats"


@cache
def formats() -> tuple[PackedFormat, ...]:
    """The packed formats: our own in the order of their file names, then those of other packages.

    Raises BadInput where another package's is none.
    """
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    own: list[PackedFormat] = [module.FORMAT for module in modules]
    return (*own, *extensions(GROUP, PackedFormat, [each.name for each in own]))


def format_named(name: str) -> PackedFormat:
    """The format of a name that `formats` has."""
    return next(each for each in formats() if each.name == name)
