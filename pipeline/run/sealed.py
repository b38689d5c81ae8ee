"""Tasks as they travel to a cluster: what only a worker need know of one is pickled once, and taken apart where it runs.

A plan's tasks hold thousands of small objects. As objects they would be pickled by the client, made again by the scheduler, pickled
there and made by the worker; each of the three would hold them.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import takewhile
from typing import Any


@dataclass(frozen=True, slots=True)
class Sealed:
    """A function and its first arguments, pickled and compressed: tasks name the same tensors and files again and again.

    `admission`: the name by which it asks whether this worker may do it; "" where all may.
    """

    content: bytes
    admission: str = ""

    def __call__(self, *inputs: Any, **arguments: Any) -> Any:
        """Call the function with what it was sealed with, then `inputs`. Raises WriteFailed where this worker may not."""
        from distributed.protocol.pickle import loads

        if self.admission:
            from pipeline.run.admission import check_admitted

            check_admitted(self.admission)

        function, own = loads(zlib.decompress(self.content))
        return function(*own, *inputs, **arguments)


def sealed(task: Any, admission: str = "") -> Any:
    """A task of Dask's with its function and those arguments sealed that come before the first result of another task.

    `admission`: the name by which it asks whether its worker may do it.
    """
    from dask._task_spec import Task
    from distributed.protocol.pickle import dumps

    own = tuple(takewhile(lambda argument: not getattr(argument, "dependencies", ()) and not _is_reference(argument), task.args))
    return Task(task.key, Sealed(zlib.compress(dumps((task.func, own)), 1), admission), *task.args[len(own) :], **task.kwargs)


def _is_reference(argument: Any) -> bool:
    from dask._task_spec import TaskRef

    return isinstance(argument, TaskRef)
