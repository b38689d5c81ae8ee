"""`--requantize`: every packed source is quantized again by groups of 64 and 128 and by rows of 8 and 4 bits, and passes
verification.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline import convert, plan
from pipeline.errors import BadInput
from pipeline.reporting.verification import verify
from tests.support import checkpoints, gguf_files
from tests.support import quantized_checkpoints as source
from tests.support.directories import contents
from tests.support.quantized_checkpoints import Arrays, Format
from tests.support.rank_files import read
from tests.support.rank_matrices import codes_of, cut, quantization, signal_to_noise

LLAMA = {**source.LLAMA, "num_hidden_layers": 1}
# By what the source is, with the bits that its groups keep.
SOURCES: dict[str, tuple[Format | str, int]] = {
    "gptq": (source.gptq(sym=False), 4),
    "gptq groups of 32": (source.gptq(group=32), 4),
    "gptq in the activations' order": (source.gptq(index="order", group=32), 4),
    "gptq 8 bits": (source.gptq(bits=8, group=32, sym=False), 8),
    "awq groups of 32": (source.awq(group=32), 4),
    "awq without zero points": (source.awq(zero_point=False, stored=False), 4),
    "compressed groups of 32": (source.compressed(group=32), 4),
    "compressed 8 bits": (source.compressed(bits=8, group=32), 8),
    "compressed w8a8": (source.compressed_int8(), 4),
    "modelopt awq groups of 32": (source.modelopt_awq(group=32), 4),
    "modelopt fp8": (source.modelopt_float8(), 4),
    "compressed fp8": (source.compressed_float8(dynamic=True), 4),
    "fbgemm": (source.fbgemm(), 4),
    "gguf Q8_0": ("Q8_0", 4),
    "gguf Q4_0": ("Q4_0", 4),
}
WEIGHT_ONLY: dict[str, Any] = {"use_weight_only": True}
BY_ROW: dict[str, dict[str, Any]] = {
    "int8": {**WEIGHT_ONLY, "weight_only_precision": "int8"},
    "int4": {**WEIGHT_ONLY, "weight_only_precision": "int4"},
    "fp8": {"use_fp8_rowwise": True},
}


def of(name: str) -> dict[str, Any]:
    """fbgemm leaves the first and last layers as they are."""
    return {**LLAMA, "num_hidden_layers": 3} if name == "fbgemm" else LLAMA


def made(tmp_path: Path, name: str, config: dict[str, Any] = LLAMA) -> tuple[Path, Arrays]:
    """A source, and the numbers that it stands for."""
    kind, _ = SOURCES[name]
    if not isinstance(kind, str):
        return tmp_path / "model", source.write(tmp_path / "model", config, kind)
    gguf_files.write(tmp_path / "model.gguf", config, source.values(config), kind)
    return tmp_path / "model.gguf", {}


def naive(weight: np.ndarray, size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Signed codes [N, K] and float16 scales [G, N], to the nearest by groups."""
    groups, middle = weight.astype(np.float32).reshape(len(weight), -1, size), 1 << (bits - 1)
    scales = np.maximum(groups.max(axis=2) / np.float32(middle - 1), groups.min(axis=2) / np.float32(-middle)).astype(np.float16)
    wide = np.where(scales == 0, 1, scales).astype(np.float32)
    return np.clip(np.rint(groups / wide[..., None]), -middle, middle - 1).reshape(weight.shape), scales.T


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", SOURCES)
def test_by_groups(name: str, size: int, tmp_path: Path) -> None:
    (model, weights), bits = made(tmp_path, name, of(name)), SOURCES[name][1]
    options: dict[str, Any] = {"requantize": True, "group_size": size, "dtype": "float16", "tp_size": 2, "scheduler": "threads"}
    convert(model_dir=model, output_dir=tmp_path / "out", **options)
    found = quantization(tmp_path / "out")
    assert (found["quant_algo"], found["group_size"], found["has_zero_point"]) == (f"W{bits}A16_GPTQ", size, True)
    verify(tmp_path / "out", model).check()
    said = json.loads((tmp_path / "out/headrace.json").read_text())["notes"]
    (note,) = (
        note for note in said if note.startswith(f"quantized again as W{bits}A16_GPTQ in groups of {size}, by round-to-nearest")
    )
    assert float(re.findall(r"([\d.]+) dB", note)[0]) > (15 if bits == 4 else 38), note
    for rank in range(2 if weights else 0):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for module, wanted in cut(weights, of(name), rank, 2).items():
            codes, scales = naive(wanted, size, bits)
            stored = codes_of(ours[f"{module}.weight"], bits, wanted.shape[1], len(wanted), 80)
            # Of ModelOpt's products of three factors two orders differ by a rounding, which a tie may turn.
            assert np.abs(stored - codes).max() <= (1 if "modelopt awq" in name else 0), module
            np.testing.assert_allclose(ours[f"{module}.weights_scaling_factor"], scales, rtol=2e-3 if "modelopt awq" in name else 0)
            assert not ours[f"{module}.zero"].astype(np.float32).any()


