"""AutoAWQ: what is packed word by word, in its own order of nibbles, is unpacked, any part of it; refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tensor.placement import slices, whole
from stages.quantization.numbers import dequantize
from stages.quantization.sources.awq import FORMAT
from stages.unpack import format_of
from tests.support.examples import examples
from tests.support.lazy import held, values
from tests.support.packed_tensors import (
    CHUNKS,
    awq,
    blocks,
    expected_codes,
    gptq,
    naive_weight,
    opened,
    part,
    random_codes,
    random_scales,
    shapes,
)
from tests.support.strategies import regions


def module(n: int, k: int, groups: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, K], zero points and scales [G, N]."""
    return random_codes((n, k), 4, seed), random_codes((groups, n), 4, seed + 1), random_scales((groups, n), seed)


@examples(50)
@given(data=st.data(), size=shapes(8, 2), chunk=st.sampled_from(CHUNKS), seed=st.integers(0, 99))
def test_any_part_of_the_codes_and_zero_points(data: st.DataObject, size: tuple[int, int, int], chunk: int, seed: int) -> None:
    codes, zeros, scales = module(*size, seed)
    result = FORMAT.unpack(opened(awq(codes, zeros, scales), chunk), {})
    assert result.keys() == {"codes4", "scales", "offsets"}
    wanted = expected_codes(codes, 4)
    region = data.draw(regions(wanted.shape))
    assert result["codes4"].shape == wanted.shape
    assert np.array_equal(part(result["codes4"], region), wanted[slices(region)])
    region = data.draw(regions(zeros.shape))
    assert np.array_equal(part(result["offsets"], region), (8 - zeros)[slices(region)])
    assert part(result["scales"], whole(scales.shape)).tobytes() == scales.tobytes()


def test_every_code_in_every_place_of_a_word() -> None:
    codes = np.stack([np.roll(np.arange(16), n) for n in range(8)])
    zeros = np.arange(8)[None] + np.array([[0], [8]])
    result = FORMAT.unpack(opened(awq(codes, zeros, np.ones((2, 8), np.float16))), {})
    assert np.array_equal(values(result["codes4"]), expected_codes(codes, 4))
    assert np.array_equal(values(result["offsets"]), 8 - zeros)


@examples(20)
@given(data=st.data(), size=shapes(8, 2), chunk=st.sampled_from(CHUNKS), seed=st.integers(0, 99))
def test_the_weight_is_code_less_zero_point_times_scale(
    data: st.DataObject, size: tuple[int, int, int], chunk: int, seed: int
) -> None:
    codes, zeros, scales = module(*size, seed)
    arrays = opened({**awq(codes, zeros, scales), "bias": np.arange(size[0], dtype=np.float16)}, chunk)
    result = FORMAT.unpack(arrays, {})
    assert result["bias"] is arrays["bias"]
    expected = naive_weight(codes, zeros, scales)
    region = data.draw(regions(expected.shape))
    assert np.array_equal(part(dequantize(result), region), expected[slices(region)])


@pytest.mark.parametrize("chunk", CHUNKS)
def test_one_block_read_in_pieces_in_any_order(chunk: int) -> None:
    """A task reads a block a few rows at a time, and may begin anywhere."""
    codes, zeros, scales = module(40, 16, 2)
    (block,) = blocks(FORMAT.unpack(opened(awq(codes, zeros, scales), chunk), {})["codes4"])
    expected = expected_codes(codes, 4)
    for first, last in [(0, 7), (7, 14), (14, 40), (3, 9), (39, 40), (0, 40), (5, 6)]:
        for columns in ((0, 8), (2, 5)):
            assert np.array_equal(block.read(((first, last), columns)), expected[first:last, slice(*columns)])


def test_it_is_known_by_its_shapes() -> None:
    sizes, found = module(16, 8, 2), []
    for tensors in (awq(*sizes), gptq(*sizes, 4)):
        packing = format_of(held(tensors))
        assert packing is not None
        found.append(packing.name)
    assert found == ["awq", "gptq"]
    tensors = held(awq(*sizes))
    assert FORMAT.accepts(tensors)
    for name in ("qweight", "scales"):
        assert not FORMAT.accepts({key: tensor for key, tensor in tensors.items() if key != name})


def refusal(tensors: dict[str, np.ndarray], settings_: dict[str, Any] | None = None) -> str:
    (problem,) = FORMAT.check("a.b", held(tensors), settings_ or {})
    return str(problem)


