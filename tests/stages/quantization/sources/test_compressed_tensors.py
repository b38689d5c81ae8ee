"""compressed-tensors: packed weights and int8 ones are unpacked, any part of them, with and without zero points; refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadInput
from pipeline.tensor.placement import slices
from stages.quantization.numbers import dequantize
from stages.quantization.sources.compressed_tensors import FORMAT
from stages.unpack import format_of
from tests.support.examples import examples
from tests.support.lazy import held, values
from tests.support.packed_tensors import (
    CHUNKS,
    compressed,
    expected_codes,
    naive_weight,
    opened,
    part,
    random_codes,
    random_scales,
    shapes,
)
from tests.support.strategies import regions


def bits_of(bits: int) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"weights": {"num_bits": bits}}}}


def module(n: int, k: int, groups: int, bits: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, K], zero points and scales [G, N]."""
    return random_codes((n, k), bits, seed), random_codes((groups, n), bits, seed + 1), random_scales((groups, n), seed)


def int8_module(n: int, k: int, seed: int = 0) -> dict[str, np.ndarray]:
    weight = (random_codes((n, k), 8, seed) - 128).astype(np.int8)
    return {"weight": weight, "weight_scale": random_scales((n, 1), seed, np.float32)}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@examples(30)
@given(data=st.data(), chunk=st.sampled_from(CHUNKS), seed=st.integers(0, 99))
def test_any_part_of_the_codes_scales_and_zero_points(
    bits: int, symmetric: bool, data: st.DataObject, chunk: int, seed: int
) -> None:
    packed = 32 // bits
    n, k, groups = data.draw(shapes(1 if symmetric else packed, packed))
    codes, zeros, scales = module(n, k, groups, bits, seed)
    source = compressed(codes, None if symmetric else zeros, scales, bits)
    result = FORMAT.unpack(opened(source, chunk), bits_of(bits))
    assert result.keys() == {f"codes{bits}", "scales", "offsets"}
    middle = 1 << (bits - 1)
    offsets = np.zeros_like(zeros) if symmetric else middle - zeros
    wanted = {f"codes{bits}": expected_codes(codes, bits), "scales": scales, "offsets": offsets}
    for name, expected in wanted.items():
        region = data.draw(regions(expected.shape))
        assert result[name].shape == expected.shape
        assert np.array_equal(part(result[name], region), expected[slices(region)]), name


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_in_every_place_of_a_word(bits: int) -> None:
    count, packed = 1 << bits, 32 // bits
    codes = np.stack([np.roll(np.arange(count), n) for n in range(packed)])
    result = FORMAT.unpack(opened(compressed(codes, None, np.ones((1, packed), np.float16), bits)), bits_of(bits))
    assert np.array_equal(values(result[f"codes{bits}"]), expected_codes(codes, bits))


def test_rows_that_do_not_fill_a_word_of_zero_points() -> None:
    codes, zeros, scales = module(11, 16, 2)
    padded = np.concatenate([zeros, np.zeros((2, 5), dtype=zeros.dtype)], axis=1)
    source = {**compressed(codes, None, scales, 4), "weight_zero_point": compressed(codes, padded, scales, 4)["weight_zero_point"]}
    assert FORMAT.check("a.b", held(source), bits_of(4)) == []
    assert np.array_equal(values(FORMAT.unpack(opened(source), bits_of(4))["offsets"]), 8 - zeros)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_weight_is_code_less_zero_point_times_scale(bits: int, symmetric: bool) -> None:
    codes, zeros, scales = module(16, 24, 3, bits)
    arrays = opened({**compressed(codes, None if symmetric else zeros, scales, bits), "bias": np.arange(16, dtype=np.float16)}, 40)
    result = FORMAT.unpack(arrays, bits_of(bits))
    assert result["bias"] is arrays["bias"]
    points = np.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros
    assert np.array_equal(values(dequantize(result)), naive_weight(codes, points, scales))


@examples(20)
@given(data=st.data(), chunk=st.sampled_from(CHUNKS), n=st.integers(1, 7), k=st.integers(1, 9))
def test_any_part_of_an_int8_weight(data: st.DataObject, chunk: int, n: int, k: int) -> None:
    source = int8_module(n, k)
    result = FORMAT.unpack(opened(source, chunk), {})
    assert result.keys() == {"codes8", "scales", "offsets"}
    expected = source["weight"].astype(int) + 128
    region = data.draw(regions(expected.shape))
    assert np.array_equal(part(result["codes8"], region), expected[slices(region)])
    numbers = source["weight"].astype(np.float32) * source["weight_scale"]
    assert np.array_equal(part(dequantize(result), region), numbers[slices(region)])


