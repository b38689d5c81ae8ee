"""Lowering: a phase as a Dask graph of one fused task for each group of source blocks.

Dask's schedulers take milliseconds a task, so that a task does all stages of its blocks: it reads each once and scatters it to
every rank of every target. The stages' shares show under Fine Performance Metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.planning.plans import Group, Phase
from pipeline.sinks.output import Output
from pipeline.tensor.blocks import collect
from stages.write import BlockWrite, deliveries, write_blocks

if TYPE_CHECKING:
    pass

Graph = dict[tuple[str, str, int], Any]


def lower(
    phase: Phase,
    piece_bytes: int,
    sinks: Sequence[int],
    done: Collection[int] = (),
    run: Callable[..., Any] = write_blocks,
    **arguments: Any,
) -> Graph:
    """The tasks of a phase that are not `done`: {(prefix, tensor, number): task}, writing to the `sinks` of these numbers alone.

    `run(number, work, blocks, **arguments)` is what each task calls.
    """
    layers: dict[str, Mapping[Any, Any]] = {}
    graph = {}
    prefix = "write" if isinstance(phase.sinks[0], Output) else "scratch"
    for number, group in enumerate(phase.groups):
        if number not in done:
            key = (prefix, group[-1][0].name, number)
            graph[key] = _task(key, phase, group, sinks, piece_bytes, layers, run, arguments)
    return graph


def _task(
    key: tuple[str, str, int],
    phase: Phase,
    group: Group,
    sinks: Sequence[int],
    piece_bytes: int,
    layers: dict[str, Mapping[Any, Any]],
    run: Callable[..., Any],
    arguments: Mapping[str, Any],
) -> Any:
    from dask._task_spec import List, Task, TaskRef

    work, inputs = [], []
    needed: dict[Any, Any] = {}
    for store, index in group:
        region = store.region(index)
        bound = tuple(
            deliveries(store.placements[sink], region, phase.sinks[sink].locate, isinstance(phase.sinks[sink], Output))
            for sink in sinks
        )
        work.append(BlockWrite(store.name, bound, store.itemsize, piece_bytes, store.row_multiple))
        keys = [(store.arrays[sink].name, *index) for sink in sinks]
        for block, sink in zip(keys, sinks, strict=True):
            collect(block, store.arrays[sink], layers, needed)
        inputs.append(List(*map(TaskRef, keys)))
    return Task.fuse(*needed.values(), Task(key, run, key[-1], tuple(work), List(*inputs), **arguments), key=key)
