"""An output directory: whose it is, how it begins, and how it becomes whole.

A directory is complete when it has config.json, which is written last. Until then it holds `headrace.json.partial`, which says that
it is ours, and rank files named `*.partial`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import BadInput, Problem

if TYPE_CHECKING:
    from stages.write import RankFile

CONFIG = "config.json"
PROVENANCE = "headrace.json"
MARKER = PROVENANCE + ".partial"
_OURS = re.compile(r"(rank\d+\.safetensors|config\.json|headrace\.json)(\.partial)?")


@dataclass(frozen=True)
class Output:
    """One target's directory: its rank files and the text of its config.json."""

    directory: Path
    files: tuple[RankFile, ...]
    config: str

    @property
    def size_bytes(self) -> int:
        """The size of the rank files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file that the directory will hold."""
        return (*(file.path for file in self.files), self.directory / CONFIG, self.directory / PROVENANCE)

    def up_to_date(self, plan_id: str) -> bool:
        """Whether the directory already holds, whole, what the plan of this id would write."""
        try:
            provenance = json.loads((self.directory / PROVENANCE).read_text())
            sizes = [file.path.stat().st_size for file in self.files]
            complete = (self.directory / CONFIG).read_text() == self.config
        except (OSError, ValueError):
            return False
        return complete and provenance.get("plan_id") == plan_id and sizes == [file.size_bytes for file in self.files]

    def begin(self) -> None:
        """Take the directory: clear what an earlier run of ours left, and reserve every rank file at its full size.

        Raises BadInput where the directory cannot be written or has no room, leaving nothing behind.
        """
        created = not self.directory.exists()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for name in (CONFIG, PROVENANCE):
                (self.directory / name).unlink(missing_ok=True)
            (self.directory / MARKER).write_text("{}\n")
            for path in self.directory.iterdir():
                if _OURS.fullmatch(path.name) and path.name != MARKER:
                    path.unlink()
            for file in self.files:
                file.create()
        except OSError as error:
            self.abandon(created)
            subject, remedy = str(error.filename or self.directory), "Free space, or choose another --output_dir"
            expected = f"room for {self.size_bytes:,} bytes in a directory that can be written"
            raise BadInput([Problem(subject, error.strerror or str(error), expected, remedy)]) from None

    def finish(self, provenance: Mapping[str, Any]) -> None:
        """Give every file its name, config.json last: from then on the directory is complete."""
        for file in self.files:
            file.finish()
        for name, text in ((PROVENANCE, json.dumps(provenance, indent=4) + "\n"), (CONFIG, self.config)):
            partial = self.directory / f"{name}.partial"
            partial.write_text(text)
            partial.replace(self.directory / name)

    def abandon(self, remove_directory: bool) -> None:
        """Remove what `begin` made, where it could not be whole."""
        for path in [self.directory / MARKER, *(file.partial for file in self.files)]:
            try:
                path.unlink(missing_ok=True)
            except OSError:
                return
        if remove_directory:
            shutil.rmtree(self.directory, ignore_errors=True)


def check_output(directory: Path, overwrite: bool) -> list[Problem]:
    """What keeps `directory` from being ours: it is a file, holds what headrace did not write, or a finished conversion."""
    if not directory.exists():
        return _writable(directory)
    if not directory.is_dir():
        return [Problem(f"--output_dir {directory}", "a file", "a directory")]
    names = {path.name for path in directory.iterdir()}
    if not names:
        return _writable(directory)
    foreign = sorted(name for name in names if not _OURS.fullmatch(name))
    if foreign:
        found = f"files that headrace did not write ({', '.join(foreign[:4])})"
        return [Problem(f"--output_dir {directory}", found, "a new or empty directory", "Choose another --output_dir")]
    if names & {PROVENANCE, MARKER} or overwrite:
        return _writable(directory)
    found = "a checkpoint that headrace did not write"
    return [Problem(f"--output_dir {directory}", found, "a new or empty directory", "Give --overwrite to replace it")]


def check_finished(outputs: Sequence[Output], plan_id: str, overwrite: bool) -> list[Problem]:
    """A finished conversion of another source or other options is not replaced unless asked."""
    return [
        Problem(
            f"--output_dir {output.directory}",
            "a finished conversion of another source or with other options",
            "a new directory, or the same request",
            "Give --overwrite to replace it",
        )
        for output in outputs
        if not overwrite and (output.directory / CONFIG).exists() and not output.up_to_date(plan_id)
    ]


def free_bytes(directory: Path) -> int:
    """Bytes free on the file system that `directory` is, or would be, on."""
    return shutil.disk_usage(_existing(directory)).free


def check_space(outputs: Sequence[Output]) -> list[Problem]:
    """Whether each file system has room for what goes to it; files of ours that will be replaced count as free."""
    needed: dict[int, int] = {}
    free: dict[int, int] = {}
    names: dict[int, Path] = {}
    for output in outputs:
        place = _existing(output.directory)
        device = place.stat().st_dev
        old = sum(path.stat().st_blocks * 512 for path in output.directory.glob("rank*")) if output.directory.exists() else 0
        needed[device] = needed.get(device, 0) + output.size_bytes - old
        free[device] = free_bytes(place)
        names[device] = output.directory
    return [
        Problem(f"--output_dir {names[device]}", f"{free[device]:,} bytes free", f"{need:,}", "Free space, or choose another disk")
        for device, need in needed.items()
        if need > free[device]
    ]


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _writable(directory: Path) -> list[Problem]:
    place = _existing(directory)
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return []
    return [Problem(f"--output_dir {directory}", f"{place}, which cannot be written", "a directory that can be written")]
