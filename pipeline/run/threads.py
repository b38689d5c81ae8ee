"""Tasks on Dask's threads, whatever they are of; it needs no more than Dask."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Generator, Mapping
from typing import Any


def threaded(
    tasks: Mapping[Any, Any], wanted: Collection[Any], workers: int, halt: Callable[[], None] | None = None
) -> Generator[Any, None, None]:
    """Run tasks in the order of Dask's choice; the results of those `wanted` come through a queue as tasks end.

    `halt`: called where the results are closed while tasks run.
    """
    import dask.threaded

    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stop = threading.Event()

    def before(*_: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt

    def after(key: Any, value: Any, *_: Any) -> None:
        if key in wanted:
            results.put(value)

    def work() -> None:
        try:
            # As an argument: a context of callbacks is the process's, and would be told of its host's tasks as well.
            told = [(None, None, before, after, None)]  # start, its state, before and after a task, finish
            dask.threaded.get(tasks, [key for key in tasks if key in wanted], num_workers=workers, callbacks=told)
        except BaseException as error:
            results.put(error)
        else:
            results.put(None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (value := results.get()) is not None:
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        stop.set()
        if halt and thread.is_alive():
            halt()
        thread.join()
