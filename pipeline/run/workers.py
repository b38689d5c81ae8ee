"""Questions to every worker of a cluster elsewhere, before anything is written: its version, and whether it sees all files.

Workers write rank files at offsets and read the source themselves, so that both must be on one file system for all of them. That is
tried, not assumed: with a file in each output's place that each worker reads and answers.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.sinks.output_checks import existing

PACKAGES = ("headrace", "dask", "distributed")
SEEN = 20  # files of a source that are looked at
PROBE = ".headrace-probe-"


def check_workers(client: Any, source: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Look at all workers of a client's cluster that are there now.

    `source`: the files that they read. `outputs`: directories that they write, which need not be there yet. Raises BadInput with
    every worker that runs another version or does not see these as this process does.
    """
    wanted, expected = versions(), f"one file system that all workers see, as {os.uname().nodename} does"
    remedy = "Where there is none, give --scratch a URL and --scratch_after shard: this process then writes the rank files"
    files = {str(path): path.stat().st_size for path in source[:SEEN]}
    with _probes({existing(output) for output in outputs}) as probes:
        answers = _answers(client, look, files, probes)
        problems = []
        for address, said in answers.items():
            if isinstance(said, BaseException):
                found = f"no answer ({type(said).__name__}: {said})"
                problems.append(Problem(f"worker {address}", found, f"headrace {wanted['headrace']} installed there"))
                continue
            host = f"worker {address} on {said['host']}"
            found = ", ".join(f"{name} {said['versions'].get(name) or 'missing'}" for name in wanted)
            if said["versions"] != wanted:
                versioned = ", ".join(f"{name} {version}" for name, version in wanted.items())
                problems.append(Problem(host, found, versioned, "Install the same versions on all of them"))
            problems += [Problem(host, f"{path}: {what}", expected) for path, what in said["wrong"].items()]
            problems += [
                Problem(host, f"{place}: a file that it wrote there is not seen here", expected, remedy)
                for place, token in probes.items()
                if place not in said["wrong"] and not _seen(Path(place), token, said["name"])
            ]
    if problems:
        raise BadInput(problems)


def look(files: Mapping[str, int], probes: Mapping[str, str]) -> dict[str, Any]:
    """The answer of a worker: its versions, what differs of files of these sizes, and of the probes, which it answers."""
    wrong, name = {}, uuid.uuid4().hex
    for path, size in files.items():
        try:
            found = Path(path).stat().st_size
        except OSError as error:
            wrong[path] = error.strerror or "an error"
        else:
            if found != size:
                wrong[path] = f"{found:,} bytes, not {size:,}"
    for place, token in probes.items():
        try:
            if (Path(place) / f"{PROBE}{token}").read_text() != token:
                wrong[place] = "another file than the one written there"
            else:
                _write(Path(place) / f"{PROBE}{token}-{name}", token)
        except OSError as error:
            wrong[place] = f"{error.strerror or 'an error'}, of a file written there a moment ago"
    return {"host": os.uname().nodename, "name": name, "versions": versions(), "wrong": wrong}


def versions() -> dict[str, str]:
    """The versions here of the packages that must agree; "" for one that is not installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def _answers(client: Any, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """The answer of each worker, by its address; the exception of one that cannot."""
    answers: dict[str, Any] = client.run(function, *arguments, on_error="return")
    return answers


@contextmanager
def _probes(places: set[Path]) -> Iterator[dict[str, str]]:
    """A probe in each directory, removed with all answers at the end: {directory: token}."""
    made: dict[str, str] = {}
    try:
        for place in sorted(places):
            made[str(place)] = uuid.uuid4().hex
            _write(place / f"{PROBE}{made[str(place)]}", made[str(place)])
        yield made
    finally:
        for directory, token in made.items():
            for file in Path(directory).glob(f"{PROBE}{token}*"):
                with contextlib.suppress(OSError):
                    file.unlink()


def _write(file: Path, token: str) -> None:
    """Write and close a file: what is closed is there for whoever opens it later, on NFS too."""
    with file.open("w") as stream:
        stream.write(token)
        stream.flush()
        os.fsync(stream.fileno())


def _seen(place: Path, token: str, name: str) -> bool:
    try:
        return (place / f"{PROBE}{token}-{name}").read_text() == token
    except OSError:
        return False
