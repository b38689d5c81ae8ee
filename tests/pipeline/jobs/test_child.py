"""A command in a process of its own: heard line by line whatever it prints, and never outliving what made it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.jobs import child
from pipeline.jobs.child import Child, environment
from pipeline.sinks.hold import birth
from tests.pipeline.jobs.stand_in import wait

# Done by a child before anything else.
Before = Callable[[str], None]


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Before:
    def write(code: str) -> None:
        (tmp_path / "site").mkdir()
        (tmp_path / "site/sitecustomize.py").write_text(code)
        paths = (str(tmp_path / "site"), os.environ.get("PYTHONPATH", ""))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))

    return write


def ended(made: Child) -> int:
    """Its exit code."""
    wait(lambda: made.poll() is not None)
    code = made.poll()
    assert code is not None
    return code


def test_it_says_what_it_prints_to_those_who_ask() -> None:
    made = Child(["--version"], stdout=subprocess.PIPE)
    assert made.process.stdout
    with made.process.stdout as stream:
        assert stream.read().startswith(b"headrace ")
    assert (ended(made), made.events, list(made.tail)) == (0, {}, [])


def test_a_refusal_is_an_event(tmp_path: Path) -> None:
    heard: list[Mapping[str, Any]] = []
    made = Child(["convert", str(tmp_path / "gone.toml"), "--log_format", "json"], heard.append)
    assert ended(made) == 2
    assert [event["event"] for event in heard] == ["error"]
    assert "gone.toml" in made.report(2)
    assert heard[0]["problems"][0]["subject"] == str(tmp_path / "gone.toml")


ODD = [
    '{"event": 1}',
    "[]",
    '{"event": []}',
    '{"no": "event"}',
    "null",
    "3",
    "NaN",
    '"event"',
    "{",
    "[" * 100_000,
    "9" * 10_000,
    "",
]


def test_whatever_others_print_is_heard_or_kept_and_nothing_hangs(before: Before) -> None:
    long = 'b"x" * (5 << 20)'
    before(f"import os\nfor line in {[each.encode() for each in ODD]!r} + [{long}, bytes(range(256)), {long}]:\n"
           "    rest = line + b'\\n'\n    while rest:\n        rest = rest[os.write(2, rest):]\n")  # fmt: skip
    heard: list[Mapping[str, Any]] = []
    made = Child(["--version"], heard.append)
    assert ended(made) == 0
    assert [event["event"] for event in heard] == [1, []]
    assert "null" in made.tail
    assert sum(map(len, made.tail)) < 1 << 20, "of long lines the beginning is kept"


def test_a_listener_that_fails_does_not_stop_it(before: Before) -> None:
    before('import sys\nfor n in range(4_000): print(\'{"event": "progress", "n": %d}\' % n, file=sys.stderr)')

    def fail(_: Mapping[str, Any]) -> None:
        raise ZeroDivisionError

    made = Child(["--version"], fail)
    assert (ended(made), made.events["progress"]["n"]) == (0, 3_999)


def test_a_bug_comes_with_its_last_lines(before: Before, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('model_dir = "m"\noutput_dir = "o"\n')
    before("import sys\nsys.modules['pipeline.planning.make_plan'] = None\n")
    made = Child(["convert", str(tmp_path / "job.toml"), "--log_format", "json"])
    assert ended(made) == 1
    assert made.report(1).splitlines()[0].startswith("Traceback")
    assert "pipeline.planning.make_plan" in made.report(1).splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals(before: Before, number: signal.Signals) -> None:
    before("import sys, time\nprint('at it', file=sys.stderr)\ntime.sleep(60)")
    made = Child(["--version"])
    wait(lambda: made.tail)
    made.signal(number)
    code = ended(made)
    assert (code, made.report(code)) == (-number, f"ended by {number.name}\nat it")
    made.signal(number)  # to one that is gone


# A parent that starts a child, says its pid, and waits.
PARENT = """
import sys, time
from pipeline.jobs.child import Child
made = Child(["convert", sys.argv[1]])
print(made.process.pid, flush=True)
time.sleep(60)
"""

# Holds a child in the middle: what opens its job file waits for whoever writes to a pipe.
HOLDING = """
import sys
def hold(event, arguments):
    if event == "open" and str(arguments[0]) == {job!r}:
        open({pipe!r}).read()
sys.addaudithook(hold)
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_it_never_outlives_a_parent_that_is_killed(tmp_path: Path, before: Before, stopped: bool) -> None:
    job, pipe = tmp_path / "job.toml", tmp_path / "pipe"
    job.write_text('model_dir = "m"\noutput_dir = "o"\n')
    os.mkfifo(pipe)
    before(HOLDING.format(job=str(job), pipe=str(pipe)))
    with subprocess.Popen([sys.executable, "-c", PARENT, str(job)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        held = os.open(pipe, os.O_WRONLY)  # once the child waits for it
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        born = birth(pid)
        assert born
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait(lambda: birth(pid) != born)
        os.close(held)


@pytest.mark.parametrize("parent", ["1", str(os.getppid())])
def test_one_whose_parent_is_gone_before_it_looks_does_nothing(parent: str) -> None:
    command = [sys.executable, "-P", "-m", "pipeline.cli.child", parent, "--version"]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, env=environment(), check=False, capture_output=True)
    assert (ran.returncode, ran.stdout) == (3, b"")


def test_an_installed_package_puts_nothing_on_the_path_of_what_a_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert environment()["PYTHONPATH"] == os.pathsep.join([str(child.ROOT), "/elsewhere"])
    monkeypatch.setattr(child, "ROOT", Path(sysconfig.get_path("purelib")))
    assert environment()["PYTHONPATH"] == "/elsewhere"
    monkeypatch.delenv("PYTHONPATH")
    assert "PYTHONPATH" not in environment()
