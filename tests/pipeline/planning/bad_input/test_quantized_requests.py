"""Requests to quantize, or to keep a source's codes, that no kernel serves or that the source contradicts: refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.pipeline.planning.bad_input.quantized import (
    DOWN,
    FORMATS,
    LLAMA,
    REQUANTIZED,
    Q,
    dense_model,
    model_of,
    plans,
    with_tensors,
)
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.commands import convert, one, refused
from tests.support.quantized_checkpoints import MIXTRAL

ORDERED = {"4": source.gptq(index="order"), "8": source.gptq(bits=8, index="order"), "c": source.compressed(order=True)}


@pytest.mark.parametrize("kind", ORDERED)
def test_groups_that_follow_the_activations(tmp_path: Path, kind: str) -> None:
    problem = one(refused(model_of(tmp_path, ORDERED[kind])))
    assert "g_idx: found groups in the order of the activations (desc_act), in 14 modules" in problem
    assert "--requantize" in problem
    assert "--dequantize" in problem


def test_one_module_whose_groups_follow_the_activations_is_enough(tmp_path: Path) -> None:
    index = np.arange(128, dtype=np.int32) // 64
    index[[3, 70]] = index[[70, 3]]
    problem = one(refused(model_of(tmp_path, "gptq", edit=with_tensors(g_idx=index))))
    assert problem.startswith(f"{Q}.g_idx: found groups in the order of the activations (desc_act), in 1 module")


def test_an_order_that_the_settings_promise(tmp_path: Path) -> None:
    """Without g_idx nobody knows which group an in-feature belongs to."""
    report = refused(model_of(tmp_path, source.gptq(index="none"), settings={"desc_act": True}))
    assert all(".g_idx" in problem for problem in report)


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed w4a16", "compressed fp8", "modelopt awq", "compressed w8a8"])
def test_what_follows_the_remedy_works(tmp_path: Path, name: str) -> None:
    model = model_of(tmp_path, name)
    other = "int4" if name == "compressed w8a8" else "int8"
    assert refused(model, "--use_weight_only", "--weight_only_precision", other)
    assert convert(model, tmp_path / "out", "--use_weight_only", "--weight_only_precision", other, "--dequantize").code == 0


CONTRADICTIONS: dict[str, tuple[str, tuple[str, ...], str, str]] = {
    "int8": ("gptq", (*REQUANTIZED, "int8"), "--weight_only_precision int8", "W4A16_GPTQ"),
    "int4": ("awq", (*REQUANTIZED, "int4"), "--weight_only_precision int4", "W4A16_GPTQ"),
    "int8_gptq": ("gptq", (*REQUANTIZED, "int8_gptq"), "--weight_only_precision int8_gptq", "W4A16_GPTQ"),
    "int4_gptq": ("gptq 8 bits", (*REQUANTIZED, "int4_gptq"), "--weight_only_precision int4_gptq", "W8A16_GPTQ"),
    "int4_awq": ("compressed w4a16", (*REQUANTIZED, "int4_awq"), "--weight_only_precision int4_awq", "W4A16_GPTQ"),
    "awq of another kind": ("awq", (*REQUANTIZED, "int4_awq"), "--weight_only_precision int4_awq", "W4A16_GPTQ"),
    "gptq of modelopt's": ("modelopt awq", (*REQUANTIZED, "int4_gptq"), "--weight_only_precision int4_gptq", "W4A16_AWQ"),
    "fp8": ("gptq", ("--use_fp8",), "--use_fp8", "W4A16_GPTQ"),
    "fp8 of rows": ("compressed fp8 dynamic", ("--use_fp8",), "--use_fp8", "FP8_PER_CHANNEL_PER_TOKEN"),
    "rows of fp8": ("modelopt fp8", ("--use_fp8_rowwise",), "--use_fp8_rowwise", "which is FP8"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_flags_that_contradict_the_source(tmp_path: Path, case: str) -> None:
    name, flags, subject, own = CONTRADICTIONS[case]
    problem = one(refused(model_of(tmp_path, name), *flags))
    assert problem.startswith(f"{subject}: found a source quantized as ")
    assert own in problem
    assert "--dequantize" in problem


@pytest.mark.parametrize(
    ("name", "flags"),
    [("", ("--use_fp8_rowwise",)), ("compressed fp8 dynamic", ()), ("gptq 8 bits", ()), ("modelopt awq", ())],
    ids=str,
)
def test_experts_in_what_tensorrt_llm_has_no_kernel_for(name: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    if name:
        source.write(tmp_path / "model", source.MIXTRAL, FORMATS[name])
    else:
        checkpoints.save(tmp_path / "model", source.MIXTRAL, source.values(source.MIXTRAL))
    problem = one(refused(tmp_path / "model", *flags))
    assert problem.startswith("quantization: found 4 experts a layer, as ")


@pytest.mark.parametrize("flags", [("--use_fp8", "--use_fp8_rowwise"), (*REQUANTIZED, "int8", "--use_fp8_rowwise")], ids=str)
@pytest.mark.parametrize("quantized", [False, True])
def test_two_algorithms(tmp_path: Path, flags: tuple[str, ...], quantized: bool) -> None:
    model = model_of(tmp_path, "modelopt fp8") if quantized else dense_model(tmp_path)
    report = "\n".join(refused(model, *flags))
    assert "expected one algorithm" in report
    assert "FP8_PER_CHANNEL_PER_TOKEN" in report


@pytest.mark.parametrize("name", ["gptq", "awq", "modelopt awq", "compressed w4a16"])
def test_another_group_size_than_the_source_s(tmp_path: Path, name: str) -> None:
    problem = one(refused(model_of(tmp_path, name), "--group_size", 128))
    assert problem.startswith("--group_size 128: found groups of 64 in the source")
    assert convert(tmp_path / "model", tmp_path / "out", "--group_size", 64).code == 0


NO_GROUPS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "none": ("", (), "nothing that is quantized"),
    "int4": ("", (*REQUANTIZED, "int4"), "W4A16"),
    "int8": ("", ("--quantization", "int8"), "W8A16"),
    "fp8 by row": ("", ("--use_fp8_rowwise",), "FP8_PER_CHANNEL_PER_TOKEN"),
    "int4 again": ("gptq", ("--requantize", "--quantization", "int4"), "W4A16"),
    "int8 of codes": ("gptq", ("--dequantize", "--quantization", "int8"), "W8A16"),
    "numbers": ("gptq", ("--dequantize",), "nothing that is quantized"),
    "kept codes": ("compressed w8a8", (), "W8A16"),
    "kept float8": ("modelopt fp8", (), "FP8"),
}


@pytest.mark.parametrize("case", NO_GROUPS)
def test_a_group_size_where_nothing_has_groups(tmp_path: Path, case: str) -> None:
    """NVIDIA's default, which people paste, is the same as none, to the last byte of what is written of it."""
    name, flags, found = NO_GROUPS[case]
    model = model_of(tmp_path, name) if name else dense_model(tmp_path)
    problem = one(refused(model, *flags, "--group_size", 64))
    assert problem.startswith(f"--group_size 64: found {found}")
    assert ("--requantize --quantization int4_gptq" if name else "--quantization int4_awq") in problem
    assert convert(model, tmp_path / "out", *flags, "--group_size", 128).code == 0
    again = convert(model, tmp_path / "out", *flags)
    assert (again.code, "nothing to do" in again.out) == (0, True), again


