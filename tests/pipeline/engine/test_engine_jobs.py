"""Engines of a conversion's job: [engine] tables, what targets share and have of their own, and runs that are taken up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import BadInput
from pipeline import convert as convert_in_python
from pipeline import plan as plan_in_python
from tests.support import checkpoints
from tests.support.builds import build, names, provenance
from tests.support.commands import Ran, headrace, tree

pytestmark = pytest.mark.usefixtures("on_path")

TARGETS = """
[[target]]
output_dir = "one"
[[target]]
output_dir = "two"
tp_size = 2
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return tmp_path


def job(folder: Path, text: str, *arguments: object, command: str = "convert") -> Ran:
    (folder / "job.toml").write_text(f"model_dir = 'model'\nscheduler = 'threads'\n{text}")
    return headrace(command, folder / "job.toml", *arguments)


def options(engine: Path) -> dict[str, list[str]]:
    return provenance(engine)["inputs"]["options"]


@pytest.mark.parametrize("scheduler", ["threads", "local", "synchronous"])
def test_a_conversion_goes_on_to_each_target_s_engine(folder: Path, scheduler: str) -> None:
    text = "[engine]\nmax_batch_size = 8\nuse_fused_mlp = false\nstrip_plan = true\nlora_target_modules = ['attn_q', 'attn_qkv']\n"
    ran = job(folder, text + TARGETS, "--scheduler", scheduler)
    assert ran.code == 0, ran
    assert {"one", "one-engine", "one-engine.log", "two", "two-engine", "two-engine.log"} < names(folder)
    assert (folder / "two-engine" / "rank1.engine").exists()
    asked = {"max_batch_size": ["8"], "use_fused_mlp": ["disable"], "strip_plan": [], "lora_target_modules": ["attn_q", "attn_qkv"]}
    assert options(folder / "one-engine") == options(folder / "two-engine") == asked
    assert ran.out.splitlines()[-1].startswith(f"{folder}/two-engine: ")


def test_a_second_run_does_nothing_and_one_that_lost_an_engine_builds_that(folder: Path) -> None:
    text = "[engine]\nmax_batch_size = 8\n" + TARGETS
    assert job(folder, text).code == 0
    before = tree(folder)
    ran = job(folder, text)
    assert ran.code == 0
    assert [line.partition(" ")[2] for line in ran.out.splitlines()] == [
        f"{folder}/two is up to date: nothing to do",
        "is up to date: nothing to do",
        "is up to date: nothing to do",
    ]
    assert {name: state[1:] for name, state in tree(folder).items()} == {name: state[1:] for name, state in before.items()}
    shutil.rmtree(folder / "two-engine")
    ran = job(folder, text)
    assert ran.code == 0
    assert f"built {folder}/two-engine" in ran.err
    assert f"built {folder}/one-engine" not in ran.err


def test_headrace_build_knows_an_engine_that_a_job_built(folder: Path) -> None:
    assert job(folder, "output_dir = 'ranks'\n[engine]\nmax_batch_size = 8\n").code == 0
    assert build(folder / "ranks", folder / "ranks-engine", "--max_batch_size", 8).out.endswith("nothing to do\n")


def test_a_target_s_own_table_is_laid_over_the_job_s(folder: Path) -> None:
    text = """
[engine]
output_dir = "engines/{target}"
max_batch_size = 8
max_num_tokens = 256
[[target]]
output_dir = "one"
[[target]]
output_dir = "two"
tp_size = 2
[target.engine]
max_batch_size = 4
workers = 2
"""
    assert job(folder, text).code == 0
    assert names(folder / "engines") == {"one", "one.log", "two", "two.log"}
    assert options(folder / "engines" / "one") == {"max_batch_size": ["8"], "max_num_tokens": ["256"]}
    assert options(folder / "engines" / "two") == {"max_batch_size": ["4"], "max_num_tokens": ["256"]}


