"""Rank files as numbers: what NVIDIA's own files stand for, read by the closed forms one element at a time beside."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tensor.checkpoint import Checkpoint, FileTensor
from stages.read.ranks import open_checkpoint
from stages.verify.forward.tensors import to_torch
from stages.verify.kernel_orders import unarrange
from stages.verify.matrices import Matrix, matrix
from stages.verify.values import read
from tests.support.examples import examples
from tests.support.kernel_oracle import A, P, T, arrange
from tests.support.kernel_oracle import unarrange as oracle
from tests.support.places import DATA

QUANTIZED = DATA / "quantized"
CASES = {case["case"]: case["arguments"] for case in json.loads((QUANTIZED / "cases.json").read_text())}
LAYER = "transformer.layers.0."


def opened(case: str) -> Checkpoint:
    checkpoint = open_checkpoint(QUANTIZED / "expected" / case)
    # NVIDIA's files do not say which GPU they are for.
    return replace(checkpoint, provenance={"options": {"sm": 90}}) if "--sm 90" in CASES[case] else checkpoint


def stored(tensor: FileTensor) -> bytes:
    return read(tensor).tobytes()


@pytest.mark.parametrize("case", [case for case in CASES if "fp8" not in case])
@pytest.mark.parametrize("module", ["attention.qkv", "attention.dense", "mlp.fc", "mlp.proj"])
def test_codes_are_those_of_the_closed_forms(case: str, module: str) -> None:
    checkpoint = opened(case)
    held = matrix(checkpoint, 0, LAYER + module)
    expected = oracle(stored(held.tensors["weight"]), held.shape, held.bits, P if checkpoint.sm == 90 else A)
    np.testing.assert_array_equal(held.codes(0, held.shape[0]), expected)


@pytest.mark.parametrize("case", CASES)
def test_any_rows_are_rows_of_the_whole(case: str) -> None:
    held = matrix(opened(case), 0, f"{LAYER}mlp.proj")
    whole = held.rows(0, held.shape[0])
    assert whole.shape == held.shape
    assert whole.dtype == np.float32
    for start, stop in ((0, 1), (3, 10), (63, 65), (held.shape[0] - 5, held.shape[0])):
        assert np.array_equal(held.rows(start, stop), whole[start:stop])


@examples(30)
@given(
    bits=st.sampled_from([4, 8]),
    groups=st.integers(1, 3),
    tiles=st.integers(1, 3),
    order=st.sampled_from([A, P, T]),
    seed=st.integers(0, 99),
)
def test_unarrange_is_the_inverse_of_the_order(bits: int, groups: int, tiles: int, order: str, seed: int) -> None:
    columns = 16 // bits if order == A else 1
    shape = (groups * columns, tiles * 64)
    codes = np.random.default_rng(seed).integers(-(1 << (bits - 1)), 1 << (bits - 1), shape)
    data = np.frombuffer(arrange(codes, bits, order), dtype=np.uint8).reshape(groups, -1)
    assert unarrange(data, shape[1], bits, order).tolist() == codes.tolist()


def test_modelopts_pairs_are_signed_and_scaled_by_group(tmp_path: Path) -> None:
    """Byte [i, k]: row 2 i in the low half, row 2 i + 1 in the high one; scales [out, groups]."""
    codes = torch.tensor([[-8, 7, 0, 1], [3, -1, -2, 5], [1, 2, 3, 4], [-4, -3, -2, -1]], dtype=torch.int8)
    packed = ((codes[0::2] & 15) | (codes[1::2] << 4)).to(torch.int8)
    scales = torch.tensor([[1.0, 2.0], [0.5, 0.25], [3.0, 1.0], [1.0, 4.0]])
    tensors = {"weight": packed, "weights_scaling_factor": scales, "prequant_scaling_factor": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    held = made(tmp_path, {f"m.{name}": value for name, value in tensors.items()}, "W4A16_AWQ")
    assert held.kind == "awq"
    assert np.array_equal(held.codes(0, 4), codes.numpy())
    assert np.array_equal(held.rows(1, 4), (codes.float() * scales.repeat_interleave(2, 1))[1:].numpy())
    assert held.prequant is not None
    assert held.prequant.tolist() == [1, 2, 3, 4]


def test_modelopts_pairs_of_one_expert(tmp_path: Path) -> None:
    packed = torch.arange(2 * 2 * 4, dtype=torch.int8).reshape(2, 2, 4)
    scales, smooth = torch.arange(1.0, 17.0).reshape(2, 4, 2), torch.arange(8.0).reshape(2, 4)
    stack = {"weight": packed, "weights_scaling_factor": scales, "prequant_scaling_factor": smooth}
    alone = {name: values[1].contiguous() for name, values in stack.items()}
    (tmp_path / "alone").mkdir()
    one = made(tmp_path / "alone", {f"m.{name}": value for name, value in alone.items()}, "W4A16_AWQ")
    held = made(tmp_path, {f"m.{name}": value for name, value in stack.items()}, "W4A16_AWQ", expert=1)
    assert np.array_equal(held.rows(0, 4), one.rows(0, 4))
    assert held.prequant is not None
    assert held.prequant.tolist() == [4, 5, 6, 7]


def test_a_stack_gives_one_experts_matrix(tmp_path: Path) -> None:
    weight = torch.arange(24.0).reshape(2, 3, 4).bfloat16()
    held = made(tmp_path, {"m.weight": weight}, None, expert=1)
    assert held.shape == (3, 4)
    assert np.array_equal(held.rows(1, 3), weight[1, 1:].float().numpy())


def made(directory: Path, tensors: dict[str, torch.Tensor], algorithm: str | None, expert: int | None = None) -> Matrix:
    from safetensors.torch import save_file

    save_file(tensors, directory / "rank0.safetensors")
    (directory / "config.json").write_text(json.dumps({"mapping": {"world_size": 1}, "quantization": {"quant_algo": algorithm}}))
    return matrix(open_checkpoint(directory), 0, "m", expert)


def test_a_module_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=r"m\.weight"):
        made(tmp_path, {"n.weight": torch.zeros(1, 1)}, None)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8])
def test_arrays_keep_their_bits(kind: torch.dtype) -> None:
    import ml_dtypes

    values = torch.arange(-8, 8, dtype=torch.float32).to(kind)
    names = {torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn}
    bits = values.view(torch.uint8).numpy().reshape(16, -1)
    array = bits.view(np.dtype(names[kind])) if kind in names else values.numpy()
    assert to_torch(array.reshape(4, 4)).equal(values.reshape(4, 4))
