"""Quantized conversions as runs: stopped and taken up, cut to scratch, with several targets, elsewhere."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import LocalCluster

import stages.quantize
import stages.write
from pipeline import BadInput, WriteFailed, convert, plan
from pipeline.planning import compose
from pipeline.planning import make_plan as planning
from pipeline.planning.memory import budget
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.directories import contents, values_bytes
from tests.support.examples import by_night
from tests.support.quantized_checkpoints import LLAMA, MIXTRAL

FORMATS = {**source.formats(), "gptq act-order": source.gptq(index="order", sym=False)}
INT8 = {"use_weight_only": True, "weight_only_precision": "int8"}
INT4 = {"use_weight_only": True, "weight_only_precision": "int4"}
FLOAT8 = {"use_fp8_rowwise": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each format, a float one, and ones of experts."""
    folder = tmp_path_factory.mktemp("models")
    for name, kind in FORMATS.items():
        source.write(folder / name, {**LLAMA, "num_hidden_layers": 3} if name == "fbgemm" else LLAMA, kind, shards=2)
    checkpoints.save(folder / "float", LLAMA, source.values(LLAMA))
    checkpoints.save(folder / "experts", MIXTRAL, source.values(MIXTRAL))
    source.write(folder / "gptq experts", MIXTRAL, FORMATS["gptq asymmetric"])
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as running:
        yield running.scheduler_address


def flags_of(name: str) -> dict[str, Any]:
    """What a format needs so that it converts at all."""
    own = FORMATS[name].flags if name in FORMATS else {}
    by_name = {"compressed w8a8": {"dequantize": True, **INT8}, "gptq act-order": {"requantize": True}}
    return {"tp_size": 2, "scheduler": "threads", **own, **by_name.get(name, {})}


# What there is to run: the model's name and its options.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("gptq asymmetric", {}),
    "gptq for hopper": ("gptq", {"sm": 90}),
    "awq": ("awq", {"pp_size": 2}),
    "packed": ("compressed w4a16 asymmetric", {}),
    "float8": ("compressed fp8", {"fp8_kv_cache": True}),
    "float8 by row": ("compressed fp8 dynamic", {}),
    "modelopt awq": ("modelopt awq", {}),
    "fbgemm": ("fbgemm", {}),
    "again": ("gptq act-order", {}),
    "dequantized": ("gptq act-order", {"dequantize": True, "requantize": False}),
    "int8": ("float", INT8),
    "int4": ("float", {**INT4, "sm": 90}),
    "rows": ("float", FLOAT8),
    "int8 of codes": ("modelopt awq", {**INT8, "dequantize": True}),
    "experts": ("experts", INT4),
    "packed experts": ("gptq experts", {}),
}


def run(models: dict[str, Path], name: str, output: Path, **more: Any) -> dict[str, bytes]:
    """Convert; every file but headrace.json."""
    model, options = RUNS[name]
    convert(model_dir=models[model], output_dir=output, **{**flags_of(model), **options, **more})
    return contents(output)


# --- stopped and taken up


class Stores:
    """Counts the stores of a run, and lets one fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.failing, self.whole = 0, -1, stages.write._write_all
        monkeypatch.setattr(stages.write, "_write_all", self)

    def __call__(self, descriptor: int, data: memoryview, offset: int) -> None:
        self.count += 1
        if self.count == self.failing:
            raise OSError(28, "No space left on device", "somewhere")
        self.whole(descriptor, data, offset)

    def fail(self, number: int) -> None:
        self.count, self.failing = 0, number


@pytest.mark.parametrize("name", RUNS)
def test_a_failure_at_some_stores(name: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "block_bytes", lambda _: 20_000)
    stores, resumed = Stores(monkeypatch), 0
    expected = run(models, name, tmp_path / "whole", scheduler="synchronous")
    total = stores.count
    model, options = RUNS[name]
    options = {"model_dir": models[model], "output_dir": tmp_path / "out", **flags_of(model), **options, "scheduler": "synchronous"}
    for failing in (1, total // 2, total):
        stores.fail(failing)
        with pytest.raises(WriteFailed):
            convert(**options)
        stores.fail(-1)
        assert not (tmp_path / "out/config.json").exists()
        resumed += convert(**options).resumed_tasks
        assert contents(tmp_path / "out") == expected, failing
        shutil.rmtree(tmp_path / "out")
    assert resumed > 0, "later runs took up what earlier ones had done"


def test_another_generation_is_another_conversion(models: dict[str, Path], tmp_path: Path) -> None:
    options = {"model_dir": models["gptq"], "output_dir": tmp_path / "out", "scheduler": "threads"}
    convert(sm=80, **options)
    assert convert(sm=80, **options).up_to_date
    for other in ({"sm": 90}, {"sm": 86}, {"dequantize": True}, {"fp8_kv_cache": True}):
        with pytest.raises(BadInput, match="--overwrite"):
            convert(**{**options, **other})


# --- scratch


STAGES = ("read", "rename", "unpack", "shard")
MORE = ("gptq act-order", "modelopt fp8", "modelopt awq", "gptq experts")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same models with a single layer, of fbgemm three, and in `plain` what each converts to."""
    folder = tmp_path_factory.mktemp("small")
    for name, kind in FORMATS.items():
        source.write(folder / name, {**LLAMA, "num_hidden_layers": 3 if name == "fbgemm" else 1}, kind)
    experts = {**MIXTRAL, "num_hidden_layers": 1, "num_local_experts": 2}
    checkpoints.save(folder / "float", {**LLAMA, "num_hidden_layers": 1}, source.values({**LLAMA, "num_hidden_layers": 1}))
    checkpoints.save(folder / "experts", experts, source.values(experts))
    source.write(folder / "gptq experts", experts, FORMATS["gptq asymmetric"])
    models = {path.name: path for path in folder.iterdir()}
    for name, model in models.items():
        convert(model_dir=model, output_dir=folder / "plain" / name, **cut_flags(name))
    return {**models, "plain": folder / "plain"}