def test_one_target_s_engine_alone(folder: Path) -> None:
    assert job(folder, TARGETS + "[target.engine]\nmax_batch_size = 4\n").code == 0
    assert "two-engine" in names(folder)
    assert "one-engine" not in names(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[engine]\nmax_batchsize = 8\n", "engine.max_batchsize: found an option that trtllm-build does not have"),
        ("[engine]\nbuilder = 'make'\n", "engine.builder: found 'make'"),
        ("[engine]\nretries = -1\n", "engine.retries: found -1"),
        ("[engine]\ncheckpoint_dir = 'x'\n", "engine.checkpoint_dir: found an option that headrace does not pass on"),
        ("[engine]\noutput_dir = 'same'\n", "found two engines; expected a directory for each. Put {target}"),
        ("[engine]\noutput_dir = 'one/engine'\n[[target]]\noutput_dir = 'one'\n", "found the checkpoint"),
        ("engine = 3\n", "engine"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_table_is_told_before_anything_is_written(folder: Path, text: str, said: str) -> None:
    ran = job(folder, text if "[[target]]" in text else text + TARGETS)
    assert ran.code == 2, ran
    assert said in ran.err
    assert names(folder) == {"model", "job.toml"}


TWO = "[[target]]\noutput_dir = 'two'\n"
AROUND = "inside {folder}/out; expected a directory of its own: a new engine takes the place of all that is in it"


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[engine]\noutput_dir = 'out'\n[[target]]\noutput_dir = 'out/ranks'\n", "the checkpoint {folder}/out/ranks"),
        ("[[target]]\noutput_dir = 'one'\nengine.output_dir = 'out'\n[[target]]\noutput_dir = 'out/two'\n", "the checkpoint"),
        (
            f"[[target]]\noutput_dir = 'one'\nengine.output_dir = 'out'\n{TWO}engine.output_dir = 'out/e'\n",
            "the engine {folder}/out/e",
        ),
        ("scratch = 'out/scratch'\noutput_dir = 'ranks'\n[engine]\noutput_dir = 'out'\n", "scratch at {folder}/out/scratch"),
        ("scratch = 'out'\noutput_dir = 'ranks'\n[engine]\noutput_dir = 'out'\n", "scratch at {folder}/out"),
        ("output_dir = 'linked/ranks'\n[engine]\noutput_dir = 'out'\n", "the checkpoint {folder}/linked/ranks"),
    ],
    ids=["checkpoint", "another target's", "engine", "scratch", "scratch itself", "through a link"],
)
def test_an_engine_around_what_the_job_writes_is_refused(folder: Path, text: str, found: str, there: bool) -> None:
    """It would take the place of all: the checkpoint that it was built of, and other engines."""
    (folder / "linked").symlink_to("out")
    if there:
        (folder / "out").mkdir()
    before = tree(folder / "model")
    for command in ("convert", "plan"):
        ran = job(folder, text, command=command)
        assert ran.code == 2, ran
        said = f"engine.output_dir {folder}/out: found {found}".format(folder=folder)
        assert said in ran.err
        assert AROUND.format(folder=folder) in ran.err
    assert tree(folder / "model") == before
    assert names(folder) == {"model", "job.toml", "linked", *(["out"] if there else [])}
    assert not there or names(folder / "out") == set()


def test_engines_one_in_the_name_of_the_other_s_place_under_construction(folder: Path) -> None:
    text = "[[target]]\noutput_dir = 'a'\nengine.output_dir = 'e'\n[[target]]\noutput_dir = 'e.partial'\n"
    ran = job(folder, text)
    assert (ran.code, f"found the checkpoint {folder}/e.partial inside {folder}/e.partial" in ran.err) == (2, True), ran


def test_an_engine_in_the_way_is_told_before_the_conversion(folder: Path) -> None:
    (folder / "ranks-engine").mkdir()
    (folder / "ranks-engine" / "notes").write_text("")
    ran = job(folder, "output_dir = 'ranks'\n[engine]\n")
    assert ran.code == 2
    assert "ranks-engine: found files that no builder of engines writes (notes)" in ran.err
    assert "ranks" not in names(folder)


