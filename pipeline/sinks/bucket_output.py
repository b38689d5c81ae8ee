"""An output in object storage: rank files are uploaded in parts, which stay when a run ends, and config.json is written last.

Its journal, on this machine or the file system of scratch, has the id of each upload and what the store answered for each part. A
run that is taken up again uploads the parts that are not there. A note in the bucket keeps other jobs away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.sinks import bucket_hold
from pipeline.sinks.bucket_checks import rank_uploads, read_provenance
from pipeline.sinks.journal import Journal, look
from pipeline.sinks.output import PROVENANCE, Output, alike
from pipeline.sinks.output_sums import output_sums
from pipeline.sinks.scratch import remove_empty_root
from pipeline.tensor import bucket
from pipeline.tensor.system_errors import PASSING, REMEDIES

UPLOADS = "uploads"  # of a journal's entry: the id of each rank's upload, rank 0 first
PARTS = "parts"  # [rank, number, ETag, number of the task] of each part


class UploadJournal(Journal):
    """The journal of an output in object storage, whose note in the bucket goes when it is closed."""

    def __init__(self, path: Path, directory: Path) -> None:
        """Raises BadInput where another job is at work on the output, and OSError where the store fails."""
        super().__init__(path)
        self.directory = directory
        self._note = b""
        try:
            self._note = bucket_hold.take(directory)
        except BaseException:
            super().close()
            raise

    def remove(self) -> None:
        """Delete the file, and the directory that it has by default."""
        super().remove()
        remove_empty_root(self.path.parent)

    def close(self) -> None:
        """Close the file, and remove the note."""
        note, self._note = self._note, b""
        if note:
            with suppress(OSError):  # the next job passes over it, once this process is gone
                bucket_hold.leave(self.directory, note)
        super().close()


@dataclass(frozen=True)
class BucketOutput(Output):
    """One target's output below a URL. `journals`: the directory of its journal. `part_bytes`: of each file's parts, by rank."""

    journals: Path = field(default_factory=Path)
    part_bytes: tuple[int, ...] = ()

    @property
    def local_bytes(self) -> int:
        """The space that it needs on a local disk: none."""
        return 0

    @property
    def journal(self) -> Path:
        """The path of its journal: of this output, as scratch may have those of others."""
        place = hashlib.sha256(str(self.directory).encode()).hexdigest()[:16]
        return self.journals / f"headrace-{place}.journal"

    @property
    def marked(self) -> bool:
        return bucket.object_size(str(self.mark)) is not None

    @property
    def local_mark(self) -> str:
        return ""

    @property
    def complete(self) -> bool:
        """Whether the finished output with this id is there. Raises OSError where the store cannot be asked."""
        sizes = bucket.objects_below(str(self.directory))
        if any(path.name not in sizes for path in self.paths):
            return False
        if any(sizes[file.path.name] != file.size_bytes for file in self.files):
            return False
        found = bucket.read_object_at(str(self.mark))
        if found is None or found[0] != self.config.encode():
            return False
        return read_provenance(self.directory).get("id") == self.id

    def owner(self, tasks: str) -> dict[str, Any]:
        """The first line of the journal: parts have the same bytes whatever cuts they are made behind."""
        return {**self._journalled(tasks), "parts": list(self.part_bytes)}

    def begun(self, tasks: str) -> list[dict[str, Any]]:
        """The entries of an interrupted run of this plan. Parts that the store has lost meanwhile are seen by `begin` alone."""
        with suppress(OSError):
            owner, entries = look(self.journal)
            if alike(owner, self.owner(tasks)) and _uploads(entries):
                return entries
        return []

    def begin(self, tasks: str, fresh: bool) -> Journal:
        """Take the output, and go on with the uploads that an interrupted run left, or begin them anew.

        Raises BadInput where another job is at work on it, or the store takes nothing: what an interrupted run left stays.
        """
        owner = self.owner(tasks)
        journal = uploads = None
        try:
            self.journals.mkdir(parents=True, exist_ok=True)
            journal = UploadJournal(self.journal, self.directory)
            uploads = None if fresh or not alike(journal.owner, owner) else _uploads(journal.entries)
            if uploads is None:
                self._clear()
                journal.start(owner)
                journal.append({"done": [], "sums": [], UPLOADS: [self._begin_upload(rank) for rank in range(len(self.files))]})
            else:
                bucket.remove_object(str(self.mark))
                self._take_up(journal, owner, uploads)
            return journal
        except OSError as error:
            if journal and uploads is None:
                self.abandon(journal, None)
            elif journal:
                journal.close()
            found = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
            remedy = f"{REMEDIES.get(error.errno or 0, 'Mend it')}, or choose another --output_dir"
            expected = "a bucket that can be written"
            passing = error.errno in PASSING
            raise BadInput([Problem(str(self.directory), found, expected, remedy, passing=passing)]) from None

    def uploads(self, entries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
        """The id of each rank's upload, by the file's URL, as a journal's entries say."""
        ids = _uploads(entries) or []
        return {str(file.path): each for file, each in zip(self.files, ids, strict=False)}

    def vouched(self, _entries: Iterable[Mapping[str, Any]]) -> set[str]:
        """The files that a run has to bring to the disk: none, as a store has what it was given."""
        return set()

    def finish(self, entries: Iterable[Mapping[str, Any]], timings: Mapping[str, Any]) -> None:
        """Make an object of each upload, then write the other files, config.json last. Stopped half-way, it can be done again.

        Raises OSError where the store fails.
        """
        entries = list(entries)
        checksums = output_sums(self.files, entries)
        uploads, parts = self.uploads(entries), _parts(entries)
        for rank, file in enumerate(self.files):
            url = str(file.path)
            if not bucket.in_parts(url):
                continue
            etags = {number: etag for (each, number), (etag, _) in parts.items() if each == rank}
            try:
                bucket.complete_upload(url, uploads[url], etags)
            except FileNotFoundError:
                if bucket.object_size(url) != file.size_bytes:  # not complete already
                    raise
        for upload in rank_uploads(self.directory):  # begun twice, as the first answer was lost
            bucket.abort_upload(upload.url, upload.id)
        for path in self.copies:
            bucket.put_object(str(self.directory / path.name), path.read_bytes())
        said = {"id": self.id, "boot": "", "copied": [path.name for path in self.copies]}
        provenance = {**self.provenance, **said, "timings": dict(timings), "xxh3": checksums}
        bucket.put_object(str(self.directory / PROVENANCE), (json.dumps(provenance, indent=1) + "\n").encode())
        bucket.put_object(str(self.mark), self.config.encode())

    def flush(self) -> None:
        """Do nothing: a store has what it was given."""

    @property
    def doubtful(self) -> bool:
        """Never: a power cut takes nothing of it."""
        return False

    @property
    def unflushed(self) -> bool:
        """Never: a store has what it was given."""
        return False

    def forget_journal(self) -> None:
        """Remove what a run left which ended just after it had made the output whole; not that of a run under way."""
        with suppress(BadInput, OSError):
            if self.journal.exists():
                Journal(self.journal).remove()
            bucket_hold.forget(self.directory)

    def abandon(self, journal: Journal, _created: Path | None) -> None:
        """Remove everything of an output that is not whole: its uploads, and what was made of them."""
        with suppress(OSError):
            self._clear()
        journal.remove()

    def _begin_upload(self, rank: int) -> str:
        url = str(self.files[rank].path)
        return bucket.begin_upload(url) if bucket.in_parts(url) else ""

    def _clear(self) -> None:
        # config.json first, so that a half-removed output does not look complete.
        bucket.remove_object(str(self.mark))
        for name in bucket.objects_below(str(self.directory)):
            if name != bucket_hold.NOTE:  # check_output has made sure that headrace wrote everything here
                bucket.remove_object(str(self.directory / name))
        for upload in rank_uploads(self.directory):
            bucket.abort_upload(upload.url, upload.id)

    def _take_up(self, journal: Journal, owner: Mapping[str, Any], uploads: list[str]) -> None:
        """Hold a journal against what the store has: tasks whose parts are not there are not done, and lost uploads begin anew."""
        parts = _parts(journal.entries)
        lost: set[tuple[int, int]] = set()
        again = list(uploads)
        for rank, file in enumerate(self.files):
            own = {number: etag for (each, number), (etag, _) in parts.items() if each == rank}
            url, size = str(file.path), bucket.object_size(str(file.path))
            if size == file.size_bytes and own:  # made whole by a run that ended just then
                continue
            if not bucket.in_parts(url):
                lost |= {(rank, number) for number in own}
                continue
            there = bucket.uploaded_parts(url, uploads[rank])
            if there is None:
                again[rank] = bucket.begin_upload(url)
            lost |= {(rank, number) for number, etag in own.items() if not there or there.get(number, (0, ""))[1] != etag}
        if not lost and again == uploads:
            return
        kept = [_without(each, lost, parts, self.part_bytes) for each in journal.entries]
        journal.start(owner)
        journal.append({"done": [], "sums": [], UPLOADS: again})
        for entry in kept:
            journal.append(entry)


