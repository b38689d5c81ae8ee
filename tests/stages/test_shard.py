"""shard: gather(shard(x)) == x; each rank's tensors are tiled exactly, and are those of the checkpoint format.

Packed tensors too: each rank's is what is made of its own share of the numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.model.dtypes import BY_TARGET, of_numpy
from pipeline.model.parallelism import Parallelism
from pipeline.model.quantization import FP8_ROWWISE, Quantization
from pipeline.model.tables import Slot
from pipeline.tensor.names import TensorName, split_name, split_names
from pipeline.tensor.placement import Placement, RankTensor, slices
from pipeline.tensor.tensors import Parameter, plain
from stages.quantization.alignment import alignment
from stages.quantization.modules import linear
from stages.quantize import quantize
from stages.shard import rank_tensors, shard
from tests.support.examples import examples
from tests.support.kernel_oracle import arrange, order_of
from tests.support.lazy import texts, values
from tests.support.packed_tensors import opened
from tests.support.rank_oracle import Arrays, Case, aligned_cases, cases, model_of, oracle, sharding_of, sources

FP16 = np.dtype(np.float16)
Tensors = Mapping[TensorName, np.ndarray]


def dense(case: Case, names: Iterable[TensorName]) -> Iterator[tuple[TensorName, Slot, Parameter]]:
    """Renamed tensors that are not quantized: their slots, and how they lie there."""
    for name in names:
        slot = case.sharding.layout.find(name.module)
        assert slot is not None, name
        yield name, slot, plain(name.parameter, matrix=bool(slot.module.in_))


def placements_of(case: Case, names: Iterable[TensorName]) -> dict[TensorName, tuple[Placement, ...]]:
    return {name: shard(name, slot, parameter, case.sharding) for name, slot, parameter in dense(case, names)}


def tensors_of(case: Case, names: Iterable[TensorName]) -> set[RankTensor]:
    """Every rank's tensors: the parts and experts that share one say the same of it."""
    return {tensor for name, slot, p in dense(case, names) for tensor in rank_tensors(name, slot, p, case.sharding, "bfloat16")}


def scatter(case: Case, given: Tensors) -> list[Arrays]:
    """Every rank's tensors, by placements; -1 where nothing is placed."""
    dtype = next(iter(given.values())).dtype
    ranks: list[Arrays] = [{} for _ in case.sharding.parallelism.ranks()]
    for tensor in tensors_of(case, given):
        assert tensor.name not in ranks[tensor.rank], "one tensor of a name"
        ranks[tensor.rank][tensor.name] = np.full(tensor.shape, -1, dtype=dtype)
    place(ranks, given, placements_of(case, given))
    return ranks


def place(ranks: list[Arrays], given: Tensors, placements: Mapping[TensorName, tuple[Placement, ...]]) -> None:
    for name, array in given.items():
        for placement in placements[name]:
            target = ranks[placement.rank][placement.tensor][slices(placement.target)]
            target[...] = 0 if placement.source is None else array[slices(placement.source)].reshape(target.shape)


@examples(80)
@given(cases())
def test_every_rank_is_what_the_format_says(case: Case) -> None:
    given = split_names(sources(case))
    for number, ours in enumerate(scatter(case, given)):
        theirs = oracle(case, texts(given), number)
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            assert ours[name].shape == expected.shape, name
            assert np.array_equal(ours[name], expected), name


def tile_exactly(tensors: set[RankTensor], placements: Mapping[TensorName, tuple[Placement, ...]]) -> None:
    """Each element of each rank's tensor, as it is stored, is in just one placement."""
    counts = {(tensor.rank, tensor.name): np.zeros((tensor.stored or (tensor.shape,))[0], dtype=int) for tensor in tensors}
    for found in placements.values():
        for placement in found:
            counted = counts[placement.rank, placement.tensor]
            assert all(0 <= start < stop <= n for (start, stop), n in zip(placement.target, counted.shape, strict=True))
            counted[slices(placement.target)] += 1
    for key, counted in counts.items():
        assert (counted == 1).all(), key


