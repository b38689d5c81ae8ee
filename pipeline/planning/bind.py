"""Bind the groups of a plan: the small tasks of their blocks by stage, and where their bytes go."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.planning.phases import Phased
from pipeline.planning.rank_parts import delivered, rank_files
from pipeline.tensor.arrays import Maker, Needed, SmallTask
from pipeline.tensor.blocks import CHECKSUMS, StageOfGroup
from pipeline.tensor.placement import Region, size
from stages.read import OpenBlock
from stages.read.act_ranges import PendingRange
from stages.read.scratch_chunks import OpenChunk, ScratchChunk
from stages.rope import RopeBuffer
from stages.write.deliveries import BlockWrite, deliveries
from stages.write.parts import RankPart

STAGES = ("read", "rename", "unpack", "cast", "quantize")  # those that make blocks, in order


@dataclass(frozen=True)
class Inputs:
    """The bytes that groups read, by block of the source and by chunk of scratch: each once, however often it is looked at.

    `layer`: the last decoder layer of which they read ranges that the same run measures; -1 for none.
    """

    source: Mapping[Any, int]
    scratch: Mapping[str, int]
    layer: int = -1


@dataclass(frozen=True)
class BoundGroup:
    """The work of one group of a plan, bound to the sinks that it is for.

    Attributes
    ----------
    number
        Of the group, counted through all phases.
    place
        How far it is through its phase, from 0 to 1: groups of several phases run in this order.
    stages
        The stages that it passes, in order.
    opened
        The chunks of scratch that its last task opens itself.
    blocks
        For each of `work`, the numbers of its block as each sink takes it.
    reads, writes
        The names of the chunks of scratch that it reads and writes.
    part
        The part of a rank's file that it assembles, where it does that.
    """

    number: int
    phase: int
    place: float
    stages: tuple[tuple[str, StageOfGroup], ...]
    opened: StageOfGroup
    work: tuple[BlockWrite, ...]
    blocks: tuple[tuple[int, ...], ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    is_last: bool
    openers: Mapping[str, str] = field(default_factory=dict)  # chunk -> the stage that opens it, "" for the last task
    inputs: Inputs = field(default_factory=lambda: Inputs({}, {}))
    part: RankPart | None = None


def bind(plan: Phased, phase_number: int, index: int, sinks: Sequence[int]) -> BoundGroup:
    """Bind a group to its sinks: the small tasks of its blocks by stage, and where its bytes go.

    Parameters
    ----------
    index
        The group's position in its phase.
    sinks
        The numbers of the phase's sinks that are to be written.
    """
    phase = plan.phases[phase_number]
    part = phase.parts.get(index)
    work = []
    for store, chunk in phase.groups[index]:
        region: Region = ()
        if part:
            region, of_part = delivered(part, store, chunk, rank_files(phase.sinks[part.sink])[part.rank])
            bound = tuple(of_part if sink == part.sink else () for sink in sinks)
        else:
            bound = tuple(deliveries(store.placed(sink), store.region(chunk), phase.sinks[sink].locate) for sink in sinks)
        work.append(BlockWrite(store.name, bound, store.itemsize, plan.budget.piece_bytes, store.row_multiple, region))
    stages, opened, openers, inputs, blocks = stages_of_group(plan, phase_number, index, sinks)
    writes = dict.fromkeys(to.chunk for item in work for sink in item.deliveries for to in sink if to.chunk)
    return BoundGroup(
        plan.first_group(phase_number) + index,
        phase_number,
        index / len(phase.groups),
        stages,
        opened,
        tuple(work),
        blocks,
        tuple(openers),
        tuple(writes),
        phase_number == len(plan.phases) - 1,
        openers,
        inputs,
        replace(part, sink=list(sinks).index(part.sink)) if part else None,
    )


def stages_of_group(
    plan: Phased, phase_number: int, index: int, sinks: Sequence[int]
) -> tuple[tuple[tuple[str, StageOfGroup], ...], StageOfGroup, dict[str, str], Inputs, tuple[tuple[int, ...], ...]]:
    """The stages that a group passes, what its last task opens itself, which stage opens each chunk of scratch, what it reads, and
    the numbers of its blocks as each sink takes them.

    Arguments are those of `bind`. A chunk that the last task opens has the stage "".
    """
    phase = plan.phases[phase_number]
    needed: Needed = {}
    blocks = tuple([tuple([store.arrays[n].collect(chunk, needed) for n in sinks]) for store, chunk in phase.groups[index]])
    stages = _by_stage(needed, phase.passes, {number for each in blocks for number in each})
    return (*stages, _inputs((block, task.make) for block, (task, _) in needed.items()), blocks)


def _inputs(made: Iterable[tuple[Any, Maker]]) -> Inputs:
    """List what the making of some blocks reads: what opens a block of the source, or a chunk, says of which tensor and region."""
    source: dict[Any, int] = {}
    scratch: dict[str, int] = {}
    layer = -1
    for key, make in made:
        if isinstance(make, OpenBlock):
            tensor, region = make
            if isinstance(tensor, PendingRange):
                layer = max(layer, tensor.layer)
            elif not isinstance(tensor, RopeBuffer):  # which is computed, not read
                source[key] = size(region) * tensor.dtype.itemsize
        elif isinstance(make, OpenChunk):
            chunk = make.chunk
            scratch[chunk.name] = size(chunk.region) * chunk.tensor.dtype.itemsize
    return Inputs(source, scratch, layer)


def all_inputs(plan: Phased) -> Inputs:
    """List what all groups of a plan read."""
    found: dict[Any, Maker] = {}
    seen: set[Any] = set()
    for phase in plan.phases:
        for store, chunk in (block for group in phase.groups for block in group):
            for array in store.arrays:
                array.sources(chunk, found, seen)
    return _inputs(found.items())


def _by_stage(
    needed: Needed, passes: Sequence[str], wanted: Collection[int]
) -> tuple[tuple[tuple[str, StageOfGroup], ...], StageOfGroup, dict[str, str]]:
    """A group's small tasks by stage, what each stage passes on, and which stage opens each chunk of scratch.

    `wanted`: the blocks that are written in the end.
    """
    tasks: dict[str, list[SmallTask]] = {stage: [] for stage in STAGES}
    chunks: dict[int, SmallTask] = {}
    for task, stage in needed.values():
        if stage == "scratch":
            chunks[task.number] = task
        else:
            tasks[stage].append(task)
    passed = [stage for stage in STAGES if tasks[stage] or stage in passes]
    # A chunk of scratch is opened by the first stage that needs it, or by the task that writes.
    opened_by = dict.fromkeys(chunks, "")
    for stage in reversed(passed):
        opened_by |= {number: stage for task in tasks[stage] for number in task.needs if number in chunks}
    result: list[tuple[str, StageOfGroup]] = []
    later = set(wanted)
    for stage in reversed(passed):
        own = (*(chunks[number] for number, opener in opened_by.items() if opener == stage), *tasks[stage])
        made = {task.number for task in own}
        before = {number for task in own for number in task.needs if number != CHECKSUMS} - made
        result.append((stage, StageOfGroup(own, tuple(sorted(later)))))
        later = (later - made) | before
    opened = tuple(chunks[number] for number, opener in opened_by.items() if not opener)
    openers = {_chunk(chunks[number]).name: opener for number, opener in opened_by.items()}
    # What the last task opens itself, no stage passes on.
    by_last = {task.number for task in opened}
    stages = [
        (stage, StageOfGroup(each.tasks, tuple(n for n in each.keep if n not in by_last))) for stage, each in reversed(result)
    ]
    return tuple(stages), StageOfGroup(opened, tuple(sorted(wanted))), openers


def _chunk(task: SmallTask) -> ScratchChunk:
    assert isinstance(task.make, OpenChunk)
    return task.make.chunk
