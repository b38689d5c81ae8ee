"""Read a quantizer's settings, from config.json or from the quantizer's own file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.tensor.tensors import SourceFile
from stages.read.json_file import json_file

KEY = "quantization_config"
# The files of AutoGPTQ, AutoAWQ and ModelOpt, with the method that each implies.
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


def quantizer_settings(directory: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[SourceFile, ...]]:
    """Return the settings in `config`, or those of the first of FILES that is there, and the fingerprint of that file.

    Both are empty where there are no settings. Raises BadInput where the file is not a JSON object.
    """
    section = config.get(KEY)
    if isinstance(section, dict):
        return section, ()
    for name, method in FILES.items():
        if (directory / name).is_file():
            values, file = json_file(directory / name)
            return {"quant_method": method, **values}, (file,)
    return {}, ()
