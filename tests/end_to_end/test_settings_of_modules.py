"""Sources that quantize modules in several ways: GPTQModel's `dynamic`, ModelOpt's MIXED_PRECISION."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import BadInput, convert, plan
from pipeline.errors import Problem
from pipeline.reporting.verification import verify
from tests.support import quantized_checkpoints as source
from tests.support.quantized_checkpoints import LLAMA, Format
from tests.support.rank_files import read
from tests.support.rank_matrices import AGAIN, BLOCK, BY_ALGORITHM, check_stands_for, cut, matrix, quantization, signal_to_noise

ALWAYS = ["*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding", "*shared_expert_gate"]
GPTQ = source.gptq(sym=False)
FLOAT8, AWQ, NVFP4 = source.modelopt_float8(cache=False), source.modelopt_awq(group=128), source.nvfp4()


def dynamic(kinds: dict[str, Format], patterns: dict[str, dict[str, Any]], algorithm: str = "W4A16_GPTQ") -> Format:
    """GPTQ of several kinds, by parts of modules' names, as GPTQModel's settings would say it."""
    return replace(source.each_its_own(kinds, {**GPTQ.settings, "dynamic": patterns}), algorithm=algorithm)


DOWN = dynamic(
    {"down_proj": source.gptq(bits=8, group=128), "": GPTQ}, {r"+:.*\.down_proj": {"bits": 8, "group_size": 128, "sym": True}}
)
WIDE = source.gptq(bits=8, group=32, sym=False)
FIRST = dynamic({"layers.0.mlp": WIDE, "": GPTQ}, {r"model\.layers\.0\.mlp\.": {"bits": 8, "group_size": 32}, ".*": {}})
NOT_DOWN = dynamic({"q_": GPTQ, "k_": GPTQ, "v_": GPTQ, "o_": GPTQ, "gate_": GPTQ, "up_": GPTQ}, {r"-:.*\.down_proj": {}})
NOT_ONE = dynamic({"layers.1.": GPTQ, "self_attn": GPTQ, "gate_": GPTQ, "up_": GPTQ}, {r"-:model\.layers\.0\.mlp\.down_proj": {}})
MIXED = source.mixed_precision({"self_attn": FLOAT8, "layers.0.mlp": NVFP4, "mlp.up": AWQ, "mlp.gate": AWQ}, 2)


def refused(directory: Path, kind: Format, **options: Any) -> Problem:
    """The one problem of a plan."""
    source.write(directory / "model", LLAMA, kind)
    with pytest.raises(BadInput) as error:
        plan(model_dir=directory / "model", output_dir=directory / "out", tp_size=2, **options)
    (problem,) = error.value.problems
    return problem


def check_again(directory: Path, kind: Format, algorithm: str, **options: Any) -> None:
    """Quantized again, all modules are of the target's one algorithm, near to what the source stands for."""
    weights = source.write(directory / "model", LLAMA, kind)
    convert(model_dir=directory / "model", output_dir=directory / "out", scheduler="threads", tp_size=2, **options)
    assert quantization(directory / "out")["quant_algo"] == algorithm
    assert quantization(directory / "out")["exclude_modules"] is None
    for rank in range(2):
        ours = read(directory / f"out/rank{rank}.safetensors")
        for target, wanted in cut(weights, LLAMA, rank, 2).items():
            assert signal_to_noise(matrix(ours, target), wanted.astype(np.float32)) > 15, target


@pytest.mark.parametrize(
    ("kind", "module", "left"),
    [
        (NOT_DOWN, "mlp.proj", "down_proj"),
        pytest.param(
            source.each_its_own({"mlp": source.awq()}, source.awq().settings), "attention", "self_attn", marks=pytest.mark.nightly
        ),
        (source.each_its_own({"mlp": FLOAT8}, {}, FLOAT8.files), "attention", "self_attn"),
        pytest.param(source.each_its_own({"mlp": NVFP4}, {}, NVFP4.files), "attention", "self_attn", marks=pytest.mark.nightly),
    ],
    ids=["gptq", "awq", "fp8", "nvfp4"],
)
def test_what_is_plain_in_every_layer_stays_so(kind: Format, module: str, left: str, tmp_path: Path) -> None:
    weights = source.write(tmp_path / "model", LLAMA, kind)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", tp_size=2)
    said = quantization(tmp_path / "out")
    patterns = ["*attention.qkv", "*attention.dense"] if module == "attention" else [f"*{module}"]
    assert said == {
        **BLOCK,
        "quant_algo": said["quant_algo"],
        **BY_ALGORITHM[said["quant_algo"]],
        "exclude_modules": ALWAYS + patterns,
    }
    (note,) = [note for note in json.loads((tmp_path / "out/headrace.json").read_text())["notes"] if "in 16 bits stay" in note]
    assert note.endswith(f"in 16 bits stay {', '.join(patterns)}, which the source has as numbers in every layer")
    for rank in range(2):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for target, wanted in cut(weights, LLAMA, rank, 2).items():
            plain = f".{module}" in target
            assert (wanted.dtype == np.float16) == plain, left
            found = ours[f"{target}.weight"] if plain else matrix(ours, target)
            assert np.array_equal(found, wanted) if plain else np.allclose(found, wanted, rtol=2e-2, atol=1e-3)
    verify(tmp_path / "out", tmp_path / "model").check()


