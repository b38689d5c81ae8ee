"""The blocks of lazy arrays: the tasks that make one, and one block by itself, without a scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import dask.array as da


def read_block(array: da.Array, index: Sequence[int]) -> Any:
    """The block of an array at a chunk index: still unread, as no stage reads before it is asked for values."""
    from dask._task_spec import Task

    needed: dict[Any, Any] = {}
    key = (array.name, *index)
    collect(key, array, {}, needed)
    return Task.fuse(*needed.values(), key=key)()


def collect(key: Any, array: da.Array, layers: dict[str, Mapping[Any, Any]], needed: dict[Any, Any]) -> None:
    """Add the tasks that make the block `key` to `needed`, sources first, following the array's layers."""
    if key in needed:
        return
    name = key[0]
    if name not in layers:
        layers[name] = dict(array.dask.layers[name])
    task = layers[name][key]
    for dependency in task.dependencies:
        collect(dependency, array, layers, needed)
    needed[key] = task
