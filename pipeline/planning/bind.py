"""Bind the groups of a plan: the small tasks of their blocks by stage, and where their bytes go."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.planning.phases import Phased
from pipeline.tensor.arrays import Needed, SmallTask
from pipeline.tensor.blocks import StageOfGroup
from pipeline.tensor.placement import size
from stages.read import OpenBlock
from stages.read.scratch_chunks import OpenChunk, ScratchChunk
from stages.rope import RopeBuffer
from stages.write import BlockWrite, deliveries

STAGES = ("read", "rename", "unpack", "cast", "quantize")  # those that make blocks, in order


@dataclass(frozen=True)
class Inputs:
    """The bytes that groups read, by block of the source and by chunk of scratch: each once, however often it is looked at."""

    source: Mapping[Any, int]
    scratch: Mapping[str, int]


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
        For each of `work`, the keys of its block as each sink takes it.
    reads, writes
        The names of the chunks of scratch that it reads and writes.
    """

    number: int
    phase: int
    place: float
    stages: tuple[tuple[str, StageOfGroup], ...]
    opened: StageOfGroup
    work: tuple[BlockWrite, ...]
    blocks: tuple[tuple[Any, ...], ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    is_last: bool
    openers: Mapping[str, str] = field(default_factory=dict)  # chunk -> the stage that opens it, "" for the last task
    inputs: Inputs = field(default_factory=lambda: Inputs({}, {}))


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
    work = []
    for store, chunk in phase.groups[index]:
        bound = tuple(deliveries(store.placed(sink), store.region(chunk), phase.sinks[sink].locate) for sink in sinks)
        work.append(BlockWrite(store.name, bound, store.itemsize, plan.budget.piece_bytes, store.row_multiple))
    blocks = block_keys(plan, phase_number, index, sinks)
    stages, opened, openers, inputs = stages_of_group(plan, phase_number, index, sinks)
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
    )


def block_keys(plan: Phased, phase_number: int, index: int, sinks: Sequence[int]) -> tuple[tuple[Any, ...], ...]:
    """For each block of a group, the keys of its small tasks as each sink takes it."""
    group = plan.phases[phase_number].groups[index]
    return tuple(tuple((store.arrays[sink].name, *chunk) for sink in sinks) for store, chunk in group)


def stages_of_group(
    plan: Phased, phase_number: int, index: int, sinks: Sequence[int]
) -> tuple[tuple[tuple[str, StageOfGroup], ...], StageOfGroup, dict[str, str], Inputs]:
    """The stages that a group passes, what its last task opens itself, which stage opens each chunk of scratch, and what it reads.

    Arguments are those of `bind`. A chunk that the last task opens has the stage "".
    """
    phase = plan.phases[phase_number]
    needed: Needed = {}
    wanted = [store.arrays[sink].collect(chunk, needed) for store, chunk in phase.groups[index] for sink in sinks]
    return (*_by_stage(needed, phase.passes, set(wanted)), _inputs((key, task.make) for key, (task, _) in needed.items()))


def _inputs(made: Iterable[tuple[Any, Callable[..., Any]]]) -> Inputs:
    """List what the making of some blocks reads: what opens a block of the source, or a chunk, says of which tensor and region."""
    source: dict[Any, int] = {}
    scratch: dict[str, int] = {}
    for key, make in made:
        if isinstance(make, OpenBlock):
            tensor, region = make
            if not isinstance(tensor, RopeBuffer):  # which is computed, not read
                source[key] = size(region) * tensor.dtype.itemsize
        elif isinstance(make, OpenChunk):
            chunk = make.chunk
            scratch[chunk.name] = size(chunk.region) * chunk.tensor.dtype.itemsize
    return Inputs(source, scratch)


def all_inputs(plan: Phased) -> Inputs:
    """List what all groups of a plan read. Blocks have keys of another kind than those of `bind`."""
    found: dict[Any, Callable[..., Any]] = {}
    seen: set[Any] = set()
    for phase in plan.phases:
        for store, chunk in (block for group in phase.groups for block in group):
            for array in store.arrays:
                array.sources(chunk, found, seen)
    return _inputs(found.items())


def _by_stage(
    needed: Needed, passes: Sequence[str], wanted: Collection[Any]
) -> tuple[tuple[tuple[str, StageOfGroup], ...], StageOfGroup, dict[str, str]]:
    """A group's small tasks by stage, what each stage passes on, and which stage opens each chunk of scratch.

    `wanted`: the blocks that are written in the end.
    """
    tasks: dict[str, list[SmallTask]] = {stage: [] for stage in STAGES}
    chunks = {}
    for key, (task, stage) in needed.items():
        if stage == "scratch":
            chunks[key] = task
        else:
            tasks[stage].append(task)
    passed = [stage for stage in STAGES if tasks[stage] or stage in passes]
    # A chunk of scratch is opened by the first stage that needs it, or by the task that writes.
    opened_by = dict.fromkeys(chunks, "")
    for stage in reversed(passed):
        opened_by |= {key: stage for task in tasks[stage] for key in task.needs if key in chunks}
    result: list[tuple[str, StageOfGroup]] = []
    later = set(wanted)
    for stage in reversed(passed):
        own = (*(chunks[key] for key, opener in opened_by.items() if opener == stage), *tasks[stage])
        made = {task.key for task in own}
        before = {key for task in own for key in task.needs if key in needed} - made
        result.append((stage, StageOfGroup(own, tuple(sorted(later, key=str)))))
        later = (later - made) | before
    opened = tuple(chunks[key] for key, opener in opened_by.items() if not opener)
    openers = {_chunk(chunks[key]).name: opener for key, opener in opened_by.items()}
    # What the last task opens itself, no stage passes on.
    own_keys = {task.key for task in opened}
    stages = [
        (stage, StageOfGroup(each.tasks, tuple(k for k in each.keep if k not in own_keys))) for stage, each in reversed(result)
    ]
    return tuple(stages), StageOfGroup(opened, tuple(sorted(wanted, key=str))), openers


def _chunk(task: SmallTask) -> ScratchChunk:
    assert isinstance(task.make, OpenChunk)
    return task.make.chunk
