"""What is heard of builders: each whole line of their logs once, in order, as text or as JSON."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.engine.log import BuildLog, Tail


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=12), max_size=6))
def test_lines_are_said_once_however_they_are_written(tmp_path: Path, pieces: list[bytes]) -> None:
    log, heard = tmp_path / "log", []
    log.unlink(missing_ok=True)
    tail = Tail([log], lambda path, line: heard.append((path, line)))
    for piece in pieces:
        tail.flush()
        with log.open("ab") as file:
            file.write(piece)
    with tail:
        pass
    lines = [line for part in b"".join(pieces).split(b"\n") for line in part.split(b"\r")]
    assert heard == [(log, line.decode(errors="replace").rstrip()) for line in lines if line.strip()]


def test_lines_are_said_while_the_log_grows(tmp_path: Path) -> None:
    heard: list[str] = []
    logs = [tmp_path / "a", tmp_path / "b"]
    with Tail(logs, lambda _, line: heard.append(line)), logs[1].open("w") as file:
        for text, whole in (("one\ntw", ["one"]), ("o\n", ["one", "two"])):
            file.write(text)
            file.flush()
            while heard != whole:
                time.sleep(0.01)
        file.write("no end")
    assert heard == ["one", "two", "no end"]


@pytest.mark.parametrize(("quiet", "log_format"), [(False, "text"), (False, "json"), (True, "text")])
def test_events(tmp_path: Path, quiet: bool, log_format: str) -> None:
    stream = io.StringIO()
    log = BuildLog(quiet, log_format, stream)  # type: ignore[arg-type]
    log.waiting("GPU", "tcp://host:1")
    log.again(tmp_path, 2, 3)
    log.built(tmp_path, 1.25, 2048)
    lines = stream.getvalue().splitlines()
    if quiet:
        assert lines == []
    elif log_format == "json":
        assert [json.loads(line)["event"] for line in lines] == ["waiting", "retry", "built"]
    else:
        assert lines == [
            "waiting for a Dask worker with the resource GPU: dask worker tcp://host:1 --resources GPU=1",
            f"the builder failed; attempt 2 of 3 to build {tmp_path}",
            f"built {tmp_path} in 1.2 s, 2.0 KiB",
        ]
