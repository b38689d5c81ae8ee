"""Ranks, their places and their layers, against torch and the checkpoint format's own formulas.

Facts: docs/format/checkpoint.md, sections 1 and 6.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.model.parallelism import Parallelism

sizes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))


@given(st.integers(1, 12), st.integers(1, 100))
def test_layers_are_torch_tensor_split(stages: int, layers: int) -> None:
    expected = [part.tolist() for part in torch.tensor_split(torch.arange(layers), stages)]
    assert [list(Parallelism(pp_size=stages).layers(n, layers)) for n in range(stages)] == expected


@given(sizes)
def test_ranks_are_numbered_by_stage_and_experts_inside_it(case: tuple[int, int, int]) -> None:
    moe_tp, moe_ep, pp = case
    tp = moe_tp * moe_ep
    ranks = Parallelism(tp, pp, 1, moe_tp, moe_ep).ranks()
    assert [rank.index for rank in ranks] == list(range(tp * pp))
    for rank in ranks:
        assert rank.index == rank.pp * tp + rank.tp
        assert rank.tp == rank.moe_tp * moe_ep + rank.moe_ep
        assert (rank.tp < tp, rank.pp < pp, rank.moe_ep < moe_ep) == (True, True, True)
    # Every share of every expert group is held once a stage.
    assert len({(rank.pp, rank.moe_tp, rank.moe_ep) for rank in ranks}) == tp * pp


def test_context_parallelism_multiplies_the_world_but_not_the_files() -> None:
    parallelism = Parallelism(tp_size=2, pp_size=3, cp_size=4)
    assert parallelism.world_size == 24
    assert len(parallelism.ranks()) == 6


@pytest.mark.parametrize(
    ("tp", "moe_tp", "moe_ep", "expected"),
    [(8, 0, 0, (8, 1)), (8, -1, -1, (8, 1)), (8, -1, 2, (4, 2)), (8, 2, -1, (2, 4)), (8, 4, 2, (4, 2)), (1, 0, 0, (1, 1))],
)
def test_expert_sizes_that_were_not_given(tp: int, moe_tp: int, moe_ep: int, expected: tuple[int, int]) -> None:
    resolved = Parallelism.resolve(tp, 1, 1, moe_tp, moe_ep)
    assert (resolved.moe_tp_size, resolved.moe_ep_size) == expected


@given(st.integers(1, 16), st.integers(-1, 16), st.integers(-1, 16))
def test_sizes_that_were_given_are_kept(tp: int, moe_tp: int, moe_ep: int) -> None:
    resolved = Parallelism.resolve(tp, 1, 1, moe_tp, moe_ep)
    assert moe_tp in (-1, 0, resolved.moe_tp_size)
    assert moe_ep in (-1, 0, resolved.moe_ep_size)
    assert min(resolved.moe_tp_size, resolved.moe_ep_size) >= 1


def test_mapping_has_the_keys_that_every_version_accepts() -> None:
    assert Parallelism(4, 2, 1, 2, 2).mapping() == {
        "world_size": 8,
        "gpus_per_node": 8,
        "cp_size": 1,
        "tp_size": 4,
        "pp_size": 2,
        "moe_tp_size": 2,
        "moe_ep_size": 2,
    }
