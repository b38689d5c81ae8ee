"""Workers that come while a run is under way are asked as they come: on one that is not as it must be, no task of the run runs.

The scheduler hands the plugin to each worker before any task. It is loaded where there are workers elsewhere, as it needs Dask's
distributed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from distributed import WorkerPlugin, get_worker

from pipeline.errors import WriteFailed
from pipeline.run.looking import Question, faults, look, shared
from pipeline.sinks.journal import first_line
from pipeline.sinks.output import CONFIG

LEAVING_SECONDS = 5.0  # for workers to forget a run


class Admission(WorkerPlugin):  # type: ignore[misc]
    """Asks a worker whether it is as the tasks of a run need it.

    `marks`: the first lines of the journals of what the run writes, by their paths. `refusal`: why it is not, in the worker.
    """

    def __init__(self, question: Question, marks: Mapping[str, bytes], asker: str) -> None:
        self.question, self.marks, self.asker, self.refusal = question, dict(marks), asker, ""

    async def setup(self, worker: Any) -> None:
        """Look, beside the worker's own events, which go on."""
        self.refusal = await asyncio.to_thread(self._refusal, worker.address)

    def _refusal(self, address: str) -> str:
        try:
            said = look(self.question, {})
        except OSError as error:
            return f"worker {address} on {os.uname().nodename}: {error}"
        problems = [str(problem) for problem in faults(address, said, self.question, self.asker)]
        # As the probes of the workers that were there are removed by now.
        unseen = [path for path, line in self.marks.items() if first_line(path) != line and not _whole(path)]
        host = f"worker {address} on {said['host']}"
        return "; ".join([*problems, *(f"{host}: does not see {path}; expected {shared(self.asker)}" for path in unseen)])

    def check(self) -> None:
        """Raise WriteFailed where the worker may do no task of the run, or another job has begun in the place of its outputs."""
        if self.refusal:
            raise WriteFailed(f"{self.refusal}: end that worker or mend this, and run the same command again")
        for path, line in self.marks.items():
            if (found := first_line(path)) and found != line:
                raise WriteFailed(f"{path} is another job's by now: this run of it has ended")


def check_admitted(name: str) -> None:
    """Look, in a task, whether its worker may do tasks of the run of this name. Raises WriteFailed where it may not."""
    worker = get_worker()
    plugin = worker.plugins.get(name)
    if plugin is None:
        raise WriteFailed(f"worker {worker.address} was not asked before its first task, or the run has ended")
    plugin.check()


def _whole(journal: str) -> bool:
    """Whether the output of a journal is whole by now, so that the journal is gone."""
    return not Path(journal).exists() and (Path(journal).parent / CONFIG).exists()


@contextmanager
def admitting(client: Any, question: Question, marks: Mapping[str, bytes]) -> Iterator[str]:
    """Have all workers that come meanwhile asked. Gives the name by which tasks ask whether theirs may do them."""
    name = f"headrace-{uuid4().hex}"
    client.register_plugin(Admission(question, marks, os.uname().nodename), name)
    try:
        yield name
    finally:
        if client.status == "running":
            with suppress(Exception):  # whatever is lost by now, the run says how it ended
                client.sync(client.scheduler.unregister_worker_plugin, name=name, callback_timeout=LEAVING_SECONDS)