def cut_flags(name: str) -> dict[str, Any]:
    return {**flags_of(name), **(INT8 if name in ("float", "experts") else {})}


@pytest.mark.parametrize(
    ("name", "after"),
    [
        *((name, ",".join(STAGES)) for name in (*FORMATS, "float", "experts", "gptq experts")),
        *itertools.product(("gptq asymmetric", "float"), STAGES),
        *(pytest.param(*pair, marks=pytest.mark.nightly) for pair in itertools.product(MORE, STAGES)),
    ],
)
def test_cuts_change_no_byte(name: str, after: str, small: dict[str, Path], tmp_path: Path) -> None:
    convert(model_dir=small[name], output_dir=tmp_path / "cut", scratch_after=after, **cut_flags(name))
    assert contents(tmp_path / "cut") == contents(small["plain"] / name)
    assert {path.name for path in tmp_path.iterdir()} == {"cut"}, "scratch is removed after success"


@pytest.mark.parametrize("name", ["gptq asymmetric", "awq", "modelopt fp8", "modelopt awq", "float"])
def test_scratch_behind_a_url(name: str, small: dict[str, Path], tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    options = {"scratch": url, "scratch_after": "read,unpack", **cut_flags(name)}
    convert(model_dir=small[name], output_dir=tmp_path / "cut", **options)
    assert contents(tmp_path / "cut") == contents(small["plain"] / name)


def test_unpacked_codes_are_kept_for_other_targets(models: dict[str, Path], tmp_path: Path) -> None:
    options = {"model_dir": models["gptq asymmetric"], "scheduler": "threads", "scratch": tmp_path / "scratch"}
    first = convert(output_dir=tmp_path / "one", scratch_after="unpack", keep_scratch=True, **options)
    assert first.stages["unpack"]["bytes"] > 0
    again = convert(output_dir=tmp_path / "two", scratch_after="unpack", tp_size=2, sm=90, **options)
    assert "unpack" not in again.stages
    convert(model_dir=models["gptq asymmetric"], output_dir=tmp_path / "plain", tp_size=2, sm=90, scheduler="threads")
    assert contents(tmp_path / "two") == contents(tmp_path / "plain")


# --- several targets


TARGETS: dict[str, list[dict[str, Any]]] = {
    "float": [
        {"tp_size": 1},
        {"tp_size": 2, "dtype": "bfloat16", **INT8},
        {"tp_size": 4, **INT4},
        {"tp_size": 4, "sm": 90, **INT4},
        {"tp_size": 2, "pp_size": 2, **INT8},
        {"tp_size": 2, "dtype": "bfloat16", **FLOAT8},
        {"tp_size": 2, "use_meta_fp8_rowwise_recipe": True, "fp8_kv_cache": True, **FLOAT8},
        {"tp_size": 1, "dtype": "float32", "use_parallel_embedding": True, "write_rope_buffers": True},
    ],
    "gptq asymmetric": [
        {"tp_size": 2},
        {"tp_size": 2, "dtype": "bfloat16"},
        {"tp_size": 1, "sm": 90},
        {"tp_size": 2, "dequantize": True},
        {"tp_size": 4, "dequantize": True, **INT8},
        {"tp_size": 2, "dequantize": True, **FLOAT8},
        {"tp_size": 2, "requantize": True},
    ],
    "modelopt fp8": [
        {"tp_size": 2},
        {"tp_size": 4, "fp8_kv_cache": True},
        {"tp_size": 2, "dequantize": True, **INT4},
        {"tp_size": 1, "dequantize": True, "dtype": "float32"},
        {"tp_size": 2, "dequantize": True, **FLOAT8},
    ],
    "modelopt awq": [{"tp_size": 2}, {"tp_size": 1, "dtype": "bfloat16"}, {"tp_size": 2, "dequantize": True}],
    "experts": [{"tp_size": 2, **INT8}, {"tp_size": 2, "moe_ep_size": 2, **INT4}, {"tp_size": 1}],
    "gptq experts": [{"tp_size": 2}, {"tp_size": 2, "moe_ep_size": 2, "sm": 90}, {"tp_size": 1, "dequantize": True}],
}


@pytest.mark.parametrize(
    ("name", "after"), [*((name, "none") for name in TARGETS), ("gptq asymmetric", "unpack"), ("float", "shard")]
)
def test_each_target_equals_its_own_conversion(name: str, after: str, models: dict[str, Path], tmp_path: Path) -> None:
    tables = [{"output_dir": tmp_path / f"all/{number}", **shape} for number, shape in enumerate(TARGETS[name])]
    result = convert(model_dir=models[name], target=tables, scheduler="threads", scratch_after=after)
    for number, shape in enumerate(TARGETS[name]):
        convert(model_dir=models[name], output_dir=tmp_path / str(number), scheduler="threads", **shape)
        assert contents(tmp_path / f"all/{number}") == contents(tmp_path / str(number)), shape
    # Scales that modules share are written by the tasks of each.
    assert 0 <= result.bytes_written - values_bytes(tmp_path / "all") < 10_000


# --- blocks, pieces and schedulers


@pytest.mark.parametrize("name", by_night(RUNS, ["gptq", "awq", "float8", "int8", "packed experts"]))
def test_blocks_and_pieces_of_any_size(name: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(models, name, tmp_path / "whole")
    for number, (block_bytes, piece_bytes) in enumerate([(1, 9000), (3000, 900), (40_000, 1)]):

        def chosen(*arguments: Any, piece_bytes: int = piece_bytes) -> Any:
            return replace(budget(*arguments), piece_bytes=piece_bytes)

        monkeypatch.setattr(compose, "ROW_MULTIPLE", 1)
        monkeypatch.setattr(stages.quantize, "BLOCK_ROWS", 8 + 28 * number)
        monkeypatch.setattr(planning, "block_bytes", lambda *_, size=block_bytes: size)
        monkeypatch.setattr(planning, "budget", chosen)
        found = run(models, name, tmp_path / str(number), scheduler="synchronous")
        assert found == expected, (block_bytes, piece_bytes)


@pytest.mark.parametrize("name", RUNS)
def test_on_a_cluster_of_other_processes(name: str, models: dict[str, Path], cluster: str, tmp_path: Path) -> None:
    assert run(models, name, tmp_path / "elsewhere", scheduler=cluster) == run(models, name, tmp_path / "here")


@pytest.mark.parametrize("name", ["gptq", "int8"])
def test_on_the_cluster_in_this_process(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    assert run(models, name, tmp_path / "local", scheduler="local") == run(models, name, tmp_path / "threads")


def test_values_that_no_scale_fits_are_refused_from_elsewhere(cluster: str, tmp_path: Path) -> None:
    tensors = source.values(LLAMA)
    tensors["model.layers.1.mlp.up_proj.weight"][7, 7] = np.nan
    checkpoints.save(tmp_path / "model", LLAMA, tensors)
    with pytest.raises(BadInput, match=r"model\.layers\.1\.mlp\.up_proj\.weight: found a value that is not finite"):
        convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler=cluster, **INT8)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


# --- plans


@pytest.mark.parametrize("name", RUNS)
def test_plans_say_what_is_read_and_written(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    model, options = RUNS[name]
    arguments = {"model_dir": models[model], "output_dir": tmp_path / "out", **flags_of(model), **options}
    made = plan(**arguments)
    summary = made.summary()
    assert 0 < summary["peak_memory_bytes"] <= summary["memory_limit_bytes"]
    # Every byte of the source but those that the plan says it leaves out.
    left = sum(int(np.prod(made.source.tensors[key].shape)) * made.source.tensors[key].dtype.itemsize for key in made.left_out)
    assert summary["source"]["bytes"] - left <= made.bytes_read + 100 * len(made.source.tensors)
    assert made.bytes_read <= summary["source"]["bytes"]
    result = convert(**arguments)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("rank*")}
    assert {rank["file"]: rank["bytes"] for rank in summary["targets"][0]["ranks"]} == sizes
    assert summary["bytes_written"] == result.bytes_written
    # Scales that modules share are written by the tasks of each.
    assert 0 <= result.bytes_written - values_bytes(tmp_path / "out") < 10_000
    assert summary["bytes_read"] == result.bytes_read <= result.stages["read"]["bytes"]
    if name in ("int8", "int4", "rows", "experts"):  # codes and scales come from one reading
        assert result.stages["read"]["bytes"] == result.bytes_read