def test_without_a_builder_nothing_is_converted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    ran = job(folder, "[engine]\n" + TARGETS)
    assert ran.code == 4
    assert "no trtllm-build on PATH" in ran.err
    assert [line for line in ran.err.splitlines() if line.startswith("  trtllm-build ")] == [
        f"  trtllm-build --checkpoint_dir {folder}/{name} --output_dir {folder}/{name}-engine" for name in ("one", "two")
    ]
    assert names(folder) == {"model", "job.toml"}


def test_a_build_that_fails_leaves_the_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_TROUBLE", "fail")
    ran = job(folder, "output_dir = 'ranks'\n[engine]\n")
    assert ran.code == 4
    assert (folder / "ranks" / "config.json").exists()
    assert "ranks-engine" not in names(folder)
    monkeypatch.delenv("STAND_IN_TROUBLE")
    assert job(folder, "output_dir = 'ranks'\n[engine]\n").code == 0
    assert "ranks-engine" in names(folder)


def test_an_option_that_the_builder_refuses_after_the_conversion_is_no_bad_request(folder: Path) -> None:
    """The checkpoint is there: nothing was written would be untrue, and the daemon would call the job refused."""
    text = "output_dir = 'ranks'\n[engine]\nkv_cache_type = 'pagedd'\n"
    ran = job(folder, text)
    assert ran.code == 4, ran
    assert "invalid KVCacheType value: 'pagedd'; expected options that it takes" in ran.err
    assert "nothing was written" not in ran.err
    assert names(folder) == {"model", "job.toml", "ranks", "ranks-engine.log"}
    ran = job(folder, text)
    assert (ran.code, "1 problem, nothing was written" in ran.err) == (2, True), ran
    # Nor where another engine was built.
    ran = job(folder, f"[engine]\n{TARGETS}[target.engine]\nkv_cache_type = 'pagedd'\n")
    assert ran.code == 4, ran
    shutil.rmtree(folder / "one-engine")
    ran = job(folder, f"[engine]\n{TARGETS}[target.engine]\nkv_cache_type = 'pagedd'\n")
    assert (ran.code, "one-engine" in names(folder)) == (4, True), ran
    assert "nothing was written" not in ran.err


def test_one_engine_s_failure_keeps_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_TROUBLE", "once")
    monkeypatch.setenv("STAND_IN_STATE", str(folder / "state"))
    ran = job(folder, "[engine]\n" + TARGETS)
    assert ran.code == 4
    assert ("one-engine" in names(folder), "two-engine" in names(folder)) == (False, True)


def test_overwrite_replaces_engines_too(folder: Path) -> None:
    assert job(folder, "output_dir = 'ranks'\n[engine]\n").code == 0
    ran = job(folder, "output_dir = 'ranks'\ndtype = 'bfloat16'\n[engine]\n")
    assert ran.code == 2
    assert job(folder, "output_dir = 'ranks'\ndtype = 'bfloat16'\n[engine]\n", "--overwrite").code == 0
    assert json.loads((folder / "ranks-engine" / "config.json").read_text())["pretrained_config"]["dtype"] == "bfloat16"


def test_plan_says_which_command_will_be_run(folder: Path) -> None:
    (folder / "job.toml").write_text("model_dir = 'model'\noutput_dir = 'ranks'\n[engine]\nmax_batch_size = 8\nmax_batchsize = 8\n")
    before = tree(folder)
    ran = headrace("plan", folder / "job.toml")
    assert ran.code == 2
    command = ["trtllm-build", "--checkpoint_dir", f"{folder}/ranks", "--output_dir", f"{folder}/ranks-engine"]
    assert f"then {' '.join(command)} --max_batch_size 8" in ran.out
    assert "would not convert: 1 problem" in ran.out
    assert "engine.max_batchsize: found an option that trtllm-build does not have" in " ".join(ran.out.split())
    (engine,) = json.loads(headrace("plan", folder / "job.toml", "--json").out)["engines"]
    assert engine["command"][:5] == command
    assert tree(folder) == before


