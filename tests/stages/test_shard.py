"""shard: gather(shard(x)) == x; each rank's tensors are tiled exactly, and are those of the checkpoint format."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from pipeline.checks import parameters
from pipeline.parallelism import Parallelism
from pipeline.placement import RankTensor, slices
from stages.shard import rank_tensors, shard
from tests.rank_oracle import Arrays, Case, cases, model_of, oracle, sharding_of, sources


def tensors_of(case: Case) -> tuple[RankTensor, ...]:
    model = case.sharding.model
    wanted = {name: set(parameters(module, model)) for name, module in case.sharding.layout.modules.items()}
    return rank_tensors(wanted, case.sharding, "bfloat16")


def scatter(case: Case, given: Arrays) -> list[Arrays]:
    """Every rank's tensors, by placements; -1 where nothing is placed."""
    dtype = next(iter(given.values())).dtype
    ranks: list[Arrays] = [{} for _ in case.sharding.parallelism.ranks()]
    for tensor in tensors_of(case):
        ranks[tensor.rank][tensor.name] = np.full(tensor.shape, -1, dtype=dtype)
    for name, array in given.items():
        for placement in shard(name, case.sharding):
            target = ranks[placement.rank][placement.tensor][slices(placement.target)]
            target[...] = 0 if placement.source is None else array[slices(placement.source)].reshape(target.shape)
    return ranks


@settings(max_examples=80)
@given(cases())
def test_every_rank_is_what_the_format_says(case: Case) -> None:
    given = sources(case)
    for number, ours in enumerate(scatter(case, given)):
        theirs = oracle(case, given, number)
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            assert ours[name].shape == expected.shape, name
            assert np.array_equal(ours[name], expected), name


@settings(max_examples=80)
@given(cases())
def test_placements_tile_every_tensor_exactly(case: Case) -> None:
    counts = {(tensor.rank, tensor.name): np.zeros(tensor.shape, dtype=int) for tensor in tensors_of(case)}
    for name in sources(case):
        for placement in shard(name, case.sharding):
            counted = counts[placement.rank, placement.tensor]
            assert all(0 <= start < stop <= n for (start, stop), n in zip(placement.target, counted.shape, strict=True))
            counted[slices(placement.target)] += 1
    for key, counted in counts.items():
        assert (counted == 1).all(), key


@settings(max_examples=80)
@given(cases())
def test_what_is_gathered_is_what_was_sharded(case: Case) -> None:
    given = sources(case)
    ranks = scatter(case, given)
    for name, array in given.items():
        gathered = np.full(array.shape, -1)
        for placement in shard(name, case.sharding):
            if placement.source is None:
                continue
            part = ranks[placement.rank][placement.tensor][slices(placement.target)]
            place = gathered[slices(placement.source)]
            # Ranks that hold the same values agree.
            assert np.isin(place, [-1, *part.ravel()]).all()
            place[...] = part.reshape(place.shape)
        assert np.array_equal(gathered, array), name


@settings(max_examples=30)
@given(cases())
def test_shard_commutes_with_casting(case: Case) -> None:
    given = {name: np.sin(array.astype(np.float32)) for name, array in sources(case).items()}
    before = scatter(case, {name: array.astype(np.float16) for name, array in given.items()})
    after = scatter(case, given)
    for first, second in zip(before, after, strict=True):
        assert all(first[name].tobytes() == second[name].astype(np.float16).tobytes() for name in first)


def test_a_router_is_float32_and_all_else_of_the_target() -> None:
    model = model_of(4, 2, 4, 8, 8, 10, 1, num_experts=2)
    for tensor in tensors_of(Case(sharding_of(model, Parallelism(2, moe_tp_size=2)))):
        assert tensor.dtype == ("float32" if "router" in tensor.name else "bfloat16")


def test_a_name_that_the_layout_does_not_have() -> None:
    with pytest.raises(KeyError):
        shard("transformer.layers.0.mlp.router.weight", sharding_of(model_of(2, 2, 2, 4, 4, 4, 1), Parallelism()))
