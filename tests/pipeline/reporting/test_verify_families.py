"""Every family in every form that it can be quantized to: what the ranks compute is what transformers makes of their numbers.

Dense ranks agree with transformers running the source itself, to float32 rounding.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline import convert
from pipeline.errors import BadInput
from pipeline.reporting.verification import verify
from tests.end_to_end.test_family_forward import CASES, Case, build
from tests.support import quantized_checkpoints

# Every axis of every rank is a multiple of 64 at TP 2, so that kernels take it.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "head_dim": 64,
}
EXPERTS = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
FAMILIES = {
    name: case
    for name, case in CASES.items()
    if name in ("llama_biases", "llama_linear", "mistral", "mixtral", "granite", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
    or name in ("phi3", "phi3_long", "phimoe", "gemma", "gemma2", "gemma3", "granitemoe", "ernie4_5", "seed_oss")
}
FROM_NUMBERS = {
    "dense": {},
    "int8": {"use_weight_only": True},
    "int4": {"use_weight_only": True, "weight_only_precision": "int4"},
    "fp8 rowwise": {"use_fp8_rowwise": True},
}
FORMATS = {
    "gptq": quantized_checkpoints.gptq(sym=False),
    "awq": quantized_checkpoints.awq(),
    "fp8": quantized_checkpoints.modelopt_float8(cache=False),
    "compressed fp8": quantized_checkpoints.compressed_float8(dynamic=True),
    "modelopt awq": quantized_checkpoints.modelopt_awq(),
}
# A stack of experts has no place for what these hold (docs/quantization.md).
EXPERT_FAMILIES = ("mixtral", "granitemoe", "qwen2_moe", "qwen3_moe", "phimoe")
NO_EXPERTS = ("compressed fp8", "fp8 rowwise", "modelopt awq")
# What the attention of FP8 by row lacks, and no list of excluded modules brings back.
NOT_BY_ROW = ("gemma2", "gemma3", "phi3_long")
BY_ROW = ("compressed fp8", "fp8 rowwise")
# Whose rows of q and k become others, by which codes cannot be moved; whose experts quantizers of matrices leave as they are.
UNKEPT = {"ernie4_5": r"q_proj.*found a module whose weights are packed", "granitemoe": "not quantized|experts"}


# Of fused tensors, biases and experts: these are tried in every form by `make test`, and every family in one.
FEW = ("qwen2", "phi3", "qwen2_moe")


def pairs(forms: Iterable[str]) -> list[Any]:
    """Each family in each form; those that wait for the night are marked."""
    usual, *_ = forms
    return [
        pytest.param(family, form, marks=() if form == usual or family in FEW else pytest.mark.nightly)
        for family, form in itertools.product(FAMILIES, forms)
    ]


def sized(name: str) -> Case:
    case = FAMILIES[name]
    given = {**case.options, **SIZES}
    if "moe_intermediate_size" in given:
        given |= EXPERTS
    parameters = given.get("rope_parameters", {})
    if "short_factor" in parameters:  # one factor for each pair of a head
        factors = {kind: [1 + n / 20 for n in range(32)] for kind in ("short_factor", "long_factor")}
        given["rope_parameters"] = {**parameters, **factors}
    if name.startswith("ph"):  # Phi's heads are hidden_size / heads
        given |= {"hidden_size": 256}
        del given["head_dim"]
    return Case(case.config, case.model, given)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family's model as transformers saves it in bfloat16, made when it is first asked for."""

    class Models(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            directory = tmp_path_factory.mktemp(name) / "model"
            build(sized(name)).to(torch.bfloat16).save_pretrained(directory)
            self[name] = directory
            return directory

    return Models()


def checked(source: Path, output: Path, **options: Any) -> dict[str, Any]:
    convert(model_dir=source, output_dir=output, dtype="bfloat16", tp_size=2, scheduler="synchronous", **options)
    result = verify(output, source, logits=True, tokens=11)
    result.check()
    summary = result.summary()
    assert summary["logits"]["comparisons"][-1]["max_relative"] < 1e-5
    return summary


@pytest.mark.parametrize(("family", "form"), pairs(FROM_NUMBERS))
def test_numbers_quantized_on_the_way(family: str, form: str, models: dict[str, Path], tmp_path: Path) -> None:
    if form in NO_EXPERTS and family in EXPERT_FAMILIES:
        with pytest.raises(BadInput, match="expert"):
            convert(model_dir=models[family], output_dir=tmp_path / "ranks", **FROM_NUMBERS[form])
        return
    if form in BY_ROW and family in NOT_BY_ROW:
        with pytest.raises(BadInput, match="Fp8RowwiseAttention computes none"):
            convert(model_dir=models[family], output_dir=tmp_path / "ranks", **FROM_NUMBERS[form])
        return
    summary = checked(models[family], tmp_path / "ranks", **FROM_NUMBERS[form])
    stored = {row["storage"] for row in summary["round_trip"]["tensors"]}
    assert stored == {"dense"} | ({form if form.startswith("fp8") else "weight-only"} if form != "dense" else set())


@pytest.mark.parametrize(("family", "form"), pairs(FORMATS))
def test_quantized_sources(family: str, form: str, models: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((models[family] / "config.json").read_text())
    tensors = load_file(models[family] / "model.safetensors")
    arrays = {name: values.float().numpy().astype(quantized_checkpoints.BF16) for name, values in tensors.items()}
    source = tmp_path / "model"
    quantized_checkpoints.write(source, config, FORMATS[form], tensors=arrays)
    if reason := UNKEPT.get(family):
        with pytest.raises(BadInput, match=reason):
            convert(model_dir=source, output_dir=tmp_path / "ranks", tp_size=2, scheduler="synchronous")
        return
    if form in NO_EXPERTS and family in EXPERT_FAMILIES:
        with pytest.raises(BadInput, match="expert"):
            convert(model_dir=source, output_dir=tmp_path / "ranks", tp_size=2, scheduler="synchronous")
        return
    if form in BY_ROW and family in NOT_BY_ROW:
        with pytest.raises(BadInput, match="Fp8RowwiseAttention computes none"):
            convert(model_dir=source, output_dir=tmp_path / "ranks", tp_size=2, scheduler="synchronous")
        return
    summary = checked(source, tmp_path / "ranks")
    assert {row["storage"] for row in summary["round_trip"]["tensors"]} > {"dense"}
