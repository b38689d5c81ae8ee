"""The Dask graph of a plan: a task for each stage of each group of blocks, from the source to whole outputs.

The stages' arrays are made of small tasks, one a block. A node of this graph is a stage of a *group* of blocks (some hundred MB of
neighbouring bytes of the source), keyed (stage, number of the group), so that Dask's own pages show the stages: `read`, `rename`,
`unpack`, `cast`, `quantize`, then `scratch` or `write`, `finish` for each output, and `build` for each engine. A group has a task
for each stage that it passes. Only `scratch` and `write` move bytes: the values of the others are blocks that nothing has read.

Where activations are measured in the same run, there is a task `calibrate` for each decoder layer, after that of the layer before
it. A group that reads ranges waits, in `quantize` or the task that reads them, for the layers that these are of, and no others.

A task that opens chunks of scratch depends on the tasks that write these, so that there are no phases to wait for. `finish` depends
on the tasks that write to its output, and `build` on the `finish` of its checkpoint alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.calibration.layer_task import LayerCall, calibrate_layer
from pipeline.errors import SourceChanged
from pipeline.planning.bind import STAGES, BoundGroup, bind
from pipeline.planning.build_steps import GPU, BuildStep
from pipeline.planning.moments import Moment, course
from pipeline.planning.phases import Phased
from pipeline.planning.scratch_window import Key, last_stage, window_edges
from pipeline.sinks.journal import entry
from pipeline.sinks.output import Output
from pipeline.tensor.blocks import Part, StageOfGroup, make_blocks
from pipeline.tensor.metering import stage_bytes
from pipeline.tensor.source_file import SourceFile
from stages.build import build
from stages.read.changing import changes
from stages.write import write_group

if TYPE_CHECKING:
    from dask.highlevelgraph import HighLevelGraph

RESULTS = ("calibrate", "scratch", "write", "finish", "build")  # the stages whose tasks give results, and not blocks
ORDER = tuple(dict.fromkeys(("calibrate", *STAGES, *RESULTS)))  # of all stages


@dataclass(frozen=True)
class Finish:
    """An output that a graph makes whole.

    `number`: of its target. `sink`: its position among the sinks that are written. `earlier`: the entries of its journal.
    `started`: when the run began, in seconds since the epoch. `stages`: seconds and bytes by stage of tasks that are not in the
    graph, as they were run before it; `moments`: their ends. `source`: the files that the run reads, which are looked at again when
    it has. `memory_limit_bytes`: of each process. `cuts`: the stages behind which scratch is.
    """

    number: int
    sink: int
    output: Output
    earlier: tuple[Mapping[str, Any], ...]
    started: float
    bytes_read: int = 0
    scratch_bytes_read: int = 0
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    source: tuple[SourceFile, ...] = ()
    moments: tuple[Moment, ...] = ()
    memory_limit_bytes: int = 0
    cuts: tuple[str, ...] = ()


def no_builds() -> None:
    """Halt no builds: there are none."""


@dataclass(frozen=True)
class StageGraph:
    """A graph that is run.

    `layers`: the tasks by stage. `places`: how far the groups are through their phases, by number. `halt`: ends builds that are at
    work, for whoever will not wait for them. `admission`: the name by which tasks, but for builds, ask whether their worker may do
    them; "" where all may.
    """

    layers: Mapping[str, Mapping[Key, Any]]
    places: Mapping[Any, tuple[float, int]] = field(repr=False)
    halt: Callable[[], None] = field(default=no_builds, repr=False)
    admission: str = ""

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
        """The graph as Dask takes it: a layer a stage, each task with the priority of its group.

        Groups run in the order of the source, and those that read scratch before more is written to it. A build takes a `GPU`.
        """
        from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

        first = (-1.0, 0)  # an output is made whole, and its engine begun, as soon as it can be
        places = {key: first if key[0] in ("calibrate", "finish", "build") else self.places[key[1]] for key in self.tasks}
        priority = Priorities({key: phase * 1e-3 - place * 1e3 for key, (place, phase) in places.items()})
        layers = {
            name: MaterializedLayer(
                dict(layer), annotations={"priority": priority, **({"resources": dict(GPU)} if name == "build" else {})}
            )
            for name, layer in self.layers.items()
        }
        dependencies = {
            name: {dependency[0] for task in layer.values() for dependency in task.dependencies} - {name}
            for name, layer in self.layers.items()
        }
        return HighLevelGraph(layers, dependencies)


@dataclass(frozen=True)
class Priorities:
    """The priority of each task by its key, as an annotation of a graph's layer; the greatest goes first."""

    by_key: Mapping[Any, float]

    def __call__(self, key: Any) -> float:
        return self.by_key[key]