def test_a_group_size_that_follows_the_remedy(tmp_path: Path) -> None:
    assert plans(model_of(tmp_path, "gptq"), "--requantize", "--quantization", "int4_gptq", "--group_size", 64)


@pytest.mark.parametrize("more", [(), ("--dequantize",)], ids=str)
@pytest.mark.parametrize("precision", ["int4_gptq", "int8_gptq"])
def test_calibrated_codes_of_a_source_that_has_none(tmp_path: Path, precision: str, more: tuple[str, ...]) -> None:
    model = model_of(tmp_path, "compressed w8a8") if more else dense_model(tmp_path)
    problem = one(refused(model, *REQUANTIZED, precision, *more))
    assert problem.startswith(f"--weight_only_precision {precision}: found a ")
    assert "int8, int4 or --use_fp8_rowwise" in problem


@pytest.mark.parametrize("more", [(), ("--dequantize",)], ids=str)
def test_fp8_of_a_source_that_is_not_quantized(tmp_path: Path, more: tuple[str, ...]) -> None:
    model = model_of(tmp_path, "gptq") if more else dense_model(tmp_path)
    problem = one(refused(model, "--use_fp8", *more))
    assert problem.startswith("--use_fp8: found no --act_range")
    assert "--use_fp8_rowwise" in problem


