"""The progress of a run in a notebook: a line of HTML below the cell that is brought up to date, and the page's link in it."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline.printed import in_html
from pipeline.watching.notes import notes, page_address
from pipeline.watching.page import duration
from pipeline.watching.state import RunWatch, Snapshot
from pipeline.watching.steps import files_words, step
from pipeline.watching.units import human_rate, part_of

if TYPE_CHECKING:
    from pipeline.planning.plans import Plan
    from stages.write import Written

SECONDS = 0.5  # between two updates


def in_notebook() -> bool:
    """Whether the code that runs was typed into a notebook: Jupyter's, Colab's, an editor's. Loads nothing of IPython."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__)


class NotebookBar:
    """A listener that shows `watch` below a notebook's cell. Nothing but the cell's output changes."""

    def __init__(self, watch: RunWatch) -> None:
        self._watch = watch
        self._page, self._notes = "", ""
        self._update: Callable[[Any], None] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="headrace-notebook", daemon=True)

    def started(
        self,
        plan: Plan,
        dashboard: str,
        total_bytes: int,  # noqa: ARG002
        done_bytes: int,  # noqa: ARG002
        done_tasks: int,
    ) -> None:
        self._page = page_address(plan.job, dashboard)
        links = (self._page, dashboard)
        said = [note for note in notes(plan, dashboard, done_tasks) if note.partition(" ")[2] not in links]
        self._notes = "".join(f"<br><small>{in_html(note)}</small>" for note in said)
        display = importlib.import_module("IPython.display")
        handle = display.display(display.HTML(self._html()), display_id=True)
        self._update = lambda text: handle.update(display.HTML(text))
        self._thread.start()

    def advanced(self, written: Written) -> None:
        """Do nothing: the thread looks by itself."""

    def finished(self) -> None:
        if self._update:
            self._over.set()
            self._thread.join()
            self._update(self._html())

    def _follow(self) -> None:
        while self._update and not self._over.wait(SECONDS):
            self._update(self._html())

    def _html(self) -> str:
        now = self._watch.snapshot()
        link = f'<a href="{in_html(self._page)}" target="_blank">page</a>' if self._page and not self._over.is_set() else ""
        return f"{progress_line(now, link)}{self._notes}"


def progress_line(now: Snapshot, link: str = "") -> str:
    """A run as one line of HTML. Its colours are the notebook's own. `link`: HTML that ends it."""
    done, total = min(now.done_bytes, now.total_bytes), now.total_bytes
    words = [part_of(done, total).strip()]
    if now.eta_seconds:
        words += [human_rate(now.bytes_per_second or 0), f"{duration(now.eta_seconds)} left"]
    words += [files] if (files := files_words(now)) else []
    facts = " · ".join([*map(in_html, words), *([link] if link else [])])
    bar = f'<progress value="{done}" max="{max(total, 1)}" style="width:18em;vertical-align:middle"></progress>'
    return f'<span style="display:inline-block;width:8em">{in_html(step(now))}</span> {bar} {facts}'
