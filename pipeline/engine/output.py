"""An engine's directory: whose it is, and how it becomes whole. It is complete or not there.

The builder writes into `ENGINE.partial` beside it, which gets its name when every rank is there. What the builder says goes to
`ENGINE.log` (`ENGINE.rank{N}.log` where each rank is built on its own), which stays. The directory under construction holds a
locked journal, which keeps other runs away, and a token, without which the builders on other machines stop.
"""

from __future__ import annotations

import contextlib
import fcntl
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

from pipeline.errors import Problem
from pipeline.sinks.journal import Journal
from pipeline.sinks.output import existing

CONFIG = "config.json"
PROVENANCE = "headrace.json"
JOURNAL = PROVENANCE + ".partial"
STOP_SECONDS = 30.0  # that a stopped builder may take to end

_BUILT = r"rank\d+\.engine|rank\d+_managed_weights\.safetensors|config\.json|quant_cfg\.json|model\.cache|lora"
_OURS = re.compile(rf"{_BUILT}|headrace\.json(\.partial)?|\.token-\w+")


@dataclass(frozen=True)
class EngineDirectory:
    """Where the engines of `ranks` ranks go. `inputs`: what decides them, as plain values; equal inputs mean equal engines."""

    directory: Path
    ranks: int
    inputs: Mapping[str, Any] = field(repr=False)

    @property
    def partial(self) -> Path:
        return self.directory.with_name(self.directory.name + ".partial")

    @property
    def journal(self) -> Path:
        """The locked file that keeps other runs away."""
        return self.partial / JOURNAL

    @property
    def replaced(self) -> Path:
        """What the directory held before, for the moment in which the new one takes its place."""
        return self.directory.with_name(self.directory.name + ".replaced")

    def log(self, rank: int | None = None) -> Path:
        """The log of a builder, or of the one of a rank."""
        return self.directory.with_name(f"{self.directory.name}{'' if rank is None else f'.rank{rank}'}.log")

    @property
    def logs(self) -> list[Path]:
        """Every log that may be there."""
        return [self.log(), *(self.log(rank) for rank in range(self.ranks))]

    @property
    def complete(self) -> bool:
        """Whether the directory holds, whole, an engine of these inputs. An unknown version of the builder is any."""
        provenance = read_provenance(self.directory)
        old = provenance.get("inputs")
        if not isinstance(old, dict) or {**old, "version": ""} != {**self.inputs, "version": ""}:
            return False
        if self.inputs["version"] and old.get("version") != self.inputs["version"]:
            return False
        try:
            return all((self.directory / name).stat().st_size == size for name, size in provenance["files"].items())
        except (OSError, KeyError, AttributeError):
            return False

    def obstacles(self, overwrite: bool) -> list[Problem]:
        """What keeps the directory from being ours to write: a file, what others put there, or another engine."""
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
        if ours and isinstance(old := read_provenance(self.directory).get("inputs"), dict):
            found += f" ({', '.join(_differences(old, self.inputs)) or 'or not whole'})"
        return [Problem(subject, found, "a new or empty directory", "Give --overwrite to replace it")]

    @contextlib.contextmanager
    def begun(self) -> Iterator[Path]:
        """Take the directory beside it, empty but for the token, whose path this gives; it is gone afterwards.

        Raises BadInput where another run is at work on it, and TimeoutError where a builder of an earlier one is.
        """
        self.partial.mkdir(parents=True, exist_ok=True)
        journal = Journal(self.journal)
        taken = self.partial.stat().st_ino
        token = self.partial / f".token-{uuid.uuid4().hex}"
        try:
            self.clear(journal.path)  # without its token an orphan on another machine stops
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
            # Once it has its name, what is at its old place is another run's.
            if self.partial.exists() and self.partial.stat().st_ino == taken:
                journal.remove()
                shutil.rmtree(self.partial, ignore_errors=True)
            journal.close()

    def clear(self, *kept: Path) -> None:
        """Empty the directory under construction, but for some files."""
        for path in self.partial.iterdir():
            if path in kept:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def await_builders(self) -> None:
        """Wait until no builder has a log open. Raises TimeoutError, naming the log, where one does not end."""
        deadline = time.monotonic() + STOP_SECONDS
        for log in self.logs:
            if not log.exists():
                continue
            descriptor = os.open(log, os.O_RDWR)
            try:
                while True:
                    try:
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        if time.monotonic() > deadline:
                            raise TimeoutError(str(log)) from None
                        time.sleep(0.05)
            finally:
                os.close(descriptor)

    def missing(self) -> list[str]:
        """What a whole engine has, and the directory under construction has not, or has empty."""
        names = [CONFIG, *(f"rank{rank}.engine" for rank in range(self.ranks))]
        return [name for name in names if not (path := self.partial / name).is_file() or not path.stat().st_size]

    def finish(self, token: Path, facts: Mapping[str, Any]) -> int:
        """Give the directory under construction its name, with headrace.json in it; returns the bytes of its files."""
        paths = [path for path in sorted(self.partial.rglob("*")) if path.is_file() and path not in (token, self.journal)]
        files = {str(path.relative_to(self.partial)): path.stat().st_size for path in paths}
        digest = hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()
        provenance = {"headrace": "engine", "id": digest, "inputs": dict(self.inputs), **facts, "files": files}
        (self.partial / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n")
        shutil.rmtree(self.replaced, ignore_errors=True)
        if self.directory.exists():
            self.directory.rename(self.replaced)
        self.partial.rename(self.directory)
        for name in (token.name, JOURNAL):
            (self.directory / name).unlink(missing_ok=True)
        shutil.rmtree(self.replaced, ignore_errors=True)
        return sum(files.values())

    def built_version(self) -> str:
        """The version of TensorRT-LLM that config.json of the directory under construction names."""
        try:
            return str(json.loads((self.partial / CONFIG).read_text()).get("version") or "")
        except (OSError, ValueError, AttributeError):
            return ""


def read_provenance(directory: Path) -> dict[str, Any]:
    """headrace.json of an engine; nothing where there is none."""
    try:
        value = json.loads((directory / PROVENANCE).read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The inputs that are not the same, by name."""
    names = []
    for key in new:
        if key == "options" and isinstance(old.get(key), Mapping):
            changed = {name for name in {*old[key], *new[key]} if old[key].get(name) != new[key].get(name)}
            names += [f"--{name}" for name in sorted(changed)]
        elif old.get(key) != new[key] and (key != "version" or new[key]):
            names.append({"version": "TensorRT-LLM's version"}.get(key, key))
    return names
