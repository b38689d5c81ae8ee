"""Quantized sources, and requests to quantize, for which there is no kernel or which contradict themselves: refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stages.quantization.sources import formats
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.commands import convert, headrace, one, refused
from tests.support.quantized_checkpoints import MIXTRAL, Arrays, Format

FORMATS = source.formats()
Q, K, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))
REQUANTIZED = ("--use_weight_only", "--weight_only_precision")


LLAMA = {**source.LLAMA, "hidden_size": 128, "intermediate_size": 256}


def model_of(tmp_path: Path, kind: Format | str, config: dict[str, Any] = LLAMA, **changed: Any) -> Path:
    """A quantized checkpoint; `changed`: `settings` laid over the quantizer's, and `edit`, which changes the stored tensors.

    Layer 0's q_proj comes first, in a file of its own, so that what is wrong with it is met before anything else.
    """
    kind = FORMATS[kind] if isinstance(kind, str) else kind
    stored, _ = source.quantized(source.values(config), kind, config["num_hidden_layers"])
    edit: Callable[[Arrays], None] = changed.pop("edit", lambda _: None)
    edit(stored)
    said = source.described(config, kind)
    if kind.settings:
        said = {**said, "quantization_config": {**kind.settings, **changed.pop("settings", {})}}
    ahead = {name: np.ascontiguousarray(values) for name, values in stored.items() if name.startswith(f"{Q}.")}
    rest = {name: np.ascontiguousarray(values) for name, values in stored.items() if name not in ahead}
    checkpoints.save(tmp_path / "model", said, rest)
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "rest.safetensors")
    save_file(ahead, tmp_path / "model" / "ahead.safetensors")
    for name, content in kind.files.items():
        (tmp_path / "model" / name).write_text(json.dumps(content))
    assert not changed
    return tmp_path / "model"


def dense_model(tmp_path: Path, config: dict[str, Any] = LLAMA, tensors: Arrays | None = None) -> Path:
    checkpoints.save(tmp_path / "model", config, source.values(config) if tensors is None else tensors)
    return tmp_path / "model"


def without(*names: str) -> Callable[[Arrays], None]:
    def edit(stored: Arrays) -> None:
        for name in names:
            del stored[name]

    return edit


def with_tensors(**tensors: np.ndarray) -> Callable[[Arrays], None]:
    """Adds tensors to layer 0's q_proj, or replaces them."""

    def edit(stored: Arrays) -> None:
        stored.update({f"{Q}.{name}": values for name, values in tensors.items()})

    return edit


def dense(*modules: str) -> Callable[[Arrays], None]:
    """Modules that are not quantized, though the others are."""

    def edit(stored: Arrays) -> None:
        plain = source.values(LLAMA)
        for module in modules:
            for name in [name for name in stored if name.startswith(f"{module}.")]:
                del stored[name]
            stored[f"{module}.weight"] = plain[f"{module}.weight"]

    return edit


def otherwise(module: str, kind: Format) -> Callable[[Arrays], None]:
    """A module that is quantized in another way than the others."""

    def edit(stored: Arrays) -> None:
        weight = source.values(LLAMA)[f"{module}.weight"].astype(np.float32)
        for name in [name for name in stored if name.startswith(f"{module}.")]:
            del stored[name]
        packed = kind.quantizer(module, weight).parameters
        stored.update({f"{module}.{name}": values for name, values in packed.items()})

    return edit


# --- the source's codes as they are


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
    assert problem.startswith(f"{Q}.g_idx: found groups in the order of the activations (desc_act), in 1 modules")


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


@pytest.mark.parametrize("more", [(), ("--dequantize",)], ids=str)
@pytest.mark.parametrize("precision", ["int4_gptq", "int8_gptq", "int4_awq"])
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


# --- sizes


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


def plans(model: Path, *flags: object) -> bool:
    return headrace("plan", "--json", "--model_dir", model, "--output_dir", model.parent / "other", *flags).code == 0


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


# --- settings


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
    assert any("awq" in problem or "version gemv" in problem for problem in report)


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


@pytest.mark.parametrize("flags", [("--use_nvfp4",), ("--use_nvfp4", "--dequantize")], ids=str)
def test_nvfp4_is_for_sources_that_are_quantized_so(flags: tuple[str, ...], tmp_path: Path) -> None:
    model = model_of(tmp_path, "nvfp4") if len(flags) > 1 else dense_model(tmp_path)
    assert one(refused(model, *flags)).startswith("--use_nvfp4: found a ")


def test_w4a8_is_named_once(tmp_path: Path) -> None:
    def second(stored: Arrays) -> None:
        for name in [name for name in stored if name.endswith(".weight_scale")]:
            stored[name.replace("weight_scale", "weight_scale_2")] = np.ones((), np.float32)

    problem = one(refused(model_of(tmp_path, "modelopt awq", edit=second)))
    assert "weight_scale_2: found a module in W4A8_AWQ, and the like in 13 more modules" in problem


# --- tensors


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


def i32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


def f16(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float16)


def f32(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


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
    "float8: two scales of the cache": ("modelopt fp8", {"k_scale": f32(2)}),
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


# --- parts of one tensor


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


def test_a_bound_that_the_settings_deny(tmp_path: Path) -> None:
    config = {**LLAMA, "num_hidden_layers": 3}
    model = model_of(tmp_path, "fbgemm", config, settings={"activation_scale_ub": 900.0})
    report = refused(model, "--use_meta_fp8_rowwise_recipe")
    assert all("input_scale_ub: found 1200; expected 900" in problem for problem in report)


# --- values


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
