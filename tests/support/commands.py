"""The real command line, run inside the test's process: arguments in; exit code, standard output and standard error out."""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import typer

from pipeline.cli import main

REFUSED = "nothing was written:"
# The same as a process of its own; -P, as a folder `pipeline` in the current directory must not stand in for ours.
COMMAND = [sys.executable, "-P", "-m", "pipeline.cli"]
LOOP_SECONDS = 15  # of processor time: what runs into it loops


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


# Typer makes its commands anew for each call, which takes as long as a small plan.
_made_once = functools.cache(typer.main.get_command)


def headrace(*arguments: object) -> Ran:
    """Run `headrace` with these arguments. A traceback of its own comes out here, so that it fails the test."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _own_signals(),
        mock.patch.object(sys, "argv", ["headrace", *map(str, arguments)]),
        mock.patch.object(typer.main, "get_command", _made_once),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    assert isinstance(code, int), code
    return Ran(code, out.getvalue(), err.getvalue())


def convert(model: object, output: object, *more: object) -> Ran:
    return headrace("convert", "--model_dir", model, "--output_dir", output, "--scheduler", "threads", *more)


def limited(limits: Mapping[str, int], *arguments: object) -> Ran:
    """The command in a process of its own under limits of the system, such as RLIMIT_CPU; the code of a killed one is negative.

    The process is forked from one that has loaded the command line and nothing else, so that a run takes no half second to start.
    """
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([__name__])
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        process = forks.Process(target=_under, args=(dict(limits), [*map(str, arguments)], out.name, err.name))
        process.start()
        process.join()
        assert process.exitcode is not None
        return Ran(process.exitcode, out.read(), err.read())


def _under(limits: dict[str, int], arguments: list[str], out: str, err: str) -> None:
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    sys.dont_write_bytecode = True  # a limit on files would cut it short
    sys.argv = ["headrace", *arguments]
    for name, value in limits.items():
        limit = getattr(resource, name)
        resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
    main()


def refused(model: Path, *more: object, output: Path | None = None) -> list[str]:
    """Ask for a conversion that must be refused with nothing written or touched; returns the report, one problem an item."""
    output = model.parent / "out" if output is None else output
    before = tree(model.parent)
    ran = convert(model, output, *more)
    assert ran.code == 2, ran
    assert ran.out == ""
    assert "Traceback" not in ran.err
    head, *problems = ran.err.splitlines()
    assert head.startswith("headrace: "), ran.err
    assert head.endswith(REFUSED), ran.err
    assert problems
    assert tree(model.parent) == before
    listed = [line.removeprefix("  - ") for line in problems if line.startswith("  - ")]
    assert all(": found " in line and "; expected " in line for line in listed), ran.err
    return listed


def one(problems: list[str]) -> str:
    """The only problem of a report."""
    assert len(problems) == 1, problems
    return problems[0]


def tree(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every path under a directory with its modification time, size and, where it is small, bytes."""
    return {str(path.relative_to(directory)): _state(path) for path in sorted([directory, *directory.rglob("*")])}


def _state(path: Path) -> tuple[int, int, bytes]:
    status = path.lstat()
    small = path.is_file() and status.st_size < 1 << 20 and os.access(path, os.R_OK)
    return status.st_mtime_ns, status.st_size, path.read_bytes() if small else b""


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Commands take signals for their process; give them back to pytest."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
