"""`headrace build`: an engine complete or absent, what is refused, what is said, and a second run of what is done."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.output import JOURNAL
from tests.support import checkpoints
from tests.support.builds import build, names, provenance
from tests.support.commands import Ran, convert, headrace, tree

pytestmark = pytest.mark.usefixtures("on_path")


def events(ran: Ran) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ran.err.splitlines()]


@pytest.mark.parametrize("scheduler", ["threads", "synchronous", "local"])
def test_an_engine_is_built(checkpoint: Path, engine: Path, scheduler: str) -> None:
    ran = build(checkpoint, engine, "--scheduler", scheduler, "--max_batch_size", 8, "--gemm-plugin", "auto", "--strip_plan")
    assert ran.code == 0, ran
    assert re.fullmatch(rf"{engine}: [\d.]+ KiB of engines, built in [\d.]+ s\n", ran.out)
    assert names(engine) == {"config.json", "headrace.json", "model.cache", "rank0.engine", "rank1.engine"}
    config = json.loads((engine / "config.json").read_text())
    assert config["version"] == "1.2.1"
    assert config["pretrained_config"] == json.loads((checkpoint / "config.json").read_text())
    assert config["build_config"]["max_batch_size"] == 8
    assert config["build_config"]["plugin_config"]["gemm_plugin"] == "auto"
    assert names(engine.parent) == {"ranks", "engine", "engine.log"}
    facts = provenance(engine)
    assert facts["inputs"]["options"] == {"max_batch_size": ["8"], "gemm_plugin": ["auto"], "strip_plan": []}
    assert facts["inputs"]["version"] == facts["built_by"] == "1.2.1"
    assert facts["inputs"]["checkpoint"]["id"] == json.loads((checkpoint / "headrace.json").read_text())["id"]
    assert len(facts["checkpoint"]["xxh3"]) == 64
    assert facts["seconds"] > 0


def test_context_parallel_ranks_are_engines_of_shared_files(engine: Path, tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    sizes = ("--tp_size", 2, "--pp_size", 2, "--cp_size", 2)
    assert convert(tmp_path / "model", tmp_path / "ranks", *sizes).code == 0
    assert len(list((tmp_path / "ranks").glob("rank*"))) == 4
    verified = headrace("verify", tmp_path / "ranks", "--source", tmp_path / "model")
    assert (verified.code, "nothing wrong" in verified.out) == (0, True), verified
    assert build(tmp_path / "ranks", engine).code == 0
    assert {f"rank{rank}.engine" for rank in range(8)} < names(engine)


def test_the_builder_s_lines_are_shown_and_kept(checkpoint: Path, engine: Path) -> None:
    ran = build(checkpoint, engine)
    lines = ran.err.splitlines()
    assert lines[0] == f"building {engine}"
    assert lines[-1].startswith(f"built {engine} in ")
    assert lines[1:-1] == (engine.parent / "engine.log").read_text().splitlines()
    assert [line for line in lines if "Build TensorRT engine Unnamed Network 1" in line]
    assert build(checkpoint, engine.with_name("other"), "--quiet") == Ran(0, "", "")


def test_json_lines(checkpoint: Path, engine: Path) -> None:
    heard = events(build(checkpoint, engine, "--log_format", "json", "--scheduler", "local"))
    assert [event["event"] for event in heard if event["event"] != "builder"] == ["building", "built", "finished"]
    assert heard[0]["command"][1:3] == ["--checkpoint_dir", str(checkpoint)]
    assert heard[0]["dashboard"].startswith("http://127.0.0.1:")
    assert "Build TensorRT engine" in "".join(event["line"] for event in heard if event["event"] == "builder")
    assert heard[-1]["engines"][0] == {**heard[-1]["engines"][0], "path": str(engine), "up_to_date": False, "attempts": 1}
    (last,) = events(build(checkpoint, engine, "--log_format", "json"))
    assert last["engines"][0]["up_to_date"]
    (error,) = events(build(checkpoint, engine, "--log_format", "json", "--max_batch_size", 4))
    assert (error["event"], error["exit_code"]) == ("error", 2)


def test_a_second_run_does_nothing(checkpoint: Path, engine: Path) -> None:
    assert build(checkpoint, engine, "--max_batch_size", 8).code == 0
    before = tree(engine.parent)
    ran = build(checkpoint, engine, "--max_batch_size=8", "--workers", 2, "--log_level", "debug")
    assert ran == Ran(0, f"{engine} is up to date: nothing to do\n", "")
    assert tree(engine.parent) == before


def test_a_second_run_needs_no_builder(checkpoint: Path, engine: Path, on_path: Path) -> None:
    assert build(checkpoint, engine).code == 0
    (on_path / "trtllm-build").unlink()
    assert build(checkpoint, engine).out == f"{engine} is up to date: nothing to do\n"


@pytest.mark.parametrize("change", ["option", "config", "checkpoint", "version"])
def test_an_engine_of_other_inputs_stays_until_it_is_to_be_replaced(
    checkpoint: Path, engine: Path, on_path: Path, tmp_path: Path, change: str
) -> None:
    assert build(checkpoint, engine).code == 0
    more: tuple[object, ...] = ()
    if change == "option":
        more = ("--max_batch_size", 3)
    elif change == "config":
        (checkpoint / "config.json").write_text((checkpoint / "config.json").read_text() + "\n")
    elif change == "checkpoint":
        checkpoints.write(tmp_path / "model", checkpoints.LLAMA, seed=1)
        assert convert(tmp_path / "model", checkpoint, "--tp_size", 2, "--overwrite").code == 0
    else:
        command = on_path / "trtllm-build"
        command.write_text(command.read_text().replace("exec", "echo '[TensorRT-LLM] TensorRT-LLM version: 1.2.2'; exec"))
    before = tree(engine)
    ran = build(checkpoint, engine, *more)
    assert ran.code == 2
    named = {"option": "--max_batch_size", "version": "TensorRT-LLM's version"}.get(change, "checkpoint")
    assert f"found an engine of other inputs ({named}); expected" in ran.err
    assert "Give --overwrite" in ran.err
    assert tree(engine) == before
    assert build(checkpoint, engine, *more, "--overwrite").code == 0
    assert build(checkpoint, engine, *more).out == f"{engine} is up to date: nothing to do\n"
    assert not {"engine.replaced", "engine.partial"} & names(engine.parent)


def test_an_engine_that_lost_a_file_is_not_up_to_date(checkpoint: Path, engine: Path) -> None:
    assert build(checkpoint, engine).code == 0
    (engine / "rank1.engine").write_bytes(b"cut short")
    assert "an engine of other inputs (or not whole)" in build(checkpoint, engine).err
    assert build(checkpoint, engine, "--overwrite").code == 0


def test_a_checkpoint_without_provenance_is_known_by_its_files(checkpoint: Path, engine: Path) -> None:
    (checkpoint / "headrace.json").unlink()
    assert build(checkpoint, engine).code == 0
    assert build(checkpoint, engine).out == f"{engine} is up to date: nothing to do\n"
    os.utime(checkpoint / "rank1.safetensors", ns=(1, 1))
    assert "(checkpoint)" in build(checkpoint, engine).err


def test_a_file_that_an_option_names_is_an_input(
    checkpoint: Path, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("timings").write_bytes(b"1")
    arguments = ("--input_timing_cache", "timings", "--output_timing_cache", "new")
    assert build(checkpoint, engine, *arguments).code == 0
    assert provenance(engine)["inputs"]["options"]["input_timing_cache"] == [str(tmp_path / "timings")]
    assert (tmp_path / "new").read_bytes() == b"timings"
    assert build(checkpoint, engine, *arguments).out.endswith("nothing to do\n")
    Path("timings").write_bytes(b"12")
    assert "other inputs (files)" in build(checkpoint, engine, *arguments).err


def test_the_files_of_a_directory_that_an_option_names_are_inputs(checkpoint: Path, engine: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    (adapter / "runs").mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"1")
    arguments = ("--lora_dir", adapter)
    assert build(checkpoint, engine, *arguments).code == 0
    (adapter / "runs" / "events").write_bytes(b"1")  # what its trainer leaves below is not read
    assert build(checkpoint, engine, *arguments).out.endswith("nothing to do\n")
    os.utime(adapter / "adapter_model.safetensors", ns=(1, 1))
    assert "other inputs (files)" in build(checkpoint, engine, *arguments).err


@pytest.mark.parametrize("place", ["timings", "engine/model.cache"])
def test_a_cache_of_timings_that_the_build_writes_is_no_input(checkpoint: Path, engine: Path, tmp_path: Path, place: str) -> None:
    """Read and written at once, as NVIDIA's examples have it, or the one of the engine itself."""
    cache = tmp_path / place
    more = ("--output_timing_cache", cache) if place == "timings" else ()
    arguments = ("--input_timing_cache", cache, *more)
    for again in ((), ("--overwrite",)):
        assert build(checkpoint, engine, *arguments, *again).code == 0
        os.utime(cache, ns=(1, 1))
        assert build(checkpoint, engine, *arguments).out.endswith("nothing to do\n")