def _uploads(entries: Iterable[Mapping[str, Any]]) -> list[str] | None:
    """The ids of uploads that entries say, the last word; None where they say none."""
    said = [entry[UPLOADS] for entry in entries if UPLOADS in entry]
    return [str(each) for each in said[-1]] if said else None


def _parts(entries: Iterable[Mapping[str, Any]]) -> dict[tuple[int, int], tuple[str, int]]:
    """(ETag, number of the task) of each part, by (rank, number); what was answered last counts."""
    return {(rank, number): (etag, task) for entry in entries for rank, number, etag, task in entry.get(PARTS, ())}


def _without(
    entry: Mapping[str, Any],
    lost: set[tuple[int, int]],
    parts: Mapping[tuple[int, int], tuple[str, int]],
    part_bytes: tuple[int, ...],
) -> dict[str, Any]:
    """An entry without the tasks and checksums of parts that are lost, and without ids of uploads."""
    undone = {parts[each][1] for each in lost}
    return {
        "done": [number for number in entry["done"] if number not in undone],
        "sums": [each for each in entry["sums"] if (each[0], _number(each[1], part_bytes[each[0]])) not in lost],
        PARTS: [each for each in entry.get(PARTS, ()) if (each[0], each[1]) not in lost],
    }


def _number(offset: int, size: int) -> int:
    """The number of the part that has a byte of a file; 0, where the file is one stream."""
    return offset // size + 1 if size else 0
