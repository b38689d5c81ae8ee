"""The Dask graph of a plan: a task for each stage of each group of blocks, from the source to whole outputs.

The stages' arrays are made of small tasks, one a block. A node of this graph is a stage of a *group* of blocks (some hundred MB of
neighbouring bytes of the source), keyed (stage, number of the group), so that Dask's own pages show the stages: `read`, `rename`,
`unpack`, `cast`, `quantize`, then `scratch` or `write`, and `finish` for each output. A group has a task for each stage that it
passes. Only `scratch` and `write` move bytes: the values of the others are blocks that nothing has read.

A task that opens chunks of scratch depends on the tasks that write these, so that there are no phases to wait for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.planning.phases import Phased
from pipeline.sinks.journal import entry
from pipeline.sinks.output import Output
from pipeline.tensor.blocks import Part, StageOfGroup, collect, make_blocks
from pipeline.tensor.metering import stage_bytes
from pipeline.tensor.placement import size
from stages.read import open_block
from stages.read.scratch_chunks import ScratchChunk
from stages.rope import RopeBuffer
from stages.write import BlockWrite, deliveries, write_group

if TYPE_CHECKING:
    from dask.highlevelgraph import HighLevelGraph

STAGES = ("read", "rename", "unpack", "cast", "quantize")
RESULTS = ("scratch", "write", "finish")  # the stages whose tasks give results, and not blocks
Key = tuple[str, Any]


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


def bind(plan: Phased, phase_number: int, index: int, sinks: Sequence[int], layers: dict[str, Mapping[Any, Any]]) -> BoundGroup:
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
    work = []
    for store, chunk in phase.groups[index]:
        bound = tuple(deliveries(store.placements[sink], store.region(chunk), phase.sinks[sink].locate) for sink in sinks)
        work.append(BlockWrite(store.name, bound, store.itemsize, plan.budget.piece_bytes, store.row_multiple))
    blocks = block_keys(plan, phase_number, index, sinks)
    stages, opened, openers, inputs = stages_of_group(plan, phase_number, index, sinks, layers)
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
    plan: Phased, phase_number: int, index: int, sinks: Sequence[int], layers: dict[str, Mapping[Any, Any]]
) -> tuple[tuple[tuple[str, StageOfGroup], ...], StageOfGroup, dict[str, str], Inputs]:
    """The stages that a group passes, what its last task opens itself, which stage opens each chunk of scratch, and what it reads.

    Arguments are those of `bind`. A chunk that the last task opens has the stage "".
    """
    phase = plan.phases[phase_number]
    keys = block_keys(plan, phase_number, index, sinks)
    needed: dict[Any, Any] = {}
    for (store, _), each in zip(phase.groups[index], keys, strict=True):
        for key, sink in zip(each, sinks, strict=True):
            collect(key, store.arrays[sink], layers, needed)
    return (*_by_stage(needed, plan.stage_of, phase.passes, {key for each in keys for key in each}), _inputs(needed))


def _inputs(needed: Mapping[Any, Any]) -> Inputs:
    """List what some small tasks read: a task that opens a block of the source, or a chunk, says of which tensor and region."""
    source: dict[Any, int] = {}
    scratch: dict[str, int] = {}
    for key, task in needed.items():
        if task.func is open_block:
            tensor, region = task.args
            if isinstance(tensor, RopeBuffer):  # computed, not read
                continue
            source[key] = size(region) * tensor.dtype.itemsize
        elif isinstance(task.args[0], ScratchChunk):
            chunk = task.args[0]
            scratch[chunk.name] = size(chunk.region) * chunk.tensor.dtype.itemsize
    return Inputs(source, scratch)


def all_inputs(plan: Phased) -> Inputs:
    """List what all groups of a plan read."""
    layers: dict[str, Mapping[Any, Any]] = {}
    source: dict[Any, int] = {}
    scratch: dict[str, int] = {}
    for number, phase in enumerate(plan.phases):
        for index in range(len(phase.groups)):
            inputs = stages_of_group(plan, number, index, range(len(phase.sinks)), layers)[-1]
            source |= inputs.source
            scratch |= inputs.scratch
    return Inputs(source, scratch)


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


@dataclass(frozen=True)
class Finish:
    """An output that a graph makes whole.

    `number`: of its target. `sink`: its position among the sinks that are written. `earlier`: the entries of its journal.
    `started`: when the run began, in seconds since the epoch. `stages`: seconds and bytes by stage of tasks that are not in the
    graph, as they were run before it.
    """

    number: int
    sink: int
    output: Output
    earlier: tuple[Mapping[str, Any], ...]
    started: float
    bytes_read: int = 0
    scratch_bytes_read: int = 0
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class StageGraph:
    """A graph that is run. `layers`: the tasks by stage. `places`: how far the groups are through their phases, by number."""

    layers: Mapping[str, Mapping[Key, Any]]
    places: Mapping[Any, tuple[float, int]] = field(repr=False)

    def __len__(self) -> int:
        return sum(map(len, self.layers.values()))

    @property
    def tasks(self) -> dict[Key, Any]:
        """All tasks by key."""
        return {key: task for layer in self.layers.values() for key, task in layer.items()}

    @property
    def results(self) -> list[Key]:
        """The keys of the tasks that give results."""
        return [key for stage in RESULTS for key in self.layers.get(stage, ())]

    def highlevel(self) -> HighLevelGraph:
        """The graph as Dask takes it: a layer a stage, each task with the priority of its group."""
        from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

        priority = Priority(dict(self.places))
        layers = {name: MaterializedLayer(dict(layer), annotations={"priority": priority}) for name, layer in self.layers.items()}
        dependencies = {
            name: {dependency[0] for task in layer.values() for dependency in task.dependencies} - {name}
            for name, layer in self.layers.items()
        }
        return HighLevelGraph(layers, dependencies)


@dataclass(frozen=True)
class Priority:
    """The priority of a task, by its key: groups run in the order of the source, those that read scratch before more is written."""

    places: Mapping[Any, tuple[float, int]]

    def __call__(self, key: Key) -> float:
        place, phase = self.places.get(key[1], (2.0, 0)) if key[0] != "finish" else (2.0, 0)
        return phase * 1e-3 - place * 1e3


def stage_graph(
    groups: Iterable[BoundGroup],
    finishes: Sequence[Finish] = (),
    *,
    known: Mapping[str, Sequence[Part]] | None = None,
    window: int | None = None,
    name: Callable[[int], Any] = int,
    run: Callable[..., Any] = write_group,
    **arguments: Any,
) -> StageGraph:
    """Make the graph of groups that are to be done.

    Parameters
    ----------
    known
        The parts of the chunks of scratch that an earlier run wrote.
    window
        How many groups `scratch` may be ahead of what reads it; None for any number.
    name
        Gives the second part of a task's key for the number of a group.
    run
        What the tasks `scratch` and `write` call, with `arguments`.
    """
    from dask._task_spec import List, Task, TaskRef

    groups = list(groups)
    writers: dict[str, list[Key]] = {}
    for group in groups:
        for chunk in group.writes:
            writers.setdefault(chunk, []).append((_last(group), name(group.number)))
    held_back = _window(groups, window, name)
    layers: dict[str, dict[Key, Any]] = {}

    def add(stage: str, number: Any, function: Callable[..., Any], *own: Any, **keywords: Any) -> Key:
        key = (stage, number)
        layers.setdefault(stage, {})[key] = Task(key, function, *own, **keywords)
        return key

    for group in groups:
        number = name(group.number)
        before: list[Key] = []
        for stage, work in group.stages:
            chunks = [chunk for chunk, opener in group.openers.items() if opener == stage]
            inputs = [*before, *_distinct(writers, chunks)]
            before = [add(stage, number, make_blocks, _with_known(work, chunks, known), *map(TaskRef, inputs))]
        chunks = [chunk for chunk, opener in group.openers.items() if not opener]
        inputs = [*before, *_distinct(writers, chunks)]
        opened = _with_known(group.opened, chunks, known)
        own = (group.number, group.work, opened, group.blocks, *map(TaskRef, inputs))
        waits = {"after": List(*map(TaskRef, held_back[group.number]))} if group.number in held_back else {}
        add(_last(group), number, _after if waits else run, *((run, *own) if waits else own), **waits, **arguments)
    written, stored = list(layers.get("write", ())), list(layers.get("scratch", ()))
    for finish in finishes:
        add("finish", finish.number, finish_output, finish, List(*map(TaskRef, written)), List(*map(TaskRef, stored)))
    ordered = {stage: layers[stage] for stage in (*STAGES, *RESULTS) if stage in layers}
    return StageGraph(ordered, {name(group.number): (group.place, group.phase) for group in groups})


def whole_graph(plan: Phased, outputs: Sequence[Output]) -> StageGraph:
    """Make the graph of all groups of a plan, as if nothing had been done before. `outputs`: the sinks of its last phase."""
    layers: dict[str, Mapping[Any, Any]] = {}
    groups = [
        bind(plan, number, index, range(len(phase.sinks)), layers)
        for number, phase in enumerate(plan.phases)
        for index in range(len(phase.groups))
    ]
    return stage_graph(groups, [Finish(number, number, output, (), 0.0) for number, output in enumerate(outputs)])


def _last(group: BoundGroup) -> str:
    return "write" if group.is_last else "scratch"


def _distinct(writers: Mapping[str, Sequence[Key]], chunks: Iterable[str]) -> Iterator[Key]:
    """The tasks that write some chunks, each once."""
    yield from dict.fromkeys(key for chunk in chunks for key in writers.get(chunk, ()))


def _with_known(work: StageOfGroup, chunks: Iterable[str], known: Mapping[str, Sequence[Part]] | None) -> StageOfGroup:
    earlier = tuple((chunk, tuple(known[chunk])) for chunk in chunks if known and chunk in known)
    return StageOfGroup(work.tasks, work.keep, earlier) if earlier else work


def _after(run: Callable[..., Any], *own: Any, after: Any, **arguments: Any) -> Any:  # noqa: ARG001 (an edge of the graph)
    return run(*own, **arguments)


def _window(groups: Sequence[BoundGroup], window: int | None, name: Callable[[int], Any]) -> dict[int, list[Key]]:
    """For each group that writes scratch, the readers of chunks some groups before it: it waits for them."""
    if window is None:
        return {}
    result: dict[int, list[Key]] = {}
    position = {group.number: n for n, group in enumerate(groups)}
    maker = {chunk: group.number for group in groups for chunk in group.writes}
    readers: dict[int, list[BoundGroup]] = {}
    for group in groups:
        for number in {maker[chunk] for chunk in group.reads if chunk in maker}:
            readers.setdefault(number, []).append(group)
    for phase in {group.phase for group in groups if not group.is_last}:
        writing = [group for group in groups if group.phase == phase]
        for earlier, group in zip(writing, writing[window:], strict=False):
            waits = [
                (_last(reader), name(reader.number))
                for reader in readers.get(earlier.number, ())
                # A reader that needs what this group or a later one writes cannot be waited for.
                if all(position[maker[chunk]] < position[group.number] for chunk in reader.reads if chunk in maker)
            ]
            if waits:
                result[group.number] = waits
    return result


def finish_output(finish: Finish, written: Sequence[Any], stored: Sequence[Any] = ()) -> int:
    """Make an output whole: what the task `finish` runs, when all of its bytes are written. Gives the number of its target.

    `written`: the results of the tasks that wrote ranks. `stored`: of those that wrote scratch.
    """
    entries = [*finish.earlier, *(entry([each.number], [c for c in each.checksums if c.sink == finish.sink]) for each in written)]
    stages = {stage: dict(totals) for stage, totals in finish.stages.items()}
    for each in (*stored, *written):
        for (stage, unit), value in each.metrics.items():
            totals = stages.setdefault(stage, {})
            totals[unit] = totals.get(unit, 0.0) + value
    moved = {
        "bytes_read": finish.bytes_read,
        "scratch_bytes_read": finish.scratch_bytes_read,
        "bytes_written": stage_bytes(stages, "write"),
        "scratch_bytes_written": stage_bytes(stages, "write_scratch"),
    }
    finish.output.finish(entries, {"seconds": round(time.time() - finish.started, 3), **moved, "stages": stages})
    return finish.number
