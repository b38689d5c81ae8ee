"""A quantizer's settings: under both of their keys, in its own file, and the kind of cache that ModelOpt's file says alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import plan
from stages.read.quantizer import FILES, quantizer_settings
from tests.support import quantized_checkpoints as source
from tests.support.quantized_checkpoints import LLAMA

SAID = {"quant_method": "gptq", "bits": 4}
MODELOPT = "hf_quant_config.json"


def names(files: tuple[Any, ...]) -> list[str]:
    return [file.path.name for file in files]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quantization_config": SAID}, SAID),
        ({"compression_config": SAID}, SAID),
        ({"quantization_config": None, "compression_config": SAID}, SAID),
        ({"quantization_config": SAID, "compression_config": {"bits": 8}}, SAID),
        ({"quantization_config": "gptq"}, {}),
        ({}, {}),
    ],
)
def test_both_keys_of_the_configuration(config: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    assert quantizer_settings(tmp_path, config) == (expected, ())


@pytest.mark.parametrize(("name", "method"), FILES.items())
@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}], ids=str)
def test_a_file_of_its_own(name: str, method: str, config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps({"bits": 4}))
    settings, files = quantizer_settings(tmp_path, config)
    assert settings == {"quant_method": method, "bits": 4}
    assert names(files) == [name]


@pytest.mark.parametrize(
    ("more", "kind", "looked"),
    [
        ({}, "NVFP4", True),
        ({"kv_cache_scheme": None}, "NVFP4", True),
        ({"kv_cache_scheme": {"type": "float", "num_bits": 8}}, None, False),
        ({"kv_cache_quant_algo": "FP8"}, "FP8", False),
        ({"quantization": {"kv_cache_quant_algo": "FP8"}}, None, False),
    ],
    ids=str,
)
def test_modelopts_file_says_the_cache_where_the_configuration_does_not(
    more: dict[str, Any], kind: str | None, looked: bool, tmp_path: Path
) -> None:
    held = {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": "NVFP4", "group_size": 128}
    (tmp_path / MODELOPT).write_text(json.dumps({"quantization": held}))
    settings, files = quantizer_settings(tmp_path, {"quantization_config": {**SAID, **more}})
    assert settings == {**SAID, **more, **({"kv_cache_quant_algo": kind} if kind else {})}, "that one key alone"
    assert names(files) == [MODELOPT] * looked


def test_compressed_tensors_old_key_decides_as_the_new_one_does(tmp_path: Path) -> None:
    """Of 8 bits, which the tensors do not tell without it."""
    kind = source.compressed(bits=8)
    for name in ("quantization_config", "compression_config"):
        source.write(tmp_path / name, LLAMA, kind)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**LLAMA, name: config["quantization_config"]}))
    made = [
        plan(model_dir=tmp_path / name, output_dir=tmp_path / "out").targets[0].output.config
        for name in ("quantization_config", "compression_config")
    ]
    assert made[0] == made[1]
    assert "W8A16_GPTQ" in made[1]
