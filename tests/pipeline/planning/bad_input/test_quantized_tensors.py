"""Quantized sources whose tensors are missing, too many, contradict one another or are not quantized alike: refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.pipeline.planning.bad_input.quantized import (
    DOWN,
    LLAMA,
    K,
    Q,
    dense,
    f16,
    f32,
    i32,
    model_of,
    otherwise,
    with_tensors,
    without,
)
from tests.support import quantized_checkpoints as source
from tests.support.commands import convert, one, refused
from tests.support.quantized_checkpoints import MIXTRAL, Arrays


def test_float8_by_blocks(tmp_path: Path) -> None:
    def blocks(stored: Arrays) -> None:
        for name in [name for name in stored if name.endswith(".weight_scale")]:
            stored[name.replace("weight_scale", "weight_scale_inv")] = np.ones((2, 2), np.float32)
            del stored[name]

    report = refused(model_of(tmp_path, "compressed fp8 dynamic", edit=blocks))
    assert any("weight_scale_inv" in problem or "quant_method" in problem for problem in report)


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("nvfp4", with_tensors(weight_scale=np.ones((256, 4), ml_dtypes.float8_e4m3fn)), "[256, 8], one for each 16 of 128"),
        ("nvfp4", without(f"{Q}.weight_scale_2"), "the scale of all of the module's weights"),
        ("nvfp4", with_tensors(input_scale=np.ones(2, np.float32)), "one scale"),
        ("mxfp4", with_tensors(weight_scale=np.ones((256, 8), np.uint8)), "[256, 4], one for each 32 of 128"),
        ("fp8 block", with_tensors(weight_scale_inv=np.ones((2, 2), np.float32)), "[2, 1], one for each 128 x 128 of"),
    ],
)
def test_small_floats_whose_scales_do_not_fit(name: str, edit: Callable[[Arrays], None], said: str, tmp_path: Path) -> None:
    problem = one(refused(model_of(tmp_path, name, edit=edit)))
    assert problem.startswith(Q)
    assert said in problem


@pytest.mark.parametrize("wrong", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("gptq", "scales"),
        ("awq", "scales"),
        ("compressed w4a16", "weight_scale"),
        ("compressed w8a8", "weight_scale"),
        ("modelopt awq", "weight_scale"),
        ("compressed fp8 dynamic", "weight_scale"),
        ("modelopt fp8", "input_scale"),
        ("nvfp4", "weight_scale_2"),
    ],
)
def test_scales_that_are_not_finite(name: str, parameter: str, wrong: float, tmp_path: Path) -> None:
    """Only the values show it; as numbers they are what the source has."""

    def edit(stored: Arrays) -> None:
        scales = np.array(stored[f"{Q}.{parameter}"])
        scales.reshape(-1)[0] = wrong
        stored[f"{Q}.{parameter}"] = scales

    ran = convert(model_of(tmp_path, name, edit=edit), tmp_path / "out")
    assert ran.code == 2, ran
    assert f"  - {Q}." in ran.err
    assert ": scales: found a scale that is not finite (NaN or infinity); expected finite scales. " in ran.err
    assert "--dequantize" in ran.err
    assert not (tmp_path / "out").exists()
    assert convert(tmp_path / "model", tmp_path / "out", "--dequantize").code == 0


def test_w4a8_is_named_once(tmp_path: Path) -> None:
    def second(stored: Arrays) -> None:
        for name in [name for name in stored if name.endswith(".weight_scale")]:
            stored[name.replace("weight_scale", "weight_scale_2")] = np.ones((), np.float32)

    problem = one(refused(model_of(tmp_path, "modelopt awq", edit=second)))
    assert "weight_scale_2: found a module in W4A8_AWQ, and the like in 13 more modules" in problem


@pytest.mark.parametrize(
    "name", ["gptq", "awq", "compressed w4a16", "compressed fp8", "modelopt fp8", "modelopt awq", "compressed w8a8"]
)
@pytest.mark.parametrize("more", [(), ("--dequantize",)], ids=str)
def test_a_scale_that_nothing_consumes(tmp_path: Path, name: str, more: tuple[str, ...]) -> None:
    report = refused(model_of(tmp_path, name, edit=with_tensors(weight_scale_2=np.ones(1, np.float32))), *more)
    found = "a module in W4A8_AWQ" if name == "modelopt awq" else "a tensor that"
    assert one(report).startswith(f"{Q}.weight_scale_2: found {found}")


@pytest.mark.parametrize("name", ["compressed fp8", "compressed fp8 dynamic", "modelopt fp8", "modelopt awq", "compressed w8a8"])
@pytest.mark.parametrize("more", [(), ("--dequantize",)], ids=str)
def test_codes_without_their_scale(tmp_path: Path, name: str, more: tuple[str, ...]) -> None:
    """Such codes must not pass for weights."""
    report = refused(model_of(tmp_path, name, edit=without(f"{Q}.weight_scale")), *more)
    assert any(Q in problem for problem in report)


@pytest.mark.parametrize("more", [(), ("--dequantize",)], ids=str)
@pytest.mark.parametrize("name", ["gptq", "awq"])
@pytest.mark.parametrize("missing", ["qweight", "qzeros", "scales"])
def test_a_missing_part_of_a_module(tmp_path: Path, name: str, missing: str, more: tuple[str, ...]) -> None:
    report = refused(model_of(tmp_path, name, edit=without(f"{Q}.{missing}")), *more)
    assert any(problem.startswith(f"{Q}.") for problem in report)


@pytest.mark.parametrize("missing", ["qweight", "qzeros", "scales"])
def test_a_missing_part_of_every_module(tmp_path: Path, missing: str) -> None:
    def edit(stored: Arrays) -> None:
        for name in [name for name in stored if name.endswith(f".{missing}")]:
            del stored[name]

    report = refused(model_of(tmp_path, "gptq", edit=edit))
    assert any("quant_method gptq" in problem or f".{missing}" in problem for problem in report)


@pytest.mark.parametrize("name", ["compressed w4a16", "compressed w4a16 asymmetric"])
@pytest.mark.parametrize("missing", ["weight_packed", "weight_scale"])
def test_a_missing_part_of_a_packed_weight(tmp_path: Path, name: str, missing: str) -> None:
    report = refused(model_of(tmp_path, name, edit=without(f"{Q}.{missing}")))
    assert any(problem.startswith(f"{Q}.") for problem in report)


def test_zero_points_that_the_settings_promise(tmp_path: Path) -> None:
    """Read as symmetric, an asymmetric weight would be wrong everywhere."""
    report = refused(model_of(tmp_path, "compressed w4a16 asymmetric", edit=without(f"{Q}.weight_zero_point")))
    assert any(problem.startswith(f"{Q}.weight_zero_point") for problem in report)


def test_an_asymmetric_weight_among_those_of_one_scale_a_row(tmp_path: Path) -> None:
    """Zero points must never be dropped: as a kernel of one scale a row reads none, it is that of groups."""
    zeros = np.full((256, 1), 5, np.int8)
    model = model_of(tmp_path, "compressed w8a8", edit=with_tensors(weight_zero_point=zeros))
    report = refused(model)
    assert any("groups of 256, beside others of 128" in problem and "--dequantize" in problem for problem in report), report
    assert convert(model, tmp_path / "out", "--dequantize").code == 0


def test_scales_of_other_groups_than_the_settings_say(tmp_path: Path) -> None:
    report = refused(model_of(tmp_path, "compressed w4a16", edit=with_tensors(weight_scale=f16(256, 4))))
    assert one(report) == f"{Q}.weight_scale: found shape [256, 4]; expected [256, 2 groups of 128]"


def test_static_scales_of_integer_activations_do_not_matter_once_dequantized(tmp_path: Path) -> None:
    model = model_of(tmp_path, "compressed w8a8", edit=with_tensors(input_scale=np.ones(1, np.float32)))
    assert convert(model, tmp_path / "out", "--dequantize").code == 0


# The q_proj of LLAMA is [256, 128]: in groups of 64.
SHAPES: dict[str, tuple[str, dict[str, np.ndarray]]] = {
    "gptq: a row of words too few": ("gptq", {"qweight": i32(15, 256)}),
    "gptq: a column of words too few": ("gptq", {"qweight": i32(16, 255)}),
    "gptq: twice the in-features": ("gptq", {"qweight": i32(32, 256)}),
    "gptq: a scale too few": ("gptq", {"scales": f16(2, 255)}),
    "gptq: a group too many": ("gptq", {"scales": f16(3, 256)}),
    "gptq: a group too few": ("gptq", {"scales": f16(1, 256)}),
    "gptq: no groups": ("gptq", {"scales": f16(0, 256), "qzeros": i32(0, 32)}),
    "gptq: groups of zeros too few": ("gptq", {"qzeros": i32(1, 32)}),
    "gptq: zeros too few": ("gptq", {"qzeros": i32(2, 31)}),
    "gptq: zeros of other groups": ("gptq", {"qzeros": i32(4, 32)}),
    "gptq: words of one axis": ("gptq", {"qweight": i32(4096)}),
    "gptq: scales of one axis": ("gptq", {"scales": f16(256)}),
    "gptq: scales of three axes": ("gptq", {"scales": f16(1, 2, 256)}),
    "gptq: zeros of no axis": ("gptq", {"qzeros": i32()}),
    "gptq: all of no axis": ("gptq", {"qweight": i32(), "qzeros": i32(), "scales": f16()}),
    "gptq: empty": ("gptq", {"qweight": i32(0, 0), "qzeros": i32(0, 0), "scales": f16(0, 0)}),
    "gptq: an order of other length": ("gptq", {"g_idx": i32(64)}),
    "gptq: an order of no axis": ("gptq", {"g_idx": i32()}),
    "gptq: words that are floats": ("gptq", {"qweight": f32(16, 256)}),
    "gptq: words that are bytes": ("gptq", {"qweight": np.zeros((16, 256), np.uint8)}),
    "gptq: words of 64 bits": ("gptq", {"qweight": np.zeros((16, 256), np.int64)}),
    "gptq: zeros of 64 bits": ("gptq", {"qzeros": np.zeros((2, 32), np.int64)}),
    "gptq: scales that are integers": ("gptq", {"scales": i32(2, 256)}),
    "gptq: an order of floats": ("gptq", {"g_idx": f32(128)}),
    "gptq: a bias of other length": ("gptq zero biases", {"bias": f16(255)}),
    "awq: a row of words too few": ("awq", {"qweight": i32(127, 32)}),
    "awq: a column of words too few": ("awq", {"qweight": i32(128, 31)}),
    "awq: zeros too few": ("awq", {"qzeros": i32(2, 31)}),
    "awq: groups of zeros too many": ("awq", {"qzeros": i32(3, 32)}),
    "awq: a group too many": ("awq", {"scales": f16(3, 256)}),
    "awq: scales of one axis": ("awq", {"scales": f16(256)}),
    "awq: words of no axis": ("awq", {"qweight": i32()}),
    "awq: words that are floats": ("awq", {"qweight": f32(128, 32)}),
    "packed: a word too few": ("compressed w4a16", {"weight_packed": i32(256, 15)}),
    "packed: a row too few": ("compressed w4a16", {"weight_packed": i32(255, 16)}),
    "packed: of one axis": ("compressed w4a16", {"weight_packed": i32(4096)}),
    "packed: that are floats": ("compressed w4a16", {"weight_packed": f32(256, 16)}),
    "packed: a row of scales too few": ("compressed w4a16", {"weight_scale": f16(255, 2)}),
    "packed: three groups": ("compressed w4a16", {"weight_scale": f16(256, 3)}),
    "packed: no groups": ("compressed w4a16", {"weight_scale": f16(256, 0)}),
    "packed: one scale": ("compressed w4a16", {"weight_scale": f16()}),
    "packed: a shape of one axis": ("compressed w4a16", {"weight_shape": np.array([256], np.int64)}),
    "packed: a shape of no axis": ("compressed w4a16", {"weight_shape": np.array(256, np.int64)}),
    "packed: another shape": ("compressed w4a16", {"weight_shape": np.array([256, 100], np.int64)}),
    "packed: other rows": ("compressed w4a16", {"weight_shape": np.array([200, 128], np.int64)}),
    "packed: zeros too few": ("compressed w4a16 asymmetric", {"weight_zero_point": i32(31, 2)}),
    "packed: bytes of zeros too few": ("compressed w4a16 asymmetric", {"weight_zero_point": np.zeros((255, 2), np.int8)}),
    "packed: zeros of one axis": ("compressed w4a16 asymmetric", {"weight_zero_point": i32(64)}),
    "packed: an order of other groups": ("compressed w4a16", {"weight_g_idx": np.arange(128, dtype=np.int32)[::-1] // 32}),
    "packed: an order of other length": ("compressed w4a16", {"weight_g_idx": i32(64)}),
    "int8: three scales": ("compressed w8a8", {"weight_scale": f32(3, 1)}),
    "int8: no scales": ("compressed w8a8", {"weight_scale": f32(0, 1)}),
    "float8: three scales": ("compressed fp8", {"weight_scale": f32(3)}),
    "float8: no scale": ("compressed fp8", {"weight_scale": f32(0)}),
    "float8: three tiles of two": ("compressed fp8 dynamic", {"weight_scale": f32(3, 1)}),
    "float8: two scales of activations": ("compressed fp8", {"input_scale": f32(2)}),
    "float8: of one axis": ("compressed fp8", {"weight": np.zeros(32768, ml_dtypes.float8_e4m3fn)}),
    "float8: transposed": ("compressed fp8", {"weight": np.zeros((128, 256), ml_dtypes.float8_e4m3fn)}),
    "modelopt: one scale": ("modelopt awq", {"weight_scale": f32()}),
    "modelopt: scales of one axis": ("modelopt awq", {"weight_scale": f32(512)}),
    "modelopt: three groups": ("modelopt awq", {"weight_scale": f32(256, 3)}),
    "modelopt: a row too few": ("modelopt awq", {"weight": np.zeros((127, 128), np.uint8)}),
    "modelopt: of three axes": ("modelopt awq", {"weight": np.zeros((2, 64, 128), np.uint8)}),
    "modelopt: of one axis": ("modelopt awq", {"weight": np.zeros(128, np.uint8)}),
    "modelopt: factors of other length": ("modelopt awq", {"pre_quant_scale": f16(64)}),
    "modelopt: one factor": ("modelopt awq", {"pre_quant_scale": f16()}),
}


@pytest.mark.parametrize("more", [(), ("--dequantize",)], ids=["codes", "numbers"])
@pytest.mark.parametrize("case", SHAPES)
def test_shapes_and_types_that_contradict_one_another(tmp_path: Path, case: str, more: tuple[str, ...]) -> None:
    name, tensors = SHAPES[case]
    report = refused(model_of(tmp_path, name, edit=with_tensors(**tensors)), *more)
    assert any(problem.startswith(f"{Q}.") for problem in report), report


PARTLY = ["gptq", "awq", "compressed w4a16", "compressed fp8", "modelopt fp8", "modelopt awq"]


@pytest.mark.parametrize("module", [Q, K, DOWN], ids=["first", "fused", "alone"])
@pytest.mark.parametrize("name", PARTLY)
def test_a_module_that_is_not_quantized_among_those_that_are(tmp_path: Path, name: str, module: str) -> None:
    model = model_of(tmp_path, name, edit=dense(module))
    report = refused(model)
    assert any(problem.startswith(f"{module}.weight: found ") and "--dequantize" in problem for problem in report)
    assert convert(model, tmp_path / "out", "--dequantize").code == 0


def test_numbers_join_float8_that_has_a_scale_a_row(tmp_path: Path) -> None:
    """They can be quantized so, as no activations need calibration; but not for a part of a fused tensor."""
    assert convert(model_of(tmp_path, "compressed fp8 dynamic", edit=dense(DOWN)), tmp_path / "out").code == 0


def test_numbers_among_the_parts_of_a_fused_float8_tensor(tmp_path: Path) -> None:
    model = model_of(tmp_path, "compressed fp8 dynamic", edit=dense(Q))
    problem = one(refused(model))
    assert problem.startswith("model.layers.0.self_attn.")
    assert "all parts of a fused module alike" in problem


@pytest.mark.parametrize("module", [K, DOWN], ids=["fused", "alone"])
def test_one_module_with_a_scale_a_row_gives_all_others_theirs(tmp_path: Path, module: str) -> None:
    model = model_of(tmp_path, "compressed fp8", edit=otherwise(module, source.compressed_float8(dynamic=True)))
    assert convert(model, tmp_path / "out").code == 0


OTHERWISE = {
    "8 bits among 4": ("gptq", source.gptq(bits=8), {"bits": 4}),
    "float8 among codes": ("compressed w4a16", source.compressed_float8(dynamic=True), {}),
    "codes among float8": ("compressed fp8", source.compressed(), {}),
}


@pytest.mark.parametrize("module", [K, DOWN], ids=["fused", "alone"])
@pytest.mark.parametrize("case", OTHERWISE)
def test_a_module_that_is_quantized_otherwise(tmp_path: Path, case: str, module: str) -> None:
    name, kind, settings = OTHERWISE[case]
    model = model_of(tmp_path, name, settings=settings, edit=otherwise(module, kind))
    report = refused(model)
    assert any(module in problem for problem in report), report


def test_the_405b_s_checkpoint_goes_with_and_without_metas_recipe(tmp_path: Path) -> None:
    model = model_of(tmp_path, "fbgemm", {**LLAMA, "num_hidden_layers": 3})
    assert convert(model, tmp_path / "all").code == 0
    assert convert(model, tmp_path / "out", "--use_meta_fp8_rowwise_recipe").code == 0


@pytest.mark.parametrize("missing", ["weight_scale", "input_scale"])
def test_an_expert_in_float8_without_a_scale(tmp_path: Path, missing: str) -> None:
    name = f"model.layers.1.block_sparse_moe.experts.2.w1.{missing}"
    report = refused(model_of(tmp_path, "modelopt fp8", MIXTRAL, edit=without(name)))
    assert any(
        "--dequantize" in problem or "--use_weight_only" in problem or name.rpartition(".")[0] in problem for problem in report
    )


def test_an_expert_that_is_not_quantized(tmp_path: Path) -> None:
    module = "model.layers.1.block_sparse_moe.experts.2.w1"

    def edit(stored: Arrays) -> None:
        for name in [name for name in stored if name.startswith(f"{module}.")]:
            del stored[name]
        stored[f"{module}.weight"] = source.values(MIXTRAL)[f"{module}.weight"]

    report = refused(model_of(tmp_path, "gptq", MIXTRAL, edit=edit))
    assert any(problem.startswith(f"{module}.weight: found ") for problem in report)


def test_biases_that_the_model_does_not_have(tmp_path: Path) -> None:
    report = refused(model_of(tmp_path, "gptq zero biases", edit=with_tensors(bias=np.ones(256, np.float16))))
    assert one(report).startswith(f"{Q}.bias: found a tensor that")
