"""rename: operations have inverses and run block by block; a norm plus one is rounded as torch rounds it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.model.family_rows import RenameRow
from pipeline.model.operations import OPERATIONS
from pipeline.model.tables import layout
from pipeline.tensor.names import TensorName
from pipeline.tensor.placement import slices
from stages.cast import cast
from stages.read import read
from stages.rename import Matches, Renamed, operate, rename
from tests.support.lazy import block, held, values
from tests.support.rank_oracle import model_of
from tests.support.strategies import regions

rows = st.tuples(st.integers(1, 5), st.sampled_from([2, 4, 6, 8]))
each_operation = pytest.mark.parametrize("operation", OPERATIONS)


@each_operation
@given(data=st.data(), case=rows, columns=st.sampled_from([(), (1,), (3,)]))
def test_operations_undo_and_are_undone(
    operation: str, data: st.DataObject, case: tuple[int, int], columns: tuple[int, ...]
) -> None:
    groups, period = case
    array = data.draw(hnp.arrays(np.int16, (groups * period, *columns)))
    pair, before = OPERATIONS[operation], array.copy()
    once = pair.forward(array, period)
    if pair.inverse is None:
        assert np.allclose(pair.forward(once, period), once, rtol=1e-6)
    else:
        assert np.array_equal(pair.inverse(once, period), array)
        assert np.array_equal(pair.forward(pair.inverse(array, period), period), array)
    assert np.array_equal(array, before), "a mapped file must not be written to"


@each_operation
@given(data=st.data(), case=rows)
def test_operations_run_block_by_block(operation: str, data: st.DataObject, case: tuple[int, int]) -> None:
    groups, period = case
    array = np.arange(groups * period * 3).reshape(groups * period, 3)
    expected = OPERATIONS[operation].forward(array, period)
    region = data.draw(regions(array.shape))
    assert np.array_equal(operate(block(array), operation, period).read(region), expected[slices(region)])


@each_operation
@pytest.mark.parametrize("block_bytes", [1, 400, 10**6])
def test_operations_do_not_see_chunks(operation: str, block_bytes: int) -> None:
    model = model_of(6, 6, 8, 12, 4, 8, 1)
    array = np.random.default_rng(0).standard_normal((48, 12))
    row = RenameRow(("t",), operation, "head_size")
    source, target = TensorName("s", "weight"), TensorName("t", "weight")
    matches = Matches({target: Renamed(source, row)}, {}, {}, {}, ())
    result = rename(read(held({source: array}), block_bytes, 8), matches, model)
    assert np.array_equal(values(result[target]), OPERATIONS[operation].forward(array, 8))


@given(rows)
def test_unpermute_rope_is_the_inverse_of_llama_cpp(case: tuple[int, int]) -> None:
    heads, head_size = case
    ours = OPERATIONS["unpermute_rope"].forward(np.arange(heads * head_size), head_size)
    for head in range(heads):
        for half in range(2):
            for i in range(head_size // 2):
                # llama.cpp puts frequency i's two rows side by side; Hugging Face keeps them half a head apart.
                assert ours[head * head_size + half * (head_size // 2) + i] == head * head_size + 2 * i + half


# Norms plus one.

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INTEGERS = {2: torch.int16, 4: torch.int32}


def samples(dtype: np.dtype) -> np.ndarray:
    """Every value of a 16-bit type; of float32, the same with other low bits."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    if dtype.itemsize == 2:
        return patterns.view(dtype)
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    return ((patterns.astype(np.uint32) << 16)[:, None] | low).ravel().view(dtype)


def plus_one(array: np.ndarray, wanted: str) -> np.ndarray:
    """torch's: bfloat16 is widened first, float16 is not; one cast at the end."""
    kind = array.dtype.name
    signed = torch.from_numpy(array.view(f"i{array.dtype.itemsize}").copy()).view(TORCH[kind])
    result = ((signed.float() if kind == "bfloat16" else signed) + 1.0).to(TORCH[wanted])
    return result.view(INTEGERS[result.itemsize]).numpy()


@pytest.mark.parametrize("wanted", TORCH)
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16], ids=lambda dtype: dtype.name)
def test_a_norm_plus_one_is_rounded_where_torch_rounds_it(dtype: np.dtype, wanted: str) -> None:
    given = samples(dtype)
    source, name = TensorName("s", "weight"), TensorName("transformer.ln_f", "weight")
    matches = Matches({name: Renamed(source, RenameRow((name.module,), "add_one"))}, {}, {}, {}, ())
    renamed = rename(read(held({source: given}), 1 << 14, 1), matches, model_of(1, 1, 2, 2, 2, 2, 1))
    assert renamed[name].dtype == (np.float32 if dtype == BFLOAT16 else dtype)
    with np.errstate(invalid="ignore"):  # NaNs
        ours = values(cast(renamed, layout("gemma"), wanted)[name])
        missing = np.isnan(given.astype(np.float64))
    assert ours.dtype.name == wanted
    assert np.array_equal(np.isnan(ours.astype(np.float64)), missing)
    theirs = plus_one(given, wanted)
    assert np.array_equal(ours.view(theirs.dtype)[~missing], theirs[~missing])


def test_a_half_is_added_to_as_a_half() -> None:
    """Its sum is rounded twice on the way to bfloat16, which is seen in thousands of values."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    twice = OPERATIONS["add_one"].forward(halves, 1).astype(BFLOAT16)
    once = (halves.astype(np.float32) + 1).astype(BFLOAT16)
    assert np.array_equal(twice.view(np.int16), plus_one(halves, "bfloat16"))
    assert np.count_nonzero(twice != once) > 1000


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16], ids=lambda dtype: dtype.name)
def test_subtracting_undoes_adding_but_for_what_was_rounded(dtype: np.dtype) -> None:
    pair, given = OPERATIONS["add_one"], samples(dtype)
    with np.errstate(invalid="ignore"):
        size = np.abs(given.astype(np.float64))
    given, size = given[size < 2**15], size[size < 2**15]
    back = pair.inverse(pair.forward(given, 1), 1)
    assert back.dtype == pair.dtype(dtype)
    error = np.abs(back.astype(np.float64) - given.astype(np.float64))
    assert np.all(error <= (1 + size) * float(np.finfo(back.dtype).eps))
    # float32 holds a bfloat16 plus one as it is, but for tiny weights.
    assert dtype != BFLOAT16 or np.all(error[size > 2**-15] == 0)
