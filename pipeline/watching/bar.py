"""A bar on a terminal: where a run is, how much of its bytes are written and how fast, the time left, and its rank files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, Any

from pipeline.watching.charts import clock
from pipeline.watching.notes import notes
from pipeline.watching.state import RunWatch, Snapshot
from pipeline.watching.steps import LONGEST, files_words, step
from pipeline.watching.units import human_rate, part_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pipeline.planning.plans import Plan
    from stages.write import Written

REFRESHES = 5  # a second
RATE, LEFT = 10, 7  # characters: what stands beside the bar keeps its width, so that nothing moves when a number gets shorter


class ProgressBar:
    """A listener with a bar of rich. `watch`: what it shows. `guest`: in another's program, whose output streams are left alone."""

    def __init__(self, stream: IO[str], watch: RunWatch, guest: bool = False) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        from pipeline.watching.consoles import PlainConsole

        class Bar(Progress):
            """A bar that looks at the run each time that it is drawn."""

            def get_renderables(self) -> Iterable[RenderableType]:
                for task in self.tasks:
                    now = watch.snapshot()
                    self.update(task.id, total=now.total_bytes or None, completed=_done(now), **_texts(now))
                yield self.make_tasks_table(self.tasks)

        names = ("step", "size", "rate", "left", "files")
        first, *others = (TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in names)
        self._progress = Bar(
            first,
            BarColumn(bar_width=None),
            *others,
            console=PlainConsole(file=stream),
            expand=True,
            refresh_per_second=REFRESHES,
            redirect_stdout=not guest,
            redirect_stderr=not guest,
        )
        self._watch = watch

    def started(self, plan: Plan, dashboard: str, total_bytes: int, done_bytes: int, done_tasks: int) -> None:
        for note in notes(plan, dashboard, done_tasks):
            self._progress.console.print(note)
        self._progress.add_task("", total=total_bytes, completed=done_bytes, **_texts(self._watch.snapshot()))
        self._progress.start()

    def advanced(self, written: Written) -> None:
        """Do nothing: the bar looks by itself."""

    def finished(self) -> None:
        self._progress.stop()


def _done(now: Snapshot) -> int:
    return min(now.done_bytes, now.total_bytes)


def _texts(now: Snapshot) -> dict[str, Any]:
    """The texts beside the bar, each of a fixed width but for the last."""
    left = clock(now.eta_seconds) if now.eta_seconds else ""
    rate = human_rate(now.bytes_per_second or 0) if left else ""
    return {
        "step": f"{step(now):{LONGEST}}",
        "size": part_of(_done(now), now.total_bytes),
        "rate": f"{rate:>{RATE}}",
        "left": f"{left:>{LEFT}}",
        "files": files_words(now),
    }