@pytest.mark.parametrize(
    "settings_",
    [
        {},
        {"bits": 4, "group_size": 4, "version": "gemm"},
        {"w_bit": 4, "q_group_size": 4, "version": "GEMM"},
        {"group_size": None},
        {"group_size": -1},
    ],
)
def test_what_is_right_is_not_refused(settings_: dict[str, Any]) -> None:
    assert FORMAT.check("a.b", held(awq(*module(16, 8, 2))), settings_) == []


@pytest.mark.parametrize(
    ("settings_", "expected"),
    [
        ({"bits": 3}, "a.b.qweight: found bits 3; expected 4"),
        ({"w_bit": 8}, "a.b.qweight: found bits 8; expected 4"),
        ({"version": "gemv"}, "a.b.qweight: found version gemv; expected gemm. Export the model as gemm"),
        ({"version": "marlin"}, "a.b.qweight: found version marlin; expected gemm. Export the model as gemm"),
        ({"group_size": 8}, "a.b.scales: found 2 groups of 8 in-features; expected groups of 8"),
        ({"q_group_size": 2}, "a.b.scales: found 2 groups of 8 in-features; expected groups of 2"),
    ],
)
def test_settings_that_the_tensors_or_the_format_contradict(settings_: dict[str, Any], expected: str) -> None:
    assert refusal(awq(*module(16, 8, 2)), settings_) == expected


def test_shapes_that_contradict_one_another() -> None:
    codes, zeros, scales = module(16, 8, 2)
    found = refusal({**awq(codes, zeros, scales), "qzeros": np.zeros((4, 2), np.int32)})
    assert found == "a.b.qzeros: found shape [4, 2]; expected [2, 2], as the scales have it"
    found = refusal({**awq(codes, zeros, scales), "qzeros": np.zeros((2, 16), np.int32)})
    assert found == "a.b.qzeros: found shape [2, 16]; expected [2, 2], as the scales have it"
    thirds = awq(codes, random_codes((3, 16), 4, 0), random_scales((3, 16), 0))
    assert refusal(thirds) == "a.b.scales: found 3 groups of 8 in-features; expected groups of one size"
    odd = awq(*module(16, 7, 1))
    assert refusal(odd) == "a.b.qweight: found 7 in-features; expected an even number of them"


@pytest.mark.parametrize("name", ["qweight", "qzeros"])
def test_words_of_another_type(name: str) -> None:
    tensors = awq(*module(16, 8, 2))
    tensors[name] = tensors[name].astype(np.int64)
    assert refusal(tensors) == f"a.b.{name}: found values of type int64; expected words of 32 bits"


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales"])
def test_a_tensor_without_its_axes_is_none_of_the_format(name: str) -> None:
    for shape in ((), (8,), (1, 1, 8)):
        assert format_of(held({**awq(*module(8, 8, 1)), name: np.zeros(shape, dtype=np.int32)})) is None


WITHOUT = {"zero_point": False}


def test_without_zero_points_each_is_eight() -> None:
    codes, _, scales = module(16, 8, 2)
    tensors = awq(codes, np.full((2, 16), 8), scales)
    for parameters in (tensors, {name: values_ for name, values_ in tensors.items() if name != "qzeros"}):
        assert format_of(held(parameters)) is FORMAT
        assert FORMAT.check("a.b", held(parameters), WITHOUT) == []
        result = FORMAT.unpack(opened(parameters), WITHOUT)
        assert not values(result["offsets"]).any()
        assert np.array_equal(values(dequantize(result)), naive_weight(codes, np.full((2, 16), 8), scales))
    assert not FORMAT.zero_points(WITHOUT)
    assert all(FORMAT.zero_points(said) for said in ({}, {"zero_point": True}, {"zero_point": None}))


def test_zero_points_that_the_settings_deny_or_that_are_missing() -> None:
    codes, zeros, scales = module(16, 8, 2)
    zeros[:] = 8
    zeros[1, 3] = 7
    expected = "8 throughout, as the settings say zero_point: false. Set zero_point to true, if the codes were made with them"
    assert refusal(awq(codes, zeros, scales), WITHOUT) == f"a.b.qzeros: found zero points other than 8; expected {expected}"
    tensors = {name: values_ for name, values_ in awq(codes, zeros, scales).items() if name != "qzeros"}
    for said in ({}, {"zero_point": True}):
        found = refusal(tensors, said)
        assert found == "a.b.qzeros: found no such tensor; expected zero points, unless the settings say zero_point: false"
