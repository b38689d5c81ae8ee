"""Builders that fail, die, hang or are not there: exit codes, their own words, and nothing left but the log."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline import EngineFailed
from pipeline import build as build_in_python
from pipeline.engine import output as engine_output
from pipeline.engine.output import JOURNAL
from tests import stand_ins
from tests.support.builds import alive, build, names, provenance
from tests.support.commands import COMMAND

pytestmark = pytest.mark.usefixtures("on_path")


@pytest.fixture
def no_builder(on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


@pytest.mark.parametrize("scheduler", ["threads", "local"])
def test_a_failure_ends_with_4_and_the_builder_s_own_lines(
    checkpoint: Path, engine: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    monkeypatch.setenv("STAND_IN_TROUBLE", "fail")
    ran = build(checkpoint, engine, "--quiet", "--scheduler", scheduler)
    assert (ran.code, ran.out) == (4, "")
    head, *lines = ran.err.splitlines()
    assert head.startswith(f"headrace: {engine}: ")
    assert "trtllm-build ended with exit code 1 after" in head
    assert "  [TRT] [E] Error Code 2: OutOfMemory (Requested size was 68719476736 bytes.)" in lines
    assert "  AssertionError: Engine building failed, please check error log." in lines
    assert "    raise" not in ran.err  # lines that a traceback quotes are in the log
    assert f"Log: {engine}.log" in lines
    # Here is no GPU, and it says so.
    assert lines[-1] == f"  trtllm-build --checkpoint_dir {checkpoint} --output_dir {engine}"
    assert "shows no NVIDIA GPU" in lines[-2]
    assert names(engine.parent) == {"ranks", "engine.log"}
    assert "Traceback" in (engine.parent / "engine.log").read_text()


def test_a_failure_is_one_json_event(checkpoint: Path, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_TROUBLE", "fail")
    last = json.loads(build(checkpoint, engine, "--log_format", "json").err.splitlines()[-1])
    assert (last["event"], last["exit_code"]) == ("error", 4)
    assert "OutOfMemory" in last["message"]


def test_what_killed_a_builder_is_told(checkpoint: Path, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_TROUBLE", "die")
    ran = build(checkpoint, engine)
    assert ran.code == 4
    assert "ended with signal 9" in ran.err


def test_a_builder_that_says_nothing_and_writes_too_little(checkpoint: Path, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_TROUBLE", "short")
    ran = build(checkpoint, engine)
    assert ran.code == 4
    assert "ended without an error, but wrote no whole engine; not there, or empty:\n  rank0.engine\n  rank1.engine\n" in ran.err
    assert names(engine.parent) == {"ranks", "engine.log"}


def test_a_failed_replacement_leaves_the_old_engine(checkpoint: Path, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build(checkpoint, engine).code == 0
    monkeypatch.setenv("STAND_IN_TROUBLE", "fail")
    assert build(checkpoint, engine, "--overwrite", "--max_batch_size", 4).code == 4
    assert build(checkpoint, engine).out.endswith("nothing to do\n")


def test_what_failed_once_is_tried_again_where_asked(
    checkpoint: Path, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_TROUBLE", "once")
    monkeypatch.setenv("STAND_IN_STATE", str(tmp_path / "state"))
    assert build(checkpoint, engine).code == 4
    (tmp_path / "state").unlink()
    ran = build(checkpoint, engine, "--retries", 2)
    assert ran.code == 0
    assert f"the builder failed; attempt 2 of 3 to build {engine}" in ran.err
    assert provenance(engine)["attempts"] == 2
    assert (engine.parent / "engine.log").read_text().count("$ ") == 2


def test_attempts_come_to_an_end(checkpoint: Path, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_TROUBLE", "fail")
    ran = build(checkpoint, engine, "--retries", 1)
    assert ran.code == 4
    assert ", 2 attempts;" in ran.err


def test_an_option_that_the_builder_refuses_is_not_tried_again(checkpoint: Path, engine: Path, on_path: Path) -> None:
    # A value that no help tells of.
    ran = build(checkpoint, engine, "--kv_cache_type", "pagedd", "--retries", 3)
    assert ran.code == 2
    assert "argument --kv_cache_type: invalid KVCacheType value: 'pagedd'" in ran.err
    assert (engine.parent / "engine.log").read_text().count("$ ") == 1
    assert names(engine.parent) == {"ranks", "engine.log"}
    assert on_path.exists()


@pytest.mark.usefixtures("no_builder")
def test_without_tensorrt_llm_it_says_what_to_do(checkpoint: Path, engine: Path) -> None:
    ran = build(checkpoint, engine, "--max_batch_size", 8, "--lora_dir", "a b")
    assert ran.code == 4
    assert "no trtllm-build on PATH and no Python package tensorrt_llm" in ran.err
    assert "pip install 'headrace[engine]' --extra-index-url https://pypi.nvidia.com" in ran.err
    command = shlex.split(ran.err.splitlines()[-1])
    places = ["--checkpoint_dir", str(checkpoint), "--output_dir", str(engine)]
    assert command == ["trtllm-build", *places, "--max_batch_size", "8", "--lora_dir", "a b"]
    assert names(engine.parent) == {"ranks"}


@pytest.mark.usefixtures("no_builder")
def test_the_command_line_is_printed_for_elsewhere(checkpoint: Path, engine: Path) -> None:
    ran = build(checkpoint, engine, "--print_command", "--max_batch_size", 8, "--trtllm_build", "/opt/trtllm-build")
    assert (ran.code, ran.err) == (0, "")
    places = ["--checkpoint_dir", str(checkpoint), "--output_dir", str(engine)]
    assert shlex.split(ran.out) == ["/opt/trtllm-build", *places, "--max_batch_size", "8"]
    assert build(checkpoint, engine, "--print_command", "--max_batch", 8).code == 2
    assert names(engine.parent) == {"ranks"}


def test_the_printed_command_line_builds(checkpoint: Path, engine: Path, tmp_path: Path) -> None:
    printed = build(checkpoint, engine, "--print_command", "--max_batch_size", 8).out
    subprocess.run(printed, shell=True, check=True, capture_output=True, cwd=tmp_path)
    assert {"config.json", "rank0.engine", "rank1.engine"} <= names(engine)


@pytest.mark.usefixtures("no_builder")
def test_a_container_is_told_the_places(checkpoint: Path, engine: Path, tmp_path: Path) -> None:
    """A stand-in docker: it runs what stands behind the image."""
    inside = stand_ins.install(tmp_path / "inside")
    docker = tmp_path / "docker"
    docker.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nwhile [ "$1" != image ]; do shift; done; shift 2\nexec {inside} "$@"\n'
    )
    docker.chmod(0o755)
    container = (
        f"{docker} run -v {{checkpoint}}:{{checkpoint}}:ro -v {{engine}}:{{engine}} --user {{uid}}:{{gid}} -e X={{other}} image"
    )
    ran = build(checkpoint, engine, "--container", container, "--max_batch_size", 4)
    assert ran.code == 0, ran
    asked = (tmp_path / "asked").read_text()
    assert (
        f"-v {checkpoint}:{checkpoint}:ro -v {engine}.partial:{engine}.partial --user {os.getuid()}:{os.getgid()} -e X={{other}}"
        in asked
    )
    assert build(checkpoint, engine, "--container", container, "--max_batch_size", 4).out.endswith("nothing to do\n")
    assert "other inputs (container)" in build(checkpoint, engine, "--container", f"{docker} run image", "--max_batch_size", 4).err
    assert "--max_batch: found" in build(checkpoint, engine, "--container", container, "--max_batch", 4).err


def hanging(checkpoint: Path, engine: Path, state: Path, scheduler: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A run whose builder hangs, and the builder's processes."""
    environment = {**os.environ, "STAND_IN_TROUBLE": "hang", "STAND_IN_STATE": str(state)}
    words = ["build", checkpoint, "--output_dir", engine, "--scheduler", scheduler]
    running = subprocess.Popen(
        [*COMMAND, *map(str, words)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not state.exists() or not state.read_text():
        assert running.poll() is None, running.communicate()
        time.sleep(0.02)
    pids = json.loads(state.read_text())
    assert all(map(alive, pids))
    return running, pids


@pytest.mark.parametrize("scheduler", ["threads", "synchronous", "local"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
def test_a_run_that_is_stopped_ends_its_builder(
    checkpoint: Path, engine: Path, tmp_path: Path, scheduler: str, sent: signal.Signals
) -> None:
    running, pids = hanging(checkpoint, engine, tmp_path / "state", scheduler)
    running.send_signal(sent)
    _, errors = running.communicate()
    assert running.returncode == 3, errors
    assert f"interrupted; nothing is left of {engine}: run the same command again" in errors
    assert "Traceback" not in errors
    while any(map(alive, pids)):
        time.sleep(0.02)
    assert names(engine.parent) == {"ranks", "engine.log", "state"}
    assert build(checkpoint, engine).code == 0


# Its builder is given ten seconds to end.
@pytest.mark.parametrize("scheduler", [pytest.param("threads", marks=pytest.mark.nightly), "local"])
def test_a_run_that_is_killed_takes_its_builder_with_it(checkpoint: Path, engine: Path, tmp_path: Path, scheduler: str) -> None:
    running, pids = hanging(checkpoint, engine, tmp_path / "state", scheduler)
    running.kill()
    running.communicate()
    while any(map(alive, pids)):
        time.sleep(0.02)
    assert build(checkpoint, engine).code == 0


def test_a_builder_that_an_earlier_run_has_left_is_waited_for(
    checkpoint: Path, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.with_name("engine.partial").mkdir()
    engine.with_name("engine.partial").joinpath(JOURNAL).touch()
    with engine.with_name("engine.log").open("w") as log:
        fcntl.flock(log, fcntl.LOCK_SH)
        monkeypatch.setattr(engine_output, "STOP_SECONDS", 0.1)
        ran = build(checkpoint, engine)
        assert ran.code == 4
        assert f"a builder of an earlier run is still at work and has {engine}.log open" in ran.err
    monkeypatch.setattr(engine_output, "STOP_SECONDS", 30)  # now it has ended
    assert build(checkpoint, engine).code == 0


def test_errors_in_python(checkpoint: Path, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build_in_python(checkpoint, output_dir=engine, scheduler="threads", max_batch_size=8)
    assert (built.directory, built.attempts, built.up_to_date) == (engine, 1, False)
    assert build_in_python(checkpoint, output_dir=engine, scheduler="threads", max_batch_size=8).up_to_date
    monkeypatch.setenv("STAND_IN_TROUBLE", "fail")
    with pytest.raises(EngineFailed, match="OutOfMemory"):
        build_in_python(checkpoint, output_dir=engine, scheduler="threads", overwrite=True)
