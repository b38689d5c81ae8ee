"""unpack: any part of a packed tensor is that part of what the `gguf` package makes of the whole; dense modules are left alone.

The formats of their own files have tests of their own, in the folder beside this.
"""

from __future__ import annotations

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tensor.names import TensorName, split_names
from pipeline.tensor.placement import slices
from pipeline.tensor.tensors import AXES
from stages.quantization.sources.gguf import dequantize
from stages.read import read
from stages.unpack import check, format_of, formats, unpack, zero_biases
from tests.support.lazy import block, held, texts, values
from tests.support.packed_tensors import awq, compressed, gptq, modelopt, opened, random_codes, random_scales
from tests.support.strategies import regions

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
    result = texts(unpack(opened({TensorName("m", f"gguf_{kind}"): array}), {}))
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
    result = unpack(read(held({TensorName("m", "gguf_Q4_1"): array}), block_bytes, 4), {})[TensorName("m", "weight")]
    assert values(result).tobytes() == unpacked(array, "Q4_1").tobytes()


def test_dense_modules_are_left_alone() -> None:
    tensors = opened(split_names({"a.weight": np.ones((2, 2)), "a.bias": np.ones(2), "b.weight": np.ones(3)}))
    result = unpack(tensors, {})
    assert result.keys() == tensors.keys()
    assert all(result[name] is tensors[name] for name in tensors)


def test_the_bias_of_a_packed_module_stays() -> None:
    bias = TensorName("a", "bias")
    tensors = opened({TensorName("a", "gguf_Q8_0"): packed("Q8_0", (2, 1)), bias: np.ones(2)})
    result = unpack(tensors, {})
    assert result.keys() == {TensorName("a", "weight"), bias}
    assert result[bias] is tensors[bias]


def test_a_format_is_known_by_its_parameters() -> None:
    weight, bias = np.ones((2, 2), np.float16), np.ones(2, np.float16)
    assert format_of(held({"weight": weight, "bias": bias})) is None
    found = format_of(held({"gguf_Q4_0": packed("Q4_0", (2, 1)), "bias": bias}))
    assert found is not None
    assert found.name == "gguf"
    assert [each.name for each in formats()] == [
        "awq",
        "bitsandbytes",
        "compressed-tensors",
        "eetq",
        "float8-block",
        "float8",
        "gguf",
        "gptq",
        "hqq",
        "modelopt-awq",
        "mxfp4",
        "nvfp4",
    ]


SIZES = (16, 8, 2)  # out-features, in-features, groups
CODES, STORED, SCALES = random_codes(SIZES[:2], 4, 0), random_codes((2, 16), 4, 1), random_scales((2, 16), 2)
MODULES = {
    "awq": awq(CODES, STORED, SCALES),
    "compressed-tensors": compressed(CODES, STORED, SCALES, 4),
    "float8": {"weight": CODES.astype(ml_dtypes.float8_e4m3fn), "weight_scale": np.ones((16, 1), np.float32)},
    "gguf": {"gguf_Q8_0": packed("Q8_0", (2, 1))},
    "gptq": gptq(CODES, STORED, SCALES, 4),
    "modelopt-awq": modelopt(CODES, SCALES),
}


def all_modules() -> dict[TensorName, np.ndarray]:
    """A source with a module of each format, and a dense one."""
    tensors = {TensorName(f"m.{name}", key): array for name, module in MODULES.items() for key, array in module.items()}
    return {**tensors, TensorName("m.dense", "weight"): np.ones((2, 2), np.float16)}


def test_every_module_is_unpacked_by_its_own_format() -> None:
    result = texts(unpack(opened(all_modules()), {}))
    grouped = [f"m.{name}.{key}" for name in MODULES if name not in ("float8", "gguf") for key in ("codes4", "scales", "offsets")]
    assert result.keys() == {*grouped, "m.float8.fp8", "m.float8.channel_scale", "m.gguf.weight", "m.dense.weight"}


@pytest.mark.parametrize("name", MODULES)
def test_only_canonical_parameters_come_out_with_their_axes(name: str) -> None:
    tensors = {TensorName("m", key): value for key, value in MODULES[name].items()}
    for (module, parameter), array in unpack(opened(tensors), {}).items():
        assert module == "m"
        assert array.ndim == len(AXES[parameter])


def test_planning_hears_of_the_format_the_order_and_what_is_wrong() -> None:
    sources = all_modules()
    sources[TensorName("m.gptq", "g_idx")] = np.array([0, 1] * 4, dtype=np.int32)
    examined = check(held(sources), {})
    found, ordered, problems = examined.formats, examined.ordered, examined.problems
    assert found == {f"m.{name}": name for name in MODULES}
    assert ordered == ["m.gptq"]
    assert problems == []
    examined = check(held(sources), {"group_size": 8})
    found, ordered, problems = examined.formats, examined.ordered, examined.problems
    assert found == {f"m.{name}": name for name in MODULES}
    assert ordered == [], "what is wrong already is not asked further"
    assert {problem.subject for problem in problems} == {"m.awq.scales", "m.gptq.scales", "m.modelopt-awq.weight_scale"}


def test_biases_of_zeros_are_found() -> None:
    values = {"a.bias": np.zeros(3), "b.bias": np.array([0.0, -0.0, 1e-7]), "c.bias": np.zeros(3), "d.weight": np.ones(2)}
    found = zero_biases(held(split_names(values)), {"a": "gptq", "b": "gptq", "d": "gptq"})
    assert found == [TensorName("a", "bias")]
