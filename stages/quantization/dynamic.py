"""GPTQModel's `dynamic`: settings of single modules, by regular expressions of their names.

A pattern is matched from the beginning of a module's name, and the first that matches decides. `+:` or nothing before it: its
values stand in the place of those of all modules. `-:`: the module is not quantized.
Facts: docs/format/quantized-layouts.md, section 13.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

NOT = "-:"  # before the patterns of modules that are not quantized
_SIGNS = (NOT, "+:")


def module_settings(module: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of one module, by its name in the source: those of all with what the first pattern that matches has for it."""
    dynamic = settings.get("dynamic")
    for pattern, values in dynamic.items() if isinstance(dynamic, Mapping) else ():
        sign = next((sign for sign in _SIGNS if pattern.startswith(sign)), "")
        if _matches(pattern.removeprefix(sign), module):
            return {**settings, **values} if sign != NOT and isinstance(values, Mapping) else settings
    return settings


def _matches(pattern: str, module: str) -> bool:
    """Whether a module's name begins with what a pattern describes; a pattern that is none matches nothing."""
    try:
        return re.match(pattern, module) is not None
    except re.error:
        return False