def refused(checkpoint: Path, engine: Path, *more: object) -> str:
    before = tree(engine.parent)
    ran = build(checkpoint, engine, *more)
    assert (ran.code, ran.out) == (2, ""), ran
    assert "nothing was written:" in ran.err
    assert "Traceback" not in ran.err
    assert tree(engine.parent) == before
    return ran.err


def test_every_wrong_option_is_named_before_anything_runs(checkpoint: Path, engine: Path) -> None:
    report = refused(checkpoint, engine, "--max_batchsize", 8, "--gemm_plugin", "bf16", "--workers", "all", "--retries", -1)
    assert "--retries: found -1" in report
    report = refused(checkpoint, engine, "--max_batchsize", 8, "--gemm_plugin", "bf16", "--workers", "all", "--dry_run")
    assert "4 problems" in report
    assert "such as max_batch_size" in report
    assert "--output_dir: found nothing" in headrace("build", checkpoint).err


def test_options_are_those_of_the_builder_that_is_there(checkpoint: Path, engine: Path, on_path: Path) -> None:
    """Not those of 1.2.1: of an older one, and of a newer one."""
    (on_path / "trtllm-build").rename(on_path / "real")
    script = f"""#!/bin/sh
if [ "$1" = --help ]; then {on_path}/real --help | sed 's/--max_beam_width MAX_BEAM_WIDTH/--max_beams {{1,2}}/'; exit; fi
exec {on_path}/real "$1" "$2" "$3" "$4"
"""
    (on_path / "trtllm-build").write_text(script)
    (on_path / "trtllm-build").chmod(0o755)
    report = refused(checkpoint, engine, "--max_beam_width", 1)
    assert (
        "--max_beam_width: found an option that trtllm-build does not have; expected one of its options, such as max_beams"
        in report
    )
    assert "--max_beams: found 3; expected one of 1, 2" in refused(checkpoint, engine, "--max_beams", 3)
    assert build(checkpoint, engine, "--max_beams", 2).code == 0


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("config.json", "config.json: found No such file"),
        ("rank1.safetensors", "rank1.safetensors: found No such file"),
        ("cut", "rank0.safetensors"),
        ("world_size", "mapping.world_size: found None"),
        ("all", "found no such directory"),
    ],
)
def test_the_checkpoint_is_looked_at_first(checkpoint: Path, engine: Path, damage: str, said: str) -> None:
    if damage == "all":
        shutil.rmtree(checkpoint)
    elif damage == "cut":
        os.truncate(checkpoint / "rank0.safetensors", 500)
    elif damage == "world_size":
        (checkpoint / "config.json").write_text('{"mapping": {}}')
    else:
        (checkpoint / damage).unlink()
    assert said in refused(checkpoint, engine)


