"""An output directory: whose it is, how it begins or is taken up again, and how it becomes whole.

A directory is complete when it has config.json, which is written last. Until then it holds the journal, `headrace.json.partial`,
which says what it will be and how far it is, and rank files named `*.partial`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from pipeline.errors import BadInput, Problem
from pipeline.sinks.journal import Journal, sync_files
from pipeline.sinks.reserve import missing
from pipeline.tensor.placement import Located, Region

if TYPE_CHECKING:
    from pipeline.sinks.rank_file import FileTensor, RankFile

CONFIG = "config.json"
PROVENANCE = "headrace.json"
JOURNAL = PROVENANCE + ".partial"
_OURS = re.compile(r"(rank\d+\.safetensors|config\.json|headrace\.json)(\.partial|\.new)?")


@dataclass(frozen=True)
class Output:
    """One target's directory: its rank files, the text of its config.json, and the id of what is written there.

    `copies`: files of the source that go beside them. `sync`: have all on disk before config.json is. Equal ids mean equal bytes.
    """

    directory: Path
    files: tuple[RankFile, ...]
    config: str
    id: str
    copies: tuple[Path, ...] = ()
    sync: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def size_bytes(self) -> int:
        """The size of the rank files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def local_bytes(self) -> int:
        """What it needs of a local disk."""
        return self.size_bytes

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file that the directory will hold."""
        names = (CONFIG, PROVENANCE, *(path.name for path in self.copies))
        return (*(file.path for file in self.files), *(self.directory / name for name in names))

    @property
    def complete(self) -> bool:
        """Whether the directory already holds, whole, what would be written."""
        try:
            provenance = json.loads((self.directory / PROVENANCE).read_text())
            sizes = [file.path.stat().st_size for file in self.files]
            whole = (self.directory / CONFIG).read_text() == self.config and all(path.exists() for path in self.paths)
        except (OSError, ValueError):
            return False
        return whole and provenance.get("id") == self.id and sizes == [file.size_bytes for file in self.files]

    def locate(self, rank: int, tensor: str, region: Region) -> Iterator[Located]:
        """The bytes of a region of a rank's tensor."""
        return self.files[rank].tensors[tensor].locate(region)

    def begin(self, tasks: int, fresh: bool) -> Journal:
        """Take the directory: take up what an interrupted run left, or clear it and reserve every rank file at its full size.

        Raises BadInput where another job holds the directory, it cannot be written, or there is no room; then it is left as it was.
        """
        created = missing(self.directory)
        owner = {"headrace": "journal", "id": self.id, "tasks": tasks, "copied": [path.name for path in self.copies]}
        journal = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            journal = Journal(self.directory / JOURNAL)
            if not fresh and journal.owner == owner and all(file.begun() for file in self.files):
                return journal
            self._clear()
            journal.start(owner)
            for file in self.files:
                file.create()
            return journal
        except OSError as error:
            if journal:
                self.abandon(journal, created)
            subject, remedy = str(error.filename or self.directory), "Free space, or choose another --output_dir"
            expected = f"room for {self.size_bytes:,} bytes in a directory that can be written"
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise BadInput([Problem(subject, error.strerror or str(error), expected, remedy, passing=full)]) from None

    def finish(self, journal: Journal, entries: Iterable[Mapping[str, Any]], timings: Mapping[str, Any]) -> None:
        """Give every file its name, config.json last: from then on the directory is complete."""
        checksums = self._checksums(entries)
        if self.sync:
            sync_files(file.partial for file in self.files)
        for file in self.files:
            file.finish()
        for path in self.copies:
            shutil.copyfile(path, self.directory / path.name)
        copied = [path.name for path in self.copies]
        provenance = {**self.provenance, "id": self.id, "copied": copied, "timings": dict(timings), "xxh3": checksums}
        for name, text in ((PROVENANCE, json.dumps(provenance, indent=1) + "\n"), (CONFIG, self.config)):
            _replace(self.directory / name, text, self.sync)
        journal.remove()

    def abandon(self, journal: Journal, created: Path | None) -> None:
        """Remove what `begin` made, where it could not be whole: `created` is the topmost directory that it made."""
        for file in self.files:
            file.partial.unlink(missing_ok=True)
        journal.remove()
        if created:
            shutil.rmtree(created, ignore_errors=True)

    def _clear(self) -> None:
        # config.json first: what is half removed must not look whole.
        (self.directory / CONFIG).unlink(missing_ok=True)
        for path in self.directory.iterdir():
            if path.name != JOURNAL:  # check_output has seen that all of it is ours
                path.unlink()

    def _checksums(self, entries: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[list[Any]]]]:
        """Per file and tensor: [bytes, xxh3] of its consecutive parts, from the journal's entries.

        A tensor of one part has the plain xxh3 of its bytes. Raises RuntimeError where a part belongs to no tensor.
        """
        parts: dict[int, dict[int, tuple[int, str]]] = defaultdict(dict)
        for entry in entries:
            for rank, offset, nbytes, digest in entry["sums"]:
                parts[rank][offset] = (nbytes, digest)
        result = {}
        for rank, file in enumerate(self.files):
            sums = {name: _tensor_checksum(tensor, parts[rank]) for name, tensor in file.tensors.items()}
            if parts[rank]:
                raise RuntimeError(f"{file.path}: {len(parts[rank])} parts were written that belong to no tensor")
            result[file.path.name] = sums
        return result