@pytest.mark.parametrize("to", BY_ROW)
@pytest.mark.parametrize(
    "name", ["gptq groups of 32", "awq groups of 32", "compressed 8 bits", "modelopt awq groups of 32", "modelopt fp8"]
)
def test_by_rows(name: str, to: str, tmp_path: Path) -> None:
    """The same as to dequantize and to quantize the numbers; the plan says that it is again."""
    model, _ = made(tmp_path, name)
    options: dict[str, Any] = {"model_dir": model, "tp_size": 2, "scheduler": "threads", **BY_ROW[to]}
    convert(output_dir=tmp_path / "again", requantize=True, **options)
    convert(output_dir=tmp_path / "numbers", dequantize=True, **options)
    assert contents(tmp_path / "again") == contents(tmp_path / "numbers")
    verify(tmp_path / "again", model).check()
    algorithm = quantization(tmp_path / "again")["quant_algo"]
    notes = json.loads((tmp_path / "again/headrace.json").read_text())["notes"]
    assert f"quantized again as {algorithm}, by round-to-nearest" in notes


@pytest.mark.parametrize("to", BY_ROW)
def test_a_gguf_file_by_rows(to: str, tmp_path: Path) -> None:
    model, _ = made(tmp_path, "gguf Q8_0")
    options: dict[str, Any] = {"model_dir": model, "scheduler": "threads", **BY_ROW[to]}
    convert(output_dir=tmp_path / "again", requantize=True, **options)
    convert(output_dir=tmp_path / "plain", **options)
    assert contents(tmp_path / "again") == contents(tmp_path / "plain")


@pytest.mark.parametrize("name", ["gptq", "modelopt fp8"])
def test_eight_bits_where_they_are_asked_for(name: str, tmp_path: Path) -> None:
    model, weights = made(tmp_path, name)
    options: dict[str, Any] = {**WEIGHT_ONLY, "weight_only_precision": "int8_gptq", "group_size": 128}
    convert(model_dir=model, output_dir=tmp_path / "out", requantize=True, scheduler="threads", **options)
    assert quantization(tmp_path / "out")["quant_algo"] == "W8A16_GPTQ"
    verify(tmp_path / "out", model).check()
    ours = read(tmp_path / "out/rank0.safetensors")
    for module, wanted in cut(weights, LLAMA, 0, 1).items():
        stored = codes_of(ours[f"{module}.weight"], 8, wanted.shape[1], len(wanted), 80)
        scales = np.repeat(ours[f"{module}.weights_scaling_factor"].T, 128, axis=1).astype(np.float32)
        assert signal_to_noise(stored * scales, wanted) > 40


MIXTRAL = {**source.MIXTRAL, "num_hidden_layers": 1}


@pytest.mark.parametrize("name", ["gptq groups of 32", "modelopt fp8", "gguf Q8_0"])
def test_experts_by_groups(name: str, tmp_path: Path) -> None:
    """One by one, and (of GGUF) stacked."""
    model, _ = made(tmp_path, name, MIXTRAL)
    options: dict[str, Any] = {"tp_size": 2, "moe_tp_size": 1, "moe_ep_size": 2, "sm": 90}
    convert(model_dir=model, output_dir=tmp_path / "out", requantize=True, group_size=128, scheduler="threads", **options)
    result = verify(tmp_path / "out", model)
    result.check()
    assert result.round_trip is not None
    worst = min(row["snr_db"] for row in result.round_trip["tensors"] if row["kind"] in ("mlp.fc", "mlp.proj"))
    assert 15 < worst < 30


def test_a_stack_of_experts_is_its_experts(tmp_path: Path) -> None:
    """Each expert of GGUF's stack is quantized as a matrix of its own numbers, which are cast first."""
    held = gguf_files.write(tmp_path / "stack.gguf", MIXTRAL, source.values(MIXTRAL), "Q8_0")
    options: dict[str, Any] = {"requantize": True, "group_size": 64, "dtype": "float16", "scheduler": "threads"}
    convert(model_dir=tmp_path / "stack.gguf", output_dir=tmp_path / "out", **options)
    ours = read(tmp_path / "out/rank0.safetensors")
    for expert in range(4):
        for ours_, theirs in (("fc", ("ffn_up_exps", "ffn_gate_exps")), ("proj", ("ffn_down_exps",))):
            wanted = np.concatenate([held[f"blk.0.{name}.weight"][expert] for name in theirs]).astype(np.float16)
            codes, scales = naive(wanted, 64, 4)
            stored = ours[f"transformer.layers.0.mlp.{ours_}.weight"][expert]
            assert np.array_equal(codes_of(stored, 4, wanted.shape[1], len(wanted), 80), codes)
            assert np.array_equal(ours[f"transformer.layers.0.mlp.{ours_}.weights_scaling_factor"][expert], scales)


def test_each_target_of_a_job_file_by_itself(tmp_path: Path) -> None:
    model, _ = made(tmp_path, "gptq")
    tables = [{"output_dir": tmp_path / "again", "requantize": True, "group_size": 128}, {"output_dir": tmp_path / "kept"}]
    convert(model_dir=model, target=tables, scheduler="threads")
    assert [quantization(tmp_path / name)["group_size"] for name in ("again", "kept")] == [128, 64]
    assert any("quantized again" in note for note in json.loads((tmp_path / "again/headrace.json").read_text())["notes"])


def test_numbers_are_not_quantized_again(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "model", LLAMA, source.values(LLAMA))
    with pytest.raises(BadInput, match="--requantize: found a source that is not quantized"):
        convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", requantize=True, scheduler="threads")


def test_what_is_not_finite_is_refused_by_its_name(tmp_path: Path) -> None:
    """The error of the first matrix is measured while planning, which says whose values these are."""
    model, _ = made(tmp_path, "gptq")
    stored = load_file(model / "model.safetensors")
    for name in [name for name in stored if name.endswith(".scales")]:
        stored[name][0, 0] = np.inf
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"model\.layers\.0\.\S+: found a value that is not finite"):
        plan(model_dir=model, output_dir=tmp_path / "out", requantize=True)
