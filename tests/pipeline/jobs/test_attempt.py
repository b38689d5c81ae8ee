"""An attempt: a conversion in a process of its own, what it returns, and how one that is not wanted any more ends."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline import convert
from pipeline.jobs import attempt as module
from pipeline.jobs.attempt import attempt
from pipeline.sinks.hold import birth
from tests.support import checkpoints
from tests.support.directories import contents, values_bytes


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return {"model_dir": str(tmp_path / "model"), "output_dir": str(tmp_path / "out"), "scheduler": "threads"}


class Heard(list[Mapping[str, Any]]):
    def kinds(self) -> list[Any]:
        return [event["event"] for event in self]


def done(options: Mapping[str, Any], heard: Heard, stop_seconds: float = 60.0) -> dict[str, Any]:
    return attempt(options, lambda: True, heard.append, stop_seconds)


def before(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each process do this before anything else."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")))))


def test_a_conversion_and_once_more_when_it_is_done(options: dict[str, Any], tmp_path: Path) -> None:
    heard = Heard()
    result = done(options, heard)
    assert heard.kinds() == ["began", "started", "progress"]
    assert birth(heard[0]["pid"]) == ""
    assert (result["code"], result["error"], result["up_to_date"]) == (0, "", False)
    assert result["bytes_written"] == values_bytes(tmp_path / "out") == heard[-1]["bytes"] == heard[-1]["total_bytes"]
    assert result["seconds"] > 0
    assert result["peak_memory_bytes"] > 1 << 20
    assert result["stages"]["write"]["seconds"] > 0
    convert(**{**options, "output_dir": tmp_path / "alone"})
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    result = done(options, heard)
    assert (result["code"], result["up_to_date"], result["bytes_written"]) == (0, True, 0)


def test_a_refusal_comes_with_its_report(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model/config.json").unlink()
    result = done(options, Heard())
    assert (result["code"], result["passing"]) == (2, False)
    assert "config.json" in result["error"]
    assert "nothing was written" in result["error"]


def test_what_may_pass_is_said_to(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out/headrace.json.partial").open("w") as held:  # another conversion's
        fcntl.flock(held, fcntl.LOCK_EX)
        result = done(options, Heard())
    assert (result["code"], result["passing"]) == (2, True)
    assert "another job at work" in result["error"]


def test_a_process_that_is_killed(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before("import os, sys\nprint('so far', file=sys.stderr)\nos.kill(os.getpid(), 9)", tmp_path, monkeypatch)
    result = done(options, Heard())
    assert (result["code"], result["error"], result["tail"]) == (-signal.SIGKILL, "ended by SIGKILL\nso far", ["so far"])


def test_words_of_others_neither_end_nor_spoil_it(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [
        '{"event": "over"}',
        '{"event": "over", "result": 3}',
        '{"event": "began"}',
        '{"event": "error", "problems": 3}',
        '{"event": 1}',
    ]
    before(f"import sys\nfor line in {said!r}: print(line, file=sys.stderr)", tmp_path, monkeypatch)
    heard = Heard()
    result = done(options, heard)
    assert (result["code"], result["error"], result["passing"]) == (0, "", False)
    assert heard.kinds() == ["began", "started", "progress"]
    assert heard[0]["pid"] > 0


def test_what_is_not_wanted_any_more_ends_in_order(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    before(HOLDING, tmp_path, monkeypatch)
    heard = Heard()
    result = attempt(options, lambda: "started" not in heard.kinds(), heard.append, 60)
    assert (result["code"], "interrupted" in result["error"]) == (3, True)
    assert not (tmp_path / "out/config.json").exists()
    assert not list((tmp_path / "out").glob("*.lock*"))


# Nothing is written until it is told to end.
HOLDING = """
import os, time
real = os.pwrite
def pwrite(*arguments):
    time.sleep(30)
    return real(*arguments)
os.pwrite = pwrite
"""


def test_what_does_not_end_in_its_time_is_killed(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)", tmp_path, monkeypatch)
    heard, started = Heard(), time.monotonic()
    result = attempt(options, lambda: time.monotonic() - started < 0.5, heard.append, 0.5)
    assert (result["code"], heard.kinds()) == (-signal.SIGKILL, ["began"])
    assert time.monotonic() - started < 20


def test_no_room_for_its_job_file_may_pass(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/tmp/x")

    monkeypatch.setattr(module, "write_job", full)
    result = done(options, heard := Heard())
    assert (result["code"], result["passing"], heard) == (3, True, [])
    assert "No space left" in result["error"]
