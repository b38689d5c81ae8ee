"""Numbers again: dequantizing as the Hugging Face libraries do, and the 4-bit quantizer by groups that takes numbers back."""

from __future__ import annotations

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadInput
from pipeline.tensor.placement import slices
from stages.quantization.numbers import dequantize, requantize
from stages.quantization.sources import awq as awq_format
from stages.quantization.sources import gptq as gptq_format
from tests.support.examples import examples
from tests.support.lazy import values
from tests.support.packed_tensors import CHUNKS, awq, gptq, opened, part, random_codes, random_scales
from tests.support.strategies import regions


def as_libraries_do(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, index: np.ndarray, bits: int) -> np.ndarray:
    """GPTQ's linear module in torch: shifts of whole words by a vector, masks, and the group of each row from `g_idx`."""
    shifts, mask = torch.arange(0, 32, bits, dtype=torch.int32), (1 << bits) - 1
    words = torch.from_numpy(qweight)
    codes = torch.bitwise_and(torch.bitwise_right_shift(words[:, None, :], shifts[None, :, None]), mask).reshape(-1, words.shape[1])
    words = torch.from_numpy(qzeros)
    zeros = torch.bitwise_and(torch.bitwise_right_shift(words[:, :, None], shifts[None, None, :]), mask) + 1
    zeros, order = zeros.reshape(len(words), -1), torch.from_numpy(index).long()
    weight = torch.from_numpy(scales).float()[order] * (codes - zeros[order])
    return weight.T.contiguous().numpy()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_gptq_as_its_library_has_it(bits: int, ordered: bool, chunk: int) -> None:
    codes, stored, scales = random_codes((40, 64), bits, 0), random_codes((4, 40), bits, 1), random_scales((4, 40), 2)
    index = (np.arange(64) // 16).astype(np.int32)
    if ordered:
        index = np.random.default_rng(3).permutation(index)
    source = {**gptq(codes, stored, scales, bits), "g_idx": index}
    ours = values(dequantize(gptq_format.FORMAT.unpack(opened(source, chunk), {})))
    assert np.array_equal(ours, as_libraries_do(source["qweight"], source["qzeros"], scales, index, bits))


def test_awq_as_its_library_has_it() -> None:
    codes, zeros, scales = random_codes((32, 48), 4, 0), random_codes((3, 32), 4, 1), random_scales((3, 32), 2)
    source = awq(codes, zeros, scales)

    def columns(words: np.ndarray) -> torch.Tensor:
        nibbles = torch.bitwise_and(torch.bitwise_right_shift(torch.from_numpy(words)[:, :, None], torch.arange(0, 32, 4)), 15)
        # The order of the nibbles undone: column c of eight lies in nibble (0 4 1 5 2 6 3 7)[c].
        return nibbles[:, :, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(len(words), -1)

    points = columns(source["qzeros"]).repeat_interleave(16, dim=0)
    steps = torch.from_numpy(scales).float().repeat_interleave(16, dim=0)
    expected = ((columns(source["qweight"]) - points) * steps).T.contiguous().numpy()
    assert np.array_equal(values(dequantize(awq_format.FORMAT.unpack(opened(source), {}))), expected)


def weights(shape: tuple[int, int], seed: int, spread: float = 0.02) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(4, shape) * spread).astype(np.float32)


def again(weight: np.ndarray, size: int, chunk: int = 1 << 20, name: str = "w") -> dict[str, Any]:
    return requantize(opened({"w": weight}, chunk)["w"], size, name)


def naive_groups(weight: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Signed codes [N, K] and float16 scales [G, N], one group at a time."""
    out, features = weight.shape
    codes, scales = np.empty((out, features), dtype=int), np.empty((features // size, out), dtype=np.float16)
    for n in range(out):
        for g in range(features // size):
            group = weight[n, g * size : (g + 1) * size]
            scale = np.float16(max(np.float32(max(group)) / np.float32(7), np.float32(-min(group)) / np.float32(8)))
            scales[g, n] = scale
            for k, value in enumerate(group):
                quotient = 0.0 if scale == 0 else float(np.float32(value) / np.float32(scale))
                codes[n, g * size + k] = min(max(round(quotient), -8), 7)
    return codes, scales


@examples(30)
@given(data=st.data(), chunk=st.sampled_from(CHUNKS), size=st.sampled_from([2, 4, 16]), seed=st.integers(0, 99))
def test_any_part_of_what_is_quantized_again(data: st.DataObject, chunk: int, size: int, seed: int) -> None:
    weight = weights((data.draw(st.integers(1, 7)), size * data.draw(st.integers(1, 4))), seed)
    codes, scales = naive_groups(weight, size)
    result = again(weight, size, chunk)
    unsigned = codes + 8
    wanted = {"codes4": unsigned[:, 0::2] + 16 * unsigned[:, 1::2], "scales": scales, "offsets": np.zeros(scales.shape)}
    assert result.keys() == wanted.keys()
    for name, expected in wanted.items():
        region = data.draw(regions(expected.shape))
        assert result[name].shape == expected.shape
        assert np.array_equal(part(result[name], region), expected[slices(region)]), name


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("spread", [1e-3, 0.02, 10.0])
def test_the_error_is_half_a_step(size: int, spread: float) -> None:
    weight = weights((48, 256), 0, spread)
    result = again(weight, size)
    steps = values(result["scales"]).astype(np.float32).T.repeat(size, axis=1)
    error = np.abs(values(dequantize(result)) - weight) / steps
    # Steps are rounded to float16, by one part in 2048, so that the largest value may lie a little outside.
    assert error.max() <= 0.5 + 8 / 2048


def test_what_four_bits_can_say_comes_back_as_it_was() -> None:
    """Quantizing again what was quantized so loses nothing."""
    first = again(weights((16, 64), 1), 16)
    numbers = values(dequantize(first))
    second = again(numbers, 16)
    for name, array in first.items():
        assert values(second[name]).tobytes() == values(array).tobytes(), name
    assert values(dequantize(second)).tobytes() == numbers.tobytes()


def test_groups_of_zeros_and_of_one_sign() -> None:
    weight = np.zeros((3, 8), dtype=np.float32)
    weight[1], weight[2] = np.arange(8), -np.arange(8)
    result = again(weight, 8)
    assert values(result["scales"])[0].tolist() == [0.0, 1.0, 0.875]
    numbers = values(dequantize(result))
    assert numbers[:2].tolist() == [[0.0] * 8, list(map(float, range(8)))]
    assert numbers[2].min() == -7.0


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("out", [1, 3, 4, 8, 17, 40])
def test_the_scale_of_zeros_is_one_zero(zero: float, bits: int, out: int) -> None:
    """+0, on every processor and in pieces of any size."""
    result = requantize(opened({"w": np.full((out, 48), zero, np.float32)})["w"], 16, "w", bits)
    scales = values(result["scales"])
    assert not scales.any()
    assert not np.signbit(scales).any()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e6, -1e6])
@pytest.mark.parametrize("what", ["codes4", "scales"])
def test_a_value_that_has_no_step_is_refused_by_name(wrong: float, what: str) -> None:
    weight = weights((8, 16), 0)
    weight[5, 9] = wrong
    result = again(weight, 8, name="model.layers.0.mlp.up_proj.qweight")
    with pytest.raises(BadInput, match=r"model\.layers\.0\.mlp\.up_proj\.qweight: found a value that is not finite"):
        values(result[what])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_scales_of_any_type_are_numbers_first(dtype: type) -> None:
    """The product is that of float32, whatever the type that the scales are stored in."""
    codes, scales = random_codes((8, 16), 4, 0), random_scales((2, 8), 1, dtype)
    ours = values(dequantize(gptq_format.FORMAT.unpack(opened(gptq(codes, np.full((2, 8), 7), scales, 4)), {})))
    expected = (codes - 8).astype(np.float32) * scales.astype(np.float32).T.repeat(8, axis=1)
    assert ours.dtype == np.float32
    assert ours.tobytes() == expected.tobytes()


@pytest.mark.parametrize("scale", [np.inf, np.nan])
def test_products_that_are_no_number_are_refused_and_no_warning_beside(scale: float) -> None:
    codes = {"codes4": np.full((8, 32), 0x88, np.uint8), "scales": np.full((1, 8), scale, np.float16)}
    weight = dequantize(opened({**codes, "offsets": np.zeros((1, 8), np.int16)}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(values(weight)).all()  # 0 times what is not finite
        with pytest.raises(BadInput, match=r"w: found a value that is not finite"):
            values(requantize(weight, 64, "w")["codes4"])