CODES_OF_NOTHING: dict[str, tuple[str, tuple[str, ...], str]] = {
    "nvfp4": ("nvfp4 weights alone", ("--use_nvfp4",), "nvfp4"),
    "nf4": ("bitsandbytes nf4", (*REQUANTIZED, "int4_gptq"), "bitsandbytes"),
    "hqq": ("hqq", (*REQUANTIZED, "int8_gptq"), "hqq"),
    "mxfp4": ("mxfp4", (*REQUANTIZED, "int4_gptq"), "mxfp4"),
}


@pytest.mark.parametrize("case", CODES_OF_NOTHING)
def test_codes_that_no_algorithm_takes_are_called_what_they_are(tmp_path: Path, case: str) -> None:
    name, flags, found = CODES_OF_NOTHING[case]
    problem = one(refused(model_of(tmp_path, name), *flags))
    assert f": found a source quantized as {found}, whose codes no algorithm of TensorRT-LLM takes; expected a source" in problem


@pytest.mark.parametrize("flag", ["--dequantize", "--requantize"])
def test_numbers_need_not_be_made_numbers(tmp_path: Path, flag: str) -> None:
    assert one(refused(dense_model(tmp_path), flag)).startswith(f"{flag}: found a source that is not quantized")


def test_a_gguf_file_is_numbers_in_any_case(tmp_path: Path) -> None:
    from tests.support import gguf_files

    gguf_files.write(tmp_path / "model.gguf", LLAMA, source.values(LLAMA), "Q8_0")
    assert convert(tmp_path / "model.gguf", tmp_path / "asked", "--dequantize").code == 0
    assert one(refused(tmp_path / "model.gguf", "--requantize")).startswith("--group_size: found nothing")


