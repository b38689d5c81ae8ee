"""build: run TensorRT-LLM's own builder, which writes the engine files of a checkpoint.

Runs on the worker that has the GPU. The builder is a process with a process group of its own, whose output goes straight into its
log file. This holds for `trtllm-build`, for a container around it, and for one rank built through Python (`stages/build_rank.py`).
Machines exchange only plain values and files: the log, and a token file whose removal stops the builder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Literal

POLL_SECONDS = 0.2  # between two looks at the token
GRACE_SECONDS = 10.0  # between asking a builder to end and killing it
SYNC_SECONDS = 1.0  # between two times that the log is brought to where other machines see it
HELP_SECONDS = 300.0  # importing TensorRT-LLM takes half a minute on a cold disk
TAIL_BYTES = 64 << 10
SHOWN_LINES = 12

PACKAGE = "tensorrt_llm"
RANK_SCRIPT = Path(__file__).with_name("build_rank.py")

_VERSION = re.compile(r"TensorRT[- ]LLM version:\s*(\S+)")
_TELLING = re.compile(r"\[(E|F)\]|error|exception|assert|killed|out of memory|not supported", re.IGNORECASE)
# The guard's standard input ends when the process that runs the builder has ended.
_GUARD = "read -r _; kill -TERM -{group}; sleep {grace}; kill -KILL -{group}"
_REFUSED = re.compile(r"^\S*: error: (.+)$")  # argparse's last line


@dataclass(frozen=True)
class Builder:
    """The builder to use: a command (a name on PATH, or a path), perhaps in a container, or the Python package."""

    kind: Literal["auto", "command", "python"] = "auto"
    command: str = "trtllm-build"
    container: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuilderProbe:
    """The builder that a machine has.

    `words`: the beginning of its command line, empty where there is no builder. `kind`: "command" or "python". `help`: the output
    of its --help, "" for a container, which is not started for it. `trouble`: why there is no builder, or why it does not run.
    `host`: the machine.
    """

    words: tuple[str, ...] = ()
    kind: str = ""
    version: str = ""
    help: str = ""
    trouble: str = ""
    host: str = field(default_factory=socket.gethostname)


@dataclass(frozen=True)
class BuilderCall:
    """One run of a builder.

    `name`: unlike any other call's. `words`: its command line. `directory`: it writes there and runs there. `token`: it is stopped
    when this file is removed. `sync`: whether to flush the log to the file system, so that other machines see it.
    """

    name: str
    words: tuple[str, ...]
    directory: Path
    log: Path
    token: Path
    sync: bool = False


@dataclass(frozen=True)
class BuilderOutcome:
    """The outcome of a call.

    `code`: the exit code, negative for a signal. `host`: the machine that it ran on. `gpus`: how many that machine shows. `lines`:
    those of the log that tell why it failed. `stopped`: whether its token was removed. `refused`: the builder's message on an
    option that it does not take.
    """

    name: str
    code: int
    seconds: float
    host: str
    gpus: int
    lines: tuple[str, ...] = ()
    stopped: bool = False
    refused: str = ""


def probe(builder: Builder) -> BuilderProbe:
    """Find the builder of this machine and ask it for its version and its options."""
    if builder.container:
        if shutil.which(builder.container[0]) is None:
            return BuilderProbe(trouble=f"{builder.container[0]}, which begins the container command, is not on PATH")
        return BuilderProbe((*builder.container, builder.command), "command")
    words, kind, trouble = _find(builder)
    if not words:
        return BuilderProbe(trouble=trouble)
    environment = {**os.environ, "COLUMNS": "200"}
    try:
        ran = subprocess.run(
            [*words, "--help"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=HELP_SECONDS,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return BuilderProbe(words, kind, trouble=f"{words[0]} --help: {error}")
    if ran.returncode:
        last = "\n  ".join(telling_lines((ran.stdout + ran.stderr).splitlines()))
        return BuilderProbe(words, kind, trouble=f"{' '.join(words)} --help ended with exit code {ran.returncode}:\n  {last}")
    version = _VERSION.search(ran.stdout + ran.stderr)
    return BuilderProbe(words, kind, version[1] if version else _package_version(), ran.stdout)


def run(call: BuilderCall) -> BuilderOutcome:
    """Run a builder to its end, or until its token is removed; its process group is gone when this returns.

    The group also ends when this process is killed. The log stays locked (shared) as long as a process of the builder has it open.
    """
    began, here = time.perf_counter(), (socket.gethostname(), gpus())
    with call.log.open("ab") as log:
        if not call.token.exists():
            return BuilderOutcome(call.name, 0, 0.0, *here, stopped=True)
        fcntl.flock(log, fcntl.LOCK_SH)
        log.write(f"$ {' '.join(call.words)}\n".encode())
        log.flush()
        start = log.tell()
        try:
            process = subprocess.Popen(
                call.words,
                cwd=call.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        except OSError as error:
            why = (f"{call.words[0]}: {error.strerror or error}",)
            return BuilderOutcome(call.name, 127, time.perf_counter() - began, *here, why)
        try:
            with _guarded(process):
                stopped = _wait(process, call, log.fileno())
        finally:
            _end(process)
    log_lines = _tail(call.log, start)
    refused = _REFUSED.match(log_lines[-1]) if process.returncode == 2 else None
    lines = telling_lines(log_lines) if process.returncode else ()
    seconds = time.perf_counter() - began
    return BuilderOutcome(call.name, process.returncode, seconds, *here, lines, stopped, refused[1] if refused else "")


def gpus() -> int:
    """The number of NVIDIA GPUs that this machine shows."""
    return len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])


def telling_lines(lines: list[str]) -> tuple[str, ...]:
    """Choose the last lines of a log that tell what went wrong: those about errors, each once, and the last two.

    Indented lines are left out: they are a traceback's.
    """
    lines = [line.rstrip() for line in lines if line.strip() and not line[0].isspace()]
    last = len(lines) - 2
    telling = dict.fromkeys(line for number, line in enumerate(lines) if number >= last or _TELLING.search(line))
    return tuple(telling)[-SHOWN_LINES:]


def _find(builder: Builder) -> tuple[tuple[str, ...], str, str]:
    """The words that begin the builder's command line, its kind, and what is missing where there is no builder."""
    missing = []
    if builder.kind != "python":
        program = shutil.which(builder.command)
        if program:
            return (str(Path(program).absolute()),), "command", ""
        missing.append(f"no {builder.command}{'' if '/' in builder.command else ' on PATH'}")
    if builder.kind != "command":
        if util.find_spec(PACKAGE):
            return (sys.executable, "-P", str(RANK_SCRIPT)), "python", ""
        missing.append(f"no Python package {PACKAGE}")
    return (), "", " and ".join(missing)


def _package_version() -> str:
    """The installed version of TensorRT-LLM, "" for none."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return ""


def _wait(process: subprocess.Popen[bytes], call: BuilderCall, log: int) -> bool:
    """Wait for the builder to end, or for its token to be removed; returns whether the token was removed."""
    synced = time.monotonic()
    while True:
        try:
            process.wait(POLL_SECONDS)
            return False
        except subprocess.TimeoutExpired:
            if not call.token.exists():
                return True
        if call.sync and time.monotonic() - synced > SYNC_SECONDS:
            os.fdatasync(log)
            synced = time.monotonic()


@contextlib.contextmanager
def _guarded(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Start a guard process that ends a builder's process group where this process was killed and cannot."""
    script = _GUARD.format(group=process.pid, grace=GRACE_SECONDS)
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as guard:
        try:
            yield
        finally:
            guard.kill()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a builder's process group."""
    if process.poll() is None:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # none of them is left
        os.killpg(process.pid, number)


def _tail(log: Path, start: int) -> list[str]:
    """The last lines of a log, from byte `start` on."""
    with log.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(start, end - TAIL_BYTES))
        return re.split(r"[\r\n]+", file.read().decode(errors="replace").strip())
