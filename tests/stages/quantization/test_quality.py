"""What quantizing costs, in decibels: each quantizer on weights like those of models, against the table of docs/quantization.md."""

from __future__ import annotations

import math
import re
from functools import cache

import gguf
import ml_dtypes
import numpy as np
import pytest

from pipeline.model.quantization import AWQ, FP8, FP8_ROWWISE, GROUPWISE, SQ_OF_CODES, WEIGHT_ONLY
from pipeline.planning.job import Job
from stages.quantization.kernels.layout import KernelLayout
from stages.quantization.kernels.weight_only import quantize, weight_only_scales
from stages.quantization.numbers import dequantize, requantize
from stages.quantization.targets.fp8 import quantize_channels
from stages.quantization.targets.groupwise import pack_gptq
from stages.quantization.targets.weight_only import pack
from tests.support.lazy import values
from tests.support.packed_tensors import opened
from tests.support.places import DOCS
from tests.support.places import SMOLLM2 as MODEL

BF16 = np.dtype(ml_dtypes.bfloat16)
DOCUMENT = (DOCS / "quantization.md").read_text()
SHAPES = ((256, 512), (512, 256), (128, 1024))
LAYERS = (0, 15, 29)
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def table() -> dict[str, dict[str, float]]:
    """The document's bounds: quantized as -> source -> decibels."""
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in DOCUMENT.splitlines() if line.startswith("|")]
    first = next(i for i, row in enumerate(rows) if row[0] == "quantized as")
    bounds = {}
    for row in rows[first + 2 :]:
        if len(row) != len(rows[first]):
            break
        bounds[row[0]] = dict(zip(rows[first][1:], map(float, row[1:]), strict=True))
    return bounds


@cache
def weights(source: str) -> tuple[np.ndarray, ...]:
    """Matrices [out, in] of a source, as bfloat16."""
    if source == "SmolLM2-135M":
        wanted = [f"blk.{layer}.{matrix}.weight" for layer in LAYERS for matrix in MATRICES]
        found = {
            tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
            for tensor in gguf.GGUFReader(MODEL).tensors
            if tensor.name in wanted
        }
        return tuple(found[name].astype(BF16) for name in wanted)
    random = np.random.default_rng(0)
    drawn = [random.standard_normal(shape) if source == "normal" else random.standard_t(5, shape) for shape in SHAPES]
    return tuple((0.02 * matrix).astype(BF16) for matrix in drawn)


def sources() -> list[str]:
    """The sources that are here: a checkout without the demonstration's model has only the random ones."""
    return ["normal", "Student-t", *(["SmolLM2-135M"] if MODEL.exists() else [])]


def restored(weight: np.ndarray, kind: str) -> np.ndarray | None:
    """What a rank's codes and scales of a weight stand for; None where its groups do not fit."""
    array = opened({"w": weight})["w"]
    if kind.startswith("FP8"):
        result = quantize_channels("w", array, 1, 1200.0)
        return values(result["weight"][0]).astype(np.float32) * values(result["per_channel_scale"][0])
    if kind.startswith("int"):
        bits = int(kind[3])
        scales = values(pack("w", array, KernelLayout(bits, 1), 1, "bfloat16", 64)["per_channel_scale"][0]).astype(np.float32)
        codes = quantize(weight, bits, weight_only_scales(weight, bits, 1, "w"))
        return (codes.astype(np.float32) - np.float32(1 << (bits - 1))) * scales
    found = re.search(r"groups of (\d+)", kind)
    assert found, kind
    size = int(found[1])
    if weight.shape[1] % size:
        return None
    codes = requantize(opened({"w": weight.astype(np.float32)})["w"], size)
    factors = values(pack_gptq(codes, KernelLayout(4, 1), BF16, "bfloat16", 64)["weights_scaling_factor"][0])
    # The codes as they are, with the scales that a rank has.
    named = opened({"codes4": values(codes["codes4"]), "scales": factors, "offsets": values(codes["offsets"])})
    return values(dequantize(named))


def decibels(weight: np.ndarray, kind: str) -> float:
    found = restored(weight, kind)
    if found is None:
        return math.inf
    exact = weight.astype(np.float64)
    return float(10 * np.log10(np.sum(exact**2) / np.sum((found - exact) ** 2)))


def test_the_document_has_the_table() -> None:
    assert len(table()) == 5
    assert all(list(row) == ["normal", "Student-t", "SmolLM2-135M"] for row in table().values())


@pytest.mark.nightly
@pytest.mark.parametrize(("kind", "source"), [(kind, source) for kind in table() for source in sources()])
def test_the_worst_matrix_is_as_good_as_the_table_says(kind: str, source: str) -> None:
    worst, stated = min(decibels(weight, kind) for weight in weights(source)), table()[kind][source]
    assert stated <= worst < stated + 0.1 + 1e-9, f"{worst:.3f}"


def test_the_order_is_what_the_formats_promise() -> None:
    """More bits are better, and smaller groups."""
    for source in sources():
        int8, float8, small, large, int4 = (
            min(decibels(weight, kind) for weight in weights(source) if weight.shape[1] % 128 == 0) for kind in table()
        )
        assert int8 > float8 > small > large > int4


def test_every_option_and_algorithm_that_the_document_names_is_one() -> None:
    options = set(re.findall(r"--(\w+)", DOCUMENT))
    assert {"sm", "dequantize", "requantize", "use_weight_only"} <= options <= set(Job.model_fields)
    algorithms = set(re.findall(r"`((?:W\d+A\d+|FP8)\w*)`", DOCUMENT))
    assert algorithms == {*WEIGHT_ONLY, *GROUPWISE, AWQ, FP8, FP8_ROWWISE, SQ_OF_CODES}
