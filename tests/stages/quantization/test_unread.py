"""Formats that are known and not read: one problem names the format, however many tensors it has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import BadInput
from pipeline.planning.job import make_job
from pipeline.planning.make_plan import make_plan
from stages.quantization.sources import formats
from stages.quantization.unread import UnreadFormat, unread, unread_formats
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source

TOOLS = Path(__file__).parents[2] / "data/tools/llm-compressor"
ROWS = {row.name: row for row in unread_formats()}
DENSE = {"model.norm": {"weight": None}}


def found(
    settings: dict[str, Any] | None = None,
    modules: dict[str, dict[str, Any]] | None = None,
    packed: tuple[str, ...] = (),
    config: dict[str, Any] | None = None,
) -> list[str]:
    problems = unread(config or {}, "config.json", settings or {}, {**DENSE, **(modules or {})}, packed)
    return [str(problem) for problem in problems]


@pytest.mark.parametrize(
    ("row", "key", "value"), [(row, k, v) for row in ROWS.values() for k, all_ in row.said.items() for v in all_]
)
def test_the_settings_name_it(row: UnreadFormat, key: str, value: Any) -> None:
    (problem,) = found({key: value})
    assert problem.startswith(f"config.json: quantization_config.{key}: found {value}, which is {row.title}; ")
    assert row.remedy in problem
    assert (f"TensorRT-LLM 1.2 runs it as {row.runs}" if row.runs else "no algorithm for it") in problem


@pytest.mark.parametrize(("row", "names"), [(row, names) for row in ROWS.values() for names in row.parameters])
def test_its_parameters_name_it(row: UnreadFormat, names: frozenset[str]) -> None:
    modules = {f"model.layers.{n}.q_proj": dict.fromkeys(names) for n in range(100)}
    (problem,) = found(modules=modules)
    assert problem.startswith(f"model.layers.0.q_proj: found {', '.join(sorted(names))}, which is {row.title}, in 100 modules; ")


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_only_a_row_that_overrides_wins_over_modules_that_are_read(row: UnreadFormat) -> None:
    for key, values in row.said.items():
        assert bool(found({key: values[0]}, {"a.q_proj": {"qweight": None}}, packed=("a.q_proj",))) == row.overrides


def test_nothing_is_said_of_others() -> None:
    assert found({"quant_method": "gptq", "is_marlin_format": False, "bits": 4}, {"a.q_proj": {"weight": None, "bias": None}}) == []
    assert found(config={"quantization": None}) == []
    assert found({"is_marlin_format": 1}) == []


def transforms(*places: Any) -> dict[str, Any]:
    """Settings as llm-compressor writes them: one scheme, applied in some places."""
    apply = [{"targets": ["Linear"], "location": place, "inverse": False, "ignore": []} for place in places]
    return {"transform_config": {"config_groups": {"R4": {"type": "hadamard", "apply": apply, "randomize": False}}}}


@pytest.mark.parametrize("packed", [(), ("a.q_proj",)])
@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        (transforms("weight_output", "input"), "transform R4 at input"),
        (transforms("q_attn", "k_cache"), "transform R4 at q_attn"),
        (transforms(["weight_input"]), "transform R4 at ['weight_input']"),
        ({"transform_config": {"config_groups": {"R4": "hadamard"}}}, "transform R4 at hadamard"),
        ({"transform_config": {"config_groups": {"R4": {"type": "hadamard"}}}}, "transform R4 at None"),
        ({"transform_config": {"schemes": []}}, "transform_config {'schemes': []}"),
        ({"transform_config": ["R4"]}, "transform_config ['R4']"),
    ],
    ids=str,
)
def test_a_transform_beside_the_weights_is_refused_whatever_they_are_packed_as(
    settings: dict[str, Any], shown: str, packed: tuple[str, ...]
) -> None:
    (problem,) = found(settings, {"a.q_proj": {"weight_packed": None, "weight_scale": None}}, packed)
    assert problem.startswith(f"config.json: quantization_config.transform_config: found {shown}, which is compressed-tensors with")
    assert "Convert the model that it was quantized from" in problem


def test_a_transform_that_the_weights_hold_says_nothing() -> None:
    assert found(transforms("weight_input", "weight_output")) == []
    assert found({"transform_config": {}}) == found({"transform_config": {"config_groups": {}}}) == []


@pytest.mark.parametrize(("place", "refused"), [("input", True), ("weight_input", False)])
def test_the_files_of_llm_compressor_with_a_transform(place: str, refused: bool, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TOOLS / "w4a16", model)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] |= transforms(place)
    (model / "config.json").write_text(json.dumps(config))
    job = make_job({"model_dir": model, "output_dir": tmp_path / "out"})
    if not refused:
        assert make_plan(job)
        return
    with pytest.raises(BadInput) as error:
        make_plan(job)
    (problem,) = error.value.problems
    assert problem.found.startswith("transform R4 at input")


def test_mlx_by_its_own_settings() -> None:
    (problem,) = found(config={"quantization": {"bits": 4, "group_size": 64}})
    assert problem.startswith("config.json: quantization: found settings of MLX; ")


def test_every_method_of_transformers_is_read_or_known() -> None:
    from transformers.utils.quantization_config import QuantizationMethod

    named = {value for row in ROWS.values() for value in row.said.get("quant_method", ())}
    read = {"gptq", "awq", "compressed-tensors", "fbgemm_fp8", "fp8", "gguf", "auto-round", "bitsandbytes", "hqq", "nvfp4", "eetq"}
    assert {method.value for method in QuantizationMethod} - named - read == set()
    assert not named & read


def test_no_name_is_that_of_a_format_which_is_read() -> None:
    assert not ROWS.keys() & {each.name for each in formats()}


def mlx(directory: Path) -> None:
    """A checkpoint as MLX writes it: words of eight codes, scales and biases by groups of 64, embeddings too."""
    stored: dict[str, np.ndarray] = {}
    for name, values in source.values(source.LLAMA).items():
        if values.ndim < 2:
            stored[name] = values
            continue
        out, features = values.shape
        module = name.removesuffix(".weight")
        stored[name] = np.zeros((out, features // 8), np.uint32)
        stored |= {f"{module}.{part}": np.ones((out, features // 64), np.float16) for part in ("scales", "biases")}
    checkpoints.save(directory, {**source.LLAMA, "quantization": {"group_size": 64, "bits": 4}}, stored)


def test_one_problem_for_a_whole_checkpoint(tmp_path: Path) -> None:
    mlx(tmp_path / "model")
    with pytest.raises(BadInput) as error:
        make_plan(make_job({"model_dir": tmp_path / "model", "output_dir": tmp_path / "out"}))
    (problem,) = error.value.problems
    assert "MLX" in str(problem)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("parts", [["_data", "_scale"], ["_data._data", "_scale", "_shift"]], ids=["8 bits", "4 bits"])
def test_quanto_s_own_checkpoints_have_no_settings(parts: list[str], tmp_path: Path) -> None:
    """As optimum-quanto 0.2.7 saves them: parts of the weight, and scales of activations that are not quantized."""
    tensors = source.values(source.LLAMA)
    linear = [name for name in tensors if source.linear(name)]
    for name in linear:
        rows, codes = tensors.pop(name).shape
        tensors |= {f"{name}.{part}": np.zeros((rows, codes if "data" in part else 1), np.int8) for part in parts}
        tensors[f"{name.removesuffix('.weight')}.input_scale"] = np.ones((), np.float16)
    checkpoints.save(tmp_path / "model", source.LLAMA, tensors)
    with pytest.raises(BadInput) as error:
        make_plan(make_job({"model_dir": tmp_path / "model", "output_dir": tmp_path / "out"}))
    (problem,) = error.value.problems
    assert problem.found.endswith(f"which is optimum-quanto, in {len(linear)} modules")
    assert "Convert the model that it was quantized from" in problem.remedy


def test_one_problem_for_one_cause_in_many_modules(tmp_path: Path) -> None:
    """A width that no format reads is wrong in each module, and is said once."""
    source.write(tmp_path / "model", source.LLAMA, source.gptq())
    settings = {**source.gptq().settings, "bits": 8}
    (tmp_path / "model/config.json").write_text(json.dumps({**source.LLAMA, "quantization_config": settings}))
    with pytest.raises(BadInput) as error:
        make_plan(make_job({"model_dir": tmp_path / "model", "output_dir": tmp_path / "out"}))
    (problem,) = error.value.problems
    assert problem.found == "4 bits by its shape, and bits 8 in the settings, and the like in 13 more modules"
