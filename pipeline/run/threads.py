"""Tasks on Dask's threads, whatever they are of; it needs no more than Dask."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

LEAVING_SECONDS = 10.0  # for tasks that are at work when a run is stopped; a second Ctrl-C does not wait
FAILING_SECONDS = 60.0  # for those that are when another has failed, as files may be removed then


def threaded(
    tasks: Mapping[Any, Any], wanted: Collection[Any], workers: int, halt: Callable[[], None] | None = None
) -> Generator[Any, None, None]:
    """Run tasks in the order of Dask's choice; the results of those `wanted` come through a queue as tasks end.

    Where a task fails, or the results are closed, those at work are waited for, up to a time. `halt`: called then, before that.
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
        pool = ThreadPoolExecutor(workers)
        try:
            # As an argument: a context of callbacks is the process's, and would be told of its host's tasks as well.
            told = [(None, None, before, after, None)]  # start, its state, before and after a task, finish
            dask.threaded.get(tasks, [key for key in tasks if key in wanted], pool=pool, callbacks=told)
        except BaseException as error:
            results.put(error)
        else:
            results.put(None)
        pool.shutdown(cancel_futures=True)  # which Dask does not wait for, where a task has failed

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    patience = LEAVING_SECONDS
    try:
        while (value := results.get()) is not None:
            if isinstance(value, BaseException):
                patience = FAILING_SECONDS
                raise value
            yield value
        halt = None
    finally:
        stop.set()
        if halt:
            halt()
        thread.join(patience)
