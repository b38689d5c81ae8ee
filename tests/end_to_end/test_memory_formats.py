"""Peak memory is bounded by the setting for every packed format: processes stay under it with models that are larger."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.end_to_end.test_memory import peak
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.quantized_checkpoints import Arrays, Format
from tests.support.rank_matrices import FORMATS

LIMIT = 200 << 20
ROWS = 128  # of the matrices that are quantized, and repeated
SHAPE: dict[str, Any] = {
    **source.LLAMA,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 512,
}
AS_NUMBERS = (
    *(
        "gptq",
        "gptq 3 bits",
        "gptq act-order",
        "awq",
        "auto-round",
        "compressed w4a16",
        "compressed w8a8",
        "compressed fp8 dynamic",
    ),
    *("fp8 block", "nvfp4", "mxfp4", "bitsandbytes nf4 nested", "bitsandbytes int8", "hqq", "hqq across", "eetq", "modelopt awq"),
)
KEPT = ("gptq 3 bits", "awq", "compressed w4a16", "compressed w8a8", "modelopt fp8", "nvfp4", "eetq", "modelopt awq")
KINDS = {**FORMATS, "gptq act-order": source.gptq(index="order")}


def grown(kind: Format, module: str, out: int, features: int) -> Arrays:
    """A module of a format with as many rows, those of a small one again and again: sound, whatever its values stand for."""
    random = np.random.default_rng(1)
    few, more = (
        kind.quantizer(module, random.normal(0, 0.02, (n, features)).astype(np.float32)).parameters for n in (ROWS, 2 * ROWS)
    )
    result: Arrays = {}
    for name, values in few.items():
        longer = [axis for axis, (one, two) in enumerate(zip(values.shape, more[name].shape, strict=True)) if one != two]
        if longer:
            repeats = [out // ROWS if axis == longer[0] else 1 for axis in range(values.ndim)]
            result[name] = np.tile(values, repeats)
        else:
            result[name] = values
    for name in ("shape", "weight_shape"):
        if name in result:
            result[name] = np.array([out, features], result[name].dtype)
    for name in [name for name in result if "quant_state" in name]:
        state = {**json.loads(few[name].tobytes()), "shape": [out, features]}
        result[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return result


def write(directory: Path, kind: Format, layers: int) -> None:
    """A model of 218 million weights a layer."""
    config = {**SHAPE, "num_hidden_layers": layers}
    made: dict[tuple[str, int, int], Arrays] = {}
    stored: Arrays = {}
    for name, shape in checkpoints.shapes(config).items():
        module = name.removesuffix(".weight")
        if not source.linear(name):
            stored[name] = np.ones(shape, np.float16)
            continue
        key = (module.rpartition(".")[2], *shape)
        made.setdefault(key, grown(kind, module, *shape))
        stored |= {f"{module}.{local}": np.ascontiguousarray(values) for local, values in made[key].items()}
    checkpoints.save(directory, source.described(config, kind), stored)
    for name, content in kind.files.items():
        (directory / name).write_text(json.dumps(content))


def check(directory: Path, kind: Format, layers: int, **options: Any) -> None:
    try:
        write(directory / "model", kind, layers)
        out = str(directory / "out")
        measured = peak(model_dir=str(directory / "model"), output_dir=out, tp_size=2, workers=2, memory_limit=LIMIT, **options)
    finally:
        shutil.rmtree(directory)
    assert measured["peak"] <= measured["projected"] <= LIMIT < measured["written"]


@pytest.mark.nightly
@pytest.mark.parametrize("name", AS_NUMBERS)
def test_as_numbers(name: str, tmp_path: Path) -> None:
    check(tmp_path / "here", KINDS[name], 1, dequantize=True)


@pytest.mark.nightly
@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str, tmp_path: Path) -> None:
    check(tmp_path / "here", KINDS[name], 2)
