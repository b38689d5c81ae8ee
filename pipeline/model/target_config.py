"""Make TensorRT-LLM's config.json from the layout's template and the model's values.

Facts: docs/format/checkpoint.md, sections 5 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.model.model_config import ModelConfig
from pipeline.model.table_files import merge


def target_config(
    template: Mapping[str, Any], over: Mapping[str, Any], model: ModelConfig, target: Mapping[str, Any]
) -> dict[str, Any]:
    """Return config.json: the layout's `template` with the family's rows `over` it, filled with values of target and model.

    In both, "$name" stands for the value of that name, from `target` or else from `model`; "$name?" for the same, but the key is
    left out where it is null; "$null" for null; and "$omit" leaves the key out. The order of keys is the template's.
    """

    def fill(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: fill(inner) for key, inner in value.items()}
        if not isinstance(value, str) or not value.startswith("$"):
            return value
        name = value[1:].removesuffix("?")
        if name in ("null", "omit"):
            return None if name == "null" else _Omitted
        filled = target[name] if name in target else model.value(name)
        return _Omitted if filled is None and value.endswith("?") else filled

    def without_omitted(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: without_omitted(value) if isinstance(value, Mapping) and value else value
            for key, value in values.items()
            if value is not _Omitted
        }

    return without_omitted(merge(fill(template), fill(over)))


class _Omitted:
    """Stands for a value whose key is to be left out."""
