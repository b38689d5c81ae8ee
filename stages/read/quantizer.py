"""What a quantizer says of its work: a section of config.json, or a file of its own beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.tensor.tensors import SourceFile
from stages.read.json_file import json_file

KEY = "quantization_config"
# AutoGPTQ's, AutoAWQ's and ModelOpt's, and the method that each goes without saying.
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


def quantizer_settings(directory: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[SourceFile, ...]]:
    """The settings that `config` has, or the first of the files; and the file. Raises BadInput where that is no JSON object."""
    section = config.get(KEY)
    if isinstance(section, dict):
        return section, ()
    for name, method in FILES.items():
        if (directory / name).is_file():
            values, file = json_file(directory / name)
            return {"quant_method": method, **values}, (file,)
    return {}, ()
