"""Every key of config.json and of a quantizer's settings with values that nobody expects: problems, never an exception."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import BadInput
from pipeline.model.tables import find_family
from pipeline.planning.job import make_job
from pipeline.planning.make_plan import make_plan
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source

NAN, INF = float("nan"), float("inf")
SCALARS: list[Any] = [NAN, INF, -INF, 10**99, -(10**99), True, None, "\x1b[31m", "a" * 5_000, 0, -1, 1.5]
NESTED: list[Any] = [[], [1], [[]], [NAN], {}, {"a": {}}, {"rope_type": [1]}, {"full_attention": 5}]
SCALINGS: list[Any] = [
    {"rope_type": "yarn", "factor": NAN},
    {"rope_type": "llama3", "factor": 10**90},
    {"type": "linear", "factor": []},
    {"rope_type": "llama3", "factor": 8, "low_freq_factor": "x", "high_freq_factor": None, "original_max_position_embeddings": INF},
    {"rope_type": "longrope", "short_factor": "x", "long_factor": [NAN]},
    {"full_attention": {"rope_type": "yarn", "factor": True}},
]
ARCHITECTURES = [
    "LlamaForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "MiniCPMForCausalLM",
]
SETTINGS: list[Any] = [
    NAN,
    INF,
    10**40,
    True,
    None,
    "x",
    [],
    [1],
    [None],
    {},
    {"a": {}},
    0,
    -1,
    1.5,
    {"g": {"weights": 5}},
    ["re:("],
]
FORMATS = {name: getattr(source, name)() for name in ("gptq", "modelopt_awq", "compressed")}


def planned(model: Path, tmp_path: Path) -> list[str]:
    """The problems of a plan; none where it is one. Anything but BadInput fails the test."""
    try:
        make_plan(make_job({"model_dir": model, "output_dir": tmp_path / "out", "scratch_after": "none"}))
    except BadInput as error:
        return [str(problem) for problem in error.problems]
    return []


def check(problems: list[str]) -> None:
    assert all(problem.isprintable() and len(problem) < 4_500 for problem in problems), problems


def keys(architecture: str) -> list[str]:
    family = find_family("huggingface", architecture)
    assert family
    named = {key.partition(".")[0] for found in (*family.fields.values(), *family.settings.values()) for key in found}
    return sorted(named | {"rope_scaling", "rope_parameters", "layer_types", "quantization_config", "torch_dtype", "architectures"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_of_config_json(tmp_path: Path, architecture: str) -> None:
    config = {**checkpoints.LLAMA, "architectures": [architecture], "use_sliding_window": True, "sliding_window": 32}
    checkpoints.write(tmp_path / "model", config)
    refused = 0
    for key in keys(architecture):
        for value in [*SCALARS, *NESTED, *(SCALINGS if key.startswith("rope_") else [])]:
            (tmp_path / "model" / "config.json").write_text(json.dumps({**config, key: value}))
            problems = planned(tmp_path / "model", tmp_path)
            check(problems)
            refused += bool(problems)
    assert refused > 100


@pytest.mark.parametrize("name", FORMATS)
def test_settings_of_a_quantizer(tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    source.write(model, source.LLAMA, FORMATS[name])
    config = json.loads((model / "config.json").read_text())
    file = model / "config.json" if "quantization_config" in config else next(model.glob("*quant*.json"))
    settings = config.get("quantization_config") or json.loads(file.read_text())
    inner = settings.get("quantization", settings)
    for key in [
        *inner,
        "ignore",
        "modules_to_not_convert",
        "exclude_modules",
        "activation_scale_ub",
        "dynamic",
        "kv_cache_quant_algo",
    ]:
        for value in SETTINGS:
            changed = {**inner, key: value}
            said = {**settings, "quantization": changed} if "quantization" in settings else changed
            file.write_text(json.dumps({**config, "quantization_config": said} if file.name == "config.json" else said))
            check(planned(model, tmp_path))


@pytest.mark.parametrize("share", [NAN, INF, 0, -0.5, 1.5])
def test_a_share_of_a_head(tmp_path: Path, share: float) -> None:
    config = {**checkpoints.LLAMA, "architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": share}
    checkpoints.write(tmp_path / "model", config)
    assert any("partial_rotary_factor: found" in each for each in planned(tmp_path / "model", tmp_path))
