"""contract: the tensors of quantized linears, by hand, by the reference's files and by headrace's conversions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import convert
from stages.read.ranks import open_checkpoint
from stages.verify.contract import contract
from stages.verify.contract.integrity import headers
from tests.stages.verify.contract.test_contract import LLAMA, MIXTURE, asked, layer, mapped
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source

SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_size": 32, "num_hidden_layers": 3}  # whole tiles on two ranks
WIDE = {**LLAMA, **SIZES}
WIDE_MIXTURE = {**MIXTURE, **SIZES}


def quantized(config: dict[str, Any], algorithm: str | None, **more: Any) -> dict[str, Any]:
    return {**config, "quantization": {"quant_algo": algorithm, "group_size": 64, **more}}


def linears(config: dict[str, Any], number: int = 0) -> dict[str, str]:
    """What the first rank holds of qkv, dense, fc and their like in a layer."""
    return {name: each for name, each in layer(asked(config)[0], number).items() if "layernorm" not in name}


def of(config: dict[str, Any], module: str) -> dict[str, str]:
    return {name.removeprefix(f"{module}."): each for name, each in linears(config).items() if name.startswith(f"{module}.")}


# On two ranks qkv is [192, 256], proj [256, 256] of [256, 512].
@pytest.mark.parametrize(
    ("algorithm", "options", "qkv", "proj"),
    [
        (
            "W8A16",
            {},
            {"weight": "int8 [256, 192]", "per_channel_scale": "bfloat16 [192]"},
            {"weight": "int8 [256, 256]", "per_channel_scale": "bfloat16 [256]"},
        ),
        (
            "W4A16",
            {},
            {"weight": "int8 [256, 96]", "per_channel_scale": "bfloat16 [192]"},
            {"weight": "int8 [256, 128]", "per_channel_scale": "bfloat16 [256]"},
        ),
        (
            "W4A16_GPTQ",
            {"has_zero_point": True},
            {"weight": "bfloat16 [256, 48]", "weights_scaling_factor": "bfloat16 [4, 192]", "zero": "bfloat16 [4, 192]"},
            {"weight": "bfloat16 [256, 64]", "weights_scaling_factor": "bfloat16 [4, 256]", "zero": "bfloat16 [4, 256]"},
        ),
        (
            "W8A16_GPTQ",
            {"has_zero_point": False},
            {"weight": "bfloat16 [256, 96]", "weights_scaling_factor": "bfloat16 [4, 192]"},
            {"weight": "bfloat16 [256, 128]", "weights_scaling_factor": "bfloat16 [4, 256]"},
        ),
        (
            "W4A16_AWQ",
            {"pre_quant_scale": True},
            {
                "weight": "int8 [96, 256]",
                "weights_scaling_factor": "float32 [192, 4]",
                "prequant_scaling_factor": "bfloat16 [256] or bfloat16 [1, 256]",
            },
            {
                "weight": "int8 [128, 256]",
                "weights_scaling_factor": "float32 [256, 4]",
                "prequant_scaling_factor": "bfloat16 [256] or bfloat16 [1, 256]",
            },
        ),
        (
            "FP8",
            {},
            {
                "weight": "float8_e4m3fn [192, 256]",
                "weights_scaling_factor": "float32 [1]",
                "activation_scaling_factor": "float32 [1]",
            },
            {
                "weight": "float8_e4m3fn [256, 256]",
                "weights_scaling_factor": "float32 [1]",
                "activation_scaling_factor": "float32 [1]",
            },
        ),
        (
            "FP8_PER_CHANNEL_PER_TOKEN",
            {},
            {"weight": "float8_e4m3fn [192, 256]", "per_channel_scale": "float32 [192]"},
            {"weight": "float8_e4m3fn [256, 256]", "per_channel_scale": "float32 [256]"},
        ),
    ],
)
def test_the_tensors_of_a_linear(algorithm: str, options: dict[str, Any], qkv: dict[str, str], proj: dict[str, str]) -> None:
    config = mapped(quantized({**WIDE, "num_attention_heads": 8, "num_key_value_heads": 2}, algorithm, **options), tp=2)
    assert of(config, "attention.qkv") == qkv
    assert of(config, "mlp.proj") == proj
    assert {name: each for name, each in asked(config)[0].items() if "head" in name or "embedding" in name} == {
        "transformer.vocab_embedding.weight": "bfloat16 [99, 256]",
        "lm_head.weight": "bfloat16 [50, 256]",
    }


def test_stacks_of_experts() -> None:
    config = mapped(quantized(WIDE_MIXTURE, "W4A16"), tp=2, moe_tp_size=1, moe_ep_size=2)
    assert of(config, "mlp.fc") == {"weight": "int8 [4, 256, 512]", "per_channel_scale": "bfloat16 [4, 1024]"}
    config = mapped(quantized(WIDE_MIXTURE, "W4A16_GPTQ", has_zero_point=True), tp=2)
    grouped = {"weights_scaling_factor": "bfloat16 [8, 4, 256]", "zero": "bfloat16 [8, 4, 256]"}
    assert of(config, "mlp.proj") == {"weight": "bfloat16 [8, 256, 64]", **grouped}
    assert of(config, "mlp.router") == {"weight": "float32 [8, 256]"}


def test_what_is_asked_of_fp8_by_row() -> None:
    bounds = {"clamp_val": [-1200.0, 1200.0]}
    (rank,) = asked(mapped(quantized(WIDE, "FP8_PER_CHANNEL_PER_TOKEN", **bounds)))
    clamps = {name for name in layer(rank) if name.endswith("clamp_val")}
    assert clamps == {f"{name}.clamp_val" for name in ("attention", "mlp", "input_layernorm", "post_layernorm")}
    assert layer(rank)["mlp.clamp_val"] == "float32 [2]"


def test_metas_recipe_leaves_attention_and_the_outer_layers_of_the_model() -> None:
    """The first and the last of the model, not of each stage."""
    four = {**WIDE, "num_hidden_layers": 4}
    recipe = quantized(four, "FP8_PER_CHANNEL_PER_TOKEN", clamp_val=[-1, 1], use_meta_recipe=True)
    first, last = asked(mapped(recipe, pp=2))
    dense = layer(asked(mapped(four))[0])
    assert layer(first, 0) == layer(last, 1) == dense
    middle = layer(first, 1)
    assert layer(last, 0) == middle != dense
    assert {name for name in middle if name.endswith("clamp_val")} == {"mlp.clamp_val", "post_layernorm.clamp_val"}
    assert {name: each for name, each in middle.items() if "attention" in name} == {
        name: each for name, each in dense.items() if "attention" in name
    }
    assert middle["mlp.fc.weight"] == "float8_e4m3fn [512, 256]"


@pytest.mark.parametrize("algorithm", [None, "FP8", "W8A16"])
def test_the_scale_of_a_quantized_cache(algorithm: str | None) -> None:
    config = mapped(quantized(WIDE, algorithm, kv_cache_quant_algo="FP8"))
    assert linears(config)["attention.kv_cache_scaling_factor"] == "float32 [1]"
    assert "attention.kv_cache_scaling_factor" not in linears(mapped(quantized(WIDE, algorithm)))
    reciprocal = contract(config)[0][0]["transformer.layers.0.attention.kv_cache_rcp_scaling_factor"]
    assert not reciprocal.required


def test_excluded_modules_stay_as_they_are() -> None:
    config = mapped(quantized(WIDE, "W8A16", exclude_modules=["lm_head", "*.mlp", "*layers.1.attention.dense"]))
    assert [name for name, each in linears(config).items() if each.startswith("int8")] == [
        "attention.qkv.weight",
        "attention.dense.weight",
    ]
    assert [name for name, each in linears(config, 1).items() if each.startswith("int8")] == ["attention.qkv.weight"]


# --- what the loader would pad


@pytest.mark.parametrize(
    ("sizes", "algorithm", "tp", "modules"),
    [
        ({"intermediate_size": 352}, "W8A16", 1, ["mlp.fc", "mlp.gate", "mlp.proj"]),
        ({"intermediate_size": 352}, "FP8", 1, []),
        # The axis that is not split must be a multiple for each rank too.
        ({"hidden_size": 192}, "W4A16", 2, ["attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"]),
        ({"hidden_size": 192}, "W4A16", 1, []),
        ({}, "W4A16_GPTQ", 2, []),
        ({"group_size": 128}, "W4A16_GPTQ", 4, ["attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"]),
        # Two heads of queries, one of keys and one of values on each of four ranks: 384 rows of 24 each.
        ({"head_size": 24, "num_key_value_heads": 1}, "W4A16_AWQ", 4, ["attention.qkv", "attention.dense"]),
    ],
)
def test_matrices_that_the_loader_would_pad(sizes: dict[str, int], algorithm: str, tp: int, modules: list[str]) -> None:
    group = {key: size for key, size in sizes.items() if key == "group_size"}
    model = {key: size for key, size in sizes.items() if key != "group_size"}
    _, problems = contract(mapped(quantized({**WIDE, **model}, algorithm, **group), tp=tp))
    assert [problem.found.split(" ")[0] for problem in problems] == modules
    assert all(problem.subject == "config.json: quantization" and algorithm in problem.found for problem in problems)


@pytest.mark.parametrize("algorithm", ["FP8_PER_CHANNEL_PER_TOKEN", "W8A16_GPTQ", "W4A16_AWQ"])
def test_experts_in_an_algorithm_that_tensorrt_llm_has_not(algorithm: str) -> None:
    _, problems = contract(mapped(quantized(WIDE_MIXTURE, algorithm)))
    (problem,) = problems
    assert problem.subject == "config.json: quantization.quant_algo"
    assert problem.found.endswith(f"as {algorithm}")


@pytest.mark.parametrize("algorithm", ["W4A16_GPTQ", "W8A16_GPTQ", "W4A16_AWQ"])
@pytest.mark.parametrize(("size", "known"), [(16, False), (32, False), (64, True), (128, True)])
def test_groups_that_no_kernel_has(algorithm: str, size: int, known: bool) -> None:
    _, problems = contract(mapped(quantized(WIDE, algorithm, group_size=size)))
    assert [problem.subject for problem in problems] == ([] if known else ["config.json: quantization.group_size"])
    assert all(f"groups of {size} in-features in {algorithm}" in problem.found for problem in problems)
    # Rows have no groups, whatever the key says.
    assert contract(mapped(quantized(WIDE, "W8A16", group_size=size)))[1] == []


# --- as headrace writes them

FLOAT: dict[str, dict[str, Any]] = {
    "int8": {"use_weight_only": True},
    "int4": {"use_weight_only": True, "weight_only_precision": "int4"},
    "fp8 by row": {"use_fp8_rowwise": True},
    "fp8 by row, Meta's": {"use_fp8_rowwise": True, "use_meta_fp8_rowwise_recipe": True},
}
PACKED = [
    "gptq",
    "gptq asymmetric",
    "gptq 8 bits",
    "awq",
    "compressed w4a16",
    "compressed fp8",
    "modelopt fp8",
    "modelopt awq",
    "fbgemm",
]
SPLITS = {"tp1": {}, "tp2pp2": {"tp_size": 2, "pp_size": 2}, "ep2": {"tp_size": 2, "moe_ep_size": 2}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    formats = source.formats()
    for name in PACKED:
        source.write(folder / name, {**source.LLAMA, "num_hidden_layers": 3} if name == "fbgemm" else source.LLAMA, formats[name])
    checkpoints.save(folder / "float", source.LLAMA, source.values(source.LLAMA))
    checkpoints.save(folder / "experts", source.MIXTRAL, source.values(source.MIXTRAL))
    source.write(folder / "gptq experts", source.MIXTRAL, formats["gptq"])
    return {path.name: path for path in folder.iterdir()}


def converted(model: Path, output: Path, **options: Any) -> list[str]:
    convert(model_dir=model, output_dir=output, scheduler="synchronous", **options)
    return [str(problem) for problem in headers(open_checkpoint(output))]


@pytest.mark.parametrize("target", ["tp1", "tp2pp2"])
@pytest.mark.parametrize("name", PACKED)
def test_conversions_that_keep_their_codes(name: str, target: str, models: dict[str, Path], tmp_path: Path) -> None:
    cache = {"fp8_kv_cache": True} if "fp8" in name else {}
    assert converted(models[name], tmp_path / "out", **source.formats()[name].flags, **cache, **SPLITS[target]) == []


@pytest.mark.parametrize("target", ["tp1", "tp2pp2"])
@pytest.mark.parametrize("name", FLOAT)
def test_conversions_that_quantize(name: str, target: str, models: dict[str, Path], tmp_path: Path) -> None:
    assert converted(models["float"], tmp_path / "out", **FLOAT[name], **SPLITS[target]) == []


@pytest.mark.parametrize("target", SPLITS)
@pytest.mark.parametrize(("name", "options"), [("experts", FLOAT["int8"]), ("experts", FLOAT["int4"]), ("gptq experts", {})])
def test_conversions_of_experts(name: str, options: dict[str, Any], target: str, models: dict[str, Path], tmp_path: Path) -> None:
    assert converted(models[name], tmp_path / "out", **options, **SPLITS[target]) == []
