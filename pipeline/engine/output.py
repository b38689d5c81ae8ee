"""The directory of an engine, which is complete or not there.

The builder writes into `ENGINE.partial` beside it, which is renamed when every rank is there. The builder's output goes to
`ENGINE.log` (`ENGINE.rank{N}.log` where each rank is built on its own), which stays. The directory under construction holds a
locked journal, which keeps other runs away, and a token: builders on other machines stop when it is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
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
from pipeline.errors import Problem
from pipeline.planning.build_steps import engine_files, log_of
from pipeline.planning.engine_options import partial_of
from pipeline.sinks import hold
from pipeline.sinks.journal import Journal
from pipeline.sinks.output_checks import existing
from pipeline.tensor.filesystem import try_lock
from stages.build import clear, missing

CONFIG = "config.json"
PROVENANCE = "headrace.json"
JOURNAL = PROVENANCE + ".partial"
NOTE = PROVENANCE + hold.SUFFIX
STOP_SECONDS = 30.0  # that a stopped builder may take to end

_BUILT = r"rank\d+\.engine|rank\d+_managed_weights\.safetensors|config\.json|quant_cfg\.json|model\.cache|lora"
_OURS = re.compile(rf"{_BUILT}|headrace\.json(\.partial|\.lock(\.next)*)?|\.token-\w+")


@dataclass(frozen=True)
class EngineDirectory:
    """The directory of an engine of `ranks` ranks. `inputs`: plain values that decide it; equal inputs mean equal engines."""

    directory: Path
    ranks: int
    inputs: Mapping[str, Any] = field(repr=False)

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
        return self.directory.with_name(self.directory.name + ".replaced")

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
        """Problems that keep the directory from being written: a file, files that others put there, or another engine."""
        subject, remedy = f"--output_dir {self.directory}", "Choose another --output_dir"
        if self.partial.exists() and not self.journal.exists() and any(self.partial.iterdir()):
            return [
                Problem(str(self.partial), "files that headrace did not write", "room for the engine under construction", remedy)
            ]
        if not self.directory.exists():
            place = existing(self.directory)
            if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
                return []
            return [Problem(subject, f"{place}, which cannot be written", "a directory that can be written")]
        if not self.directory.is_dir():
            return [Problem(subject, "a file", "a directory")]
        names = sorted(path.name for path in self.directory.iterdir())
        foreign = [name for name in names if not _OURS.fullmatch(name)]
        if foreign:
            found = f"files that no builder of engines writes ({', '.join(foreign[:4])})"
            return [Problem(subject, found, "a new or empty directory", remedy)]
        if not names or overwrite or self.complete:
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
                log.unlink(missing_ok=True)
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

        `facts`: entries of headrace.json beside the inputs.
        """
        paths = [path for path in sorted(self.partial.rglob("*")) if path.is_file() and path not in (token, *self.held)]
        files = {str(path.relative_to(self.partial)): path.stat().st_size for path in paths}
        digest = hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()
        provenance = {"headrace": "engine", "id": digest, "inputs": dict(self.inputs), **facts, "files": files}
        (self.partial / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n")
        shutil.rmtree(self.replaced, ignore_errors=True)
        if self.directory.exists():
            self.directory.rename(self.replaced)
        self.partial.rename(self.directory)
        for name in (token.name, JOURNAL, NOTE):
            (self.directory / name).unlink(missing_ok=True)
        shutil.rmtree(self.replaced, ignore_errors=True)
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
