"""Check, before anything is written, whether output directories can be written to, and whether their disks have room."""

from __future__ import annotations

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from pipeline.documents import MAX_BYTES, parse_json, read_document, read_object
from pipeline.errors import BadInput, Problem
from pipeline.sinks import bucket_hold, hold
from pipeline.sinks.bucket_checks import taken_there
from pipeline.sinks.bucket_output import BucketOutput
from pipeline.sinks.differences import differences
from pipeline.sinks.output import CONFIG, JOURNAL, PROVENANCE, Output
from pipeline.tensor.filesystem import NOT_THERE
from pipeline.tensor.remote_path import is_remote
from pipeline.tensor.units import human_bytes

T = TypeVar("T")

# The names of the files that headrace itself writes into an output directory.
_OWN_FILES = re.compile(
    r"(rank\d+\.safetensors|config\.json|headrace\.json)(\.partial|\.new|\.lock(\.next)*)?|\.headrace-probe-[0-9a-f-]+"
)


def check_output(directory: Path, overwrite: bool, copied: Collection[str] = ()) -> list[Problem]:
    """Check that an output can go to `directory`: it can be written, and holds nothing but what headrace wrote.

    `overwrite`: a TensorRT-LLM checkpoint that headrace did not write may be replaced. `copied`: the names of files that the job
    may copy there, as a power cut may leave copies and nothing of what says that they are. Returns the problems found.
    """
    if not directory.exists():
        return _writable(directory)
    if not directory.is_dir():
        return [Problem(f"--output_dir {directory}", "a file", "a directory")]
    names = {path.name for path in directory.iterdir()}
    if not names:
        return _writable(directory)
    ours = _copied(directory) | (set(copied) if names & {PROVENANCE, JOURNAL} else set())
    foreign = sorted(name for name in names if not _OWN_FILES.fullmatch(name) and name not in ours)
    if foreign:
        found = f"files that headrace did not write ({', '.join(foreign[:4])})"
        return [Problem(f"--output_dir {directory}", found, "a new or empty directory", "Choose another --output_dir")]
    if names & {PROVENANCE, JOURNAL} or overwrite:
        return _writable(directory)
    found = "a checkpoint that headrace did not write"
    return [Problem(f"--output_dir {directory}", found, "a new or empty directory", "Give --overwrite to replace it")]


def check_source(directory: Path, files: Iterable[Path]) -> list[Problem]:
    """Check that `directory` holds none of the source's `files`, as replacing an output would remove them."""
    real = directory.resolve()
    if any(path.resolve().parent == real or path.parent == directory for path in files):
        expected, remedy = "another directory than the source's", "Choose another --output_dir"
        return [Problem(f"--output_dir {directory}", "files of the source", expected, remedy)]
    return []


def check_apart(directories: Sequence[Path]) -> list[Problem]:
    """Check that no output is inside another, of the same job or of one before: replacing that one would be in its way."""
    real = {directory: directory.resolve() for directory in directories}
    problems = []
    for directory, place in real.items():
        asked = [other for other, path in real.items() if path in place.parents]
        there = [path for path in place.parents if (path / PROVENANCE).is_file() or (path / JOURNAL).is_file()]
        if outer := (asked or there)[:1]:
            found, remedy = f"a place inside the output {outer[0]}", "Choose another --output_dir"
            problems.append(Problem(f"--output_dir {directory}", found, "outputs beside one another", remedy))
    return problems


def check_taken(outputs: Sequence[Output], overwrite: bool) -> list[Problem]:
    """Check that no output replaces a conversion, finished or not, of another source or other options without `overwrite`."""
    problems = []
    for output in outputs:
        if overwrite or output.complete:
            continue
        if isinstance(output, BucketOutput):
            problems += taken_there(output, _owner(output.journal).get("id"))
            continue
        finished, begun = output.directory / CONFIG, output.directory / JOURNAL
        files = ((finished, output.config), (output.directory / PROVENANCE, ""))
        torn = [path for path, intended in files if path.exists() and _torn(path, intended)]
        whole = finished.exists() and not torn
        said = (_owner(begun), _provenance(output.directory) if finished.exists() else {})
        if whole or {str(each["id"]) for each in said if "id" in each} - {output.id}:
            differs = next(filter(None, (differences(_of_conversion(each), output.provenance) for each in said)), "")
            found = (
                f"{'a finished' if whole else 'an unfinished'} conversion {differs or 'of another source or with other options'}"
            )
            remedy = "Give --overwrite to start afresh"
            problems.append(Problem(f"--output_dir {output.directory}", found, "a new directory, or the same request", remedy))
    return problems


