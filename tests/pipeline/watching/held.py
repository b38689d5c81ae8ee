"""A conversion held still half-way, so that it can be looked at."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import convert
from pipeline.errors import HeadraceError
from pipeline.planning.plans import Plan
from pipeline.watching.listener import Silent
from stages.write import Written
from tests.support import checkpoints

WAIT_SECONDS = 60


class Held(Silent):
    """A listener that stops the run when a number of tasks has ended, until it is let go."""

    def __init__(self, tasks: int) -> None:
        self.left = tasks
        self.reached, self.released = threading.Event(), threading.Event()
        self.dashboard = ""
        self.written: list[Written] = []
        self.plan: Plan | None = None

    def started(self, plan: Plan, dashboard: str, total_bytes: int, done_bytes: int, done_tasks: int) -> None:  # noqa: ARG002
        self.plan, self.dashboard = plan, dashboard

    def advanced(self, written: Written) -> None:
        self.written.append(written)
        self.left -= 1
        if self.left == 0:
            self.reached.set()
            assert self.released.wait(WAIT_SECONDS)


@contextlib.contextmanager
def held(source: Path, tasks: int = 3, **options: Any) -> Iterator[Held]:
    """A conversion of a few blocks, stopped when `tasks` of them are done; it ends with the context."""
    listener = Held(tasks)
    raised: list[BaseException] = []

    def work() -> None:
        try:
            convert(model_dir=source, listener=listener, **options)
        except (Exception, HeadraceError) as error:
            raised.append(error)
            listener.reached.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert listener.reached.wait(WAIT_SECONDS)
        if raised:
            raise raised[0]
        yield listener
    finally:
        listener.released.set()
        thread.join()
    assert not raised, raised


def several_blocks(directory: Path, layers: int = checkpoints.LLAMA["num_hidden_layers"]) -> Path:
    """A checkpoint of some ten tasks, or of more layers of some 30 MiB: the smallest block is 8 MiB."""
    config = {**checkpoints.LLAMA, "hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 4096}
    config["num_hidden_layers"] = layers
    checkpoints.write(directory, {**config, "num_attention_heads": 8, "num_key_value_heads": 4})
    return directory
