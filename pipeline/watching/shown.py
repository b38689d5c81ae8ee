"""The listeners of a run that another program's call begins: its own, and the progress that it asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.watching.bar import ProgressBar
from pipeline.watching.listener import Listener
from pipeline.watching.notebook import NotebookBar, in_notebook
from pipeline.watching.progress import ProgressLines
from pipeline.watching.state import RunWatch

if TYPE_CHECKING:
    from pipeline.planning.plans import Plan
    from stages.write import Written


class Several:
    """A listener that tells others, in their order."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners

    def started(self, plan: Plan, dashboard: str, total_bytes: int, done_bytes: int, done_tasks: int) -> None:
        for each in self._listeners:
            each.started(plan, dashboard, total_bytes, done_bytes, done_tasks)

    def advanced(self, written: Written) -> None:
        for each in self._listeners:
            each.advanced(written)

    def finished(self) -> None:
        for each in self._listeners:
            each.finished()


def shown(progress: bool | None, listener: Listener | None, watch: RunWatch) -> Listener | None:
    """Return what a run is to tell: `listener`, and where progress is wanted, what shows `watch` here.

    `progress`: None for yes in a notebook that gives no listener of its own. In a notebook it is a line of HTML, on a terminal a
    bar, elsewhere lines, both on standard error.
    """
    notebook = in_notebook()
    if not (notebook and listener is None if progress is None else progress):
        return listener
    stream = sys.stderr
    terminal = bool(stream) and stream.isatty()
    bar = NotebookBar(watch) if notebook else ProgressBar(stream, watch, guest=True) if terminal else ProgressLines(stream, watch)
    return Several([bar, listener]) if listener else bar
