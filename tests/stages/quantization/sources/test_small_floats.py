"""FP8 by block, NVFP4, MXFP4, bitsandbytes and HQQ: any part of a weight is that of its definition, in any chunks."""

from __future__ import annotations

import functools
import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tensor.placement import slices
from stages.quantization import floats
from stages.quantization.numbers import dequantize
from stages.quantization.packed_format import PackedFormat
from stages.unpack import format_of
from tests.support import quantized_checkpoints as source
from tests.support.examples import examples
from tests.support.lazy import Held, held, values
from tests.support.packed_tensors import CHUNKS, opened, part
from tests.support.quantized_checkpoints import Arrays, Format
from tests.support.strategies import regions

KINDS: dict[str, tuple[str, Format, tuple[int, int]]] = {
    "tiles": ("float8-block", source.block_float8(tile=16), (40, 56)),
    "tiles of compressed-tensors": ("float8-block", source.block_float8(tile=16, compressed_=True), (33, 17)),
    "tiles of modelopt": ("float8-block", source.modelopt_block_float8(), (20, 260)),
    "tiles of gptqmodel": ("float8-block", source.gptqmodel_float8(method="block", tile=(16, 8)), (40, 24)),
    "rows of gptqmodel": ("float8-block", source.gptqmodel_float8(method="row"), (33, 18)),
    "all of gptqmodel": ("float8-block", source.gptqmodel_float8(method="tensor"), (33, 18)),
    "mxfp8": ("float8-block", source.mxfp8(), (24, 96)),
    "mxfp8 of one group": ("float8-block", source.mxfp8(exponents="float8_e8m0fnu"), (24, 32)),
    "nvfp4": ("nvfp4", source.nvfp4(), (24, 96)),
    "nvfp4 of compressed-tensors": ("nvfp4", source.nvfp4(compressed_=True), (24, 96)),
    "mxfp4": ("mxfp4", source.mxfp4(), (24, 96)),
    "mxfp4 of quark": ("mxfp4", source.mxfp4(named="weight", exponents="float8_e8m0fnu"), (24, 96)),
    "nf4": ("bitsandbytes", source.bitsandbytes(block=32), (24, 96)),
    "nf4 twice": ("bitsandbytes", source.bitsandbytes(nested=True, block=32), (24, 96)),
    "fp4 twice": ("bitsandbytes", source.bitsandbytes(kind="fp4", nested=True, block=64), (20, 128)),
    "hqq": ("hqq", source.hqq(group=16), (24, 96)),
    "hqq 1 bit": ("hqq", source.hqq(bits=1, group=32), (24, 96)),
    "hqq 8 bits": ("hqq", source.hqq(bits=8, group=32), (9, 96)),
    "hqq across": ("hqq", source.hqq(group=16, axis=0), (48, 40)),
    "hqq across, 1 bit": ("hqq", source.hqq(bits=1, group=32, axis=0), (24, 96)),
    "hqq across, more than rows": ("hqq", source.hqq(bits=2, group=32, axis=0), (8, 96)),
    "eetq": ("eetq", source.eetq(), (10, 128)),
    "eetq of its own tools": ("eetq", source.eetq(named="qweight"), (6, 64)),
    "int8": ("bitsandbytes", source.bitsandbytes_int8(), (24, 90)),
}


