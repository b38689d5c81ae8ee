"""The directory of an engine, which is complete or not there.

The builder writes into `ENGINE.partial` beside it, which is renamed when every rank is there. The builder's output goes to
`ENGINE.log` (`ENGINE.rank{N}.log` where each rank is built on its own), which stays. The directory under construction holds a
locked journal, which keeps other runs away, and a token: builders on other machines stop when it is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.documents import read_object
from pipeline.errors import EngineFailed, Problem
from pipeline.planning.build_steps import engine_files, log_of
from pipeline.planning.engine_options import partial_of, real_place, replaced_of
from pipeline.sinks import hold
from pipeline.sinks.journal import Journal
from pipeline.sinks.output_checks import existing
from pipeline.tensor.filesystem import try_lock
from pipeline.tensor.system_errors import sentence
from stages.build import ATTEMPT, clear, missing
from stages.build.process import COMMAND

CONFIG = "config.json"
PROVENANCE = "headrace.json"
JOURNAL = PROVENANCE + ".partial"
NOTE = PROVENANCE + hold.SUFFIX
STOP_SECONDS = 30.0  # that a stopped builder may take to end
LOG_BEGINS = (COMMAND.encode(), ATTEMPT.encode())

_BUILT = r"rank\d+\.engine|rank\d+_managed_weights\.safetensors|config\.json|quant_cfg\.json|model\.cache|lora"
_OURS = re.compile(rf"{_BUILT}|headrace\.json(\.partial|\.lock(\.next)*)?|\.token-\w+")


@dataclass(frozen=True)
class EngineDirectory:
    """The directory of an engine of `ranks` ranks. `inputs`: plain values that decide it; equal inputs mean equal engines."""

    directory: Path
    ranks: int
    inputs: Mapping[str, Any] = field(repr=False)

    @property
    def real(self) -> Path:
        """The directory that is renamed: where `directory` is a link, the one that it leads to."""
        return real_place(self.directory)

    @property
    def partial(self) -> Path:
        """The directory under construction."""
        return partial_of(self.directory)

    @property
    def journal(self) -> Path:
        """The locked file that keeps other runs away."""
        return self.partial / JOURNAL

    @property
    def held(self) -> tuple[Path, Path]:
        """The files there by which it is held: the journal, and the note beside it."""
        return self.journal, hold.place(self.journal)

    @property
    def replaced(self) -> Path:
        """The place of the former directory while the new one takes its name."""
        return replaced_of(self.directory)

    @property
    def logs(self) -> list[Path]:
        """The paths of all logs that a build may write."""
        return [log_of(self.directory, rank) for rank in (None, *range(self.ranks))]

    @property
    def complete(self) -> bool:
        """Whether the directory holds a complete engine of these inputs. An unknown version of the builder matches all."""
        provenance = read_provenance(self.directory)
        recorded = provenance.get("inputs")
        if not isinstance(recorded, dict) or {**recorded, "version": ""} != {**self.inputs, "version": ""}:
            return False
        if self.inputs["version"] and recorded.get("version") != self.inputs["version"]:
            return False
        try:
            return all((self.directory / name).stat().st_size == size for name, size in provenance["files"].items())
        except (OSError, KeyError, AttributeError):
            return False

    def obstacles(self, overwrite: bool) -> list[Problem]:
        """Problems that keep the engine from being built here, none where it is there already and is not to be replaced.

        A file, files that others put there, another engine, a place that cannot be renamed or written.
        """
        if not overwrite and self.complete:
            return []
        try:
            return self._around() or self._inside(overwrite)
        except OSError as error:
            return [Problem(f"--output_dir {self.directory}", sentence(error), "a place that can be looked at")]

    def _around(self) -> list[Problem]:
        """Problems with what is beside the directory, and with its own place."""
        subject, remedy = f"--output_dir {self.directory}", "Move it away, or choose another --output_dir"
        room = "room for the engine under construction", "room for the former engine", "room for the builder's log"
        taken = [
            (self.partial, _strange(self.partial, JOURNAL), room[0]),
            (self.replaced, _strange(self.replaced, PROVENANCE), room[1]),
        ]
        taken += [(log, "a directory" if log.is_dir() else "", room[2]) for log in self.logs]
        problems = [Problem(str(path), found, expected, remedy) for path, found, expected in taken if found]
        if problems:
            return problems
        place = self.real
        if not place.exists() and not place.is_symlink():
            nearest = existing(place)
            if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
                return []
            return [Problem(subject, f"{nearest}, which cannot be written", "a directory that can be written")]
        if not place.is_dir():
            return [Problem(subject, "a file", "a directory")]
        if place.is_mount():
            expected = "a directory that can be renamed, as a new engine takes its name"
            return [Problem(subject, "a mount point", expected, f"Choose one in it, such as {place / 'engine'}")]
        if not os.access(place.parent, os.W_OK | os.X_OK):
            expected = "one that can be written: an engine is built beside its directory"
            return [
                Problem(subject, f"{place.parent}, which cannot be written, around it", expected, "Choose another --output_dir")
            ]
        return []

    def _inside(self, overwrite: bool) -> list[Problem]:
        """Problems with what is in the directory, where it is there."""
        subject, remedy = f"--output_dir {self.directory}", "Choose another --output_dir"
        names = sorted(path.name for path in self.directory.iterdir()) if self.directory.exists() else []
        foreign = [name for name in names if not _OURS.fullmatch(name)]
        if foreign:
            found = f"files that no builder of engines writes ({', '.join(foreign[:4])})"
            return [Problem(subject, found, "a new or empty directory", remedy)]
        if not names or overwrite:
            return []
        ours = PROVENANCE in names
        found = "an engine of other inputs" if ours else "an engine that headrace did not build"
        if ours and isinstance(recorded := read_provenance(self.directory).get("inputs"), dict):
            found += f" ({', '.join(_differences(recorded, self.inputs)) or 'or not whole'})"
        return [Problem(subject, found, "a new or empty directory", "Give --overwrite to replace it")]

    @contextlib.contextmanager
    def begun(self) -> Iterator[Path]:
        """Take the directory under construction, empty but for the token, and yield the token's path; both are gone afterwards.

        Raises BadInput where another run is at work on it, and TimeoutError where a builder of an earlier one is.
        """
        self.partial.mkdir(parents=True, exist_ok=True)
        journal = Journal(self.journal)
        taken = self.partial.stat().st_ino
        token = self.partial / f".token-{uuid.uuid4().hex}"
        try:
            clear(self.partial, self.held)  # a builder of an earlier run on another machine stops without its token
            self.await_builders()
            for log in self.logs:
                _make_room(log)
            token.touch()
            try:
                yield token
            finally:
                token.unlink(missing_ok=True)
                with contextlib.suppress(TimeoutError):
                    self.await_builders()
        finally:
            with contextlib.closing(journal):
                # Once it has its name, a directory at its former place is another run's.
                if self.partial.exists() and self.partial.stat().st_ino == taken:
                    # The journal last: without it the rest would be files of nobody.
                    clear(self.partial, self.held)
                    journal.remove()
                    shutil.rmtree(self.partial, ignore_errors=True)

    def await_builders(self) -> None:
        """Wait until no builder has a log open. Raises TimeoutError naming the log where a builder does not end in STOP_SECONDS."""
        deadline = time.monotonic() + STOP_SECONDS
        for log in self.logs:
            if not log.exists():
                continue
            descriptor = os.open(log, os.O_RDWR)
            try:
                while True:
                    try:
                        try_lock(descriptor, log)
                        break
                    except BlockingIOError:
                        if time.monotonic() > deadline:
                            raise TimeoutError(str(log)) from None
                        time.sleep(0.05)
            finally:
                os.close(descriptor)

    def missing(self) -> list[str]:
        """The files of a complete engine that are missing or empty in the directory under construction."""
        return missing(self.partial, engine_files(range(self.ranks)))

    def finish(self, token: Path, facts: Mapping[str, Any]) -> int:
        """Write headrace.json and give the directory under construction its name; returns the bytes of its files.

        `facts`: entries of headrace.json beside the inputs. Raises EngineFailed where somebody has taken the directory meanwhile.
        """
        if problems := self.obstacles(overwrite=True):
            raise EngineFailed(
                "\n".join([f"{self.directory}: the engine was built, and its place is taken since:", *map(str, problems)])
            )
        paths = [path for path in sorted(self.partial.rglob("*")) if path.is_file() and path not in (token, *self.held)]
        files = {str(path.relative_to(self.partial)): path.stat().st_size for path in paths}
        digest = hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()
        provenance = {"headrace": "engine", "id": digest, "inputs": dict(self.inputs), **facts, "files": files}
        (self.partial / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n")
        real = self.real
        _remove(self.replaced)
        if real.exists():
            real.rename(self.replaced)
        self.partial.rename(real)
        for name in (token.name, JOURNAL, NOTE):
            (real / name).unlink(missing_ok=True)
        _remove(self.replaced)
        return sum(files.values())

    def built_version(self) -> str:
        """The version of TensorRT-LLM in config.json of the directory under construction, "" where it has none."""
        return str(read_object(self.partial / CONFIG).get("version") or "")


def read_provenance(directory: Path) -> dict[str, Any]:
    """Read headrace.json of an engine; empty where there is none."""
    return read_object(directory / PROVENANCE)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The names of the inputs that differ."""
    names = []
    for key in new:
        if key == "options" and isinstance(old.get(key), Mapping):
            changed = {name for name in {*old[key], *new[key]} if old[key].get(name) != new[key].get(name)}
            names += [f"--{name}" for name in sorted(changed)]
        elif old.get(key) != new[key] and (key != "version" or new[key]):
            names.append({"version": "TensorRT-LLM's version"}.get(key, key))
    return names


