"""Processes: told apart by their births, heard line by line, and never outliving what made them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.jobs import conversion, process
from pipeline.jobs.conversion import Process, command, environment
from pipeline.jobs.files import job_file
from tests.support import checkpoints
from tests.support.directories import contents, values_bytes


@pytest.fixture
def job(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    file = tmp_path / "job.toml"
    file.write_text(job_file({"model_dir": str(tmp_path / "model"), "output_dir": str(tmp_path / "out"), "scheduler": "threads"}))
    return file


def wait(until: Callable[[], object]) -> None:
    while not until():
        time.sleep(0.02)


@contextlib.contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as started:
        yield started
        started.kill()


def test_a_birth_is_one_process_and_a_zombie_is_none() -> None:
    with sleeper() as started:
        born = process.birth(started.pid)
        assert born == process.birth(started.pid) != process.birth(os.getpid())
        assert process.alive(started.pid, born)
        assert not process.alive(os.getpid(), born), "another process with its pid is another"
        started.kill()
        wait(lambda: not process.birth(started.pid))
        assert not process.alive(started.pid, born)


def test_kill_ends_a_process_even_where_it_is_stopped_but_no_other_with_its_pid() -> None:
    with sleeper() as started:
        born = process.birth(started.pid)
        assert process.kill(started.pid, f"{born}0")
        assert process.alive(started.pid, born)
        started.send_signal(signal.SIGSTOP)
        assert process.kill(started.pid, born)
        assert process.kill(started.pid, born)
        assert process.kill(None, "")


def test_what_another_container_numbers_is_neither_called_gone_nor_killed() -> None:
    with sleeper() as started:
        boot, namespace, start = process.birth(started.pid).split(" ")
        assert process.alive(started.pid, f"{boot} pid:[1] {start}")
        assert process.kill(started.pid, f"{boot} pid:[1] {start}")
        assert process.birth(started.pid)
        # What was before the machine started again is gone, whoever numbered it.
        assert not process.alive(started.pid, f"before {namespace} {start}")
        assert not process.alive(started.pid, f"before pid:[1] {start}")
        assert process.alive(started.pid, ""), "where the system does not say"


def test_a_conversion_waits_until_it_is_told_to_go_and_says_what_it_does(job: Path, tmp_path: Path) -> None:
    heard: list[Mapping[str, Any]] = []
    made = Process(job, heard.append)
    time.sleep(0.5)
    assert made.poll() is None
    assert not (tmp_path / "out").exists()
    made.go()
    wait(lambda: made.poll() is not None)
    assert made.poll() == 0
    assert [event["event"] for event in heard] == ["started", "progress", "finished"]
    assert made.done_bytes == made.total_bytes > 0
    assert made.finished["bytes_written"] == made.done_bytes == values_bytes(tmp_path / "out")
    assert made.stages["write"]["seconds"] > 0
    assert "config.json" in contents(tmp_path / "out")


def test_a_refusal_comes_with_its_report(job: Path, tmp_path: Path) -> None:
    (tmp_path / "model/config.json").unlink()
    made = Process(job, lambda _: None)
    made.go()
    wait(lambda: made.poll() is not None)
    assert made.poll() == 2
    assert "nothing was written" in made.report()
    assert not made.passing


def test_what_may_pass_is_said_to(job: Path, tmp_path: Path) -> None:
    # Another conversion holds the directory.
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out/headrace.json.partial").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        made = Process(job, lambda _: None)
        made.go()
        wait(lambda: made.poll() is not None)
    assert made.poll() == 2
    assert "another job at work" in made.report()
    assert made.passing


def test_a_bug_comes_with_its_last_lines(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['pipeline.planning.make_plan'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = Process(job, lambda _: None)
    made.go()
    wait(lambda: made.poll() is not None)
    assert made.poll() == 1
    assert made.report().splitlines()[0].startswith("Traceback")
    assert "pipeline.planning.make_plan" in made.report().splitlines()[-1]


@pytest.mark.parametrize("told", [False, True], ids=["before go", "after go"])
def test_stop_and_kill(job: Path, told: bool) -> None:
    made = Process(job, lambda _: None)
    if told:
        made.go()
    made.stop()
    wait(lambda: made.poll() is not None)
    assert made.poll() in (-signal.SIGTERM, 3, 0)
    assert Process(job, lambda _: None).kill() == -signal.SIGKILL


# A parent that starts a conversion, says its pid, and waits.
PARENT = """
import sys, time
from pathlib import Path
from pipeline.jobs.conversion import Process
made = Process(Path(sys.argv[1]), lambda _: None)
if sys.argv[2] == "go":
    made.go()
print(made.pid, flush=True)
time.sleep(60)
"""

# Holds a conversion in the middle: what opens its job file waits for whoever writes to a pipe.
HOLDING = """
import sys
def hold(event, arguments):
    if event == "open" and str(arguments[0]) == {job!r}:
        open({pipe!r}).read()
sys.addaudithook(hold)
"""


@pytest.mark.parametrize(("told", "stopped"), [("wait", False), ("go", False), ("go", True)])
def test_a_conversion_never_outlives_a_parent_that_is_killed(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, stopped: bool
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "sitecustomize.py").write_text(HOLDING.format(job=str(job), pipe=str(pipe)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    with subprocess.Popen([sys.executable, "-c", PARENT, str(job), told], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        born = process.birth(child)
        if told == "go":
            held = os.open(pipe, os.O_WRONLY)  # once the child waits for it
        if stopped:
            os.kill(child, signal.SIGSTOP)
        assert process.alive(child, born)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait(lambda: not process.alive(child, born))
        if told == "go":
            os.close(held)
    assert not (tmp_path / "out").exists()


def test_a_conversion_whose_parent_is_gone_before_it_looks_does_nothing(job: Path, tmp_path: Path) -> None:
    arguments = command("pipeline.cli.child", "convert", str(job), "--log_format", "json")
    ran = subprocess.run(arguments, stdin=subprocess.DEVNULL, env=environment(), check=False, capture_output=True)
    assert ran.returncode == 3
    assert not (tmp_path / "out").exists()


def test_a_conversion_whose_parent_is_gone_after_it_spoke_does_nothing_either(job: Path, tmp_path: Path) -> None:
    arguments = command("pipeline.cli.child", "convert", str(job), "--log_format", "json")
    ran = subprocess.run(arguments, input=b"go 1\n", env=environment(), check=False, capture_output=True)
    assert ran.returncode == 3
    assert not (tmp_path / "out").exists()


def test_an_installed_package_puts_nothing_on_the_path_of_what_a_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert environment()["PYTHONPATH"] == os.pathsep.join([str(conversion.ROOT), "/elsewhere"])
    monkeypatch.setattr(conversion, "ROOT", Path(sysconfig.get_path("purelib")))
    assert environment()["PYTHONPATH"] == "/elsewhere"
    monkeypatch.delenv("PYTHONPATH")
    assert "PYTHONPATH" not in environment()