def weight(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(11).normal(0, 0.05, shape).astype(np.float32)


@functools.cache
def packed(name: str, rows: int = 0) -> tuple[PackedFormat, Arrays, np.ndarray, dict[str, Any]]:
    """A module's format, its parameters as they are unpacked from, the weight that they stand for, and the settings. `rows`: of the
    weight, in the place of the usual ones.
    """
    called, kind, shape = KINDS[name]
    made = kind.quantizer("model.layers.0.mlp.up_proj", weight((rows or shape[0], shape[1])))
    stored = {key: np.ascontiguousarray(array) for key, array in made.parameters.items()}
    known = format_of(held(stored))
    assert known is not None
    assert known.name == called
    arranged = {
        key: np.asarray(tensor.block(tuple((0, n) for n in tensor.shape))) for key, tensor in known.arrange(held(stored)).items()
    }
    said = known.module_settings("model.layers.0.mlp.up_proj", held(arranged), kind.settings)
    return known, arranged, made.weight, dict(said)


@examples(12)
@pytest.mark.parametrize("name", KINDS)
@given(data=st.data(), chunk=st.sampled_from(CHUNKS))
def test_any_part_of_the_weight(name: str, data: st.DataObject, chunk: int) -> None:
    known, stored, expected, settings = packed(name)
    assert known.check("m", held(stored), settings) == []
    result = known.unpack(opened(stored, chunk), settings)
    found = result["weight"] if known.numbers else dequantize(result)
    assert (found.shape, found.dtype) == (expected.shape, np.float32)
    region = data.draw(regions(expected.shape))
    np.testing.assert_array_equal(part(found, region), expected[slices(region)])


@pytest.mark.parametrize("name", KINDS)
def test_a_bias_stays(name: str) -> None:
    known, stored, expected, settings = packed(name)
    arrays = opened({**stored, "bias": np.arange(len(expected), dtype=np.float16)})
    assert known.unpack(arrays, settings)["bias"] is arrays["bias"]


def test_every_small_float() -> None:
    codes = np.arange(256, dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(
            floats.e4m3(codes.view(ml_dtypes.float8_e4m3fn)), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        )
        np.testing.assert_array_equal(floats.e8m0(codes), codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    both = floats.e2m1(codes[:, None])
    four = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(both, np.stack([four[codes % 16], four[codes // 16]], axis=1))


def test_another_meaning_of_scales_is_refused() -> None:
    """GPTQModel's settings say that its scales divide; what they may say one day is not guessed."""
    known, stored, _, settings = packed("rows of gptqmodel")
    (problem,) = known.check("m", held(stored), {**settings, "weight_scale_semantics": "direct"})
    assert str(problem).startswith("m.weight_scale_inv: found weight_scale_semantics 'direct' in the settings; expected inverse")


def test_two_runs_of_scales_of_scales_are_read_where_they_lie() -> None:
    """600 runs of 256: rows in the second and third of them alone."""
    known, stored, expected, settings = packed("nf4 twice", 200)
    assert len(stored["weight.nested_absmax"]) == 3
    found = known.unpack(opened(stored), settings)["weight"]
    np.testing.assert_array_equal(part(found, ((150, 200), (32, 96))), expected[150:, 32:])


def state(**changed: Any) -> Arrays:
    """A module of 4 bits whose JSON says something else."""
    _, stored, _, _ = packed("nf4")
    key = "weight.quant_state.bitsandbytes__nf4"
    said = {**json.loads(stored[key].tobytes()), **changed}
    return {**stored, key: np.frombuffer(json.dumps(said).encode(), np.uint8)}


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (state(shape=[24]), "bytes that are no state of 4 bits"),
        (state(shape=[24, -96]), "bytes that are no state of 4 bits"),
        (state(blocksize="32"), "bytes that are no state of 4 bits"),
        (state(shape=[24, 97]), "expected uint8 of 24 x 97 codes, two a byte"),
        (state(blocksize=64), "m.weight.absmax: found shape [24, 3]"),
        (state(nested_offset=0.5, nested_blocksize=256), "m.weight.nested_absmax: found no such tensor"),
        ({**state(), "weight.quant_map": np.zeros(8, np.float32)}, "m.weight.quant_map: found shape [8]; expected 16 values"),
        ({**state(), "weight.quant_state.bitsandbytes__nf4": np.zeros(9, np.uint8)}, "bytes that are no state of 4 bits"),
        (state(padding=" " * (64 << 10)), "bytes that are no state of 4 bits"),
    ],
)
def test_states_that_do_not_fit(stored: Arrays, said: str) -> None:
    known = format_of(held(stored))
    assert known is not None
    (problem,) = known.check("m", known.arrange(held(stored)), {})
    assert said in str(problem)


def test_an_int8_weight_in_a_gpu_s_order() -> None:
    known, stored, _, _ = packed("int8")
    (problem,) = known.check("m", held({**stored, "weight_format": np.ones((), np.uint8)}), {})
    assert problem.subject == "m.weight_format"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"axis": np.array(2, np.int32)}, "m.axis: found 2; expected 0 or 1. "),
        ({"axis": np.array(0, np.int32)}, "m.scale: found shape [24, 6]; expected [1, 16], one for each column of W_q"),
        ({"nbits": np.array(3, np.int32)}, "m.nbits: found 3; expected 1 or 2 or 4 or 8"),
        ({"nbits": np.array(8, np.int32)}, "m.W_q: found 4 bits by its shape; expected 8 bits, as nbits says"),
        ({"quant_zero": np.ones((), np.uint8)}, "m.quant_zero: found 1; expected 0"),
        ({"shape": np.array([24, 48])}, "m.scale: found shape [24, 6]; expected a scale for each 16 of [24, 48]"),
        ({"W_q": np.zeros((72, 16), np.int32)}, "m.W_q: found int32 [72, 16]"),
        ({"W_q": np.zeros((0, 16), np.uint8)}, "m.W_q: found shape [0, 16]; expected 1, 2, 4 or 8 codes a byte of [24, 96]"),
        ({"shape": np.array([0, 96])}, "m.shape: found [0, 96]; expected the two sizes of the weight"),
    ],
)
def test_hqq_of_other_kinds(changed: Arrays, said: str) -> None:
    known, stored, _, _ = packed("hqq")
    (problem,) = known.check("m", held({**stored, **changed}), {})
    assert str(problem).startswith(said)


@pytest.mark.parametrize("kind", ["hqq", "hqq across"])
def test_three_groups_of_hqq_a_byte(kind: str) -> None:
    """Without nbits the shapes alone say how many a byte holds."""
    known, stored, _, _ = packed(kind)
    stored = {name: array for name, array in stored.items() if name != "nbits"}
    lines, groups = stored["W_q"].shape
    (problem,) = known.check("m", held({**stored, "W_q": np.zeros((2 * lines // 3, groups), np.uint8)}), {})
    assert problem.expected.startswith("1, 2, 4 or 8 codes a byte of ")


@pytest.mark.parametrize(
    "stored",
    [
        {"W_q": np.zeros((0, 16), np.uint8), "scale": np.ones((0, 4)), "zero": np.ones((0, 4)), "shape": np.array([0, 64])},
        {"weight": np.zeros((0, 128), ml_dtypes.float8_e4m3fn), "weight_scale_inv": np.ones((0, 1), np.float32)},
    ],
    ids=["hqq", "tiles"],
)
def test_a_weight_without_values_is_refused(stored: Arrays) -> None:
    known = format_of(held(stored))
    assert known is not None
    (problem,) = known.check("m", known.arrange(held(stored)), {})
    assert "[0, " in problem.found


NO_SIZES: tuple[Any, ...] = ([16], [0, 16], "tiles", "²x2", "9" * 5000 + "x1", 5, {"a": 1})


@pytest.mark.parametrize("said", NO_SIZES, ids=lambda said: str(said)[:9])
def test_tiles_of_no_size(said: Any) -> None:
    known, stored, _, _ = packed("tiles")
    (problem,) = known.check("m", held(stored), {"weight_block_size": said})
    assert problem.expected == "two sizes of a tile"


@pytest.mark.parametrize(
    "said", [{"weight_block_size": [16, 16]}, {"config_groups": {"a": {"weights": {"block_structure": "16x16"}}}}]
)
def test_sizes_of_a_tile(said: dict[str, Any]) -> None:
    known, stored, expected, _ = packed("tiles")
    assert known.check("m", held(stored), said) == []
    np.testing.assert_array_equal(values(known.unpack(opened(stored), said)["weight"]), expected)


def test_nvfp4_is_not_taken_for_int4_awq() -> None:
    modules: dict[str, dict[str, np.ndarray]] = {name: packed(name)[1] for name in ("nvfp4", "mxfp4 of quark")}
    awq = {"weight": np.zeros((8, 32), np.uint8), "weight_scale": np.ones((16, 2), np.float32)}
    names = [getattr(format_of(held(stored)), "name", None) for stored in (*modules.values(), awq)]
    assert names == ["nvfp4", "mxfp4", "modelopt-awq"]


def test_nvfp4_with_factors_of_the_activations_is_dequantized() -> None:
    known, stored, expected, settings = packed("nvfp4")
    smooth = np.linspace(0.5, 2, expected.shape[1]).astype(np.float16)
    stored = {**stored, "pre_quant_scale": smooth}
    assert known.native({"m": held(stored)}, settings) == (None, 0)
    np.testing.assert_array_equal(values(dequantize(known.unpack(opened(stored), settings))), expected * smooth.astype(np.float32))


def test_a_tensor_that_cannot_be_viewed_stays_flat() -> None:
    """Then the check names it: nothing guesses."""

    class Fixed:
        def __init__(self, tensor: Held) -> None:
            self.shape, self.dtype, self.block = tensor.shape, tensor.dtype, tensor.block

    made = KINDS["nf4"][1].quantizer("m", weight((24, 96)))
    tensors: Any = {key: Fixed(Held(np.ascontiguousarray(array))) for key, array in made.parameters.items()}
    known = format_of(tensors)
    assert known is not None
    assert known.arrange(tensors) is tensors
    assert known.check("m", tensors, {})[0].subject == "m.weight"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"W_q": np.zeros((8, 119), np.uint8)}, "m.scale: found shape [1, 120]; expected [1, 119]"),
        ({"W_q": np.zeros((5, 120), np.uint8)}, "m.W_q: found shape [5, 120]; expected 1, 2, 4 or 8 codes a byte of [48, 40]"),
        ({"nbits": np.array(8, np.int32)}, "m.W_q: found 4 bits by its shape; expected 8 bits, as nbits says"),
        ({"zero": np.zeros(120, np.float16)}, "m.zero: found shape [120]"),
    ],
)
def test_hqq_across_that_does_not_fit(changed: Arrays, said: str) -> None:
    known, stored, _, _ = packed("hqq across")
    (problem,) = known.check("m", held({**stored, **changed}), {})
    assert str(problem).startswith(said)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"weight": np.zeros((96, 10), np.int8)},
            "m.weight: found int8 [96, 10]; expected int8 [in-features, out-features] in mult",
        ),
        ({"weight": np.zeros((128, 9), np.int8)}, "m.weight: found int8 [128, 9]; "),
        ({"weight_scales": np.ones(9, np.float16)}, "m.weight_scales: found shape [9]; expected [10]"),
        ({"weight_scales": np.ones((1, 10), np.float16)}, "m.weight_scales: found shape [1, 10]; expected [10]"),
    ],
)
def test_eetq_that_does_not_fit(changed: Arrays, said: str) -> None:
    stored = {**KINDS["eetq"][1].quantizer("m", weight((10, 128))).parameters, **changed}
    known = format_of(held(stored))
    assert known is not None
    (problem,) = known.check("m", known.arrange(held(stored)), {})
    assert str(problem).startswith(said)