def _strange(directory: Path, mark: str) -> str:
    """Say what is in the place of a directory that headrace makes for a while, where it is not headrace's; "" where nothing is.

    `mark`: the file by which it is known: the journal of one under construction, headrace.json of a former engine.
    """
    if not directory.is_dir():
        return "a file" if os.path.lexists(directory) else ""
    names = {path.name for path in directory.iterdir()}
    ours = mark in names and (mark == JOURNAL or all(map(_OURS.fullmatch, names)))
    return "" if ours or not names else "files that headrace did not write"


def _remove(directory: Path) -> None:
    """Remove a former engine, headrace.json last, by which it is known as one. Files of other names stay, and it with them."""
    with contextlib.suppress(OSError):
        for path in sorted(directory.iterdir(), key=lambda path: path.name == PROVENANCE):
            if not _OURS.fullmatch(path.name):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        directory.rmdir()


def _make_room(log: Path) -> None:
    """Remove the log of an earlier build. A file that is none, as what a shell writes there, becomes LOG.1 or the next."""
    if not os.path.lexists(log):
        return
    if log.is_file():
        with log.open("rb") as file:
            begins = file.read(max(map(len, LOG_BEGINS)))
        if begins.startswith(LOG_BEGINS):
            log.unlink()
            return
    names = (f"{log.name}.{number}" for number in itertools.count(1))
    log.rename(log.with_name(next(name for name in names if not os.path.lexists(log.with_name(name)))))
