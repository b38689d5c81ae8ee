"""Run the comparisons of a verification in threads, and report their progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

Advance = Callable[[str, int, int], None]  # (level, bytes or values done, in all)


def run_tasks(
    level: str, work: Iterable[tuple[Callable[..., Any], tuple[Any, ...], int]], workers: int, advance: Advance
) -> Iterator[Any]:
    """Run functions in threads and yield their results, in the order in which they end.

    None waits for another, so that they need no graph, and a verification no Dask, whose import takes 0.3 s on a slow processor.

    `work`: (function, arguments, size) of each; its size, in bytes or values, is its share of the progress that `advance` is told.
    """
    threads = ThreadPoolExecutor(workers)
    try:
        sizes = {threads.submit(function, *arguments): size for function, arguments, size in work}
        done, total = 0, sum(sizes.values())
        for ended in as_completed(sizes):
            done += sizes[ended]
            advance(level, done, total)
            yield ended.result()
    finally:
        threads.shutdown(cancel_futures=True)
