"""Building through TensorRT-LLM's Python API: each rank a task and a process, by the real calls and arguments."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline import plan
from pipeline.engine.engines import Engines
from pipeline.engine.log import BuildLog
from pipeline.engine.requests import plan_requests
from tests import stand_ins
from tests.support import checkpoints
from tests.support.builds import build, names, provenance


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is importable here and in child processes; torch is the stand-in in these alone."""
    monkeypatch.syspath_prepend(str(stand_ins.PACKAGES))
    monkeypatch.setenv("PYTHONPATH", stand_ins.python_path())


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STAND_IN_RECORD", str(tmp_path / "record"))
    return tmp_path / "record"


def calls(record: Path) -> list[dict[str, Any]]:
    return sorted(map(json.loads, record.read_text().splitlines()), key=lambda call: call["rank"])


@pytest.mark.parametrize("scheduler", ["threads", "local"])
@pytest.mark.parametrize("builder", ["auto", "python"])
def test_each_rank_is_built_in_a_process_of_its_own(
    checkpoint: Path, engine: Path, record: Path, scheduler: str, builder: str
) -> None:
    ran = build(checkpoint, engine, "--builder", builder, "--scheduler", scheduler, "--max_batch_size", 4)
    assert ran.code == 0, ran
    assert [(call["rank"], call["device"]) for call in calls(record)] == [(0, 0), (1, 1)]
    assert len({call["pid"] for call in calls(record)}) == 2
    assert {call["cwd"] for call in calls(record)} == {f"{engine}.partial"}
    assert names(engine) == {"config.json", "headrace.json", "model.cache", "rank0.engine", "rank1.engine"}
    assert names(engine.parent) == {"ranks", "record", "engine", "engine.rank0.log", "engine.rank1.log"}
    assert json.loads((engine / "config.json").read_text())["build_config"]["max_batch_size"] == 4
    assert len(re.findall("Build TensorRT engine Unnamed Network", ran.err)) == 2
    assert provenance(engine)["inputs"]["version"] == "1.2.1"


def test_both_ways_lead_to_the_same_engine(checkpoint: Path, engine: Path, on_path: Path) -> None:
    options = ("--max_num_tokens", 512, "--gemm_plugin", "disable", "--kv_cache_type", "paged", "--multiple_profiles", "enable")
    assert build(checkpoint, engine, *options, "--logits_dtype", "float16", "--strip_plan").code == 0
    other = engine.with_name("other")
    assert build(checkpoint, other, *options, "--logits_dtype", "float16", "--strip_plan", "--builder", "python").code == 0
    for name in ("config.json", "rank0.engine", "rank1.engine"):
        assert (engine / name).read_bytes() == (other / name).read_bytes()
    # What was built the one way needs not be built the other.
    assert build(checkpoint, engine, *options, "--logits_dtype", "float16", "--strip_plan", "--builder", "python").out.endswith(
        "do\n"
    )
    assert on_path.exists()


def test_the_command_comes_first(checkpoint: Path, engine: Path, on_path: Path) -> None:
    assert build(checkpoint, engine).code == 0
    assert provenance(engine)["command"][0] == str(on_path / "trtllm-build")


def test_its_own_parser_refuses_options(checkpoint: Path, engine: Path) -> None:
    ran = build(checkpoint, engine, "--builder", "python", "--max_batchsize", 4)
    assert ran.code == 2
    assert "such as max_batch_size" in ran.err
    ran = build(checkpoint, engine, "--builder", "python", "--kv_cache_type", "pagedd")
    assert ran.code == 2
    assert "invalid KVCacheType value: 'pagedd'" in ran.err


@pytest.mark.parametrize(
    "options", [("--gather_context_logits", "--max_draft_len", 2), ("--multiple_profiles", "enable", "--opt_num_tokens", 8)]
)
def test_options_that_exclude_one_another(checkpoint: Path, engine: Path, options: tuple[object, ...]) -> None:
    ran = build(checkpoint, engine, "--builder", "python", *options)
    assert ran.code == 4
    assert "exclude one another" in ran.err


def test_a_build_configuration_from_a_file(checkpoint: Path, engine: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_batch_size": 3}')
    assert build(checkpoint, engine, "--builder", "python", "--build_config", tmp_path / "config.json").code == 0
    assert json.loads((engine / "config.json").read_text())["build_config"]["max_batch_size"] == 3


def test_a_rank_that_fails_ends_the_build(checkpoint: Path, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_TROUBLE", "fail")
    ran = build(checkpoint, engine, "--builder", "python")
    assert ran.code == 4
    assert "OutOfMemory" in ran.err
    assert names(engine.parent) == {"ranks", "engine.rank0.log", "engine.rank1.log"} - ({"engine.rank1.log"} - names(engine.parent))
    # The second rank was not tried, or had begun just before: the engine would not have been whole.
    assert ran.err.count("OutOfMemory (Requested") in (2, 3)  # once as each was written, once in the end


def test_ranks_are_tried_again_together(checkpoint: Path, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_TROUBLE", "once")
    monkeypatch.setenv("STAND_IN_STATE", str(tmp_path / "state"))
    assert build(checkpoint, engine, "--builder", "python", "--retries", 1).code == 0
    assert provenance(engine)["attempts"] == 2


def test_a_checkpoint_that_its_loader_refuses(checkpoint: Path, engine: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["mapping"]["auto_parallel"] = False
    (checkpoint / "config.json").write_text(json.dumps(config))
    ran = build(checkpoint, engine, "--builder", "python")
    assert ran.code == 4
    assert "TypeError: Mapping.__init__() got an unexpected keyword argument 'auto_parallel'" in ran.err


@pytest.mark.parametrize(
    ("targets", "share"), [(["a"], True), (["a", "b"], False)], ids=["ranks of one engine", "ranks of two engines"]
)
def test_ranks_of_one_engine_take_a_gpu_each(tmp_path: Path, targets: list[str], share: bool) -> None:
    """Rank 0 of each engine would take the first."""
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    tables = [{"output_dir": tmp_path / name, "tp_size": 2} for name in targets]
    made = plan(model_dir=tmp_path / "model", target=tables, engine={})
    engines = Engines(plan_requests(made), BuildLog(quiet=True), "local")
    engines.prepare()
    assert engines.share_gpus == share
