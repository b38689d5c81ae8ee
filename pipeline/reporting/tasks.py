"""Run the comparisons of a verification as Dask tasks in threads, and report their progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipeline.errors import BadInput
from pipeline.planning.dask_settings import settings_problems
from pipeline.run.threads import threaded

Advance = Callable[[str, int, int], None]  # (level, bytes or values done, in all)


def run_tasks(
    level: str, work: Iterable[tuple[Callable[..., Any], tuple[Any, ...], int]], workers: int, advance: Advance
) -> Iterator[Any]:
    """Run functions as Dask tasks and yield their results, in the order in which they end.

    `work`: (function, arguments, size) of each task; its size, in bytes or values, is its share of the progress that `advance` is
    told. Raises BadInput where Dask's settings cannot be read.
    """
    if problems := settings_problems():
        raise BadInput(problems)
    from dask._task_spec import Task

    graph: dict[Any, Any] = {}
    sizes = []
    for number, (function, arguments, size) in enumerate(work):
        key = (level, function.__name__, number)
        graph[key] = Task(key, _numbered, number, function, *arguments)
        sizes.append(size)
    done, total = 0, sum(sizes)
    for number, value in threaded(graph, frozenset(graph), workers):
        done += sizes[number]
        advance(level, done, total)
        yield value


def _numbered(number: int, function: Callable[..., Any], *arguments: Any) -> tuple[int, Any]:
    return number, function(*arguments)
