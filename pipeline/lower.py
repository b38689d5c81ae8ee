"""Lowering: a plan's phases as Dask graphs of one fused task for each group of source blocks.

Dask's schedulers take milliseconds a task, so that a task does all stages of its blocks: it reads each once and scatters it to
every rank of every target. The stages' shares show under Fine Performance Metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.plans import Group, Plan
from stages.write import BlockWrite, deliveries, write_blocks

if TYPE_CHECKING:
    import dask.array as da

Graph = dict[tuple[str, str, int], Any]


def lower(plan: Plan, run: Callable[..., Any] = write_blocks) -> Graph:
    """The graph of a plan: {("write", tensor, number): task}. `run` is what each task calls."""
    layers: dict[str, Mapping[Any, Any]] = {}
    graph = {}
    for number, group in enumerate(plan.groups):
        key = ("write", group[-1][0].name, number)
        graph[key] = _task(key, plan, group, layers, run)
    return graph


def _task(
    key: tuple[str, str, int], plan: Plan, group: Group, layers: dict[str, Mapping[Any, Any]], run: Callable[..., Any]
) -> Any:
    from dask._task_spec import List, Task, TaskRef

    work, inputs = [], []
    needed: dict[Any, Any] = {}
    for store, index in group:
        region = store.region(index)
        bound = tuple(
            deliveries(placements, region, target.output.files)
            for placements, target in zip(store.placements, plan.targets, strict=True)
        )
        work.append(BlockWrite(store.name, bound, store.itemsize, plan.budget.piece_bytes, store.row_multiple))
        keys = [(array.name, *index) for array in store.arrays]
        for block, array in zip(keys, store.arrays, strict=True):
            _collect(block, array, layers, needed)
        inputs.append(List(*map(TaskRef, keys)))
    return Task.fuse(*needed.values(), Task(key, run, tuple(work), List(*inputs)), key=key)


def _collect(key: Any, array: da.Array, layers: dict[str, Mapping[Any, Any]], needed: dict[Any, Any]) -> None:
    """Add the tasks that make the block `key` to `needed`, sources first, following the array's layers."""
    if key in needed:
        return
    name = key[0]
    if name not in layers:
        layers[name] = dict(array.dask.layers[name])
    task = layers[name][key]
    for dependency in task.dependencies:
        _collect(dependency, array, layers, needed)
    needed[key] = task