def _tensor_checksum(tensor: FileTensor, parts: dict[int, tuple[int, str]]) -> list[list[Any]]:
    """A tensor's parts in order, taken out of `parts`."""
    result: list[list[Any]] = []
    offset, end = tensor.offset, tensor.offset + tensor.nbytes
    while offset < end and offset in parts:
        nbytes, digest = parts.pop(offset)
        result.append([nbytes, digest])
        offset += nbytes
    if offset < end:
        # The rows of padding at the end are the file's own zeros.
        padding = xxhash.xxh3_64()
        for start in range(offset, end, 1 << 20):
            padding.update(bytes(min(1 << 20, end - start)))
        result.append([end - offset, padding.hexdigest()])
    return result


def _replace(path: Path, text: str, sync: bool) -> None:
    """Give a file its whole text at once; `sync`: have it, and its name, on disk."""
    new = path.with_name(path.name + ".new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    new.replace(path)
    if sync:
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def check_output(directory: Path, overwrite: bool) -> list[Problem]:
    """What keeps `directory` from being ours: it is a file, or holds what headrace did not write."""
    if not directory.exists():
        return _writable(directory)
    if not directory.is_dir():
        return [Problem(f"--output_dir {directory}", "a file", "a directory")]
    names = {path.name for path in directory.iterdir()}
    if not names:
        return _writable(directory)
    ours = _copied(directory)
    foreign = sorted(name for name in names if not _OURS.fullmatch(name) and name not in ours)
    if foreign:
        found = f"files that headrace did not write ({', '.join(foreign[:4])})"
        return [Problem(f"--output_dir {directory}", found, "a new or empty directory", "Choose another --output_dir")]
    if names & {PROVENANCE, JOURNAL} or overwrite:
        return _writable(directory)
    found = "a checkpoint that headrace did not write"
    return [Problem(f"--output_dir {directory}", found, "a new or empty directory", "Give --overwrite to replace it")]


def check_source(directory: Path, files: Iterable[Path]) -> list[Problem]:
    """A directory that holds files of the source is not written to: they would be taken for ours."""
    real = directory.resolve()
    if any(path.resolve().parent == real or path.parent == directory for path in files):
        expected = "another directory than the source's"
        return [Problem(f"--output_dir {directory}", "files of the source", expected, "Choose another --output_dir")]
    return []


def check_taken(outputs: Sequence[Output], overwrite: bool) -> list[Problem]:
    """A conversion of another source or other options, finished or under way, is not replaced unless asked."""
    problems = []
    for output in outputs:
        finished, begun = output.directory / CONFIG, output.directory / JOURNAL
        if overwrite or output.complete or not (finished.exists() or begun.exists()):
            continue
        if finished.exists() or _owner(begun).get("id", output.id) != output.id:
            found = f"{'a finished' if finished.exists() else 'an unfinished'} conversion of another source or with other options"
            remedy = "Give --overwrite to start afresh"
            problems.append(Problem(f"--output_dir {output.directory}", found, "a new directory, or the same request", remedy))
    return problems


def _owner(path: Path) -> dict[str, Any]:
    """The first line of a journal; nothing where it has none yet."""
    try:
        with path.open("rb") as file:
            digest, _, text = file.readline().rstrip(b"\n").partition(b" ")
        return dict(json.loads(text)) if xxhash.xxh3_64_hexdigest(text).encode() == digest else {}
    except (OSError, ValueError):
        return {}


def _copied(directory: Path) -> set[str]:
    """The names of the files that a conversion, finished or under way, copies beside its ranks."""
    try:
        finished = json.loads((directory / PROVENANCE).read_text()).get("copied", [])
    except (OSError, ValueError, AttributeError):
        finished = []
    return {*finished, *_owner(directory / JOURNAL).get("copied", [])}


def check_space(needs: Mapping[Path, int]) -> list[Problem]:
    """Whether each file system has room for what goes to the directories on it (bytes by directory)."""
    needed: dict[int, int] = defaultdict(int)
    names: dict[int, Path] = {}
    for directory, nbytes in needs.items():
        device = _nearest(directory, lambda place: place.stat().st_dev)
        # What an earlier run of ours reserved there will be used or replaced.
        needed[device] += nbytes - _held_bytes(directory)
        names[device] = directory
    problems = []
    for device, nbytes in needed.items():
        free = free_bytes(names[device])
        if nbytes > free:
            found, remedy = f"{free:,} bytes free", f"Free {nbytes - free:,} bytes, or choose another disk"
            problems.append(Problem(f"--output_dir {names[device]}", found, f"{nbytes:,}", remedy, passing=True))
    return problems


def free_bytes(directory: Path) -> int:
    """Bytes free on the file system that `directory` is, or would be, on."""
    return _nearest(directory, lambda place: shutil.disk_usage(place).free)


def _held_bytes(directory: Path) -> int:
    """What a directory's files take on the disk. A conversion at work there may remove some meanwhile: those take nothing."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(folder) / name).lstat().st_blocks * 512
    return total


def _nearest(path: Path, ask: Callable[[Path], int]) -> int:
    """What `ask` says of the nearest directory above `path`, or itself, that is there; it may go while it is asked."""
    while True:
        with suppress(FileNotFoundError):
            return ask(existing(path))


def existing(path: Path) -> Path:
    """The nearest directory above `path`, or itself, that is there."""
    while not path.exists():
        path = path.parent
    return path


def _writable(directory: Path) -> list[Problem]:
    place = existing(directory)
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return []
    return [Problem(f"--output_dir {directory}", f"{place}, which cannot be written", "a directory that can be written")]
