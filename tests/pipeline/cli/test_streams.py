"""Standard output and error that are closed, full, or that nobody reads: the work is done and the exit code is what it is."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from pipeline.cli.streams import Unfailing
from tests.support import checkpoints
from tests.support.commands import COMMAND
from tests.support.examples import by_night
from tests.support.places import ROOT

REDIRECTIONS = [
    ">&-",
    "2>&-",
    "<&-",
    "<&- >&- 2>&-",
    "> /dev/full",
    "2> /dev/full",
    "> /dev/full 2>&1",
    "| head -0",
    "2>&1 | head -0",
    "| true",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("streams") / "model"
    checkpoints.write(place, checkpoints.LLAMA)
    return place


def in_a_shell(arguments: list[str], redirection: str) -> tuple[int, str, str]:
    """The exit code of the command itself, and what came out of both streams where they are not redirected."""
    shell = f"set -o pipefail; ( {shlex.join([*COMMAND, *arguments])}; echo $? > code ) {redirection}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False, timeout=120, env=environment)
    return ran.returncode, ran.stdout, ran.stderr


@pytest.mark.parametrize("redirection", by_night(REDIRECTIONS, ["<&- >&- 2>&-", "> /dev/full 2>&1", "2>&1 | head -0"]))
def test_a_conversion_is_done_whoever_listens(
    model: Path, tmp_path: Path, redirection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["convert", "--model_dir", str(model), "--output_dir", "out", "--scheduler", "threads"]
    _, out, err = in_a_shell(arguments, redirection)
    assert (tmp_path / "code").read_text() == "0\n"
    assert "Traceback" not in out + err
    assert "Exception ignored" not in out + err
    assert (tmp_path / "out/config.json").exists()
    # Nothing that was printed went into a file that had got a stream's number.
    _, out, err = in_a_shell(["verify", "out", "--source", str(model)], "")
    assert (tmp_path / "code").read_text() == "0\n", out + err


@pytest.mark.parametrize("redirection", [">&- 2>&-", "> /dev/full 2>&1", "2>&1 | head -0"])
def test_the_exit_code_of_a_refusal(model: Path, tmp_path: Path, redirection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    in_a_shell(["convert", "--model_dir", str(model), "--output_dir", "out", "--tp_size", "3"], redirection)
    assert (tmp_path / "code").read_text() == "2\n"


def test_a_stream_that_works_has_everything_in_order(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = in_a_shell(["convert", "--model_dir", str(model), "--output_dir", "out", "--scheduler", "threads"], "")
    assert code == 0
    assert err.startswith("converting ")
    assert "rank0.safetensors" in out
    code, out, err = in_a_shell(["convert", "--model_dir", str(model), "--output_dir", "ö", "--scheduler", "threads"], "")
    assert "ö" in out


def test_a_pipe_that_is_full_is_waited_for() -> None:
    """One whose other end has made it non-blocking loses nothing."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    child = os.fork()
    if not child:
        os.close(writing)
        total = 0
        while data := os.read(reading, 1 << 16):
            total += len(data)
        os._exit(total == 1 << 20 and 7)
    os.close(reading)
    assert Unfailing(writing).write(b"x" * (1 << 20)) == 1 << 20
    os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
