"""GPTQ: what is packed word by word is unpacked, any part of it, from chunks of any size; both versions; refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tensor.placement import slices, whole
from stages.quantization.numbers import dequantize
from stages.quantization.sources.gptq import FORMAT
from stages.unpack import format_of
from tests.support.examples import examples
from tests.support.lazy import held, values
from tests.support.packed_tensors import (
    CHUNKS,
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
from tests.support.quantized_checkpoints import planes32
from tests.support.strategies import regions

V2 = {"checkpoint_format": "gptq_v2"}


def module(n: int, k: int, groups: int, bits: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, K], zero points as stored and scales [G, N]."""
    return random_codes((n, k), bits, seed), random_codes((groups, n), bits, seed + 1), random_scales((groups, n), seed)


@pytest.mark.parametrize("bits", [4, 8])
@examples(40)
@given(data=st.data(), chunk=st.sampled_from(CHUNKS), seed=st.integers(0, 99))
def test_any_part_of_the_codes_and_zero_points(bits: int, data: st.DataObject, chunk: int, seed: int) -> None:
    packed = 32 // bits
    n, k, groups = data.draw(shapes(packed, packed))
    codes, stored, scales = module(n, k, groups, bits, seed)
    result = FORMAT.unpack(opened(gptq(codes, stored, scales, bits), chunk), {})
    assert result.keys() == {f"codes{bits}", "scales", "offsets"}
    wanted = expected_codes(codes, bits)
    region = data.draw(regions(wanted.shape))
    assert result[f"codes{bits}"].shape == wanted.shape
    assert np.array_equal(part(result[f"codes{bits}"], region), wanted[slices(region)])
    offsets = (1 << (bits - 1)) - (stored + 1)
    region = data.draw(regions(offsets.shape))
    assert np.array_equal(part(result["offsets"], region), offsets[slices(region)])
    assert part(result["scales"], whole(scales.shape)).tobytes() == scales.tobytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_in_every_place_of_a_word(bits: int) -> None:
    packed, count = 32 // bits, 1 << bits
    codes = np.stack([np.roll(np.arange(count), n) for n in range(packed)])
    stored = np.zeros((1, packed), dtype=int)
    result = FORMAT.unpack(opened(gptq(codes, stored, np.ones((1, packed), np.float16), bits)), {})
    assert np.array_equal(values(result[f"codes{bits}"]), expected_codes(codes, bits))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("settings_", "one"), [({}, 1), ({"checkpoint_format": "gptq"}, 1), (V2, 0)])
def test_every_stored_zero_point_of_both_versions(bits: int, settings_: dict[str, Any], one: int) -> None:
    """One of the first version is one more than it is stored as, even the largest."""
    count, packed = 1 << bits, 32 // bits
    stored = np.arange(count)[None]
    codes = random_codes((count, packed), bits, 0)
    scales = np.full((1, count), 0.5, np.float16)
    result = FORMAT.unpack(opened(gptq(codes, stored, scales, bits)), settings_)
    assert values(result["offsets"])[0].tolist() == [count // 2 - z - one for z in range(count)]
    assert np.array_equal(values(dequantize(result)), naive_weight(codes, stored + one, scales))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("stored_as", "version"), [(0, {}), (0, V2), (-1, {})])
def test_a_symmetric_source_is_centred_whichever_version_its_zeros_are(
    bits: int, chunk: int, stored_as: int, version: dict[str, Any]
) -> None:
    """The middle is stored as itself by the second version, and by some files that say they are the first; as one less by the
    first.
    """
    middle = 1 << (bits - 1)
    codes, _, scales = module(32, 32, 4, bits)
    stored = np.full(scales.shape, middle + stored_as)
    result = FORMAT.unpack(opened(gptq(codes, stored, scales, bits), chunk), {"sym": True, **version})
    assert not values(result["offsets"]).any()
    assert np.array_equal(values(dequantize(result)), naive_weight(codes, np.full(scales.shape, middle), scales))


@pytest.mark.parametrize("bits", [4, 8])
def test_settings_that_do_not_say_it_are_of_a_symmetric_source(bits: int) -> None:
    codes, _, scales = module(32, 32, 1, bits)
    stored = gptq(codes, np.full(scales.shape, 1 << (bits - 1)), scales, bits)
    assert not values(FORMAT.unpack(opened(stored), {})["offsets"]).any()
    assert FORMAT.native({"a.b": held(stored)}, {}) == (f"W{bits}A16", 0)
    assert FORMAT.native({"a.b": held(stored)}, {"sym": False}) == (f"W{bits}A16_GPTQ", 32)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_asymmetric_source_of_the_first_version_keeps_the_middle_as_it_is_stored(bits: int) -> None:
    middle = 1 << (bits - 1)
    codes, _, scales = module(8, 8, 1, bits)
    stored = np.full(scales.shape, middle)
    result = FORMAT.unpack(opened(gptq(codes, stored, scales, bits)), {"sym": False})
    assert np.array_equal(values(result["offsets"]), np.full(scales.shape, -1))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_which_version_the_zeros_are_is_asked_of_all_of_them(chunk: int) -> None:
    """A part that happens to hold the middle alone says nothing: any part is that part of the whole."""
    codes, _, scales = module(16, 8, 4)
    stored = np.full(scales.shape, 8)
    stored[3, 15] = 7
    result = FORMAT.unpack(opened(gptq(codes, stored, scales, 4), chunk), {"sym": True})
    expected = 8 - (stored + 1)
    assert np.array_equal(values(result["offsets"]), expected)
    for region in (((0, 1), (0, 8)), ((0, 4), (0, 15)), ((3, 4), (8, 16))):
        assert np.array_equal(part(result["offsets"], region), expected[slices(region)])


