"""A process that runs headrace's commands on damaged files one after the other, under limits, and tells what each of them did."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support.commands import headrace, tree

CPU_SECONDS = 60
WAITING_SECONDS = 180
TEMPORARY = Path(tempfile.gettempdir())  # found out here, as a hook that did would wait for itself
MEMORY_BYTES = 1_500_000_000
# What no conversion does, as auditing says it (https://docs.python.org/3/library/audit_events.html).
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
)


@dataclass(frozen=True)
class Did:
    """What a command did. `code`: its exit code; None where it ended with an exception, or its process did, which `said` then has.

    `touched`: whether anything in the directory is not as it was. `forbidden`: what it tried that no conversion does.
    """

    code: int | None
    said: str
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    touched: bool = False
    forbidden: tuple[str, ...] = field(default=())


class Worker:
    """The process; a new one where it has died."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Connection | None = None

    def run(self, directory: Path, arguments: Sequence[str]) -> Did:
        """Run a command in a directory."""
        if self._connection is None:
            forks = multiprocessing.get_context("forkserver")
            forks.set_forkserver_preload([__name__])
            self._connection, theirs = forks.Pipe()
            self._process = forks.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        self._connection.send((str(directory), list(arguments)))
        if not self._connection.poll(WAITING_SECONDS):  # it waits for something, and takes no processor time
            os.kill(self._process.pid, signal.SIGABRT)
        try:
            did: Did = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            self._connection = None
            return Did(None, f"the process ended with {self._process.exitcode}")
        return did

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._process.join()
            self._connection = None


class TooLong(BaseException):
    """The processor time of a command is used up."""


_watched: list[tuple[str, list[str]]] = []  # the directory that may be written to, and what was tried


def _serve(connection: Connection) -> None:
    faulthandler.enable()  # says where it waited when it is aborted
    sys.dont_write_bytecode = True
    sys.addaudithook(_hook)
    signal.signal(signal.SIGPROF, _too_long)
    while True:
        try:
            directory, arguments = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        connection.send(_run(directory, arguments))


def _run(directory: str, arguments: list[str]) -> Did:
    os.chdir(directory)
    before = tree(Path(directory))
    tried: list[str] = []
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    at_rest = _status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + MEMORY_BYTES, resource.RLIM_INFINITY))
    begun = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(begun) + 2 * CPU_SECONDS, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    _watched.append((directory, tried))
    try:
        ran = headrace(*arguments)
        code, said = ran.code, ran.err
    except BaseException:
        code, said = None, traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _watched.clear()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    touched = tree(Path(directory)) != before
    return Did(code, said, time.process_time() - begun, _status("VmHWM") - at_rest, touched, tuple(tried))


def _status(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _too_long(*_: object) -> None:
    raise TooLong


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    directory, tried = _watched[-1]
    if event in FORBIDDEN:
        tried.append(f"{event} {arguments!r:.200}")
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        path = os.path.abspath(os.fsdecode(arguments[0])) if not isinstance(arguments[0], int) else directory  # noqa: PTH100
        if not _allowed(path, directory):
            tried.append(f"writing {path}")
    elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") and isinstance(arguments[0], str):
        path = os.path.abspath(arguments[0])  # noqa: PTH100
        if not _allowed(path, directory) and event != "os.rename":
            tried.append(f"{event} {path}")


def _allowed(path: str, directory: str) -> bool:
    """Whether a command may write there: in its directory, and where Dask's workers keep what they spill."""
    place = Path(path)
    spill = place.parent == TEMPORARY or place.is_relative_to(TEMPORARY / "dask-scratch-space")
    return place.is_relative_to(directory) or path == os.devnull or spill
