"""The answers of a worker elsewhere: its versions, and whether it sees the source and what it is to write as this process does."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.errors import Problem
from pipeline.tensor.source_file import SourceFile
from stages.read.changing import spots, unlike

PACKAGES = ("headrace", "dask", "distributed")
PROBE = ".headrace-probe-"


@dataclass(frozen=True)
class Question:
    """All that each worker of a run is asked.

    `versions`: of the packages that must agree. `more`: packages of any version. `files`: the source's, with the digests of their
    `spots`.
    """

    versions: Mapping[str, str]
    more: tuple[str, ...] = ()
    files: tuple[SourceFile, ...] = ()
    spots: tuple[str, ...] = ()

    @classmethod
    def of(cls, files: tuple[SourceFile, ...], more: tuple[str, ...] = ()) -> Question:
        """The question whether workers are as this process is. Raises OSError where a file cannot be read."""
        return cls(versions(), more, files, tuple(spots(files)))


def look(question: Question, probes: Mapping[str, str]) -> dict[str, Any]:
    """The answer of a worker. `probes`: the token of the probe in each directory, which is answered with another beside it."""
    unseen, name = {}, uuid.uuid4().hex
    for place, token in probes.items():
        try:
            if (Path(place) / f"{PROBE}{token}").read_text() != token:
                unseen[place] = "another file than the one written there"
            else:
                write_probe(Path(place) / f"{PROBE}{token}-{name}", token)
        except OSError as error:
            unseen[place] = f"{error.strerror or 'an error'}, of a file written there a moment ago"
    return {
        "host": os.uname().nodename,
        "name": name,
        "versions": versions((*question.versions, *question.more)),
        "source": unlike(question.files, question.spots),
        "unseen": unseen,
    }


def versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """The versions here of some packages; "" for one that is not installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def write_probe(file: Path, token: str) -> None:
    """Write and close a file: what is closed is there for whoever opens it later, on NFS too."""
    with file.open("w") as stream:
        stream.write(token)
        stream.flush()
        os.fsync(stream.fileno())


def faults(address: str, said: Mapping[str, Any], question: Question, asker: str) -> list[Problem]:
    """The problems of a worker, by its answer: packages that it lacks or has in other versions, and files of the source.

    `asker`: the host of the process that asks.
    """
    host, installed = f"worker {address} on {said['host']}", said["versions"]
    problems = []
    if {name: installed.get(name) for name in question.versions} != dict(question.versions):
        found = ", ".join(f"{name} {installed.get(name) or 'missing'}" for name in question.versions)
        expected = ", ".join(f"{name} {version}" for name, version in question.versions.items())
        problems.append(Problem(host, found, expected, "Install the same versions on all of them"))
    if lacking := [name for name in question.more if not installed.get(name)]:
        expected = f"{' and '.join(question.more)}, as a model is run there to measure it"
        problems.append(Problem(host, f"no {' and no '.join(lacking)}", expected, "Run pip install 'headrace[calibrate]' there"))
    if differing := said["source"]:
        more = f"; and {len(differing) - 1} more files" if len(differing) > 1 else ""
        problems.append(Problem(host, f"{differing[0]}{more}", f"{shared(asker)}, or copies of the same files"))
    return problems


def shared(asker: str) -> str:
    """The file system that workers are to see, in words."""
    return f"one file system that all workers see, as {asker} does"
