"""The factors of a stack's parts as one array: each rank has the same values, in one run of bytes of each expert."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline import convert
from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import Block
from stages.quantization.joined import side_by_side
from tests.support import quantized_checkpoints as source
from tests.support.quantized_checkpoints import LLAMA, MIXTRAL
from tests.support.rank_matrices import FORMATS

FACTORS = ("weights_scaling_factor", "zero")


class Values(Block):
    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def read(self, region: Region) -> np.ndarray:
        return self.values[tuple(slice(*interval) for interval in region)]


@pytest.mark.parametrize("front", [(), (2,)])
@pytest.mark.parametrize("segments", [1, 2, 4])
def test_a_segment_has_its_share_of_each_part(segments: int, front: tuple[int, ...]) -> None:
    up, gate = (np.random.default_rng(n).standard_normal((*front, 3, 8)) for n in range(2))
    shape = (*front, 3, 16)
    parts = {"part0": Values(up), "part1": Values(gate)}
    whole = side_by_side(tuple((0, n) for n in shape), segments, **parts)
    shares = [
        np.concatenate(pair, axis=-1) for pair in zip(*(np.split(part, segments, axis=-1) for part in (up, gate)), strict=True)
    ]
    assert np.array_equal(whole, np.concatenate(shares, axis=-1))
    some = (*((0, n) for n in front), (1, 3), (3, 13))
    assert np.array_equal(side_by_side(some, segments, **parts), whole[..., 1:3, 3:13])


@pytest.mark.parametrize(("tp_size", "moe_ep_size"), [(1, 1), (2, 1), (4, 2)])
def test_an_expert_s_factors_are_one_run(tp_size: int, moe_ep_size: int, tmp_path: Path) -> None:
    source.write(tmp_path / "model", MIXTRAL, FORMATS["gptq asymmetric"])
    convert(
        model_dir=tmp_path / "model", output_dir=tmp_path / "out", tp_size=tp_size, moe_ep_size=moe_ep_size, scheduler="threads"
    )
    sums = json.loads((tmp_path / "out" / "headrace.json").read_text())["xxh3"]
    experts = MIXTRAL["num_local_experts"] // moe_ep_size
    assert len(sums) == tp_size
    for tensors in sums.values():
        for name in FACTORS:
            assert len(tensors[f"transformer.layers.0.mlp.fc.{name}"]) == experts


def test_a_dense_model_s_factors_are_as_they_were(tmp_path: Path) -> None:
    source.write(tmp_path / "model", LLAMA, FORMATS["gptq asymmetric"])
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads")
    sums = json.loads((tmp_path / "out" / "headrace.json").read_text())["xxh3"]["rank0.safetensors"]
    assert len(sums["transformer.layers.0.attention.qkv.zero"]) > len(sums["transformer.layers.0.attention.dense.zero"]) == 1