def stage_graph(
    groups: Iterable[BoundGroup],
    finishes: Sequence[Finish] = (),
    *,
    calibrations: Sequence[LayerCall] = (),
    builds: Sequence[BuildStep] = (),
    halt: Callable[[], None] = no_builds,
    admission: str = "",
    in_turn: bool = False,
    known: Mapping[str, Sequence[Part]] | None = None,
    window: int | None = None,
    name: Callable[[int], Any] = int,
    run_mark: str = "",
    run: Callable[..., Any] = write_group,
    uploads: Mapping[str, str] | None = None,
    **arguments: Any,
) -> StageGraph:
    """Make the graph of groups that are to be done.

    Parameters
    ----------
    finishes
        The outputs that are made whole, each when the tasks that write to it have ended.
    calibrations
        The layers that are calibrated, one after the other.
    builds
        The engines that are built, each when its checkpoint is whole.
    halt
        Ends the builds that are at work.
    admission
        The name by which tasks ask whether their worker may do them; "" where all may.
    in_turn
        Whether a build waits for the one before it, where no worker's resources keep them apart.
    known
        The parts of the chunks of scratch that an earlier run wrote.
    window
        How many groups `scratch` may be ahead of what reads it; None for any number.
    name
        Gives the second part of a task's key for the number of a group.
    run_mark
        Beside that number, where a scheduler may have the tasks of other runs: to it, tasks of one key are one.
    run
        What the tasks `scratch` and `write` call, with `arguments`.
    uploads
        The ids of uploads in parts, by the URL of the rank's file.
    """
    from dask._task_spec import List, Task, TaskRef

    def named(number: int) -> Any:
        return (name(number), run_mark) if run_mark else name(number)

    def made_whole(output: int) -> Key:
        return "finish", (output, run_mark) if run_mark else output

    groups = list(groups)
    writers: dict[str, list[Key]] = {}
    for group in groups:
        for chunk in group.writes:
            writers.setdefault(chunk, []).append((last_stage(group), named(group.number)))
    held_back = window_edges(groups, window, named)
    # A cluster that loses a worker does again what it had done, though the output of it be whole.
    marks = tuple(finish.output.local_mark for finish in sorted(finishes, key=lambda finish: finish.sink))
    layers: dict[str, dict[Key, Any]] = {}

    def add(stage: str, number: Any, function: Callable[..., Any], *own: Any, **keywords: Any) -> Key:
        key = (stage, number)
        layers.setdefault(stage, {})[key] = Task(key, function, *own, **keywords)
        return key

    calibrated: dict[int, Key] = {}  # by layer
    for call in calibrations:
        own = (TaskRef(calibrated[call.layer - 1]),) if call.layer - 1 in calibrated else ()
        place = (call.layer, run_mark) if run_mark else call.layer
        calibrated[call.layer] = add("calibrate", place, calibrate_layer, call, *own)
    for group in groups:
        number = named(group.number)
        before: list[Key] = []
        measured = [calibrated[group.inputs.layer]] if group.inputs.layer in calibrated else []
        for stage, work in group.stages:
            chunks = [chunk for chunk, opener in group.openers.items() if opener == stage]
            inputs = [*before, *_distinct(writers, chunks)]
            own = (make_blocks, _with_known(work, chunks, known), *map(TaskRef, inputs))
            if stage == "quantize" and measured:
                own, waits = (_after, *own), {"after": List(*map(TaskRef, measured))}
                before, measured = [add(stage, number, *own, **waits)], []
            else:
                before = [add(stage, number, *own)]
        chunks = [chunk for chunk, opener in group.openers.items() if not opener]
        inputs = [*before, *_distinct(writers, chunks)]
        opened = _with_known(group.opened, chunks, known)
        own = (group.number, group.work, opened, group.blocks, *map(TaskRef, inputs))
        behind = [*held_back.get(group.number, ()), *measured]
        waits = {"after": List(*map(TaskRef, behind))} if behind else {}
        assembled = {"part": group.part, "uploads": {group.part.url: (uploads or {}).get(group.part.url, "")}} if group.part else {}
        more = {**waits, **({"outputs": marks} if marks else {}), **assembled, **arguments}
        add(last_stage(group), number, _after if waits else run, *((run, *own) if waits else own), **more)
    stored = list(layers.get("scratch", ()))
    for finish in finishes:
        written = [(last_stage(group), named(group.number)) for group in groups if group.is_last and _delivers(group, finish.sink)]
        add(*made_whole(finish.number), finish_output, finish, List(*map(TaskRef, written)), List(*map(TaskRef, stored)))
    built: list[Key] = []
    for step in sorted(builds, key=lambda step: step.output is not None):
        checkpoint = (
            [key for key in [made_whole(step.output)] if key in layers.get("finish", ())] if step.output is not None else []
        )
        waits = {"after": List(*map(TaskRef, [*checkpoint, *(built[-1:] if in_turn else ())]))}
        built.append(add("build", step.call.name, _after, build, step.call, **waits))
    ordered = {stage: layers[stage] for stage in ORDER if stage in layers}
    return StageGraph(ordered, {named(group.number): (group.place, group.phase) for group in groups}, halt, admission)


