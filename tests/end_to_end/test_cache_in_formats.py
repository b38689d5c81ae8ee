"""The scales of an FP8 key-value cache of packed sources."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline import convert
from pipeline.reporting.verification import verify
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.quantized_checkpoints import LLAMA
from tests.support.rank_files import read
from tests.support.rank_matrices import FORMATS, quantization


def test_scales_of_the_cache(tmp_path: Path) -> None:
    source.write(tmp_path / "model", LLAMA, FORMATS["modelopt fp8"])
    options = {"model_dir": tmp_path / "model", "tp_size": 2, "pp_size": 2, "scheduler": "threads"}
    convert(output_dir=tmp_path / "with", fp8_kv_cache=True, **options)
    convert(output_dir=tmp_path / "without", **options)
    assert quantization(tmp_path / "with")["kv_cache_quant_algo"] == "FP8"
    assert quantization(tmp_path / "without")["kv_cache_quant_algo"] is None
    name = "transformer.layers.0.attention.kv_cache_scaling_factor"
    for rank in range(4):
        held = read(tmp_path / f"with/rank{rank}.safetensors")
        # The larger of the two: keys of the first layer have 0.75, those of the second 1.75.
        assert held.pop(name).tolist() == [0.75 + rank // 2]
        plain = read(tmp_path / f"without/rank{rank}.safetensors")
        assert held.keys() == plain.keys()
        assert all(np.array_equal(held[key].view(np.uint8), plain[key].view(np.uint8)) for key in plain)


@pytest.mark.parametrize("name", ["float", "gptq", "compressed fp8"])
def test_a_cache_without_scales_has_ones(name: str, tmp_path: Path) -> None:
    if name == "float":
        checkpoints.save(tmp_path / "model", LLAMA, source.values(LLAMA))
    else:
        source.write(tmp_path / "model", LLAMA, FORMATS[name])
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", fp8_kv_cache=True, tp_size=2, scheduler="threads")
    assert quantization(tmp_path / "out")["kv_cache_quant_algo"] == "FP8"
    for rank in range(2):
        held = read(tmp_path / f"out/rank{rank}.safetensors")
        for layer in range(2):
            scale = held[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"]
            assert (scale.tolist(), scale.dtype) == ([1.0], np.float32)


def test_scales_of_the_cache_outlive_dequantization(tmp_path: Path) -> None:
    source.write(tmp_path / "model", LLAMA, FORMATS["modelopt fp8"])
    options = {"dequantize": True, "fp8_kv_cache": True, "scheduler": "threads"}
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", **options)
    held = read(tmp_path / "out/rank0.safetensors")
    assert held["transformer.layers.1.attention.kv_cache_scaling_factor"].tolist() == [1.75]


@pytest.mark.parametrize("said", ["hf_quant_config.json", "config.json"])
def test_scales_of_an_nvfp4_cache_are_not_those_of_fp8(said: str, tmp_path: Path) -> None:
    """ModelOpt's are by 6 * 448, where those of an FP8 cache are by 448, under the same names."""
    source.write(tmp_path / "model", LLAMA, FORMATS["modelopt fp8"])
    file = tmp_path / "model/hf_quant_config.json"
    settings = json.loads(file.read_text())
    settings["quantization"]["kv_cache_quant_algo"] = "NVFP4" if said == file.name else None
    file.write_text(json.dumps(settings))
    if said == "config.json":
        config = tmp_path / "model/config.json"
        scheme = {"dynamic": False, "num_bits": 4, "type": "float"}
        held_ = {**json.loads(config.read_text()), "quantization_config": {"quant_method": "modelopt", "kv_cache_scheme": scheme}}
        config.write_text(json.dumps(held_))
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", fp8_kv_cache=True, scheduler="threads")
    held = read(tmp_path / "out/rank0.safetensors")
    assert [held[f"transformer.layers.{n}.attention.kv_cache_scaling_factor"].tolist() for n in range(2)] == [[1.0], [1.0]]
    left = json.loads((tmp_path / "out/headrace.json").read_text())["left_out"]
    kind = "NVFP4" if said == file.name else "4-bit floats"
    assert left["model.layers.0.self_attn.k_proj.k_scale"] == f"the scale of a cache of {kind}, which is not that of an FP8 cache"
    verify(tmp_path / "out", tmp_path / "model").check()