@examples(80)
@given(cases())
def test_placements_tile_every_tensor_exactly(case: Case) -> None:
    given = split_names(sources(case))
    tile_exactly(tensors_of(case, given), placements_of(case, given))


@examples(80)
@given(cases())
def test_what_is_gathered_is_what_was_sharded(case: Case) -> None:
    given = split_names(sources(case))
    ranks, placements = scatter(case, given), placements_of(case, given)
    for name, array in given.items():
        gathered = np.full(array.shape, -1)
        for placement in placements[name]:
            if placement.source is None:
                continue
            part = ranks[placement.rank][placement.tensor][slices(placement.target)]
            home = gathered[slices(placement.source)]
            # Ranks that hold the same values agree.
            assert np.isin(home, [-1, *part.ravel()]).all()
            home[...] = part.reshape(home.shape)
        assert np.array_equal(gathered, array), name


@examples(30)
@given(cases())
def test_shard_commutes_with_casting(case: Case) -> None:
    given = {name: np.sin(array.astype(np.float32)) for name, array in split_names(sources(case)).items()}
    before = scatter(case, {name: array.astype(np.float16) for name, array in given.items()})
    after = scatter(case, given)
    for first, second in zip(before, after, strict=True):
        assert all(first[name].tobytes() == second[name].astype(np.float16).tobytes() for name in first)


def test_a_tensor_has_the_type_of_its_array_or_the_one_that_its_bytes_pass_for() -> None:
    sharding = sharding_of(model_of(4, 2, 4, 8, 8, 10, 1), Parallelism(2, moe_tp_size=2))
    slot = sharding.layout.find("transformer.layers.0.mlp.proj")
    assert slot is not None
    half = Fraction(1, 2)
    packed = Parameter(axes=(("out", half), ("in", Fraction(2))), header=(("in", Fraction(1)), ("out", half)), dtype="int8")
    for parameter, shape, dtype, stored in (
        (plain("weight"), (8, 4), "float32", (8, 4)),
        (packed, (4, 4), "int8", (4, 8)),
    ):
        for rank, tensor in enumerate(rank_tensors(TensorName("x", "weight"), slot, parameter, sharding, "float32")):
            assert (tensor.rank, tensor.name) == (rank, "transformer.layers.0.mlp.proj.weight")
            assert (tensor.shape, tensor.dtype, tensor.stored) == (shape, dtype, (stored, "float32"))


def test_an_axis_that_no_whole_number_of_elements_is_a_share_of() -> None:
    sharding = sharding_of(model_of(2, 2, 2, 6, 6, 4, 1), Parallelism(2, moe_tp_size=2))
    slot = sharding.layout.find("transformer.layers.0.mlp.fc")
    assert slot is not None
    with pytest.raises(ValueError, match="no whole number"):
        shard(TensorName("x", "weight"), slot, Parameter(axes=(("out", Fraction(1, 2)), ("in", Fraction(1)))), sharding)


# Numbers to codes: the targets that are quantized as each rank holds them.
ALGORITHMS = {"W8A16": 8, "W4A16": 4, FP8_ROWWISE: 0}


def entries_of(case: Case, given: Tensors, quantization: Quantization) -> dict[TensorName, Any]:
    return quantize(opened(given, 1 << 16), case.sharding, quantization, "float16")


