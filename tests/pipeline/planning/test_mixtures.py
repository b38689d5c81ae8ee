"""Planning a mixture of experts: what a plan takes grows with its tensors alone, and a wrong one of thousands is still named."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import dask.array as da
import pytest
from dask.highlevelgraph import HighLevelGraph

from benchmarks.models import make
from pipeline import plan
from pipeline.errors import BadInput
from pipeline.planning.make_plan import make_plan
from pipeline.planning.memory import ARRAY_BYTES, BASE_BYTES, MIB
from pipeline.planning.plans import Plan
from pipeline.tensor.arrays import BlockArray, SmallTask
from tests.support.places import ROOT

EXPERTS = 32
SIZES = {
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 256,
    "num_experts": EXPERTS,
}
TARGETS: dict[str, dict[str, Any]] = {
    "dense": {},
    "cast": {"dtype": "float16"},
    "int8": {"use_weight_only": True},
    "two": {"target": [{"output_dir": "a", "use_weight_only": True}, {"output_dir": "b"}]},
}
# Arrays that a tensor may be on its way to all targets: as read, cast, and for each target codes and scales.
ARRAYS_A_TENSOR = {"dense": 1, "cast": 2, "int8": 3, "two": 3}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Mixtures by their number of layers."""
    places = {layers: tmp_path_factory.mktemp(f"layers{layers}") for layers in (2, 4, 8)}
    for layers, place in places.items():
        make(place, "235B", layers=layers, sparse=True, **SIZES)
    return places


def planned(model: Path, target: str) -> Plan:
    options = dict(TARGETS[target])
    if "target" in options:
        options["target"] = [
            {**each, "output_dir": model / each["output_dir"], "tp_size": 2, "moe_ep_size": 2} for each in options["target"]
        ]
    else:
        options |= {"output_dir": model / "out", "tp_size": 2, "moe_ep_size": 2}
    return plan(model_dir=model, **options)


@pytest.mark.parametrize("target", TARGETS)
def test_no_dask_array_is_made_and_few_of_our_own(models: dict[int, Path], target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, int] = {"dask": 0, "graphs": 0, "ours": 0, "tasks": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            made[name] += 1
            return function(*arguments, **keywords)

        return call

    monkeypatch.setattr(da.Array, "__new__", counted("dask", da.Array.__new__))
    monkeypatch.setattr(HighLevelGraph, "__init__", counted("graphs", HighLevelGraph.__init__))
    monkeypatch.setattr(BlockArray, "__init__", counted("ours", BlockArray.__init__))
    monkeypatch.setattr(SmallTask, "__new__", counted("tasks", SmallTask.__new__))
    counts = []
    for layers, model in models.items():
        made["ours"] = 0
        tensors = len(planned(model, target).source.tensors)
        assert made["ours"] <= ARRAYS_A_TENSOR[target] * tensors + 2 * layers  # routers have a type of their own
        counts.append(made["ours"])
    assert (made["dask"], made["graphs"], made["tasks"]) == (0, 0, 0)
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0]) > 0
    # The counters count: a plan's graph is made of small tasks, and an array is a Dask array when it is asked to be one.
    found = planned(models[2], target)
    assert len(found.dask) > 0
    found.phases[-1].stores[0].arrays[0].to_dask()
    assert made["dask"] == 1
    assert made["tasks"] > 0
    assert made["graphs"] > 1


def peak_bytes(model: Path, target: str) -> int:
    """The most that Python's objects take while a plan is made, the plan included."""
    tracemalloc.start()
    try:
        found = planned(model, target)
        assert found.tasks
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_plan_takes_grows_with_the_tensors_and_is_projected(models: dict[int, Path], target: str) -> None:
    planned(models[2], target)  # imports and caches
    two, four, eight = (peak_bytes(model, target) for model in models.values())
    per_layer = (eight - four) / 4
    assert per_layer == pytest.approx((four - two) / 2, rel=0.5)
    # A table of kinds that does not grow aside: less than what the plan projects for the arrays, which a run takes too.
    tensors = 3 * EXPERTS + 9
    assert per_layer < ARRAYS_A_TENSOR[target] * tensors * ARRAY_BYTES
    assert per_layer / tensors < 5 << 10
    budgets = [planned(model, target).budget.peak_bytes for model in models.values()]
    assert budgets[2] - budgets[1] >= eight - four


def test_the_graph_has_tasks_by_bytes_and_not_by_tensors(models: dict[int, Path]) -> None:
    for model in models.values():
        found = planned(model, "int8")
        assert found.tasks <= 2  # all tensors together are a few MB
        assert len(found.dask.to_dict()) <= 5 * found.tasks + 1


@pytest.mark.parametrize("target", ["dense", "int8"])
@pytest.mark.parametrize("wrong", ["shape", "type", "missing"])
def test_a_wrong_tensor_of_one_expert_is_named(models: dict[int, Path], target: str, wrong: str, tmp_path: Path) -> None:
    name = f"model.layers.5.mlp.experts.{EXPERTS - 3}.up_proj.weight"
    model = tmp_path / "model"
    model.mkdir()
    for path in models[8].iterdir():
        if path.is_file():
            (model / path.name).write_bytes(path.read_bytes())
    (shard,) = model.glob("*.safetensors")
    text = shard.read_bytes()
    length = int.from_bytes(text[:8], "little")
    header = json.loads(text[8 : 8 + length])
    if wrong == "shape":
        header[name]["shape"] = [128, 64]
    elif wrong == "type":
        header[name]["dtype"] = "I16"
    else:
        header["vision.tower"] = header.pop(name)
    new = json.dumps(header).encode()
    shard.write_bytes(len(new).to_bytes(8, "little") + new + text[8 + length :])
    index = json.loads((model / "model.safetensors.index.json").read_text())
    if wrong == "missing":
        index["weight_map"]["vision.tower"] = index["weight_map"].pop(name)
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput) as caught:
        planned(model, target)
    found = {problem.subject: problem.found for problem in caught.value.problems}
    assert name in found
    said = {"shape": "shape [128, 64]", "type": "values of type I16", "missing": "no such tensor"}[wrong]
    assert found[name] == said
    assert len(found) == (2 if wrong == "missing" else 1)


@pytest.mark.nightly
@pytest.mark.parametrize(("target", "most"), [("dense", 200), ("int8", 250)])
def test_a_model_of_94_layers_of_128_experts(target: str, most: int, tmp_path: Path) -> None:
    """36,945 tensors on eight ranks: peak memory in MiB of planning, and of planning and running without I/O; tasks."""
    make(tmp_path / "model", "235B", sparse=True)
    command = [sys.executable, "-m", "benchmarks.planning", "--source", str(tmp_path / "model"), "--target", target]
    run = subprocess.run([*command, "--scheduler", "local"], capture_output=True, text=True, check=True, cwd=ROOT)
    measured = json.loads(run.stdout)
    assert measured["tensors"] == 36_945
    assert measured["plan_mib"] < most
    assert measured["run_mib"] <= measured["projected_mib"]
    assert measured["tasks"] < 15_000


def test_arrays_are_in_the_budget(models: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before = planned(models[8], "int8").budget.peak_bytes
    monkeypatch.setattr("pipeline.planning.memory.ARRAY_BYTES", 0)
    less = planned(models[8], "int8")
    assert before - less.budget.peak_bytes >= 2 * 8 * 3 * EXPERTS * ARRAY_BYTES
    assert less.budget.peak_bytes >= BASE_BYTES
    assert make_plan(less.job).budget == less.budget
    assert before < BASE_BYTES + 200 * MIB
