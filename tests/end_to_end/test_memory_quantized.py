"""Peak memory of quantized conversions: under the setting, with models that are larger."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.end_to_end.test_memory import peak
from tests.end_to_end.test_quantized_runs import FLOAT8, INT4, INT8
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.examples import by_night
from tests.support.quantized_checkpoints import Format

# Each layer is 110 MB in 4 bits, 440 MB in 16.
BIG: dict[str, Any] = {
    **checkpoints.LLAMA,
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 1024,
    "quantization_config": {},
}
MIB = 1 << 20


def write_holes(directory: Path, config: dict[str, Any], kind: Format | None) -> int:
    """A checkpoint of zeros that takes no disk; returns its bytes."""
    said = {key: value for key, value in config.items() if key != "quantization_config"}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(source.described(said, kind) if kind else said))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in checkpoints.shapes(config).items():
        rows: dict[str, tuple[str, tuple[int, ...]]] = {name: ("BF16", shape)}
        if kind and source.linear(name):
            module, (out, features) = name.removesuffix(".weight"), shape
            packed = kind.quantizer("model.layers.0.mlp.up_proj", np.zeros((64, 128), np.float32) + np.float32(0.5)).parameters
            rows = {f"{module}.{key}": _grown(values, out, features) for key, values in packed.items()}
        for key, (dtype, sizes) in rows.items():
            nbytes = int(np.prod(sizes)) * {"I64": 8, "I32": 4, "F32": 4, "F16": 2, "BF16": 2}.get(dtype, 1)
            header[key] = {"dtype": dtype, "shape": sizes, "data_offsets": [end, end + nbytes]}
            end += nbytes
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def _grown(values: np.ndarray, out: int, features: int) -> tuple[str, tuple[int, ...]]:
    """The type and shape of a parameter of a module [64, 128], were it [out, features]."""
    names = {"int32": "I32", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "uint8": "U8", "float8_e4m3fn": "F8_E4M3"}
    # Each axis is a share of one or the other: of 64 out-features or of 128 in-features in groups of 64.
    shares = {64: out, 8: out // 8, 32: out // 2, 128: features, 16: features // 8, 2: features // 64}
    sizes = [shares.get(size, size) for size in values.shape]
    return names[str(values.dtype)], tuple(sizes)


# What is converted, with how many layers: enough for source and output to be larger than the limit.
MEMORY: dict[str, tuple[Format | None, int, dict[str, Any]]] = {
    "gptq": (source.gptq(index="none"), 2, {}),
    "awq": (source.awq(), 2, {}),
    "dequantized": (source.gptq(index="none"), 2, {"dequantize": True}),
    "again": (source.gptq(), 2, {"requantize": True}),  # of zeros, g_idx too is an order of its own
    "int8": (None, 1, INT8),
    "int4": (None, 2, INT4),
    "rows": (None, 1, FLOAT8),
}


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        *by_night(itertools.product(MEMORY, ["threads"]), [("gptq", "threads"), ("int8", "threads"), ("rows", "threads")]),
        *by_night([("gptq", "local"), ("int8", "local")], [("int8", "local")]),
    ],
)
def test_peak_memory(name: str, scheduler: str, tmp_path: Path) -> None:
    kind, layers, options = MEMORY[name]
    nbytes, limit = write_holes(tmp_path / "model", {**BIG, "num_hidden_layers": layers}, kind), 200 * MIB
    arguments = {"model_dir": str(tmp_path / "model"), "output_dir": str(tmp_path / "out"), "tp_size": 2, "workers": 2}
    measured = peak(**arguments, scheduler=scheduler, memory_limit=limit, **options)
    shutil.rmtree(tmp_path / "out")
    assert limit < nbytes, "the model is larger than the limit"
    assert measured["peak"] <= measured["projected"] <= limit < measured["written"]