def test_every_int8_value() -> None:
    weight = np.arange(-128, 128, dtype=np.int8).reshape(2, 128)
    result = FORMAT.unpack(opened({"weight": weight, "weight_scale": np.ones((2, 1), np.float32)}), {})
    assert np.array_equal(values(result["codes8"]), np.arange(256).reshape(2, 128))
    assert np.array_equal(values(dequantize(result)), weight.astype(np.float32))


def test_it_is_known_by_its_parameters() -> None:
    for source in (compressed(*module(16, 8, 2), 4), int8_module(4, 4)):
        found = format_of(held(source))
        assert found is not None
        assert found.name == "compressed-tensors"
        assert not FORMAT.accepts(held({name: array for name, array in source.items() if name != "weight_scale"}))
    assert not FORMAT.accepts(held({"weight": np.ones((2, 2), np.float16), "weight_scale": np.ones((2, 1))}))


def refusal(tensors: dict[str, np.ndarray], settings_: dict[str, Any] | None = None) -> str:
    (problem,) = FORMAT.check("a.b", held(tensors), bits_of(4) if settings_ is None else settings_)
    return str(problem)


@pytest.mark.parametrize("more", [{}, {"weight_g_idx": np.arange(8) // 4}, {"weight_g_idx": np.full(8, -1)}])
def test_what_is_right_is_not_refused(more: dict[str, np.ndarray]) -> None:
    codes, zeros, scales = module(16, 8, 2)
    for points in (zeros, None):
        assert FORMAT.check("a.b", held({**compressed(codes, points, scales, 4), **more}), bits_of(4)) == []
    assert FORMAT.check("a.b", held(compressed(*module(16, 8, 2, 8), 8)), bits_of(8)) == []
    without = {name: array for name, array in compressed(codes, None, scales, 4).items() if name != "weight_shape"}
    assert FORMAT.check("a.b", held(without), {}) == []
    assert FORMAT.check("a.b", held(int8_module(3, 5)), {}) == []
    assert FORMAT.check("a.b", held({**int8_module(3, 5), "weight_zero_point": np.zeros((3, 1), np.int8)}), {}) == []


@pytest.mark.parametrize("index", [[0, 1, 0, 1, 0, 1, 0, 1], [1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]])
def test_groups_that_are_not_consecutive(index: list[int]) -> None:
    codes, zeros, scales = module(16, 8, 2)
    tensors = {**compressed(codes, zeros, scales, 4), "weight_g_idx": np.array(index, dtype=np.int32)}
    assert FORMAT.check("a.b", held(tensors), bits_of(4)) == []
    assert FORMAT.act_order(held(tensors))
    weight = values(dequantize(FORMAT.unpack(opened(tensors), bits_of(4))))
    assert np.array_equal(weight, naive_weight(codes, zeros, scales, np.array(index)))


@pytest.mark.parametrize("index", [[0, 0, 0, 0, 1, 1, 1, 1], [-1] * 8])
def test_groups_that_are(index: list[int]) -> None:
    codes, zeros, scales = module(16, 8, 2)
    tensors = {**compressed(codes, zeros, scales, 4), "weight_g_idx": np.array(index, dtype=np.int32)}
    assert not FORMAT.act_order(held(tensors))
    result = FORMAT.unpack(opened(tensors), bits_of(4))
    assert values(result["group_index"]).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert np.array_equal(values(dequantize(result)), naive_weight(codes, zeros, scales))


@pytest.mark.parametrize(
    ("index", "found"),
    [([0] * 4, "shape [4]; expected [8]"), ([0, 0, 0, 2, 1, 1, 1, 1], "group 2; expected the groups 0 to 1 of the scales"),
     ([-1, 0, 0, 0, 1, 1, 1, 1], "group -1; expected the groups 0 to 1 of the scales")],
)  # fmt: skip
def test_groups_that_are_not_there(index: list[int], found: str) -> None:
    tensors = {**compressed(*module(16, 8, 2), 4), "weight_g_idx": np.array(index, dtype=np.int32)}
    assert refusal(tensors) == f"a.b.weight_g_idx: found {found}"


@pytest.mark.parametrize("points", ["none", "packed", "bytes"])
@pytest.mark.parametrize("shape", [(), (1,), (16,), (16, 1)], ids=str)
def test_one_scale_a_row_or_for_all(shape: tuple[int, ...], points: str) -> None:
    codes, zeros, scales = module(16, 8, 1)
    if len(shape) < 2 and shape != (16,):
        scales, zeros = np.full_like(scales, scales[0, 0]), np.full_like(zeros, 5 if points == "bytes" else zeros[0, 0])
    source = {
        **compressed(codes, None, scales, 4),
        "weight_scale": scales.reshape(-1)[: max(int(np.prod(shape)), 1)].reshape(shape),
    }
    if points == "packed":
        source["weight_zero_point"] = compressed(codes, zeros, scales, 4)["weight_zero_point"]
    elif points == "bytes":
        source["weight_zero_point"] = (zeros.reshape(-1)[: max(int(np.prod(shape)), 1)].reshape(shape) - 8).astype(np.int8)
    assert FORMAT.check("a.b", held(source), bits_of(4)) == []
    expected = naive_weight(codes, np.full_like(zeros, 8) if points == "none" else zeros, scales)
    assert np.array_equal(values(dequantize(FORMAT.unpack(opened(source, 40), bits_of(4)))), expected)
    algorithm = FORMAT.native({"a.b": held(source)}, bits_of(4))
    assert algorithm == (("W4A16", 0) if points == "none" else ("W4A16_GPTQ", 8))


def test_codes_of_four_bits_a_byte() -> None:
    codes, zeros, scales = module(6, 8, 2)
    source = {"weight": (codes - 8).astype(np.int8), "weight_scale": np.ascontiguousarray(scales.T)}
    result = FORMAT.unpack(opened(source), bits_of(4))
    assert np.array_equal(values(result["codes4"]), expected_codes(codes, 4))
    assert np.array_equal(values(dequantize(result)), naive_weight(codes, np.full_like(zeros, 8), scales))
    assert FORMAT.native({"a.b": held(source)}, bits_of(4)) == ("W4A16_GPTQ", 4)
    assert FORMAT.native({"a.b": held(source)}, bits_of(8)) == ("W8A16_GPTQ", 4)
    source["weight"][3, 2] = 9
    with pytest.raises(BadInput, match="a code of 9; expected -8 to 7, as num_bits is 4"):
        values(FORMAT.unpack(opened(source), bits_of(4))["codes4"])


def test_the_width_of_a_module_among_several() -> None:
    settings = {"config_groups": {"a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}}}}
    four, eight = (held(compressed(*module(16, 8, 2, bits), bits)) for bits in (4, 8))
    assert FORMAT.module_settings("a.b", four, settings) is settings
    assert FORMAT.module_settings("a.b", eight, settings) == {**settings, "num_bits": 8}
    assert FORMAT.module_settings("a.b", eight, bits_of(4)) == bits_of(4), "a contradiction is refused, not believed"


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}, "integers of 8 bits, dynamic, by token"),
        ({"num_bits": 8, "type": "float", "dynamic": False, "strategy": "tensor"}, "floats of 8 bits, static, by tensor"),
    ],
)
def test_quantized_activations_are_spoken_of(inputs: dict[str, Any], said: str) -> None:
    (note,) = FORMAT.notes({"config_groups": {"g": {"input_activations": inputs}}}, "W4A16_GPTQ")
    assert said in note
    assert "W4A16_GPTQ" in note
    assert FORMAT.notes({"config_groups": {"g": {"input_activations": None}}}, "W4A16_GPTQ") == []


@pytest.mark.parametrize(
    ("said", "bits", "found"),
    [
        ([16, 8], 3, "shape [16, 1] for the weight_shape [16, 8], num_bits 3"),
        ([16, 8], 8, "shape [16, 1] for the weight_shape [16, 8], num_bits 8"),
        ([16, 16], 4, "shape [16, 1] for the weight_shape [16, 16], num_bits 4"),
        ([8, 8], 4, "shape [16, 1] for the weight_shape [8, 8], num_bits 4"),
        ([8], 4, "shape [16, 1] for the weight_shape [8], num_bits 4"),
        (8, 4, "shape [16, 1] for the weight_shape [8], num_bits 4"),
    ],
)
def test_widths_and_shapes_that_contradict_one_another(said: list[int] | int, bits: int, found: str) -> None:
    tensors = {**compressed(*module(16, 8, 2), 4), "weight_shape": np.array(said)}
    remedy = ". Convert the model that it was quantized from" if bits == 3 else ""
    assert refusal(tensors, bits_of(bits)) == f"a.b.weight_packed: found {found}; expected 4 or 8 bits each{remedy}"


@pytest.mark.parametrize("shape", [(16, 3), (8, 2), (16, 0), (8,), (0,), (16, 2, 1)])
def test_scales_that_are_not_those_of_the_groups(shape: tuple[int, ...]) -> None:
    tensors = {**compressed(*module(16, 8, 2), 4), "weight_scale": np.ones(shape, np.float16)}
    assert refusal(tensors) == f"a.b.weight_scale: found shape {list(shape)}; expected [16, groups of 8]"
    tensors = {**int8_module(16, 8), "weight_scale": np.ones(shape, np.float16)}
    assert refusal(tensors) == f"a.b.weight_scale: found shape {list(shape)}; expected [16, groups of 8]"


@pytest.mark.parametrize("shape", [(2, 1), (16, 2), (1, 2), (4,)])
def test_zero_points_of_another_shape(shape: tuple[int, ...]) -> None:
    tensors = {**compressed(*module(16, 8, 2), 4), "weight_zero_point": np.zeros(shape, np.int32)}
    found = refusal(tensors)
    assert found == f"a.b.weight_zero_point: found shape {list(shape)}; expected [2, 2], packed along the rows"


def test_zero_points_that_the_settings_promise() -> None:
    codes, _, scales = module(16, 8, 2)
    tensors = compressed(codes, None, scales, 4)
    said = {"config_groups": {"group_0": {"weights": {"num_bits": 4, "symmetric": False}}}}
    expected = "a.b.weight_zero_point: found no such tensor; expected zero points, as the settings say symmetric: false"
    assert refusal(tensors, said) == expected
    said["config_groups"]["group_1"] = {"weights": {"num_bits": 4, "symmetric": True}}
    assert FORMAT.check("a.b", held(tensors), said) == [], "it may be one of the others"


def test_zero_points_of_another_type() -> None:
    """Older files have them as they are, one a byte."""
    codes, zeros, scales = module(16, 8, 2)
    tensors = {**compressed(codes, None, scales, 4), "weight_zero_point": (zeros.T - 8).astype(np.int8)}
    assert FORMAT.check("a.b", held(tensors), bits_of(4)) == []
    assert np.array_equal(values(FORMAT.unpack(opened(tensors), bits_of(4))["offsets"]), 8 - zeros)
    assert refusal({**tensors, "weight_zero_point": np.zeros((16, 2), np.int64)}).endswith("int64; expected words of 32 bits")
    assert refusal({**int8_module(4, 8), "weight_zero_point": np.zeros((4, 1), np.int32)}).endswith("int8, as the weight's")


def test_as_many_bytes_as_scales_do_not_say_where_each_lies() -> None:
    """By groups first they would be read as if rows came first, past the end of a row."""
    codes, zeros, scales = module(16, 8, 2)
    turned = {**compressed(codes, None, scales, 4), "weight_zero_point": (zeros - 8).astype(np.int8)}
    assert refusal(turned) == "a.b.weight_zero_point: found shape [2, 16]; expected [16, 2], as the scales"
    codes, zeros, scales = module(16, 8, 1)
    for shape in ((16,), (16, 1)):
        of_rows = {**compressed(codes, None, scales, 4), "weight_zero_point": (zeros - 8).astype(np.int8).reshape(shape)}
        assert FORMAT.check("a.b", held(of_rows), bits_of(4)) == []
    assert refusal({**of_rows, "weight_zero_point": (zeros - 8).astype(np.int8)}).endswith(
        "found shape [1, 16]; expected [16, 1], as the scales"
    )


def test_zero_points_of_int8() -> None:
    points = np.array([[3], [0], [-128], [127]], np.int8)
    source = {**int8_module(4, 8), "weight_zero_point": points}
    assert FORMAT.check("a.b", held(source), {}) == []
    expected = (source["weight"].astype(np.float32) - points.astype(np.float32)) * source["weight_scale"]
    assert np.array_equal(values(dequantize(FORMAT.unpack(opened(source), {}))), expected)
    assert FORMAT.native({"a.b": held(source)}, {}) == ("W8A16_GPTQ", 8)


def test_words_of_another_type_or_shape() -> None:
    tensors = compressed(*module(16, 8, 2), 4)
    found = refusal({**tensors, "weight_packed": tensors["weight_packed"].astype(np.int64)})
    assert found == "a.b.weight_packed: found values of type int64; expected words of 32 bits"
    for shape in ((), (16,), (2, 16, 1)):
        found = refusal({**tensors, "weight_packed": np.zeros(shape, np.int32)})
        assert found == f"a.b.weight_packed: found shape {list(shape)}; expected a matrix"
        found = refusal({**int8_module(2, 2), "weight": np.zeros(shape, np.int8)})
        assert found == f"a.b.weight: found shape {list(shape)}; expected a matrix"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_word_of_zero_points_is_of_several_rows(bits: int) -> None:
    """Of 12 rows with 4 bits there are two words, so that the count does not say how many rows a word has."""
    zeros, settings = np.zeros((2, 1), np.int32), {"config_groups": {"group_0": {"weights": {"num_bits": bits}}}}
    assert FORMAT.heights(held({"weight_zero_point": zeros}), settings) == {"weight_zero_point": 32 // bits}
    assert FORMAT.heights(held({"weight_zero_point": zeros.astype(np.int8)}), settings) == {}
    assert FORMAT.heights(held({}), settings) == {}