def check_held(outputs: Sequence[Output]) -> list[Problem]:
    """Check by the notes that jobs leave that no other process is at work on an output.

    A journal's lock, which might be in a job's way, is not taken: it alone tells of other jobs in this process.
    """
    problems: list[Problem] = []
    me = hold.Holder.me()
    for output in outputs:
        journal = output.directory / JOURNAL
        found = bucket_hold.holder(output.directory) if is_remote(output.directory) else hold.holder(hold.place(journal))
        if found and found != me and not found.gone and (found.seen or found.boot != me.boot):
            problems += hold.busy(journal, found).problems
    return problems


def _of_conversion(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """A provenance: headrace.json's, or the part of it that a journal's first line has under `of`."""
    return said["of"] if isinstance(said.get("of"), Mapping) else said if "options" in said else {}


def _owner(path: Path) -> dict[str, Any]:
    """Return the object on the first line of a journal; empty where there is no valid line."""
    try:
        with path.open("rb") as file:
            digest, _, text = file.readline(MAX_BYTES).rstrip(b"\n").partition(b" ")
        value = parse_json(text) if xxhash.xxh3_64_hexdigest(text).encode() == digest else {}
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


def _copied(directory: Path) -> set[str]:
    """Return the names of the files that a conversion, finished or not, has copied beside the ranks in `directory`."""
    said = [_provenance(directory).get("copied"), _owner(directory / JOURNAL).get("copied")]
    return {str(name) for names in said if isinstance(names, list) for name in names}


def _provenance(directory: Path) -> dict[str, Any]:
    """Return what headrace.json says; empty where there is none, or one that a power cut left without contents."""
    return read_object(directory / PROVENANCE)


def _torn(path: Path, intended: str) -> bool:
    """Whether a power cut has left a JSON file empty, with zeros in it, or with the beginning alone of the text `intended`.

    Other contents may be somebody's.
    """
    with suppress(OSError, BadInput):
        data = read_document(path)[0]
        return not data.strip() or b"\0" in data or (len(data) < len(intended) and intended.encode().startswith(data))
    return False


def check_space(needs: Mapping[Path, int]) -> list[Problem]:
    """Check that each file system has room for what goes to the directories on it; `needs` are bytes by directory."""
    needed: dict[int, int] = defaultdict(int)
    names: dict[int, Path] = {}
    for directory, nbytes in needs.items():
        device = _nearest(directory, lambda path: path.stat().st_dev)
        # The space that an earlier run reserved there is reused or freed.
        needed[device] += nbytes - _occupied_bytes(directory)
        names[device] = directory
    problems = []
    for device, nbytes in needed.items():
        free = free_bytes(names[device])
        if free is not None and nbytes > free:
            found, remedy = f"{human_bytes(free)} free", f"Free {human_bytes(nbytes - free)}, or choose another disk"
            expected = f"room for {human_bytes(nbytes)} ({nbytes - free:,} bytes more)"
            problems.append(Problem(f"--output_dir {names[device]}", found, expected, remedy, passing=True))
    return problems


def free_bytes(directory: Path) -> int | None:
    """Return the free bytes of the file system that `directory` is on, or would be on once it is made; None where it does not say.

    Some network file systems and FUSE say that they have 0 bytes in all: that is no full disk. Object storage says nothing.
    """
    if is_remote(directory):
        return None
    try:
        usage = _nearest(directory, shutil.disk_usage)
    except OSError as error:
        if error.errno in NOT_THERE:
            return None
        raise
    return usage.free if usage.total else None


def _occupied_bytes(directory: Path) -> int:
    """Return the disk space that a directory's files occupy; files that vanish meanwhile, as a running job's do, do not count."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(folder) / name).lstat().st_blocks * 512
    return total


def _nearest(path: Path, measure: Callable[[Path], T]) -> T:
    """Return `measure` of the nearest directory that exists, from `path` upwards; where that one vanishes meanwhile, try again."""
    while True:
        with suppress(FileNotFoundError):
            return measure(existing(path))


def existing(path: Path) -> Path:
    """Return the nearest path that exists, from `path` itself upwards."""
    while not path.exists():
        path = path.parent
    return path


def _writable(directory: Path) -> list[Problem]:
    nearest = existing(directory)
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return []
    return [Problem(f"--output_dir {directory}", f"{nearest}, which cannot be written", "a directory that can be written")]
