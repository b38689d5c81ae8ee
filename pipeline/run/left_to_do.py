"""The rest of a plan that a run does: outputs that are not whole, groups that are not written, the chunks that these need."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.calibration.layer_task import LayerCall
from pipeline.errors import BadInput
from pipeline.planning.bind import BoundGroup, bind
from pipeline.planning.phases import Phase, Sink
from pipeline.planning.plans import Plan
from pipeline.sinks.activations import ActivationScratch
from pipeline.sinks.bucket_output import BucketOutput
from pipeline.sinks.chunk_sums import chunk_parts
from pipeline.sinks.journal import Journal, first_line
from pipeline.sinks.output import Output, alike
from pipeline.sinks.remote import RemoteGroup
from pipeline.sinks.reserve import missing
from pipeline.sinks.scratch import ScratchGroup
from pipeline.sinks.scratch_listing import drop
from pipeline.sinks.syncing import sync_files
from pipeline.tensor.blocks import Part
from stages.write import Written


@dataclass
class PhaseLeft:
    """The rest of a phase that is to be done: the numbers of its sinks that are written, and its groups.

    `journals` and `created` are by the sinks' numbers: the open journal, and the topmost directory that its beginning made.
    """

    number: int
    phase: Phase
    sinks: tuple[int, ...] = ()
    groups: tuple[BoundGroup, ...] = ()
    journals: dict[int, Journal] = field(default_factory=dict)
    created: dict[int, Path | None] = field(default_factory=dict)

    @property
    def is_scratch(self) -> bool:
        return not isinstance(self.phase.sinks[0], Output)

    def written(self) -> dict[tuple[int, int], int]:
        """The bytes of ranks that an earlier run has written: {(place of the sink among those written, rank): bytes}."""
        totals: dict[tuple[int, int], int] = {}
        for place, journal in enumerate(self.journals.values()):
            for entry in journal.entries:
                for rank, _, nbytes, _ in entry["sums"]:
                    totals[place, rank] = totals.get((place, rank), 0) + nbytes
        return totals

    def vouched(self) -> set[str]:
        """The files of which the journals speak already: an earlier process wrote them, and may not have brought them to disk."""
        each = (self.phase.sinks[number].vouched(journal.entries) for number, journal in self.journals.items())
        return set().union(*each)

    def total_bytes(self) -> int:
        """The bytes that the phase writes to its sinks, those that an earlier run wrote included."""
        return self.phase.written_bytes(self.sinks)

    def done_bytes(self) -> int:
        count = len(self.phase.groups)
        return self.total_bytes() * (count - len(self.groups)) // max(count, 1) if self.sinks else 0


class _Undo:
    """Undoes the beginning of a sink where the run is refused before it starts: then nothing has been written.

    Where its journal is closed by now, it was undone before, and the place may be another job's.
    """

    def __init__(self, sink: Sink, journal: Journal, created: Path | None) -> None:
        self.sink, self.journal, self.created = sink, journal, created

    def __enter__(self) -> None:
        """Nothing to do yet."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, BadInput) and not (self.journal.closed or self.sink.complete):
            self.sink.abandon(self.journal, self.created)