def whole_graph(
    plan: Phased, outputs: Sequence[Output], builds: Sequence[BuildStep] = (), calibrations: Sequence[LayerCall] = ()
) -> StageGraph:
    """Make the graph of all groups of a plan, as if nothing had been done before.

    `outputs`: the sinks of its last phase. `builds`: the engines that are made of them. `calibrations`: the layers measured.
    """
    groups = [
        bind(plan, number, index, range(len(phase.sinks)))
        for number, phase in enumerate(plan.phases)
        for index in range(len(phase.groups))
    ]
    finishes = [Finish(number, number, output, (), 0.0) for number, output in enumerate(outputs)]
    return stage_graph(groups, finishes, builds=builds, calibrations=calibrations)


def _delivers(group: BoundGroup, sink: int) -> bool:
    """Whether a group writes anything to a sink, by the sink's position among those written."""
    return group.part.sink == sink if group.part else any(item.deliveries[sink] for item in group.work)


def _distinct(writers: Mapping[str, Sequence[Key]], chunks: Iterable[str]) -> Iterator[Key]:
    """The tasks that write some chunks, each once."""
    yield from dict.fromkeys(key for chunk in chunks for key in writers.get(chunk, ()))


def _with_known(work: StageOfGroup, chunks: Iterable[str], known: Mapping[str, Sequence[Part]] | None) -> StageOfGroup:
    earlier = tuple((chunk, tuple(known[chunk])) for chunk in chunks if known and chunk in known)
    return StageOfGroup(work.tasks, work.keep, earlier) if earlier else work


def _after(run: Callable[..., Any], *own: Any, after: Any, **arguments: Any) -> Any:  # noqa: ARG001 (an edge of the graph)
    return run(*own, **arguments)


def finish_output(finish: Finish, written: Sequence[Any], stored: Sequence[Any] = ()) -> int:
    """Make an output whole: what the task `finish` runs, when all of its bytes are written. Gives the number of its target.

    `written`: the results of the tasks that wrote ranks. `stored`: of those that wrote scratch. Raises SourceChanged where the
    source's files are not those that the run began with, and OSError where the disk fails.
    """
    if finish.output.marked:  # done before, by a worker that is lost
        return finish.number
    if changed := changes(finish.source):
        raise SourceChanged(changed)
    entries = [*finish.earlier, *(entry([each], finish.sink) for each in written)]
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
    ends = (Moment(each.ended, each.bytes_written, each.memory_bytes) for each in (*stored, *written) if each.ended)
    run = course((*finish.moments, *ends), finish.started, finish.memory_limit_bytes)
    said = {"stages": stages, "scratch_after": list(finish.cuts), "course": run}
    finish.output.finish(entries, {"seconds": round(time.time() - finish.started, 3), **moved, **said})
    return finish.number
