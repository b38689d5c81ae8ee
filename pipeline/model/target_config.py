"""TensorRT-LLM's config.json, from the layout's template and the model's values (checkpoint-format, sections 5 and 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.model.model_config import ModelConfig
from pipeline.model.tables import merge


def target_config(
    template: Mapping[str, Any], over: Mapping[str, Any], model: ModelConfig, target: Mapping[str, Any]
) -> dict[str, Any]:
    """Fill the layout's `template`, and lay the family's rows `over` it, from the target's values and the model's.

    "$name" is a value, "$name?" one whose key is left out where it is null, "$null" null, and "$omit" leaves the key out.
    """

    def fill(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: fill(inner) for key, inner in value.items()}
        if not isinstance(value, str) or not value.startswith("$"):
            return value
        name = value[1:].removesuffix("?")
        if name in ("null", "omit"):
            return None if name == "null" else _Omitted
        found = target[name] if name in target else model.value(name)
        return _Omitted if found is None and value.endswith("?") else found

    def kept(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: kept(value) if isinstance(value, Mapping) and value else value
            for key, value in values.items()
            if value is not _Omitted
        }

    return kept(merge(fill(template), fill(over)))


class _Omitted:
    """In the place of a value whose key is to be left out."""