def test_places_that_are_no_engine_s_are_refused(checkpoint: Path, engine: Path) -> None:
    assert "found the checkpoint" in refused(checkpoint, checkpoint)
    assert "found the checkpoint" in refused(checkpoint, checkpoint / "engine")
    assert f"found the checkpoint {checkpoint} inside {checkpoint.parent}" in refused(checkpoint, checkpoint.parent)
    engine.write_text("")
    assert "found a file; expected a directory" in refused(checkpoint, engine)
    engine.unlink()
    engine.mkdir()
    (engine / "notes.txt").write_text("")
    assert "files that no builder of engines writes (notes.txt)" in refused(checkpoint, engine, "--overwrite")
    (engine / "notes.txt").rename(engine / "rank0.engine")
    assert "an engine that headrace did not build" in refused(checkpoint, engine)
    assert build(checkpoint, engine, "--overwrite").code == 0
    (engine.parent / "b.partial").mkdir()
    (engine.parent / "b.partial" / "notes.txt").write_text("")
    assert "b.partial: found files that headrace did not write" in refused(checkpoint, engine.parent / "b")


def test_one_run_at_a_time(checkpoint: Path, engine: Path) -> None:
    from pipeline.sinks.journal import Journal

    (engine.parent / "engine.partial").mkdir()
    journal = Journal(engine.parent / "engine.partial" / JOURNAL)
    ran = build(checkpoint, engine)
    assert ran.code == 2
    assert "another job at work on it" in ran.err
    journal.close()
    # What a run that was killed has left is cleared.
    (engine.parent / "engine.partial" / "rank7.engine").write_text("")
    assert build(checkpoint, engine).code == 0
    assert "rank7.engine" not in names(engine)


@pytest.mark.parametrize("arguments", [(), ("a", "b")], ids=["none", "two"])
def test_there_is_one_checkpoint(engine: Path, arguments: tuple[str, ...]) -> None:
    ran = headrace("build", *arguments, "--output_dir", engine)
    assert ran.code == 2


def test_help_is_there_and_names_the_exit_codes() -> None:
    ran = headrace("build", "--help")
    assert all(
        f"--{name}" in ran.out for name in ("output_dir", "builder", "trtllm_build", "container", "retries", "print_command")
    )
    assert "Exit codes" in ran.out