@pytest.mark.parametrize(
    ("scales", "shape"),
    [
        ((2, 3, 4), (2, 40, 56)),
        ((2, 1, 1), (2, 40, 56)),
        ((2,), (2, 40, 56)),
        ((), (40, 56)),
    ],
    ids=["tiles", "one a matrix", "a list of them", "one"],
)
@examples(12)
@given(data=st.data(), chunk=st.sampled_from(CHUNKS))
def test_any_part_of_a_stack(scales: tuple[int, ...], shape: tuple[int, ...], data: st.DataObject, chunk: int) -> None:
    random = np.random.default_rng(3)
    stored = {
        "weight": random.normal(0, 1, shape).astype(ml_dtypes.float8_e4m3fn),
        "weight_scale_inv": np.asarray(random.uniform(0.5, 2, scales), np.float32),
    }
    known = format_of(held(stored))
    assert known is not None
    tensors = known.arrange(held(stored))
    assert known.check("m", tensors, {"weight_block_size": [16, 16]}) == []
    spread = stored["weight_scale_inv"].reshape(scales if len(scales) == 3 else (*shape[:-2], 1, 1))
    if scales == (2, 3, 4):
        spread = spread.repeat(16, 1).repeat(16, 2)[:, : shape[1], : shape[2]]
    expected = stored["weight"].astype(np.float32) * np.broadcast_to(spread, shape)
    arranged = {key: np.asarray(tensor.block(tuple((0, n) for n in tensor.shape))) for key, tensor in tensors.items()}
    found = known.unpack(opened(arranged, chunk), {"weight_block_size": [16, 16]})["weight"]
    region = data.draw(regions(shape))
    np.testing.assert_array_equal(part(found, region), expected[slices(region)])
