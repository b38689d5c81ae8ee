"""Read a quantizer's settings, from config.json or from the quantizer's own file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.tensor.tensors import SourceFile
from stages.read.json_file import json_file

KEY = "quantization_config"
_OLD_KEY = "compression_config"  # compressed-tensors' until the autumn of 2024
_MODELOPT = "hf_quant_config.json"
# The files of AutoGPTQ, AutoAWQ and ModelOpt, with the method that each implies.
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", _MODELOPT: "modelopt"}
_CACHE = "kv_cache_quant_algo"  # the kind of cache that ModelOpt has scales of


def quantizer_settings(directory: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[SourceFile, ...]]:
    """Return the settings in `config`, or those of the first of FILES that is there, and the fingerprint of that file.

    Both are empty where there are no settings. Raises BadInput where the file is not a JSON object.
    """
    if section := settings_in(config):
        return _with_cache(directory, section)
    for name, method in FILES.items():
        if (directory / name).is_file():
            values, file = json_file(directory / name)
            return {"quant_method": method, **values}, (file,)
    return {}, ()


def settings_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the quantizer's settings in a model's configuration, under either of their keys; empty where it has none."""
    return next((dict(said) for key in (KEY, _OLD_KEY) if isinstance(said := config.get(key), Mapping) and said), {})


def _with_cache(directory: Path, section: dict[str, Any]) -> tuple[dict[str, Any], tuple[SourceFile, ...]]:
    """Settings of config.json with the kind of cache that ModelOpt's own file says, where they say none.

    ModelOpt writes both, and may name a cache of other codes than FP8's in its file alone.
    """
    if any(each.get(key) for each in (section, _inner(section)) for key in (_CACHE, "kv_cache_scheme")):
        return section, ()
    if not (directory / _MODELOPT).is_file():
        return section, ()
    values, file = json_file(directory / _MODELOPT)
    kind = _inner(values).get(_CACHE) or values.get(_CACHE)
    return ({**section, _CACHE: kind} if kind else section), (file,)


def _inner(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """ModelOpt's settings inside what it says of itself; nothing where they are not there."""
    inner = settings.get("quantization")
    return inner if isinstance(inner, Mapping) else {}
