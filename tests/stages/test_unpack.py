"""unpack: any part of a packed tensor is that part of what the `gguf` package makes of the whole; dense modules are left alone."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.placement import slices
from stages.quantization.gguf import dequantize
from stages.read import read
from stages.unpack import format_of, unpack
from tests.lazy import block, held, values
from tests.strategies import regions

# Random bytes make scales that are no numbers; what becomes of those is compared all the same.
pytestmark = [pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning") for what in ("invalid value", "overflow")]

QUANTIZABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# Types that the package reads but does not write: any bytes are a block of theirs.
READ_ONLY = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


def packed(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A packed tensor of `shape`, whose last axis counts blocks."""
    random, quantization = np.random.default_rng(seed), gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[quantization]
    if kind in QUANTIZABLE:
        return gguf.quants.quantize(random.standard_normal((*shape[:-1], shape[-1] * elements), dtype=np.float32), quantization)
    return random.integers(0, 256, (*shape[:-1], shape[-1] * size), dtype=np.uint8)


def unpacked(array: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quants.dequantize(array, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", QUANTIZABLE + READ_ONLY)
@pytest.mark.parametrize("shape", [(1, 1), (6, 3), (2, 4, 2)])
def test_the_whole_is_that_of_gguf(kind: str, shape: tuple[int, ...]) -> None:
    array = packed(kind, shape)
    result = unpack(read(held({f"m.gguf_{kind}": array}), 1 << 20, 1))
    expected = unpacked(array, kind)
    assert result.keys() == {"m.weight"}
    assert result["m.weight"].shape == expected.shape
    assert result["m.weight"].dtype == np.float32
    assert values(result["m.weight"]).tobytes() == expected.tobytes()


@given(st.data(), st.sampled_from(QUANTIZABLE + READ_ONLY), st.sampled_from([(5, 2), (3, 4, 2)]))
def test_any_part_is_that_part_of_the_whole(data: st.DataObject, kind: str, shape: tuple[int, ...]) -> None:
    array = packed(kind, shape)
    expected = unpacked(array, kind)
    region = data.draw(regions(expected.shape))
    part = dequantize(block(array), kind, expected.shape[-1]).read(region)
    assert part.tobytes() == np.ascontiguousarray(expected[slices(region)]).tobytes()


@pytest.mark.parametrize("block_bytes", [1, 200, 10**6])
@pytest.mark.parametrize("shape", [(40, 2), (3, 20, 2)])
def test_chunks_of_any_size_give_the_same_values(block_bytes: int, shape: tuple[int, ...]) -> None:
    array = packed("Q4_1", shape)
    result = unpack(read(held({"m.gguf_Q4_1": array}), block_bytes, 4))["m.weight"]
    assert values(result).tobytes() == unpacked(array, "Q4_1").tobytes()


def test_dense_modules_are_left_alone() -> None:
    tensors = read(held({"a.weight": np.ones((2, 2)), "a.bias": np.ones(2), "b.weight": np.ones(3)}), 1 << 20, 1)
    result = unpack(tensors)
    assert result.keys() == tensors.keys()
    assert all(result[name] is tensors[name] for name in tensors)


def test_the_bias_of_a_packed_module_stays() -> None:
    tensors = read(held({"a.gguf_Q8_0": packed("Q8_0", (2, 1)), "a.bias": np.ones(2)}), 1 << 20, 1)
    result = unpack(tensors)
    assert result.keys() == {"a.weight", "a.bias"}
    assert result["a.bias"] is tensors["a.bias"]


def test_a_format_is_known_by_its_parameters() -> None:
    assert format_of(frozenset({"weight", "bias"})) is None
    assert format_of(frozenset({"gguf_Q4_0", "bias"})) is not None
