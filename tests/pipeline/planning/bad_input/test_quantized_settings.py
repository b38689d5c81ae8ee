"""Quantized sources whose settings are unknown, of other types, or deny what the tensors are: refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stages.quantization.sources import formats
from tests.pipeline.planning.bad_input.quantized import DOWN, LLAMA, Q, dense_model, model_of, otherwise
from tests.support import quantized_checkpoints as source
from tests.support.commands import convert, one, refused
from tests.support.quantized_checkpoints import Arrays


def test_a_width_that_is_none(tmp_path: Path) -> None:
    def nine(stored: Arrays) -> None:
        for name in [name for name in stored if name.endswith((".qweight", ".qzeros"))]:
            rows, columns = stored[name].shape
            stored[name] = np.zeros((rows * 9 // 4, columns) if name.endswith("qweight") else (rows, columns * 9 // 4), np.int32)

    problem = one(refused(model_of(tmp_path, "gptq", settings={"bits": 9}, edit=nine)))
    assert problem.startswith(f"{Q}.qweight: found 9 bits by its shape")
    assert "2 to 8 bits" in problem


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_width_that_the_shapes_deny(tmp_path: Path, bits: int) -> None:
    report = refused(model_of(tmp_path, "gptq", settings={"bits": bits}))
    assert all(f"bits {bits} in the settings" in problem for problem in report if "qweight" in problem)
    assert report[0].startswith("model.layers.0.")


def test_one_group_for_all_in_features(tmp_path: Path) -> None:
    """With zero points, the groups of such a model differ from module to module, and TensorRT-LLM has one size for all."""

    def edit(stored: Arrays) -> None:
        for name in [name for name in stored if name.endswith((".scales", ".qzeros"))]:
            stored[name] = stored[name][:1]
        for name in [name for name in stored if name.endswith(".g_idx")]:
            stored[name] = np.zeros_like(stored[name])

    report = "\n".join(refused(model_of(tmp_path, "gptq asymmetric", settings={"group_size": -1}, edit=edit)))
    assert "group" in report
    assert "--dequantize" in report
    assert convert(tmp_path / "model", tmp_path / "out", "--dequantize").code == 0


def test_groups_of_two_sizes(tmp_path: Path) -> None:
    model = model_of(tmp_path, "gptq", settings={"group_size": None}, edit=otherwise(DOWN, source.gptq(group=32)))
    report = "\n".join(refused(model))
    assert DOWN in report
    assert "--dequantize" in report
    assert convert(model, tmp_path / "out", "--dequantize").code == 0


@pytest.mark.parametrize("size", [32, 128, 60])
@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_groups_of_another_size_than_the_settings_say(tmp_path: Path, name: str, size: int) -> None:
    report = refused(model_of(tmp_path, name, settings={"group_size": size}))
    # gate, up and down have other sizes than the rest, but the cause is one.
    problem = one(report)
    assert ".scales: found " in problem
    assert f"groups of {size}" in problem
    assert "and the like in 13 more modules" in problem


@pytest.mark.parametrize("version", ["gemv", "GEMV", "gemv_fast", "marlin", "exllama", "ipex"])
def test_other_versions_of_awq(tmp_path: Path, version: str) -> None:
    problem = one(refused(model_of(tmp_path, "awq", settings={"version": version})))
    said = (
        "version: found marlin, which is Marlin; "
        if version == "marlin"
        else f"found version {version}, and the like in 13 more modules; "
    )
    assert said in problem


def test_awq_as_gemv_stores_it(tmp_path: Path) -> None:
    def gemv(stored: Arrays) -> None:
        for name in [name for name in stored if name.endswith(".qweight")]:
            rows, columns = stored[name].shape
            stored[name] = np.zeros((8 * columns, rows // 8), np.int32)
            scales = name.replace("qweight", "scales")
            stored[scales] = np.zeros((8 * columns, 8), np.float16)

    report = refused(model_of(tmp_path, "awq", settings={"version": "gemv"}, edit=gemv))
    assert any("quant_method awq" in problem for problem in report)


def with_codes(model: Path) -> Path:
    """The model with a weight of integers, which are no numbers by themselves."""
    stored = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**stored, name: stored[name].astype(np.int8)}, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "eetq", "fp8", "gptq", "new"])
def test_settings_of_a_quantizer_without_its_tensors(tmp_path: Path, method: str) -> None:
    config = {**LLAMA, "quantization_config": {"quant_method": method, "bits": 4}}
    problem = next(each for each in refused(with_codes(dense_model(tmp_path, config))) if "quantization_config" in each)
    assert f"quantization_config: found quant_method {method}" in problem
    assert all(each.title in problem for each in formats())


@pytest.mark.parametrize("method", ["aqlm", "quip", "exl2", "torchao"])
def test_methods_that_are_known_and_not_read(tmp_path: Path, method: str) -> None:
    config = {**LLAMA, "quantization_config": {"quant_method": method, "bits": 4}}
    problem = next(each for each in refused(with_codes(dense_model(tmp_path, config))) if "quantization_config" in each)
    assert f"quantization_config.quant_method: found {method}, which is " in problem
    assert "TensorRT-LLM 1.2 has no algorithm for it" in problem


@pytest.mark.parametrize(
    "said", [{"config_groups": {}}, {"config_groups": None}, {"config_groups": {"group_0": None}}, {"bits": "4"}], ids=str
)
def test_settings_that_say_little_or_nothing_end_in_no_traceback(tmp_path: Path, said: dict[str, Any]) -> None:
    name = "gptq" if "bits" in said else "compressed w4a16"
    ran = convert(model_of(tmp_path, name, settings=said), tmp_path / "out")
    assert ran.code in (0, 2)
    assert "Traceback" not in ran.err


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("gptq", {"bits": None}),
    ("gptq", {"bits": [4]}),
    ("gptq", {"group_size": "64"}),
    ("gptq", {"group_size": [64]}),
    ("gptq", {"sym": "yes"}),
    ("gptq", {"checkpoint_format": 2}),
    ("awq", {"version": None}),
    ("awq", {"version": 1}),
    ("awq", {"group_size": "64"}),
    ("awq", {"bits": "four"}),
    ("compressed w4a16", {"config_groups": {"group_0": {"weights": {"num_bits": "four"}}}}),
    ("compressed w4a16", {"config_groups": {"group_0": {"weights": {"num_bits": None}}}}),
    ("compressed w4a16", {"config_groups": {"group_0": {"weights": {"num_bits": 0}}}}),
    ("compressed w4a16", {"config_groups": [1]}),
    ("fbgemm", {"activation_scale_ub": "1200"}),
    ("fbgemm", {"activation_scale_ub": None}),
]


@pytest.mark.parametrize(("name", "said"), SETTINGS, ids=str)
def test_settings_of_other_types_end_in_no_traceback(tmp_path: Path, name: str, said: dict[str, Any]) -> None:
    config = {**LLAMA, "num_hidden_layers": 3} if name == "fbgemm" else LLAMA
    flags = ("--use_meta_fp8_rowwise_recipe",) if name == "fbgemm" else ()
    ran = convert(model_of(tmp_path, name, config, settings=said), tmp_path / "out", *flags)
    assert ran.code in (0, 2), ran
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("said", [0, True, "1200", float("inf"), float("nan")], ids=str)
def test_a_bound_that_is_none(tmp_path: Path, said: Any) -> None:
    """It would be written into config.json, where an infinity is no JSON."""
    config = {**LLAMA, "num_hidden_layers": 3}
    model = model_of(tmp_path, "fbgemm", config, settings={"activation_scale_ub": said})
    problem = one(refused(model, "--use_meta_fp8_rowwise_recipe"))
    assert problem.startswith(f"quantization_config.activation_scale_ub: found {said!r}; expected a finite number above 0")
    assert convert(model, tmp_path / "out", "--dequantize").code == 0


def test_a_bound_that_the_settings_deny(tmp_path: Path) -> None:
    config = {**LLAMA, "num_hidden_layers": 3}
    model = model_of(tmp_path, "fbgemm", config, settings={"activation_scale_ub": 900.0})
    report = refused(model, "--use_meta_fp8_rowwise_recipe")
    assert all("input_scale_ub: found 1200; expected 900" in problem for problem in report)