class LeftToDo:
    """The rest of a plan that a run does, its locks and journals, and the chunks of scratch that go when they were read.

    `phases`: of each phase, what is left. `known`: the parts of the chunks of scratch that are there, by the chunk's name.
    `calibrations`: the layers that are to be calibrated. `notes`: what is done again, though an earlier run had done it.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.phases = [PhaseLeft(number, phase) for number, phase in enumerate(plan.phases)]
        self.known: dict[str, list[Part]] = {}
        self.calibrations: tuple[LayerCall, ...] = ()
        self.notes: list[str] = []
        self._activations: ActivationScratch | None = None
        self._earlier_scratch: set[str] = set()  # the places of what unfinished runs had
        self._readers: dict[str, set[int]] = {}  # of chunks that are given up when nothing reads them any more
        self._owners: dict[str, ScratchGroup | RemoteGroup] = {}
        self._freed: set[str] = set()

    def begin(self, stack: ExitStack) -> None:
        """Begin the outputs that are not whole, or take them up; then find which chunks they need, and which are there."""
        for phase in reversed(self.phases):
            if phase.is_scratch:
                self._begin_scratch(phase, stack)
            else:
                self._begin_outputs(phase, stack)
        self._begin_calibration(stack)
        used = {cut.place for cut in self.plan.scratch}
        if self._activations:
            used.add(str(self._activations.files.directory))
        for place in self._earlier_scratch - used:
            drop(place)

    def _begin_outputs(self, left: PhaseLeft, stack: ExitStack) -> None:
        overwrite = self.plan.job.overwrite
        left.sinks = tuple(range(len(left.phase.sinks))) if overwrite else left.phase.pending
        if not left.sinks:  # another run has just made them whole
            return
        for number in left.sinks:
            self._begin_sink(left, number, overwrite, stack)
        done = [frozenset(task for entry in journal.entries for task in entry["done"]) for journal in left.journals.values()]
        # Of an output that is whole no part is assembled again.
        of_these = frozenset(
            index for index in range(len(left.phase.groups)) if index not in (p := left.phase.parts) or p[index].sink in left.sinks
        )
        todo = sorted(of_these - frozenset.intersection(*done))
        left.groups = tuple(bind(self.plan, left.number, index, left.sinks) for index in todo)

    def _begin_calibration(self, stack: ExitStack) -> None:
        """Begin a calibration, or take it up: the layers up to the last one of which a group that is left reads ranges."""
        calibrating = self.plan.calibrating
        last = max((group.inputs.layer for left in self.phases for group in left.groups), default=-1)
        if calibrating is None or last < 0:
            return
        job = self.plan.job
        self._activations = calibrating.plan.begin(job.keep_scratch, map(str, job.scratch_outputs))
        stack.callback(self._activations.close)
        if problems := calibrating.unfit(last + 1):
            raise BadInput(problems)
        self.calibrations = calibrating.calls(calibrating.plan.activations.layers_done, last + 1)

    def _begin_scratch(self, left: PhaseLeft, stack: ExitStack) -> None:
        """Begin a cut of which chunks are needed: those that the groups left to do read, or all, where it is kept and not whole.

        Presence decides: a chunk that is there, and of which the checksums are known, is not made again.
        """
        cuts = [sink for sink in left.phase.sinks if isinstance(sink, ScratchGroup | RemoteGroup)]
        readers = self.phases[left.number + 1].groups
        needed = {chunk for group in readers for chunk in group.reads}
        known = {chunk: parts for cut in cuts for chunk, parts in cut.recorded().items()}
        whole = all(cut.complete for cut in cuts)
        sinks = tuple(range(len(cuts)))
        if not needed or (whole and all(self._there(cuts, chunk, known) for chunk in needed)):
            self.known |= known
            return
        left.sinks = sinks
        for number in sinks:
            self._begin_sink(left, number, False, stack)
        known = {chunk: parts for journal in left.journals.values() for chunk, parts in chunk_parts(journal.entries).items()}
        groups = [bind(self.plan, left.number, index, sinks) for index in range(len(left.phase.groups))]
        keep = any(cut.kept for cut in cuts)
        # After `shard` several groups write to one chunk: it is there when the parts of all of them are. One of padding alone
        # nobody writes, nor reads.
        whole_chunks = _offsets(groups)
        wanted = whole_chunks.keys() if keep else needed & whole_chunks.keys()
        absent = {
            chunk
            for chunk in wanted
            if not whole_chunks[chunk] <= {part[0] for part in known.get(chunk, ())} or not self._there(cuts, chunk, known)
        }
        left.groups = tuple(group for group in groups if absent.intersection(group.writes))
        again = _offsets(left.groups)
        for chunk, parts in known.items():
            self.known[chunk] = [part for part in parts if part[0] not in again.get(chunk, ())]
        if not keep:
            for group in readers:
                for chunk in group.reads:
                    self._readers.setdefault(chunk, set()).add(group.number)
                    self._owners[chunk] = _owner(cuts, chunk)

    def _there(self, cuts: Sequence[ScratchGroup | RemoteGroup], chunk: str, known: Mapping[str, Sequence[Part]]) -> bool:
        return _owner(cuts, chunk).has(chunk, known.get(chunk, ()))

    def _begin_sink(self, left: PhaseLeft, number: int, fresh: bool, stack: ExitStack) -> None:
        sink = left.phase.sinks[number]
        created = left.created[number] = missing(sink.directory)
        earlier = sink.unfinished() if isinstance(sink, Output) else {}
        journal = left.journals[number] = sink.begin(left.phase.tasks, fresh)
        stack.callback(journal.close)
        if isinstance(sink, Output):
            scratch = earlier.get("scratch")
            self._earlier_scratch |= set(map(str, scratch if isinstance(scratch, list) else ()))
            if not fresh and earlier.get("id") == sink.id and not alike(earlier, journal.owner or {}):
                self.notes.append(f"{sink.directory} is begun anew: an earlier run of it went through other cuts")
        if not any(entry["done"] for entry in journal.entries):
            stack.enter_context(_Undo(sink, journal, created))

    def marks(self) -> dict[str, bytes]:
        """The first lines of the journals beside what workers write last, by path; on the disk, so that other machines see them.

        Scratch on the way there is gone before the outputs are built of, and a worker that comes then needs none.
        """
        last = [left for left in self.phases if not left.phase.here][-1:]
        journals = [
            journal
            for left in last
            for number, journal in left.journals.items()
            if not isinstance(left.phase.sinks[number], RemoteGroup) and left.phase.sinks[number].directory == journal.path.parent
        ]
        sync_files(journal.path for journal in journals)
        return {str(journal.path): first_line(str(journal.path)) for journal in journals}

    def uploads(self) -> dict[str, str]:
        """The ids of the uploads of rank files, by the file's URL."""
        last = self.phases[-1]
        found: dict[str, str] = {}
        for number, journal in last.journals.items():
            sink = last.phase.sinks[number]
            found |= sink.uploads(journal.entries) if isinstance(sink, BucketOutput) else {}
        return found

    def abandon(self, changed: bool) -> None:
        """Remove what the run has made of sinks that are not whole, the last first: an earlier one may have made its directory.

        `changed`: the source is another now, so that nothing that was measured on it is of use; else what is kept of that stays.
        """
        for left in self.phases:
            for number, journal in reversed(left.journals.items()):
                if not (journal.closed or left.phase.sinks[number].complete):
                    left.phase.sinks[number].abandon(journal, left.created[number])
        if self._activations and (changed or not self._activations.kept):
            self._activations.remove()

    def free(self, number: int) -> None:
        """Give up the chunks that only the group of this number was still to read."""
        for chunk in [chunk for chunk, readers in self._readers.items() if number in readers]:
            self._readers[chunk].discard(number)
            if not self._readers[chunk]:
                del self._readers[chunk]
                self.known.pop(chunk, None)
                self._freed.add(chunk)
                self._owners[chunk].free(chunk, pooled=not self.plan.job.elsewhere)

    def written(self, result: Written) -> None:
        """Take in which chunks of scratch a group has written."""
        for chunk, parts in result.chunk_parts.items():
            self.known.setdefault(chunk, []).extend(parts)

    def gave_up(self, chunk: object) -> bool:
        """Whether a chunk, by its name, was given up by this run, as all that read it was done."""
        return chunk in self._freed

    def leave_out(self, done: Collection[int]) -> None:
        """Leave out the groups that this run has done, and the layers, for another graph of the rest."""
        for left in self.phases:
            left.groups = tuple(group for group in left.groups if group.number not in done)
        if self._activations and self.calibrations:
            layers = self._activations.files.layers_done
            self.calibrations = tuple(call for call in self.calibrations if call.layer >= layers)

    def whole(self, number: int) -> Journal:
        """Note that an output is whole, by its number: returns its journal, which nothing here looks at any more."""
        return self.phases[-1].journals.pop(number)

    def phase_of(self, number: int) -> int:
        """The number of the phase that a group is of, by the group's number."""
        return max(n for n in range(len(self.phases)) if self.plan.first_group(n) <= number)

    def pool(self) -> str:
        """The directory of files that new chunks may take: that of the last cut here of which chunks are given up; "" for none.

        A worker elsewhere that a cluster has given up may still be writing to a chunk: its file becomes no other chunk's.
        """
        if self.plan.job.elsewhere:
            return ""
        cuts = [sink for left in self.phases for sink in left.phase.sinks if isinstance(sink, ScratchGroup) and not sink.keep]
        # Padding is what nobody writes: a chunk of rank tensors needs a file of zeros.
        return str(cuts[-1].pool) if cuts and not any(cut.of_ranks for cut in cuts) else ""

    def close(self) -> None:
        """After a run that ended well: whole outputs need no journal, a cut that is kept is whole, and ranges are read."""
        if self._activations and not self._activations.kept:
            self._activations.remove()
        for left in self.phases:
            for number, journal in left.journals.items():
                sink = left.phase.sinks[number]
                if isinstance(sink, ScratchGroup | RemoteGroup) and sink.kept:
                    sink.finish(journal)
                elif left.is_scratch or sink.complete:
                    journal.remove()


def _offsets(groups: Sequence[BoundGroup]) -> dict[str, set[int]]:
    """The byte offsets of the parts that groups write of each chunk of scratch, by the chunk's name."""
    offsets: dict[str, set[int]] = {}
    for group in groups:
        for to in (to for item in group.work for sink in item.deliveries for to in sink if to.chunk):
            offsets.setdefault(to.chunk, set()).add(max(to.offset, 0))
    return offsets


def _owner(cuts: Sequence[ScratchGroup | RemoteGroup], chunk: str) -> ScratchGroup | RemoteGroup:
    """The cut that a chunk is of, by its name, which begins with the cut's place."""
    return next(cut for cut in cuts if chunk.startswith(f"{cut.place}/"))
