"""Running a builder: its log, how it ends, how it is stopped, and what is said of it."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import stages.build.process
from stages.build import BuilderCall, BuilderOutcome, build
from stages.build.builders import Builder, BuilderProbe, probe
from stages.build.process import telling_lines
from tests import stand_ins
from tests.support.builds import alive


@pytest.fixture
def call(tmp_path: Path) -> Callable[..., BuilderCall]:
    (tmp_path / "partial").mkdir()
    (tmp_path / "token").touch()

    def make(program: str, *words: object, **more: Any) -> BuilderCall:
        found, places = BuilderProbe((program,), "command"), (tmp_path / "partial", tmp_path / "x.log", tmp_path / "token")
        return BuilderCall("x", Builder(), tuple(map(str, words)), *places, probed=found, **more)

    return make


def shell(call: Callable[..., BuilderCall], script: str) -> BuilderOutcome:
    return build(call("sh", "-c", script))


def test_what_a_builder_writes_goes_to_its_log_and_its_directory(call: Callable[..., BuilderCall], tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text("before\n")
    outcome = shell(call, "echo out; echo err >&2; echo made > file; cat")  # and standard input is empty
    assert (outcome.code, outcome.lines, outcome.stopped, outcome.refused, outcome.name) == (0, (), False, "", "x")
    before, command, *rest = (tmp_path / "x.log").read_text().splitlines()
    assert (before, rest) == ("before", ["out", "err"])
    assert command.startswith("$ sh -c echo out")
    assert (tmp_path / "partial" / "file").read_text() == "made\n"


def test_lines_come_as_they_are_written(call: Callable[..., BuilderCall], tmp_path: Path) -> None:
    thread = threading.Thread(target=shell, args=(call, f"echo one; while test -e {tmp_path}/wait; do sleep 0.05; done; echo two"))
    (tmp_path / "wait").touch()
    thread.start()
    seen = ""
    while "\none\n" not in seen:
        time.sleep(0.02)
        seen = (tmp_path / "x.log").read_text() if (tmp_path / "x.log").exists() else ""
    assert "\ntwo\n" not in seen
    (tmp_path / "wait").unlink()
    thread.join()
    assert "\none\ntwo\n" in (tmp_path / "x.log").read_text()


@pytest.mark.parametrize(("script", "code"), [("exit 3", 3), ("kill -9 $$", -9), ("kill -TERM $$", -15)])
def test_how_a_builder_ends_is_told(call: Callable[..., BuilderCall], script: str, code: int) -> None:
    outcome = shell(call, f"echo '[TRT] [E] no memory'; echo last; {script}")
    assert (outcome.code, outcome.lines) == (code, ("[TRT] [E] no memory", "last"))


def test_a_builder_that_is_not_there(call: Callable[..., BuilderCall]) -> None:
    outcome = build(call("/nowhere/trtllm-build"))
    assert outcome.code == 127
    assert outcome.lines == ("/nowhere/trtllm-build: No such file or directory",)


def test_an_option_that_the_builder_refuses_is_no_failure_of_a_build(call: Callable[..., BuilderCall]) -> None:
    script = (
        "echo 'usage: trtllm-build [-h]'; echo \"trtllm-build: error: argument --max_batch_size: invalid int value: 'x'\"; exit 2"
    )
    assert shell(call, script).refused == "argument --max_batch_size: invalid int value: 'x'"
    assert shell(call, "echo 'trtllm-build: error: x'; exit 1").refused == ""
    assert shell(call, "echo 'no help'; exit 2").refused == ""


def test_without_its_token_a_builder_does_not_begin(call: Callable[..., BuilderCall], tmp_path: Path) -> None:
    (tmp_path / "token").unlink()
    assert shell(call, "touch began").stopped
    assert not (tmp_path / "partial" / "began").exists()


def test_a_builder_whose_token_is_removed_is_ended_with_all_its_processes(
    call: Callable[..., BuilderCall], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.build.process, "GRACE_SECONDS", 0.3)
    pids, outcomes = tmp_path / "pids", []
    deaf = "trap '' TERM INT; sh -c \"trap '' TERM; while :; do sleep 1; done\" & "
    script = f"{deaf} echo $$ $! > {pids}.new; mv {pids}.new {pids}; while :; do sleep 1; done"
    thread = threading.Thread(target=lambda: outcomes.append(shell(call, script)))
    thread.start()
    while not pids.exists():
        time.sleep(0.02)
    numbers = [int(word) for word in pids.read_text().split()]
    assert all(map(alive, numbers))
    (tmp_path / "token").unlink()
    thread.join()
    assert [(outcome.stopped, outcome.code) for outcome in outcomes] == [(True, -9)]
    while any(map(alive, numbers)):  # the kernel takes a moment
        time.sleep(0.02)


def test_what_a_builder_leaves_running_is_ended(call: Callable[..., BuilderCall], tmp_path: Path) -> None:
    outcome = shell(call, f"sleep 600 & echo $! > {tmp_path}/pid")
    assert outcome.code == 0
    pid = int((tmp_path / "pid").read_text())
    while alive(pid):
        time.sleep(0.02)


def test_the_log_is_locked_while_a_builder_has_it(call: Callable[..., BuilderCall], tmp_path: Path) -> None:
    (tmp_path / "wait").touch()
    thread = threading.Thread(target=shell, args=(call, f"echo on; while test -e {tmp_path}/wait; do sleep 0.05; done"))
    thread.start()
    while "\non\n" not in ((tmp_path / "x.log").read_text() if (tmp_path / "x.log").exists() else ""):
        time.sleep(0.02)
    descriptor = os.open(tmp_path / "x.log", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (tmp_path / "wait").unlink()
    thread.join()
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_telling_lines_are_those_of_errors_and_the_last() -> None:
    lines = [
        "[I] begin",
        "[E] one",
        "[I] on",
        "[E] one",
        "Traceback (most recent call last):",
        '  File "x", line 1',
        "    raise Error",
        "",
        "done",
    ]
    assert telling_lines(lines) == ("[E] one", "Traceback (most recent call last):", "done")
    assert telling_lines([f"error {number}" for number in range(100)]) == tuple(f"error {number}" for number in range(88, 100))
    assert telling_lines([]) == ()


def test_probe_asks_the_command_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = stand_ins.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    found = probe(Builder())
    assert (found.words, found.kind, found.version, found.trouble) == ((str(command),), "command", "1.2.1", "")
    assert "--max_batch_size" in found.help
    monkeypatch.chdir(tmp_path)
    assert probe(Builder(command="bin/trtllm-build")).words == (str(command),)


def test_probe_takes_the_package_where_there_is_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(stand_ins.PACKAGES))
    monkeypatch.setenv("PYTHONPATH", stand_ins.python_path())
    for kind in ("auto", "python"):
        found = probe(Builder(kind))
        assert (found.kind, found.version, found.trouble) == ("python", "1.2.1", "")
        assert "--max_batch_size" in found.help
    assert probe(Builder("command")).trouble == "no trtllm-build on PATH"


def test_probe_says_what_is_missing() -> None:
    assert probe(Builder()).trouble == "no trtllm-build on PATH and no Python package tensorrt_llm"
    assert probe(Builder("python")).trouble == "no Python package tensorrt_llm"
    assert probe(Builder("command", "/nowhere/trtllm-build")).trouble == "no /nowhere/trtllm-build"
    assert "docker-of-nobody" in probe(Builder(container=("docker-of-nobody", "run"))).trouble


def test_probe_tells_why_a_builder_does_not_run(tmp_path: Path) -> None:
    command = tmp_path / "trtllm-build"
    command.write_text("#!/bin/sh\necho 'ImportError: libcuda.so.1: cannot open shared object file' >&2; exit 1\n")
    command.chmod(0o755)
    found = probe(Builder(command=str(command)))
    assert found.words
    assert "exit code 1" in found.trouble
    assert "libcuda.so.1" in found.trouble


def test_a_container_is_not_started_to_be_asked(tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    docker.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    docker.chmod(0o755)
    found = probe(Builder(container=(str(docker), "run", "image")))
    assert (found.words, found.kind, found.help, found.trouble) == (
        (str(docker), "run", "image", "trtllm-build"),
        "command",
        "",
        "",
    )
    assert not (tmp_path / "started").exists()


def test_calls_and_outcomes_are_plain_values(call: Callable[..., BuilderCall]) -> None:
    import pickle

    made = call("true")
    assert pickle.loads(pickle.dumps(made)) == made
    outcome = build(made)
    assert pickle.loads(pickle.dumps(outcome)) == outcome
    assert json.dumps(outcome.seconds)
