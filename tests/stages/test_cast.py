"""cast: torch's `.to(dtype)`, bit for bit, over all 16-bit patterns, and those of 32 and 64 bits that rounding can go wrong at."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from pipeline.model.tables import layout
from pipeline.tensor.names import TensorName, split_name
from pipeline.tensor.placement import slices
from stages.cast import as_type, cast, target_dtype
from stages.read import read
from tests.support.lazy import block, held, values

NUMPY = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TYPES = NUMPY | {"float64": np.dtype(np.float64)}  # of sources
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PAIRS = [(a, b) for a in TYPES for b in NUMPY]


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


def is_nan(array: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return array != array


def samples(kind: str) -> np.ndarray:
    """Every value of a 16-bit type; of float32, those around every halfway point of both 16-bit types, and random ones; of float64,
    some of these, and those beside each that float32 does not tell from it.
    """
    if kind == "float64":
        with np.errstate(invalid="ignore"):
            wide = samples("float32")[::7].astype(np.float64)
            near = [wide * (1 + step) for step in (0, 2**-40, -(2**-40))]
        return np.concatenate([[1 + 2**-11 + 2**-40, 1 + 2**-8 + 2**-40], *near])
    if kind != "float32":
        return np.arange(1 << 16, dtype=np.uint16).view(NUMPY[kind])
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    edges = np.append((halves[1:] + halves[:-1]) / 2, np.float32(65520))  # 65520: halfway from float16's largest to infinity
    near = np.concatenate([halves, edges, *(np.nextafter(edges, np.float32(to)) for to in (-np.inf, np.inf))])
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    ties = ((np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] | low).ravel()
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    return np.concatenate([near, -near, ties.view(np.float32), random.view(np.float32)])


def by_torch(array: np.ndarray, kind: str, wanted: str) -> np.ndarray:
    integers = {"float32": torch.int32, "float16": torch.int16, "bfloat16": torch.int16}
    signed = torch.from_numpy(array.view(f"i{array.dtype.itemsize}").copy()).view(getattr(torch, kind))
    return signed.to(TORCH[wanted]).view(integers[wanted]).numpy().view(NUMPY[wanted])


@pytest.mark.parametrize(("kind", "wanted"), PAIRS)
def test_values_are_those_of_torch(kind: str, wanted: str) -> None:
    given = samples(kind)
    missing = is_nan(given)
    ours, theirs = np.asarray(as_type(block(given), NUMPY[wanted])), by_torch(given, kind, wanted)
    assert ours.dtype == NUMPY[wanted]
    assert np.array_equal(bits(ours)[~missing], bits(theirs)[~missing])
    # What a NaN's spare bits become is nobody's promise; that it stays one is.
    assert np.array_equal(is_nan(ours), missing)


@pytest.mark.parametrize(("kind", "wanted"), PAIRS)
def test_a_cast_commutes_with_slices(kind: str, wanted: str) -> None:
    given = np.random.default_rng(1).standard_normal((5, 6)).astype(TYPES[kind])
    whole = np.asarray(as_type(block(given), NUMPY[wanted]))
    for region in (((0, 5), (0, 6)), ((1, 3), (2, 5)), ((4, 5), (0, 1))):
        part = as_type(block(given), NUMPY[wanted]).read(region)
        assert part.tobytes() == whole[slices(region)].tobytes()


@pytest.mark.parametrize("wanted", NUMPY)
def test_a_router_is_float32_whatever_the_target(wanted: str) -> None:
    router, dense = (split_name(f"transformer.layers.0.mlp.{module}.weight") for module in ("router", "proj"))
    given = {name: np.random.default_rng(2).standard_normal((4, 8)).astype(ml_dtypes.bfloat16) for name in (router, dense)}
    target = layout("moe_decoder")
    assert target_dtype(router, target, wanted) == "float32"
    result = cast(read(held(given), 1 << 20, 1), target, wanted)
    assert result[router].dtype == np.float32
    assert values(result[router]).tobytes() == given[router].astype(np.float32).tobytes()
    assert values(result[dense]).tobytes() == by_torch(given[dense], "bfloat16", wanted).tobytes()


def test_arrays_that_have_the_type_are_the_same_objects() -> None:
    name = TensorName("transformer.ln_f", "weight")
    tensors = read(held({name: np.ones(4, dtype=np.float16)}), 1 << 20, 1)
    assert cast(tensors, layout("decoder"), "float16")[name] is tensors[name]
