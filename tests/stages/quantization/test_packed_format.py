"""Packed formats: the axes that each gives are true, so that a fused module can be taken apart before it is unpacked."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.model.quantization import SQ_OF_CODES
from pipeline.tensor.names import split_names
from pipeline.tensor.placement import whole as whole_region
from pipeline.tensor.tensors import AXES, LazyTensor
from stages.quantization.cache_scales import divided
from stages.quantization.packed_format import PackedParameter
from stages.quantization.sources import formats
from stages.unpack import axes, check, format_of
from tests.support import quantized_checkpoints as source
from tests.support.lazy import held, values
from tests.support.packed_tensors import opened

KINDS = source.formats()
JOINT = ("fp8 block of 96", "bitsandbytes nf4 nested", "hqq", "hqq 2 bits", "hqq across", "hqq across, 8 bits")
WEIGHT = np.random.default_rng(8).normal(0, 0.1, (256, 256)).astype(np.float32)
MODULE = "model.layers.0.self_attn.v_proj"


def values_of(tensor: LazyTensor) -> np.ndarray:
    return np.asarray(tensor.block(whole_region(tensor.shape)))


def first_half(array: np.ndarray, known: tuple[str, ...]) -> np.ndarray:
    """The first half of an array on its axis `out`; all of what stands for all rows."""
    if "out" not in known or array.ndim <= known.index("out") or array.shape[known.index("out")] == 1:
        return array
    axis = known.index("out")
    return np.ascontiguousarray(np.take(array, range(array.shape[axis] // 2), axis))


# Half of the rows is half a tile, or has no scales of scales, or no bytes, of its own.
@pytest.mark.parametrize("name", [name for name in KINDS if name not in JOINT])
def test_half_of_the_rows_unpacked_is_half_of_what_is_unpacked(name: str) -> None:
    kind = KINDS[name]
    everything = {key: np.ascontiguousarray(array) for key, array in kind.quantizer(MODULE, WEIGHT).parameters.items()}
    stored, _ = divided(everything)  # the scales of a cache are of no format
    packing = format_of(held(stored))
    assert packing is not None
    stored = {key: values_of(tensor) for key, tensor in packing.arrange(held(stored)).items()}
    default = PackedParameter(("out",))
    half = {key: first_half(array, packing.parameters.get(key, default).axes) for key, array in stored.items()}
    whole, part = (packing.unpack(opened(given), kind.settings) for given in (stored, half))
    assert part.keys() == whole.keys()
    for key, array in whole.items():
        np.testing.assert_array_equal(values(part[key]), first_half(values(array), AXES[key]))
    assert any(values(part[key]).shape != values(whole[key]).shape for key in whole)


@pytest.mark.parametrize("name", KINDS)
def test_tensorrt_llms_algorithm(name: str) -> None:
    kind = KINDS[name]
    tensors = held(kind.quantizer(MODULE, WEIGHT).parameters)
    packing = format_of(tensors)
    assert packing is not None
    algorithm, group = packing.native({MODULE: tensors}, kind.settings)
    assert algorithm == (kind.algorithm or None)
    assert bool(group) == any(name in kind.algorithm for name in ("GPTQ", "AWQ", "NVFP4"))
    if group:
        groups = tensors["scales"].shape[0] if "scales" in tensors else tensors["weight_scale"].shape[1]
        assert group * groups == WEIGHT.shape[1]


def test_axes_by_module() -> None:
    stored = {f"{MODULE}.{key}": array for key, array in KINDS["gptq"].quantizer(MODULE, WEIGHT).parameters.items()}
    found = check(split_names(held({**stored, "model.norm.weight": np.ones(4, np.float16)})), KINDS["gptq"].settings)
    assert found.problems == []
    known = axes(found.formats)
    assert known.keys() == {MODULE}
    assert known[MODULE] == {"qweight": ("in", "out"), "qzeros": ("group", "out"), "scales": ("group", "out"), "g_idx": ("in",)}


def test_what_is_left_out_or_may_be_is_said_once() -> None:
    described = [held for each in formats() for held in each.parameters.values()]
    assert all(not (held.becomes and held.dropped) for held in described)
    assert {held.becomes for held in described} - {""} <= AXES.keys()


def test_what_a_format_says_that_it_keeps_is_what_its_modules_are_kept_as() -> None:
    """By the checkpoints of all kinds: no other algorithm, and none that is never met."""
    found: dict[str, set[str]] = {each.name: set() for each in formats()}
    for kind in KINDS.values():
        tensors = held(kind.quantizer(MODULE, WEIGHT).parameters)
        packing = format_of(tensors)
        assert packing is not None
        algorithm, _ = packing.native({MODULE: tensors}, kind.settings)
        found[packing.name] |= {algorithm} if algorithm else set()
    # One of integer codes is kept as 8-bit activations take it where that is asked for alone.
    assert found == {each.name: set(each.keeps) - {SQ_OF_CODES} for each in formats()}
    assert [each.name for each in formats() if SQ_OF_CODES in each.keeps] == ["compressed-tensors"]
    assert all(each.proof for each in formats())
    assert not [each.name for each in formats() if each.numbers and each.keeps]
