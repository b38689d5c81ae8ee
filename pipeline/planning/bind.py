"""Bind the groups of a plan: the small tasks of their blocks by stage, and where their bytes go."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.planning.plans import Plan
from pipeline.tensor.blocks import StageOfGroup, collect
from stages.read.scratch_chunks import ScratchChunk
from stages.write import BlockWrite, deliveries

STAGES = ("read", "rename", "unpack", "cast", "quantize")  # those that make blocks, in order


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


def bind(plan: Plan, phase_number: int, index: int, sinks: Sequence[int], layers: dict[str, Mapping[Any, Any]]) -> BoundGroup:
    """Bind a group to its sinks: the small tasks of its blocks by stage, and where its bytes go.

    Parameters
    ----------
    index
        The group's position in its phase.
    sinks
        The numbers of the phase's sinks that are to be written.
    layers
        The small tasks of arrays' layers that were looked up before: a cache for the groups of a plan.
    """
    phase = plan.phases[phase_number]
    group = phase.groups[index]
    needed: dict[Any, Any] = {}
    work, blocks = [], []
    for store, chunk in group:
        region = store.region(chunk)
        bound = tuple(deliveries(store.placements[sink], region, phase.sinks[sink].locate) for sink in sinks)
        work.append(BlockWrite(store.name, bound, store.itemsize, plan.budget.piece_bytes, store.row_multiple))
        keys = tuple((store.arrays[sink].name, *chunk) for sink in sinks)
        for key, sink in zip(keys, sinks, strict=True):
            collect(key, store.arrays[sink], layers, needed)
        blocks.append(keys)
    stages, opened, openers = _by_stage(needed, plan.stage_of, phase.passes, {key for keys in blocks for key in keys})
    writes = dict.fromkeys(to.chunk for item in work for sink in item.deliveries for to in sink if to.chunk)
    return BoundGroup(
        plan.first_group(phase_number) + index,
        phase_number,
        index / len(phase.groups),
        stages,
        opened,
        tuple(work),
        tuple(blocks),
        tuple(openers),
        tuple(writes),
        phase_number == len(plan.phases) - 1,
        openers,
    )


def _by_stage(
    needed: Mapping[Any, Any], stage_of: Mapping[str, str], passes: Sequence[str], wanted: Collection[Any]
) -> tuple[tuple[tuple[str, StageOfGroup], ...], StageOfGroup, dict[str, str]]:
    """A group's small tasks by stage, what each stage passes on, and which stage opens each chunk of scratch.

    `wanted`: the blocks that are written in the end.
    """
    tasks: dict[str, list[tuple[Any, Any]]] = {stage: [] for stage in STAGES}
    chunks = {}
    for key, task in needed.items():
        stage = stage_of[key[0]]
        if stage == "scratch":
            chunks[key] = task
        else:
            tasks[stage].append((key, task))
    passed = [stage for stage in STAGES if tasks[stage] or stage in passes]
    # A chunk of scratch is opened by the first stage that needs it, or by the task that writes.
    opened_by = dict.fromkeys(chunks, "")
    for stage in reversed(passed):
        opened_by |= {key: stage for _, task in tasks[stage] for key in task.dependencies if key in chunks}
    result: list[tuple[str, StageOfGroup]] = []
    later = set(wanted)
    for stage in reversed(passed):
        own = (*((key, chunks[key]) for key, opener in opened_by.items() if opener == stage), *tasks[stage])
        made = {key for key, _ in own}
        before = {key for _, task in own for key in task.dependencies if key in needed} - made
        result.append((stage, StageOfGroup(own, tuple(sorted(later, key=str)))))
        later = (later - made) | before
    opened = tuple((key, chunks[key]) for key, opener in opened_by.items() if not opener)
    openers = {_chunk(chunks[key]).name: opener for key, opener in opened_by.items()}
    # What the last task opens itself, no stage passes on.
    own_keys = {key for key, _ in opened}
    stages = [
        (stage, StageOfGroup(each.tasks, tuple(k for k in each.keep if k not in own_keys))) for stage, each in reversed(result)
    ]
    return tuple(stages), StageOfGroup(opened, tuple(sorted(wanted, key=str))), openers


def _chunk(task: Any) -> ScratchChunk:
    chunk = task.args[0]
    assert isinstance(chunk, ScratchChunk)
    return chunk
