"""Mistakes that no scale may hide: codes that are none, or one off, and scales of activations that are not the source's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import convert
from pipeline.reporting.verification import verify
from tests.support import act_ranges, checkpoints, quantized_checkpoints
from tests.support.commands import headrace
from tests.support.damaged import Tensors, damaged
from tests.support.quantized_checkpoints import LLAMA, MIXTRAL, Format

LAYER = "transformer.layers.1"
QKV, DENSE, FC, PROJ = (f"{LAYER}.{module}" for module in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj"))


def packed(place: Path, kind: Format, config: dict[str, Any] = LLAMA, **options: Any) -> tuple[Path, Path]:
    """A source in a format, and its ranks."""
    quantized_checkpoints.write(place / "model", config, kind)
    convert(model_dir=place / "model", output_dir=place / "ranks", **{"tp_size": 2, "scheduler": "synchronous", **options})
    return place / "model", place / "ranks"


def measured(place: Path, **options: Any) -> tuple[Path, Path]:
    """A source of numbers, and its ranks by measured ranges."""
    tensors = quantized_checkpoints.values(LLAMA)
    checkpoints.save(place / "model", LLAMA, tensors)
    ranges = act_ranges.write(place / "ranges", tensors)
    more = {"tp_size": 2, "scheduler": "synchronous", "act_range": ranges, **options}
    convert(model_dir=place / "model", output_dir=place / "ranks", **more)
    return place / "model", place / "ranks"


def found(ranks: Path, source: Path) -> list[str]:
    """The subjects of what verification finds."""
    return [finding.problem.subject for finding in verify(ranks, source).findings]


def zeroed(module: str, scale: str = "", to: float = 0.0) -> Callable[[Tensors], None]:
    """Weights of zeros, with a scale of another size."""

    def change(tensors: Tensors) -> None:
        tensors[f"{module}.weight"] = torch.zeros_like(tensors[f"{module}.weight"].view(torch.uint8)).view(
            tensors[f"{module}.weight"].dtype
        )
        if scale:
            tensors[f"{module}.{scale}"] = torch.full_like(tensors[f"{module}.{scale}"], to)

    return change


@pytest.mark.parametrize("alike", [True, False])
def test_4_bit_floats_of_a_fused_module_are_compared(alike: bool, tmp_path: Path) -> None:
    """A module of several parts has the largest of their scales, and as much room as its least code, no more."""
    source, ranks = packed(tmp_path, quantized_checkpoints.nvfp4(alike=alike))
    assert found(ranks, source) == []
    subjects = found(damaged(ranks, tmp_path / "zero", zeroed(QKV)), source)
    assert subjects == [f"rank{rank}.safetensors: {QKV}.weight" for rank in range(2)]

    def halve(tensors: Tensors) -> None:
        tensors[f"{QKV}.weights_scaling_factor_2"] /= 2

    assert f"rank0.safetensors: {QKV}.weights_scaling_factor_2" in found(damaged(ranks, tmp_path / "half", halve), source)

    def nudge(tensors: Tensors) -> None:
        scales = tensors[f"{QKV}.weights_scaling_factor"].view(torch.uint8)
        scales[0, 0] -= 1  # the next float8

    # q has the largest scale, so that its groups' are the source's own.
    assert found(damaged(ranks, tmp_path / "nudged", nudge), source) == subjects


@pytest.mark.parametrize("kind", ["modelopt", "experts"])
def test_a_large_scale_hides_no_kept_float8(kind: str, tmp_path: Path) -> None:
    source, ranks = packed(tmp_path, quantized_checkpoints.modelopt_float8(), MIXTRAL if kind == "experts" else LLAMA)
    assert found(ranks, source) == []
    for module in (QKV, FC):
        subjects = found(damaged(ranks, tmp_path / module, zeroed(module, "weights_scaling_factor", 1500.0)), source)
        assert {f"rank{rank}.safetensors: {module}.weight" for rank in range(2)} <= set(subjects)

    def more(tensors: Tensors) -> None:
        tensors[f"{FC}.weights_scaling_factor"] *= 1.02  # less than a code is off by

    subjects = found(damaged(ranks, tmp_path / "more", more), source)
    assert f"rank0.safetensors: {FC}.weights_scaling_factor" in subjects


def test_a_large_scale_hides_no_measured_float8(tmp_path: Path) -> None:
    source, ranks = measured(tmp_path, use_fp8=True, dtype="bfloat16")
    assert found(ranks, source) == []
    for module in (QKV, FC, PROJ):
        subjects = found(damaged(ranks, tmp_path / module, zeroed(module, "weights_scaling_factor", 1500.0)), source)
        assert subjects == [f"rank{rank}.safetensors: {module}.weights_scaling_factor" for rank in range(2)]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_a_large_scale_hides_no_smoothed_codes(per_channel: bool, per_token: bool, tmp_path: Path) -> None:
    source, ranks = measured(tmp_path, smoothquant=0.5, per_channel=per_channel, per_token=per_token)
    assert found(ranks, source) == []
    for module in (QKV, DENSE, FC, PROJ):
        subjects = found(damaged(ranks, tmp_path / module, zeroed(module, "per_channel_scale", 1e4)), source)
        named = {
            f"rank{rank}.safetensors: {module}.{parameter}" for rank in range(2) for parameter in ("weight", "per_channel_scale")
        }
        assert subjects
        assert set(subjects) <= named


def test_a_row_of_smoothed_codes_is_compared(tmp_path: Path) -> None:
    source, ranks = measured(tmp_path, smoothquant=0.5, per_channel=True)

    def change(tensors: Tensors) -> None:
        tensors[f"{FC}.weight"][5] = 0
        tensors[f"{FC}.per_channel_scale"][0, 5] = 1e4

    assert found(damaged(ranks, tmp_path / "row", change), source) == [f"rank{rank}.safetensors: {FC}.weight" for rank in range(2)]


# Codes of 8 bits that are the source's, in bfloat16, where half a step of a scale is half a code.


@pytest.mark.parametrize("kind", ["compressed w8a8", "compressed w8a16 a row", "eetq", "gptq 8 bits a row"])
def test_a_code_that_is_one_off_is_found(kind: str, tmp_path: Path) -> None:
    options = {"use_weight_only": True} if kind == "compressed w8a8" else {}
    source, ranks = packed(tmp_path, quantized_checkpoints.formats()[kind], sm=100, dtype="bfloat16", **options)
    assert found(ranks, source) == []

    def clamp(tensors: Tensors) -> None:
        codes = tensors[f"{FC}.weight"].view(torch.int8)
        assert int((codes.abs() == 127).sum() + (codes == -128).sum())
        codes[codes == -128] = -127
        codes[codes == 127] = 126

    assert found(damaged(ranks, tmp_path / "off", clamp), source) == [f"rank{rank}.safetensors: {FC}.weight" for rank in range(2)]


@pytest.mark.parametrize("kind", ["gptq 8 bits asymmetric", "gptq planar 7 bits"])
def test_a_zero_point_that_is_one_off_is_found(kind: str, tmp_path: Path) -> None:
    source, ranks = packed(tmp_path, quantized_checkpoints.formats()[kind], dtype="bfloat16")
    assert found(ranks, source) == []

    def change(tensors: Tensors) -> None:
        scale, zero = (tensors[f"{FC}.{name}"].float() for name in ("weights_scaling_factor", "zero"))
        largest = (zero / scale).abs().argmax()
        zero.view(-1)[largest] += scale.view(-1)[largest]
        tensors[f"{FC}.zero"] = zero.bfloat16()

    assert found(damaged(ranks, tmp_path / "off", change), source) == [f"rank{rank}.safetensors: {FC}.weight" for rank in range(2)]


# Scales of activations and of the cache


def test_scales_of_a_source_with_names_of_its_own(tmp_path: Path) -> None:
    """EXAONE's modules, whose scales are looked up by the names of LLaMA's."""
    kind = quantized_checkpoints.modelopt_float8()
    tensors = quantized_checkpoints.values(LLAMA)
    stored = {_exaone(name): values for name, values in quantized_checkpoints.quantized(tensors, kind, 2)[0].items()}
    config = {**LLAMA, "architectures": ["ExaoneForCausalLM"], "model_type": "exaone"}
    checkpoints.save(tmp_path / "model", config, stored)
    for name, content in kind.files.items():
        (tmp_path / "model" / name).write_text(json.dumps(content))
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "ranks", tp_size=2, fp8_kv_cache=True, scheduler="synchronous")
    assert found(tmp_path / "ranks", tmp_path / "model") == []

    def halve(tensors: Tensors) -> None:
        tensors[f"{FC}.activation_scaling_factor"] /= 2
        tensors[f"{LAYER}.attention.kv_cache_scaling_factor"] /= 2

    subjects = found(damaged(tmp_path / "ranks", tmp_path / "half", halve), tmp_path / "model")
    assert {name.rpartition(".")[2] for name in subjects} == {"activation_scaling_factor", "kv_cache_scaling_factor"}


def _exaone(name: str) -> str:
    names = {
        "model.embed_tokens": "transformer.wte",
        "model.norm": "transformer.ln_f",
        "model.layers.": "transformer.h.",
        "self_attn.o_proj": "self_attn.out_proj",
        "self_attn": "attn.attention",
        "post_attention_layernorm": "ln_2",
        "input_layernorm": "ln_1",
        "gate_proj": "c_fc_0",
        "up_proj": "c_fc_1",
        "down_proj": "c_proj",
    }
    for theirs, ours in names.items():
        name = name.replace(theirs, ours)
    return name


@pytest.mark.parametrize("kind", ["nvfp4", "modelopt fp8", "compressed fp8 dynamic"])
def test_activations_that_are_measured_anew_are_not_the_sources(kind: str, tmp_path: Path) -> None:
    quantized_checkpoints.write(tmp_path / "model", LLAMA, quantized_checkpoints.formats()[kind])
    ranges = act_ranges.write(tmp_path / "ranges", quantized_checkpoints.values(LLAMA))
    options = {"dequantize": True, "use_fp8": True, "act_range": ranges, "tp_size": 2, "scheduler": "synchronous"}
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "ranks", **options)
    assert found(tmp_path / "ranks", tmp_path / "model") == []
    subjects = found(
        damaged(tmp_path / "ranks", tmp_path / "zero", zeroed(FC, "weights_scaling_factor", 1500.0)), tmp_path / "model"
    )
    assert {f"rank{rank}.safetensors: {FC}." for rank in range(2)} == {
        name.removesuffix(name.rpartition(".")[2]) for name in subjects
    }


@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (2.0, False)])
def test_the_reciprocal_of_the_cache_s_scale(factor: float, right: bool, tmp_path: Path) -> None:
    source, ranks = measured(tmp_path, use_fp8=True, fp8_kv_cache=True, dtype="bfloat16")

    def add(tensors: Tensors) -> None:
        for layer in range(2):
            name = f"transformer.layers.{layer}.attention.kv_cache"
            tensors[f"{name}_rcp_scaling_factor"] = factor / tensors[f"{name}_scaling_factor"]

    assert (found(damaged(ranks, tmp_path / "more", add), source) == []) == right


@pytest.mark.parametrize("name", [f"{FC}.activation_scaling_factor", f"{LAYER}.attention.kv_cache_scaling_factor"])
def test_scales_of_zero(name: str, tmp_path: Path) -> None:
    source, ranks = measured(tmp_path, use_fp8=True, fp8_kv_cache=True, dtype="bfloat16")

    def zero(tensors: Tensors) -> None:
        tensors[name] = torch.zeros_like(tensors[name])

    assert found(damaged(ranks, tmp_path / "zero", zero), source) == [f"rank{rank}.safetensors: {name}" for rank in range(2)]


def test_an_infinity_is_a_finding(tmp_path: Path) -> None:
    """A value that float16 does not hold is infinite there, and no figure of it ends the verification."""
    tensors = {name: values.astype("bfloat16") for name, values in quantized_checkpoints.values(LLAMA).items()}
    tensors["model.layers.1.mlp.gate_proj.weight"][3, 7] = 1e5
    checkpoints.save(tmp_path / "model", LLAMA, tensors)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "ranks", dtype="float16", scheduler="synchronous")
    result = verify(tmp_path / "ranks", tmp_path / "model")
    assert [finding.problem.subject for finding in result.findings] == [f"rank0.safetensors: {FC}.weight"]
    (row,) = (row for row in result.summary()["round_trip"]["tensors"] if row["name"] == f"{FC}.weight")
    assert np.isneginf(row["snr_db"])
    ran = headrace("verify", tmp_path / "ranks", "--source", tmp_path / "model", "--json")
    assert ran.code == 5
    assert not {"Infinity", "NaN"} & set(ran.out.replace(",", " ").replace("-", " ").split())
    (row,) = (row for row in json.loads(ran.out)["round_trip"]["tensors"] if row["name"] == f"{FC}.weight")
    assert (row["snr_db"], row["max_abs"]) == (None, None)