@examples(20)
@given(data=st.data(), seed=st.integers(0, 99), bits=st.sampled_from([4, 8]), chunk=st.sampled_from(CHUNKS))
def test_groups_in_the_order_of_the_activations_are_dequantized(data: st.DataObject, seed: int, bits: int, chunk: int) -> None:
    n, k, groups = data.draw(shapes(32 // bits, 32 // bits))
    codes, stored, scales = module(n, k, groups, bits, seed)
    index = np.random.default_rng(seed).permutation(np.arange(k) // (k // groups)).astype(np.int32)
    source = {**gptq(codes, stored, scales, bits), "g_idx": index, "bias": np.arange(n, dtype=np.float16)}
    arrays = opened(source, chunk)
    result = FORMAT.unpack(arrays, {})
    assert result.keys() == {f"codes{bits}", "scales", "offsets", "group_index", "bias"}
    assert result["bias"] is arrays["bias"]
    expected = naive_weight(codes, stored + 1, scales, index)
    region = data.draw(regions(expected.shape))
    assert np.array_equal(part(dequantize(result), region), expected[slices(region)])
    assert FORMAT.act_order(held(source)) == (not np.array_equal(index, np.sort(index)))


@pytest.mark.parametrize(
    ("index", "ordered"),
    [
        ([0, 0, 0, 0, 1, 1, 1, 1], False),
        ([0, 0, 1, 0, 0, 1, 1, 1], True),
        ([0, 0, 0, 1, 1, 1, 1, 1], True),
        ([1, 1, 1, 1, 0, 0, 0, 0], True),
        (None, False),
    ],
)
def test_only_consecutive_groups_of_one_size_are_in_order(index: list[int] | None, ordered: bool) -> None:
    tensors = gptq(*module(8, 8, 2), 4) | ({} if index is None else {"g_idx": np.array(index, dtype=np.int32)})
    assert FORMAT.act_order(held(tensors)) is ordered


@pytest.mark.parametrize("chunk", CHUNKS)
def test_one_block_read_in_pieces_in_any_order(chunk: int) -> None:
    """A task reads a block a few rows at a time, and may begin anywhere."""
    codes, stored, scales = module(40, 16, 2)
    array = FORMAT.unpack(opened(gptq(codes, stored, scales, 4), chunk), {})["codes4"]
    (block,) = blocks(array)
    expected = expected_codes(codes, 4)
    for first, last in [(0, 7), (7, 14), (14, 40), (3, 9), (39, 40), (0, 40), (5, 6)]:
        for columns in ((0, 8), (2, 5)):
            assert np.array_equal(block.read(((first, last), columns)), expected[first:last, slice(*columns)])


def test_it_is_known_by_its_shapes() -> None:
    tensors = held(gptq(*module(16, 8, 2), 4))
    assert FORMAT.accepts(tensors)
    found = format_of(tensors)
    assert found is not None
    assert found.name == "gptq"
    assert not FORMAT.accepts({name: tensor for name, tensor in tensors.items() if name != "qzeros"})
    assert not FORMAT.accepts(held({"weight": np.ones((8, 8)), "scales": np.ones((2, 8))}))


def refusal(tensors: dict[str, np.ndarray], settings_: dict[str, Any] | None = None) -> str:
    (problem,) = FORMAT.check("a.b", held(tensors), settings_ or {})
    return str(problem)


@pytest.mark.parametrize("settings_", [{}, {"bits": 4, "group_size": 4}, {"group_size": -1}, {"group_size": None, "sym": True}])
def test_what_is_right_is_not_refused(settings_: dict[str, Any]) -> None:
    tensors = gptq(*module(16, 8, 2), 4) | {"g_idx": (np.arange(8) // 4).astype(np.int32)}
    assert FORMAT.check("a.b", held(tensors), settings_) == []
    assert FORMAT.check("a.b", held(gptq(*module(8, 8, 1, 8), 8)), {"bits": 8}) == []


def test_other_widths_are_refused() -> None:
    nine = {**gptq(*module(32, 32, 1), 4), "qzeros": np.zeros((1, 9), np.int32)}
    assert refusal(nine) == "a.b.qweight: found 9 bits by its shape; expected 2 to 8 bits, alike"
    three = {**gptq(*module(32, 32, 1), 4), "qzeros": np.zeros((1, 3), np.int32)}
    assert refusal(three) == "a.b.qweight: found 4 words of in-features; expected whole codes of 3 bits"
    found = refusal(gptq(*module(8, 8, 1), 4), {"bits": 8})
    assert found == "a.b.qweight: found 4 bits by its shape, and bits 8 in the settings; expected 2 to 8 bits, alike"


@pytest.mark.parametrize("named", ["checkpoint_format", "format"])
def test_words_in_planes_are_told_by_the_settings_alone(named: str) -> None:
    """A `gptq_p` of 3 bits has the shapes of a `gptq`, and zero points of its own of any width."""
    codes, zeros, scales = random_codes((32, 64), 3, 0), random_codes((2, 32), 3, 1), random_scales((2, 32), 0)
    stored = {"qweight": planes32(codes.T, 3, 0), "qzeros": planes32(zeros, 3, 1), "scales": scales}
    result = FORMAT.unpack(opened(stored), {named: "gptq_p"})
    assert np.array_equal(values(dequantize(result)), naive_weight(codes, zeros, scales))
    four = gptq(random_codes((8, 16), 4, 0), zeros[:, :8], scales[:, :8], 4)
    assert np.array_equal(values(FORMAT.unpack(opened(four), {named: "gptq_p"})["offsets"]), 8 - zeros[:, :8])


def test_planes_are_of_whole_blocks_of_codes() -> None:
    five = {"qweight": np.zeros((5, 48), np.int32), "qzeros": np.zeros((1, 8), np.int32), "scales": np.ones((1, 48), np.float16)}
    assert refusal(five).startswith("a.b.qweight: found 5.33333 bits by its shape")
    six = {"qweight": np.zeros((6, 16), np.int32), "qzeros": np.zeros((1, 3), np.int32), "scales": np.ones((1, 16), np.float16)}
    assert refusal(six) == "a.b.qweight: found 32 in-features, 16 out-features; expected multiples of 32, of 6 bits in planes"


def test_groups_that_contradict_the_settings_or_do_not_divide() -> None:
    found = refusal(gptq(*module(8, 16, 2), 4), {"group_size": 4})
    assert found == "a.b.scales: found 2 groups of 16 in-features; expected groups of 4"
    codes, stored, scales = random_codes((8, 16), 4, 0), random_codes((3, 8), 4, 1), random_scales((3, 8), 0)
    assert refusal(gptq(codes, stored, scales, 4)).startswith("a.b.scales: found 3 groups of 16 in-features")


def test_no_groups_or_no_in_features() -> None:
    tensors = gptq(*module(8, 16, 2), 4)
    found = refusal({**tensors, "scales": np.zeros((0, 8), np.float16)})
    assert found == "a.b.scales: found 0 groups of 16 in-features; expected groups of one size"
    found = refusal({**tensors, "qweight": np.zeros((0, 8), np.int32)})
    assert found == "a.b.scales: found 2 groups of 0 in-features; expected groups of one size"


def test_zero_points_of_other_groups_than_the_scales() -> None:
    tensors = {**gptq(*module(8, 16, 4), 4), "qzeros": np.zeros((2, 1), np.int32)}
    assert refusal(tensors) == "a.b.qzeros: found shape [2, 1]; expected [4, 1], as the scales have it"


@pytest.mark.parametrize("name", ["qweight", "qzeros"])
@pytest.mark.parametrize("dtype", [np.int64, np.int16, np.float32])
def test_words_of_another_type(name: str, dtype: type) -> None:
    tensors = gptq(*module(8, 16, 2), 4)
    tensors[name] = tensors[name].astype(dtype)
    assert refusal(tensors) == f"a.b.{name}: found values of type {np.dtype(dtype)}; expected words of 32 bits"


@pytest.mark.parametrize(("index", "what"), [(2, "2"), (-1, "-1")])
def test_an_index_of_a_group_that_is_not_there(index: int, what: str) -> None:
    tensors = gptq(*module(8, 8, 2), 4) | {"g_idx": np.array([0, 0, 0, 0, 1, 1, 1, index], dtype=np.int32)}
    assert refusal(tensors) == f"a.b.g_idx: found group {what}; expected the groups 0 to 1 of the scales"


def test_an_order_that_the_settings_promise() -> None:
    """Without it nobody knows which group an in-feature belongs to, where there are several."""
    expected = "a.b.g_idx: found no such tensor; expected the group of each in-feature, as the settings say desc_act: true"
    assert refusal(gptq(*module(8, 16, 2), 4), {"desc_act": True}) == expected
    assert FORMAT.check("a.b", held(gptq(*module(8, 16, 1), 4)), {"desc_act": True}) == []
    assert FORMAT.check("a.b", held(gptq(*module(8, 16, 2), 4)), {"desc_act": False}) == []


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales"])
def test_a_tensor_without_its_axes_is_none_of_the_format(name: str) -> None:
    for shape in ((), (8,), (1, 1, 8)):
        tensors = {**gptq(*module(8, 8, 1), 4), name: np.zeros(shape, dtype=np.int32)}
        assert not FORMAT.accepts(held(tensors))
        assert format_of(held(tensors)) is None