def test_what_is_plain_in_some_layers_is_refused_with_what_would_do(tmp_path: Path) -> None:
    problem = refused(tmp_path, NOT_ONE)
    assert (problem.subject, problem.found) == ("model.layers.0.mlp.down_proj.weight", "weights that are not quantized")
    assert problem.remedy.startswith("Give --requantize, which quantizes all of it again")
    assert problem.remedy.endswith("or --dequantize for numbers")
    check_again(tmp_path / "again", NOT_ONE, "W4A16_GPTQ", requantize=True)


def test_the_mlp_of_float8_is_not_left_plain(tmp_path: Path) -> None:
    """The builder makes one matrix of two of its modules, and would take these for float8."""
    problem = refused(tmp_path, source.each_its_own({"self_attn": FLOAT8}, {}, FLOAT8.files))
    assert problem.found == "weights that are not quantized, in 6 modules"
    assert problem.remedy.startswith("Give --requantize --group_size 128, which quantizes all of it again")


@pytest.mark.parametrize(("kind", "found"), [(DOWN, "codes of 8 bits, in 2 modules"), (FIRST, "codes of 8 bits, in 3 modules")])
def test_other_widths_are_one_problem_and_can_be_quantized_again(kind: Format, found: str, tmp_path: Path) -> None:
    problem = refused(tmp_path, kind)
    assert problem.found == found
    assert "W4A16_GPTQ" in problem.expected
    assert problem.remedy.startswith("Give --requantize, ")
    check_again(tmp_path / "again", kind, "W4A16_GPTQ", requantize=True)


@pytest.mark.parametrize("kind", [DOWN, pytest.param(FIRST, marks=pytest.mark.nightly)])
def test_each_module_is_read_by_its_own_settings(kind: Format, tmp_path: Path) -> None:
    check_stands_for(kind, tmp_path, tp_size=2, dequantize=True)
    verify(tmp_path / "ours", tmp_path / "model").check()


def test_patterns_that_do_not_fit_the_tensors_are_refused(tmp_path: Path) -> None:
    """No name begins with this one, which would find them anywhere."""
    problem = refused(tmp_path, dynamic({"layers.0.": WIDE, "": GPTQ}, {r"layers\.0\.": {"bits": 8, "group_size": 32}}))
    assert problem.found == "8 bits by its shape, and bits 4 in the settings, and the like in 6 more modules"


def test_modelopts_mixture_is_one_problem(tmp_path: Path) -> None:
    problem = refused(tmp_path, MIXED)
    assert problem.found == (
        "8 modules of FP8 of ModelOpt or compressed-tensors or fbgemm, 3 modules of NVFP4 of ModelOpt or compressed-tensors, "
        "2 modules of ModelOpt INT4-AWQ"
    )
    assert "--requantize --group_size 128" in problem.remedy
    assert "--dequantize" in problem.remedy
    assert refused(tmp_path / "asked", MIXED, use_fp8_rowwise=True) == problem


@pytest.mark.parametrize("to", ["", "int8", pytest.param("fp8", marks=pytest.mark.nightly)])
def test_modelopts_mixture_as_numbers(to: str, tmp_path: Path) -> None:
    """One module of the second layer is plain, too."""
    check_stands_for(MIXED, tmp_path, tp_size=2, dequantize=True, **(AGAIN[to][0] if to else {}))
    verify(tmp_path / "ours", tmp_path / "model").check()


def test_modelopts_mixture_quantized_again(tmp_path: Path) -> None:
    check_again(tmp_path, MIXED, "W4A16_GPTQ", requantize=True, group_size=128)


def test_modules_of_one_algorithm_in_a_mixture_are_kept(tmp_path: Path) -> None:
    kind = source.mixed_precision({"": NVFP4}, 2)
    source.write(tmp_path / "model", LLAMA, kind)
    source.write(tmp_path / "plain", LLAMA, NVFP4)
    for name in ("model", "plain"):
        convert(model_dir=tmp_path / name, output_dir=tmp_path / f"{name} out", scheduler="threads")
    first, second = ((tmp_path / f"{name} out/rank0.safetensors").read_bytes() for name in ("model", "plain"))
    assert first == second


def test_w4a8_in_a_mixture_is_refused_by_name(tmp_path: Path) -> None:
    def quantize(module: str, weight: np.ndarray) -> source.Packed:
        packed = AWQ.quantizer(module, weight)
        return source.Packed({**packed.parameters, "weight_scale_2": np.array(0.5, np.float32)}, packed.weight)

    problem = refused(tmp_path, source.mixed_precision({"mlp": replace(AWQ, quantizer=quantize), "": FLOAT8}, 2), dequantize=True)
    assert problem.found == "a module in W4A8_AWQ, and the like in 5 more modules"