@pytest.mark.parametrize("more", [(), ("--json",)], ids=str)
def test_plan_ends_as_convert_would(folder: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]) -> None:
    text = "output_dir = 'ranks'\n[engine]\nmax_batch_size = 8\n"
    assert job(folder, text, *more, command="plan").code == 0
    (folder / "ranks-engine").mkdir()
    (folder / "ranks-engine" / "notes").write_text("")
    ran = job(folder, text, *more, command="plan")
    assert ran.code == job(folder, text).code == 2
    assert "files that no builder of engines writes (notes)" in " ".join(ran.out.split())
    (folder / "ranks-engine" / "notes").rename(folder / "ranks-engine" / "rank0.engine")
    assert "an engine that headrace did not build" in " ".join(job(folder, text, *more, command="plan").out.split())
    assert job(folder, text, *more, "--overwrite", command="plan").code == 0
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    before = tree(folder / "ranks-engine")
    ran = job(folder, text, "--overwrite", *more, command="plan")
    assert ran.code == job(folder, text, "--overwrite").code == 4
    assert "no trtllm-build on PATH and no Python package tensorrt_llm" in " ".join(ran.out.split())
    if more:
        (engine,) = json.loads(ran.out)["engines"]
        assert [each.partition(" on ")[0] for each in engine["obstacles"]] == ["no engine can be built"]
    else:
        assert "would not convert: 1 problem" in ran.out
    # Both are told; what is wrong with the request is what it ends with.
    assert job(folder, text, *more, command="plan").code == job(folder, text).code == 2
    assert tree(folder / "ranks-engine") == before


def test_plan_of_what_is_all_there_needs_no_builder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job(folder, "[engine]\n" + TARGETS).code == 0
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert job(folder, "[engine]\n" + TARGETS, command="plan").code == job(folder, "[engine]\n" + TARGETS).code == 0


def test_plan_asks_no_builder_for_workers_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    (folder / "job.toml").write_text(
        "model_dir = 'model'\noutput_dir = 'ranks'\n[engine]\n[cluster]\nclass = 'distributed.LocalCluster'\n"
    )
    assert headrace("plan", folder / "job.toml").code == 0


def test_json_lines_of_a_job(folder: Path) -> None:
    heard = [json.loads(line) for line in job(folder, "[engine]\n" + TARGETS, "--log_format", "json").err.splitlines()]
    finished: dict[str, Any] = heard[-1]
    assert finished["event"] == "finished"
    assert [engine["path"] for engine in finished["engines"]] == [f"{folder}/one-engine", f"{folder}/two-engine"]
    assert [event["event"] for event in heard if event["event"] in ("built", "finished")] == ["built", "built", "finished"]


def test_in_python(folder: Path) -> None:
    asked = {"model_dir": folder / "model", "output_dir": folder / "ranks", "scheduler": "threads"}
    result = convert_in_python(**asked, engine={"max_batch_size": 8, "output_dir": folder / "engine"})
    (built,) = result.engines
    assert (built.directory, built.up_to_date) == (folder / "engine", False)
    assert convert_in_python(**asked, engine={"max_batch_size": 8, "output_dir": folder / "engine"}).engines[0].up_to_date
    assert convert_in_python(**asked).engines == ()
    # An engine changes nothing of what the conversion writes, nor its id.
    assert plan_in_python(**asked).id == plan_in_python(**asked, engine={}).id
    with pytest.raises(BadInput, match=r"engine\.retries"):
        convert_in_python(**asked, engine={"retries": "x"})


def test_paths_of_a_table_are_relative_to_the_job_file(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "timings").write_text("")
    monkeypatch.chdir(folder / "elsewhere")
    text = "output_dir = 'ranks'\n[engine]\noutput_dir = 'e'\ninput_timing_cache = 'timings'\nlora_dir = ['a', '~/b']\n"
    assert job(folder, text).code == 0
    places = {"input_timing_cache": [f"{tmp_path}/timings"], "lora_dir": [f"{tmp_path}/a", str(Path.home() / "b")]}
    assert options(folder / "e") == places