@examples(60)
@given(aligned_cases(), st.sampled_from([*ALGORITHMS, "W4A16_GPTQ"]), st.sampled_from([80, 90, 100]))
def test_placements_tile_every_packed_tensor_exactly(case: Case, algorithm: str, sm: int) -> None:
    if algorithm == "W4A16_GPTQ" and case.stacked:
        algorithm = "W4A16"  # stacks come as numbers
    given = {name: np.broadcast_to(np.float16(1), array.shape) for name, array in split_names(sources(case)).items()}
    quantization = Quantization(algorithm, sm=sm, group_size=64)
    assert not alignment(case.sharding, quantization, (1,))
    entries = entries_of(case, given, quantization)
    placements = {name: shard(name, entry.slot, entry.parameter, case.sharding) for name, entry in entries.items()}
    tensors = {
        tensor
        for name, entry in entries.items()
        for tensor in rank_tensors(name, entry.slot, entry.parameter, case.sharding, of_numpy(entry.array.dtype).target)
    }
    assert len(tensors) == len({(tensor.rank, tensor.name) for tensor in tensors}), "parts and experts agree"
    tile_exactly(tensors, placements)
    for tensor in tensors:
        # The bytes pass for another shape and type, and are as many.
        assert tensor.stored is not None
        sizes = [np.prod(shape) * BY_TARGET[dtype].numpy.itemsize for shape, dtype in ((tensor.shape, tensor.dtype), tensor.stored)]
        assert sizes[0] == sizes[1], tensor.name


@examples(25)
@given(aligned_cases(small=True), st.sampled_from(list(ALGORITHMS)), st.sampled_from([80, 90, 100]), st.integers(0, 9))
def test_each_rank_has_what_is_made_of_its_own_share(case: Case, algorithm: str, sm: int, seed: int) -> None:
    """Quantizing, then splitting, is splitting, then quantizing: codes, their order, and scales, byte for byte."""
    random = np.random.default_rng(seed)
    given = {name: random.standard_t(3, array.shape).astype(FP16) for name, array in split_names(sources(case)).items()}
    entries = entries_of(case, given, Quantization(algorithm, sm=sm))
    ranks: list[Arrays] = [{} for _ in case.sharding.parallelism.ranks()]
    for name, entry in entries.items():
        for tensor in rank_tensors(name, entry.slot, entry.parameter, case.sharding, of_numpy(entry.array.dtype).target):
            ranks[tensor.rank][tensor.name] = np.zeros((tensor.stored or (tensor.shape,))[0], dtype=entry.array.dtype)
    placements = {name: shard(name, entry.slot, entry.parameter, case.sharding) for name, entry in entries.items()}
    place(ranks, {name: values(entry.array) for name, entry in entries.items()}, placements)
    for number, ours in enumerate(ranks):
        for name, share in oracle(case, texts(given), number).items():
            module, local = split_name(name)
            slot = case.sharding.layout.find(module)
            assert slot is not None
            if local == "weight" and linear(slot.module):
                codes, scales = by_rank(share, ALGORITHMS[algorithm], order_of(sm, slot.module.experts))
                assert ours[name].tobytes() == codes, name
                assert ours[f"{module}.per_channel_scale"].tobytes() == scales, name
            else:
                assert ours[name].tobytes() == share.tobytes(), name


def by_rank(share: np.ndarray, bits: int, layout: str) -> tuple[bytes, bytes]:
    """The bytes of a rank's own matrix, or stack of them, and of its scales, by the format's formulas."""
    matrices = share.reshape(-1, *share.shape[-2:]).astype(np.float32)
    largest = np.abs(matrices).max(axis=-1)
    if not bits:
        scales = np.maximum(largest / np.float32(448), np.float32(1 / (448 * 512)))
        codes = np.clip(matrices / scales[..., None], -448, 448).astype(ml_dtypes.float8_e4m3fn)
        return codes.tobytes(), scales.tobytes()
    top = 1 << (bits - 1)
    scales = largest / np.float32(top)
    quotients = (matrices / np.where(scales == 0, 1, scales)[..., None]).astype(np.float64)
    codes = np.clip(np.trunc(quotients + np.copysign(0.5, quotients)), -top, top - 1).astype(int)
    return b"".join(arrange(matrix, bits, layout) for matrix in codes), scales.astype(FP16).tobytes()


def test_a_name_that_the_layout_does_not_have() -> None:
    sharding = sharding_of(model_of(2, 2, 2, 4, 4, 4, 1), Parallelism())
    router = TensorName("transformer.layers.0.mlp.router", "weight")
    with pytest.raises(KeyError):
        quantize(opened({router: np.ones((2, 2))}), sharding, Quantization(), "float16")
