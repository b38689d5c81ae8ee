"""Write an output directory: begin or resume it, and complete it.

A directory is complete when it has config.json, which is written last. Until then it holds the journal, `headrace.json.partial`,
which says what is being written and which tasks are done, and rank files named `*.partial`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.documents import read_object
from pipeline.errors import BadInput, Problem
from pipeline.sinks import hold
from pipeline.sinks.journal import Journal, boot_mark, look
from pipeline.sinks.output_sums import as_written, copied_as_they_are, output_sums
from pipeline.sinks.reserve import missing, unmake
from pipeline.sinks.syncing import sync_directory, sync_files, sync_names
from pipeline.tensor.bucket import object_size
from pipeline.tensor.placement import Located, Region
from pipeline.tensor.remote_path import RemotePath
from pipeline.tensor.system_errors import PASSING, REMEDIES
from pipeline.tensor.tensors import Companion

if TYPE_CHECKING:
    from pipeline.sinks.rank_file import RankFile

CONFIG = "config.json"
PROVENANCE = "headrace.json"
JOURNAL = PROVENANCE + ".partial"
NOTE = PROVENANCE + hold.SUFFIX


@dataclass(frozen=True)
class Output:
    """One target's output directory.

    Parameters
    ----------
    directory
        Where the files go.
    files
        The layout of each rank file, rank 0 first.
    config
        The text of config.json.
    id
        Names the contents: outputs with equal ids have equal bytes.
    copies
        Files of the source, such as the tokenizer's, that are copied beside the ranks.
    sync
        Flush everything to disk before config.json is written.
    provenance
        What headrace.json says of the conversion, without id, timings and checksums.
    cuts
        The id and the place of each cut that its tensors go through, and of the scratch of a calibration that they wait for, by its
        stage: groups of blocks depend on them.
    """

    directory: Path
    files: tuple[RankFile, ...]
    config: str
    id: str
    copies: tuple[Companion, ...] = ()
    sync: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)
    cuts: Mapping[str, tuple[str, str]] = field(default_factory=dict, repr=False)

    @property
    def size_bytes(self) -> int:
        """The size of all rank files together."""
        return sum(file.size_bytes for file in self.files)

    @property
    def local_bytes(self) -> int:
        """The space that it needs on a local disk."""
        return self.size_bytes

    @property
    def mark(self) -> Path:
        """The file that is there when the output is whole, and from its beginning until then is not."""
        return self.directory / CONFIG

    @property
    def marked(self) -> bool:
        """Whether that file is there."""
        return self.mark.exists()

    @property
    def local_mark(self) -> str:
        """Its path, for tasks that look whether the output is whole; "" where it is on no file system."""
        return str(self.mark)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths of all files that the complete directory holds."""
        names = (CONFIG, PROVENANCE, *(path.name for path in self.copies))
        return (*(file.path for file in self.files), *(self.directory / name for name in names))

    @property
    def complete(self) -> bool:
        """Whether the directory already holds the finished output with this id."""
        try:
            provenance = read_object(self.directory / PROVENANCE)
            sizes = [file.path.stat().st_size for file in self.files]
            whole = (self.directory / CONFIG).read_text() == self.config and all(path.exists() for path in self.paths)
        except (OSError, ValueError):
            return False
        known = isinstance(provenance, dict) and provenance.get("id") == self.id
        return whole and known and sizes == [file.size_bytes for file in self.files]

    def locate(self, rank: int, tensor: str, region: Region) -> Iterator[Located]:
        """Yield where the bytes of a region of a rank's tensor lie."""
        return self.files[rank].tensors[tensor].locate(region)

    def owner(self, tasks: str) -> dict[str, Any]:
        """The first line of the journal.

        `of`: the part of the provenance that says how another conversion differs from this. `cuts`: ids. `scratch`: the places of
        these, which whoever begins anew removes.
        """
        source, options = self.provenance.get("source", {}), self.provenance.get("options", {})
        of = {"source": {"path": source["path"]} if "path" in source else {}, "options": dict(options)}
        copied = [path.name for path in self.copies]
        return {
            **self._journalled(tasks),
            "copied": copied,
            "of": of,
            "cuts": {stage: each for stage, (each, _) in self.cuts.items()},
        }

    def _journalled(self, tasks: str) -> dict[str, Any]:
        scratch = [place for _, place in self.cuts.values()]
        return {"headrace": "journal", "id": self.id, "tasks": tasks, "scratch": scratch}

    @property
    def journal(self) -> Path:
        """The path of its journal."""
        return self.directory / JOURNAL

    def unfinished(self) -> dict[str, Any]:
        """The first line of the journal that an unfinished conversion left, of this id or another; empty where there is none."""
        with suppress(OSError):
            return look(self.journal)[0] or {}
        return {}

    def begin(self, tasks: str, fresh: bool) -> Journal:
        """Lock the directory and resume what an interrupted run left there, or clear it and reserve every rank file at full size.

        Parameters
        ----------
        tasks
            Names the plan's tasks (`Phase.tasks`): a journal of others is not resumed.
        fresh
            Start again even where an interrupted run could be resumed.

        Returns
        -------
        Journal
            The open, locked journal; its entries are the tasks that are already done.

        Raises
        ------
        BadInput
            Another job is at work on the directory, it cannot be written, or there is no room. The directory is left as it was.
        """
        created = missing(self.directory)
        owner = self.owner(tasks)
        journal = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            journal = Journal(self.directory / JOURNAL)
            if not fresh and alike(journal.owner, owner) and all(file.begun() for file in self.files):
                self.mark.unlink(missing_ok=True)
                return journal
            self._clear()
            journal.start(owner)
            for file in self.files:
                file.create()
            return journal
        except OSError as error:
            if journal:
                self.abandon(journal, created)
            else:
                unmake(self.directory, created)
            found = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
            remedy = f"{REMEDIES.get(error.errno or 0, 'Free space')}, or choose another --output_dir"
            expected = f"room for {self.size_bytes:,} bytes in a directory that can be written"
            passing = error.errno in PASSING
            raise BadInput([Problem(str(self.directory), found, expected, remedy, passing=passing)]) from None

    def begun(self, tasks: str) -> list[dict[str, Any]]:
        """The entries of an interrupted run of this plan, as `begin` would take them up; nothing changes."""
        with suppress(OSError):
            owner, entries = look(self.directory / JOURNAL)
            if alike(owner, self.owner(tasks)) and all(file.is_begun() for file in self.files):
                return entries
        return []

    def finish(self, entries: Iterable[Mapping[str, Any]], timings: Mapping[str, Any]) -> None:
        """Rename the rank files to their final names and write the other files, config.json last: then the directory is complete.

        `entries` are the journal's; `timings` go into headrace.json as they are. Stopped half-way, it can be done again.
        With `sync` all of it is on the disk before config.json is, whoever wrote it. Raises OSError where the disk fails.
        """
        checksums = output_sums(self.files, entries)
        if self.sync:
            sync_files(file.partial if file.partial.exists() else file.path for file in self.files)
        for file in self.files:
            file.finish()
        for path in self.copies:
            (self.directory / path.name).write_bytes(path.read_bytes())
        if self.sync:
            sync_files(self.directory / path.name for path in self.copies)
            sync_names(self.directory)
        copied = [path.name for path in self.copies]
        said = {"id": self.id, "boot": "" if self.sync else boot_mark(), "copied": copied}
        provenance = {**self.provenance, **said, "timings": dict(timings), "xxh3": checksums}
        for name, text in ((PROVENANCE, json.dumps(provenance, indent=1) + "\n"), (CONFIG, self.config)):
            _replace(self.directory / name, text, self.sync)

    def vouched(self, entries: Iterable[Mapping[str, Any]]) -> set[str]:
        """The files of which a journal's entries say that bytes of them are written."""
        return {str(self.files[rank].partial) for entry in entries for rank, *_ in entry["sums"] if rank in range(len(self.files))}

    def flush(self) -> None:
        """Bring a whole output to the disk, as a run without `sync` has left that to the system.

        Raises OSError where the disk fails.
        """
        sync_files(self.paths)
        sync_names(self.directory)
        provenance = read_object(self.directory / PROVENANCE)
        if provenance.get("boot") != "":
            _replace(self.directory / PROVENANCE, json.dumps({**provenance, "boot": ""}, indent=1) + "\n", sync=True)

    @property
    def doubtful(self) -> bool:
        """Whether a whole output was left to the system to bring to disk, in another boot than this.

        The machine may have lost power before that was done, and have kept the names and sizes of files without their contents.
        """
        return self.complete and read_object(self.directory / PROVENANCE).get("boot", "unknown") not in ("", boot_mark())

    @property
    def unflushed(self) -> bool:
        """Whether a whole output was left to the system to bring to disk, in this boot or another."""
        return self.complete and read_object(self.directory / PROVENANCE).get("boot") != ""

    def settle(self) -> bool:
        """Hold a doubtful output against its checksums: then it is on the disk and says so, or it is whole no more.

        Returns whether it is whole. Raises OSError where it cannot be read, BadInput where another job is at work on it.
        """
        with self._held():
            if not self.doubtful:  # another job has looked meanwhile
                return self.complete
            sums = read_object(self.directory / PROVENANCE).get("xxh3")
            if as_written(self.files, sums) and copied_as_they_are(self.copies, self.directory):
                with suppress(OSError):  # of a file system that is mounted read-only
                    self.flush()
                return True
            self.mark.unlink(missing_ok=True)
            return False

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Keep other jobs from a whole output, where it can be written at all."""
        try:
            journal = Journal(self.directory / JOURNAL)
        except OSError:
            yield
            return
        try:
            yield
        finally:
            journal.remove()

    def forget_journal(self) -> None:
        """Remove the journal that a run left which ended between config.json and it; not that of a run under way."""
        path = self.directory / JOURNAL
        with suppress(BadInput, OSError):
            if path.exists():
                Journal(path).remove()
            else:
                hold.forget(path)

    def abandon(self, journal: Journal, created: Path | None) -> None:
        """Undo a `begin` that failed. `created`: the topmost directory that it made, or None."""
        for file in self.files:
            file.partial.unlink(missing_ok=True)
        journal.remove()
        unmake(self.directory, created)

    def _clear(self) -> None:
        # config.json first, so that a half-removed output does not look complete.
        (self.directory / CONFIG).unlink(missing_ok=True)
        for path in self.directory.iterdir():
            if path.name not in (JOURNAL, NOTE):  # check_output has made sure that headrace wrote everything here
                path.unlink()


def alike(one: Mapping[str, Any] | None, other: Mapping[str, Any]) -> bool:
    """Whether two first lines of journals are of one plan, wherever its scratch is."""
    return one is not None and {**one, "scratch": None} == {**other, "scratch": None}


def is_whole(directory: Path) -> bool:
    """Whether a conversion has ended in a directory: its config.json is there, and no journal.

    Of one in object storage config.json says it alone. Raises OSError where a store cannot be asked.
    """
    if isinstance(directory, RemotePath):
        return object_size(str(directory / CONFIG)) is not None
    return (directory / CONFIG).exists() and not (directory / JOURNAL).exists()


def _replace(path: Path, text: str, sync: bool) -> None:
    """Write a text file by renaming a new one over it, so that it is never half written; with `sync`, flush it to disk."""
    new = path.with_name(path.name + ".new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    new.replace(path)
    if sync:
        sync_directory(path.parent)