GROUPS = {
    "gptq": source.gptq(group=32),
    "gptq 8 bits": source.gptq(bits=8, group=32),
    "gptq one group": source.gptq(group=256),
    "awq": source.awq(group=32),
    "compressed": source.compressed(group=32),
    "modelopt awq": source.modelopt_awq(group=32),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_that_no_kernel_has(name: str, tmp_path: Path) -> None:
    source.write(tmp_path / "model", source.LLAMA, GROUPS[name])
    own, size = GROUPS[name].algorithm, 256 if "one" in name else 32
    problem = one(refused(tmp_path / "model"))
    assert problem.startswith(f"quantization: found groups of {size} in-features in {own}; expected groups of 64 or 128")
    assert "Give --requantize --group_size 128" in problem
    assert one(refused(tmp_path / "model", "--group_size", size)).startswith(f"--group_size {size}: found groups of {size}")
    assert plans(tmp_path / "model", "--requantize", "--group_size", 128)
    assert plans(tmp_path / "model", "--dequantize")


@pytest.mark.parametrize("size", [16, 32, 96, 256])
def test_groups_that_no_kernel_has_are_not_made_either(size: int, tmp_path: Path) -> None:
    found = refused(model_of(tmp_path, "gptq", source.LLAMA), "--requantize", "--group_size", size)
    assert one(found).startswith(f"--group_size {size}: found groups of {size} in-features in W4A16_GPTQ")


@pytest.mark.parametrize("flags", [(), (*REQUANTIZED, "int8"), ("--use_fp8",)], ids=str)
def test_metas_recipe_is_for_fp8_by_row(tmp_path: Path, flags: tuple[str, ...]) -> None:
    model = model_of(tmp_path, "modelopt fp8") if "--use_fp8" in flags else dense_model(tmp_path)
    problem = one(refused(model, "--use_meta_fp8_rowwise_recipe", *flags))
    assert problem.startswith("--use_meta_fp8_rowwise_recipe: found ")
    assert "FP8_PER_CHANNEL_PER_TOKEN" in problem


@pytest.mark.parametrize("flags", [(*REQUANTIZED, "int8"), (*REQUANTIZED, "int4"), ("--use_fp8_rowwise",)], ids=str)
def test_activations_of_32_bits(tmp_path: Path, flags: tuple[str, ...]) -> None:
    assert one(refused(dense_model(tmp_path), "--dtype", "float32", *flags)).startswith("--dtype float32: found with ")


@pytest.mark.parametrize("name", ["gptq", "awq", "modelopt fp8", "modelopt awq"])
def test_activations_of_32_bits_with_codes_as_they_are(tmp_path: Path, name: str) -> None:
    problem = one(refused(model_of(tmp_path, name), "--dtype", "float32"))
    assert problem.startswith(f"--dtype float32: found with {FORMATS[name].algorithm}")
    assert "float16 or bfloat16" in problem


@pytest.mark.parametrize(
    ("flags", "subject"),
    [
        (("--dequantize",), "--requantize"),
        (("--use_fp8",), "--use_fp8"),
        ((*REQUANTIZED, "int4_awq"), "--weight_only_precision int4_awq"),
    ],
    ids=str,
)
def test_what_cannot_be_quantized_again(tmp_path: Path, flags: tuple[str, ...], subject: str) -> None:
    report = refused(model_of(tmp_path, "gptq"), "--requantize", *flags)
    assert any(problem.startswith(f"{subject}: found ") for problem in report)


def test_quantizing_again_needs_a_group_size(tmp_path: Path) -> None:
    model = model_of(tmp_path, "compressed fp8")
    assert one(refused(model, "--requantize")).startswith("--group_size: found nothing")
    assert convert(model, tmp_path / "out", "--requantize", "--group_size", 64).code == 0


@pytest.mark.parametrize("sm", [70, 88, 0, "all", "8.0"])
def test_a_generation_that_nothing_is_known_of(tmp_path: Path, sm: int | str) -> None:
    assert one(refused(dense_model(tmp_path), "--sm", sm)).startswith("--sm: found ")


@pytest.mark.parametrize("value", [0, -1])
def test_a_group_size_that_is_none(tmp_path: Path, value: int) -> None:
    assert one(refused(dense_model(tmp_path), "--group_size", value)).startswith("--group_size: found ")


NARROW = {**LLAMA, "intermediate_size": 288}


@pytest.mark.parametrize("flags", [(*REQUANTIZED, "int8"), (*REQUANTIZED, "int4")], ids=str)
def test_sizes_that_are_no_whole_tiles(tmp_path: Path, flags: tuple[str, ...]) -> None:
    problems = refused(dense_model(tmp_path, NARROW), *flags)
    assert one(problems).startswith("--tp_size 1: found intermediate_size 288 a rank; expected a multiple of 64. Works: none")
    # FP8 has no tiles.
    assert convert(tmp_path / "model", tmp_path / "out", "--use_fp8_rowwise").code == 0


@pytest.mark.parametrize("tp", [4, 8])
def test_the_sizes_that_would_work_do(tmp_path: Path, tp: int) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    config = {**LLAMA, **sizes, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32}
    model = dense_model(tmp_path, config)
    flags = (*REQUANTIZED, "int8")
    if tp == 4:
        assert convert(model, tmp_path / "out", "--tp_size", tp, *flags).code == 0
        return
    report = refused(model, "--tp_size", tp, *flags)
    assert {problem.partition(";")[0] for problem in report} == {
        "--tp_size 8: found q_size + kv_size 96 a rank",
        "--tp_size 8: found q_size 32 a rank",
        "--tp_size 8: found hidden_size 32 a rank",
    }
    assert all("Works: 1, 2, 4" in problem for problem in report)
    for size in (1, 2, 4):
        assert plans(model, "--tp_size", size, *flags)


def test_groups_that_the_ranks_would_cut(tmp_path: Path) -> None:
    """TensorRT-LLM pads both axes, as if each rank had a share of either."""
    model = model_of(tmp_path, "gptq groups of 128", source.LLAMA)
    report = refused(model, "--tp_size", 4)
    assert {problem.partition(". ")[0] for problem in report} == {
        "--tp_size 4: found q_size + kv_size 192 a rank; expected a multiple of 128",
        "--tp_size 4: found q_size 64 a rank; expected a multiple of 128",
        "--tp_size 4: found hidden_size 64 a rank; expected a multiple of 128",
    }
    assert all("Works: 1, 2" in problem for problem in report)
    assert plans(model, "--tp_size", 2)


def test_inside_experts(tmp_path: Path) -> None:
    config = {**MIXTRAL, "intermediate_size": 96}
    flags = (*REQUANTIZED, "int8")
    report = refused(dense_model(tmp_path, config), *flags)
    assert any("expert_intermediate_size 96 a rank" in problem for problem in report)


@pytest.mark.parametrize("flags", [("--use_nvfp4",), ("--use_nvfp4", "--dequantize")], ids=str)
def test_nvfp4_is_for_sources_that_are_quantized_so(flags: tuple[str, ...], tmp_path: Path) -> None:
    model = model_of(tmp_path, "nvfp4") if len(flags) > 1 else dense_model(tmp_path)
    assert one(refused(model, *flags)).startswith("--use_nvfp4: found a ")


@pytest.mark.parametrize("scheduler", ["threads", "local", "synchronous"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("flags", [(*REQUANTIZED, "int8"), (*REQUANTIZED, "int4"), ("--use_fp8_rowwise",)], ids=str)
def test_values_that_no_scale_fits(tmp_path: Path, flags: tuple[str, ...], value: float, scheduler: str) -> None:
    tensors = source.values(LLAMA)
    tensors[f"{DOWN}.weight"][100, 200] = value
    model = dense_model(tmp_path, LLAMA, tensors)
    ran = convert(model, tmp_path / "deep" / "out", "--tp_size", 2, "--scheduler", scheduler, *flags)
    assert ran.code == 2, ran
    assert f"  - {DOWN}.weight: found a value that is not finite" in ran.err
    assert "Traceback" not in ran.err
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    # Without quantization they are the user's own.
    assert convert(model, tmp_path / "out", "--tp_size", 2).code == 0


def test_values_that_are_too_large_for_the_type(tmp_path: Path) -> None:
    config = {**LLAMA, "torch_dtype": "bfloat16"}
    tensors = source.values(config)
    tensors[f"{Q}.weight"][0, 0] = 1e6
    model = dense_model(tmp_path, config, tensors)
    ran = convert(model, tmp_path / "out", "--dtype", "float16", *REQUANTIZED, "int8")
    assert ran.code == 2, ran
    assert f"{Q}.weight: found a value that is not finite" in ran.err
    assert convert(model, tmp_path / "out", *REQUANTIZED, "int8").code == 0


def test_values_that_no_scale_fits_leave_an_older_conversion_alone(tmp_path: Path) -> None:
    assert convert(dense_model(tmp_path), tmp_path / "out").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    tensors = source.values(LLAMA)
    tensors[f"{DOWN}.weight"][0, 0] = np.nan
    dense_model(tmp_path, LLAMA, tensors)
    assert convert(tmp_path / "model", tmp_path / "out", *REQUANTIZED, "int8").code == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_scratch_of_values_that_no_scale_fits_is_gone_too(tmp_path: Path) -> None:
    tensors = source.values(LLAMA)
    tensors[f"{DOWN}.weight"][0, 0] = np.nan
    model = dense_model(tmp_path, LLAMA, tensors)
    ran = convert(model, tmp_path / "out", "--scratch_after", "shard", *REQUANTIZED, "int8")
    assert ran.code == 2, ran
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_all_that_is_wrong_comes_in_one_report(tmp_path: Path) -> None:
    report = refused(model_of(tmp_path, source.gptq(index="order")), "--use_fp8", "--dtype", "float32", "--tp_size", 3)
    subjects = {problem.partition(": found ")[0] for problem in report}
    assert {"--use_fp8", "--dtype float32", "--tp_size 3"} <= subjects
    assert any(subject.endswith(".g_idx") for subject in subjects)
