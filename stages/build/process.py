"""A builder's process, which has a process group of its own and writes straight into its log file."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.tensor.filesystem import try_lock

POLL_SECONDS = 0.2  # between two looks at the token
GRACE_SECONDS = 10.0  # between asking a builder to end and killing it
SYNC_SECONDS = 1.0  # between two times that the log is brought to where other machines see it
TAIL_BYTES = 64 << 10
SHOWN_LINES = 12
COMMAND = "$ "  # begins the line of a log that has the builder's command

_TELLING = re.compile(r"\[(E|F)\]|error|exception|assert|killed|out of memory|not supported", re.IGNORECASE)
# The guard's standard input ends when the process that runs the builder has ended.
_GUARD = "read -r _; kill -TERM -{group}; sleep {grace}; kill -KILL -{group}"
_REFUSED = re.compile(r"^\S*: error: (.+)$")  # argparse's last line


@dataclass(frozen=True)
class ProcessEnd:
    """How a builder's process ended.

    `code`: its exit code, negative for a signal. `lines`: those of its log that tell why it failed. `stopped`: whether its token
    was removed. `refused`: its message on an option that it does not take.
    """

    code: int
    lines: tuple[str, ...] = ()
    stopped: bool = False
    refused: str = ""


def run(words: Sequence[str], directory: Path, log_path: Path, token: Path, sync: bool = False) -> ProcessEnd:
    """Run a builder to its end, or until its token is removed; its process group is gone when this returns.

    The group also ends when this process is killed. The log stays locked (shared) as long as a process of the builder has it open.

    Parameters
    ----------
    words
        The command line.
    directory
        Where it runs.
    log_path
        The file that its output is added to.
    token
        The file whose removal stops it.
    sync
        Whether to flush the log to the file system, so that other machines see it.
    """
    with log_path.open("ab") as log:
        if not token.exists():
            return ProcessEnd(0, stopped=True)
        try_lock(log.fileno(), log_path, shared=True)
        log.write(f"{COMMAND}{' '.join(words)}\n".encode())
        log.flush()
        start = log.tell()
        try:
            process = subprocess.Popen(
                words,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        except OSError as error:
            return ProcessEnd(127, (f"{words[0]}: {error.strerror or error}",))
        try:
            with _guarded(process):
                stopped = _wait(process, token, log.fileno() if sync else None)
        finally:
            _end(process)
    log_lines = _tail(log_path, start)
    refused = _REFUSED.match(log_lines[-1]) if process.returncode == 2 else None
    lines = telling_lines(log_lines) if process.returncode else ()
    return ProcessEnd(process.returncode, lines, stopped, refused[1] if refused else "")


def telling_lines(lines: list[str]) -> tuple[str, ...]:
    """Choose the last lines of a log that tell what went wrong: those about errors, each once, and the last two.

    Indented lines are left out: they are a traceback's.
    """
    lines = [line.rstrip() for line in lines if line.strip() and not line[0].isspace()]
    last = len(lines) - 2
    telling = dict.fromkeys(line for number, line in enumerate(lines) if number >= last or _TELLING.search(line))
    return tuple(telling)[-SHOWN_LINES:]


def _wait(process: subprocess.Popen[bytes], token: Path, log: int | None) -> bool:
    """Wait for the builder to end, or for its token to be removed; returns whether the token was removed.

    `log`: a descriptor that is flushed meanwhile.
    """
    synced = time.monotonic()
    while True:
        try:
            process.wait(POLL_SECONDS)
            return False
        except subprocess.TimeoutExpired:
            if not token.exists():
                return True
        if log is not None and time.monotonic() - synced > SYNC_SECONDS:
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
